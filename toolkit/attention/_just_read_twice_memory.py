"""What a reader may remember, counted in bits; and the INDEX game, which no memory can win with too few of them.

Source: Arora et al. 2024, arXiv 2407.05483, section 3 and its appendix; INDEX: Kremer, Nisan and Ron 1999.
Chapter: attention/just_read_twice.
"""

from typing import NamedTuple

import numpy as np


class StateFull(MemoryError):
    """An item or a counter does not fit into the bits that a reader has."""


def bits_for(values):
    """⌈log₂ values⌉: the bits of one of so many values."""
    return (values - 1).bit_length()


class BoundedMemory:
    """A list of items from 0 … universe-1, its length and whatever counters its user reserves: `bits` bits in all.

    bits       int
    universe   int, at least 2: an item costs ⌈log₂ universe⌉ bits, the length of the list ⌈log₂(universe + 1)⌉
    used       bits taken now           peak  the most ever taken           items  list of int
    raises     StateFull   the bits do not suffice, here or in any method
               ValueError  a universe below 2, an item outside it
    """

    def __init__(self, bits, universe):
        if universe < 2:
            raise ValueError(f"BoundedMemory: a universe of {universe} items holds no question; give at least 2")
        self.bits, self.universe = bits, universe
        self.items, self.used, self.peak = [], 0, 0
        self.reserve(bits_for(universe + 1))

    def reserve(self, bits):
        """Take bits for a counter or a flag."""
        if self.used + bits > self.bits:
            raise StateFull(
                f"{bits} bits more do not fit: {self.used} of {self.bits} are in use, {len(self.items)} items among "
                "them; give more bits, put the smaller set first, or read twice"
            )
        self.used += bits
        self.peak = max(self.peak, self.used)

    def keep(self, item):
        """Store one item."""
        if not 0 <= item < self.universe:
            raise ValueError(f"item {item} is not in the universe 0 … {self.universe - 1}")
        self.reserve(bits_for(self.universe))
        self.items.append(item)

    def forget(self):
        """Drop all items; counters stay."""
        self.used -= len(self.items) * bits_for(self.universe)
        self.items.clear()

    def __contains__(self, item):
        return item in self.items


# ---- INDEX: Alice holds n bits and sends s; Bob is asked for one of the n --------------------------------------------


def entropy(p):
    """H₂(p) in bits: what one biased coin tells. H₂(0) = H₂(1) = 0."""
    p = np.asarray(p, np.float64)
    inside = np.clip(p, 1e-300, 1)
    other = np.clip(1 - p, 1e-300, 1)
    return -(p * np.log2(inside) + (1 - p) * np.log2(other))


class Game(NamedTuple):
    """bits  s, length of the message    error  δ, share of wrong answers    floor  n (1 - H₂(δ)), what s must reach"""

    bits: int
    error: float
    floor: float


def index_game(write, read, strings):
    """Play INDEX on every index of every string: the set is {i : x_i = 1}, and B = {i} asks whether i is in it.

    write     items (list of int) -> message, a uint8 array of 0 and 1: the reader's memory after A, bit by bit
    read      (message, i) -> bool, whether i was in A
    strings   (count, n) of 0 and 1: uniformly random, or all 2ⁿ of them; then δ is exact
    returns   Game. Fano's inequality: s ≥ n (1 - H₂(δ)) for every write and read, when strings are all 2ⁿ
    raises    ValueError  messages of different lengths, or of anything but bits
    """
    wrong, length = 0, None
    for string in strings:
        message = np.asarray(write([int(i) for i in np.flatnonzero(string)]))
        if length not in (None, message.size) or not np.isin(message, (0, 1)).all():
            raise ValueError("INDEX: every message must be the same number of bits, each 0 or 1")
        length = message.size
        wrong += sum(bool(read(message, i)) != bool(bit) for i, bit in enumerate(string))
    error = wrong / strings.size
    return Game(length, error, strings.shape[1] * (1 - float(entropy(error))))


def all_strings(n):
    """(2ⁿ, n): every string of n bits."""
    return (np.arange(2**n)[:, None] >> np.arange(n)) & 1


def as_list(n, bits):
    """(write, read) of a list that keeps items while they fit, and drops the others: what `BoundedMemory` holds."""
    length, width = bits_for(n + 1), bits_for(n)
    room = (bits - length) // width

    def write(items):
        kept = items[:room]
        fields = [(len(kept), length), *((item, width) for item in kept)]
        message = [value >> place & 1 for value, size in fields for place in range(size)]
        return np.array(message + [0] * (bits - len(message)), np.uint8)

    def read(message, i):
        count = _number(message[:length])
        return i in (_number(message[length + k * width :][:width]) for k in range(count))

    return write, read


def as_bitmap(n, bits):
    """(write, read) of the first `bits` positions; a position beyond is answered by "no". Tight at bits = n."""

    def write(items):
        message = np.zeros(bits, np.uint8)
        message[[i for i in items if i < bits]] = 1
        return message

    return write, lambda message, i: i < bits and message[i] == 1


def as_bloom(n, bits, hashes=2, seed=0):
    """(write, read) of a Bloom filter: each item sets `hashes` random bits; false alarms, no misses."""
    places = np.random.default_rng(seed).integers(0, bits, (n, hashes))

    def write(items):
        message = np.zeros(bits, np.uint8)
        message[places[items]] = 1
        return message

    return write, lambda message, i: message[places[i]].all()


def _number(bits):
    return int(sum(int(bit) << place for place, bit in enumerate(bits)))
