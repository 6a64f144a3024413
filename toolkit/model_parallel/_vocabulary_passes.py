"""What each rank does with its rows of the vocabulary: a softmax of its own logits, put right by one factor a token.

With m' and s' the largest logit and the sum of exponentials of a rank's own columns, M the largest m' and Σ the sum of
s' exp(m' - M) over ranks, the true softmax is the rank's own times α = s' exp(m' - M) / Σ. So a rank can go on with
what it has, and α comes later.

A rank without logits (padding only) has m' = -inf, s' = 0 and α = 0. Statistics are float32, or float64 with float64.
Chapter: model_parallel/vocabulary_parallel.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from toolkit.runtime import Cost, kernel, like
from toolkit.runtime.arrays import is_shape_only
from toolkit.runtime.errors import ShapeError

from ._vocabulary import _held, _sums_dtype

# ---- the cut ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VocabShard:
    """Rows that rank `rank` of `ranks` has of a table of `size` rows: `rows` on each, the last ones padded."""

    rank: int
    ranks: int
    size: int

    @property
    def rows(self):
        return -(-self.size // self.ranks)

    @property
    def first(self):
        return self.rank * self.rows

    @property
    def held(self):
        """Rows that are words; the rest is padding."""
        return min(max(self.size - self.first, 0), self.rows)

    def of(self, table):
        """This rank's (rows, h) of a whole table (size, h), zeros in the padding."""
        if is_shape_only(table):
            return like((self.rows, table.shape[1]), table.dtype)
        mine = np.zeros((self.rows, table.shape[1]), table.dtype)
        mine[: self.held] = table[self.first : self.first + self.held]
        return mine


def check_targets(targets, size):
    """raises   ShapeError, a ValueError: a target or token that is none of `size` words"""
    if not is_shape_only(targets) and targets.size and not 0 <= targets.min() <= targets.max() < size:
        wrong = targets[(targets < 0) | (targets >= size)][0]
        raise ShapeError(f"token {wrong} is no row of a vocabulary of {size}: give 0 … {size - 1}")


# ---- the arithmetic --------------------------------------------------------------------------------------------------


class Own(NamedTuple):
    """What a rank knows of n tokens by itself; softmax is over its own columns."""

    top: Any  # (n,) m'
    total: Any  # (n,) s'
    target: Any  # (n,) the target's logit; 0 where another rank has it
    softmax: Any  # (n, rows)


def _own_cost(logits, targets, shard):
    return Cost(0, 2 * logits.nbytes + logits.size * _sums_dtype(logits.dtype).itemsize + targets.nbytes)


def _own_shapes(logits, targets, shard):
    dtype = _sums_dtype(logits.dtype)
    return Own(*(like((len(targets),), dtype) for _ in range(3)), like(logits.shape, dtype))


@kernel(cost=_own_cost, out=_own_shapes)
def own_softmax(logits, targets, shard):
    """Own of (n, rows) logits, whose columns from `shard.held` on are padding: probability 0."""
    wide = logits.astype(_sums_dtype(logits.dtype))
    wide[:, shard.held :] = -np.inf
    top = wide.max(axis=1)
    here, columns = _held(targets, shard.first, shard.held)
    target = np.where(here, wide[np.arange(len(targets)), columns], 0)
    wide -= np.where(np.isfinite(top), top, 0)[:, None]
    np.exp(wide, out=wide)
    total = wide.sum(axis=1)
    wide /= np.where(total > 0, total, 1)[:, None]
    return Own(top, total, target, wide)


@kernel(
    cost=lambda own, top, targets, shard: Cost(0, 6 * top.nbytes),
    out=lambda own, top, targets, shard: like((2, len(top)), top.dtype),
)
def aligned(own, top, targets, shard):
    """What ranks add up once they know the largest logit M: (s' exp(m' - M), the target's logit - M or 0), (2, n)."""
    here, _ = _held(targets, shard.first, shard.held)
    return np.stack([own.total * np.exp(own.top - top), np.where(here, own.target - top, 0)])


@kernel(cost=lambda own, top, both: Cost(0, 5 * top.nbytes), out=lambda own, top, both: like(top))
def alpha(own, top, both):
    """The rank's share of the probability of each token, (n,): over all ranks it adds up to 1."""
    return own.total * np.exp(own.top - top) / both[0]


@kernel(
    cost=lambda own, factor, targets, shard, scale, dtype: Cost(
        0, own.softmax.nbytes + own.softmax.size * np.dtype(dtype).itemsize + targets.nbytes
    ),
    out=lambda own, factor, targets, shard, scale, dtype: like(own.softmax.shape, dtype),
)
def logits_gradient(own, factor, targets, shard, scale, dtype):
    """(α softmax' - one-hot) · scale in the rank's columns: D."""
    here, columns = _held(targets, shard.first, shard.held)
    grad = own.softmax * factor[:, None]
    grad[np.arange(len(targets)), columns] -= here
    return (grad * scale).astype(dtype, copy=False)


@kernel(
    cost=lambda expected, row, factor, scale: Cost(0, 3 * expected.nbytes + factor.nbytes),
    out=lambda expected, row, factor, scale: like(expected),
)
def input_gradient(expected, row, factor, scale):
    """The rank's share of ∇X, (n, h): (α · softmax' W - G W) · scale. `expected` is softmax' W, `row` is G W."""
    return ((expected * factor[:, None] - row) * scale).astype(expected.dtype, copy=False)
