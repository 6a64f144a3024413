"""TokenRing: queries travel one way round, results come straight back; keys and values stay.

Every link has two directions and ring attention uses one. Here the queries move to the next rank in one direction, and
the block computed on them returns to their owner in the other, with its lse, while the next block is being computed.
The last block comes home in a tail that nothing hides.

Causal and zigzag: queries move downwards. A block wraps from rank 0 to rank N-1 once; after that only its late half is
still useful, so the early half is dropped: a quarter of the bytes, none of the time.

Bytes a rank sends, Q = bytes of q: (N-1)·Q one way and (N-1)·(Q + lse) the other. Keys and values never move; in the
backward pass, neither do their gradients (ours: the code that the authors publish has no backward pass).
Source: Wang et al. 2024, arXiv 2412.20501, and the code it publishes. Chapter: sequence_parallel/token_ring.
"""

from functools import partial

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
    sends        N-1 messages of queries to one neighbour; N-1 results, to the other ranks in turn
    raises       ShapeError, DtypeError
    """
    see = rule or partial(visible, layout, causal, q=q)
    by, wire = direction(causal, layout), (wire_dtype, None)
    acc, queries, returning = empty_accumulator(q), q, None
    for step in range(comm.size):
        owner = around(comm, -by * step)  # whose queries are here
        if step < comm.size - 1:
            useful = trimmed(queries, by, see(owner, around(comm, by)))
            passing = comm.ishift(useful, by=by, tag="queries", wire=wire_dtype)
        block = partial_result(queries, k, v, see(owner, comm.rank))
        if step == 0:  # one's own: home already
            take(acc, block, see(owner, comm.rank))
        if step > 1:
            take(acc, returning.wait(), see(comm.rank, around(comm, by * (step - 1))))
        if step < comm.size - 1:
            queries = passing.wait()
        if step > 0:  # straight home, while the next block is computed
            returning = comm.ishift(block, by=-by * step, tag="results", wire=wire)
    if comm.size > 1:  # the tail
        take(acc, returning.wait(), see(comm.rank, around(comm, -by)))
    return finish(acc, q) if return_lse else finish(acc, q)[0]


def attention_backward(comm, q, k, v, out, lse, grad_out, *, causal=False, layout="contiguous", wire_dtype=None):
    """Gradients of `attention`, by the same choreography: queries and all that belongs to them travel, dq comes home.

    out, lse   what `attention(…, return_lse=True)` gave          grad_out   shape of out
    returns    (dq, dk, dv), in float64 for float64 input and else float32
    sends      (q, grad_out, lse, delta) one way, dq the other; dk and dv are summed where k and v lie
    raises     ShapeError, DtypeError
    """
    see = partial(visible, layout, causal, q=q)
    by, wire = direction(causal, layout), (wire_dtype, wire_dtype, None, None)
    bundle, returning = (q, grad_out, lse, delta(grad_out, out)), None
    for step in range(comm.size):
        owner = around(comm, -by * step)
        if step < comm.size - 1:
            useful = tuple(trimmed(a, by, see(owner, around(comm, by))) for a in bundle)
            passing = comm.ishift(useful, by=by, tag="queries", wire=wire)
        block, *shares = partial_gradients(bundle, k, v, see(owner, comm.rank))
        if step == 0:
            dq, (dk, dv) = block, shares
        else:
            keep(dk, dv, shares, see(owner, comm.rank))
        if step > 1:
            add(dq, returning.wait(), see(comm.rank, around(comm, by * (step - 1))))
        if step < comm.size - 1:
            bundle = passing.wait()
        if step > 0:
            returning = comm.ishift(block, by=-by * step, tag="results", wire=wire_dtype)
    if comm.size > 1:  # the tail
        add(dq, returning.wait(), see(comm.rank, around(comm, -by)))
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
        rule = partial(_between, layout, causal, first, theirs, q)
        if not (causal and layout == "contiguous" and theirs > first):  # all of it lies in the future
            merge(acc, attention(inside, q, k, v, causal=causal, layout=layout, return_lse=True, rule=rule))
        if incoming:
            k, v = incoming.wait()
    return finish(acc, q) if return_lse else finish(acc, q)[0]


# ---- the pieces ------------------------------------------------------------------------------------------------------


def direction(causal, layout):
    """+1: queries move to the next rank. -1 in causal zigzag, where that lets early halves be dropped."""
    return -1 if causal and layout == "zigzag" else 1


def around(comm, hops):
    """The rank so many hops further round the ring."""
    return (comm.rank + hops) % comm.size


def _between(layout, causal, first, theirs, q, asks, holds):
    """`visible` between rank `asks` of the node that starts at rank `first` and `holds` of the one at `theirs`."""
    return visible(layout, causal, first + asks, theirs + holds, q)


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
    """(dq, dk, dv) of the visible part of a block; ((),) when nothing is visible."""
    q, grad_out, lse, d = bundle
    return gradients(q, k, v, lse, d, grad_out, part) or ((),)


def take(acc, block, part):
    """Merge a result into the rows it was computed for."""
    if part is not None:
        merge(tuple(a[:, part[0]] for a in acc), block)


def add(dq, block, part):
    """Add a returned dq to its rows: lse is global already, so gradients sum without rescaling."""
    if part is not None:
        accumulate(dq[:, part[0]], block)


def keep(dk, dv, shares, part):
    """Add one block's gradients to the columns that were visible."""
    if part is not None:
        for total, share in zip((dk, dv), shares, strict=True):
            accumulate(total[:, part[1]], share)


# ---- what it sends and what it takes ---------------------------------------------------------------------------------


def message_plan(size, causal=False):
    """Every message of `attention`, without data: causal means the zigzag layout.

    returns   list of (step, channel, source, dest, share of the owner's rows); the tail is step `size`
    """
    by, plan = direction(causal, "zigzag"), []
    for step in range(size):
        for rank in range(size):
            owner, ahead = (rank - by * step) % size, (rank + by) % size
            if step < size - 1:
                plan.append((step, "queries", rank, ahead, _useful(causal, owner, ahead)))
            if step > 0:
                plan.append((step + 1, "results", rank, owner, _useful(causal, owner, rank)))
    return sorted(plan)


def _useful(causal, asks, holds):
    """Share of the rows of rank `asks` that see keys of rank `holds`: in zigzag, of a later rank, the late half."""
    return 0.5 if causal and asks < holds else 1.0


def predict_time(size, compute, query, result):
    """Seconds of the forward pass on a full mesh, lock-step, without latency.

    compute   seconds of one step         query, result   seconds of the two messages on one link
    """
    if size == 1:
        return compute
    if size == 2:
        return max(compute, query) + compute + result
    return 2 * max(compute, query) + (size - 3) * max(compute, query, result) + max(compute, result) + result
