"""Machines made of machines: host memory and disks behind the devices, and several machines in one cluster."""

from bisect import bisect
from itertools import accumulate

from ..errors import ShapeError
from ..hardware import Link, replace
from .graph import Topology, empty, join


def with_memory(machine, host, disk=None, write=None, *, at=None):
    """`machine` with a host "host0", "host1", … for each node, and a disk "disk0", … behind it: tiers for offload.

    host   Link between a device and its host, one a device (PCIe ×16, NVLink-C2C)
    disk   Link from disk to host: what reading takes. None: no disks      write   the other way; `disk` if not given
    at     for each host the nodes it hangs on. Default: the devices of each group of the machine, all if it has none.
           `at=[["root"]]` puts one host on the root of a PCIe tree
    Messages between devices keep their routes; a flow to or from a host or disk takes the fewest hops.
    raises ShapeError  `at` names a node that is not there, or the machine has a host already
    """
    graph, at = machine.graph.copy(), at or machine.groups or (machine.ranks,)
    for number, nodes in enumerate(at):
        name = f"host{number}"
        if name in graph:
            raise ShapeError(f"{machine.name} has a node {name!r} already")
        for node in nodes:
            if node not in machine.graph:
                raise ShapeError(f"at={at!r}: {machine.name} has no node {node!r}")
            join(graph, node, name, host)
        graph.nodes[name]["kind"] = "host"
        if disk:
            join(graph, f"disk{number}", name, disk, write)
            graph.nodes[f"disk{number}"]["kind"] = "disk"

    name = f"{machine.name}, with {'disks' if disk else 'host memory'}"
    return Topology(name, graph, machine.ranks, machine.default, machine.groups, machine.alternatives)


def joined(parts, link, *, name=None):
    """Several machines in one cluster: a slow link, shared by its devices, from each to the network between them.

    parts    Topologies; ranks are numbered on, part by part. Their other nodes get the part's number: "switch@1"
    link     Link from a part's gateway to the network "wan", the same for all or one a part. A message between parts
             crosses two, and a device alone can fill its part's
    groups   the parts
    Give `Cluster` one device per rank where the parts have different ones:
    `Cluster(joined([switch(8, NVLINK4), pcie_tree(2, 2, PCIE4)], Link(1e9, 1e-3)), [H100] * 8 + [A10] * 4)`.
    """
    parts = list(parts)
    if not parts or not all(isinstance(part, Topology) for part in parts):
        raise ShapeError(f"parts={parts!r}: give a list of topologies, at least one")
    links = [link] * len(parts) if isinstance(link, Link) else list(link)
    if len(links) != len(parts):
        raise ShapeError(f"link={link!r}: give one Link, or one for each of the {len(parts)} parts")
    first = [0, *accumulate(len(part.ranks) for part in parts)]
    graph, renamed = empty(first[-1]), []
    for i, (part, uplink) in enumerate(zip(parts, links, strict=True)):
        names = {node: f"{node}@{i}" for node in part.graph} | {d: first[i] + j for j, d in enumerate(part.ranks)}
        renamed.append(names)
        graph.add_nodes_from((names[node], data) for node, data in part.graph.nodes(data=True))
        for u, v, data in part.graph.edges(data=True):
            medium = {"medium": (i, data["medium"])} if "medium" in data else {}
            graph.add_edge(names[u], names[v], **data | medium)
        join(graph, f"gate{i}", "wan", uplink)
        for d in range(first[i], first[i + 1]):
            join(graph, d, f"gate{i}", replace(uplink, latency=0.0, floor=0.0, name=f"port of {uplink.name}"))

    def inside(a, b, listed):
        """(part, its ranks' own numbers) if both ends lie in one part; else the way between two parts."""
        i, j = bisect(first, a) - 1, bisect(first, b) - 1
        if i != j:
            return [[a, f"gate{i}", "wan", f"gate{j}", b]]
        ends = parts[i].ranks[a - first[i]], parts[i].ranks[b - first[i]]
        found = parts[i].alternatives(*ends) if listed else [parts[i].default(*ends)]
        return [[renamed[i][node] for node in nodes] for nodes in found]

    groups = tuple(tuple(range(first[i], first[i + 1])) for i in range(len(parts)))
    return Topology(
        name or " + ".join(part.name for part in parts),
        graph,
        tuple(range(first[-1])),
        lambda a, b: inside(a, b, False)[0],
        groups,
        lambda a, b: inside(a, b, True),
    )
