"""T3's tracker: a table at the memory controller that counts the updates of tiles. Chapter: model_parallel/t3."""

from collections import deque
from typing import Any, NamedTuple

SOURCES = ("local", "incoming")


class Trigger(NamedTuple):
    """A tile has both of its updates."""

    tile: Any


class Tracker:
    """A table that counts the updates of tiles: one from this rank's own GEMM and one from upstream.

    A tile takes an entry with its first update and gives it back with its second. When all `capacity` entries are
    taken, the updates of further tiles wait in line. Those of tiles that have an entry pass them, so the table drains.

    stalls   updates that had to wait          peak   most entries taken at once
    raises   ValueError  capacity below 1
    """

    def __init__(self, capacity=256):
        if capacity < 1:
            raise ValueError(f"a tracker of {capacity} entries can follow no tile: give at least 1")
        self.capacity, self.stalls, self.peak = capacity, 0, 0
        self._seen, self._waiting, self._done = {}, deque(), set()

    def update(self, tile, source):
        """Note an update that has been stored.

        source    "local" or "incoming"
        returns   tuple of Trigger: none, this tile's, and those of tiles that had waited for its entry
        raises    ValueError  another source, or one that this tile has had
        """
        if source not in SOURCES:
            raise ValueError(f"source={source!r}: an update is {' or '.join(SOURCES)}")
        if tile in self._done or source in self._seen.get(tile, ()) or (tile, source) in self._waiting:
            raise ValueError(f"tile {tile!r} has had its {source} update")
        if tile not in self._seen and len(self._seen) == self.capacity:
            self.stalls += 1
            self._waiting.append((tile, source))
            return ()
        fired = [Trigger(tile)] if self._count(tile, source) else []
        while self._waiting and len(self._seen) < self.capacity:
            fired += self._admit(self._waiting[0][0])
        return tuple(fired)

    def _count(self, tile, source):
        """Whether the tile is complete; its entry is free then."""
        self._seen.setdefault(tile, set()).add(source)
        self.peak = max(self.peak, len(self._seen))
        if len(self._seen[tile]) == len(SOURCES):
            del self._seen[tile]
            self._done.add(tile)
        return tile in self._done

    def _admit(self, tile):
        """Take all waiting updates of a tile out of the line."""
        mine = [update for update in self._waiting if update[0] == tile]
        self._waiting = deque(update for update in self._waiting if update[0] != tile)
        return [Trigger(tile) for update in mine if self._count(*update)]
