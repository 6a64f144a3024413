"""Dense attention in float64 by the textbook, with the score matrix written out: what the fast kernels must equal."""

import numpy as np


def scores_and_values(q, k, v, causal):
    """Masked scores (heads, n, m) and keys, values repeated for each query head, all float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    group = q.shape[0] // k.shape[0]
    k, v = np.repeat(k, group, axis=0), np.repeat(v, group, axis=0)
    scores = np.einsum("hid,hjd->hij", q, k) / np.sqrt(q.shape[2])
    if causal:
        n, m = scores.shape[1:]
        scores[:, ~np.tri(n, m, m - n, dtype=bool)] = -np.inf
    return scores, k, v


def dense_weights(scores):
    """Softmax over the last axis and its logsumexp; a row of -inf gives zeros and -inf."""
    peak = np.max(scores, axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isfinite(peak), peak, 0.0))
    total = weights.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + np.where(np.isfinite(peak), peak, 0.0))[..., 0]
    return weights / np.where(total > 0, total, 1.0), lse


def dense_attention(q, k, v, causal=False):
    """Returns (out (heads, n, head_dim), lse (heads, n)) in float64; key heads may divide query heads.

    The causal mask is aligned to the bottom right: query i sees keys j <= i + (m - n).
    """
    scores, _, v = scores_and_values(q, k, v, causal)
    weights, lse = dense_weights(scores)
    return np.einsum("hij,hjd->hid", weights, v), lse


def dense_attention_backward(q, k, v, grad_out, causal=False):
    """Gradients (dq, dk, dv) of sum(grad_out * out), in float64, through the softmax's Jacobian."""
    q, grad_out = np.asarray(q, np.float64), np.asarray(grad_out, np.float64)
    key_heads, group = k.shape[0], q.shape[0] // k.shape[0]
    scores, k, v = scores_and_values(q, k, v, causal)
    weights, _ = dense_weights(scores)
    grad_weights = np.einsum("hid,hjd->hij", grad_out, v)
    mean = np.sum(weights * grad_weights, axis=-1, keepdims=True)
    grad_scores = weights * (grad_weights - mean) / np.sqrt(q.shape[2])
    dq = np.einsum("hij,hjd->hid", grad_scores, k)
    dk = np.einsum("hij,hid->hjd", grad_scores, q)
    dv = np.einsum("hij,hid->hjd", weights, grad_out)
    return dq, *(a.reshape(key_heads, group, *a.shape[1:]).sum(axis=1) for a in (dk, dv))
