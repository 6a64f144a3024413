"""Machines as graphs: devices, switches and hosts, joined by links.

A topology is a networkx DiGraph whose edges carry `link=hardware.Link`; full duplex is two edges. Devices are the
nodes 0 … n-1, so a rank's number is its node. Edges of one half-duplex medium share the attribute `medium`.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from itertools import pairwise

import networkx as nx

from .errors import ShapeError
from .hardware import Link


@dataclass
class Topology:
    """A machine's graph and its routing.

    graph   DiGraph; every edge has `link` and, when its medium is shared, `medium`
    ranks   device nodes in rank order
    path    (a, b) -> list of nodes from device a to device b; fewest hops by default
    """

    name: str
    graph: nx.DiGraph
    ranks: tuple
    path: Callable | None = None
    groups: tuple | None = None  # ranks by node, for hierarchical algorithms
    _routes: dict = field(default_factory=dict, repr=False)

    def route(self, a: Hashable, b: Hashable) -> list:
        """The edges (u, v) that a message from device `a` to device `b` crosses, in order; none when a is b."""
        found = self._routes.get((a, b))
        if found is None:
            for device in (a, b):
                if device not in self.graph:
                    raise ShapeError(f"{self.name} has no device {device!r}; it has {self.ranks[0]} … {self.ranks[-1]}")
            try:
                nodes = self.path(a, b) if self.path else nx.shortest_path(self.graph, a, b)
            except (nx.NetworkXNoPath, nx.NodeNotFound) as error:
                raise ShapeError(f"{self.name}: no route from {a!r} to {b!r}; connect them with an edge") from error
            found = self._routes[a, b] = list(pairwise(nodes))
        return found

    def link(self, u: Hashable, v: Hashable) -> Link:
        """The link of edge (u, v)."""
        return self.graph.edges[u, v]["link"]

    def medium(self, u: Hashable, v: Hashable) -> Hashable:
        """What the edge's capacity belongs to: the edge itself, or the medium that several edges share."""
        return self.graph.edges[u, v].get("medium", (u, v))


def _empty(n):
    if not isinstance(n, int) or n < 1:
        raise ShapeError(f"a topology needs at least 1 device, got {n!r}")
    graph = nx.DiGraph()
    graph.add_nodes_from(range(n), kind="device")
    return graph


def _join(graph, u, v, link):
    shared = {} if link.duplex else {"medium": frozenset((u, v))}
    graph.add_edge(u, v, link=link, **shared)
    graph.add_edge(v, u, link=link, **shared)


def full_mesh(n, link):
    """One full-duplex link for every pair of devices (Ascend HCCS, OAM boards): TokenRing's home."""
    graph = _empty(n)
    for a in range(n):
        for b in range(a):
            _join(graph, a, b, link)
    return Topology(f"full mesh of {n}", graph, tuple(range(n)), lambda a, b: [a, b] if a != b else [a])


def ring(n, link, *, backward=False):
    """Links r ↔ r+1 only. Messages take the shorter way round, ties forward.

    backward   True: upwards only to the next neighbour, everything else the long way down
    """
    graph = _empty(n)
    for a in range(n if n > 2 else n - 1):
        _join(graph, a, (a + 1) % n, link)

    def path(a, b):
        ahead = (b - a) % n
        step = -1 if ahead > (1 if backward else n - ahead) else 1
        return [(a + step * k) % n for k in range((ahead if step == 1 else n - ahead) % n + 1)]

    return Topology(f"ring of {n}", graph, tuple(range(n)), path)


def switch(n, link):
    """One full-duplex port a device into a non-blocking switch (NVSwitch)."""
    graph = _empty(n)
    for a in range(n):
        _join(graph, a, "switch", link)
    return Topology(f"switch of {n}", graph, tuple(range(n)), lambda a, b: [a, "switch", b] if a != b else [a])


def pcie_tree(switches, per_switch, port, uplink=None):
    """GPUs under PCIe switches under one root: PIX within a switch (2 hops), PXB across (4 hops).

    port     Link of each GPU to its switch        uplink   Link of each switch to the root; `port` if not given.
    A half-duplex Link (`duplex=False`) is one medium that both directions share.
    """
    n = switches * per_switch
    graph = _empty(n)
    for s in range(switches):
        _join(graph, f"pcie{s}", "root", uplink or port)
        for a in range(s * per_switch, (s + 1) * per_switch):
            _join(graph, a, f"pcie{s}", port)

    def path(a, b):
        up, down = f"pcie{a // per_switch}", f"pcie{b // per_switch}"
        return [a] if a == b else [a, up, b] if up == down else [a, up, "root", down, b]

    return Topology(
        f"PCIe tree of {switches} × {per_switch}", graph, tuple(range(n)), path, _groups(switches, per_switch)
    )


def two_level(nodes, per_node, inner, outer, *, inside="mesh"):
    """Nodes of GPUs, each GPU with its own NIC into a non-blocking fabric.

    inner    Link between GPUs of a node: one for every pair (inside="mesh") or a port into a switch (inside="switch")
    outer    Link from a GPU through its NIC to the fabric; crossing nodes takes two of them
    """
    if inside not in ("mesh", "switch"):
        raise ShapeError(f"inside={inside!r} is neither 'mesh' nor 'switch'")
    n = nodes * per_node
    graph = _empty(n)
    for a in range(n):
        _join(graph, a, "fabric", outer)
        if inside == "switch":
            _join(graph, a, f"switch{a // per_node}", inner)
        else:
            for b in range(a // per_node * per_node, a):
                _join(graph, a, b, inner)

    def path(a, b):
        if a == b:
            return [a]
        if a // per_node != b // per_node:
            return [a, "fabric", b]
        return [a, b] if inside == "mesh" else [a, f"switch{a // per_node}", b]

    return Topology(f"{nodes} nodes of {per_node}", graph, tuple(range(n)), path, _groups(nodes, per_node))


def _groups(count, size):
    return tuple(tuple(range(g * size, (g + 1) * size)) for g in range(count))
