"""Textbook collectives, each a few lines of send and receive, with the costs the textbook gives.

Ring algorithms move the least bytes; logarithmic ones take the fewest steps (Thakur, Rabenseifner and Gropp 2005,
"Optimization of Collective Communication Operations in MPICH"). With p ranks and n bytes in a rank's full array:

    collective       algorithm            messages a rank     bytes a rank
    broadcast        tree                 ≤ ⌈log2 p⌉          n each; (p-1)·n in all
                     ring                 ≤ 1                 n each; (p-1)·n in all
    all_gather       ring                 p-1                 (p-1)/p · n
                     recursive_doubling   ⌈log2 p⌉            (p-1)/p · n
    reduce_scatter   ring                 p-1                 (p-1)/p · n
                     recursive_halving    ⌈log2 p⌉            (p-1)/p · n
    all_reduce       ring                 2(p-1)              2(p-1)/p · n
                     recursive_doubling   log2 p (+2 if p is no power of two)   n each
                     hierarchical         rings inside nodes, rings across
    all_to_all       direct               p-1, all at once    all parts but one's own
                     pairwise             p-1                 all parts but one's own
    barrier          dissemination        ⌈log2 p⌉            0
"""

from itertools import pairwise

import numpy as np

from .arrays import like
from .errors import ShapeError
from .kernel import Cost, kernel

OPERATORS = {"sum": np.add, "max": np.maximum, "min": np.minimum, "prod": np.multiply}


@kernel(cost=lambda x, y, op="sum": Cost(0, 3 * x.nbytes), out=lambda x, y, op="sum": like(x))
def combine(x, y, op="sum"):
    """x op y, element by element: bound by memory, so no flops are charged."""
    return np.asarray(OPERATORS[op](x, y))  # numpy makes a scalar of two arrays without axes


def _joined(parts, axis=0):
    first, axis = parts[0], axis % parts[0].ndim
    return (*first.shape[:axis], sum(part.shape[axis] for part in parts), *first.shape[axis + 1 :])


@kernel(
    cost=lambda parts, axis=0: Cost(0, 2 * sum(part.nbytes for part in parts)),
    out=lambda parts, axis=0: like(_joined(parts, axis), parts[0].dtype),
)
def concatenate(parts, axis=0):
    """np.concatenate as a kernel: reads and writes every byte once."""
    return np.concatenate(parts, axis)


# ---- rings: the fewest bytes --------------------------------------------------------------------------------------


def ring_all_gather(comm, x):
    parts = {comm.rank: x}
    for step in range(comm.size - 1):
        parts[(comm.rank - step - 1) % comm.size] = comm.ishift(parts[(comm.rank - step) % comm.size], by=1).wait()
    return [parts[r] for r in range(comm.size)]


def ring_reduce_scatter(comm, parts, op):
    partial = parts[comm.rank - 1]
    for step in range(1, comm.size):
        passing = comm.ishift(partial, by=1).wait()
        partial = combine(passing, parts[(comm.rank - 1 - step) % comm.size], op)
    return partial


def ring_all_reduce(comm, x, op):
    flat = x.reshape(-1)
    mine = ring_reduce_scatter(comm, _cut(flat, comm.size), op)
    return concatenate(tuple(ring_all_gather(comm, mine))).reshape(x.shape)


def _cut(flat, parts):
    """Views of nearly equal length: nothing is padded."""
    cuts = [flat.shape[0] * i // parts for i in range(parts + 1)]
    return [flat[a:b] for a, b in pairwise(cuts)]


def ring_broadcast(comm, x, root):
    place = (comm.rank - root) % comm.size
    if place > 0:
        x = comm.recv((comm.rank - 1) % comm.size)
    if place < comm.size - 1:
        comm.send(x, (comm.rank + 1) % comm.size)
    return x


def ring_reduce(comm, x, root, op):
    place = (root - comm.rank) % comm.size  # hops to go
    if place < comm.size - 1:
        x = combine(comm.recv((comm.rank - 1) % comm.size), x, op)
    if place > 0:
        comm.send(x, (comm.rank + 1) % comm.size)
    return x if place == 0 else None


# ---- trees and doubling: the fewest steps --------------------------------------------------------------------------


def tree_broadcast(comm, x, root):
    """Binomial tree: in each round every rank that has the array passes it `reach` places on."""
    place = (comm.rank - root) % comm.size
    reach = 1
    while reach < comm.size:
        if place < reach and place + reach < comm.size:
            comm.send(x, (comm.rank + reach) % comm.size)
        elif reach <= place < 2 * reach:
            x = comm.recv((comm.rank - reach) % comm.size)
        reach *= 2
    return x


def tree_reduce(comm, x, root, op):
    """The broadcast tree run backwards."""
    place = (comm.rank - root) % comm.size
    for reach in reversed(_powers(comm.size)):
        if place < reach and place + reach < comm.size:
            x = combine(x, comm.recv((comm.rank + reach) % comm.size), op)
        elif reach <= place < 2 * reach:
            comm.send(x, (comm.rank - reach) % comm.size)
    return x if place == 0 else None


def tree_gather(comm, x, root):
    """Binomial: a rank `reach` places on hands over everything it has gathered."""
    place, have = (comm.rank - root) % comm.size, (x,)
    for reach in _powers(comm.size):
        if place % (2 * reach) == reach:
            comm.send(have, (comm.rank - reach) % comm.size)
        elif place % (2 * reach) == 0 and place + reach < comm.size:
            have += comm.recv((comm.rank + reach) % comm.size)
    return [have[(r - root) % comm.size] for r in range(comm.size)] if place == 0 else None


def tree_scatter(comm, parts, root):
    """The gather tree run backwards."""
    place = (comm.rank - root) % comm.size
    have = tuple(parts[(r + root) % comm.size] for r in range(comm.size)) if place == 0 else ()
    for reach in reversed(_powers(comm.size)):
        if place % (2 * reach) == reach:
            have = comm.recv((comm.rank - reach) % comm.size)
        elif place % (2 * reach) == 0 and place + reach < comm.size:
            comm.send(have[reach:], (comm.rank + reach) % comm.size)
            have = have[:reach]
    return have[0]


def direct_gather(comm, x, root):
    if comm.rank != root:
        comm.send(x, root)
        return None
    incoming = {r: comm.irecv(r) for r in range(comm.size) if r != root}
    return [x if r == root else incoming[r].wait() for r in range(comm.size)]


def direct_scatter(comm, parts, root):
    if comm.rank != root:
        return comm.recv(root)
    for sent in [comm.isend(parts[r], r) for r in range(comm.size) if r != root]:
        sent.wait()
    return parts[root]


def bruck_all_gather(comm, x):
    """Recursive doubling for any p (Bruck et al. 1997): the run of blocks one holds doubles every step."""
    have = (x,)
    for reach in _powers(comm.size):
        have += comm.ishift(have[: comm.size - reach], by=-reach).wait()
    return [have[(r - comm.rank) % comm.size] for r in range(comm.size)]


def bruck_reduce_scatter(comm, parts, op):
    """Recursive halving for any p: the all-gather above, run backwards, adding where it copied."""
    have = [parts[(comm.rank + r) % comm.size] for r in range(comm.size)]
    for reach in reversed(_powers(comm.size)):
        have, handed = have[:reach], tuple(have[reach:])
        for i, part in enumerate(comm.ishift(handed, by=reach).wait()):
            have[i] = combine(part, have[i], op)
    return have[0]


def doubling_all_reduce(comm, x, op):
    """Exchange with the rank whose number differs in one bit. Ranks beyond the largest power of two fold in first."""
    core = 1 << (comm.size.bit_length() - 1)
    if comm.rank >= core:
        comm.send(x, comm.rank - core)
        return comm.recv(comm.rank - core)
    if comm.rank + core < comm.size:
        x = combine(x, comm.recv(comm.rank + core), op)
    for reach in _powers(core):
        peer = comm.rank ^ reach
        other = comm.sendrecv(x, peer, peer)
        x = combine(x, other, op) if comm.rank < peer else combine(other, x, op)  # same order, same bits, on both sides
    if comm.rank + core < comm.size:
        comm.send(x, comm.rank + core)
    return x


def hierarchical_all_reduce(comm, x, op):
    """Reduce-scatter inside each node, all-reduce across, all-gather inside: slow links carry 1/P of the bytes."""
    inner, outer = _grid(comm)
    flat = x.reshape(-1)
    mine = ring_reduce_scatter(inner, _cut(flat, inner.size), op)
    mine = ring_all_reduce(outer, mine, op)
    return concatenate(tuple(ring_all_gather(inner, mine))).reshape(x.shape)


def _grid(comm):
    """(ranks of my node, ranks in my place of every node), from the topology's groups."""
    where = {rank: g for g, group in enumerate(comm.topology.groups or (comm.ranks,)) for rank in group}
    nodes = {}
    for r, world in enumerate(comm.ranks):
        nodes.setdefault(where[world], []).append(r)
    if len({len(members) for members in nodes.values()}) != 1:
        raise ShapeError("hierarchical collectives need the same number of ranks on every node; use algorithm='ring'")
    node = next(members for members in nodes.values() if comm.rank in members)
    column = [members[node.index(comm.rank)] for members in nodes.values()]
    inner, outer = comm.group(node), comm.group(column)
    inner._label = outer._label = comm._label
    return inner, outer


def pairwise_all_to_all(comm, parts):
    received = {comm.rank: parts[comm.rank]}
    for step in range(1, comm.size):
        to, source = (comm.rank + step) % comm.size, (comm.rank - step) % comm.size
        received[source] = comm.sendrecv(parts[to], to, source)
    return [received[r] for r in range(comm.size)]


def direct_all_to_all(comm, parts):
    """All messages at once: one latency, and the ports share themselves (what NCCL does)."""
    others = [(comm.rank + step) % comm.size for step in range(1, comm.size)]
    incoming = {r: comm.irecv(r) for r in others}
    outgoing = [comm.isend(parts[r], r) for r in others]
    received = [parts[r] if r == comm.rank else incoming[r].wait() for r in range(comm.size)]
    for sent in outgoing:
        sent.wait()
    return received


def dissemination_barrier(comm, _):
    for reach in _powers(comm.size):
        comm.ishift((), by=reach).wait()


def _powers(size):
    """1, 2, 4, … below `size`."""
    return [1 << i for i in range((size - 1).bit_length())]


CHOICES = {  # collective -> its algorithms by name
    "broadcast": {"tree": tree_broadcast, "ring": ring_broadcast},
    "reduce": {"tree": tree_reduce, "ring": ring_reduce},
    "gather": {"tree": tree_gather, "direct": direct_gather},
    "scatter": {"tree": tree_scatter, "direct": direct_scatter},
    "all_gather": {"ring": ring_all_gather, "recursive_doubling": bruck_all_gather},
    "reduce_scatter": {"ring": ring_reduce_scatter, "recursive_halving": bruck_reduce_scatter},
    "all_reduce": {
        "ring": ring_all_reduce,
        "recursive_doubling": doubling_all_reduce,
        "hierarchical": hierarchical_all_reduce,
    },
    "all_to_all": {"direct": direct_all_to_all, "pairwise": pairwise_all_to_all},
    "barrier": {"dissemination": dissemination_barrier},
}
