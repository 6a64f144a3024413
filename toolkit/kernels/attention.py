"""Exact attention in tiles (FlashAttention-2), its gradient, and the algebra of partial results.

Softmax over a set of keys can be computed in parts: each part gives its own output and the logarithm of its sum of
exponentials (lse); `merge` joins two parts. Ring attention and all its siblings are loops over these functions.

Arrays are (heads, tokens, head_dim). Key and value heads may be fewer (grouped queries): query head h reads key head
h // group. Causal masks are aligned to the bottom right: of n queries and m keys, query i sees keys j <= i + (m - n).
float16 is computed in float32; float32 and float64 in themselves. No n x m array exists at any time.

Costs: the matrix products are charged exactly, on the visible part of the scores. Element-wise work is charged 0 flops
and its bytes, because memory bounds it and the matrix units take no part in it.

Source: Dao, "FlashAttention-2", 2023, arXiv 2307.08691. Chapter: attention/flash_attention.
"""
from functools import cache
from math import gcd, inf

import numpy as np

from toolkit.kernels.threads import share, threads_for
from toolkit.runtime.arrays import like as shape_only
from toolkit.runtime.errors import DtypeError, ShapeError
from toolkit.runtime.kernel import Cost, kernel

HALF, SINGLE, DOUBLE = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)


def visible_area(n, m, causal):
    """Number of (query, key) pairs that attend, of n queries and m keys."""
    if not causal:
        return n * m
    rows = min(n, m)                       # rows that see at least one key; the last one sees all m
    return rows * m - rows * (rows - 1) // 2


def _accumulation(dtype):
    return DOUBLE if dtype.itemsize == 8 else SINGLE


def _products(q, k, causal, count):
    """Flops of `count` products over the visible scores: 2 * head_dim for each visible pair, head and product."""
    heads, n, d = q.shape
    return 2 * count * heads * visible_area(n, k.shape[1], causal) * d


def _attention_cost(q, k, v, causal=False, return_lse=False):
    _check(q, k, v)
    lse = q.shape[0] * q.shape[1] * _accumulation(q.dtype).itemsize if return_lse else 0
    kind = "causal attention" if causal else None
    return Cost(_products(q, k, causal, 2), 2 * q.nbytes + k.nbytes + v.nbytes + lse, kind=kind)


def _attention_out(q, k, v, causal=False, return_lse=False):
    _check(q, k, v)
    return (shape_only(q), shape_only(q[:, :, 0], _accumulation(q.dtype))) if return_lse else shape_only(q)


@kernel(cost=_attention_cost, out=_attention_out)
def attention(q, k, v, causal=False, return_lse=False):
    """Softmax of q k^T / sqrt(head_dim), times v.

    q        (heads, n, head_dim)      float16, float32 or float64
    k, v     (kv_heads, m, head_dim)   same dtype; kv_heads divides heads
    returns  (heads, n, head_dim) in q's dtype; zeros where a row sees no key. With return_lse also lse (heads, n),
             natural logarithm, float64 for float64 and else float32; -inf where a row sees no key
    costs    4 * heads * visible_area * head_dim flops
    memory   one tile of scores per thread, whatever n and m
    raises   ShapeError, DtypeError
    limits   scores beyond 1e29 in size are taken for masked
    """
    _check(q, k, v)
    heads, n, _ = q.shape
    tiles, dtype = _tiles(), _accumulation(q.dtype)
    out, lse = np.empty(q.shape, dtype), np.empty((heads, n), dtype)
    threads = threads_for(_products(q, k, causal, 2))
    block = tiles.ROWS * max(1, min(4, heads * n // (16 * threads * tiles.ROWS)))
    inputs = [_rows(a, dtype) for a in (q, k, v)]
    units = heads * -(-n // block)
    share(threads, units, tiles.compiled(tiles.forward, dtype), block, *inputs, bool(causal), out, lse)
    out = out.astype(q.dtype, copy=False)
    return (out, lse) if return_lse else out


def _backward_cost(q, k, v, out, lse, grad_out, causal=False, delta=None):
    _check_backward(q, k, v, out, lse, grad_out, delta)
    moved = 2 * (q.nbytes + k.nbytes + v.nbytes) + grad_out.nbytes + lse.nbytes
    kind = "causal attention_backward" if causal else None
    return Cost(_products(q, k, causal, 5), moved + (out.nbytes if delta is None else delta.nbytes), kind=kind)


def _backward_out(q, k, v, out, lse, grad_out, causal=False, delta=None):
    _check_backward(q, k, v, out, lse, grad_out, delta)
    return tuple(shape_only(a, _accumulation(q.dtype)) for a in (q, k, v))


@kernel(cost=_backward_cost, out=_backward_out)
def attention_backward(q, k, v, out, lse, grad_out, causal=False, delta=None):
    """Gradients (dq, dk, dv) of sum(grad_out * attention(q, k, v)), from recomputed scores.

    out, lse   of the whole attention: k and v may be one block of the keys that `lse` sums over, and the gradients
               are then this block's share. `out` may be None when `delta` is given
    delta      (heads, n), sum of grad_out * out over the head dimension
    returns    shapes of q, k, v; float64 for float64 and else float32. Rows with lse = -inf add nothing
    costs      10 * heads * visible_area * head_dim flops: five products for the forward pass's two
    memory     one more dq for each part that the keys of one head are split into; 1 part if the heads share out evenly
    raises     ShapeError, DtypeError
    """
    _check_backward(q, k, v, out, lse, grad_out, delta)
    tiles, dtype = _tiles(), _accumulation(q.dtype)
    if delta is None:
        delta = _rowsum(grad_out, out)
    level = np.where(lse == -inf, -tiles.NOTHING, lse * tiles.LOG2E).astype(dtype, copy=False)
    threads = threads_for(_products(q, k, causal, 5))
    parts = threads // gcd(threads, k.shape[0])
    dq = np.zeros((parts, *q.shape), dtype)
    dk, dv = np.zeros(k.shape, dtype), np.zeros(v.shape, dtype)
    inputs = [_rows(a, dtype) for a in (q, k, v, grad_out)]
    share(threads, k.shape[0] * parts, tiles.compiled(tiles.backward, dtype), parts, *inputs, level,
          delta.astype(dtype, copy=False), bool(causal), dq, dk, dv)
    return (dq[0] if parts == 1 else dq.sum(axis=0)), dk, dv


def _delta_out(grad_out, out):
    return shape_only(out[:, :, 0], _accumulation(out.dtype))


def _delta_cost(grad_out, out):
    return Cost(0, grad_out.nbytes + out.nbytes + _accumulation(out.dtype).itemsize * out.shape[0] * out.shape[1])


@kernel(cost=_delta_cost, out=_delta_out)
def delta(grad_out, out):
    """Sum of grad_out * out over the head dimension: what the softmax's gradient subtracts. Returns (heads, n)."""
    return _rowsum(grad_out, out)


def _rowsum(grad_out, out):
    return np.einsum("hnd,hnd->hn", grad_out, out, dtype=_accumulation(out.dtype), casting="same_kind")


def _empty_out(q):
    dtype = _accumulation(q.dtype)
    return shape_only(q, dtype), shape_only(q[:, :, 0], dtype)


def _empty_cost(q):
    return Cost(0, _accumulation(q.dtype).itemsize * (q.size + q.shape[0] * q.shape[1]))


@kernel(cost=_empty_cost, out=_empty_out)
def empty_accumulator(q):
    """The result of attention over no keys, (zeros, -inf), in the accumulation dtype of q: where `merge` starts."""
    dtype = _accumulation(q.dtype)
    return np.zeros(q.shape, dtype), np.full(q.shape[:2], -inf, dtype)


def _merge_cost(acc, part):
    (out, lse), (part_out, part_lse) = acc, part
    return Cost(0, 2 * (out.nbytes + lse.nbytes) + part_out.nbytes + part_lse.nbytes)


@kernel(cost=_merge_cost, out=lambda acc, part: acc)
def merge(acc, part):
    """Attention over the union of two disjoint sets of keys, from attention over each. Changes `acc`, and returns it.

    acc     (out (heads, n, head_dim), lse (heads, n))   float32 or float64, writable
    part    the same shapes; any float dtype, so that a part can travel in 16 bits
    raises  ShapeError, DtypeError
    """
    (out, lse), (part_out, part_lse) = acc, part
    if out.shape != part_out.shape or lse.shape != part_lse.shape or lse.shape != out.shape[:2]:
        raise ShapeError(f"merge: acc has out {out.shape} and lse {lse.shape}, part {part_out.shape} and "
                         f"{part_lse.shape}: both need (heads, tokens, head_dim) and (heads, tokens)")
    if out.dtype != _accumulation(out.dtype) or lse.dtype != out.dtype:
        raise DtypeError(f"merge: acc is {out.dtype} with lse {lse.dtype}: accumulate in float32 or float64, "
                         "as empty_accumulator(q) does")
    if not (out.flags.writeable and lse.flags.writeable):
        raise ValueError("merge: acc is read-only (is a message still sending it?): wait, or merge into a copy")
    tiles = _tiles()
    plain = [np.ascontiguousarray(a, out.dtype) for a in (out, lse, part_out, part_lse)]
    share(threads_for(10 * out.size), out.shape[0], tiles.compiled(tiles.merge, out.dtype), *plain)
    for array, merged in zip(acc, plain, strict=False):
        if array is not merged:
            array[...] = merged
    return acc


def _finish_cost(acc, like):
    return Cost(0, acc[0].nbytes + acc[0].size * like.dtype.itemsize if acc[0].dtype != like.dtype else 0)


def _finish_out(acc, like):
    return (acc[0] if acc[0].dtype == like.dtype else shape_only(acc[0], like.dtype)), acc[1]


@kernel(cost=_finish_cost, out=_finish_out)
def finish(acc, like):
    """The accumulated (out, lse), with out in the dtype of the array `like`: no copy if it has that dtype already."""
    out, lse = acc
    return out.astype(like.dtype, copy=False), lse


def _check(q, k, v):
    """Refuse what the loops cannot take, and say what was given."""
    if not q.ndim == k.ndim == v.ndim == 3:
        raise ShapeError(f"attention: q {q.shape}, k {k.shape}, v {v.shape}: each must be (heads, tokens, head_dim)")
    if k.shape != v.shape:
        raise ShapeError(f"attention: k is {k.shape} and v is {v.shape}: they must have the same shape")
    if q.shape[2] != k.shape[2] or q.shape[2] == 0:
        raise ShapeError(f"attention: head_dim is {q.shape[2]} in q {q.shape} and {k.shape[2]} in k {k.shape}: "
                         "it must be the same and not 0")
    if k.shape[0] == 0 or q.shape[0] % k.shape[0]:
        raise ShapeError(f"attention: {q.shape[0]} query heads cannot share {k.shape[0]} key heads: "
                         "the number of key heads must divide the number of query heads")
    if q.dtype not in (SINGLE, DOUBLE, HALF) or not q.dtype == k.dtype == v.dtype:
        raise DtypeError(f"attention: q is {q.dtype}, k {k.dtype}, v {v.dtype}: "
                         "all must be float16, all float32 or all float64")


def _check_backward(q, k, v, out, lse, grad_out, delta):
    _check(q, k, v)
    for name, given, shape in (("grad_out", grad_out, q.shape), ("out", out, q.shape),
                               ("lse", lse, q.shape[:2]), ("delta", delta, q.shape[:2])):
        if given is not None and given.shape != shape:
            raise ShapeError(f"attention_backward: {name} is {given.shape}: with q {q.shape} it must be {shape}")
    if out is None and delta is None:
        raise ShapeError("attention_backward: out and delta are both None: give one of them")


@cache
def _tiles():
    """The compiled loops; numba and scipy load at the first call (0.6 s), not with the import of this module."""
    from toolkit.kernels import _attention_tiles
    return _attention_tiles


def _rows(array, dtype):
    """`array` in `dtype` with contiguous rows, as BLAS reads them. A slice along the tokens is not copied."""
    array = array.astype(dtype, copy=False)
    item = array.itemsize
    plain = array.strides[2] == item and array.strides[1] >= array.shape[2] * item and array.strides[1] % item == 0
    return array if plain and array.flags.aligned else np.array(array, order="C")
