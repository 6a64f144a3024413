"""Attention as Megatron-LM had it in 2021: all scores are written to memory, masked, normalised and dropped by kernels.

Its products cover the whole n × n square, masked half included, as the paper's count of operations does. Probabilities
are kept for the backward pass. Every call draws the same mask of dropout, so that a layer run again drops the same.
Chapter: model_parallel/megatron.
"""

from functools import partial

import numpy as np

from toolkit.kernels.layers import matmul
from toolkit.runtime import Cost, kernel, like
from toolkit.sequence_parallel._block import Attention


def scores_in_memory(dropout=0.0, seed=0):
    """The Attention, causal, one key head a query head, that drops this share of the probabilities."""
    mask = partial(dropped, rate=dropout, seed=seed) if dropout else lambda weights: weights
    return Attention(partial(forward, mask), partial(backward, mask))


def scores_again(dropout=0.0, seed=0):
    """The same, but probabilities are computed again in the backward pass: Korthikanti et al. 2022's selective way."""
    kept = scores_in_memory(dropout, seed)

    def backward_again(comm, saved, grad):
        return kept.backward(comm, kept.forward(comm, *saved)[1], grad)

    return Attention(lambda comm, q, k, v: (kept.forward(comm, q, k, v)[0], (q, k, v)), backward_again)


def forward(mask, _comm, q, k, v):
    """(out, saved)"""
    q = scaled(q, q.shape[-1] ** -0.5)
    weights = causal_softmax(matmul(q, k.swapaxes(1, 2)))
    return matmul(mask(weights), v), (q, k, v, weights)


def backward(mask, _comm, saved, grad):
    """(dq, dk, dv)"""
    q, k, v, weights = saved
    d_scores = softmax_backward(weights, mask(matmul(grad, v.swapaxes(1, 2))))
    dv = matmul(mask(weights).swapaxes(1, 2), grad)
    return scaled(matmul(d_scores, k), q.shape[-1] ** -0.5), matmul(d_scores.swapaxes(1, 2), q), dv


@kernel(cost=lambda scores: Cost(0, 2 * scores.nbytes), out=lambda scores: like(scores))
def causal_softmax(scores):
    """Softmax along keys of scores (heads, n, n), already over √d. Keys after the query get 0."""
    n = scores.shape[-1]
    masked = np.where(np.tri(n, dtype=bool), scores, -np.inf)
    weights = np.exp(masked - masked.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True)).astype(scores.dtype, copy=False)


@kernel(cost=lambda weights, grad: Cost(0, 3 * weights.nbytes), out=lambda weights, grad: like(weights))
def softmax_backward(weights, grad):
    """Gradient of the scores from that of the probabilities."""
    return weights * (grad - (weights * grad).sum(axis=-1, keepdims=True))


@kernel(cost=lambda x, rate, seed: Cost(0, 2 * x.nbytes + x.size), out=lambda x, rate, seed: like(x))
def dropped(x, rate, seed):
    """x with a share `rate` set to 0 and the rest scaled up; reads or writes one byte a number for the mask."""
    kept = np.random.default_rng(seed).random(x.shape) >= rate
    return (x * kept / (1 - rate)).astype(x.dtype, copy=False)


@kernel(cost=lambda x, factor: Cost(0, 2 * x.nbytes), out=lambda x, factor: like(x))
def scaled(x, factor):
    return (x * factor).astype(x.dtype, copy=False)
