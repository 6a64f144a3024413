"""A language model placed on a grid of ranks: which rank has what, and one step's loss and gradients.

Whole parameters are `sequence_parallel._block.model_weights`: {"embedding": (vocabulary, h), "layers": [block, …],
"norm": (h,), "head": (h, vocabulary)}; without "head" the embedding serves as both ends (tied). A rank has a list of
chunks, one a stage of the schedule; each is the same dict, cut: "embedding" in the first stage, "norm" and "head" (or a
second copy of "embedding") in the last. A block may have experts (`_experts.expert_weights`) for an MLP; the layer of
the plan is then `Layer(*_experts.layer(grid.ep, gate))`.

Gradients are those of the mean loss over all tokens of all ranks: shares add up, nothing is divided afterwards.
Chapter: model_parallel/megatron.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from toolkit.kernels.elementwise import accumulate
from toolkit.kernels.layers import add
from toolkit.runtime.arrays import is_shape_only, like
from toolkit.runtime.errors import ShapeError
from toolkit.sequence_parallel._megatron_sp import NORMS
from toolkit.sequence_parallel._megatron_sp import shard_weights as cut_block

from . import _experts as experts
from . import _layers as layers
from . import _pipeline as pipeline

# ---- who has what ----------------------------------------------------------------------------------------------------


def cut(params, grid, schedule, head_dim):
    """This rank's chunks of whole parameters (or of anything of their shapes).

    raises   ShapeError  layers do not divide among the stages, or heads, channels or vocabulary among `grid.tp`, or
                         experts among `grid.ep`
    """
    count, stages = len(params["layers"]), schedule.stages
    if count % stages:
        raise ShapeError(f"{count} layers do not divide among {stages} stages")
    ends, chunks = _ends(params, grid.tp), []
    for stage in schedule.where[grid.pp.rank]:
        mine = params["layers"][stage * count // stages : (stage + 1) * count // stages]
        chunk = {"layers": [_cut_layer(weights, grid, head_dim) for weights in mine]}
        if stage == 0:
            chunk["embedding"] = ends["embedding"]
        if stage == stages - 1:
            last = "head" if "head" in params else "embedding"
            chunk |= {"norm": ends["norm"], last: ends[last]}
        chunks.append(chunk)
    return chunks


def _cut_layer(weights, grid, head_dim):
    if "router" in weights:
        return experts.cut_block(weights, grid, head_dim)
    return cut_block(weights, grid.tp.rank, grid.tp.size, head_dim)


def _ends(params, tp):
    ends = {"embedding": _rows(params["embedding"], tp), "norm": params["norm"]}
    return ends | {"head": _rows(params["head"].T, tp).T} if "head" in params else ends


def _rows(table, tp):
    n = len(table) // tp.size
    if n * tp.size != len(table):
        raise ShapeError(f"a vocabulary of {len(table)} does not divide among {tp.size} ranks: pad it")
    return like((n, table.shape[1]), table.dtype) if is_shape_only(table) else table[tp.rank * n : (tp.rank + 1) * n]


def share_of(grid, batch, microbatches, where):
    """This rank's tokens of a batch.

    batch     (sequences, N) integers      where   (n,) positions that this rank has of a sequence
    returns   (microbatches, sequences a microbatch · n)
    raises    ShapeError  sequences do not divide among data-parallel ranks and microbatches
    """
    data = grid.along("ep", "dp")
    if len(batch) % (data.size * microbatches):
        raise ShapeError(f"{len(batch)} sequences do not divide into {microbatches} microbatches on {data.size} ranks")
    each = len(batch) // data.size
    mine = batch[data.rank * each : (data.rank + 1) * each]
    return mine[:, where].reshape(microbatches, -1)


# ---- one chunk of layers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """How a block is run: (setting, weights, x) -> (y, saved), and back."""

    forward: Callable
    backward: Callable


KEEP = Layer(layers.block, layers.block_backward)
RECOMPUTE = Layer(layers.recomputed, layers.recomputed_backward)


def forward(setting, weights, x, tokens, targets, layer=KEEP):
    """Through one chunk. x None: the model's first stage, which starts from tokens.

    returns   (y, saved); in the model's last stage y is the losses (n,)
    """
    saved = []
    if x is None:
        x = layers.embedding(setting, weights["embedding"], tokens)
    for block in weights["layers"]:
        x, kept = layer.forward(setting, block, x)
        saved.append(kept)
    if "norm" in weights:
        x, kept = layers.head(setting, weights["norm"], _head(weights), x, targets)
        saved.append(kept)
    return x, saved


def backward(setting, weights, saved, grad, tokens, targets, first, layer=KEEP):
    """(dx, grads) of `forward`; dx is None in the model's first stage."""
    grads, tied = {"layers": []}, None
    if "norm" in weights:
        grad, grads["norm"], d_head = layers.head_backward(
            setting, weights["norm"], _head(weights), saved.pop(), targets, grad
        )
        if "head" in weights:
            grads["head"] = d_head
        else:
            tied = grads["embedding"] = d_head.T
    for block in reversed(weights["layers"]):
        grad, share = layer.backward(setting, block, saved.pop(), grad)
        grads["layers"].insert(0, share)
    if not first:
        return grad, grads
    table = layers.embedding_backward(setting, weights["embedding"], tokens, grad)
    return None, grads | {"embedding": table if tied is None else add(table, tied)}


def _head(weights):
    """Columns of the output layer: its own, or the embedding's rows."""
    return weights["head"] if "head" in weights else weights["embedding"].T


# ---- one step --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How a step is run.

    grid, schedule, setting   who, in which order, and how layers are cut
    tied                      the embedding is the output layer, too
    layer                     KEEP, or RECOMPUTE to keep a block's input only
    travel                    how activations go from stage to stage: pack, unpack, overlap (see `_pipeline.run`)
    across                    (comm, grads of a chunk) -> their sum over ranks with other tokens: `summed`, or what
                              keeps a part of it (`_zero.across`)
    """

    grid: Any
    schedule: Any
    setting: Any
    tied: bool = False
    layer: Layer = KEEP
    travel: Mapping = field(default_factory=dict)
    across: Callable | None = None


def loss_and_gradients(plan, chunks, tokens, targets, total):
    """Mean loss of a batch, and this rank's gradients, summed over all ranks that have the same weights.

    chunks            as `cut` makes them
    tokens, targets   (microbatches, n): `share_of` this rank
    total             tokens of all ranks and microbatches together
    returns           (loss (), grads like chunks, the most chunk activations kept)
    """
    grid, stages = plan.grid, plan.schedule.where[plan.grid.pp.rank]
    grads, losses = [None] * len(chunks), []

    def chunk_forward(c, k, x):
        y, saved = forward(plan.setting, chunks[c], x, tokens[k], targets[k], plan.layer)
        if "norm" not in chunks[c]:
            return y, saved
        losses.append(y)
        return None, saved

    def chunk_backward(c, k, saved, grad):
        if "norm" in chunks[c]:
            grad = np.full(len(targets[k]), 1 / total, losses[0].dtype)
        dx, share = backward(plan.setting, chunks[c], saved, grad, tokens[k], targets[k], stages[c] == 0, plan.layer)
        grads[c] = share if grads[c] is None else add_up(grads[c], share)
        return dx

    kept = pipeline.run(grid.pp, plan.schedule, chunk_forward, chunk_backward, **plan.travel)
    mine = sum(float(part.sum()) for part in losses if not is_shape_only(part)) / total
    loss = layers.all_reduce(grid.along("cp", "ep", "dp", "pp"), np.array(mine))
    return loss, sum_gradients(plan, grads), kept


def sum_gradients(plan, grads):
    """The shares of all ranks that have the same weights added up: of norms that saw some tokens only (SEQUENCE), over
    `tp`; of a tied embedding, over its two copies; of everything, over ranks with other tokens."""
    tp = plan.grid.tp
    if plan.setting.edge is layers.SEQUENCE:
        for chunk in grads:
            for part in (*chunk["layers"], chunk):
                part |= {name: layers.all_reduce(tp, part[name]) for name in (*NORMS, "norm") if name in part}
    if plan.tied:
        _sum_tied(plan, grads)
    return [_across(plan, chunk) for chunk in grads]


def _across(plan, chunk):
    """The sum over ranks with other tokens. Experts have had those of all `ep` ranks: theirs is over the others."""
    data, others = plan.grid.along("cp", "ep", "dp"), plan.grid.along("cp", "dp")
    if not any("router" in layer for layer in chunk["layers"] if isinstance(layer, dict)):
        return (plan.across or summed)(data, chunk)
    if plan.across is not None:
        raise ShapeError("a chunk with experts has arrays of two kinds of replicas: use across=None")
    mine = [{name: layer.pop(name) for name in experts.EXPERTS if name in layer} for layer in chunk["layers"]]
    total = summed(data, chunk)
    return total | {"layers": [a | summed(others, own) for a, own in zip(total["layers"], mine, strict=True)]}


def _sum_tied(plan, grads):
    """Both copies of a tied embedding get the sum of their gradients: on one rank, or from first and last stage."""
    owner, rank = plan.schedule.owner, plan.grid.pp.rank
    (first, a), (last, b) = owner[0], owner[plan.schedule.stages - 1]
    if first == last == rank and a != b:
        grads[a]["embedding"] = grads[b]["embedding"] = add(grads[a]["embedding"], grads[b]["embedding"])
    elif first != last and rank in (first, last):
        mine = grads[a if rank == first else b]
        mine["embedding"] = layers.all_reduce(plan.grid.pp.group((first, last)), mine["embedding"])


def add_up(total, share):
    """total += share, for nested dicts and lists of arrays. Returns total."""
    if isinstance(total, dict):
        return {name: add_up(total[name], share[name]) for name in total}
    if isinstance(total, list):
        return [add_up(a, b) for a, b in zip(total, share, strict=True)]
    return accumulate(total, share)


def summed(comm, grads):
    """All-reduce of every array of nested dicts and lists, in the order of names."""
    if isinstance(grads, dict):
        return {name: summed(comm, grads[name]) for name in sorted(grads)}
    if isinstance(grads, list):
        return [summed(comm, part) for part in grads]
    return layers.all_reduce(comm, grads)
