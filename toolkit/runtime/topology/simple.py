"""The five machines that most chapters need: mesh, ring, switch, PCIe tree, nodes of GPUs."""

from ..errors import ShapeError
from .graph import Topology, blocks, empty, join, only, whole


def full_mesh(n, link):
    """One full-duplex link for every pair of devices (Ascend HCCS, OAM boards): TokenRing's home."""
    whole(n=n)
    graph = empty(n)
    for a in range(n):
        for b in range(a):
            join(graph, a, b, link)
    return Topology(f"full mesh of {n}", graph, tuple(range(n)), lambda a, b: [a, b] if a != b else [a])


def ring(n, link, *, backward=False):
    """Links r ↔ r+1 only. Messages take the shorter way round, ties forward.

    backward   True: upwards only to the next neighbour, everything else the long way down
    """
    whole(n=n)
    graph = empty(n)
    for a in range(n if n > 2 else n - 1):
        join(graph, a, (a + 1) % n, link)

    def path(a, b):
        ahead = (b - a) % n
        step = -1 if ahead > (1 if backward else n - ahead) else 1
        return [(a + step * k) % n for k in range((ahead if step == 1 else n - ahead) % n + 1)]

    return Topology(f"ring of {n}", graph, tuple(range(n)), path, paths=only(path) if backward else None)


def switch(n, link):
    """One full-duplex port a device into a non-blocking switch (NVSwitch)."""
    whole(n=n)
    graph = empty(n)
    for a in range(n):
        join(graph, a, "switch", link)
    return Topology(f"switch of {n}", graph, tuple(range(n)), lambda a, b: [a, "switch", b] if a != b else [a])


def pcie_tree(switches, per_switch, port, uplink=None):
    """GPUs under PCIe switches under one root: PIX within a switch (2 hops), PXB across (4 hops).

    port     Link of each GPU to its switch        uplink   Link of each switch to the root; `port` if not given.
    A half-duplex Link (`duplex=False`) is one medium that both directions share.
    """
    whole(switches=switches, per_switch=per_switch)
    n = switches * per_switch
    graph = empty(n)
    for s in range(switches):
        join(graph, f"pcie{s}", "root", uplink or port)
        for a in range(s * per_switch, (s + 1) * per_switch):
            join(graph, a, f"pcie{s}", port)

    def path(a, b):
        up, down = f"pcie{a // per_switch}", f"pcie{b // per_switch}"
        return [a] if a == b else [a, up, b] if up == down else [a, up, "root", down, b]

    name = f"PCIe tree of {switches} × {per_switch}"
    return Topology(name, graph, tuple(range(n)), path, blocks(switches, per_switch))


def two_level(nodes, per_node, inner, outer, *, inside="mesh"):
    """Nodes of GPUs, each GPU with its own NIC into a non-blocking fabric.

    inner    Link between GPUs of a node: one for every pair (inside="mesh") or a port into a switch (inside="switch")
    outer    Link from a GPU through its NIC to the fabric; crossing nodes takes two of them
    """
    if inside not in ("mesh", "switch"):
        raise ShapeError(f"inside={inside!r} is neither 'mesh' nor 'switch'")
    whole(nodes=nodes, per_node=per_node)
    n = nodes * per_node
    graph = empty(n)
    for a in range(n):
        join(graph, a, "fabric", outer)
        if inside == "switch":
            join(graph, a, f"switch{a // per_node}", inner)
        else:
            for b in range(a // per_node * per_node, a):
                join(graph, a, b, inner)

    def path(a, b):
        if a == b:
            return [a]
        if a // per_node != b // per_node:
            return [a, "fabric", b]
        return [a, b] if inside == "mesh" else [a, f"switch{a // per_node}", b]

    return Topology(f"{nodes} nodes of {per_node}", graph, tuple(range(n)), path, blocks(nodes, per_node), only(path))
