"""Linear attention with the Taylor features of order two, in chunks: the features never reach slow memory.

Inside a chunk all pairs are weighed by 1 + z + z²/2; between chunks a state carries Σ φ(k) [v | 1]ᵀ. Its rows are the
three orders of the series: 1 row, d' rows, d'² rows. Order 2 is applied one row q_a q of vec(q qᵀ) at a time.

Queries and keys are (…, tokens, d'), values (…, tokens, d), with the same leading axes: heads, or batch and heads. The
last column of the state is the normaliser, what a value of always 1 would give: (…, 1 + d' + d'², d + 1).
Source: Arora et al. 2024, arXiv 2402.18668. Chapter: attention/based.
"""

from math import prod

import autograd.numpy as np  # the small pieces may be differentiated

from toolkit.runtime.arrays import like
from toolkit.runtime.errors import ShapeError
from toolkit.runtime.kernel import Cost, kernel

EPSILON = 1e-12  # weights are at least 1/2, so it never matters; the published code has it


def state_shape(k, v):
    """(…, D̃, d + 1), for keys and values like k and v."""
    d = k.shape[-1]
    return (*k.shape[:-2], 1 + d + d * d, v.shape[-1] + 1)


def _prefill_flops(q, v, chunk):
    """Products: scores and values of the pairs inside a chunk; three orders read and three written."""
    rows, tokens, d, width = prod(q.shape[:-2]), q.shape[-2], q.shape[-1], v.shape[-1] + 1
    pairs = sum(m * (m + 1) // 2 for m in (now.stop - now.start for now in chunks(tokens, chunk)))
    return rows * (2 * pairs * (d + width) + 2 * 2 * tokens * (1 + d + d * d) * width)


def _prefill_cost(q, k, v, chunk=64, state=None, keep=None):
    check(q, k, v, chunk)
    mask = 0 if keep is None else keep.nbytes
    started = 0 if state is None else state.nbytes
    finished = prod(state_shape(k, v)) * v.dtype.itemsize
    return Cost(_prefill_flops(q, v, chunk), q.nbytes + k.nbytes + 2 * v.nbytes + mask + started + finished)


def _prefill_out(q, k, v, chunk=64, state=None, keep=None):
    check(q, k, v, chunk)
    return like(v), like(state_shape(k, v), v.dtype)


@kernel(cost=_prefill_cost, out=_prefill_out)
def chunked(q, k, v, chunk=64, state=None, keep=None):
    """Causal linear attention over all tokens, and the state after them: the prefill.

    q, k     (…, tokens, d')          v   (…, tokens, d), the same float dtype
    chunk    tokens in a chunk; the last one may be shorter. Changes the work, not the result
    state    (…, D̃, d + 1), where to go on from; None: from nothing
    keep     (…, tokens) of 0 and 1: 0 takes a token's features out, as padding needs: φ(0) is not 0
    returns  (out (…, tokens, d), state)
    costs    reads q, k, v and writes out once; the state stays in fast memory until the end
    raises   ShapeError
    """
    check(q, k, v, chunk)
    check_causal(q, k)
    state = np.zeros(state_shape(k, v), np.result_type(k, v)) if state is None else state.copy()
    out = np.empty(v.shape, np.result_type(q, v))
    for now in chunks(q.shape[-2], chunk):
        queries, keys = q[..., now, :], k[..., now, :]
        values = with_ones(v[..., now, :], None if keep is None else keep[..., now])
        inside = np.tril(weight(scores(queries, keys))) @ values
        out[..., now, :] = normalised(inside + read_orders(state, queries))
        absorb_orders(state, keys, values)
    return out, state


def chunked_backward(q, k, v, out, grad_out, chunk=64, state=None):
    """Gradients of sum(grad_out * chunked(q, k, v, chunk, state)[0]): a sweep back over the chunks that carries dS.

    out      what `chunked` gave       state   the one it started from
    returns  (dq, dk, dv, dstate)
    memory   one state a chunk, computed again on the way forward
    """
    check(q, k, v, chunk)
    past = [np.zeros(state_shape(k, v), np.result_type(k, v)) if state is None else state]
    for now in chunks(q.shape[-2], chunk):
        past.append(past[-1].copy())
        absorb_orders(past[-1], k[..., now, :], with_ones(v[..., now, :]))
    dq, dk, dv, carry = np.empty_like(q), np.empty_like(k), np.empty_like(v), np.zeros_like(past.pop())
    for now in chunks(q.shape[-2], chunk)[::-1]:
        queries, keys, values, before = q[..., now, :], k[..., now, :], with_ones(v[..., now, :]), past.pop()
        z = scores(queries, keys)
        weights = np.tril(weight(z))
        normaliser = (weights @ values + read_orders(before, queries))[..., -1:]
        grad_sums = grad_of_sums(out[..., now, :], grad_out[..., now, :], normaliser)
        grad_z = np.tril(grad_sums @ np.swapaxes(values, -1, -2) * (1 + z)) * q.shape[-1] ** -0.5
        dq[..., now, :] = grad_z @ keys + grad_read(before, queries, grad_sums)
        dk[..., now, :] = np.swapaxes(grad_z, -1, -2) @ queries + grad_read(carry, keys, values)
        dv[..., now, :] = (np.swapaxes(weights, -1, -2) @ grad_sums + read_orders(carry, keys))[..., :-1]
        absorb_orders(carry, queries, grad_sums)
    return dq, dk, dv, carry


# ---- the pieces ------------------------------------------------------------------------------------------------------


def scores(q, k):
    """z = q·k / √d' for every query and key. (…, n, d'), (…, m, d') -> (…, n, m)."""
    return q @ np.swapaxes(k, -1, -2) * q.shape[-1] ** -0.5


def weight(z):
    """exp(z) to second order: (1 + (1 + z)²) / 2, at least 1/2."""
    return 1 + z + z * z / 2


def with_ones(v, keep=None):
    """[v | 1]: the extra value whose sum is the normaliser. keep (…, tokens) of 0 and 1 takes padding out of both."""
    v = np.concatenate([v, np.ones_like(v[..., :1])], axis=-1)
    return v if keep is None else v * keep[..., None]


def normalised(sums):
    """Numerators over the normaliser in the last column. (…, d + 1) -> (…, d)."""
    return sums[..., :-1] / (sums[..., -1:] + EPSILON)


def grad_of_sums(out, grad_out, normaliser):
    """Gradient of (…, d + 1) numerators and normaliser, from that of their quotient `out`."""
    scaled = grad_out / (normaliser + EPSILON)
    return np.concatenate([scaled, -np.sum(scaled * out, axis=-1, keepdims=True)], axis=-1)


def read_orders(state, q):
    """φ(q) @ state without φ(q): order 0, order 1, and order 2 row by row."""
    d = q.shape[-1]
    sums = state[..., :1, :] + q @ state[..., 1 : 1 + d, :] / d**0.25
    for a in range(d):
        sums = sums + q[..., a : a + 1] * (q @ second_order(state, d, a)) / (2 * d) ** 0.5
    return sums


def absorb_orders(state, k, values):
    """state += φ(k)ᵀ @ values without φ(k), in place."""
    d, transposed = k.shape[-1], np.swapaxes(k, -1, -2)
    state[..., :1, :] += np.sum(values, axis=-2, keepdims=True)
    state[..., 1 : 1 + d, :] += transposed @ values / d**0.25
    for a in range(d):
        second_order(state, d, a)[...] += transposed @ (k[..., a : a + 1] * values) / (2 * d) ** 0.5


def grad_read(state, x, grad):
    """Gradient of sum(grad * read_orders(state, x)) with respect to x; order 2 of a state is symmetric."""
    d = x.shape[-1]
    dx = grad @ np.swapaxes(state[..., 1 : 1 + d, :], -1, -2) / d**0.25
    for a in range(d):
        dx[..., a] += np.sum(x @ second_order(state, d, a) * grad, axis=-1) * 2 / (2 * d) ** 0.5
    return dx


def second_order(state, d, a):
    """The d' rows of the state that belong to x_a x; a view."""
    return state[..., 1 + d + a * d : 1 + d + (a + 1) * d, :]


def chunks(tokens, chunk):
    """Slices of `chunk` tokens, the last one what remains."""
    return [slice(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk)]


def check_causal(q, k):
    """Refuse a causal mask over different numbers of queries and keys."""
    if q.shape[-2] != k.shape[-2]:
        raise ShapeError(f"{q.shape[-2]} queries and {k.shape[-2]} keys: a causal mask needs as many of both")


def check(q, k, v, chunk=1):
    """Refuse what no view can take, and say what was given."""
    if q.shape[-1] < 1 or q.shape[-1] != k.shape[-1]:
        raise ShapeError(f"linear attention: q has d' = {q.shape[-1]}, k {k.shape[-1]}; both need the same, at least 1")
    if k.shape[:-1] != v.shape[:-1] or q.shape[:-2] != k.shape[:-2]:
        raise ShapeError(f"linear attention: q {q.shape}, k {k.shape}, v {v.shape}: heads or numbers of keys differ")
    if chunk < 1:
        raise ShapeError(f"linear attention: a chunk of {chunk} tokens; give 1 or more")
