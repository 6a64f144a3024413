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
from typing import NamedTuple

import numpy as np

from toolkit.kernels.layers import cast
from toolkit.runtime import Cost, kernel, like, positions
from toolkit.runtime.algorithms import concatenate
from toolkit.runtime.errors import ShapeError

from . import ring_attention
from ._block import Attention, exact, one_device
from ._cuts import even_slices, kv_slices, query_slices, token_slices
from ._cuts import head_slices as head_slices  # part of the interface


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
    kv_heads, local, dtype = k.shape[0], k.shape[1], k.dtype
    kv_cuts = kv_slices(kv_heads, comm.size, replicate_kv, uneven)
    k = start_swap(comm, k, kv_cuts)
    q = made(q)
    q_cuts = query_slices(q.shape[0], kv_heads, comm.size, kv_cuts, uneven)
    q = start_swap(comm, q, q_cuts)
    v = start_swap(comm, made(v), kv_cuts)
    q = q()
    k = k()  # one at a time: what has been joined is let go
    v = v()
    token_cuts = token_slices(q.shape[1], local, comm, uneven)
    context, kept = inner.forward(comm, q, k, v)
    out = swap_heads(comm, context, token_cuts, inverse=True)
    return out, Saved(q_cuts, kv_cuts, token_cuts, dtype, inner, kept)


def backward(comm, saved, grad_out, *, overlap="none"):
    """Gradients of `forward`: the same four all-to-alls, each in the other direction.

    grad_out   like out
    returns    dq, dk, dv in the dtype of q. With overlap="qkv_pipeline" an iterator, which sends each while its caller
               uses the one before; it must be exhausted
    """
    grad = swap_heads(comm, grad_out, saved.heads)
    coming_home = going_home(comm, saved, saved.inner.backward(comm, saved.kept, grad))
    return coming_home if overlap == "qkv_pipeline" else tuple(coming_home)


def going_home(comm, saved, grads):
    """Swap dq, dk and dv back, one after the other; the next is under way before one is handed over."""
    grads = [cast(grad, saved.dtype) for grad in grads]
    coming = start_swap(comm, grads.pop(0), saved.tokens, inverse=True)
    for cuts in (saved.heads, saved.kv_heads, saved.kv_heads):
        grad = coming()
        if grads:
            coming = start_swap(comm, grads.pop(0), saved.tokens, inverse=True)
        heads = cuts[-1][1]
        yield grad if len(grad) == heads else sum_copies(grad, heads)


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


def made(x):
    """The array, where x is a function that makes it."""
    return x() if callable(x) else x


@kernel(
    cost=lambda x, heads: Cost(0, x.nbytes + x.nbytes * heads // x.shape[0]),
    out=lambda x, heads: like((heads, *x.shape[1:]), x.dtype),
)
def sum_copies(x, heads):
    """(heads · copies, n, d) -> (heads, n, d): the gradient of a key head that was sent to several ranks, once."""
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
    """All-to-alls inside each node; the keys and values of a rank's heads pass from node to node round a ring.

    q, k, v   this rank's tokens: its run of its node's, which are the node's share in `layout` (`hybrid_positions`)
    nodes     number of nodes, whose ranks are numbered node by node. Their size, not P, is bounded by the key heads
    returns   as `attention`
    sends     between nodes (nodes-1) times the bytes of this rank's k and v; inside, what Ulysses of one node does
    raises    ShapeError
    """
    inside, ring = mesh(comm, nodes, causal, layout)
    out, saved = forward(inside, q, k, v, inner=ring, **options)
    if not return_lse:
        return out
    *_, lse = saved.kept
    return out, swap_heads(inside, lse[..., None], saved.tokens, inverse=True)[..., 0]


def hybrid_pair(*, nodes, causal=False, layout="contiguous", **options):
    """The hybrid as the Attention of a block."""

    def ahead(comm, q, k, v):
        inside, ring = mesh(comm, nodes, causal, layout)
        out, saved = forward(inside, q, k, v, inner=ring, **options)
        return out, (inside, saved)

    return Attention(ahead, lambda _comm, saved, grad_out: backward(*saved, grad_out))


def mesh(comm, nodes, causal=False, layout="contiguous"):
    """The two axes of the mesh: (communicator of this node, ring attention between the nodes as an Attention)."""
    if nodes < 1 or comm.size % nodes:
        raise ShapeError(f"{comm.size} ranks do not divide into {nodes} nodes")
    node, place = divmod(comm.rank, comm.size // nodes)
    numbers = np.arange(comm.size).reshape(nodes, -1)
    inside, across = comm.group(numbers[node].tolist()), comm.group(numbers[:, place].tolist())
    ring = exact(ring_attention, causal=causal, layout=layout)
    return inside, Attention(
        lambda _inside, *qkv: ring.forward(across, *qkv),
        lambda _inside, saved, grad_out: ring.backward(across, saved, grad_out),
    )


def hybrid_positions(layout, rank, nodes, size, n):
    """Global indices that a rank of the hybrid holds: its run of its node's tokens. See `toolkit.runtime.positions`."""
    node, place = divmod(rank, size // nodes)
    whole = positions(layout, node, nodes, n)
    return whole[positions("contiguous", place, size // nodes, len(whole))]


# ---- what it sends ---------------------------------------------------------------------------------------------------


def predict_bytes(tokens, heads, kv_heads, head_dim, itemsize, ranks, scheme="ulysses"):
    """Bytes that a rank sends for one layer; exact where everything divides.

    scheme    "ulysses" (key heads sent to several ranks if there are fewer than ranks), "megatron" or "ring"
    returns   {"forward": int, "backward": int}
    raises    ValueError  unknown scheme
    """
    local = tokens // ranks * head_dim * itemsize  # one head of a rank's tokens
    if scheme == "ulysses":
        swapped = local * (2 * heads + 2 * max(kv_heads, ranks)) * (ranks - 1) // ranks
        return {"forward": swapped, "backward": swapped}
    if scheme == "megatron":
        hidden = local * heads * (ranks - 1)
        return {"forward": 4 * hidden, "backward": 6 * hidden}
    if scheme == "ring":
        block = 2 * local * kv_heads
        return {"forward": (ranks - 1) * block, "backward": (ranks - 1) * block + ranks * block * max(1, 4 // itemsize)}
    raise ValueError(f"scheme={scheme!r} is not one of ulysses, megatron, ring")


def predict_hybrid_bytes(tokens, heads, kv_heads, head_dim, itemsize, ranks, nodes):
    """Bytes that a rank of the hybrid sends forward, for one layer: {"inside": int, "across": int}.

    raises   ShapeError  a mesh that is not legal: heads or key heads do not divide among a node's ranks
    """
    per_node = ranks // nodes
    query_slices(heads, kv_heads, per_node, kv_slices(kv_heads, per_node))
    inside = predict_bytes(tokens // nodes, heads, kv_heads, head_dim, itemsize, per_node)["forward"]
    return {"inside": inside, "across": (nodes - 1) * 2 * kv_heads * (tokens // ranks) * head_dim * itemsize}
