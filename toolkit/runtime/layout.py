"""Which tokens a rank holds. `positions` is the definition; `shard` and `gather` follow it.

contiguous   rank r holds one run of tokens; the first ranks hold one more when the count does not divide
zigzag       2N chunks; rank r holds chunk r ("early") and chunk 2N-1-r ("late"): equal causal work for all
striped      rank r holds tokens r, r+N, r+2N, …   (Brandon et al. 2023)
"""

from dataclasses import dataclass

import numpy as np

from .arrays import is_shape_only, like, map_arrays
from .errors import ShapeError

LAYOUTS = ("contiguous", "zigzag", "striped")


def positions(layout, rank, size, n):
    """Global indices that `rank` of `size` holds out of `n`, in local order.

    raises  ShapeError  `n` does not divide by 2·size (zigzag) or size (striped), or the layout is unknown
    """
    if layout == "contiguous":
        return np.arange(*(r * (n // size) + min(r, n % size) for r in (rank, rank + 1)))
    if layout not in LAYOUTS:
        raise ShapeError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    parts = 2 * size if layout == "zigzag" else size
    if n % parts:
        raise ShapeError(
            f"{n} tokens do not divide into {parts} {layout} chunks for {size} ranks: "
            f"pad to {-(-n // parts) * parts} or use layout='contiguous'"
        )
    if layout == "striped":
        return np.arange(rank, n, size)
    chunk, late = n // parts, 2 * size - 1 - rank
    return np.r_[rank * chunk : (rank + 1) * chunk, late * chunk : (late + 1) * chunk]


@dataclass(frozen=True)
class PerRank:
    """One value per rank, in rank order: what `cluster.run` hands to each rank in turn."""

    values: tuple

    def of(self, rank, size):
        if len(self.values) != size:
            raise ShapeError(f"{len(self.values)} values were given for {size} ranks")
        return self.values[rank]


@dataclass(frozen=True)
class Shard:
    """An array to be cut along `axis` when the number of ranks is known."""

    array: np.ndarray
    axis: int
    layout: str

    def of(self, rank, size):
        return cut(self.array, self.axis, self.layout, rank, size)


def cut(array, axis, layout, rank, size):
    """The part of `array` that `rank` holds, in memory of its own."""
    index = positions(layout, rank, size, array.shape[axis])
    if is_shape_only(array):
        return like((*array.shape[:axis], len(index), *array.shape[axis + 1 :]), array.dtype)
    return np.ascontiguousarray(np.take(array, index, axis))


def shard(x, axis=0, layout="contiguous"):
    """Cut `x` along `axis`: an argument for `Cluster.run`, which gives each rank its part.

    x       array, or nested tuple of arrays that share the axis
    raises  ShapeError  unknown layout or axis here; a count that does not divide when the run starts
    """
    if layout not in LAYOUTS:
        raise ShapeError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    return map_shards(x, axis, layout)


def map_shards(x, axis, layout):
    if isinstance(x, (tuple, list)):
        return tuple(map_shards(part, axis, layout) for part in x)
    x = np.asanyarray(x)
    if not -x.ndim <= axis < x.ndim:
        raise ShapeError(f"axis {axis} does not exist in an array of shape {x.shape}")
    return Shard(x, axis % x.ndim, layout)


def per_rank(values):
    """Hand `values[r]` to rank r: the outputs of one run as the inputs of the next."""
    return PerRank(tuple(values))


def assemble(parts, axis, layout):
    """The inverse of `shard`: one array (or nested tuple) from the parts of all ranks."""
    return map_arrays(lambda *arrays: _assemble(arrays, axis, layout), *parts)


def _assemble(arrays, axis, layout):
    n, size = sum(a.shape[axis] for a in arrays), len(arrays)
    if is_shape_only(arrays[0]):
        axis %= arrays[0].ndim
        return like((*arrays[0].shape[:axis], n, *arrays[0].shape[axis + 1 :]), arrays[0].dtype)
    joined = np.concatenate(arrays, axis)
    if layout == "contiguous":
        return joined
    order = np.concatenate([positions(layout, r, size, n) for r in range(size)])
    return np.take(joined, np.argsort(order), axis)
