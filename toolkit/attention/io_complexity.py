"""I/O complexity of attention: how few words any schedule moves between slow and fast memory, and which ones get there.

n tokens, d channels, M words of fast memory. FlashAttention moves about 4 n²d²/M words; with M < d², where a tile of
d × d does not fit, attention as two tiled matrix products moves about 7 n²d/√M. Counting what one epoch of M transfers
can complete (below) gives n²d²/(M + d√M) - M words at least, for every M: both are optimal up to a constant, and the
regimes meet at M = d².

An algorithm is a function of a `FastMemory` that holds q, k, v and out of one head in slow memory. The same code counts
on shape-only arrays. It computes softmax(q kᵀ) v, as the paper writes it; `run` divides q by √d before.

Constants are ours, the paper states orders. Its bound for M ≥ d² also holds for fast matrix multiplication (proved, not
executed); for M < d² its last version says so for standard multiplication only. Two details are easy to miss. Scores
that live within one epoch leave no partial sum behind, so counting products by Loomis and Whitney alone is not enough.
And weights in a tile need the lse of its rows: `small_cache` reads it again with each tile, as three tiles may fill M.
Source: Saha and Ye 2024, arXiv 2402.07443. Chapter: attention/io_complexity.
"""

from dataclasses import dataclass
from math import inf, isqrt, sqrt

import numpy as np

from toolkit.kernels.fast_memory import (
    FastMemory,
    add_products,
    add_weighted,
    divide,
    exponentiate,
    log_sum_exp,
    online_softmax,
    row_sums,
)
from toolkit.runtime.arrays import is_shape_only, like
from toolkit.runtime.errors import DtypeError, ShapeError


@dataclass(frozen=True)
class Run:
    """What `run` returns. out (heads, tokens, head_dim); machines: one FastMemory a head, with its trace."""

    out: np.ndarray
    machines: list

    @property
    def io(self):
        """Words moved, all heads."""
        return sum(fast.io for fast in self.machines)

    @property
    def peak(self):
        """Most words resident at once."""
        return max(fast.peak for fast in self.machines)


def run(algorithm, q, k, v, capacity, **options):
    """Exact attention, one head after the other, through a fast memory of `capacity` words.

    algorithm  flash, flash_keys_outside, small_cache, automatic, or your own
    q, k, v    (heads, tokens, head_dim)   float, computed in float64; or shape-only: then nothing but counts
    returns    Run
    raises     ShapeError (also where no tile fits), DtypeError, CapacityError, NotResident
    """
    if q.ndim != 3 or not q.shape == k.shape == v.shape or not q.size:
        raise ShapeError(f"q, k, v are (heads, tokens, head_dim), all alike; got {q.shape}, {k.shape}, {v.shape}")
    if any(a.dtype.kind != "f" for a in (q, k, v)):
        raise DtypeError(f"q, k, v are floats; got {q.dtype}, {k.dtype}, {v.dtype}: convert with .astype(float)")
    if is_shape_only(q):
        return Run(like(q), [count(algorithm, *q.shape[1:], capacity, True, **options) for _ in q])
    q, k, v = np.asarray(q, np.float64) / sqrt(q.shape[2]), np.asarray(k, np.float64), np.asarray(v, np.float64)
    out, machines = np.full(q.shape, np.nan), []
    for head in range(q.shape[0]):
        fast = FastMemory(capacity, {"q": q[head], "k": k[head], "v": v[head], "out": out[head]})
        algorithm(fast, **options)
        machines.append(fast)
    return Run(out, machines)


def count(algorithm, tokens, head_dim, capacity, trace=False, **options):
    """One head without data: the FastMemory after the algorithm, for its io and peak (and trace). Raises as `run`."""
    fast = FastMemory(capacity, dict.fromkeys(("q", "k", "v", "out"), like((tokens, head_dim))), trace)
    algorithm(fast, **options)
    return fast


# ---- the algorithms --------------------------------------------------------------------------------------------------


def flash(fast, tile=None):
    """FlashAttention: a block of queries stays, keys and values stream by.

    tile     (rows of queries, rows of keys); by default `flash_tile`
    resident 2·rows·d + 2·keys·d + rows·keys + 2·rows words      moves  `flash_io`
    """
    tokens, head_dim = fast.slow["q"].shape
    rows, keys = tile or flash_tile(tokens, head_dim, fast.capacity)
    for i in tiles(tokens, rows):
        q = fast.load("q", i)
        size = len(q)
        out, peak, total = fast.alloc(size, head_dim, fill=0.0), fast.alloc(size, fill=-inf), fast.alloc(size, fill=0.0)
        for j in tiles(tokens, keys):
            k, v = fast.load("k", j), fast.load("v", j)
            s = fast.alloc(size, len(k), fill=0.0)
            fast.compute(add_products, s, q, k)
            fast.compute(online_softmax, s, peak, total, out)
            fast.compute(add_weighted, out, s, v)
            fast.free(k, v, s)
        fast.compute(divide, out, total)
        fast.store(out, "out", i)
        fast.free(q, out, peak, total)


def flash_keys_outside(fast, tile=None):
    """The order of the first FlashAttention: a block of keys stays; outputs, maxima and sums come and go.

    Unlike there, the output is divided by its sum at the end only. Moves `flash_keys_outside_io`; else as `flash`.
    """
    tokens, head_dim = fast.slow["q"].shape
    rows, keys = tile or keys_outside_tile(tokens, head_dim, fast.capacity)
    fast.reserve("peak", (tokens,))
    fast.reserve("total", (tokens,))
    for j in tiles(tokens, keys):
        k, v = fast.load("k", j), fast.load("v", j)
        for i in tiles(tokens, rows):
            q = fast.load("q", i)
            size = len(q)
            if j.start == 0:
                out, peak = fast.alloc(size, head_dim, fill=0.0), fast.alloc(size, fill=-inf)
                total = fast.alloc(size, fill=0.0)
            else:
                out, peak, total = fast.load("out", i), fast.load("peak", i), fast.load("total", i)
            s = fast.alloc(size, len(k), fill=0.0)
            fast.compute(add_products, s, q, k)
            fast.compute(online_softmax, s, peak, total, out)
            fast.compute(add_weighted, out, s, v)
            if j.stop == tokens:
                fast.compute(divide, out, total)
            else:
                fast.store(peak, "peak", i)
                fast.store(total, "total", i)
            fast.store(out, "out", i)
            fast.free(q, s, out, peak, total)
        fast.free(k, v)


def small_cache(fast, side=None):
    """For M < d²: two matrix products in square tiles, with the scores in slow memory between them.

    side     of a tile; by default ⌊√(M/3)⌋, so that three tiles fit      moves  `small_cache_io`
    """
    side = side or small_cache_side(fast.capacity)
    tokens, head_dim = fast.slow["q"].shape
    fast.reserve("scores", (tokens, tokens))
    for i in tiles(tokens, side):
        for j in tiles(tokens, side):
            s = fast.alloc(width(i), width(j), fill=0.0)
            for c in tiles(head_dim, side):
                q, k = fast.load("q", i, c), fast.load("k", j, c)
                fast.compute(add_products, s, q, k)
                fast.free(q, k)
            fast.store(s, "scores", i, j)
            fast.free(s)
    weigh(fast, side)


def weigh(fast, side):
    """From scores in slow memory to the output: the sum of each row, then weights times values, tile by tile."""
    tokens, head_dim = fast.slow["v"].shape
    fast.reserve("lse", (tokens,))
    for i in tiles(tokens, side):
        peak, total = fast.alloc(width(i), fill=-inf), fast.alloc(width(i), fill=0.0)
        for j in tiles(tokens, side):
            s = fast.load("scores", i, j)
            fast.compute(row_sums, peak, total, s)
            fast.free(s)
        fast.compute(log_sum_exp, peak, total)
        fast.store(peak, "lse", i)
        fast.free(peak, total)
    for i in tiles(tokens, side):
        for c in tiles(head_dim, side):
            out = fast.alloc(width(i), width(c), fill=0.0)
            for j in tiles(tokens, side):
                weights, lse = fast.load("scores", i, j), fast.load("lse", i)
                fast.compute(exponentiate, weights, lse)
                fast.free(lse)  # makes room for v: with M = 3 there is none to spare
                v = fast.load("v", j, c)
                fast.compute(add_weighted, out, weights, v)
                fast.free(weights, v)
            fast.store(out, "out", i, c)
            fast.free(out)


def automatic(fast):
    """Whichever of `flash` and `small_cache` moves fewer words."""
    return best(*fast.slow["q"].shape, fast.capacity)(fast)


def tiles(length, size):
    """0 … length as slices of `size`; the last may be shorter."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def width(part):
    return part.stop - part.start


# ---- how many words, exactly -----------------------------------------------------------------------------------------


def pieces(length, size):
    """⌈length / size⌉."""
    return -(-length // size)


def flash_tile(tokens, head_dim, capacity):
    """(rows, keys) with the fewest passes over the keys; of those the fewest rows, then the most keys.

    raises   ShapeError   capacity < 4·head_dim + 3: not even one query and one key fit
    """
    most = min(tokens, (capacity - 2 * head_dim) // (2 * head_dim + 3))  # with one key at a time
    if most < 1:
        raise ShapeError(
            f"flash needs 4·{head_dim} + 3 = {4 * head_dim + 3} words of fast memory for one query and one key, got "
            f"{capacity}; use small_cache"
        )
    rows = pieces(tokens, pieces(tokens, most))
    return rows, min(tokens, (capacity - 2 * rows * (head_dim + 1)) // (2 * head_dim + rows))


def keys_outside_tile(tokens, head_dim, capacity):
    """(rows, keys) with the fewest passes over the queries. Raises ShapeError as `flash_tile` does."""
    flash_tile(tokens, head_dim, capacity)
    most = min(tokens, (capacity - 2 * head_dim - 2) // (2 * head_dim + 1))  # with one query at a time
    keys = pieces(tokens, pieces(tokens, most))
    return min(tokens, (capacity - 2 * keys * head_dim) // (2 * head_dim + 2 + keys)), keys


def small_cache_side(capacity):
    """Side of a square tile, three of which fit. Raises ShapeError below 3 words."""
    if capacity < 3:
        raise ShapeError(f"small_cache needs three words of fast memory, one a matrix, got {capacity}")
    return isqrt(capacity // 3)


def flash_io(n, d, M):
    """Queries and outputs once; keys and values once for every block of queries."""
    return 2 * n * d + pieces(n, flash_tile(n, d, M)[0]) * 2 * n * d


def flash_keys_outside_io(n, d, M):
    """Keys and values once; for every block of keys, queries once, outputs, maxima and sums in and out.

    Nothing comes in for the first block, and maxima and sums do not leave after the last.
    """
    return 2 * n * d + pieces(n, keys_outside_tile(n, d, M)[1]) * (3 * n * d + 4 * n) - (n * d + 2 * n) - 2 * n


def small_cache_io(n, d, M):
    """Both products; scores written once and read once more for the sums; the lse of a tile's rows with each tile."""
    b = small_cache_side(M)
    return 2 * n * d * pieces(n, b) + n * n + weigh_io(n, d, b)


def weigh_io(n, d, b):
    return n * n + n + (n * n + n * pieces(n, b)) * pieces(d, b) + n * d * pieces(n, b) + n * d


def best(n, d, M):
    """`flash` or `small_cache`, whichever moves fewer words."""
    return flash if M >= 4 * d + 3 and flash_io(n, d, M) <= small_cache_io(n, d, M) else small_cache


def crossover(n, d):
    """The largest M at which `small_cache` still moves fewer words than `flash` does."""
    return next(M for M in range(max(2 * d * d, 4 * d + 2), 2, -1) if best(n, d, M) is small_cache)


# ---- how many at least -----------------------------------------------------------------------------------------------


def most_entries(d, M):
    """Scores that M transfers can complete: (M/d)² from whole rows of q and k, or 2M whose partial sum was there."""
    return max((M / d) ** 2, 2 * M)


def most_products(d, M):
    """Scalar products q·k of finished scores that M transfers allow: M²/d in whole scores, M^1.5 in all others."""
    return M * M / d + M**1.5


def lower_bound(n, d, M):
    """Words that any schedule of the standard computation moves, whatever it recomputes. Derived in the chapter."""
    return max(4 * n * d, M * (n * n / most_entries(d, M) - 1), M * (n * n * d / most_products(d, M) - 1))
