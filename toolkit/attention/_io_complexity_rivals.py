"""Rivals of the I/O complexity of attention: no tiles at all, and fast matrix multiplication.

Source: Saha and Ye 2024, arXiv 2402.07443; Strassen 1969. Chapter: attention/io_complexity.
"""

from math import inf, isqrt

from toolkit.kernels.fast_memory import add, add_products, add_weighted, exponentiate, log_sum_exp, row_sums, subtract
from toolkit.runtime.errors import ShapeError

from .io_complexity import pieces, tiles, weigh, weigh_io, width


def untiled(fast):
    """Attention as three plain passes, a query at a time: scores out, weights out, outputs. Moves `untiled_io`."""
    tokens, head_dim = fast.slow["q"].shape
    few = (fast.capacity - head_dim) // (head_dim + 1)  # keys at a time: no fewer words, but fewer steps
    if few < 1:
        raise ShapeError(f"untiled needs 2·{head_dim} + 1 words of fast memory, got {fast.capacity}")
    fast.reserve("scores", (tokens, tokens))
    for i in tiles(tokens, 1):
        q = fast.load("q", i)
        for j in tiles(tokens, few):
            k, s = fast.load("k", j), fast.alloc(1, width(j), fill=0.0)
            fast.compute(add_products, s, q, k)
            fast.store(s, "scores", i, j)
            fast.free(k, s)
        fast.free(q)
    for i in tiles(tokens, 1):
        peak, total = fast.alloc(1, fill=-inf), fast.alloc(1, fill=0.0)
        for j in tiles(tokens, fast.capacity - 2):
            s = fast.load("scores", i, j)
            fast.compute(row_sums, peak, total, s)
            fast.free(s)
        fast.compute(log_sum_exp, peak, total)
        for j in tiles(tokens, fast.capacity - 2):
            s = fast.load("scores", i, j)
            fast.compute(exponentiate, s, peak)
            fast.store(s, "scores", i, j)
            fast.free(s)
        fast.free(peak, total)
    for i in tiles(tokens, 1):
        out = fast.alloc(1, head_dim, fill=0.0)
        for j in tiles(tokens, few):
            v, weights = fast.load("v", j), fast.load("scores", i, j)
            fast.compute(add_weighted, out, weights, v)
            fast.free(v, weights)
        fast.store(out, "out", i)
        fast.free(out)


def untiled_io(n, d, M):
    """Keys and values once for every query; scores written, read for the sums, read and written again, read."""
    return 2 * n * d + 2 * n * n * d + 5 * n * n


STRASSEN = (  # one product a line: quadrants (row half, column half) of q, of k, of the scores, with their signs
    (((add, 0, 0), (add, 1, 1)), ((add, 0, 0), (add, 1, 1)), ((add, 0, 0), (add, 1, 1))),
    (((add, 1, 0), (add, 1, 1)), ((add, 0, 0),), ((add, 1, 0), (subtract, 1, 1))),
    (((add, 0, 0),), ((add, 1, 0), (subtract, 1, 1)), ((add, 0, 1), (add, 1, 1))),
    (((add, 1, 1),), ((add, 0, 1), (subtract, 0, 0)), ((add, 0, 0), (add, 1, 0))),
    (((add, 0, 0), (add, 0, 1)), ((add, 1, 1),), ((subtract, 0, 0), (add, 0, 1))),
    (((add, 1, 0), (subtract, 0, 0)), ((add, 0, 0), (add, 1, 0)), ((add, 1, 1),)),
    (((add, 0, 1), (subtract, 1, 1)), ((add, 0, 1), (add, 1, 1)), ((add, 0, 0),)),
)


def small_cache_strassen(fast):
    """`small_cache` with one level of Strassen for q kᵀ: 7/8 of its multiplications. Needs even tokens and head_dim.

    Moves `small_cache_strassen_io`. Tiles are smaller, since a sum of two quadrants needs a fourth one.
    """
    tokens, head_dim = fast.slow["q"].shape
    if tokens % 2 or head_dim % 2 or fast.capacity < 4:
        raise ShapeError(f"Strassen needs even sizes and 4 words, got {tokens} × {head_dim} and {fast.capacity}")
    half, side, begun = tokens // 2, isqrt(fast.capacity // 4), set()
    fast.reserve("scores", (tokens, tokens))
    for left, right, targets in STRASSEN:
        for i in tiles(half, side):
            for j in tiles(half, side):
                product = fast.alloc(width(i), width(j), fill=0.0)
                for c in tiles(head_dim // 2, side):
                    q = _combined(fast, "q", left, i, c)
                    k = _combined(fast, "k", right, j, c)
                    fast.compute(add_products, product, q, k)
                    fast.free(q, k)
                for sign, down, across in targets:
                    where = shifted(i, down * half), shifted(j, across * half)
                    if (down, across) in begun:
                        s = fast.load("scores", *where)
                        fast.compute(sign, s, product)
                        fast.store(s, "scores", *where)
                        fast.free(s)
                    else:  # its first product has the sign +
                        fast.store(product, "scores", *where)
                fast.free(product)
        begun |= {target[1:] for target in targets}
    weigh(fast, side)


def _combined(fast, name, quadrants, rows, columns):
    """A tile of one quadrant of a matrix, or of the sum or difference of two."""
    halves, result = [size // 2 for size in fast.slow[name].shape], None
    for sign, down, across in quadrants:
        tile = fast.load(name, shifted(rows, down * halves[0]), shifted(columns, across * halves[1]))
        if result is None:
            result = tile
        else:
            fast.compute(sign, result, tile)
            fast.free(tile)
    return result


def shifted(part, by):
    return slice(part.start + by, part.stop + by)


def small_cache_strassen_io(n, d, M):
    """12 quadrants of q and 12 of k come in for each row of tiles; of the scores 12 go out and 8 come back."""
    b = isqrt(M // 4)
    return 24 * (n // 2) * (d // 2) * pieces(n // 2, b) + 20 * (n // 2) ** 2 + weigh_io(n, d, b)
