"""Exchanges that run beside the passes, each kind on a stream of its own, one after the other.

What an exchange computes (sums of what arrives, a factor a token) takes time and no part of the engine: the kernels of
a communication library run on a few processors of the GPU, whatever the others do. Sums themselves are not charged.
Chapter: model_parallel/vocabulary_parallel.
"""

from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np

from toolkit.runtime.arrays import is_shape_only, like

from ._in_turn import Queue, exchange


class Lane:
    """One kind of exchange: a communicator and a stream of its own. Its name is its messages' in the trace.

    stops   the rank waits for each of them
    """

    def __init__(self, comm, stops=False):
        self.comm, self.stops = comm.split(0, comm.rank), stops
        self.queue = Queue(self.comm)

    def start(self, exchange, *args):
        """Begin `exchange(comm, *args)` when those before are done. Returns a Request."""
        request = self.queue.start(exchange, self.comm, *args)
        if self.stops:
            request.wait()
        return request


@dataclass(frozen=True)
class Here:
    """What a rank has already, with the face of a Request."""

    value: Any

    def wait(self):
        return self.value


def beside(comm, function, *args):
    """A kernel that takes its time and not the engine's."""
    cost = function.cost(*args)
    comm.sleep(cost.bytes / (comm.device.memory_bandwidth * comm.device.memory_efficiency))
    return function.shapes(*args)


def from_root(comm, x, root):
    """`x` of `root`, on every rank."""
    return comm.broadcast(x, root)


def to_root(comm, x, root):
    """The sum of all ranks' `x`, on `root`: each rank adds up a slice and sends it there. None elsewhere.

    sends   (p - 1) / p of x.nbytes from every rank, then 1 / p of it to the root
    """
    mine = _fold(comm, x, np.add)
    if comm.rank != root:
        return comm.send(mine, root, "sum")
    coming = [comm.irecv(r, "sum") if r != root else None for r in range(comm.size)]
    return _joined([mine if request is None else request.wait() for request in coming], x)


def all_reduce(comm, x, op=np.add):
    """`op` over all ranks' `x`: the same bits everywhere. Sends 2 (p - 1) / p of x.nbytes from every rank."""
    return _joined(exchange(comm, [_fold(comm, x, op)] * comm.size, "part"), x)


def _fold(comm, x, op):
    """Slice `rank` of what `op` makes of all ranks' x."""
    flat = x.reshape(-1)
    cuts = [len(flat) * r // comm.size for r in range(comm.size + 1)]
    parts = exchange(comm, [flat[a:b] for a, b in pairwise(cuts)], "part")
    return parts[0] if is_shape_only(x) else reduce(op, parts)


def _joined(parts, x):
    return like(x.shape, x.dtype) if is_shape_only(x) else np.concatenate(parts).reshape(x.shape)
