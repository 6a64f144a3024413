"""All ranks in one array; a process group is a slice of it.

    grid = Grid(comm, tp=8, dp=4, pp=2)        # 64 ranks
    grid.tp.all_reduce(x)                      # over the 8 ranks that share this one's dp and pp
    grid.along("cp", "dp").all_reduce(grads)   # over a plane
    grid.pp.rank                               # this rank's stage

The first axis of `order` varies fastest: with tensor parallelism first, a group of 8 is a node of 8.
Chapter: model_parallel/megatron.
"""

import math

import numpy as np

from toolkit.runtime.errors import ShapeError

AXES = ("tp", "cp", "ep", "dp", "pp")  # tensor, context, expert, data, pipeline


class Grid:
    """The communicators of one rank, by axis.

    comm     all ranks
    tp, …    ranks along each axis; their product is the number of ranks
    order    the axes, fastest first
    place    {axis: this rank's number along it}
    ranks    the array: ranks[place along order[0], place along order[1], …] is a rank of `comm`
    raises   ShapeError
    """

    def __init__(self, comm, *, tp=1, cp=1, ep=1, dp=1, pp=1, order=AXES):
        sizes = {"tp": tp, "cp": cp, "ep": ep, "dp": dp, "pp": pp}
        if sorted(order) != sorted(AXES):
            raise ShapeError(f"order={order!r}: name each of {', '.join(AXES)} once")
        if min(sizes.values()) < 1 or math.prod(sizes.values()) != comm.size:
            product = " × ".join(f"{axis} {n}" for axis, n in sizes.items())
            raise ShapeError(f"{product} is {math.prod(sizes.values())} ranks, and there are {comm.size}")
        self.comm, self.order, self._groups = comm, tuple(order), {}
        self.ranks = np.arange(comm.size).reshape([sizes[axis] for axis in order], order="F")
        self.place = {axis: int(i) for axis, i in zip(order, np.argwhere(self.ranks == comm.rank)[0], strict=True)}
        self.tp, self.cp, self.ep, self.dp, self.pp = map(self.along, AXES)

    def along(self, *axes):
        """The communicator of the ranks that differ from this one along `axes` only, the fastest axis first."""
        slices = tuple(slice(None) if axis in axes else self.place[axis] for axis in self.order)
        members = tuple(self.ranks[slices].ravel(order="F").tolist())
        if members not in self._groups:  # equal groups share one communicator, so that collectives stay in step
            self._groups[members] = self.comm.group(members)
        return self._groups[members]

    def at(self, **place):
        """The rank at another place, along the axes named: grid.at(pp=0) is the first stage's with the same tp, dp."""
        return int(self.ranks[tuple((self.place | place)[axis] for axis in self.order)])
