"""Device memory, counted by itself: arrays made by kernels and receives are followed by weak reference."""

import weakref
from array import array

import numpy as np

from .arrays import leaves, owner
from .errors import OutOfDeviceMemory
from .units import size


class _Block(weakref.ref):
    """A live array of a rank: goes away with the array and takes its bytes off the count."""

    __slots__ = ("key", "memory", "name", "nbytes")


class Memory:
    """Live bytes of one rank, exact at every instant; a view counts as nothing, its owner as its visible size."""

    def __init__(self, rank, device, engine):
        self.rank, self.device, self.engine = rank, device, engine
        self.live = self.peak = 0
        self._blocks = {}
        self._history = array("d")  # time, live bytes

    def track(self, value, name):
        """Count the arrays in `value` from now until they die. Raises OutOfDeviceMemory over the capacity."""
        for item in (value,) if isinstance(value, np.ndarray) else leaves(value):
            root = owner(item)
            key = id(root)
            if key in self._blocks:
                continue
            block = _Block(root, _freed)
            block.key, block.nbytes, block.name, block.memory = key, item.nbytes, name, self
            self._blocks[key] = block
            self.live += item.nbytes
            self._history.extend((self.engine.now, self.live))
            if self.live > self.peak:
                self.peak = self.live
                if self.live > self.device.memory_capacity:
                    raise self._overflow(item, name)

    def history(self):
        """(times, live bytes): a step function, one entry a change."""
        table = np.array(self._history).reshape(-1, 2)
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
    memory._history.extend((memory.engine.now, memory.live))
