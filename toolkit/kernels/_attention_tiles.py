"""The compiled loops under `attention.py`: one tile of scores at a time, and `multiply` for every product.

Four choices make the speed:

- A tile of scores, 96 x 96, stays in the first-level cache (36 kB in float32), and its products run from registers.
- No product has the slow operand order, A times B transposed. The forward pass keeps scores transposed (a row is a
  key), so its maximum and sum run down columns; the backward pass transposes a block of keys and values once.
- 2**x is a polynomial, so its loop vectorises: 0.3 ns an element in float32 where math.exp takes 2.4.
- The number subtracted from a row's scores need not be their maximum, only not far above it. It is a ceiling, SLACK
  above the maximum that set it; a later maximum under the ceiling rescales nothing. (FlashAttention-4 is as lazy.)

The jitted functions release the interpreter lock. They take a range of work units, so that Python threads share the
units (`threads.share`); no numba thread pool takes part, and one compilation serves one thread or many.
"""
from functools import cache
from math import exp, log, sqrt

import numpy as np
from numba import boolean, from_dtype, int64, njit, types
from numba.extending import overload

from toolkit.kernels._tile_product import FAST, multiply

ROWS = 96                        # query rows of a tile
KEYS = 96                        # its keys: both divide into the blocks of `multiply`
SLACK = 8                        # base 2: the largest weight is 2**-SLACK or more, far from underflow
NOTHING = -1e30                  # the ceiling of a row that has seen no key: finite, so that no inf - inf arises
HIDDEN = 2 * NOTHING             # the score of a masked key: exp(HIDDEN - NOTHING) is 0
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453


def _powers_of_two(degree, number):
    """Coefficients, highest first, of the polynomial through 2**x on [-1, 0]."""
    fit = np.polynomial.Chebyshev.interpolate(np.exp2, degree, domain=[-1, 0])
    return tuple(number(c) for c in fit.convert(kind=np.polynomial.Polynomial).coef[::-1])


SINGLE = _powers_of_two(5, np.float32)       # relative error 2e-7
DOUBLE = _powers_of_two(11, np.float64)      # 3e-15

@njit(fastmath=FAST)
def _transpose(block, into):
    """Copy block (rows, d) into the contiguous array `into` (d, rows). Written out: it compiles faster than block.T."""
    rows, d = block.shape
    for c in range(d):
        for i in range(rows):
            into[c, i] = block[i, c]


@njit(fastmath=FAST)
def _exp2_single(x):
    """2**x for float32 x <= 0; exactly 0 from -127 down. The whole part goes into the exponent bits."""
    x = max(x, np.float32(-127))
    whole = np.int32(x)
    fraction, y = x - np.float32(whole), SINGLE[0]
    for c in SINGLE[1:]:
        y = y * fraction + c
    return y * np.int32((whole + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(fastmath=FAST)
def _exp2_double(x):
    """The same for float64, down to -1023."""
    x = max(x, -1023.0)
    whole = np.int64(x)
    fraction, y = x - np.float64(whole), DOUBLE[0]
    for c in DOUBLE[1:]:
        y = y * fraction + c
    return y * np.int64((whole + 1023) << 52).view(np.float64)


def _exp2(x):
    """2**x for x <= 0, in the type of x."""


@overload(_exp2, jit_options={"fastmath": FAST})
def _exp2_of_type(x):
    return (lambda x: _exp2_single(x)) if x == types.float32 else (lambda x: _exp2_double(x))


@njit(fastmath=FAST)
def _softmax_step(scores, ceiling, total, top, shrink):
    """Turn a tile of scores (keys, rows), base 2, into weights 2**(score - ceiling); update `ceiling` and `total`.

    top     (rows,) scratch
    shrink  (rows,) gets the factor that brings earlier sums to the new ceiling, if any row has a new one
    returns whether any has
    """
    keys, rows = scores.shape
    for i in range(rows):
        top[i] = scores[0, i]
    for j in range(1, keys):
        for i in range(rows):
            top[i] = max(top[i], scores[j, i])
    raised = False
    for i in range(rows):
        raised |= top[i] > ceiling[i]
    if raised:
        for i in range(rows):
            top[i] = top[i] + np.float32(SLACK) if top[i] > ceiling[i] else ceiling[i]
            shrink[i] = _exp2(ceiling[i] - top[i])
            total[i] *= shrink[i]
            ceiling[i] = top[i]
    for j in range(keys):
        for i in range(rows):
            scores[j, i] = _exp2(scores[j, i] - ceiling[i])
            total[i] += scores[j, i]
    return raised


def forward(first, last, block, q, k, v, causal, out, lse):
    """Attention of the work units first..last-1; a unit is `block` query rows of one head.

    The last rows come first: under a causal mask they are the long ones, and the short ones fill the gaps at the end.
    A tile of keys and values meets all tiles of rows in the block before the next one comes: it is read from slow
    memory once per block, a block being a few tiles high.
    """
    heads, n, d = q.shape
    kv_heads, m, _ = k.shape
    offset = m - n if causal else m                       # row i sees keys up to i + offset
    zero, one, scale = np.zeros(1, out.dtype), np.ones(1, out.dtype), np.empty(1, out.dtype)
    scale[0] = LOG2E / sqrt(d)                            # scores come out in base 2
    tiles, turned = np.empty(KEYS * ROWS, out.dtype), np.empty(d * block, out.dtype)
    ceiling, total = np.empty(block, out.dtype), np.empty(block, out.dtype)
    top, shrink = np.empty(ROWS, out.dtype), np.empty(ROWS, out.dtype)
    for unit in range(first, last):
        head, row = unit % heads, ((n - 1) // block - unit // heads) * block
        stop = min(row + block, n)
        kv = head // (heads // kv_heads)
        for i in range(stop - row):
            ceiling[i], total[i] = NOTHING, 0
            for c in range(d):
                out[head, row + i, c] = 0
        for start in range(row, stop, ROWS):
            rows, at = min(ROWS, stop - start), start - row
            _transpose(q[head, start:start + rows], turned[at * d:(at + rows) * d].reshape(d, rows))
        for key in range(0, min(m, stop + offset), KEYS):
            for start in range(row, stop, ROWS):
                rows, at = min(ROWS, stop - start), start - row
                keys = min(KEYS, m - key, start + rows + offset - key)             # as far as the last row sees
                if keys <= 0:
                    continue
                acc, qt = out[head, start:start + rows], turned[at * d:(at + rows) * d].reshape(d, rows)
                scores = tiles[:keys * rows].reshape(keys, rows)     # contiguous, so that its loops vectorise
                multiply(scale, k[kv, key:key + keys], False, qt, zero, scores)
                for j in range(max(0, start + offset + 1 - key), keys):            # keys hidden from the first row
                    for i in range(min(rows, key + j - start - offset)):
                        scores[j, i] = HIDDEN
                raised = _softmax_step(scores, ceiling[at:at + rows], total[at:at + rows], top, shrink)
                if raised and key > 0:
                    for i in range(rows):
                        for c in range(d):
                            acc[i, c] *= shrink[i]
                multiply(one, scores, True, v[kv, key:key + keys], one, acc)
        for i in range(stop - row):
            share = 1 / total[i] if total[i] > 0 else 0.0
            for c in range(d):
                out[head, row + i, c] *= share
            lse[head, row + i] = ceiling[i] * LN2 + log(total[i])       # of nothing: log 0 = -inf


@njit(fastmath=FAST)
def _weights_and_errors(weights, errors, level, delta, seen):
    """Scores (base 2) become softmax weights; dP becomes dS = P * (dP - delta). Row i sees the first seen + i keys."""
    rows, keys = weights.shape
    for i in range(rows):
        for j in range(keys):
            weights[i, j] = _exp2(weights[i, j] - level[i])
            errors[i, j] = weights[i, j] * (errors[i, j] - delta[i])
        for j in range(min(max(seen + i, 0), keys), keys):
            weights[i, j] = 0
            errors[i, j] = 0


def backward(first, last, parts, q, k, v, grad_out, level, delta, causal, dq, dk, dv):
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
    all_weights, all_errors = np.empty(ROWS * KEYS, dq.dtype), np.empty(ROWS * KEYS, dq.dtype)
    turned_k, turned_v = np.empty(d * KEYS, dq.dtype), np.empty(d * KEYS, dq.dtype)
    for unit in range(first, last):
        kv, part = unit // parts, unit % parts
        for key in range(part * KEYS, m, parts * KEYS):
            keys = min(KEYS, m - key)
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
                    multiply(scale2, block_q, False, kt[:, :seen], zero, weights)
                    multiply(one, block_g, False, vt[:, :seen], zero, errors)
                    _weights_and_errors(
                        weights, errors, level[head, row:end], delta[head, row:end], row + offset + 1 - key)
                    multiply(one, weights, True, block_g, one, sum_v[:seen])
                    multiply(scale, errors, True, block_q, one, sum_k[:seen])
                    multiply(scale, errors, False, block_k[:seen], one, dq[part, head, row:end])


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
        forward: (int64, given, given, given, boolean, made, rows_made),
        backward: (int64, given, given, given, given, rows_given, rows_given, boolean,
                   types.Array(number, 4, "C"), made, made),
        merge: (made, rows_made, types.Array(number, 3, "C", readonly=True), rows_given),
    }[loop]
    return njit(types.void(int64, int64, *arguments), cache=True, nogil=True, fastmath=FAST - {"nnan"})(loop)
