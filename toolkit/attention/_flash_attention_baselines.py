"""What FlashAttention-2 is measured against: the score matrix written out, in chunks of rows, and version 1.

Each is exact, takes (heads, tokens, head_dim) and counts as it runs, like `flash_attention.forward`.
Sources: Dao et al. 2022, arXiv 2205.14135, Algorithms 0 and 1; Rabe and Staats 2021, arXiv 2112.05682.
Chapter: attention/flash_attention.
"""

from functools import cache
from math import inf, sqrt

import numpy as np

from toolkit.runtime import Cost, kernel, like

from .flash_attention import Count, blocks, check, finite, first_row_sees, tile_scores

WARPS = 4  # groups of threads in a core; version 1 splits a tile's keys among them


def naive(q, k, v, *, causal=False, count=None):
    """All scores in slow memory, three passes: products by BLAS, softmax in place.

    returns  out, lse
    extra    heads · n · m numbers
    """
    check(q, k, v, 1, 1, causal, True)
    count, (heads, n, d), (kv_heads, m, _) = count or Count(), q.shape, k.shape
    scores = q.reshape(kv_heads, -1, d) @ k.transpose(0, 2, 1)  # query heads that share a key head, in one product
    scores /= sqrt(d)
    if causal:
        scores.reshape(heads, n, m)[:, ~np.tri(n, m, m - n, dtype=bool)] = -inf
    peak = scores.max(axis=2, keepdims=True, initial=-inf)
    scores -= finite(peak)
    weights = np.exp(scores, out=scores)
    total = weights.sum(axis=2, keepdims=True)
    weights /= np.where(total > 0, total, 1)
    out = (weights @ v).reshape(q.shape)
    with np.errstate(divide="ignore"):
        lse = (finite(peak) + np.log(total)).reshape(heads, n)
    count.matmul += 4 * scores.size * d
    count.other += (5 + causal) * scores.size
    count.words += q.size + k.size + v.size + out.size + 4 * scores.size  # scores, then weights: written and read
    count.extra = max(count.extra, scores.size)
    return out, lse


def chunked(q, k, v, *, rows=128, causal=False, count=None):
    """`naive` for `rows` queries at a time, on the keys that they see: less memory, no less traffic.

    returns  out, lse
    extra    heads · rows · m numbers
    """
    (_, n, _), m = q.shape, k.shape[1]
    parts = []
    for i in blocks(n, rows):
        reach = max(0, first_row_sees(i.stop - 1, n, m, causal)) if causal else m
        parts.append(naive(q[:, i], k[:, :reach], v[:, :reach], causal=causal, count=count))
    return tuple(np.concatenate(part, axis=1) for part in zip(*parts, strict=True))


# ---- version 1 -------------------------------------------------------------------------------------------------------


def _head_cost(q, k, v, causal, rows, keys, count=None):
    work = head_work(*q.shape, k.shape[0], causal, rows, keys)
    return Cost(work.effort, work.words * q.itemsize)


@kernel(cost=_head_cost, out=lambda q, k, v, causal, rows, keys, count=None: (like(q), like(q[:, 0])))
def head_in_version_1(q, k, v, causal, rows, keys, count=None):
    """Version 1's unit of work, a whole head: keys outside, queries inside.

    q        (n, head_dim)            k, v     (m, head_dim)
    returns  out (n, head_dim), lse (n,)
    """
    count, (n, _), m = count or Count(), q.shape, k.shape[0]
    out, total, peak = np.zeros_like(q), np.zeros(n, q.dtype), np.full(n, -inf, q.dtype)
    count.move(out, total, peak)
    for j in blocks(m, keys):
        count.move(k[j], v[j])
        for i in blocks(n, rows):
            seen = first_row_sees(i.start, n, m, causal) - j.start
            if seen + (i.stop - i.start) - 1 <= 0:
                continue
            count.move(q[i], out[i], total[i], peak[i])
            scores = tile_scores(q[i], k[j], seen, count)
            top = scores.max(axis=1)
            weights = np.exp(scores - finite(top)[:, None])
            new = np.maximum(peak[i], top)
            old, fresh = np.exp(peak[i] - finite(new)), np.exp(top - finite(new))
            sums = old * total[i] + fresh * weights.sum(axis=1)
            added = fresh[:, None] * by_warps(weights, v[j], count)
            out[i] = ((old * total[i])[:, None] * out[i] + added) / np.where(sums > 0, sums, 1)[:, None]  # every time
            total[i], peak[i] = sums, new
            count.move(out[i], total[i], peak[i])
            count.other += 4 * scores.size + 4 * out[i].size + 9 * len(top)
            count.extra = max(count.extra, scores.size + out[i].size + 2 * len(top))
    with np.errstate(divide="ignore"):
        return out, peak + np.log(total)


def by_warps(weights, v, count):
    """weights @ v, where each warp holds some of the keys, and so a partial sum of the whole block, to pass on."""
    parts = [count.product(weights[:, w], v[w]) for w in blocks(len(v), -(-len(v) // WARPS))]
    count.exchanged += 2 * sum(part.size for part in parts)  # written and read
    count.other += sum(part.size for part in parts[1:])
    return sum(parts[1:], parts[0])


def forward_1(q, k, v, *, rows=128, keys=128, causal=False, empty_rows=False, count=None):
    """FlashAttention-1, forward. Arguments and results of `flash_attention.forward`."""
    check(q, k, v, rows, keys, causal, empty_rows)
    group = q.shape[0] // k.shape[0]
    heads = [head_in_version_1(one, k[h // group], v[h // group], causal, rows, keys, count) for h, one in enumerate(q)]
    return tuple(np.stack(part) for part in zip(*heads, strict=True))


@cache
def head_work(n, d, m, causal, rows, keys):
    """The Count of one `head_in_version_1`, without running it."""
    work = Count(words=n * d + 2 * n)
    for j in blocks(m, keys):
        c = j.stop - j.start
        work.words += 2 * c * d
        for i in blocks(n, rows):
            r, seen = i.stop - i.start, first_row_sees(i.start, n, m, causal) - j.start
            if seen + r - 1 > 0:
                warps = len(blocks(c, -(-c // WARPS)))
                other = (4 + (seen < c)) * r * c + (3 + warps) * r * d + 9 * r
                work += Count(1, seen < c, 4 * r * c * d, other, 3 * r * d + 4 * r, 2 * warps * r * d,
                              r * c + r * d + 2 * r)
    return work


def heads_on_cores(comm, q, k, v, *, rows=128, keys=128, causal=False):
    """Version 1, each rank one core that takes every p-th head: with fewer heads than cores, some get nothing."""
    group, done = q.shape[0] // k.shape[0], []
    for head in range(comm.rank, q.shape[0], comm.size):
        one = head_in_version_1(q[head], k[head // group], v[head // group], causal, rows, keys)
        done.append((head, 0, *one))
    return done
