"""Fast memory: a two-level machine that counts every word it moves.

Slow memory is unbounded and holds named arrays. Fast memory holds at most `capacity` words. One word moved either way
is one I/O. Arithmetic is done by instructions, and only on blocks that lie in fast memory:

    fast = FastMemory(1024, {"q": q, "k": k, "v": v, "out": out})
    rows = fast.load("q", slice(0, 8))              # 8·d words in
    fast.compute(divide, rows, total)               # both must be resident
    fast.store(rows, "out", slice(0, 8))            # 8·d words out
    fast.free(rows)                                 # filled with NaN: whoever still uses it will notice

With shape-only arrays (`toolkit.runtime.like`) the same program moves and counts, and skips the arithmetic.
An instruction works through its operands with loop counters and a few scalars in registers, which are not charged: it
has no array of its own. Chapter: attention/io_complexity.
"""

from dataclasses import dataclass
from math import exp, log
from typing import NamedTuple

import numpy as np
from numba import njit

from toolkit.runtime.arrays import is_shape_only, like
from toolkit.runtime.errors import RuntimeFault, ShapeError


class CapacityError(RuntimeFault, MemoryError):
    """A block would make more words resident than fast memory holds."""


class NotResident(RuntimeFault, ValueError):
    """An operand is not a block of this fast memory: never loaded, already freed, or a view or copy of one."""


class Event(NamedTuple):
    """One line of a trace.

    kind    "load", "store", "alloc", "free" or "compute"
    io      the I/O clock after it: words moved since the start
    blocks  numbers of the blocks concerned, in order
    what    (name, slices) of a transfer, (shape, fill) of an alloc, the Instruction of a compute, None of a free
    """

    kind: str
    io: int
    blocks: tuple
    what: object


class FastMemory:
    """Scratchpad of `capacity` words above the arrays of `slow`, a dict from name to array.

    trace      False: count only (a trace of a million events takes 200 MB)
    io         words moved so far          used, peak   words resident now, and at most so far
    """

    def __init__(self, capacity, slow, trace=True):
        if capacity < 1:
            raise ShapeError(f"fast memory holds {capacity} words; it needs one at least")
        self.capacity, self.slow = capacity, dict(slow)
        self.io = self.used = self.peak = 0
        self._trace = [] if trace else None
        self.shape_only = any(is_shape_only(array) for array in self.slow.values())
        self._resident, self._made = {}, 0  # id -> (number, block)
        self._blank = {}  # shape -> shape-only array

    @property
    def trace(self):
        """Every Event so far, a list. Raises ValueError where the machine was told to count only."""
        if self._trace is None:
            raise ValueError("this machine only counted; ask for a trace with count(…, trace=True)")
        return self._trace

    def reserve(self, name, shape):
        """A new array in slow memory. Costs nothing; holds NaN until something is stored."""
        self.slow[name] = like(shape) if self.shape_only else np.full(shape, np.nan)

    def load(self, name, *where):
        """Copy `slow[name][where]` in: as many I/Os as words. Raises CapacityError."""
        view = self.slow[name][where]
        block = view if self.shape_only else np.array(view, order="C")
        self.io += block.size
        return self._admit(block, "load", (name, where))

    def alloc(self, *shape, fill=np.nan):
        """Room for a block: no I/O. Raises CapacityError."""
        if not self.shape_only:
            block = np.full(shape, fill)
        elif shape in self._blank:
            block = self._blank[shape][...]  # a view of its own, and cheaper than `like`
        else:
            block = self._blank[shape] = like(shape)
        return self._admit(block, "alloc", (shape, fill))

    def store(self, block, name, *where):
        """Copy a block out to `slow[name][where]`: as many I/Os as words. It stays resident."""
        number = self._numbers((block,), "store")
        if self.slow[name][where].shape != block.shape:
            raise ShapeError(f"a block of {block.shape} does not fit {name}{list(where)}")
        if not self.shape_only:
            self.slow[name][where] = block
        self.io += block.size
        self._log("store", number, (name, where))

    def free(self, *blocks):
        """Give the room back. The arrays are filled with NaN."""
        numbers = self._numbers(blocks, "free")
        for block in blocks:
            del self._resident[id(block)]
            self.used -= block.size
            if not self.shape_only:
                block.fill(np.nan)
        self._log("free", numbers, None)

    def compute(self, instruction, *blocks):
        """Run an instruction on resident blocks: no I/O. Raises NotResident."""
        numbers = self._numbers(blocks, instruction)
        if not self.shape_only:
            instruction(*blocks)
        self._log("compute", numbers, instruction)

    def _admit(self, block, kind, what):
        if self.used + block.size > self.capacity:
            held = sorted((b.shape for _, b in self._resident.values()), key=np.prod, reverse=True)
            raise CapacityError(
                f"{kind} of {block.size} words {what[0]!r} with {self.used} resident: fast memory holds "
                f"{self.capacity}. Largest blocks: {held[:4]}. Free one first, or take smaller tiles."
            )
        self.used += block.size
        self.peak = max(self.peak, self.used)
        self._made += 1
        self._resident[id(block)] = self._made, block
        self._log(kind, (self._made,), what)
        return block

    def _numbers(self, blocks, doing):
        try:
            return tuple([self._resident[id(block)][0] for block in blocks])
        except KeyError:
            place = next(i for i, block in enumerate(blocks) if id(block) not in self._resident)
            raise NotResident(
                f"{getattr(doing, 'name', doing)}: operand {place} is not in fast memory. Load or alloc it, and use it "
                "before it is freed; a slice or a copy of a block is not a block."
            ) from None

    def _log(self, kind, numbers, what):
        if self._trace is not None:
            self._trace.append(Event(kind, self.io, numbers, what))


# ---- instructions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    """Compiled loops over resident blocks. The first `writes` operands are changed, the others read."""

    run: object
    writes: int

    @property
    def name(self):
        return self.run.__name__

    def __call__(self, *blocks):
        self.run(*blocks)


def instruction(writes):
    """Compile a function of blocks into an Instruction that changes its first `writes` operands in place."""
    return lambda function: Instruction(njit(cache=True, error_model="numpy")(function), writes)


@instruction(writes=1)
def add_products(c, a, b):
    """c += a bᵀ. c [m, n], a [m, x], b [n, x]."""
    for i in range(c.shape[0]):
        for j in range(c.shape[1]):
            total = c[i, j]
            for x in range(a.shape[1]):
                total += a[i, x] * b[j, x]
            c[i, j] = total


@instruction(writes=1)
def add_weighted(c, p, v):
    """c += p v. c [m, x], p [m, n], v [n, x]."""
    for i in range(c.shape[0]):
        for j in range(p.shape[1]):
            for x in range(c.shape[1]):
                c[i, x] += p[i, j] * v[j, x]


@instruction(writes=4)
def online_softmax(s, m, l, acc):  # noqa: E741
    """Bring new scores in: raise the maximum, rescale sum and accumulator, s becomes exp(s - m). s [r, c]; m, l [r]."""
    for i in range(s.shape[0]):
        top = m[i]
        for j in range(s.shape[1]):
            top = max(top, s[i, j])
        shrink = exp(m[i] - top)
        m[i] = top
        l[i] *= shrink
        for x in range(acc.shape[1]):
            acc[i, x] *= shrink
        for j in range(s.shape[1]):
            s[i, j] = exp(s[i, j] - top)
            l[i] += s[i, j]


@instruction(writes=2)
def row_sums(m, l, s):  # noqa: E741
    """Maximum and sum of exponentials of rows, brought up to date with more scores; s stays."""
    for i in range(s.shape[0]):
        top = m[i]
        for j in range(s.shape[1]):
            top = max(top, s[i, j])
        l[i] *= exp(m[i] - top)
        m[i] = top
        for j in range(s.shape[1]):
            l[i] += exp(s[i, j] - top)


@instruction(writes=1)
def log_sum_exp(m, l):  # noqa: E741
    """m becomes m + log(l)."""
    for i in range(m.shape[0]):
        m[i] += log(l[i])


@instruction(writes=1)
def exponentiate(s, lse):
    """s becomes exp(s - lse): softmax weights."""
    for i in range(s.shape[0]):
        for j in range(s.shape[1]):
            s[i, j] = exp(s[i, j] - lse[i])


@instruction(writes=1)
def divide(a, l):  # noqa: E741
    """Row i of a, divided by l[i]."""
    for i in range(a.shape[0]):
        for x in range(a.shape[1]):
            a[i, x] /= l[i]


@instruction(writes=1)
def add(a, b):
    """a += b."""
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            a[i, j] += b[i, j]


@instruction(writes=1)
def subtract(a, b):
    """a -= b."""
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            a[i, j] -= b[i, j]
