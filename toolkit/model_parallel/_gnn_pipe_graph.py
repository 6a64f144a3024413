"""Graphs of GNNPipe: made with planted groups, cut into chunks and parts.

Two cuts are independent: *chunks* follow each other through the pipeline, *parts* share the work of one stage.
Chapter: model_parallel/gnn_pipe.
"""

from dataclasses import dataclass

import numpy as np
from numba import njit
from scipy import sparse

from toolkit.runtime.errors import ShapeError

METHODS = ("random", "breadth_first", "greedy")


@dataclass(frozen=True)
class Graph:
    """A graph to learn on.

    adjacency   (n, n) scipy CSR, normalised: entry [u, v] weighs what u takes from v
    features    (n, d0) float      labels   (n,) int      train   (n,) bool: whose labels the loss may see
    """

    adjacency: sparse.csr_array
    features: np.ndarray
    labels: np.ndarray
    train: np.ndarray


def normalised(links, how="symmetric"):
    """Self-loops added, weights scaled: D^-1/2 (A + I) D^-1/2, or with how="mean" D^-1 (A + I), right for directed A.

    links     (n, n) sparse, nonzero at [u, v] where u takes from v
    returns   (n, n) CSR, float64
    """
    ones = sparse.csr_array((links != 0).astype(np.float64)) + sparse.eye_array(links.shape[0], format="csr")
    ones.data[:] = 1.0
    degree = ones.sum(axis=1)
    if how == "mean":
        return sparse.csr_array(sparse.diags_array(1 / degree) @ ones)
    scale = sparse.diags_array(degree**-0.5)
    return sparse.csr_array(scale @ ones @ scale)


def planted(vertices, groups, degree, mixing, *, spread=0.0, seed=0):
    """Links of a graph with planted groups of equal size, in random order.

    degree    average number of neighbours (a few less: double and self links are dropped)
    mixing    share of links that ignore the groups
    spread    sigma of log-normal weights: 0 gives degrees of even size, 1 a heavy tail
    returns   (links (n, n) CSR symmetric bool, group of each vertex (n,))
    """
    random = np.random.default_rng(seed)
    group = random.permutation(np.arange(vertices) % groups)
    weight = np.exp(spread * random.standard_normal(vertices))
    links, anyone = vertices * degree // 2, weight / weight.sum()
    source = random.choice(vertices, links, p=anyone)
    target = random.choice(vertices, links, p=anyone)
    local = random.random(links) >= mixing
    for g in range(groups):
        members, mine = np.flatnonzero(group == g), local & (group[source] == g)
        target[mine] = random.choice(members, mine.sum(), p=weight[members] / weight[members].sum())
    keep = source != target
    one_way = sparse.coo_array((np.ones(keep.sum(), bool), (source[keep], target[keep])), (vertices, vertices)).tocsr()
    return sparse.csr_array(one_way + one_way.T), group


def community_graph(vertices=600, classes=4, *, degree=8, mixing=0.35, width=16, noise=3.0, train=0.3, seed=0):
    """A graph whose groups are the classes: features alone say little, neighbours say much. Returns Graph."""
    links, labels = planted(vertices, classes, degree, mixing, seed=seed)
    random = np.random.default_rng((seed, 1))
    centres = random.standard_normal((classes, width))
    features = centres[labels] + noise * random.standard_normal((vertices, width))
    return Graph(normalised(links), features, labels, random.random(vertices) < train)


# ---- cutting ---------------------------------------------------------------------------------------------------------


def partition_vertices(adjacency, k, method="greedy", seed=0):
    """Cut the vertices into k parts of nearly equal size.

    method    "random": a straw man · "breadth_first": runs of equal length of a breadth-first order ·
              "greedy": runs of whole clusters; then vertices move to where most neighbours are, sizes within 5 %
    returns   (n,) int, the part of each vertex; no part is empty
    raises    ShapeError  more parts than vertices, or an unknown method
    """
    n = adjacency.shape[0]
    if not 1 <= k <= n:
        raise ShapeError(f"{n} vertices do not make {k} parts: give a number from 1 to {n}")
    if method not in METHODS:
        raise ShapeError(f"method {method!r} is not one of {', '.join(METHODS)}")
    runs = np.arange(n) * k // n
    part = np.empty(n, np.int64)
    if method == "random":
        part[np.random.default_rng(seed).permutation(n)] = runs
        return part
    both = sparse.csr_array(adjacency + adjacency.T)
    order = _breadth_first(both.indptr, both.indices)
    if method == "greedy":
        cluster = _clusters(both.indptr, both.indices, order, max(1, n // (4 * k)), 10)
        order = order[np.argsort(_first_seen(cluster[order]), kind="stable")]
    part[order] = runs
    if method == "greedy" and k > 1:
        low, high = max(1, int(0.95 * n / k)), -int(-1.05 * n // k)
        _refine(both.indptr, both.indices, part, k, low, high, 20)
    return part


def _first_seen(labels):
    """For each entry, where its label first occurs."""
    _, first, which = np.unique(labels, return_index=True, return_inverse=True)
    return first[which]


@njit(cache=True)
def _breadth_first(indptr, indices):
    """All vertices, component after component."""
    n = len(indptr) - 1
    order, seen, end = np.empty(n, np.int64), np.zeros(n, np.bool_), 0
    for start in range(n):
        if seen[start]:
            continue
        order[end], seen[start], head = start, True, end
        end += 1
        while head < end:
            v = order[head]
            head += 1
            for j in range(indptr[v], indptr[v + 1]):
                if not seen[indices[j]]:
                    seen[indices[j]], order[end] = True, indices[j]
                    end += 1
    return order


@njit(cache=True)
def _clusters(indptr, indices, order, largest, sweeps):
    """Label propagation: a vertex joins the cluster of most of its neighbours, while that has room."""
    n = len(order)
    label, size, count = np.arange(n), np.ones(n, np.int64), np.zeros(n, np.int64)
    for _ in range(sweeps):
        for v in order:
            near = label[indices[indptr[v] : indptr[v + 1]]]
            for c in near:
                count[c] += 1
            here = best = label[v]
            for c in near:
                if count[c] > count[best] and size[c] < largest:
                    best = c
            count[near] = 0
            size[here] -= 1
            size[best] += 1
            label[v] = best
    return label


@njit(cache=True)
def _refine(indptr, indices, part, k, low, high, passes):
    size = np.zeros(k, np.int64)
    for v in range(len(part)):
        size[part[v]] += 1
    count = np.zeros(k, np.int64)
    for _ in range(passes):
        moved = 0
        for v in range(len(part)):
            here, best = part[v], part[v]
            if size[here] <= low:
                continue
            count[:] = 0
            for j in range(indptr[v], indptr[v + 1]):
                count[part[indices[j]]] += 1
            for p in range(k):
                if count[p] > count[best] and size[p] < high:
                    best = p
            if best != here:
                size[here], size[best], part[v] = size[here] - 1, size[best] + 1, best
                moved += 1
        if moved == 0:
            break


def cut(adjacency, chunks, parts=1, method="greedy", seed=0):
    """Cut into parts, and each part into chunks: chunk c is the c-th piece of every part.

    returns   (chunk of each vertex (n,), part of each vertex (n,))
    raises    ShapeError
    """
    part, chunk = partition_vertices(adjacency, parts, method, seed), np.empty(adjacency.shape[0], np.int64)
    for p in range(parts):
        members = np.flatnonzero(part == p)
        chunk[members] = partition_vertices(adjacency[members][:, members], chunks, method, seed)
    return chunk, part


def chunk_adjacency(adjacency, chunk):
    """[t, s] True where some vertex of chunk t takes from a vertex of chunk s."""
    member = _members(chunk)
    return (member @ (adjacency != 0).astype(np.float64) @ member.T).toarray() > 0


def needed(adjacency, part):
    """[g, v] True where part g, not v's own, has a vertex that takes from v: the row of v must be sent to g."""
    wanted = (_members(part) @ (adjacency != 0).astype(np.float64)).toarray() > 0
    wanted[part, np.arange(len(part))] = False
    return wanted


def _members(label):
    n = len(label)
    return sparse.csr_array((np.ones(n), (label, np.arange(n))), (label.max() + 1, n))
