"""Machines with names: rails of GPUs, Frontier's nodes, NVL72 racks. Each number has its source beside it.

Latencies are orders of magnitude, as in `hardware`. A NIC is a part of its GPU's link where every GPU has its own.
"""

import networkx as nx

from ..errors import ShapeError
from ..hardware import IB_NDR, INFINITY_FABRIC, NVLINK4, NVLINK5, Link, replace
from .graph import Topology, blocks, by_destination, empty, join, whole
from .simple import switch, two_level

# One MI250X node of Frontier: OLCF, Frontier User Guide, "Frontier Compute Nodes" and the node diagram. Per direction.
GCD_PAIR = replace(INFINITY_FABRIC, bandwidth=200e9, name="Infinity Fabric × 4")  # the two GCDs of a package
GCD_DOUBLE = replace(INFINITY_FABRIC, bandwidth=100e9, name="Infinity Fabric × 2")
GCD_TO_NIC = Link(50e9, 1e-6, name="PCIe 4 ESM")  # 25 GT/s × 16; the NIC hangs on the second GCD of a package
SLINGSHOT = Link(25e9, 2e-6, name="Slingshot 11")  # 200 Gb/s, four NICs a node
GCD_TO_HOST = Link(36e9, 2e-6, name="Infinity Fabric to the CPU")
# Two drives a node, striped; the guide's 5 500 and 2 000 MB/s are read here as those of one drive. Latency: assumed.
FRONTIER_READ = Link(11e9, 1e-4, name="NVMe read")
FRONTIER_WRITE = Link(4e9, 1e-4, name="NVMe write")
# Which GCDs have how many links, numbered as ROCm counts them: the node diagram; RCCL's table of this node agrees.
FRONTIER_LINKS = {
    GCD_PAIR: ((0, 1), (2, 3), (4, 5), (6, 7)),
    GCD_DOUBLE: ((0, 6), (2, 4)),
    INFINITY_FABRIC: ((0, 2), (1, 3), (1, 5), (3, 7), (4, 6), (5, 7)),
}
# Grace to the two Blackwells of a superchip: 900 GB/s (GB200 data sheet, 2024), read here as both directions and both
# GPUs together, so a quarter for each GPU each way.
NVLINK_C2C = Link(225e9, 1e-6, name="NVLink-C2C")


def rail_optimised(nodes, gpus=8, inner=NVLINK4, rail=IB_NDR, *, spines=0, uplink=None, pxn=True):
    """Nodes of GPUs behind one NVSwitch; GPU number r of every node hangs on the same leaf switch, rail r.

    inner   Link of a GPU to its NVSwitch           rail    Link of a GPU through its own NIC to its rail
    spines  switches above the rails; 0: none, the rail-only network of Wang et al. 2023
    uplink  Link of a rail to a spine; like `rail` if not given
    pxn     True: a message to another rail goes through NVSwitch to the GPU of that rail and leaves there, as NCCL 2.12
            does. False: it climbs to a spine, so there must be some
    The defaults are a DGX H100: 18 NVLinks and one 400 Gb/s NIC a GPU (its data sheet, 2022).
    """
    whole(nodes=nodes, gpus=gpus)
    whole("spine", 0, spines=spines)
    if not (spines or pxn):
        raise ShapeError("spines=0 with pxn=False: nothing joins two rails; add spines or forward with pxn=True")
    n = nodes * gpus
    graph = empty(n)
    for a in range(n):
        join(graph, a, f"nvswitch{a // gpus}", inner)
        join(graph, a, f"rail{a % gpus}", rail)
    for r in range(gpus):
        for spine in range(spines):
            join(graph, f"rail{r}", f"spine{spine}", uplink or rail)

    def count(a, b):
        return spines if not pxn and a // gpus != b // gpus and a % gpus != b % gpus else 1

    def nth(a, b, i):
        (node, r), (other, s) = divmod(a, gpus), divmod(b, gpus)
        if node == other:
            return [a, f"nvswitch{node}", b]
        if r == s:
            return [a, f"rail{r}", b]
        if pxn:
            return [a, f"nvswitch{node}", node * gpus + s, f"rail{s}", b]
        return [a, f"rail{r}", f"spine{i}", f"rail{s}", b]

    path, paths = by_destination(count, nth)
    return Topology(f"{gpus} rails of {nodes} nodes", graph, tuple(range(n)), path, blocks(nodes, gpus), paths)


def frontier(nodes=1):
    """Nodes of Frontier: 8 GCDs of four MI250X packages, linked by Infinity Fabric four, two, one or no links wide.

    Rank 8·k + g is GCD g of node k. GCDs without a link pass through one that has both, an assumption; where there are
    two such GCDs the ways are equally wide, and the lower number is the default.
    With more than one node each package has a Slingshot NIC of 25 GB/s on its odd GCD, so two GCDs share one. The
    fabric between NICs is taken as non-blocking, an assumption that fits jobs inside one dragonfly group of 128 nodes;
    its taper between groups is not modelled.

    Host and disks: `with_memory(frontier(n), machines.GCD_TO_HOST, machines.FRONTIER_READ, machines.FRONTIER_WRITE)`.
    """
    whole(nodes=nodes)
    node = nx.Graph(pair for pairs in FRONTIER_LINKS.values() for pair in pairs)
    inside = {(a, b): sorted(nx.all_shortest_paths(node, a, b)) for a in range(8) for b in range(8)}
    graph = empty(8 * nodes)
    for base in range(0, 8 * nodes, 8):
        for link, pairs in FRONTIER_LINKS.items():
            for u, v in pairs:
                join(graph, base + u, base + v, link)
        for package in range(4 if nodes > 1 else 0):
            nic = f"nic{base // 8}.{package}"
            join(graph, base + 2 * package + 1, nic, GCD_TO_NIC)
            join(graph, nic, "slingshot", SLINGSHOT)

    def paths(a, b):
        if a // 8 == b // 8:
            return [[a // 8 * 8 + g for g in way] for way in inside[a % 8, b % 8]]
        out, into = ([d, *[d | 1] * (d % 2 == 0), f"nic{d // 8}.{d % 8 // 2}"] for d in (a, b))
        return [[*out, "slingshot", *reversed(into)]]

    name = f"{nodes} nodes of Frontier" if nodes > 1 else "node of Frontier"
    return Topology(name, graph, tuple(range(8 * nodes)), lambda a, b: paths(a, b)[0], blocks(nodes, 8), paths)


def nvl72(racks=1, nic=IB_NDR):
    """GB200 NVL72: 72 Blackwell GPUs on one NVLink domain, 900 GB/s each way per GPU.

    Each GPU has 18 NVLinks, one to each of the 18 NVSwitch chips of the rack, and traffic spreads over all of them: one
    non-blocking switch (GB200 NVL72 data sheet, 2024: 130 TB/s = 72 × 1.8 TB/s, both directions).
    nic   Link of each GPU to a non-blocking fabric between racks; ConnectX-7 of 400 Gb/s in the data sheet
    `groups` are racks.
    """
    whole("rack", racks=racks)
    if racks > 1:
        machine = two_level(racks, 72, NVLINK5, nic, inside="switch")
        machine.name = f"{racks} racks of NVL72"
        return machine
    machine = switch(72, NVLINK5)
    machine.name, machine.groups = "NVL72", blocks(1, 72)
    return machine
