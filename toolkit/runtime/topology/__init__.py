"""Machines as graphs: devices, switches and hosts, joined by links.

A topology is a networkx DiGraph whose edges carry `link=hardware.Link`; full duplex is two edges. Devices are the
nodes 0 … n-1, so a rank's number is its node. Edges of one half-duplex medium share the attribute `medium`.

    simple     full_mesh(n), ring(n), switch(n), pcie_tree(switches, per_switch), two_level(nodes, per_node)
    fabrics    torus(shape), leaf_spine(leaves, per_leaf, spines), fat_tree(k), dragonfly(groups, routers, per_router)
    machines   rail_optimised(nodes, gpus), frontier(nodes), nvl72(racks)
    compose    with_memory(machine, host, disk) adds tiers for offload; joined(parts, link) makes one cluster of several

Every builder takes its links as `hardware.Link`; where a pair of devices has several equal paths, `Topology.paths`
lists them and `Topology.path` is one of them.
"""

from .compose import joined, with_memory
from .fabrics import dragonfly, fat_tree, leaf_spine, torus
from .graph import Topology
from .machines import frontier, nvl72, rail_optimised
from .simple import full_mesh, pcie_tree, ring, switch, two_level

__all__ = [
    "Topology",
    "dragonfly",
    "fat_tree",
    "frontier",
    "full_mesh",
    "joined",
    "leaf_spine",
    "nvl72",
    "pcie_tree",
    "rail_optimised",
    "ring",
    "switch",
    "torus",
    "two_level",
    "with_memory",
]
