"""Ring attention without softmax: LASP-2's rivals, which move keys and values instead of states.

left    (Q Kᵀ) V for each block that passes by: what a ring made for softmax does. Quadratic in all tokens
right   Q (Kᵀ V): the same messages, but the products that linear attention allows. Linear in the tokens
Chapter: sequence_parallel/lasp2.
"""

from toolkit.kernels.elementwise import accumulate

from ._lasp2_kernels import (
    chunk_states,
    features,
    features_backward,
    finish,
    inside,
    inside_backward,
    pairs,
    pairs_backward,
    through,
    total,
)


def attention(comm, q, k, v, *, causal=True, feature_map="identity", chunks_per_rank=1, products="left"):
    """As `lasp2.attention`. Sends (N-1) times the bytes of k and v, in N-1 messages."""
    block, _ = PRODUCTS[products]
    q, k = features(q, feature_map), features(k, feature_map)
    for step in range(comm.size):
        incoming = comm.ishift((k, v), by=1, tag="keys and values") if step < comm.size - 1 else None
        if step == 0:
            sums = inside(q, k, v, _states(k, v, chunks_per_rank)) if causal else block(q, k, v)
        elif not causal or step <= comm.rank:  # the keys of rank - step, an earlier one
            accumulate(sums, block(q, k, v))
        if incoming:
            k, v = incoming.wait()
    return finish(sums, v, False)


def attention_backward(comm, q, k, v, grad_out, *, causal=True, feature_map="identity", chunks_per_rank=1,
                       products="left"):  # fmt: skip
    """(dq, dk, dv) of `attention`. Keys and values make N-1 hops, their gradients follow and make N."""
    _, block_backward = PRODUCTS[products]
    mine, travelling, fq, fk = (q, k), None, features(q, feature_map), features(k, feature_map)
    for step in range(comm.size):
        incoming = comm.ishift((fk, v), by=1, tag="keys and values") if step < comm.size - 1 else None
        if step == 0 and causal:
            states, grad_states = (_states(x, y, chunks_per_rank, 1) for x, y in ((fk, v), (fq, grad_out)))
            dq, *grads = inside_backward(fq, fk, v, states, grad_states, grad_out)
        elif step == 0:
            dq, *grads = block_backward(fq, fk, v, grad_out)
        else:
            block = block_backward(fq, fk, v, grad_out) if not causal or step <= comm.rank else None
            grads = travelling.wait()
            if block:
                for whole, share in zip((dq, *grads), block, strict=True):
                    accumulate(whole, share)
        if comm.size > 1:
            travelling = comm.ishift(tuple(grads), by=1, tag="gradients")
        if incoming:
            fk, v = incoming.wait()
    dk, dv = travelling.wait() if comm.size > 1 else grads
    return features_backward(mine[0], dq, feature_map), features_backward(mine[1], dk, feature_map), dv


def _states(k, v, chunks, at_least=2):
    """States of the chunks; None when a single chunk needs none."""
    return chunk_states(k, v, chunks) if chunks >= at_least else None


def right(q, k, v):
    """Q (Kᵀ V), the right product first."""
    return through(q, total(chunk_states(k, v)))


def right_backward(q, k, v, grad):
    """(dq, dk, dv) of `right`."""
    state, grad_state = total(chunk_states(k, v)), total(chunk_states(q, grad))
    return through(grad, state.swapaxes(1, 2)), through(v, grad_state.swapaxes(1, 2)), through(k, grad_state)


PRODUCTS = {"left": (pairs, pairs_backward), "right": (right, right_backward)}
