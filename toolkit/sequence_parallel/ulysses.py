"""DeepSpeed-Ulysses: swap tokens for heads with an all-to-all, attend to everything, swap back.

Every rank holds a run of tokens, all heads. One all-to-all each for q, k and v gives it all tokens of a few heads; any
attention of one device then works unchanged, and a fourth all-to-all brings the result home. Of P ranks, each keeps 1/P
of what it has and sends the rest: more ranks with as many tokens each send hardly more.
There can be no more ranks than key heads, unless key heads are sent to several ranks.

All-to-all is its own adjoint with heads and tokens exchanged: the backward pass is four of them.
Arrays are (heads, tokens, head_dim), so what goes to one rank is one piece of memory, and what comes is joined along
tokens. Not in the paper: uneven head counts, key heads sent to several ranks and overlap (later versions of the
authors' code), and the mesh with ring attention (Fang and Zhao 2024, arXiv 2405.07719).
Source: Jacobs et al. 2023, arXiv 2309.14509, section 3. Chapter: sequence_parallel/ulysses.
"""

from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from toolkit.kernels.layers import cast
from toolkit.runtime import Cost, kernel, like
from toolkit.runtime.algorithms import concatenate
from toolkit.runtime.errors import ShapeError

from . import ring_attention
from ._block import Attention, exact, one_device


class Saved(NamedTuple):
    """What the backward pass needs. Cuts are a (start, stop) for each rank."""

    heads: list  # cuts of the query heads
    kv_heads: list  # cuts of the key heads; the same for several ranks where a head is sent to each of them
    tokens: list  # cuts of the tokens
    dtype: np.dtype
    inner: Attention
    kept: tuple  # by the inner attention


def forward(comm, q, k, v, *, inner, replicate_kv=False, uneven=False, overlap="none"):
    """Attention over the tokens of all ranks, for the queries of this one, and what `backward` needs.

    q             (heads, tokens, head_dim)     this rank's run of the tokens: layout "contiguous"
    k, v          (kv_heads, tokens, head_dim)  same dtype; kv_heads divides heads
    inner         Attention of one device: it gets all tokens of this rank's heads
    replicate_kv  where there are fewer key heads than ranks, send each to several ranks
    uneven        some ranks may get one key head more than others, or hold one token more
    overlap       "qkv_pipeline": each exchange starts when its array is there. q, k and v may be functions that make
                  them; then k travels while q is projected, and q while v is. "none": first make all, then exchange
    returns       (out, Saved): like q
    sends         (P-1)/P of the bytes of q, k, v and out, in four all-to-alls
    raises        ShapeError; ValueError for another overlap
    """
    if overlap not in ("none", "qkv_pipeline"):
        raise ValueError(f"overlap={overlap!r} is neither 'none' nor 'qkv_pipeline'")
    if overlap == "none":
        q, k, v = made(q), made(k), made(v)
    k = made(k)
    kv_cuts = kv_slices(k.shape[0], comm.size, replicate_kv, uneven)
    k_arrives = start_swap(comm, k, kv_cuts)
    q = made(q)
    q_cuts = query_slices(q.shape[0], k.shape[0], comm.size, kv_cuts, uneven)
    q_arrives = start_swap(comm, q, q_cuts)
    v_arrives = start_swap(comm, made(v), kv_cuts)
    local, dtype = q.shape[1], q.dtype
    q, k, v = q_arrives(), k_arrives(), v_arrives()
    token_cuts = token_slices(q.shape[1], local, comm, uneven)
    context, kept = inner.forward(comm, q, k, v)
    out = swap_heads(comm, context, token_cuts, inverse=True)
    return out, Saved(q_cuts, kv_cuts, token_cuts, dtype, inner, kept)


def backward(comm, saved, grad_out, *, overlap="none"):
    """Gradients of `forward`: the same four all-to-alls, each in the other direction.

    grad_out   like out
    returns    (dq, dk, dv) in the dtype of q; with overlap="qkv_pipeline" three functions that wait for them
    """
    grad = swap_heads(comm, grad_out, saved.heads)
    grads = saved.inner.backward(comm, saved.kept, grad)
    arriving = []
    for grad, cuts in zip(grads, (saved.heads, saved.kv_heads, saved.kv_heads), strict=True):
        arrives = start_swap(comm, cast(grad, saved.dtype), saved.tokens, inverse=True)
        arriving.append(partial(sum_copies, arrives, cuts[-1][1]))
    return tuple(arriving) if overlap == "qkv_pipeline" else tuple(arrives() for arrives in arriving)


def pair(*, causal=False, inner=None, overlap="none", **options):
    """Ulysses as the Attention of a block. `inner` and the other options: see `forward`."""
    inner = one_device(causal) if inner is None else inner
    ahead = partial(forward, inner=inner, overlap=overlap, **options)
    return Attention(ahead, partial(backward, overlap=overlap), lazy=overlap != "none")


# ---- the swap --------------------------------------------------------------------------------------------------------


def swap_heads(comm, x, cuts=None, *, inverse=False):
    """All heads of a few tokens for all tokens of a few heads, by one all-to-all. `inverse` goes back.

    x        (heads, n, head_dim)             this rank's tokens; inverse: (some heads, N, head_dim), all tokens
    cuts     (start, stop) for each rank      the heads that go to it; inverse: the tokens. None: equal runs
    returns  (some heads, N, head_dim)        tokens in rank order; inverse: (heads, n, head_dim), heads in rank order
    sends    all but this rank's own part: with equal runs (P-1)/P of the bytes of x
    raises   ShapeError
    """
    return start_swap(comm, x, cuts, inverse=inverse)()


def start_swap(comm, x, cuts=None, *, inverse=False):
    """Begin `swap_heads`. Returns the function that waits for it and gives its result."""
    if x.ndim != 3:
        raise ShapeError(f"swap_heads: x is {x.shape}: it must be (heads, tokens, head_dim)")
    cut, joined = (1, 0) if inverse else (0, 1)
    if cuts is None:
        cuts = even_slices(x.shape[cut], comm.size, "tokens" if inverse else "heads")
    coming = comm.iall_to_all([x[:, a:b] if inverse else x[a:b] for a, b in cuts])
    return lambda: concatenate(coming.wait(), axis=joined)


def head_slices(heads, size):
    """(start, stop) of each rank's run of heads; when they do not divide, the first ranks get one more."""
    ends = [rank * (heads // size) + min(rank, heads % size) for rank in range(size + 1)]
    return list(pairwise(ends))


def even_slices(count, size, what):
    """`head_slices` where a remainder is a mistake."""
    if count % size:
        raise ShapeError(f"{count} {what} do not divide among {size} ranks: pad, or pass uneven=True")
    return head_slices(count, size)


def kv_slices(kv_heads, size, replicate=False, uneven=False):
    """The key heads of each rank.

    raises   ShapeError  fewer than ranks without `replicate`, or not a divisor of them; a remainder without `uneven`
    """
    if kv_heads >= size:
        return head_slices(kv_heads, size) if uneven else even_slices(kv_heads, size, "key heads")
    if not replicate:
        raise ShapeError(
            f"{kv_heads} key heads are too few for {size} ranks: use at most {kv_heads}, combine with ring attention "
            "(hybrid_attention), or pass replicate_kv=True, which sends each key head to several ranks"
        )
    if size % kv_heads:
        raise ShapeError(f"{size} ranks cannot share {kv_heads} key heads evenly: use a multiple of {kv_heads} ranks")
    return [(rank * kv_heads // size, rank * kv_heads // size + 1) for rank in range(size)]


def query_slices(heads, kv_heads, size, kv_cuts, uneven=False):
    """The query heads of each rank: those that read its key heads, or its part of those that read its one key head."""
    if heads % kv_heads:
        raise ShapeError(f"{heads} query heads cannot share {kv_heads} key heads: the second must divide the first")
    if kv_heads < size or not uneven:
        return even_slices(heads, size, "query heads")
    group = heads // kv_heads
    return [(start * group, stop * group) for start, stop in kv_cuts]


def token_slices(tokens, local, comm, uneven=False):
    """The tokens of each rank, as `positions("contiguous", …)` numbers them; this rank must hold `local` of them."""
    cuts = head_slices(tokens, comm.size) if uneven else even_slices(tokens, comm.size, "tokens")
    start, stop = cuts[comm.rank]
    if stop - start != local:
        raise ShapeError(
            f"rank {comm.rank} of {comm.size} holds {local} of {tokens} tokens, and contiguous runs give it "
            f"{stop - start}: shard them with layout='contiguous'"
        )
    return cuts


def made(x):
    """The array, where x is a function that makes it."""
    return x() if callable(x) else x


def sum_copies(arrives, heads):
    """What arrives, with the gradients of a head that was sent to several ranks added up, once."""
    grad = arrives()
    return grad if len(grad) == heads else fold(grad, heads)


@kernel(
    cost=lambda x, heads: Cost(0, x.nbytes + x.nbytes * heads // x.shape[0]),
    out=lambda x, heads: like((heads, *x.shape[1:]), x.dtype),
)
def fold(x, heads):
    """(heads · copies, n, d) -> (heads, n, d): the sum over copies."""
    copies = x.reshape(heads, -1, *x.shape[1:])
    return copies.sum(axis=1, dtype=np.result_type(x, "float32")).astype(x.dtype, copy=False)


# ---- the siblings' signature -----------------------------------------------------------------------------------------


def attention(comm, q, k, v, *, causal=False, return_lse=False, **options):
    """`forward` of softmax attention as its siblings have it. Options: replicate_kv, uneven, overlap.

    returns   out, shape and dtype of q; with return_lse also lse (heads, tokens), by an all-to-all of its own
    """
    out, saved = forward(comm, q, k, v, inner=one_device(causal), **options)
    if not return_lse:
        return out
    *_, lse = saved.kept
    return out, swap_heads(comm, lse[..., None], saved.tokens, inverse=True)[..., 0]


def attention_backward(comm, q, k, v, out, lse, grad_out, *, causal=False, replicate_kv=False, uneven=False):
    """`backward` for a caller who kept what he handed in, as the siblings' callers do.

    sends     twice what `backward` does, and lse: q, k, v and out must be swapped again
    returns   (dq, dk, dv) in the dtype of q
    """
    kv_cuts = kv_slices(k.shape[0], comm.size, replicate_kv, uneven)
    q_cuts = query_slices(q.shape[0], k.shape[0], comm.size, kv_cuts, uneven)
    given = (q, q_cuts), (k, kv_cuts), (v, kv_cuts), (out, q_cuts), (lse[..., None], q_cuts)
    *kept, lse = [swap_heads(comm, x, cuts) for x, cuts in given]
    tokens = token_slices(lse.shape[1], q.shape[1], comm, uneven)
    saved = Saved(q_cuts, kv_cuts, tokens, q.dtype, one_device(causal), (*kept, lse[..., 0]))
    return backward(comm, saved, grad_out)


# ---- Ulysses inside a node, a ring across nodes ----------------------------------------------------------------------


def hybrid_attention(comm, q, k, v, *, nodes, causal=False, layout="contiguous", return_lse=False, **options):
    """The mesh: all-to-alls inside each node, keys and values of a rank's heads from node to node round a ring.

    nodes    number of nodes, whose ranks are numbered node by node; divides the number of ranks
    layout   of the nodes' tokens, each node's cut into runs for its ranks: see `hybrid_positions`
    sends    between nodes (nodes-1) times the keys and values of 1/size of all heads' … per rank; see `predict_bytes`
    """
    inside, inner = mesh(comm, nodes, causal, layout)
    out, saved = forward(inside, q, k, v, inner=inner, **options)
    if not return_lse:
        return out
    *_, lse = saved.kept
    return out, swap_heads(inside, lse[..., None], saved.tokens, inverse=True)[..., 0]


def mesh(comm, nodes, causal=False, layout="contiguous"):
    """(ranks of my node, the ring as the inner attention): what `forward` needs to be a hybrid."""
    if nodes < 1 or comm.size % nodes:
        raise ShapeError(f"{comm.size} ranks do not divide into {nodes} nodes")
    per_node = comm.size // nodes
    node, place = divmod(comm.rank, per_node)
    inside = comm.group(range(node * per_node, (node + 1) * per_node))
    across = comm.group(range(place, comm.size, per_node))
    ring = exact(ring_attention, causal=causal, layout=layout)
    return inside, Attention(
        lambda _, q, k, v: ring.forward(across, q, k, v),
        lambda _, saved, grad_out: ring.backward(across, saved, grad_out),
    )
