"""All-gather attention: bring all keys and values here, then attend in as few kernels as the mask allows.

What Llama 3 was trained with: simple, nothing to overlap, one large kernel. A rank's queries are one run of tokens
(contiguous) or two (zigzag); each run needs one kernel, on the keys up to its end. Nodes gather through all their NICs.

Bytes a rank sends, B = bytes of its k and v: forward (P-1)·B; backward (P-1)·B and (P-1) times the float32 gradients.
Source: Llama team 2024, arXiv 2407.21783, section 3.3.2. Chapter: sequence_parallel/which_sequence_parallelism.
"""

from toolkit.kernels.attention import delta, empty_accumulator, finish
from toolkit.runtime.algorithms import concatenate
from toolkit.runtime.errors import ShapeError

from ._two_level import all_gather, reduce_scatter
from .ring_attention import EVERYTHING, add_gradients, attend, gradients


def attention(comm, q, k, v, *, causal=False, layout="contiguous", return_lse=False):
    """Exact attention over the tokens of all ranks, for the queries of this one.

    q         (heads, tokens, head_dim)      this rank's share of the tokens, in `layout`; as many on every rank
    k, v      (kv_heads, tokens, head_dim)   same dtype; kv_heads divides heads
    layout    "contiguous", or "zigzag", which shares causal work evenly
    returns   out, shape and dtype of q; with return_lse also lse (heads, tokens), float32 or float64
    memory    all keys and values
    raises    ShapeError  a striped causal layout, whose tokens are no runs; zigzag with an odd number of tokens
    """
    keys, values = everything(comm, k, layout), everything(comm, v, layout)
    acc = empty_accumulator(q)
    for part in runs(comm, q.shape[1], causal, layout):
        attend(acc, q, keys, values, part)
    return finish(acc, q) if return_lse else finish(acc, q)[0]


def attention_backward(comm, q, k, v, out, lse, grad_out, *, causal=False, layout="contiguous"):
    """Gradients of `attention`: keys and values are gathered again, their gradients summed and scattered.

    out, lse   what `attention(…, return_lse=True)` gave          grad_out   shape of out
    returns    (dq, dk, dv), in float64 for float64 input and else float32
    """
    keys, values, d = everything(comm, k, layout), everything(comm, v, layout), delta(grad_out, out)
    dq, dk, dv = (empty_accumulator(x)[0] for x in (q, keys, values))
    for part in runs(comm, q.shape[1], causal, layout):
        add_gradients(dq, (dk, dv), gradients(q, keys, values, lse, d, grad_out, part), part)
    return dq, back_home(comm, dk, layout), back_home(comm, dv, layout)


def runs(comm, tokens, causal, layout):
    """[(rows, columns, masked), …] as `ring_attention.visible` has them, of keys in the order of tokens."""
    if not causal:
        return [(EVERYTHING, EVERYTHING, False)]
    if layout == "contiguous":
        return [(EVERYTHING, slice(tokens * (comm.rank + 1)), True)]
    if layout != "zigzag" or tokens % 2:
        raise ShapeError(f"all-gather attention takes contiguous and zigzag runs, not {tokens} tokens in {layout!r}")
    chunk, last = tokens // 2, 2 * comm.size - 1
    return [
        (slice(chunk), slice(chunk * (comm.rank + 1)), True),
        (slice(chunk, None), slice(chunk * (last - comm.rank + 1)), True),
    ]


def everything(comm, x, layout):
    """All ranks' (heads, tokens, d) in the order of tokens."""
    joined = all_gather(comm, x.transpose(1, 0, 2)).transpose(1, 0, 2)
    if layout == "contiguous":
        return joined
    last = 2 * comm.size - 1
    places = [2 * c if c < comm.size else 2 * (last - c) + 1 for c in range(last + 1)]
    return _in_chunks(joined, places)


def back_home(comm, grad, layout):
    """This rank's tokens of the sum of all ranks' (heads, all tokens, d): the adjoint of `everything`."""
    if layout != "contiguous":
        last = 2 * comm.size - 1
        grad = _in_chunks(grad, [c for rank in range(comm.size) for c in (rank, last - rank)])
    return reduce_scatter(comm, grad.transpose(1, 0, 2)).transpose(1, 0, 2)


def _in_chunks(x, order):
    """The chunks of x, (heads, tokens, d), in another order."""
    n = x.shape[1] // len(order)
    return concatenate(tuple(x[:, c * n : (c + 1) * n] for c in order), axis=1)
