"""Cache replay: the words a schedule touches, through a cache that decides by itself what to keep.

A schedule for explicit fast memory says when a word comes and goes. A cache sees only addresses. Both caches here hold
`capacity` words, line size one, write back, and allocate on a write without reading what is overwritten.
Chapter: attention/io_complexity.
"""

from collections import OrderedDict
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np

READ, UPDATE, CREATE = 0, 1, 2  # use a word; use and change it; write it without looking
NEVER, OVERWRITTEN = 1 << 60, (1 << 60) - 1  # next use of a value that nobody reads again


class Traffic(NamedTuple):
    """Words a cache moved: read on a miss, written back when changed."""

    reads: int
    writes: int

    @property
    def io(self):
        return self.reads + self.writes


class Accesses(NamedTuple):
    """An address trace: word [n] and how it is touched [n]; words below `named` belong to arrays in slow memory."""

    word: np.ndarray
    how: np.ndarray
    named: int


def accesses(fast):
    """The words that the instructions of a finished machine touch, operand by operand, in order.

    A block that was loaded is touched at its place in slow memory; one that is changed and not stored back there is
    copied to scratch first. Scratch takes the lowest free words, as a stack does.
    returns  Accesses
    """
    at, named = {}, 0
    for name, array in fast.slow.items():
        at[name] = named + np.arange(array.size).reshape(array.shape)
        named += array.size
    came = {event.blocks[0]: event.what for event in fast.trace if event.kind == "load"}
    in_place = {
        event.blocks[0] for event in fast.trace if event.kind == "store" and came.get(*event.blocks) == event.what
    }
    home, scratch, words, how = {}, _Scratch(named), [], []

    def touch(where, kind):
        words.append(where.ravel())
        how.append(np.full(where.size, kind, np.int8))

    for event in fast.trace:
        first = event.blocks[0]
        if event.kind == "load":
            name, where = event.what
            home[first] = at[name][where]
        elif event.kind == "alloc":
            home[first] = scratch.take(event.what[0])
            touch(home[first], CREATE)
        elif event.kind == "free":
            for number in event.blocks:
                scratch.give(home.pop(number))
        elif event.kind == "store" and first not in in_place:
            touch(home[first], READ)
            touch(at[event.what[0]][event.what[1]], CREATE)
        elif event.kind == "compute":
            for place, number in enumerate(event.blocks):
                changes = place < event.what.writes
                if changes and number in came and number not in in_place and home[number].flat[0] < named:
                    touch(home[number], READ)
                    home[number] = scratch.take(home[number].shape)
                    touch(home[number], CREATE)
                touch(home[number], UPDATE if changes else READ)
    return Accesses(np.concatenate(words), np.concatenate(how), named)


class _Scratch:
    """Addresses for scratch: the lowest free words."""

    def __init__(self, first):
        self.first, self.free, self.end = first, [], first

    def take(self, shape):
        size = int(np.prod(shape))
        while len(self.free) < size:
            heappush(self.free, self.end)
            self.end += 1
        return np.array([heappop(self.free) for _ in range(size)]).reshape(shape)

    def give(self, where):
        for word in where.ravel().tolist():
            if word >= self.first:
                heappush(self.free, word)


def lru(trace, capacity):
    """Replace the word that was used longest ago. What it changed is written back; at the end, named words only.

    returns   Traffic
    """
    reads = writes = 0
    cache = OrderedDict()  # word -> changed; the oldest first
    for word, how in zip(trace.word.tolist(), trace.how.tolist(), strict=True):
        if word in cache:
            cache.move_to_end(word)
        else:
            if len(cache) == capacity:
                writes += cache.popitem(last=False)[1]
            reads += how != CREATE
            cache[word] = False
        if how != READ:
            cache[word] = True
    return Traffic(reads, writes + sum(changed for word, changed in cache.items() if word < trace.named))


def belady(trace, capacity):
    """Replace the word whose value is needed last: no policy reads fewer words (Belady 1966).

    It knows the future, so it does not write back what is overwritten before it is read.
    returns   Traffic
    """
    following = _next_use(trace)
    reads = writes = 0
    cache, changed, queue = {}, set(), []  # word -> next use; a heap of (-next use, word), stale entries included
    for word, how, later in zip(trace.word.tolist(), trace.how.tolist(), following, strict=True):
        if word not in cache:
            reads += how != CREATE
            if len(cache) == capacity:
                at, victim = _furthest(queue, cache)
                del cache[victim]
                if victim in changed:
                    changed.remove(victim)
                    writes += at < OVERWRITTEN or (at == NEVER and victim < trace.named)
        cache[word] = later
        heappush(queue, (-later, word))
        if how != READ:
            changed.add(word)
    return Traffic(reads, writes + sum(word < trace.named for word in changed))


def _furthest(queue, cache):
    while True:
        at, victim = heappop(queue)
        if cache.get(victim) == -at:
            return -at, victim


def _next_use(trace):
    """For each access, the time of the next one that needs the word's value, or OVERWRITTEN, or NEVER."""
    following, seen = [NEVER] * len(trace.word), {}
    pairs = zip(trace.word.tolist()[::-1], trace.how.tolist()[::-1], strict=True)
    for back, (word, how) in enumerate(pairs):
        at = len(following) - 1 - back
        following[at] = seen.get(word, NEVER)
        seen[word] = OVERWRITTEN if how == CREATE else at
    return following
