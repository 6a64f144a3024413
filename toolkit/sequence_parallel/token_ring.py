"""TokenRing: queries travel one way round, results come straight back; keys and values stay.

Every link has two directions and ring attention uses one. Here the queries move to the next rank in one direction, and
the block computed on them one step ago returns to their owner in the other, with its lse, while the next block is
being computed. The last block comes home in a tail that nothing hides.

Causal and zigzag: queries move downwards. A block wraps from rank 0 to rank N-1 once; after that only its late half is
still useful, so the early half is dropped: a quarter of the bytes, none of the time.

Bytes a rank sends, Q = bytes of q: (N-1)·Q one way and (N-1)·(Q + lse) the other. Keys and values never move; in the
backward pass, neither do their gradients (ours: the reference code has no backward pass, nor its causal hybrid).
Source: Wang et al. 2024, arXiv 2412.20501, and the code it publishes. Chapter: sequence_parallel/token_ring.
"""

from toolkit.kernels.attention import attention as attention_block
from toolkit.kernels.attention import delta, empty_accumulator, finish, merge
from toolkit.kernels.elementwise import accumulate
from toolkit.runtime.errors import ShapeError

from .ring_attention import gradients, visible



def attention(comm, q, k, v, *, causal=False, layout="contiguous", return_lse=False, wire_dtype=None, rule=None):
    """Exact attention over the tokens of all ranks, for the queries of this one.

    q            (heads, tokens, head_dim)      this rank's share of the tokens, in `layout`
    k, v         (kv_heads, tokens, head_dim)   same dtype; kv_heads divides heads
    wire_dtype   dtype that queries and results are rounded to on the way; lse keeps its own
    rule         (asks, holds) -> what is visible, when ranks are not what the layout numbers (see `hybrid_attention`)
    returns      out, shape and dtype of q; with return_lse also lse (heads, tokens), float32 or float64
    raises       ShapeError, DtypeError
    """
    rule = rule or (lambda asks, holds: visible(layout, causal, asks, holds, q))
    by, wire = direction(causal, layout), (wire_dtype, None)
    acc, queries, block = empty_accumulator(q), q, None
    for step in range(comm.size):
        owner = (comm.rank - by * step) % comm.size  # whose queries are here
        passing = results = None
        if step < comm.size - 1:
            useful = trimmed(queries, by, rule(owner, (comm.rank + by) % comm.size))
            passing = comm.ishift(useful, by=by, tag="queries", wire=wire_dtype)
        if step > 1:
            results = comm.ishift(block, by=by * (1 - step), tag="results", wire=wire)
        block = partial_result(queries, k, v, rule(owner, comm.rank))
        if step == 0:
            take(acc, block, rule(comm.rank, comm.rank))
        if results:
            take(acc, results.wait(), rule(comm.rank, (comm.rank + by * (step - 1)) % comm.size))
        if passing:
            queries = passing.wait()
    if comm.size > 1:  # the tail
        results = comm.ishift(block, by=by * (1 - comm.size), tag="results", wire=wire)
        take(acc, results.wait(), rule(comm.rank, (comm.rank - by) % comm.size))
    return finish(acc, q) if return_lse else finish(acc, q)[0]


def attention_backward(comm, q, k, v, out, lse, grad_out, *, causal=False, layout="contiguous", wire_dtype=None):
    """Gradients of `attention`, by the same choreography: queries and all that belongs to them travel, dq comes home.

    out, lse   what `attention(…, return_lse=True)` gave          grad_out   shape of out
    returns    (dq, dk, dv), in float64 for float64 input and else float32
    sends      (q, grad_out, lse, delta) one way, dq the other; dk and dv are summed where k and v lie
    """
    wire = (wire_dtype, wire_dtype, None, None)
    by = direction(causal, layout)
    bundle, block = (q, grad_out, lse, delta(grad_out, out)), None
    for step in range(comm.size):
        owner = (comm.rank - by * step) % comm.size
        passing = results = None
        if step < comm.size - 1:
            ahead = visible(layout, causal, owner, (comm.rank + by) % comm.size, q)
            passing = comm.ishift(tuple(trimmed(a, by, ahead) for a in bundle), by=by, tag="queries", wire=wire)
        if step > 1:
            results = comm.ishift(block, by=by * (1 - step), tag="results", wire=wire_dtype)
        part = visible(layout, causal, owner, comm.rank, q)
        if step == 0:
            dq, dk, dv = partial_gradients(bundle, k, v, part)
        else:
            block = ()
            if part is not None:
                block, *shares = partial_gradients(bundle, k, v, part)
                for total, share in zip((dk, dv), shares, strict=True):
                    accumulate(total[:, part[1]], share)
        if results:
            add(dq, results.wait(), visible(layout, causal, comm.rank, (comm.rank + by * (step - 1)) % comm.size, q))
        if passing:
            bundle = passing.wait()
    if comm.size > 1:  # the tail
        results = comm.ishift(block, by=by * (1 - comm.size), tag="results", wire=wire_dtype)
        add(dq, results.wait(), visible(layout, causal, comm.rank, (comm.rank - by) % comm.size, q))
    return dq, dk, dv


def hybrid_attention(comm, q, k, v, *, nodes, causal=False, layout="contiguous", return_lse=False):
    """Keys and values travel from node to node, TokenRing runs inside each node (ranks are numbered node by node).

    nodes    number of nodes; divides the number of ranks
    sends    (nodes-1) times the bytes of k and v between nodes, through every rank's own NIC
    raises   ShapeError, DtypeError
    """
    if nodes < 1 or comm.size % nodes:
        raise ShapeError(f"{comm.size} ranks do not divide into {nodes} nodes")
    per_node = comm.size // nodes
    node, place = divmod(comm.rank, per_node)
    inside = comm.group(range(node * per_node, (node + 1) * per_node))
    across = comm.group(range(place, comm.size, per_node))
    acc = empty_accumulator(q)
    for step in range(nodes):
        incoming = across.ishift((k, v), by=1, tag="keys and values") if step < nodes - 1 else None
        first, theirs = node * per_node, (node - step) % nodes * per_node
        rule = lambda asks, holds: visible(layout, causal, first + asks, theirs + holds, q)  # noqa: B023, E731
        if not (causal and layout == "contiguous" and theirs > first):  # all of it lies in the future
            block = attention(inside, q, k, v, causal=causal, layout=layout, return_lse=True, rule=rule)
            merge(acc, block)
        if incoming:
            k, v = incoming.wait()
    return finish(acc, q) if return_lse else finish(acc, q)[0]


# ---- the pieces ------------------------------------------------------------------------------------------------------


def direction(causal, layout):
    """+1: queries move to the next rank. -1 in causal zigzag, where that lets early halves be dropped."""
    return -1 if causal and layout == "zigzag" else 1


def trimmed(x, by, ahead):
    """The rows of a travelling array that the next rank, and so any later one, can still use."""
    return x[:, ahead[0]] if by < 0 else x


def partial_result(queries, k, v, part):
    """(out, lse) of the visible part of a block; () when nothing is visible."""
    if part is None:
        return ()
    rows, columns, masked = part
    return attention_block(queries[:, rows], k[:, columns], v[:, columns], masked, return_lse=True)


def partial_gradients(bundle, k, v, part):
    """(dq, dk, dv) of the visible part of a block."""
    q, grad_out, lse, d = bundle
    return gradients(q, k, v, lse, d, grad_out, part)


def take(acc, block, part):
    """Merge a result into the rows it was computed for."""
    if part is not None:
        merge(tuple(a[:, part[0]] for a in acc), block)


def add(dq, block, part):
    """Add a returned dq to its rows: lse is global already, so gradients sum without rescaling."""
    if part is not None:
        accumulate(dq[:, part[0]], block)


# ---- what it sends and what it takes ---------------------------------------------------------------------------------


def message_plan(size, causal=False):
    """Every message of `attention`, without data: causal means the zigzag layout.

    returns   list of (step, channel, source, dest, share of the owner's rows); the tail is step `size`
    """
    by, plan = (-1 if causal else 1), []
    for step in range(size):
        for rank in range(size):
            ahead = (rank + by) % size
            if step < size - 1:
                plan.append((step, "queries", rank, ahead, _share(size, causal, rank, ahead, step)))
            if 1 <= step:
                owner = (rank - by * step) % size
                plan.append((step + 1, "results", rank, owner, _share(size, causal, rank + by, rank, step)))
    return sorted(plan)


def _share(size, causal, rank, holds, step):
    """Rows of the block that `holds` will work on: half once its owner has a smaller number, in causal zigzag."""
    owner = (rank + step) % size
    return 0.5 if causal and owner < holds else 1.0


def predict_time(size, compute, query, result):
    """Seconds of the forward pass on a full mesh, lock-step, without latency.

    compute   seconds of one step         query, result   seconds of the two messages on one link
    """
    if size == 1:
        return compute
    if size == 2:
        return max(compute, query) + compute + result
    return 2 * max(compute, query) + (size - 3) * max(compute, query, result) + max(compute, result) + result
