"""Layers of small language models: plain functions of arrays, differentiated by autograd.

Activations are (batch, tokens, channels), heads (batch, heads, tokens, head_dim), weights (inputs, outputs). Any float
dtype; what comes out has the dtype of what goes in. Chapter: all that train.
"""

import autograd.numpy as np
from autograd.extend import defvjp, primitive

from toolkit.runtime.errors import ShapeError


def linear(random, inputs, outputs, dtype="float32"):
    """Weights of x @ w, normal with variance 1 / inputs: what goes in with unit variance comes out with it."""
    return (random.standard_normal((inputs, outputs)) / inputs**0.5).astype(dtype)


def embed(table, tokens):
    """Rows of `table` (vocabulary, channels) for integer `tokens` (batch, tokens)."""
    return table[tokens]


def rms_norm(x, gain, epsilon=1e-6):
    """x over the root of its mean square along channels, times `gain` (channels,). Zhang and Sennrich 2019."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon) * gain


def silu(x):
    """x times its logistic function; without overflow."""
    return x * 0.5 * (1 + np.tanh(0.5 * x))


def swiglu(x, gate, up, down):
    """(silu(x gate) * (x up)) down, Shazeer 2020. gate, up (channels, hidden), down (hidden, channels)."""
    return (silu(x @ gate) * (x @ up)) @ down


def split_heads(x, heads):
    """(batch, tokens, channels) -> (batch, heads, tokens, channels / heads). ShapeError if they do not divide."""
    batch, tokens, channels = x.shape
    if heads < 1 or channels % heads:
        raise ShapeError(f"{channels} channels do not divide into {heads} heads")
    return np.transpose(np.reshape(x, (batch, tokens, heads, channels // heads)), (0, 2, 1, 3))


def merge_heads(x):
    """(batch, heads, tokens, head_dim) -> (batch, tokens, heads * head_dim)."""
    batch, heads, tokens, head_dim = x.shape
    return np.reshape(np.transpose(x, (0, 2, 1, 3)), (batch, tokens, heads * head_dim))


def causal_mask(tokens, window=None):
    """(tokens, tokens) bool: query i sees key j <= i; with a window only the last `window` keys, itself included."""
    i, j = np.arange(tokens)[:, None], np.arange(tokens)
    return (j <= i) if window is None else (j <= i) & (i - j < window)


def softmax_attention(q, k, v, mask=None, scale=None):
    """softmax(q kᵀ · scale) v. q (…, n, head_dim), k (…, m, head_dim), v (…, m, value_dim).

    mask    bool, broadcast against (…, n, m), True where a query sees a key, one key a row or more; None: causal, n = m
    scale   1 / sqrt(head_dim) if None
    """
    scores = q @ np.swapaxes(k, -1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    seen = causal_mask(q.shape[-2]) if mask is None else mask
    scores = np.where(seen, scores, -1e30)
    weights = np.exp(scores - np.max(scores, axis=-1, keepdims=True))
    return (weights / np.sum(weights, axis=-1, keepdims=True)) @ v


def rotary(x, positions=None, base=10_000.0):
    """Rotate plane l of token t by the angle t · base^(-2l / head_dim). x (…, tokens, head_dim), head_dim even.

    Plane l is the pair of channels (l, l + head_dim / 2). positions (tokens,); 0, 1, 2, … if None. Su et al. 2021.
    """
    tokens, head_dim = x.shape[-2:]
    if head_dim % 2:
        raise ShapeError(f"rotary: head_dim {head_dim} is odd, so it does not divide into planes")
    half = head_dim // 2
    positions = np.arange(tokens) if positions is None else positions
    angle = np.tile(positions[:, None] * base ** (-np.arange(half) / half), 2).astype(x.dtype)
    quarter_turn = np.kron([[0, 1], [-1, 0]], np.eye(half)).astype(x.dtype)  # (a, b) -> (-b, a)
    return x * np.cos(angle) + x @ quarter_turn * np.sin(angle)


def short_convolution(x, kernel):
    """Causal convolution of each channel, y_t = Σ_i kernel_i x_{t-i}. kernel (width, channels)."""
    return sum(kernel[i] * delayed(x, i) for i in range(kernel.shape[0]))


@primitive
def delayed(x, by):
    """What each token was `by` tokens ago, 0 before the first; ahead where `by` < 0. x (batch, tokens, channels)."""
    out, by = np.zeros_like(x), max(-x.shape[1], min(x.shape[1], by))
    out[:, max(0, by) : x.shape[1] + min(0, by)] = x[:, max(0, -by) : x.shape[1] - max(0, by)]
    return out


defvjp(delayed, lambda out, x, by: lambda g: delayed(g, -by), None)


def cross_entropy(logits, targets, mask):
    """Mean over the places where `mask` is True of -log softmax(logits)[target]; in nats.

    logits (batch, tokens, vocabulary), targets (batch, tokens) int, mask (batch, tokens) bool, True somewhere.
    Only those places enter, so logits elsewhere get a gradient of exactly 0.
    """
    chosen, wanted = logits[mask], targets[mask]
    shifted = chosen - np.max(chosen, axis=-1, keepdims=True)
    log_sum = np.log(np.sum(np.exp(shifted), axis=-1))
    return np.mean(log_sum - shifted[np.arange(len(wanted)), wanted])


def accuracy(logits, targets, mask):
    """Share of the places where `mask` is True whose largest logit is the target's."""
    return np.mean(np.argmax(logits[mask], axis=-1) == targets[mask])
