"""BASED: a state of fixed size that recalls, from a second-order Taylor series of the exponential.

Softmax attention keeps every key and value. Replace exp(z) by 1 + z + z²/2 and the weight of a key becomes a product of
features, φ(q)·φ(k): the sum over the past, Σ φ(k) vᵀ, is a state that does not grow. A short sliding window of exact
attention sees the last tokens. Feature dimension d' and window w move along the frontier of memory and recall.

Three views give the same numbers: quadratic (training), recurrent (decoding), chunked (prefill; in
`kernels.linear_attention`). Queries and keys are (heads, tokens, d'), values (heads, tokens, d); there may be more
leading axes, such as a batch. The normaliser is what a value of always 1 would give, so the state holds it as its last
column: (heads, D̃, d + 1) with D̃ = 1 + d' + d'².

Source: Arora et al. 2024, arXiv 2402.18668, and the code it publishes. Chapter: attention/based.
"""

import autograd.numpy as np  # features and sums may be differentiated
from autograd.core import defvjp_argnums
from autograd.extend import primitive

from toolkit.kernels.linear_attention import (
    check,
    check_causal,
    chunked,
    chunked_backward,
    grad_of_sums,
    normalised,
    scores,
    weight,
    with_ones,
)
from toolkit.learn.layers import softmax_attention
from toolkit.runtime.errors import ShapeError

__all__ = [
    "absorb",
    "attention_to_train",
    "cached_attention",
    "chunked",
    "chunked_backward",
    "elu_features",
    "empty_cache",
    "empty_state",
    "linear_attention",
    "linear_attention_backward",
    "read",
    "recurrent",
    "same_features",
    "taylor_features",
]

# ---- features --------------------------------------------------------------------------------------------------------


def taylor_features(x, symmetric=False):
    """φ(x) = [1, x / d'^¼, vec(x xᵀ) / √(2 d')]: φ(q)·φ(k) = 1 + z + z²/2 with z = q·k / √d'.

    x          (…, d')
    symmetric  keep each pair a <= b once, with weight √2 off the diagonal: the same products, about half the size
    returns    (…, 1 + d' + d'²), or (…, 1 + d' + d' (d' + 1) / 2)
    raises     ShapeError  d' is 0
    """
    d = x.shape[-1]
    if d < 1:
        raise ShapeError("taylor_features: the feature dimension d' is 0; it must be at least 1")
    if symmetric:
        a, b = np.triu_indices(d)
        pairs = x[..., a] * x[..., b] * np.where(a == b, 1, 2**0.5).astype(x.dtype)
    else:
        pairs = np.reshape(x[..., :, None] * x[..., None, :], (*x.shape[:-1], d * d))
    return np.concatenate([np.ones_like(x[..., :1]), x / d**0.25, pairs / (2 * d) ** 0.5], axis=-1)


def elu_features(x):
    """1 + elu(x), positive: the features of Katharopoulos et al. 2020, a rival. (…, d') -> (…, d')."""
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def same_features(x):
    """x itself, a rival: weights q·k, which may be negative. (…, d') -> (…, d')."""
    return x


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
    grad_z = grad_sums @ np.swapaxes(with_ones(v), -1, -2) * (1 + z) * _mask(q, k, mask) * q.shape[-1] ** -0.5
    dv = np.swapaxes(weights, -1, -2) @ grad_sums[..., :-1]
    return grad_z @ k, np.swapaxes(grad_z, -1, -2) @ q, dv


def _weights(q, k, v, mask):
    check(q, k, v)
    z = scores(q, k)
    return weight(z) * _mask(q, k, mask), z


def _mask(q, k, mask):
    if mask is not None:
        return np.asarray(mask, dtype=q.dtype)
    check_causal(q, k)
    return np.tri(q.shape[-2], dtype=q.dtype)


attention_to_train = primitive(linear_attention)
attention_to_train.__doc__ = "`linear_attention` for autograd: its gradient is `linear_attention_backward`."


def _vjp(argnums, out, args, options):
    def vjp(grad_out):
        gradients = linear_attention_backward(*args[:3], out, grad_out, *args[3:], **options)
        return tuple(gradients[i] for i in argnums)

    return vjp


defvjp_argnums(attention_to_train, _vjp)

# ---- recurrent: a state, one token at a time -------------------------------------------------------------------------


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
    """What queries (heads, n, d') recall from a state. (heads, n, d). Raises ShapeError without a state."""
    if state is None:
        raise ShapeError("read: there is no state yet; prefill first (chunked), or start from empty_state(k, v)")
    return normalised(features(q) @ state)


def recurrent(q, k, v, state=None, keep=None, features=taylor_features):
    """The recurrence S_i = S_{i-1} + φ(k_i) v_iᵀ, y_i = φ(q_i) S_i over its normaliser, token by token.

    state    where to go on from; None: from nothing
    returns  (out (heads, tokens, d), state)
    """
    check(q, k, v)
    check_causal(q, k)
    state = empty_state(k, v, features) if state is None else state
    out = np.empty(v.shape, np.result_type(q, v))
    for i in range(q.shape[-2]):
        now = slice(i, i + 1)
        state = absorb(state, k[..., now, :], v[..., now, :], None if keep is None else keep[..., now], features)
        out[..., now, :] = read(state, q[..., now, :], features)
    return out, state


# ---- the window: exact attention to the last tokens ------------------------------------------------------------------


def empty_cache(k, v, window=None):
    """(keys, values, tokens seen) before the first token, for keys and values like k and v.

    window   slots of a ring buffer, which is what it will always hold; None: a cache that grows with every token
    raises   ShapeError  window < 1
    """
    if window is not None and window < 1:
        raise ShapeError(f"a window of {window} tokens does not hold the token itself; give 1 or more")
    slots = window or 0
    return (*(np.zeros((*a.shape[:-2], slots, a.shape[-1]), a.dtype) for a in (k, v)), 0)


def cached_attention(cache, q, k, v, window=None):
    """Softmax attention of new tokens, in any number, to themselves and to what the cache holds.

    q, k     (heads, m, d')       v   (heads, m, d)
    window   as given to `empty_cache`: a token sees the last `window` ones, itself included
    returns  (out (heads, m, d), cache): token t of a ring lies in slot t mod window
    """
    if cache is None:
        raise ShapeError("cached_attention: there is no cache yet; start from empty_cache(k, v, window)")
    keys, values, seen = cache
    old, new = keys.shape[-2] if window is None else min(seen, window), k.shape[-2]
    in_order = np.arange(seen - old, seen) % max(1, keys.shape[-2])
    all_keys = np.concatenate([keys[..., in_order, :], k], axis=-2)
    all_values = np.concatenate([values[..., in_order, :], v], axis=-2)
    visible = np.tri(new, old + new, old, dtype=bool)
    if window is None:
        return softmax_attention(q, all_keys, all_values, visible), (all_keys, all_values, seen + new)
    visible &= ~np.tri(new, old + new, old - window, dtype=bool)
    out = softmax_attention(q, all_keys, all_values, visible)
    last = np.arange(max(0, new - window), new)
    keys, values = keys.copy(), values.copy()
    keys[..., (seen + last) % window, :], values[..., (seen + last) % window, :] = k[..., last, :], v[..., last, :]
    return out, (keys, values, seen + new)
