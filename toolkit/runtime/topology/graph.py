"""A machine's graph, its routing, and the few helpers that builders share."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice, pairwise
from numbers import Integral

import networkx as nx

from ..errors import ShapeError
from ..hardware import Link


@dataclass
class Topology:
    """A machine's graph and its routing.

    graph   DiGraph; every edge has `link` and, when its medium is shared, `medium`
    ranks   device nodes in rank order
    path    (a, b) -> list of nodes from device a to device b. None, and for ends that are no devices (hosts, disks):
            the fewest hops
    groups  ranks by node, for hierarchical algorithms
    paths   (a, b) -> list of all paths of equal cost, in an order that never changes. None: all with the fewest hops
    spread  (a, b) -> the flows that a message becomes, each a list of the paths (lists of nodes) that it is sprayed
            over: what `toolkit.runtime.routing` sets. None: one flow, on `path`
    """

    name: str
    graph: nx.DiGraph
    ranks: tuple
    path: Callable | None = None
    groups: tuple | None = None
    paths: Callable | None = None
    spread: Callable | None = None
    _flows: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        self._devices = frozenset(self.ranks)

    def route(self, a: Hashable, b: Hashable) -> list:
        """The edges (u, v) that a message from node `a` to node `b` crosses, in order; none when a is b."""
        return list(self.carried(a, b))

    def flows(self, a: Hashable, b: Hashable) -> list:
        """The flows of a message from `a` to `b`: for each, the paths it is sprayed over, as lists of edges."""
        found = self._flows.get((a, b))
        if found is None:
            self._check(a, b)
            try:
                flows = self.spread(a, b) if self.spread else [[self.default(a, b)]]
            except nx.NetworkXNoPath as error:
                raise ShapeError(f"{self.name}: no route from {a!r} to {b!r}; connect them with an edge") from error
            found = self._flows[a, b] = [[list(pairwise(nodes)) for nodes in paths] for paths in flows]
        return found

    def carried(self, a: Hashable, b: Hashable) -> dict:
        """{edge: which share of a message from `a` to `b` crosses it}, in order."""
        shares, flows = {}, self.flows(a, b)
        if len(flows) == len(flows[0]) == 1:
            return dict.fromkeys(flows[0][0], 1)
        for paths in flows:
            for edges in paths:
                for edge in edges:
                    shares[edge] = shares.get(edge, 0) + Fraction(1, len(flows) * len(paths))
        return shares

    def alternatives(self, a: Hashable, b: Hashable) -> list:
        """All paths of equal cost, as lists of nodes: `paths` for devices, else 1 024 of the fewest hops."""
        self._check(a, b)
        if self.paths and a in self._devices and b in self._devices:
            return self.paths(a, b)
        return list(islice(nx.all_shortest_paths(self.graph, a, b), 1024))

    def default(self, a: Hashable, b: Hashable) -> list:
        """The nodes of the path that a message takes without a routing policy."""
        closed = self.path and a in self._devices and b in self._devices
        return self.path(a, b) if closed else nx.shortest_path(self.graph, a, b)

    def link(self, u: Hashable, v: Hashable) -> Link:
        """The link of edge (u, v)."""
        return self.graph.edges[u, v]["link"]

    def medium(self, u: Hashable, v: Hashable) -> Hashable:
        """What the edge's capacity belongs to: the edge itself, or the medium that several edges share."""
        return self.graph.edges[u, v].get("medium", (u, v))

    def _check(self, *nodes):
        for node in nodes:
            if node not in self.graph:
                raise ShapeError(f"{self.name} has no device {node!r}; it has {self.ranks[0]} … {self.ranks[-1]}")


def whole(thing="device", at_least=1, **counts):
    """Check that every count is a whole number; `thing` is what there would be too few of."""
    for name, value in counts.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < at_least:
            plural = "s" if at_least != 1 else ""
            raise ShapeError(f"{name}={value!r}: give a whole number that makes at least {at_least} {thing}{plural}")


def empty(n):
    """A graph of n devices and no links."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(n), kind="device")
    return graph


def join(graph, u, v, link, back=None):
    """Connect u and v both ways: one link each if it is full duplex, else one medium. `back`: the Link from v to u."""
    for given in (link, back or link):
        if not isinstance(given, Link):
            raise ShapeError(f"{given!r} between {u!r} and {v!r} is no link; give a hardware.Link(bandwidth, latency)")
    shared = {} if link.duplex else {"medium": frozenset((u, v))}
    graph.add_edge(u, v, link=link, **shared)
    graph.add_edge(v, u, link=back or link, **shared)


def blocks(count, size):
    """Ranks in `count` groups of `size`, in order."""
    return tuple(tuple(range(g * size, (g + 1) * size)) for g in range(count))


def only(path):
    """The `paths` of a machine where every pair has one."""
    return lambda a, b: [path(a, b)]


def by_destination(count, nth):
    """(path, paths) of a machine with several equal paths: path number b mod count is the default of destination b.

    count  (a, b) -> how many there are    nth  (a, b, i) -> nodes of number i
    This is the static routing of InfiniBand fat trees, D-mod-k (Zahavi 2012): all cyclic shifts of all devices are
    free of contention where no level is oversubscribed.
    """

    def path(a, b):
        return nth(a, b, b % count(a, b)) if a != b else [a]

    def paths(a, b):
        return [nth(a, b, i) for i in range(count(a, b))] if a != b else [[a]]

    return path, paths
