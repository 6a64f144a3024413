"""BASED: a state of fixed size that recalls, from a second-order Taylor series of the exponential.

Softmax attention keeps every key and value. Replace exp(z) by 1 + z + z²/2 and the weight of a key becomes a product of
features, φ(q)·φ(k): the sum over the past, Σ φ(k) vᵀ, is then a state that does not grow. A short sliding window of
exact attention (`_based_mixers`) sees the last tokens. d' and the window move along the frontier of memory and recall.

Three views give the same numbers: quadratic (training), recurrent (decoding), chunked (prefill). Queries and keys are
(heads, tokens, d'), values (heads, tokens, d); leading axes may be more. The normaliser is what a value of always 1
would give, so the state holds it as its last column: (heads, D̃, d + 1), D̃ = 1 + d' + d'².

Source: Arora et al. 2024, arXiv 2402.18668, section 4, and the code it publishes. Chapter: attention/based.
"""

import numpy as np
from autograd.core import defvjp_argnums
from autograd.extend import primitive

from toolkit.runtime.errors import ShapeError

EPSILON = 1e-12  # weights are at least 1/2: it never matters, but the published code has it


def taylor_features(x, symmetric=False):
    """φ(x) = [1, x / d'^¼, vec(x xᵀ) / √(2 d')]: φ(q)·φ(k) = 1 + z + z²/2 with z = q·k / √d'.

    x          (…, d')
    symmetric  keep each pair a <= b once, with weight √2 off the diagonal: the same products, about half the size
    returns    (…, 1 + d' + d'²), or (…, 1 + d' + d' (d' + 1) / 2)
    """
    d = x.shape[-1]
    if d < 1:
        raise ShapeError("taylor_features: feature dimension d' is 0; it must be at least 1")
    if symmetric:
        a, b = np.triu_indices(d)
        pairs = x[..., a] * x[..., b] * np.where(a == b, 1, 2**0.5).astype(x.dtype)
    else:
        pairs = np.reshape(x[..., :, None] * x[..., None, :], (*x.shape[:-1], d * d))
    return np.concatenate([np.ones_like(x[..., :1]), x / d**0.25, pairs / (2 * d) ** 0.5], axis=-1)


def elu_features(x):
    """1 + elu(x), positive: the features of Katharopoulos et al. 2020. (…, d') -> (…, d')."""
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def scores(q, k):
    """z = q·k / √d' for every query and key. (…, n, d'), (…, m, d') -> (…, n, m)."""
    return q @ np.swapaxes(k, -1, -2) * q.shape[-1] ** -0.5


def with_ones(v, keep=None):
    """[v | 1]: the extra value whose sum is the normaliser. keep (…, tokens) of 0 and 1 takes padding out of both."""
    v = np.concatenate([v, np.ones_like(v[..., :1])], axis=-1)
    return v if keep is None else v * keep[..., None]


def normalised(sums):
    """Numerators over the normaliser in the last column. (…, d + 1) -> (…, d)."""
    return sums[..., :-1] / (sums[..., -1:] + EPSILON)


# ---- quadratic: all pairs, no features -------------------------------------------------------------------------------


def linear_attention(q, k, v, mask=None):
    """Attention with the weight 1 + z + z²/2 in place of exp(z). Never builds φ.

    q        (heads, n, d')       k   (heads, m, d')       v   (heads, m, d)
    mask     0/1 or bool, broadcast against (heads, n, m): which query sees which key; None: causal, n = m
    returns  (heads, n, d): convex combinations of the values seen; 0 where a query sees none
    raises   ShapeError
    """
    weights, _ = _weights(q, k, v, mask)
    return normalised(weights @ with_ones(v))


def linear_attention_backward(q, k, v, out, grad_out, mask=None):
    """Gradients (dq, dk, dv) of sum(grad_out * linear_attention(q, k, v, mask)), with out = that attention.

    dA_ij = dy_i·(v_j - y_i) / den_i,   dZ = dA (1 + Z) where seen,   dv_j = Σ_i A_ij dy_i / den_i.
    """
    weights, z = _weights(q, k, v, mask)
    grad_sums = grad_of_sums(out, grad_out, np.sum(weights, axis=-1, keepdims=True))
    seen = _mask(q, k, mask)
    grad_z = grad_sums @ np.swapaxes(with_ones(v), -1, -2) * (1 + z) * seen * q.shape[-1] ** -0.5
    dv = np.swapaxes(weights, -1, -2) @ grad_sums[..., :-1]
    return grad_z @ k, np.swapaxes(grad_z, -1, -2) @ q, dv


attention_to_train = primitive(linear_attention)  # the same, for losses that autograd differentiates
attention_to_train.__doc__ = "`linear_attention`, whose gradient autograd takes from `linear_attention_backward`."


def _to_train_vjp(argnums, out, args, options):
    q, k, v, *mask = args
    mask = mask[0] if mask else options.get("mask")

    def vjp(grad_out):
        gradients = linear_attention_backward(q, k, v, out, grad_out, mask)
        return tuple(gradients[i] for i in argnums)

    return vjp


defvjp_argnums(attention_to_train, _to_train_vjp)


def grad_of_sums(out, grad_out, normaliser):
    """Gradient of (…, d + 1) numerators and normaliser, from that of their quotient `out`."""
    scaled = grad_out / (normaliser + EPSILON)
    return np.concatenate([scaled, -np.sum(scaled * out, axis=-1, keepdims=True)], axis=-1)


def _weights(q, k, v, mask):
    check(q, k, v)
    z = scores(q, k)
    return (1 + z + z * z / 2) * _mask(q, k, mask), z


def _mask(q, k, mask):
    if mask is not None:
        return np.asarray(mask, dtype=q.dtype)
    if q.shape[-2] != k.shape[-2]:
        raise ShapeError(f"{q.shape[-2]} queries and {k.shape[-2]} keys: a causal mask needs as many; give mask=…")
    return np.tri(q.shape[-2], dtype=q.dtype)


# ---- recurrent: one token at a time ----------------------------------------------------------------------------------


def empty_state(k, v, features=taylor_features):
    """Σ φ(k) [v | 1]ᵀ over no keys: zeros (heads, D̃, d + 1), for keys and values like k and v."""
    size = features(k[..., :1, :]).shape[-1]
    return np.zeros((*k.shape[:-2], size, v.shape[-1] + 1), np.result_type(k, v))


def absorb(state, k, v, keep=None, features=taylor_features):
    """The state after more keys and values, in any number. A new array.

    state  (heads, D̃, d + 1)     k (heads, m, d')     v (heads, m, d)     keep (heads, m), 0 for padding: φ(0) is not 0
    """
    return state + np.swapaxes(features(k), -1, -2) @ with_ones(v, keep)


def read(state, q, features=taylor_features):
    """What queries (heads, n, d') recall from a state. (heads, n, d)."""
    return normalised(features(q) @ state)


def recurrent(q, k, v, state=None, keep=None, features=taylor_features):
    """The recurrence S_i = S_{i-1} + φ(k_i) v_iᵀ, y_i = φ(q_i) S_i over its normaliser, token by token.

    state    where to go on from; None: from nothing
    returns  (out (heads, tokens, d), state)
    """
    check(q, k, v)
    state = empty_state(k, v, features) if state is None else state
    out = np.empty((*q.shape[:-1], v.shape[-1]), np.result_type(q, v))
    for i in range(q.shape[-2]):
        now = slice(i, i + 1)
        state = absorb(state, k[..., now, :], v[..., now, :], None if keep is None else keep[..., now], features)
        out[..., now, :] = read(state, q[..., now, :], features)
    return out, state


# ---- chunked: quadratic inside a chunk, a state between chunks -------------------------------------------------------


def chunked(q, k, v, chunk=64, state=None, keep=None):
    """The prefill: chunks of tokens, φ never in memory. The rows of the state are the three orders of the series.

    chunk    tokens in a chunk; the last one may be shorter
    returns  (out (heads, tokens, d), state): equal to `recurrent`
    raises   ShapeError
    """
    check(q, k, v, chunk)
    state = empty_state(k, v) if state is None else state.copy()
    out = np.empty((*q.shape[:-1], v.shape[-1]), np.result_type(q, v))
    for now in chunks(q.shape[-2], chunk):
        queries, keys, values = q[..., now, :], k[..., now, :], with_ones(v[..., now, :], _part(keep, now))
        z = scores(queries, keys)
        inside = np.tril(1 + z + z * z / 2) @ values
        out[..., now, :] = normalised(inside + read_orders(state, queries))
        absorb_orders(state, keys, values)
    return out, state


def read_orders(state, q):
    """φ(q) @ state without φ(q): order 0, order 1, and order 2 one row q_a q of vec(q qᵀ) at a time."""
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


def chunked_backward(q, k, v, out, grad_out, chunk=64, state=None):
    """Gradients of sum(grad_out * chunked(q, k, v, chunk, state)[0]): a sweep back over the chunks that carries dS.

    out      what `chunked` gave       state   the one it started from
    returns  (dq, dk, dv, dstate)
    memory   one state a chunk: they are computed again on the way forward
    """
    check(q, k, v, chunk)
    past = [empty_state(k, v) if state is None else state]
    for now in chunks(q.shape[-2], chunk):
        past.append(past[-1].copy())
        absorb_orders(past[-1], k[..., now, :], with_ones(v[..., now, :]))
    dq, dk, dv, carry = np.empty_like(q), np.empty_like(k), np.empty_like(v), np.zeros_like(past.pop())
    for now in chunks(q.shape[-2], chunk)[::-1]:
        queries, keys, values, before = q[..., now, :], k[..., now, :], with_ones(v[..., now, :]), past.pop()
        z = scores(queries, keys)
        weights = np.tril(1 + z + z * z / 2)
        normaliser = (weights @ values + read_orders(before, queries))[..., -1:]
        grad_sums = grad_of_sums(out[..., now, :], grad_out[..., now, :], normaliser)
        grad_z = np.tril(grad_sums @ np.swapaxes(values, -1, -2) * (1 + z)) * q.shape[-1] ** -0.5
        dq[..., now, :] = grad_z @ keys + grad_read(before, queries, grad_sums)
        dk[..., now, :] = np.swapaxes(grad_z, -1, -2) @ queries + grad_read(carry, keys, values)
        dv[..., now, :] = (np.swapaxes(weights, -1, -2) @ grad_sums + read_orders(carry, keys))[..., :-1]
        absorb_orders(carry, queries, grad_sums)
    return dq, dk, dv, carry


def grad_read(state, x, grad):
    """Gradient of sum(grad * read_orders(state, x)) with respect to x; order 2 of a state is symmetric."""
    d = x.shape[-1]
    dx = grad @ np.swapaxes(state[..., 1 : 1 + d, :], -1, -2) / d**0.25
    for a in range(d):
        dx[..., a] += np.sum(x @ second_order(state, d, a) * grad, axis=-1) * 2 / (2 * d) ** 0.5
    return dx


def second_order(state, d, a):
    """The d' rows of the state that belong to x_a x."""
    return state[..., 1 + d + a * d : 1 + d + (a + 1) * d, :]


def chunks(tokens, chunk):
    return [slice(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk)]


def _part(keep, now):
    return None if keep is None else keep[..., now]


def check(q, k, v, chunk=1):
    """Refuse what no view can take, and say what was given."""
    if q.shape[-1] < 1 or q.shape[-1] != k.shape[-1]:
        raise ShapeError(f"linear attention: q has d' = {q.shape[-1]}, k {k.shape[-1]}; both need the same, at least 1")
    if k.shape[:-1] != v.shape[:-1] or q.shape[:-2] != k.shape[:-2]:
        raise ShapeError(f"linear attention: q {q.shape}, k {k.shape}, v {v.shape}: heads or numbers of keys differ")
    if chunk < 1:
        raise ShapeError(f"linear attention: a chunk of {chunk} tokens; give 1 or more")
