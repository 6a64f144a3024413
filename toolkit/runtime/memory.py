"""Device memory, counted by itself: arrays made by kernels and receives are followed by weak reference."""

import weakref
from struct import Struct

import numpy as np

from .arrays import owner
from .errors import OutOfDeviceMemory
from .units import size

_CHANGE = Struct("2d").pack


class _Block(weakref.ref):
    """A live array of a rank: goes away with the array and takes its bytes off the count."""

    __slots__ = ("key", "memory", "name", "nbytes")


class Memory:
    """Live bytes of one rank, exact at every instant; a view counts as nothing, its owner as its visible size."""

    def __init__(self, rank, device, engine):
        self.rank, self.device, self.engine = rank, device, engine
        self.live = self.peak = 0
        self._blocks = {}
        self._history = bytearray()  # rows of time, live bytes

    def track(self, value, name):
        """Count the arrays in `value` from now until they die. Raises OutOfDeviceMemory over the capacity."""
        if isinstance(value, np.ndarray):
            self._track(value, name)
        elif isinstance(value, (tuple, list)):
            for part in value:
                self.track(part, name)

    def _track(self, item, name):
        root = owner(item)
        key, blocks = id(root), self._blocks
        if key in blocks:
            return
        block = blocks[key] = _Block(root, _freed)
        block.key, block.name, block.memory = key, name, self
        block.nbytes = nbytes = item.nbytes
        self.live = live = self.live + nbytes
        self._history += _CHANGE(self.engine.now, live)
        if live > self.peak:
            self.peak = live
            if live > self.device.memory_capacity:
                raise self._overflow(item, name)

    def history(self):
        """(times, live bytes): a step function, one entry a change."""
        table = np.frombuffer(bytes(self._history)).reshape(-1, 2)
        return table[:, 0], table[:, 1]

    def _overflow(self, item, name):
        largest = sorted(self._blocks.values(), key=lambda b: (-b.nbytes, b.name))[:5]
        lines = [f"  {size(b.nbytes):>8}   {b.name}   shape {getattr(b(), 'shape', '?')}" for b in largest]
        return OutOfDeviceMemory(
            f"rank {self.rank}: {name} of shape {item.shape} ({size(item.nbytes)}) brings the live arrays to "
            f"{size(self.live)}; {self.device.name} has {size(self.device.memory_capacity)}. Largest live arrays:\n"
            + "\n".join(lines)
            + "\nUse more ranks, smaller blocks, or let go of an array before making the next."
        )


def _freed(block):
    memory = block.memory
    del memory._blocks[block.key]
    memory.live -= block.nbytes
    memory._history += _CHANGE(memory.engine.now, memory.live)
