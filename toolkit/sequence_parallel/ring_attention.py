"""Ring attention: keys and values travel round a ring, queries stay.

Every rank keeps its queries. In each of N steps it attends to the keys and values it holds, while they already travel
to the next rank. When a step computes longer than its transfer takes, communication is free.
Causal masks empty half of the blocks; the zigzag and striped layouts spread the rest evenly.

Bytes a rank sends, B = bytes of its k and v: forward (N-1)·B; backward (N-1)·B and N times the float32 gradients.
Position embeddings must use the global numbers of a rank's tokens: `toolkit.runtime.positions(layout, …)`.
Sources: Liu, Zaharia, Abbeel 2023, arXiv 2310.01889; striped: Brandon et al. 2023, arXiv 2311.09431; zigzag: a
community variant. Chapter: sequence_parallel/ring_attention.
"""

import numpy as np

from toolkit.kernels.attention import attention as attention_block
from toolkit.kernels.attention import attention_backward as backward_block
from toolkit.kernels.attention import delta, empty_accumulator, finish, merge, visible_area
from toolkit.kernels.elementwise import accumulate
from toolkit.runtime.algorithms import concatenate
from toolkit.runtime.errors import ShapeError
from toolkit.runtime.layout import LAYOUTS

EVERYTHING = slice(None)


def attention(comm, q, k, v, *, causal=False, layout="contiguous", return_lse=False):
    """Exact attention over the tokens of all ranks, for the queries of this one.

    q         (heads, tokens, head_dim)      this rank's share of the tokens, in `layout`
    k, v      (kv_heads, tokens, head_dim)   same dtype; kv_heads divides heads
    layout    which tokens those are. Without a mask every layout gives the same result and the same work
    returns   out, shape and dtype of q; with return_lse also lse (heads, tokens), float32 or float64
    sends     (N-1) times the bytes of k and v, in N-1 messages
    memory    q once, k and v twice, the result so far and the newest block's result: the same for any N > 1
    raises    ShapeError, DtypeError
    """
    acc = empty_accumulator(q)
    for step in range(comm.size):
        incoming = comm.ishift((k, v), by=1, tag="keys and values") if step < comm.size - 1 else None
        holder = (comm.rank - step) % comm.size
        attend(acc, q, k, v, visible(layout, causal, comm.rank, holder, q))
        if incoming:
            k, v = incoming.wait()
    return finish(acc, q) if return_lse else finish(acc, q)[0]


def attention_backward(comm, q, k, v, out, lse, grad_out, *, causal=False, layout="contiguous"):
    """Gradients of `attention`. Keys and values make N-1 hops; their gradients follow and make N, to arrive at home.

    out, lse   what `attention(…, return_lse=True)` gave          grad_out   shape of out
    returns    (dq, dk, dv), in float64 for float64 input and else float32
    sends      (N-1) times the bytes of k and v, N times those of dk and dv, in 2N-1 messages
    raises     ShapeError, DtypeError
    """
    dq, travelling, d = None, None, delta(grad_out, out)
    for step in range(comm.size):
        incoming = comm.ishift((k, v), by=1, tag="keys and values") if step < comm.size - 1 else None
        part = visible(layout, causal, comm.rank, (comm.rank - step) % comm.size, q)
        block = gradients(q, k, v, lse, d, grad_out, part)
        if step == 0:
            dq, *grads = block
        else:
            grads = travelling.wait()
            add_gradients(dq, grads, block, part)
        if comm.size > 1:
            travelling = comm.ishift(tuple(grads), by=1, tag="gradients")
        if incoming:
            k, v = incoming.wait()
    return (dq, *(travelling.wait() if travelling else grads))


# ---- who sees whom: the rules of the layouts, shared by every system that moves blocks ------------------------------


def visible(layout, causal, asks, holds, q):
    """The part of the block (queries of rank `asks`) × (keys of rank `holds`) that attends.

    returns   (rows, columns, masked): slices of the queries and keys, and whether their block is causal in itself;
              None when no query sees any key
    raises    ShapeError  unknown layout; zigzag with an odd number of tokens
    """
    if layout not in LAYOUTS:
        raise ShapeError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    if not causal or asks == holds:
        return EVERYTHING, EVERYTHING, causal
    if layout == "contiguous":
        return (EVERYTHING, EVERYTHING, False) if asks > holds else None
    if layout == "striped":  # key index <= query index, or < when the key's rank comes later
        return (EVERYTHING, EVERYTHING, True) if asks > holds else (slice(1, None), slice(None, -1), True)
    return (EVERYTHING, early(q), False) if asks > holds else (late(q), EVERYTHING, False)


def early(q):
    """The first of a zigzag rank's two chunks. A slice that fits every array of as many tokens as `q`."""
    return slice(None, _chunk(q))


def late(q):
    """The second chunk, counted from the end: right for whole blocks and for blocks trimmed to that chunk."""
    return slice(-_chunk(q), None)


def _chunk(q):
    if q.shape[1] % 2:
        raise ShapeError(f"zigzag needs an even number of tokens a rank, got {q.shape[1]}: shard with layout='zigzag'")
    return q.shape[1] // 2


def attend(acc, q, k, v, part):
    """Add one block to the accumulator."""
    if part is not None:
        rows, columns, masked = part
        block = attention_block(q[:, rows], k[:, columns], v[:, columns], masked, return_lse=True)
        merge(tuple(a[:, rows] for a in acc), block)


def gradients(q, k, v, lse, d, grad_out, part):
    """(dq, dk, dv) of one block's visible part, or None."""
    if part is None:
        return None
    rows, columns, masked = part
    return backward_block(
        q[:, rows],
        k[:, columns],
        v[:, columns],
        None,
        lse[:, rows],
        grad_out[:, rows],
        masked,
        delta=d[:, rows],
    )


def add_gradients(dq, grads, block, part):
    """Add one block's gradients to the rows and columns they belong to."""
    if block is not None:
        rows, columns, _ = part
        for total, share in zip((dq[:, rows], *(g[:, columns] for g in grads)), block, strict=True):
            accumulate(total, share)


# ---- baselines -----------------------------------------------------------------------------------------------------


def blocking_ring_attention(comm, q, k, v, *, causal=False, layout="contiguous", return_lse=False):
    """The ring without overlap: compute, then pass on. What overlapping buys is the difference."""
    acc = empty_accumulator(q)
    for step in range(comm.size):
        attend(acc, q, k, v, visible(layout, causal, comm.rank, (comm.rank - step) % comm.size, q))
        if step < comm.size - 1:
            k, v = comm.ishift((k, v), by=1, tag="keys and values").wait()
    return finish(acc, q) if return_lse else finish(acc, q)[0]


def all_gather_attention(comm, q, k, v, *, causal=False, layout="contiguous", return_lse=False):
    """Gather all keys and values, then attend (Llama 3): the bytes of the ring, N times its memory for k and v."""
    k, v = (np.array_split(comm.all_gather(x, axis=1), comm.size, axis=1) for x in (k, v))  # a view for each holder
    acc = empty_accumulator(q)
    for holder in range(comm.size):
        attend(acc, q, k[holder], v[holder], visible(layout, causal, comm.rank, holder, q))
    return finish(acc, q) if return_lse else finish(acc, q)[0]


def bidirectional_attention(comm, q, k, v, *, causal=False, layout="contiguous", return_lse=False):
    """Half of the keys and values go one way round, half the other: both directions of every link, (N-1)/2·B in each.

    raises   ShapeError  striped and causal: half a stripe has no mask of this kind
    """
    if causal and layout == "striped":
        raise ShapeError("the bidirectional ring takes the contiguous and zigzag layouts")
    acc = empty_accumulator(q)
    up, down = _halves(k, v, causal and layout == "zigzag")
    for step in range(comm.size):
        last = step == comm.size - 1
        rising = None if last else comm.ishift(up, by=1, tag="keys and values up")
        falling = None if last else comm.ishift(down, by=-1, tag="keys and values down")
        if step == 0:
            attend(acc, q, k, v, visible(layout, causal, comm.rank, comm.rank, q))
        else:
            for (k, v), holder in ((up, comm.rank - step), (down, comm.rank + step)):
                part = visible(layout, causal, comm.rank, holder % comm.size, q)
                if part and layout == "zigzag" and causal and comm.rank > holder % comm.size:
                    part = (EVERYTHING, early(k), False)
                attend(acc, q, k, v, part)
        if not last:
            up, down = rising.wait(), falling.wait()
    return finish(acc, q) if return_lse else finish(acc, q)[0]


def _halves(k, v, zigzag):
    """Two halves by tokens; in zigzag, half of each chunk, so that both halves are causal neighbours of equal work."""
    n = k.shape[1]
    if not zigzag:
        return (k[:, : n // 2], v[:, : n // 2]), (k[:, n // 2 :], v[:, n // 2 :])
    if n % 4:
        raise ShapeError(f"halves of two zigzag chunks need tokens a rank in multiples of 4, got {n}")
    q = n // 4
    return tuple(
        tuple(concatenate((x[:, i * q : (i + 1) * q], x[:, (i + 2) * q : (i + 3) * q]), axis=1) for x in (k, v))
        for i in (0, 1)
    )


# ---- what it computes ------------------------------------------------------------------------------------------------


def block_plan(size, tokens, causal=False, layout="contiguous"):
    """Every block that `attention` computes, without running it.

    tokens    tokens of one rank
    returns   list of (step, rank, query owner, key owner, visible share of the block's tokens² scores)
    raises    ShapeError  unknown layout; zigzag with an odd number of tokens
    """
    local, plan = np.empty((1, tokens, 1)), []
    for step in range(size):
        for rank in range(size):
            holder = (rank - step) % size
            part = visible(layout, causal, rank, holder, local)
            if part is not None:
                rows, columns = (len(range(tokens)[among]) for among in part[:2])
                plan.append((step, rank, rank, holder, visible_area(rows, columns, part[2]) / tokens**2))
    return plan
