"""Hybrid data parallelism carried out: a plan on real numbers, or shape-only on a device's real kernels.

A group's sequences lie side by side in one array, each in zigzag order over the group's ranks. Keys of all of them
travel in one message, and each attends to itself alone: on one rank that is a block-diagonal causal mask without any
message. Groups are formed of any ranks inside the one communicator.

Each sequence is a kernel call of its own, where a kernel for varied lengths would take all at once: a static pack of
hundreds of sequences pays for launches that the cost model does not count. Gradients are all-reduced at the end; the
paper scatters them to the shards of its optimiser (ZeRO-1), half the bytes. Chapter: sequence_parallel/byte_scale.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import accumulate as running_sum
from itertools import pairwise

import numpy as np

from toolkit.kernels.attention import delta, empty_accumulator, finish
from toolkit.kernels.elementwise import accumulate
from toolkit.kernels.layers import (
    embed,
    embed_backward,
    linear,
    linear_backward,
    rms_norm,
    rms_norm_backward,
    softmax_cross_entropy,
    softmax_cross_entropy_backward,
)
from toolkit.runtime import Cluster, Cost, hardware, kernel, like, positions, topology

from ._block import Attention, block, block_backward, sum_gradients
from ._byte_scale_cost import fit
from ._byte_scale_plan import MicroBatch, Plan, padded
from .ring_attention import add_gradients, attend, gradients, visible


@dataclass(frozen=True)
class Model:
    """params as `_block.model_weights` makes them; head_dim of its attention."""

    params: dict
    head_dim: int


def execute(comm, plan, model, tokens):
    """One training step's gradients: every micro-batch of this rank, in the plan's order, then one sum over all ranks.

    tokens    list of (s + 1,) integers: each sequence of the batch, and the token that follows it
    returns   (grads, stats): gradients of the mean loss over all tokens of the batch, like `params`, on every rank;
              Counter of this rank's micro-batches, tokens and padding, and its share of the loss
    sends     keys and values of long sequences round their rings, their gradients after them, then the gradients
    raises    ShapeError, DtypeError
    """
    batch, total, stats = [len(t) - 1 for t in tokens], mapped(zeros, model.params), Counter()
    for micro_batch in plan.of(comm.rank):
        group = comm.group(micro_batch.ranks)
        mine = [share(group, tokens[i], loss_weight(s, batch)) for i, s in micro_batch.sequences]
        losses, grads = step(group, model, *map(np.concatenate, zip(*mine, strict=True)), [len(m[0]) for m in mine])
        add_up(total, grads)
        real = sum(np.count_nonzero(m[3]) for m in mine)
        stats.update(micro_batches=1, tokens=real, padding=len(losses) - real)
        stats["loss"] += float(losses @ np.concatenate([m[3] for m in mine]))
    return sum_gradients(comm, total), stats


def loss_weight(s, batch):
    """What a token's loss counts in a sequence of s tokens: the same everywhere, so that sums over ranks are exact."""
    return 1 / sum(batch)


def share(group, tokens, weight):
    """This rank's part of a sequence: inputs, targets, positions, and weights that are 0 for padding."""
    n = len(tokens) - 1
    room = padded(n, group.size)
    where = positions("zigzag", group.rank, group.size, room) if group.size > 1 else np.arange(n)
    inputs, targets, weights = np.zeros(room, np.int64), np.zeros(room, np.int64), np.zeros(room)
    inputs[:n], targets[:n], weights[:n] = tokens[:-1], tokens[1:], weight
    return inputs[where], targets[where], where, weights[where]


def step(group, model, inputs, targets, where, weights, lengths):
    """(losses, grads) of one micro-batch: nats of each token, and this rank's share of the weighted sum's gradients.

    lengths   local tokens of each sequence
    """
    params, attention, saved = model.params, packed(lengths), []
    x = embed(params["embedding"], inputs)
    for layer in params["layers"]:
        x, kept = block(group, layer, x, where, attention, model.head_dim)
        saved.append(kept)
    normed = rms_norm(x, params["norm"])
    logits = linear(normed, params["head"])
    losses = softmax_cross_entropy(logits, targets)

    grads = {"layers": []}
    d_logits = softmax_cross_entropy_backward(logits, targets, weights)
    d_normed, grads["head"] = linear_backward(normed, params["head"], d_logits)
    grad, grads["norm"] = rms_norm_backward(x, params["norm"], d_normed)
    for layer in reversed(params["layers"]):
        grad, more = block_backward(group, layer, saved.pop(), grad, attention, model.head_dim)
        grads["layers"].insert(0, more)
    grads["embedding"] = embed_backward(params["embedding"], inputs, grad)
    return losses, grads


# ---- attention of packed sequences -----------------------------------------------------------------------------------


def packed(lengths):
    """The causal Attention of sequences that lie side by side, each in zigzag order over the ring.

    lengths   local tokens of each
    """
    cuts = list(pairwise(running_sum(lengths, initial=0)))

    def forward(comm, q, k, v):
        acc, keys = empty_accumulator(q), (k, v)
        for hop in range(comm.size):
            incoming = comm.ishift(keys, by=1, tag="keys and values") if hop < comm.size - 1 else None
            for part in parts(cuts, comm.rank, (comm.rank - hop) % comm.size, q):
                attend(acc, q, *keys, part)
            if incoming:
                keys = incoming.wait()
        out, lse = finish(acc, q)
        return out, (q, k, v, out, lse)

    def backward(comm, saved, grad_out):
        q, k, v, out, lse = saved
        d, keys, travelling = delta(grad_out, out), (k, v), None
        dq, *grads = (empty_accumulator(a)[0] for a in (q, k, v))
        for hop in range(comm.size):
            incoming = comm.ishift(keys, by=1, tag="keys and values") if hop < comm.size - 1 else None
            blocks = [
                (gradients(q, *keys, lse, d, grad_out, part), part)
                for part in parts(cuts, comm.rank, (comm.rank - hop) % comm.size, q)
            ]
            if travelling:
                grads = travelling.wait()
            for share, part in blocks:
                add_gradients(dq, grads, share, part)
            if comm.size > 1:
                travelling = comm.ishift(tuple(grads), by=1, tag="gradients")
            if incoming:
                keys = incoming.wait()
        return (dq, *(travelling.wait() if travelling else grads))

    return Attention(forward, backward)


def parts(cuts, asks, holds, q):
    """For each sequence, what rank `asks` sees of the keys of rank `holds`: (rows, columns, masked), as `visible`."""
    for start, stop in cuts:
        part = visible("zigzag", True, asks, holds, q[:, start:stop])
        if part is not None:
            *slices, masked = part
            ends = [among.indices(stop - start) for among in slices]
            yield *(slice(start + a, start + b) for a, b, _ in ends), masked


# ---- gradients of a whole model --------------------------------------------------------------------------------------


@kernel(cost=lambda x: Cost(0, x.nbytes), out=lambda x: like(x))
def zeros(x):
    return np.zeros_like(x)


def mapped(function, params):
    """`function` of every array of nested dicts and lists."""
    if isinstance(params, dict):
        return {name: mapped(function, part) for name, part in params.items()}
    return [mapped(function, part) for part in params] if isinstance(params, list) else function(params)


def add_up(total, grads):
    """Add gradients to those of earlier micro-batches, in place."""
    if isinstance(total, np.ndarray):
        accumulate(total, grads)
        return
    for name in total if isinstance(total, dict) else range(len(total)):
        add_up(total[name], grads[name])


def profile(model, device, lengths):
    """(α₁, β₁, γ) of a model on a device, as the paper gets them: time sequences on one rank and fit.

    model     shape-only Model        lengths   tokens of the sequences that are timed
    """
    layers, one = len(model.params["layers"]), Cluster(topology.full_mesh(1, hardware.NVLINK4), device)

    def seconds(s):
        plan = Plan([MicroBatch((0,), ((0, s),))], 1, None)
        return one.run(execute, plan, model, [np.zeros(s + 1, np.int64)]).makespan / (3 * layers)

    return fit(lengths, [seconds(s) for s in lengths])
