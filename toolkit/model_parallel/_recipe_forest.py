"""A random forest for regression on knobs with few levels each: bootstrapped trees that split by histograms.

Breiman 2001. Small on purpose: a split is looked for among the levels of a knob, not among sorted values. Its spread,
the standard deviation over trees, is 0 where all trees agree, also where no tree has seen anything: who explores by it
needs a floor.
Chapter: model_parallel/frontier_recipe.
"""

from dataclasses import dataclass

import numpy as np
from numba import njit

from toolkit.runtime.errors import ShapeError


@dataclass(frozen=True)
class Forest:
    """Nodes of all trees: (trees, nodes) arrays. A leaf has knob -1."""

    knob: np.ndarray
    level: np.ndarray  # go left if the row's level is at most this
    left: np.ndarray  # the right child is the next node
    value: np.ndarray

    def each(self, x):
        """Predictions of every tree, (trees, n). x (n, k): levels, counted from 0."""
        return _predict(self.knob, self.level, self.left, self.value, np.ascontiguousarray(x, dtype="float64"))

    def mean(self, x):
        return self.each(x).mean(axis=0)


def fit(x, y, random, trees=50, looked_at=None):
    """Forest that predicts y (n,) from levels x (n, k), whole numbers from 0 on.

    random     numpy Generator: the bootstrap and which knobs a split looks at
    looked_at  knobs that a split looks at; None: two thirds
    raises     ShapeError
    """
    x, y = np.asarray(x, dtype="int64"), np.asarray(y, dtype="float64")
    if x.ndim != 2 or y.shape != x.shape[:1] or not len(y):
        raise ShapeError(f"levels {x.shape} and values {y.shape}: give (n, k) and (n,), n at least 1")
    n, k = x.shape
    looked_at = looked_at or -(-2 * k // 3)
    samples = random.integers(n, size=(trees, n))
    keys = random.random((trees, 2 * n, k)).argsort(axis=2)[:, :, :looked_at]
    return Forest(*_grow(x, y, samples, keys, int(x.max()) + 1))


@njit(cache=True)
def _grow(x, y, samples, keys, levels):
    trees, n = samples.shape
    knob, level = np.full((trees, 2 * n), -1), np.zeros((trees, 2 * n), np.int64)
    left, value = np.zeros((trees, 2 * n), np.int64), np.zeros((trees, 2 * n))
    first, last = np.zeros(2 * n, np.int64), np.zeros(2 * n, np.int64)  # a node's rows are order[first:last]
    for tree in range(trees):
        order = samples[tree].copy()
        first[0], last[0], nodes, node = 0, n, 1, 0
        while node < nodes:
            rows = order[first[node] : last[node]]
            value[tree, node] = y[rows].mean()
            best, at = _split(x, y, rows, keys[tree, node], levels)
            if best >= 0:
                knob[tree, node], level[tree, node], left[tree, node] = best, at, nodes
                middle = first[node] + _part(x, rows, best, at)
                first[nodes], last[nodes] = first[node], middle
                first[nodes + 1], last[nodes + 1] = middle, last[node]
                nodes += 2
            node += 1
    return knob, level, left, value


@njit(cache=True)
def _split(x, y, rows, knobs, levels):
    """(knob, level) that takes most variance away, or (-1, 0)."""
    total, n, best, at = y[rows].sum(), len(rows), -1, 0
    most = total**2 / n * (1 + 1e-12) + 1e-300
    counts, sums = np.zeros(levels), np.zeros(levels)
    for knob in knobs:
        counts[:], sums[:] = 0.0, 0.0
        for row in rows:
            counts[x[row, knob]] += 1
            sums[x[row, knob]] += y[row]
        below, their = 0.0, 0.0
        for level in range(levels - 1):
            below += counts[level]
            their += sums[level]
            if 0 < below < n and counts[level]:
                gain = their**2 / below + (total - their) ** 2 / (n - below)
                if gain > most:
                    most, best, at = gain, knob, level
    return best, at


@njit(cache=True)
def _part(x, rows, knob, level):
    """Bring rows that go left to the front; how many they are."""
    ahead = 0
    for i in range(len(rows)):
        if x[rows[i], knob] <= level:
            rows[i], rows[ahead] = rows[ahead], rows[i]
            ahead += 1
    return ahead


@njit(cache=True)
def _predict(knob, level, left, value, x):
    out = np.empty((len(knob), len(x)))
    for tree in range(len(knob)):
        for row in range(len(x)):
            node = 0
            while knob[tree, node] >= 0:
                node = left[tree, node] + (x[row, knob[tree, node]] > level[tree, node])
            out[tree, row] = value[tree, node]
    return out
