"""Vocabulary parallelism: all ranks of a pipeline share the vocabulary, and its layers become passes of the schedule.

In a pipeline the last rank has the output layer and the first the embedding; with 256 000 words one of them sets the
pace of all. Here rank k of p has rows kV/p … (k+1)V/p of both tables. A softmax over the cut needs three exchanges one
after the other: largest logit, sum, gradient of the input. Two rewrites need fewer, and nobody waits idly for them.

    split naively   max │ exp, sum │ D, ∇X, ∇W │                 3 barriers
    Vocab-1         S: own softmax │ T: D, ∇X, ∇W │              2      Algorithm 1
    Vocab-2         S: own softmax, both parts of ∇X │ T: ∇W     1      Algorithm 2: T is waited for by nobody
    interlaced      Vocab-1's passes, but all ranks stop for each exchange (tensor parallelism)

Beside them "baseline" (1F1B, tables on the two end ranks) and "redis" (the same, fewer layers on the last rank).
`_vocabulary_passes` has the arithmetic, `_vocabulary_schedule` the orders of passes, `_vocabulary_scale` the paper's
scale. Layers are the project's; the head is a norm and a product without bias.
Source: Yeung, Qi, Lin and Wan 2024, arXiv 2411.05288, sections 3 to 5. Chapter: model_parallel/vocabulary_parallel.
"""

import numpy as np

from toolkit.kernels.elementwise import accumulate
from toolkit.kernels.layers import add, cast, linear, linear_grad_w, linear_grad_x, rms_norm, rms_norm_backward
from toolkit.runtime.arrays import is_shape_only
from toolkit.runtime.errors import ShapeError
from toolkit.sequence_parallel._block import one_device

from . import _layers, _model, _pipeline
from ._mesh import Grid
from ._vocabulary import embed_rows, embed_rows_backward, entropy, entropy_backward, loss_of
from ._vocabulary_lanes import Here, Lane, all_reduce, beside, from_root, to_root
from ._vocabulary_passes import (
    VocabShard,
    aligned,
    alpha,
    check_targets,
    input_gradient,
    logits_gradient,
    own_softmax,
)
from ._vocabulary_schedule import SPLIT, build_schedule, output_in_layers, redistribute_layers

# ---- what ranks say to each other ------------------------------------------------------------------------------------


def totals(comm, own, targets, shard):
    """C1: the largest logit M (n,), and (Σ, the target's logit - M), (2, n), on every rank."""
    top = all_reduce(comm, own.top, np.maximum)
    return top, all_reduce(comm, beside(comm, aligned, own, top, targets, shard))


def totals_and_gradient(comm, own, targets, shard, expected, row, scale, root):
    """C1 of Vocab-2: the same, and ∇X on `root`. What is added up is scaled by α first: α is another on each rank."""
    top, both = totals(comm, own, targets, shard)
    factor = beside(comm, alpha, own, top, both)
    return top, both, to_root(comm, beside(comm, input_gradient, expected, row, factor, scale), root)


# ---- the output layer, in passes -------------------------------------------------------------------------------------


class OutputLayer:
    """Cross-entropy of the last rank's X, its gradient, and that of the table, by passes S and T on every rank.

    method    "vocab-1", "vocab-2", or "interlaced": Vocab-1 whose exchanges all ranks wait for
    table     (shard.rows, h)        targets   [(n,) integers a microbatch]
    scale     factor of the gradients, 1 / tokens for those of the mean loss
    """

    def __init__(self, comm, method, shard, table, targets, scale):
        self.rank, self.last, self.one_barrier = comm.rank, comm.size - 1, method == "vocab-2"
        self.shard, self.table, self.targets, self.scale = shard, table, targets, scale
        self.stops = method == "interlaced"
        self.c0, self.c1, self.c2 = Lane(comm), Lane(comm, self.stops), Lane(comm, self.stops)
        self.x, self.own, self.said, self.dx, self.losses, self.grad = {}, {}, {}, {}, {}, None
        if self.rank != self.last and not self.stops:
            for k in range(len(targets)):
                self.announce(k)

    def announce(self, k, x=None):
        """C0: X (n, h) of the last rank goes to all."""
        coming = self.c0.start(from_root, x, self.last)
        self.x[k] = coming if x is None or self.stops else Here(x)

    def S(self, k):
        """The rank's own softmax; with Vocab-2 also what ∇X will need."""
        if k not in self.x:
            self.announce(k)
        x, targets = self.x[k].wait(), self.targets[k]
        own = self.own[k] = own_softmax(linear(x, self.table.T), targets, self.shard)
        if self.one_barrier:
            parts = linear(cast(own.softmax, x.dtype), self.table), embed_rows(self.table, targets, self.shard.first)
            said = self.c1.start(totals_and_gradient, own, targets, self.shard, *parts, self.scale, self.last)
            self.dx[k] = said
        else:
            said = self.c1.start(totals, own, targets, self.shard)
        self.said[k] = said

    def T(self, k):
        """The gradient of the rank's rows; with Vocab-1 also its share of ∇X."""
        (top, both, *_), own, x = self.said.pop(k).wait(), self.own.pop(k), self.x.pop(k).wait()
        self.losses[k] = loss_of(both)
        factor = alpha(own, top, both)
        d_logits = logits_gradient(own, factor, self.targets[k], self.shard, self.scale, x.dtype)
        if not self.one_barrier:
            self.dx[k] = self.c2.start(to_root, linear_grad_x(self.table.T, d_logits), self.last)
        share = linear_grad_w(d_logits, x)
        self.grad = share if self.grad is None else accumulate(self.grad, share)
        if self.rank != self.last:
            del self.dx[k]

    def gradient(self, k):
        """∇X (n, h) of a microbatch, on the last rank, once all ranks have sent their shares."""
        found = self.dx.pop(k).wait()
        return found[2] if self.one_barrier else found


def output_layer(comm, method, shard, table, x, targets, scale):
    """The layer by itself: one batch, no pipeline.

    method    "naive", "vocab-1", "vocab-2" or "interlaced"
    table     (shard.rows, h) of this rank       x         (n, h), of the last rank; others pass None
    targets   (n,) integers                      scale     factor of the gradients
    returns   (losses (n,) nats, ∇X (n, h) on the last rank and None elsewhere, ∇table (rows, h))
    raises    ShapeError, a ValueError: a target is no row; no such method
    """
    check_targets(targets, shard.size)
    if method == "naive":
        return _three_barriers(comm, shard, table, x, targets, scale)
    if method not in SPLIT:
        raise ShapeError(f"method={method!r} does not cut the vocabulary: choose from naive, {', '.join(SPLIT)}")
    layer = OutputLayer(comm, method, shard, table, [targets], scale)
    if comm.rank == layer.last:
        layer.announce(0, x)
    layer.S(0)
    layer.T(0)
    dx = layer.gradient(0) if comm.rank == layer.last else None
    return layer.losses[0], dx, layer.grad


def _three_barriers(comm, shard, table, x, targets, scale):
    """Tensor parallelism's cross-entropy (`_vocabulary`): all ranks wait for the maximum, the sum and the gradient."""
    if shard.size % shard.ranks:
        raise ShapeError(f"naive: a vocabulary of {shard.size} does not divide among {shard.ranks} ranks: pad it")
    x = comm.broadcast(x, comm.size - 1)
    logits = linear(x, table.T)
    losses, saved = entropy(comm, _layers.all_reduce, logits, targets)
    d_logits = entropy_backward(comm, logits, saved, targets, np.full(len(targets), scale, losses.dtype))
    dx = comm.reduce(linear_grad_x(table.T, d_logits), comm.size - 1)
    return losses, dx, linear_grad_w(d_logits, x)


# ---- the input layer, in passes --------------------------------------------------------------------------------------


class InputLayer:
    """The embedding by passes IF and IB on every rank: rows are added up on rank 0, their gradients come from there."""

    def __init__(self, comm, method, shard, table, tokens):
        self.rank, self.shard, self.table, self.tokens = comm.rank, shard, table, tokens
        self.stops = method == "interlaced"
        self.up, self.down = Lane(comm, self.stops), Lane(comm)
        self.rows, self.coming, self.grad = {}, {}, None
        if self.rank and not self.stops:
            for k in range(len(tokens)):
                self.announce(k)

    def IF(self, k):
        """Look up the rows that this rank has, zeros for other tokens, and send them to be added."""
        self.rows[k] = self.up.start(to_root, embed_rows(self.table, self.tokens[k], self.shard.first), 0)
        if self.rank:
            del self.rows[k]

    def row(self, k):
        """(n, h) of a microbatch, on rank 0."""
        return self.rows.pop(k).wait()

    def announce(self, k, grad=None):
        """The gradient of rank 0's input goes to all."""
        coming = self.down.start(from_root, grad, 0)
        self.coming[k] = coming if grad is None or self.stops else Here(grad)

    def IB(self, k):
        """The gradient of the rank's rows."""
        if k not in self.coming:
            self.announce(k)
        share = embed_rows_backward(self.table, self.tokens[k], self.shard.first, self.coming.pop(k).wait())
        self.grad = share if self.grad is None else accumulate(self.grad, share)


# ---- one step of a model ---------------------------------------------------------------------------------------------


def step(comm, params, tokens, targets, *, method, microbatches, head_dim, layer=_model.KEEP):
    """Loss and gradients of a batch, a stage of layers on each rank.

    params            whole, as `_model` describes them; without "head" the embedding serves as both ends
    tokens, targets   (B, N) integers            microbatches   m, which divides B
    method            one of METHODS
    returns           (loss (), this rank's gradients: {"layers", "embedding", "head", "norm"}, as far as it has them,
                      tables as (rows, h) if they are cut; the most microbatches whose activations it kept)
    raises            ShapeError, a ValueError: what does not divide, a token that is no word, no such method
    """
    words = len(params["embedding"])
    for text in (tokens, targets):
        check_targets(text, words)
    schedule = build_schedule(method, comm.size, microbatches)
    chunk = cut(params, comm, method, tokens.shape[1])
    grid = Grid(comm, pp=comm.size)
    setting = _layers.Setting(grid.tp, grid.cp, one_device(causal=True), head_dim, np.arange(tokens.shape[1]))
    plan = _model.Plan(grid, schedule, setting, "head" not in params, layer)
    mine = (_model.share_of(grid, text, microbatches, setting.where) for text in (tokens, targets))
    if method in SPLIT:
        shard = VocabShard(comm.rank, comm.size, words)
        return loss_and_gradients(plan, method, shard, chunk, *mine, total=tokens.size)
    loss, (grads,), kept = _model.loss_and_gradients(plan, [chunk], *mine, total=tokens.size)
    return loss, grads, kept


def cut(params, comm, method, sequence):
    """This rank's part of whole parameters: its layers, its norm, its tables or its rows of them."""
    count, p, rank = len(params["layers"]), comm.size, comm.rank
    if method == "redis":
        each = redistribute_layers(count, p, (0.0, output_in_layers(*params["embedding"].shape, sequence)))
    elif count % p:
        raise ShapeError(f"{count} layers do not divide among {p} ranks; method='redis' does without")
    else:
        each = [count // p] * p
    first = sum(each[:rank])
    chunk = {"layers": params["layers"][first : first + each[rank]]}
    if rank == p - 1:
        chunk["norm"] = params["norm"]
    tables = {"embedding": params["embedding"]} | ({"head": params["head"].T} if "head" in params else {})
    if method in SPLIT:
        shard = VocabShard(rank, p, len(params["embedding"]))
        return chunk | {name: shard.of(table) for name, table in tables.items()}
    if rank == 0:
        chunk["embedding"] = tables["embedding"]
    if rank == p - 1:
        last = "head" if "head" in params else "embedding"
        chunk[last] = params[last]
    return chunk


def loss_and_gradients(plan, method, shard, chunk, tokens, targets, total):
    """`step` of a method that cuts the vocabulary; arguments and result as for `_model.loss_and_gradients`."""
    comm, layers = plan.grid.pp, {"layers": chunk["layers"]}
    is_first, is_last = comm.rank == 0, comm.rank == comm.size - 1
    outputs = OutputLayer(comm, method, shard, chunk.get("head", chunk["embedding"]), targets, 1 / total)
    inputs = InputLayer(comm, method, shard, chunk["embedding"], tokens)
    grads = {}

    def forward(_, k, x):
        y, saved = _model.forward(plan.setting, layers, inputs.row(k) if is_first else x, None, None, plan.layer)
        if not is_last:
            return y, saved
        outputs.announce(k, rms_norm(y, chunk["norm"]))
        return None, [*saved, y]

    def backward(_, k, saved, grad):
        norm = {}
        if is_last:
            grad, norm["norm"] = rms_norm_backward(saved.pop(), chunk["norm"], outputs.gradient(k))
        dx, share = _model.backward(plan.setting, layers, saved, grad, None, None, False, plan.layer)
        if grads:
            _model.add_up(grads, share | norm)
        else:
            grads.update(share | norm)
        if is_first:
            inputs.announce(k, dx)
        return dx

    passes = {"S": outputs.S, "T": outputs.T, "IF": inputs.IF, "IB": inputs.IB}
    others = {kind: lambda _, k, run=run: run(k) for kind, run in passes.items()}
    kept = _pipeline.run(comm, plan.schedule, forward, backward, others=others, **plan.travel)
    loss = sum(float(part.sum()) for part in outputs.losses.values() if not is_shape_only(part)) / total
    if plan.tied:  # both ends of the model are the same rows of the same rank
        grads["embedding"] = add(inputs.grad, outputs.grad)
    else:
        grads |= {"embedding": inputs.grad, "head": outputs.grad}
    return np.array(loss), grads, kept
