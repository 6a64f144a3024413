"""Routing policies: which of the equal-cost paths a message takes. Each returns the same machine, routed anew.

    shortest    always the first path: one link carries what several could
    ecmp        a hash of source and destination picks one path: balanced on average, unlucky in particular
    spray       every packet its own path: all paths carry an equal part (the ideal; reordering costs nothing here)
    split       a message is cut into flows, and a hash picks a path for each: what several queue pairs do
    explicit    the paths that you say

The hash is seeded and the same on every machine. Sources: ECMP, RFC 2992; spraying, Dixit et al. 2013 (INFOCOM).
Chapter: foundations/links_switches_and_fair_shares.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from itertools import pairwise

from .errors import ShapeError
from .topology import Topology


def shortest(topology: Topology) -> Topology:
    """One path for each pair of devices: the first of `topology.alternatives`."""
    return replace(topology, spread=lambda a, b: [topology.alternatives(a, b)[:1]])


def ecmp(topology: Topology, seed: int = 0) -> Topology:
    """One path for each pair of devices, picked by a hash of the pair and `seed`."""
    return split(topology, 1, seed)


def spray(topology: Topology) -> Topology:
    """Every message is spread evenly over all its shortest paths, and moves as fast as the tightest of them lets it."""
    return replace(topology, spread=lambda a, b: [topology.alternatives(a, b)])


def split(topology: Topology, flows: int, seed: int = 0) -> Topology:
    """A message travels as `flows` equal parts, each on the path that a hash of the pair, the part and `seed` picks.

    raises  ShapeError  fewer than 1 flow
    """
    if flows < 1:
        raise ShapeError(f"a message cannot be split into {flows} flows: give at least 1")

    def spread(a, b):
        paths = topology.alternatives(a, b)
        return [[paths[_hash(seed, a, b, part) % len(paths)]] for part in range(flows)]

    return replace(topology, spread=spread)


def explicit(topology: Topology, paths: Mapping[tuple[Hashable, Hashable], Sequence[Hashable]]) -> Topology:
    """The given paths, each a list of nodes from source to destination; other pairs go as before.

    raises  ShapeError  a path that does not begin and end where it should, or uses an edge that is not there
    """
    for (a, b), nodes in paths.items():
        if list(nodes[:1]) != [a] or list(nodes[-1:]) != [b]:
            raise ShapeError(f"the path for {a!r} → {b!r} must begin and end there; it is {list(nodes)}")
        for u, v in pairwise(nodes):
            if not topology.graph.has_edge(u, v):
                raise ShapeError(f"the path for {a!r} → {b!r} uses {u!r} → {v!r}, a link that {topology.name} lacks")
    before = topology.spread or (lambda a, b: [[topology.default(a, b)]])
    return replace(topology, spread=lambda a, b: [[paths[a, b]]] if (a, b) in paths else before(a, b))


def _hash(*what):
    return int.from_bytes(blake2b(repr(what).encode(), digest_size=8).digest())
