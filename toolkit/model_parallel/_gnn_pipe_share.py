"""What one rank of a group owns of a graph, chunk by chunk, and which rows travel. Chapter: model_parallel/gnn_pipe."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import sparse

from toolkit.runtime import like

from ._gnn_pipe_graph import needed


@dataclass(frozen=True)
class Side:
    """Message passing in one direction, as one rank sees it. All lists go by chunk.

    own     sparse (vertices of the chunk here, own vertices)       gives   own rows to send, one array a rank
    halo    sparse (vertices of the chunk here, halo rows)          takes   slice of the halo that is received
    """

    own: tuple
    halo: tuple
    gives: tuple
    takes: tuple
    halo_rows: int


@dataclass(frozen=True)
class Share:
    """What one rank of a group owns of a graph; its vertices are numbered chunk by chunk.

    vertices            their numbers in the graph      chunks   slices of own vertices
    forward, backward   Side of the adjacency and of its transpose
    features, labels    own rows                        weight   1 / number of training vertices, 0 for others
    """

    vertices: np.ndarray
    chunks: tuple
    forward: Side
    backward: Side
    features: np.ndarray
    labels: np.ndarray
    weight: np.ndarray


def shares(graph, chunk, part=None):
    """One Share for each part of the graph. chunk, part: as `cut` returns them; no part: everything on one rank."""
    part = np.zeros_like(chunk) if part is None else part
    backward = sparse.csr_array(graph.adjacency.T)
    order = np.lexsort((chunk, part))
    place = np.empty_like(order)
    for p in range(part.max() + 1):
        mine = order[part[order] == p]
        place[mine] = np.arange(len(mine))
    weight = np.where(graph.train, 1 / max(1, graph.train.sum()), 0.0).astype(graph.features.dtype)

    def of(rank):
        mine = order[part[order] == rank]
        slices = _runs(chunk[mine], chunk.max() + 1)
        sides = [_side(a, chunk, part, place, mine, slices, rank) for a in (graph.adjacency, backward)]
        return Share(mine, slices, *sides, graph.features[mine], graph.labels[mine], weight[mine])

    return [of(rank) for rank in range(part.max() + 1)]


def _side(adjacency, chunk, part, place, mine, slices, rank):
    wanted = needed(adjacency, part)
    halo = np.flatnonzero(wanted[rank])
    halo = halo[np.lexsort((place[halo], part[halo], chunk[halo]))]
    rows = adjacency[mine]
    own, far = rows[:, mine], rows[:, halo]
    gives = tuple(tuple(np.flatnonzero(wanted[g, mine[s]]) + s.start for g in range(part.max() + 1)) for s in slices)
    return Side(
        tuple(own[s] for s in slices),
        tuple(far[s] for s in slices),
        gives,
        _runs(chunk[halo], len(slices)),
        len(halo),
    )


def _runs(labels, count):
    """Slices of equal labels, of labels in order."""
    return tuple(slice(*map(int, ends)) for ends in pairwise(np.searchsorted(labels, np.arange(count + 1))))


@dataclass(frozen=True)
class Pattern:
    """What a shape-only run knows of a sparse matrix."""

    shape: tuple
    nnz: int


def expected_share(vertices, edges, width, chunks, parts=1, replicas=0.0, crossing=0.0, dtype="float32"):
    """The Share of every rank of a shape-only run: a graph as its statistics, evenly cut.

    edges      nonzeros of the adjacency       width      of the features
    replicas   average number of other parts that need a vertex' row
    crossing   share of nonzeros between parts
    """
    n, rows = vertices // parts, vertices // parts // chunks
    sent = round(replicas * rows / max(1, parts - 1))  # to each other rank, from one chunk
    halo, nonzeros = sent * (parts - 1), edges // parts // chunks
    index = like((sent,), "int64")
    side = Side(
        (Pattern((rows, n), round(nonzeros * (1 - crossing))),) * chunks,
        (Pattern((rows, halo * chunks), round(nonzeros * crossing)),) * chunks,
        ((index,) * parts,) * chunks,
        tuple(slice(c * halo, (c + 1) * halo) for c in range(chunks)),
        halo * chunks,
    )
    slices = tuple(slice(c * rows, (c + 1) * rows) for c in range(chunks))
    return Share(
        like((n,), "int64"), slices, side, side, like((n, width), dtype), like((n,), "int64"), like((n,), dtype)
    )
