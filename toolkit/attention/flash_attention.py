"""FlashAttention-2: each core finishes a block of queries by itself, so one head feeds many cores.

Version 1 walks over blocks of keys: for each, it fetches every block of queries with its unfinished output, rescales,
divides, and writes all of it back. Version 2 turns the loops round. A block of queries stays until it is done, divides
once, and writes one number a row, the lse. That leaves fewer operations that are no matrix product, and blocks that do
not need each other: the unit of parallel work is (head, block of queries) and no longer the head.

This module is the two algorithms as loops over tiles, counted as they run, and the way their work is shared out. The
compiled kernel is `toolkit.kernels.attention`. Baselines are in `_flash_attention_baselines`.

The card counts slow-memory words with all keys; under a causal mask both versions here read the visible blocks only.
Source: Dao 2023, arXiv 2307.08691, Algorithms 1 and 2, Section 3. Chapter: attention/flash_attention.
"""

from dataclasses import dataclass
from functools import cache
from heapq import heapreplace
from math import inf, sqrt
from operator import add

import numpy as np

from toolkit.kernels.attention import attention
from toolkit.runtime import Cost, kernel, like
from toolkit.runtime.errors import ShapeError

OTHER = 16  # matrix-product flops in the time of one other flop: 312 against 19.5 TFLOP/s on an A100 (Section 3.1)
EXCHANGE = 64  # the same for a 4-byte word through shared memory: an A100 core does 2048 flops or 128 bytes a cycle


@dataclass
class Count:
    """What the loops did. `x + y` adds; `extra` is the larger of the two.

    tiles, masked   tiles computed, and those of them that needed a mask
    matmul, other   flops in matrix products, and all others; an exp, a maximum, a comparison is one
    words           numbers moved between slow and fast memory
    exchanged       numbers that the warps of a core pass to each other through shared memory
    extra           most numbers held at a time beyond inputs and outputs
    """

    tiles: int = 0
    masked: int = 0
    matmul: int = 0
    other: int = 0
    words: int = 0
    exchanged: int = 0
    extra: int = 0

    def product(self, a, b):
        """a @ b, counted."""
        self.matmul += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return a @ b

    def move(self, *arrays):
        """Count arrays that cross between slow and fast memory; returns the first."""
        self.words += sum(a.size for a in arrays)
        return arrays[0]

    def __add__(self, more):
        *sums, _ = map(add, vars(self).values(), vars(more).values())
        return Count(*sums, extra=max(self.extra, more.extra))

    @property
    def effort(self):
        """Everything in matrix-product flops of an A100, nothing overlapped."""
        return self.matmul + OTHER * self.other + EXCHANGE * self.exchanged


# ---- forward ---------------------------------------------------------------------------------------------------------


def _query_block_cost(q, k, v, seen, keys, count=None):
    work = query_block_work(*q.shape, k.shape[0], seen, keys)
    return Cost(work.effort, work.words * q.itemsize)


@kernel(cost=_query_block_cost, out=lambda q, k, v, seen, keys, count=None: (like(q), like(q[:, 0])))
def query_block(q, k, v, seen, keys, count=None):
    """One unit of work: a block of queries of one head, from start to end (Algorithm 1, lines 4 to 15).

    q        (rows, head_dim)              k, v     (m, head_dim)
    seen     keys that the first row sees, may be negative; each later row sees one more. m: all rows see all keys
    keys     columns of a tile             count    a Count to add to
    returns  out (rows, head_dim), lse (rows,): 0 and -inf for a row that sees nothing
    """
    count, rows = count or Count(), len(q)
    acc, total, peak = np.zeros_like(q), np.zeros(rows, q.dtype), np.full(rows, -inf, q.dtype)
    count.move(q)
    for j in key_blocks(rows, k.shape[0], seen, keys):
        scores = tile_scores(q, count.move(k[j]), seen - j.start, count)
        new = np.maximum(peak, scores.max(axis=1))
        weights, shrink = np.exp(scores - finite(new)[:, None]), np.exp(peak - finite(new))
        total = shrink * total + weights.sum(axis=1)
        acc = shrink[:, None] * acc + count.product(weights, count.move(v[j]))
        peak = new
        count.other += 4 * scores.size + acc.size + 5 * rows
        count.extra = max(count.extra, scores.size + acc.size + 2 * rows)
    out = acc / np.where(total > 0, total, 1)[:, None]  # once, at the end
    with np.errstate(divide="ignore"):
        lse = peak + np.log(total)  # one number a row, where version 1 keeps two
    count.other += out.size + 3 * rows
    count.move(out, lse)
    return out, lse


def forward(q, k, v, *, rows=128, keys=128, causal=False, empty_rows=False, count=None):
    """FlashAttention-2, forward: every unit of work, one after another.

    q        (heads, n, head_dim)      k, v   (kv_heads, m, head_dim), kv_heads divides heads
    rows, keys   of a tile             count  a Count to add to
    returns  out, lse (heads, n), in the dtype of q
    raises   ShapeError, DtypeError; causal with n > m, where n - m rows see nothing, unless `empty_rows` allows it
    """
    check(q, k, v, rows, keys, causal, empty_rows)
    out, lse = np.empty_like(q), np.empty(q.shape[:2], q.dtype)
    for head, row in units(q.shape[0], q.shape[1], rows):
        i, kv = slice(row, row + rows), head // (q.shape[0] // k.shape[0])
        seen = first_row_sees(row, q.shape[1], k.shape[1], causal)
        out[head, i], lse[head, i] = query_block(q[head, i], k[kv], v[kv], seen, keys, count)
    return out, lse


# ---- backward --------------------------------------------------------------------------------------------------------


def backward(q, k, v, out, lse, grad_out, *, rows=128, keys=128, causal=False, parts=1, count=None):
    """FlashAttention-2, backward (Algorithm 2): blocks of keys outside, weights from scores and lse alone.

    out, lse   of `forward`
    parts      1: one core owns a head and its dq (design A). p: p cores share the blocks of keys of a head, each adds
               into a dq of its own, and the parts are summed in order: same bits in each run (design B)
    returns    dq, dk, dv; a key head sums over the query heads that share it
    raises     ShapeError, DtypeError
    """
    check(q, k, v, rows, keys, causal, True)
    count, (heads, n, d), (kv_heads, m, _) = count or Count(), q.shape, k.shape
    group, scale = heads // kv_heads, 1 / sqrt(d)
    delta = (grad_out * out).sum(axis=2)
    count.move(grad_out, out, delta)
    count.other += 2 * out.size
    dq, dk, dv = np.zeros((parts, *q.shape), q.dtype), np.zeros_like(k), np.zeros_like(v)
    count.extra = max(count.extra, delta.size + (parts - 1) * q.size)
    for number, j in enumerate(blocks(m, keys)):
        for head in range(heads):
            kv = head // group
            if head % group == 0:
                count.move(k[kv, j], v[kv, j], dk[kv, j], dv[kv, j])
            for i in blocks(n, rows):
                seen = first_row_sees(i.start, n, m, causal) - j.start
                if seen + (i.stop - i.start) - 1 <= 0:
                    continue  # not even the last row sees this block
                qi, gi = q[head, i], grad_out[head, i]
                count.move(qi, gi, lse[head, i], delta[head, i], dq[0, head, i], dq[0, head, i])  # dq: read and written
                weights = np.exp(tile_scores(qi, k[kv, j], seen, count) - finite(lse[head, i])[:, None])
                errors = weights * (count.product(gi, v[kv, j].T) - delta[head, i][:, None])
                dv[kv, j] += count.product(weights.T, gi)
                dk[kv, j] += scale * count.product(errors.T, qi)
                dq[number % parts, head, i] += scale * count.product(errors, k[kv, j])
                count.other += 4 * weights.size
    return dq.sum(axis=0), dk, dv


# ---- tiles -----------------------------------------------------------------------------------------------------------


def blocks(length, size):
    """Slices of `size` that cover range(length); the last may be shorter."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def key_blocks(rows, m, seen, keys):
    """The blocks of keys that the last of `rows` rows sees; a causal row stops here, and skips the rest."""
    return blocks(max(0, min(m, seen + rows - 1)) if seen < m else m, keys)


def first_row_sees(row, n, m, causal):
    """How many keys query `row` sees: causal masks are aligned to the bottom right."""
    return row + 1 + m - n if causal else m


def tile_scores(q, k, seen, count):
    """Scaled scores of a tile whose first row sees `seen` of its keys. A tile that all rows see meets no mask code."""
    scores = count.product(q, k.T) / sqrt(q.shape[1])
    count.tiles += 1
    if seen < k.shape[0]:
        scores[~np.tri(*scores.shape, seen - 1, dtype=bool)] = -inf
        count.masked += 1
        count.other += scores.size
    return scores


def finite(peak):
    """`peak`, with 0 for -inf: exp(-inf - 0) is 0, and -inf - (-inf) is not a number."""
    return np.where(peak > -inf, peak, 0)


def check(q, k, v, rows, keys, causal, empty_rows):
    attention.cost(q, k, v)  # refuses what the compiled kernel refuses, in the same words
    if rows < 1 or keys < 1:
        raise ShapeError(f"a tile of {rows} rows and {keys} keys: both must be at least 1")
    if causal and q.shape[1] > k.shape[1] and not empty_rows:
        hidden = q.shape[1] - k.shape[1]
        raise ShapeError(f"causal with {q.shape[1]} queries and {k.shape[1]} keys: the first {hidden} queries see no "
                         "key; pass empty_rows=True to get zeros there, or fewer queries")


# ---- who does what ---------------------------------------------------------------------------------------------------


def units(heads, n, rows):
    """The units of work, (head, first row): all independent."""
    return [(head, i.start) for head in range(heads) for i in blocks(n, rows)]


@cache
def query_block_work(rows, d, m, seen, keys):
    """The Count of one `query_block`, without running it."""
    work = Count(words=2 * rows * d + rows, other=rows * d + 3 * rows)
    for j in key_blocks(rows, m, seen, keys):
        size = j.stop - j.start
        masked = seen - j.start < size
        work += Count(1, masked, 4 * rows * size * d, (4 + masked) * rows * size + rows * d + 5 * rows, 2 * size * d,
                      extra=rows * size + rows * d + 2 * rows)
    return work


def contiguous(efforts, cores):
    """Deal units to cores in equal runs, as PyTorch's CPU kernel does. Returns a list of unit numbers for each core."""
    return [list(part) for part in np.array_split(np.arange(len(efforts)), cores)]


def heaviest_first(efforts, cores):
    """Each core takes the heaviest unit left as soon as it is free."""
    plan, load = [[] for _ in range(cores)], [(0, core) for core in range(cores)]
    for unit in sorted(range(len(efforts)), key=lambda u: -efforts[u]):
        busy, core = load[0]
        plan[core].append(unit)
        heapreplace(load, (busy + efforts[unit], core))
    return plan


def on_cores(comm, q, k, v, *, rows=128, keys=128, causal=False, deal=heaviest_first):
    """Forward, each rank one core. All see the same slow memory, so nothing is sent.

    q, k, v   the whole arrays        deal   (effort of each unit, cores) -> unit numbers for each core
    returns   list of (head, first row, out, lse) of this core's units; `assemble` joins them
    """
    heads, n, d = q.shape
    m, group, work = k.shape[1], heads // k.shape[0], units(heads, q.shape[1], rows)
    sees = {row: first_row_sees(row, n, m, causal) for _, row in work}
    efforts = [query_block_work(min(rows, n - row), d, m, sees[row], keys).effort for _, row in work]
    done = []
    for head, row in (work[unit] for unit in deal(efforts, comm.size)[comm.rank]):
        block = query_block(q[head, row : row + rows], k[head // group], v[head // group], sees[row], keys)
        done.append((head, row, *block))
    return done


def assemble(run, q):
    """(out, lse) of the whole, from what the cores of a numeric run returned."""
    out, lse = np.empty_like(q), np.empty(q.shape[:2], q.dtype)
    for head, row, some, level in (block for blocks in run.outputs for block in blocks):
        out[head, row : row + len(some)], lse[head, row : row + len(some)] = some, level
    return out, lse
