"""Ragged records of several arrays through an all-to-all, direct or by way of the nodes.

Nobody knows how many tokens will come; a message says so itself. Where a library has to exchange counts first, both
ExFlow and its baseline pay one more small exchange an all-to-all.
Chapter: model_parallel/ex_flow.
"""

import numpy as np

from toolkit.runtime.arrays import is_shape_only, leaves, like
from toolkit.runtime.kernel import Cost, kernel
from toolkit.sequence_parallel._two_level import levels

WAYS = ("direct", "pairwise", "hierarchical")


class Parcel(tuple):
    """What one rank sends another: arrays of as many rows each. Collectives ask parts for a dtype; it has none."""

    dtype = None


def exchange(comm, parcels, way="direct"):
    """Parcel r goes to rank r. Returns what came, a tuple of arrays from each rank in order; one's own costs nothing.

    way      "direct": all messages at once; "pairwise": one after the other; "hierarchical": first inside a node to the
             rank that stands where the receiver stands in its own, then between nodes, as DeepSpeed-MoE does
    raises   ValueError  another way
    """
    if way not in WAYS:
        raise ValueError(f"way={way!r}: choose from {', '.join(WAYS)}")
    parcels = [Parcel(parcel) for parcel in parcels]
    nodes, _, inside, across = levels(comm)
    if way != "hierarchical" or nodes == 1:
        return comm.all_to_all(parcels, algorithm="pairwise" if way == "pairwise" else "direct")
    by_place = [Parcel(parcels[place :: inside.size]) for place in range(inside.size)]  # a parcel for every node
    gathered = inside.all_to_all(by_place)
    by_node = [Parcel(source[node] for source in gathered) for node in range(nodes)]
    return [parcel for node in across.all_to_all(by_node) for parcel in node]


def _moved(parcels):
    return Cost(0, 2 * sum(array.nbytes for array in leaves(parcels)))


def _taken(array, rows):
    return like((len(rows), *array.shape[1:]), array.dtype) if is_shape_only(array) else array[rows]


def _end_to_end(parts):
    shape = (sum(map(len, parts)), *parts[0].shape[1:])
    return like(shape, parts[0].dtype) if is_shape_only(parts[0]) else np.concatenate(parts)


def _pack(arrays, where, size):
    rows = [np.flatnonzero(where == rank) for rank in range(size)]
    return [Parcel(_taken(array, mine) for array in arrays) for mine in rows]


def _unpack(parcels):
    return tuple(_end_to_end(parts) for parts in zip(*parcels, strict=True))


@kernel(cost=lambda arrays, where, size: _moved(arrays), out=_pack)
def pack(arrays, where, size):
    """A Parcel of rows of all arrays for each of `size` ranks. where (n,): the rank that each row goes to."""
    return _pack(arrays, where, size)


@kernel(cost=_moved, out=_unpack)
def unpack(parcels):
    """One tuple of arrays from several: rows behind one another."""
    return _unpack(parcels)


@kernel(cost=lambda x, where: Cost(0, 2 * x.nbytes), out=lambda x, where: like(x))
def unsort(x, where):
    """Rows that came back ordered by rank, in the order they had before `pack`."""
    out = np.empty_like(x)
    out[np.argsort(where, kind="stable")] = x
    return out
