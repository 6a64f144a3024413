"""All-gather and reduce-scatter on nodes of several ranks: a ring between nodes, and collectives inside each meanwhile.

Ranks of the same place in all nodes form a ring, so every rank's NIC carries 1/P of what enters a node; a ring through
all ranks would push all of it through one. A rank sends as much as in that ring, (P-1) of its parts. NCCL reaches the
same with several rings at once. On one node these are the communicator's own collectives.
Ranks are numbered node by node. Chapter: sequence_parallel/ulysses.
"""

import numpy as np

from toolkit.runtime.algorithms import combine, concatenate


def all_gather(comm, x):
    """All ranks' arrays joined along axis 0, in rank order. Same shape on every rank."""
    nodes, node, inside, across = levels(comm)
    if nodes == 1:
        return comm.all_gather(x)
    parts, part = [None] * nodes, x
    for step in range(nodes):
        incoming = across.ishift(part, by=1, tag="all_gather") if step < nodes - 1 else None
        parts[node - step] = inside.all_gather(part)
        part = incoming.wait() if incoming else None
    return concatenate(tuple(parts))


def reduce_scatter(comm, x):
    """Part `rank` of the sum of all ranks' `x`, cut evenly along axis 0."""
    nodes, node, inside, across = levels(comm)
    if nodes == 1:
        return comm.reduce_scatter(x)
    blocks, passing = np.array_split(x, nodes), None  # what each node gets
    for step in range(1, nodes + 1):
        total = inside.reduce_scatter(blocks[(node - step) % nodes])  # while the sum so far is on its way
        if passing:
            total = combine(passing.wait(), total)
        passing = across.ishift(total, by=1, tag="reduce_scatter") if step < nodes else None
    return total


def levels(comm):
    """(number of nodes, this one's, communicator of this node, communicator of this place in every node)."""
    nodes = sorted(
        {index for index, node in enumerate(comm.topology.groups or ()) for rank in node if rank in comm.ranks}
    )
    if len(nodes) < 2 or comm.size % len(nodes):
        return 1, 0, comm, None
    numbers = np.arange(comm.size).reshape(len(nodes), -1)
    node, place = divmod(comm.rank, numbers.shape[1])
    return len(nodes), node, comm.group(numbers[node].tolist()), comm.group(numbers[:, place].tolist())
