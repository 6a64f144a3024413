"""Three layers of causal attention: grouped, with factored keys and values, and latent; what TransMLA converts between.

Weights are stored by head: queries are x @ w_q, (heads, tokens, head_dim). Plane l of a head is its coordinates l and
l + head_dim / 2. Everything is differentiable by autograd, for x (…, tokens, hidden) of any float dtype.
"""

from typing import NamedTuple

import autograd.numpy as np

from toolkit.learn.layers import softmax_attention
from toolkit.runtime.errors import ShapeError


class GQA(NamedTuple):
    """Weights of a layer of grouped-query attention; query head h reads key head h // (heads / kv_heads).

    w_q    (heads, hidden, head_dim)       w_k, w_v   (kv_heads, hidden, head_dim)
    w_o    (heads, head_dim, hidden)       theta      (head_dim / 2,) radians a token, one a plane; zeros: no RoPE
    """

    w_q: np.ndarray
    w_k: np.ndarray
    w_v: np.ndarray
    w_o: np.ndarray
    theta: np.ndarray


class FactoredKV(NamedTuple):
    """A layer whose keys and values are made of two latents, x @ down, by head. Keys are turned after `up_k`.

    w_q, w_o, theta   as in GQA
    down_k, down_v    (hidden, rank)       up_k, up_v   (heads, rank, head_dim)
    """

    w_q: np.ndarray
    down_k: np.ndarray
    up_k: np.ndarray
    down_v: np.ndarray
    up_v: np.ndarray
    w_o: np.ndarray
    theta: np.ndarray


class MLA(NamedTuple):
    """Weights of a layer of multi-head latent attention with decoupled RoPE, as DeepSeek's.

    w_q        (heads, hidden, head_dim)    queries of the keys without position
    w_q_rope   (heads, hidden, rope_dims)   queries of the one rotating key that all heads share
    w_k_rope   (hidden, rope_dims)          that key
    down       (hidden, rank)               the latent c
    up_k, up_v (heads, rank, head_dim)      c to keys and values
    w_o        (heads, head_dim, hidden)    theta   (rope_dims / 2,)
    """

    w_q: np.ndarray
    w_q_rope: np.ndarray
    w_k_rope: np.ndarray
    down: np.ndarray
    up_k: np.ndarray
    up_v: np.ndarray
    w_o: np.ndarray
    theta: np.ndarray


# ---- what the layers compute -----------------------------------------------------------------------------------------
# x (…, tokens, hidden) -> the same shape.


def grouped_attention(gqa, x):
    """The original: keys and values are cached, and each is read by a group of query heads."""
    q, k, v = (by_head(x, w) for w in (gqa.w_q, gqa.w_k, gqa.w_v))
    return attend(rope(q, gqa.theta), rope(k, gqa.theta), v, gqa.w_o)


def factored_attention(layer, x):
    """Two latents are cached. Every head has its own keys and values, so RoPE cannot be absorbed: it comes after."""
    q = by_head(x, layer.w_q)
    k, v = by_head(x @ layer.down_k, layer.up_k), by_head(x @ layer.down_v, layer.up_v)
    return attend(rope(q, layer.theta), rope(k, layer.theta), v, layer.w_o)


def latent_attention(mla, x):
    """One latent and one rotating key are cached; keys and values are expanded, as in training and prefill."""
    c, q, turning_q = x @ mla.down, by_head(x, mla.w_q), rope(by_head(x, mla.w_q_rope), mla.theta)
    k, v, turning_k = by_head(c, mla.up_k), by_head(c, mla.up_v), rope(by_head(x, mla.w_k_rope[None]), mla.theta)
    turning_k = np.repeat(turning_k, q.shape[-3], axis=q.ndim - 3)  # one key for all heads
    return attend(np.concatenate([q, turning_q], -1), np.concatenate([k, turning_k], -1), v, mla.w_o)


def attend(q, k, v, w_o):
    """Softmax attention, scores over the root of a *value's* dimension, and the output projection of all heads.

    However many coordinates a conversion spreads the query over, the score is the original's and so is its scale.
    """
    axis = q.ndim - 3  # counted from the front: autograd's gradient of `repeat` needs it so
    k, v = (np.repeat(a, group_size(q.shape[axis], a.shape[axis]), axis) for a in (k, v))
    out = np.swapaxes(softmax_attention(q, k, v, scale=v.shape[-1] ** -0.5), -3, -2)
    return np.reshape(out, (*out.shape[:-2], -1)) @ np.reshape(w_o, (-1, w_o.shape[-1]))


def by_head(x, w):
    """x @ w for every head: (…, tokens, hidden), (heads, hidden, d) -> (…, heads, tokens, d), in one product."""
    y = x @ side_by_side(w)
    return np.swapaxes(np.reshape(y, (*y.shape[:-1], w.shape[0], w.shape[2])), -3, -2)


def side_by_side(w):
    """(heads, hidden, d) -> (hidden, heads · d)."""
    return np.reshape(np.swapaxes(w, 0, 1), (w.shape[1], -1))


def group_size(heads, kv_heads):
    """Query heads a key head. ShapeError if they do not share out."""
    if heads % kv_heads:
        raise ShapeError(f"{heads} query heads cannot share {kv_heads} key heads: take a number that divides {heads}")
    return heads // kv_heads


def rope(x, theta, first=0):
    """Turn plane l, coordinates l and l + d / 2, of token t by (first + t) · theta[l]. x (…, tokens, d)."""
    angle = (first + np.arange(x.shape[-2]))[:, None] * np.tile(theta, 2)
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    quarter = np.kron(np.array([[0, 1], [-1, 0]]), np.eye(theta.size)).astype(x.dtype)  # (a, b) -> (-b, a)
    return x * cos + x @ quarter * sin


def frequencies(head_dim, base=10_000.0):
    """theta of RoPE, Su et al. 2021: base^(-2l / head_dim) for planes l = 0 … head_dim / 2 - 1."""
    return base ** (-2 * np.arange(head_dim // 2) / head_dim)
