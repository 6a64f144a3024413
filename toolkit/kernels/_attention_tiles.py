"""The compiled loops under `attention.py`: one tile of scores at a time, and BLAS for every product.

Three choices make the speed:

- Tiles are small: rows * keys * head_dim stays under 10**6. Below that size OpenBLAS multiplies without packing its
  operands: 114 GFLOP/s on one AVX-512 core, where its rate for large matrices is 90.
- No product has the slow operand order, A times B transposed. The forward pass keeps scores transposed (a row is a
  key), so its maximum and sum run down columns; the backward pass transposes a block of keys and values once.
- 2**x is a polynomial, so its loop vectorises: 0.3 ns an element in float32 where math.exp takes 2.4.

The jitted functions release the interpreter lock. They take a range of work units, so that Python threads share the
units (`threads.share`); no numba thread pool takes part, and one compilation serves one thread or many.
"""
from functools import cache
from math import exp, log, sqrt

import numpy as np
from numba import boolean, from_dtype, int64, njit, types

TILE = 10**6                     # rows * keys * head_dim of one tile stays below this
ROWS = 80                        # query rows of a tile
NOTHING = -1e30                  # the maximum of a row that has seen no key: finite, so that no inf - inf arises
HIDDEN = 2 * NOTHING             # the score of a masked key: exp(HIDDEN - NOTHING) is 0
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453


def _powers_of_two(degree, number):
    """Coefficients, highest first, of the polynomial through 2**x on [-1, 0]."""
    fit = np.polynomial.Chebyshev.interpolate(np.exp2, degree, domain=[-1, 0])
    return tuple(number(c) for c in fit.convert(kind=np.polynomial.Polynomial).coef[::-1])


SINGLE = _powers_of_two(5, np.float32)       # relative error 2e-7
DOUBLE = _powers_of_two(11, np.float64)      # 3e-15

_flag, _size, _pointer = types.uint8, types.intp, types.voidptr
_xxgemm = types.ExternalFunction("numba_xxgemm", types.int32(
    _flag, _flag, _flag, _size, _size, _size, _pointer, _pointer, _size, _pointer, _size, _pointer, _pointer, _size))
_fast = {"reassoc", "contract", "nsz", "nnan"}


def width(d):
    """Keys of a tile for head dimension d: the most that stays under TILE, a multiple of 16, at most 192."""
    return max(16, min(192, TILE // (ROWS * d) // 16 * 16))


@njit(fastmath=_fast)
def _multiply(alpha, a, transpose, b, beta, c):
    """c = alpha a b + beta c, or with a transposed. Rows are contiguous; alpha and beta are arrays of one number."""
    inner = a.shape[0] if transpose else a.shape[1]
    kind = np.uint8(ord("s")) if c.itemsize == 4 else np.uint8(ord("d"))
    order = np.uint8(ord("T")) if transpose else np.uint8(ord("N"))
    a_row, b_row, c_row = a.strides[0] // a.itemsize, b.strides[0] // b.itemsize, c.strides[0] // c.itemsize
    # BLAS counts columns first, so it is handed the transposed problem: b before a.
    _xxgemm(kind, np.uint8(ord("N")), order, c.shape[1], c.shape[0], inner,
            alpha.ctypes, b.ctypes, b_row, a.ctypes, a_row, beta.ctypes, c.ctypes, c_row)


@njit(fastmath=_fast)
def _transpose(block, into):
    """Copy block (rows, d) into the contiguous array `into` (d, rows). Written out: it compiles faster than block.T."""
    rows, d = block.shape
    for c in range(d):
        for i in range(rows):
            into[c, i] = block[i, c]


@njit(fastmath=_fast)
def _exp2_single(x):
    """2**x for float32 x <= 0; exactly 0 from -127 down. The whole part goes into the exponent bits."""
    x = max(x, np.float32(-127))
    whole = np.int32(x)
    fraction, y = x - np.float32(whole), SINGLE[0]
    for c in SINGLE[1:]:
        y = y * fraction + c
    return y * np.int32((whole + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(fastmath=_fast)
def _exp2_double(x):
    """The same for float64, down to -1023."""
    x = max(x, -1023.0)
    whole = np.int64(x)
    fraction, y = x - np.float64(whole), DOUBLE[0]
    for c in DOUBLE[1:]:
        y = y * fraction + c
    return y * np.int64((whole + 1023) << 52).view(np.float64)


@njit(fastmath=_fast)
def _softmax_step(scores, peak, total, shrink):
    """Turn a tile of scores (keys, rows), base 2, into weights; update the rows' `peak` and `total`.

    `shrink` gets the factor that brings earlier sums to the new peak. Returns whether any factor differs from 1.
    """
    keys, rows = scores.shape
    for i in range(rows):
        shrink[i] = peak[i]
    for j in range(keys):
        for i in range(rows):
            peak[i] = max(peak[i], scores[j, i])
    moved = False
    for i in range(rows):
        moved |= shrink[i] != peak[i]
        shrink[i] = exp((shrink[i] - peak[i]) * LN2)
        total[i] *= shrink[i]
    for j in range(keys):
        for i in range(rows):
            if scores.itemsize == 4:
                scores[j, i] = _exp2_single(np.float32(scores[j, i] - peak[i]))
            else:
                scores[j, i] = _exp2_double(scores[j, i] - peak[i])
            total[i] += scores[j, i]
    return moved


def forward(first, last, units, block, q, k, v, causal, tile, out, lse):
    """Attention of the work units first..last-1; a unit (head, row) is the block of query rows from `row` on.

    A tile of keys and values meets all tiles of rows in the block before the next one comes: it is read from slow
    memory once per block, a block being a few tiles high.
    """
    heads, n, d = q.shape
    kv_heads, m, _ = k.shape
    offset = m - n if causal else m                       # row i sees keys up to i + offset
    zero, one, scale = np.zeros(1, out.dtype), np.ones(1, out.dtype), np.empty(1, out.dtype)
    scale[0] = LOG2E / sqrt(d)                            # scores come out in base 2
    tiles, turned = np.empty(tile * ROWS, out.dtype), np.empty(d * block, out.dtype)
    peak, total, shrink = np.empty(block, out.dtype), np.empty(block, out.dtype), np.empty(ROWS, out.dtype)
    for unit in range(first, last):
        head, row = units[unit]
        stop = min(row + block, n)
        kv = head // (heads // kv_heads)
        for i in range(stop - row):
            peak[i], total[i] = NOTHING, 0
            for c in range(d):
                out[head, row + i, c] = 0
        for start in range(row, stop, ROWS):
            rows, at = min(ROWS, stop - start), start - row
            _transpose(q[head, start:start + rows], turned[at * d:(at + rows) * d].reshape(d, rows))
        for key in range(0, min(m, stop + offset), tile):
            for start in range(row, stop, ROWS):
                rows, at = min(ROWS, stop - start), start - row
                keys = min(tile, m - key, start + rows + offset - key)             # as far as the last row sees
                if keys <= 0:
                    continue
                acc, qt = out[head, start:start + rows], turned[at * d:(at + rows) * d].reshape(d, rows)
                scores = tiles[:keys * rows].reshape(keys, rows)     # contiguous, so that its loops vectorise
                _multiply(scale, k[kv, key:key + keys], False, qt, zero, scores)
                for j in range(max(0, start + offset + 1 - key), keys):            # keys hidden from the first row
                    for i in range(min(rows, key + j - start - offset)):
                        scores[j, i] = HIDDEN
                moved = _softmax_step(scores, peak[at:at + rows], total[at:at + rows], shrink)
                if moved and key > 0:
                    for i in range(rows):
                        for c in range(d):
                            acc[i, c] *= shrink[i]
                _multiply(one, scores, True, v[kv, key:key + keys], one, acc)
        for i in range(stop - row):
            share = 1 / total[i] if total[i] > 0 else 0.0
            for c in range(d):
                out[head, row + i, c] *= share
            lse[head, row + i] = peak[i] * LN2 + log(total[i])       # of nothing: log 0 = -inf


@njit(fastmath=_fast)
def _weights_and_errors(weights, errors, level, delta, seen):
    """Scores (base 2) become softmax weights; dP becomes dS = P * (dP - delta). Row i sees the first seen + i keys."""
    rows, keys = weights.shape
    for i in range(rows):
        for j in range(keys):
            if weights.itemsize == 4:
                weights[i, j] = _exp2_single(np.float32(weights[i, j] - level[i]))
            else:
                weights[i, j] = _exp2_double(weights[i, j] - level[i])
            errors[i, j] = weights[i, j] * (errors[i, j] - delta[i])
        for j in range(min(max(seen + i, 0), keys), keys):
            weights[i, j] = 0
            errors[i, j] = 0


def backward(first, last, parts, q, k, v, grad_out, level, delta, causal, tile, dq, dk, dv):
    """Gradients of the work units first..last-1. Unit u is key head u // parts, and of it every parts-th block of keys.

    level   (heads, n)             logsumexp in base 2; +1e30 where a row sees nothing
    dq      (parts, heads, n, d)   zeros; each part adds into its own, so no two threads meet
    dk, dv  (kv_heads, m, d)       zeros
    """
    heads, n, d = q.shape
    kv_heads, m, _ = k.shape
    group = heads // kv_heads
    offset = m - n if causal else m
    zero, one, scale, scale2 = np.zeros(1, dq.dtype), np.ones(1, dq.dtype), np.empty(1, dq.dtype), np.empty(1, dq.dtype)
    scale[0], scale2[0] = 1 / sqrt(d), LOG2E / sqrt(d)
    all_weights, all_errors = np.empty(ROWS * tile, dq.dtype), np.empty(ROWS * tile, dq.dtype)
    turned_k, turned_v = np.empty(d * tile, dq.dtype), np.empty(d * tile, dq.dtype)
    for unit in range(first, last):
        kv, part = unit // parts, unit % parts
        for key in range(part * tile, m, parts * tile):
            keys = min(tile, m - key)
            block_k, block_v = k[kv, key:key + keys], v[kv, key:key + keys]
            sum_k, sum_v = dk[kv, key:key + keys], dv[kv, key:key + keys]
            kt, vt = turned_k[:d * keys].reshape(d, keys), turned_v[:d * keys].reshape(d, keys)
            _transpose(block_k, kt)
            _transpose(block_v, vt)
            for head in range(kv * group, (kv + 1) * group):
                for row in range(max(0, key - offset), n, ROWS):        # from the first row that sees this block on
                    end = min(row + ROWS, n)
                    seen = min(keys, end + offset - key)                # keys that the last row sees
                    size = (end - row) * seen
                    weights, errors = all_weights[:size].reshape(-1, seen), all_errors[:size].reshape(-1, seen)
                    block_q, block_g = q[head, row:end], grad_out[head, row:end]
                    _multiply(scale2, block_q, False, kt[:, :seen], zero, weights)
                    _multiply(one, block_g, False, vt[:, :seen], zero, errors)
                    _weights_and_errors(
                        weights, errors, level[head, row:end], delta[head, row:end], row + offset + 1 - key)
                    _multiply(one, weights, True, block_g, one, sum_v[:seen])
                    _multiply(scale, errors, True, block_q, one, sum_k[:seen])
                    _multiply(scale, errors, False, block_k[:seen], one, dq[part, head, row:end])


def merge(first, last, out, lse, part_out, part_lse):
    """Bring heads first..last-1 of (out, lse) to the union with a partial result over other keys."""
    weight = np.empty(2, out.dtype)
    for head in range(first, last):
        for i in range(lse.shape[1]):
            mine, theirs = float(lse[head, i]), float(part_lse[head, i])
            if theirs == -np.inf:
                continue
            union = max(mine, theirs) + log(1 + exp(-abs(mine - theirs))) if mine > -np.inf else theirs
            weight[0], weight[1] = exp(mine - union), exp(theirs - union)
            keep, add = weight
            for c in range(out.shape[2]):
                out[head, i, c] = keep * out[head, i, c] + add * part_out[head, i, c]
            lse[head, i] = union


@cache
def compiled(loop, dtype):
    """One of the three loops above, compiled for float32 or float64 and for arrays of any strides, writable or not."""
    number = from_dtype(np.dtype(dtype))
    given, made = types.Array(number, 3, "A", readonly=True), types.Array(number, 3, "C")
    rows_given, rows_made = types.Array(number, 2, "A", readonly=True), types.Array(number, 2, "C")
    arguments = {
        forward: (types.Array(int64, 2, "C"), int64, given, given, given, boolean, int64, made, rows_made),
        backward: (int64, given, given, given, given, rows_given, rows_given, boolean, int64,
                   types.Array(number, 4, "C"), made, made),
        merge: (made, rows_made, types.Array(number, 3, "C", readonly=True), rows_given),
    }[loop]
    return njit(types.void(int64, int64, *arguments), cache=True, nogil=True, fastmath=_fast - {"nnan"})(loop)
