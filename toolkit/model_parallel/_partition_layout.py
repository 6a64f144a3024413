"""Who keeps which part of a vector: partition degrees, the nested layout that joins them, and the groups of ranks.

A rank's number has digits. With the degrees 2, 8, N they are: which half, which quarter of the half, which node. Each
digit cuts once more what the digits before it left, so a part of a finer degree always lies inside that of a coarser
one, and ranks that differ in one digit only are the ones that complete it. Nothing is ever moved to another place.

    degrees (2, 8, N)   start = (r % 2) · Ψ/2 + (r % 8 // 2) · Ψ/8 + (r // 8) · Ψ/N
    degrees (N,)        start = r · Ψ/N: ZeRO-3

Source: Xu et al. 2025, arXiv 2501.04266; the layout is ours. Chapter: model_parallel/frontier_partitioning.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from toolkit.runtime import topology
from toolkit.runtime.errors import ShapeError
from toolkit.sequence_parallel import _two_level

NODE, PAIR = 8, 2  # GCDs of a Frontier node, and of one MI250X package
RING = (0, 1, 3, 2, 4, 5, 7, 6)  # a ring through a node's GCDs by direct links; packages stay together
NIC = 25e9  # bytes/s of one NIC; two GCDs share it


def frontier(nodes=1, nic=NIC):
    """Frontier with ranks in the order of RING, and NICs of another speed if wanted: a Topology."""
    machine = topology.frontier(nodes)
    graph = machine.graph.copy()
    for u, v, data in graph.edges(data=True):
        if "slingshot" in (u, v):
            data["link"] = replace(data["link"], bandwidth=nic)
    ranks = tuple(NODE * node + g for node in range(nodes) for g in RING)
    return replace(machine, graph=graph, ranks=ranks)


@dataclass(frozen=True)
class Scheme:
    """How many ranks share each state, and in how many bits parameters travel.

    s_w         ranks that share one copy of the weights                         (forward gathers over them)
    s_w2        ranks that share the second copy, taken at the first forward pass of a step (backward gathers over
                them): 8, 2, or None: backward gathers what forward does
    s_g, s_o    ranks that share gradients between microbatches, and the optimiser's states
    qw, qg, q2  bits of gathered weights, of gradients, of the second copy: 8, 4, or None: as they are
    block       values that share a scale; inf: all that travel in one message
    """

    s_w: int
    s_w2: int | None
    s_g: int
    s_o: int
    qw: int | None = None
    qg: int | None = None
    block: float = 256
    q2: int | None = None


def zero(stage, n):
    """ZeRO stage 0 to 3 over n ranks."""
    if stage not in (0, 1, 2, 3):
        raise ShapeError(f"stage={stage!r}: ZeRO has stages 1, 2 and 3, and 0 keeps everything everywhere")
    return Scheme(n if stage == 3 else 1, None, n if stage >= 2 else 1, n if stage else 1)


def zero_pp(n, qwz=True, hpz=True, qgz=True):
    """ZeRO++: ZeRO-3 with 8-bit weights forward, a second copy in each node, 4-bit gradients; each can be left out."""
    return replace(zero(3, n), s_w2=NODE if hpz else None, qw=8 if qwz else None, qg=4 if qgz else None)


def three_level(n, s_w2=NODE, quantised=True):
    """Weights to the pair, gradients to the node, states to all. s_w2: 8, 2, or None: quantise the half once more."""
    scheme = Scheme(PAIR, s_w2, NODE, n)
    return replace(scheme, qw=8, qg=4, q2=8 if s_w2 else None) if quantised else scheme


def named(n):
    """The schemes of the chapter, by name."""
    return {
        "ZeRO-1": zero(1, n),
        "ZeRO-3": zero(3, n),
        "ZeRO++": zero_pp(n),
        "3-level, 8": three_level(n),
        "3-level, 2": three_level(n, 2),
        "3-level, 2, fp16": three_level(n, 2, quantised=False),
    }


# ---- the layout ------------------------------------------------------------------------------------------------------


def degrees(scheme, n):
    """The distinct degrees above 1 in rising order; n is the last.

    raises   ShapeError  n is no multiple of 8 (or 1, 2, 4), degrees do not divide each other, or the states are shared
                         by fewer ranks than weights or gradients
    """
    if n not in (1, 2, 4) and (n < 1 or n % NODE):
        raise ShapeError(f"{n} ranks: Frontier has nodes of {NODE} GCDs; take a multiple of {NODE}, or 1, 2 or 4")
    if scheme.s_w2 not in (None, PAIR, NODE):
        raise ShapeError(f"s_w2={scheme.s_w2}: {PAIR} or {NODE} ranks share the second copy, or None: no copy")
    if scheme.block < 2:
        raise ShapeError(f"block={scheme.block}: a scale should serve at least 2 values")
    if scheme.qg is not None and scheme.s_g == 1:
        raise ShapeError(f"qg={scheme.qg} with s_g=1: no gradients travel between microbatches")
    if {scheme.qw, scheme.qg, scheme.q2} - {None, 4, 8}:
        raise ShapeError(f"qw={scheme.qw}, qg={scheme.qg}, q2={scheme.q2}: 4 or 8 bits, or None")
    chain = sorted({scheme.s_w, scheme.s_g, scheme.s_o, n} - {1})
    uneven = [(a, b) for a, b in pairwise([*chain, n, scheme.s_w2 or n]) if max(a, b) % min(a, b)]
    if uneven or max(chain, default=1) > n or (scheme.s_w2 or 1) > n:
        raise ShapeError(f"degrees {chain} and second copy {scheme.s_w2} on {n} ranks: each must divide the next")
    if max(scheme.s_w, scheme.s_g) > scheme.s_o:
        raise ShapeError(f"s_o={scheme.s_o}: at least s_w={scheme.s_w}, s_g={scheme.s_g} ranks share states")
    return tuple(chain)


def flat_range(rank, degree, psi, chain):
    """(start, end) of what `rank` has at `degree`, which is 1 or in `chain`; psi divides by it.

    chain    as `degrees` gives it
    raises   ShapeError  psi does not divide: pad it
    """
    if psi % degree:
        raise ShapeError(f"{psi} values do not divide into {degree} parts: pad to {-(-psi // degree) * degree}")
    if degree != 1 and degree not in chain:
        raise ShapeError(f"degree {degree} is not one of {(1, *chain)}")
    start = sum(rank % d // inner * (psi // d) for inner, d in pairwise((1, *chain)) if d <= degree)
    return start, start + psi // degree


# ---- groups of ranks -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AllNics:
    """A group with several ranks on each of several nodes: its collectives use every NIC of a node (`_two_level`)."""

    comm: Any

    @property
    def size(self):
        return self.comm.size

    def all_gather(self, x):
        return _two_level.all_gather(self.comm, x)

    def reduce_scatter(self, x):
        return _two_level.reduce_scatter(self.comm, x)

    def all_reduce(self, x, op="sum"):
        return self.comm.all_reduce(x, op=op, algorithm="hierarchical")


@dataclass(frozen=True)
class Groups:
    """Communicators of a rank; tuples in the order in which they are used.

    forward   s_w to 1, outermost digit first          second     those that share the second copy, or None
    micro     1 to s_g, innermost first                step       s_g to s_o
    replicas  beyond s_o                               refresh    s_o to s_w
    order     qgZ: which part of the gradient goes where, so that two hops end in the right place; else None
    """

    forward: tuple
    second: Any
    micro: tuple
    step: tuple
    replicas: tuple
    refresh: tuple
    order: tuple | None


def spans(scheme, n):
    """The (inner, outer) degrees of each collective, by the names of `Groups`."""
    digits = list(pairwise((1, *degrees(scheme, n))))
    return {
        "forward": [d for d in reversed(digits) if d[1] <= scheme.s_w],
        "second": [(1, scheme.s_w2)] if scheme.s_w2 else [],
        "micro": list(pairwise((1, *route(scheme)))),
        "step": [d for d in digits if scheme.s_g < d[1] <= scheme.s_o],
        "replicas": [d for d in digits if scheme.s_o < d[1]],
        "refresh": [d for d in reversed(digits) if scheme.s_w < d[1] <= scheme.s_o],
    }


def route(scheme):
    """Degrees that a gradient passes: one exchange, but quantised ones are summed before they leave a node (qgZ)."""
    stops = {scheme.s_g, min(NODE, scheme.s_g)} if scheme.qg else {scheme.s_g}
    return tuple(sorted(stops - {1}))


def groups(comm, scheme):
    """Groups of this rank. All ranks call it; it takes no time."""
    n, chain = comm.size, degrees(scheme, comm.size)

    def build(inner, outer):
        group = comm.split((comm.rank % inner, comm.rank // outer), comm.rank)
        nodes, _, inside, _ = _two_level.levels(group)
        return AllNics(group) if nodes > 1 and inside.size > 1 else group

    built = {name: tuple(build(*span) for span in some) for name, some in spans(scheme, n).items()}
    second = built.pop("second")
    return Groups(**built, second=second[0] if second else None, order=reordering(scheme, chain))


def reordering(scheme, chain):
    """For each place in the route, the part of the gradient to put there; None if they agree."""
    parts, order = scheme.s_g, [0] * scheme.s_g
    for rank in range(parts):
        order[flat_range(rank, parts, parts, route(scheme))[0]] = flat_range(rank, parts, parts, chain)[0]
    return None if order == sorted(order) else tuple(order)
