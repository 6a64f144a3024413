"""Keys and values of all sequences on one GPU, and how those of new tokens get there.

A cache is (sequences, positions, 2h) a layer. `COHERENCE` of `ex_flow` says who brings what was made elsewhere.
Chapter: model_parallel/ex_flow.
"""

import numpy as np

from toolkit.runtime.arrays import is_shape_only, like
from toolkit.runtime.kernel import Cost, kernel

from ._ex_flow_model import store
from ._ex_flow_wire import exchange, pack, unpack


def empty_caches(layers, sequences, positions, width, dtype, shape_only=False):
    shape = (sequences, positions, 2 * width)
    return [like(shape, dtype) if shape_only else np.zeros(shape, dtype) for _ in range(layers)]


@kernel(
    cost=lambda cache, sequence, where: Cost(0, 2 * len(sequence) * cache[0, :1].nbytes),
    out=lambda cache, sequence, where: like((len(sequence), cache.shape[2]), cache.dtype),
)
def lookup(cache, sequence, where):
    """Rows (n, 2h) of a cache."""
    return cache[sequence, where]


class Context:
    """All sequences' keys and values, as one rank sees them.

    caches      one a layer; with "ids" the same arrays on every rank: the store outside the machine
    position    where all sequences' newest token stands; the caller counts
    """

    def __init__(self, comm, caches, position):
        self.comm, self.caches, self.position = comm, caches, position
        self.coherence = "ids"  # nothing is brought, until the prefill is done
        self.made = [None] * len(caches)  # this iteration's (pairs, sequences) of this rank, a layer
        self.coming = [None] * len(caches)  # "early": requests of the last iteration
        self.table = np.empty((0, 3), np.int32)  # (layer, sequence, rank that made its K/V) of the last iteration
        layers, sequences, positions = len(caches), *caches[0].shape[:2]
        self.maker = np.full((layers, sequences, positions), -1, np.int16)  # "fetch": who has what I lack; -1: I do not

    def add(self, j, pairs, sequence, where):
        """Keys and values (n, 2h) of tokens here in layer j. After this the cache has all their attention needs."""
        if self.coming[j] is not None:
            self._put(j, self.coming[j].wait(), self.table[self.table[:, 0] == j, 1], self.position - 1)
            self.coming[j] = None
        self._put(j, pairs, sequence, where)
        self.made[j] = pairs, sequence
        if self.coherence == "early":
            self.coming[j] = self.comm.iall_gather(pairs, algorithm="recursive_doubling")
        if self.coherence == "fetch":
            self._fetch(j, sequence)

    def end(self, sequence, token):
        """The iteration's end: every rank learns all new tokens. Returns them in order of their sequences, (T,)."""
        rank, layers = self.comm.rank, len(self.caches)
        rows = [np.stack((np.full_like(sequence, layers), sequence, token), axis=1)]
        if self.coherence != "ids":
            for j, (_, of) in enumerate(self.made):
                rows.append(np.stack((np.full_like(of, j), of, np.full_like(of, rank)), axis=1))
        table = self.comm.all_gather(np.concatenate(rows).astype(np.int32), algorithm="recursive_doubling")
        new, self.table = table[table[:, 0] == layers], table[table[:, 0] < layers]
        if self.coherence == "kv":
            self._spread()
        if self.coherence == "fetch":
            layer, of, maker = self.table.T
            self.maker[layer, of, self.position] = np.where(maker == rank, -1, maker)
        return new[np.argsort(new[:, 1]), 2]

    def settle(self):
        """Wait for what is still on its way."""
        for request in self.coming:
            if request is not None:
                request.wait()

    def _spread(self):
        """2·L·h numbers of each new token to every rank, in one all-gather."""
        (mine,) = unpack([(pairs,) for pairs, _ in self.made])
        everything = self.comm.all_gather(mine, algorithm="recursive_doubling")
        for j in range(len(self.caches)):
            rows = np.flatnonzero(self.table[:, 0] == j)
            part = everything[: len(rows)] if is_shape_only(everything) else everything[rows]
            self._put(j, part, self.table[rows, 1], self.position)

    def _fetch(self, j, sequence):
        """Ask the makers of what these sequences lack, in one exchange, and get it in another; then keep it."""
        row, where = np.nonzero(self.maker[j, sequence] >= 0)
        lacking = np.stack((sequence[row], where), axis=1).astype(np.int32)
        maker = self.maker[j, lacking[:, 0], lacking[:, 1]]
        asked = exchange(self.comm, pack((lacking,), maker, self.comm.size))
        found = exchange(self.comm, [(lookup(self.caches[j], *ids.T),) for (ids,) in asked])
        (pairs,) = unpack(found)
        of, where = lacking[np.argsort(maker, kind="stable")].T
        self._put(j, pairs, of, where)
        self.maker[j, of, where] = -1

    def _put(self, j, pairs, sequence, where):
        store(self.caches[j], pairs, sequence, np.broadcast_to(where, sequence.shape))
