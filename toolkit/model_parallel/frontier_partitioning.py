"""Three-level partitioning: each state is shared over the links that its traffic needs, weights over the fastest.

ZeRO-3 cuts weights over all ranks, so every pass of every microbatch gathers the model through the slowest link. A node
of Frontier has memory to spare and three classes of links. So: weights are shared by the two GCDs of a package,
gradients by the eight of a node, the optimiser's states by all. Between nodes nothing moves until the optimiser's step.

    scheme       forward gathers    backward gathers    gradients, a microbatch    optimiser's step
    ZeRO-1       -                  -                   -                          all to all ranks
    ZeRO-3       all ranks          all ranks           all ranks                  -
    ZeRO++       all ranks, 8 bit   node                node, all; 4 bit           -
    3-level      pair, 8 bit        node or pair, 8 b   node, 4 bit                same place of all nodes, node

All are points `Scheme(s_w, s_w2, s_g, s_o, …)` of one engine and share its order of collectives: one queue beside the
program, the next bucket's weights ahead of the last one's gradients. A bucket is a layer; each is one vector.
Gradients are summed: the loss is divided by the tokens of the whole step. Every rank, the owner too, computes with
what came out of the packets. 2-byte weights and gradients, Adam in 4 bytes; float64 stays float64.

Source: Xu et al. 2025, arXiv 2501.04266; ZeRO++: Wang et al. 2023, arXiv 2306.10209. No code of the former is public:
what the second copy is made of, and in which order the step's collectives run, is our reading of the paper.
Chapter: model_parallel/frontier_partitioning.
"""

from dataclasses import dataclass

import numpy as np

from toolkit.kernels.elementwise import accumulate
from toolkit.kernels.layers import cast
from toolkit.runtime import shard
from toolkit.runtime.errors import ShapeError
from toolkit.sequence_parallel import _zero3 as vectors

from ._in_turn import Queue
from ._partition_blocks import copied, dequantise, quantise, reordered, sum_of_packets, zeros
from ._partition_layout import Groups, Scheme, degrees, flat_range, frontier, groups, named, three_level, zero, zero_pp
from ._partition_ledger import between_nodes, group_of, memory, step_bytes
from ._zero import State, adam

__all__ = [
    "Groups", "Kept", "Scheme", "begin", "between_nodes", "flat_range", "frontier", "group_of", "groups", "memory",
    "micro_step", "named", "optimizer_step", "step_bytes", "three_level", "train", "zero", "zero_pp",
]  # fmt: skip


@dataclass
class Kept:
    """What a rank keeps of one bucket of Ψ values."""

    weights: np.ndarray  # (Ψ/s_w,)
    state: State  # three vectors (Ψ/s_o,)
    second: np.ndarray | None = None  # (Ψ/s_w2,), or its packet
    gradient: np.ndarray | None = None  # (Ψ/s_g,)

    @property
    def nbytes(self):
        state = self.state
        held = self.weights, state.master, state.mean, state.square, self.second, self.gradient
        return sum(a.nbytes for a in held if a is not None)


def begin(comm, scheme, weights):
    """Kept of one bucket, from its whole weights {name: array}."""
    chain, whole = degrees(scheme, comm.size), vectors.padded(vectors.vector(weights), comm.size)

    def mine(degree):
        return copied(whole[slice(*flat_range(comm.rank, degree, whole.size, chain))])

    master = cast(mine(scheme.s_o), np.float64 if whole.dtype.itemsize == 8 else np.float32)
    return Kept(mine(scheme.s_w), State(master, zeros(master), zeros(master)))


# ---- collectives of whole and partial vectors ------------------------------------------------------------------------


def gather(comms, part, bits=None, block=256):
    """The whole of which every rank of the groups has a part. part (n,) -> (n · ranks of all groups,)"""
    for comm in comms:
        if bits is None:
            part = comm.all_gather(part)
        else:
            part = opened(comm, quantise(part, bits, block), part.size, bits, block, part.dtype)
    return part


def opened(comm, packet, n, bits, block, dtype):
    """All ranks' packets of n values, gathered and dequantised: (n · ranks,)."""
    packets = comm.all_gather(packet).reshape(comm.size, -1)
    return dequantise(packets, n, bits, block, dtype).reshape(-1)


def reduce(comms, whole, bits=None, block=256, order=None):
    """This rank's part of the sum over the groups. whole (n,) -> (n / ranks of all groups,)

    bits    each hop sends packets to their owners, who dequantise and add: codes are never added
    order   see `Groups`
    """
    if order is not None:
        whole = reordered(whole, order)
    for comm in comms:
        if bits is None:
            whole = comm.reduce_scatter(whole)
        else:
            packets = quantise(whole.reshape(comm.size, -1), bits, block)
            received = comm.all_to_all(packets)
            whole = sum_of_packets(received, whole.size // comm.size, bits, block, whole.dtype)
    return whole


# ---- a microbatch ----------------------------------------------------------------------------------------------------


def forward_weights(groups, scheme, kept):
    """A bucket's whole weights before its forward pass."""
    return gather(groups.forward, kept.weights, scheme.qw, scheme.block)


def backward_weights(groups, scheme, kept):
    """Again before its backward pass: from the second copy, if there is one."""
    second = kept.second
    if second is None:
        return forward_weights(groups, scheme, kept)
    if scheme.q2 is None:
        return groups.second.all_gather(second)
    n = kept.weights.size * scheme.s_w // scheme.s_w2
    return opened(groups.second, second, n, scheme.q2, scheme.block, kept.weights.dtype)


def second_copy(groups, scheme, whole):
    """This rank's part of the second copy, which serves all microbatches of a step."""
    n = whole.size // scheme.s_w2
    part = whole[groups.second.rank * n :][:n]
    return copied(part) if scheme.q2 is None else quantise(part, scheme.q2, scheme.block)


def add_gradient(groups, scheme, kept, grads, n):
    """Sum a bucket's gradient over s_g ranks and add this rank's part to those of earlier microbatches."""
    whole = vectors.padded(vectors.vector(grads), n)
    part = reduce(groups.micro, whole, scheme.qg, scheme.block, groups.order)
    kept.gradient = part if kept.gradient is None else accumulate(kept.gradient, part)


def micro_step(comm, groups, scheme, kept, buckets, shapes, n):
    """Forward and backward of one microbatch; `kept` collects gradients. Returns its loss.

    buckets   see `_partition_model`           shapes   {name: shape} of each         n   ranks that padding is for
    """
    queue, saved, x = Queue(comm), [], None
    coming = queue.start(forward_weights, groups, scheme, kept[0])
    for i, bucket in enumerate(buckets):
        whole = coming.wait()
        if i + 1 < len(buckets):
            coming = queue.start(forward_weights, groups, scheme, kept[i + 1])
        if scheme.s_w2 and kept[i].second is None:
            kept[i].second = second_copy(groups, scheme, whole)
        x, memo = bucket.forward(vectors.views(whole, shapes[i]), x)
        saved.append(memo)
    loss, grad = x, None
    coming = queue.start(backward_weights, groups, scheme, kept[-1])
    for i in reversed(range(len(buckets))):
        whole = coming.wait()
        if i:
            coming = queue.start(backward_weights, groups, scheme, kept[i - 1])
        grad, grads = buckets[i].backward(vectors.views(whole, shapes[i]), saved.pop(), grad)
        leaving = queue.start(add_gradient, groups, scheme, kept[i], grads, n)
    leaving.wait()
    return loss


# ---- the optimiser's step --------------------------------------------------------------------------------------------


def optimizer_step(comm, groups, scheme, kept, rate, betas=(0.9, 0.999), epsilon=1e-8):
    """Sum what microbatches left apart, move this rank's piece, and bring weights up to date."""
    queue = Queue(comm)
    sums = [queue.start(sum_of_step, groups, one.gradient) for one in kept]
    fresh = []
    for one, total in zip(kept, sums, strict=True):
        state, piece = one.state, total.wait()
        state.steps += 1
        adam(state.master, state.mean, state.square, piece, state.steps, rate, betas, epsilon)
        fresh.append(queue.start(gather, groups.refresh, cast(state.master, one.weights.dtype)))
        one.gradient = one.second = None  # the second copy is that of the old weights
    for one, weights in zip(kept, fresh, strict=True):
        one.weights = weights.wait()


def sum_of_step(groups, gradient):
    """s_g to s_o, then over replicas."""
    piece = reduce(groups.step, gradient)
    for comm in groups.replicas:
        piece = comm.all_reduce(piece)
    return piece


def program(comm, scheme, model, weights, tokens, targets, rate, gamma=1):
    """Train: one rank's part.

    weights           the buckets' whole weights, [{name: array}, …], the same on every rank
    tokens, targets   (steps, sequences, n) integers of this rank; gamma microbatches a step
    returns           (losses of the steps, this rank's share of them; [Kept, …])
    """
    own, shapes = groups(comm, scheme), [{name: a.shape for name, a in bucket.items()} for bucket in weights]
    kept, losses = [begin(comm, scheme, bucket) for bucket in weights], []
    scale = 1 / (comm.size * tokens[0].size)
    for batch, wanted in zip(tokens, targets, strict=True):
        total = 0.0
        for text, words in zip(np.split(batch, gamma), np.split(wanted, gamma), strict=True):
            buckets = model.buckets(comm, text, words, scale)
            total = total + float(micro_step(comm, own, scheme, kept, buckets, shapes, comm.size))
        optimizer_step(comm, own, scheme, kept, rate)
        losses.append(total)
    return losses, kept


def train(cluster, model, scheme, weights, tokens, targets, rate=1e-3, gamma=1):
    """Train `model` on `cluster`: one optimiser's step for each of the first axis of `tokens`.

    tokens, targets   (steps, sequences, n) integers, cut over ranks by sequences
    returns           (losses (steps,), whole weights of the buckets as vectors with padding, Run)
    raises            ShapeError  sequences do not divide among ranks and microbatches; see `degrees`
    """
    n = cluster.size
    chain = degrees(scheme, n)
    if tokens.ndim != 3 or tokens.shape[1] % (n * gamma):
        raise ShapeError(f"tokens {tokens.shape} need sequences for {n} ranks × {gamma} microbatches")
    cut = shard(tokens, axis=1), shard(targets, axis=1)
    run = cluster.run(program, scheme, model, weights, *cut, rate=rate, gamma=gamma)
    losses = np.sum([losses for losses, _ in run.outputs], axis=0)
    owners = {flat_range(r, scheme.s_w, n, chain)[0]: r for r in range(n)}
    ranks = [owners[start] for start in sorted(owners)]
    whole = [np.concatenate([run.outputs[r][1][i].weights for r in ranks]) for i in range(len(weights))]
    return losses, whole, run
