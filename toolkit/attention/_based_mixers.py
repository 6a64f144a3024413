"""The layers of BASED's block and their rivals, each with the state that it really holds between decode steps.

A mixer is three functions on (batch, tokens, channels) and a formula. `train` and `advance` compute the same;
`advance` takes any number of new tokens, so that prefill and decode are one function.
Source: Arora et al. 2024, arXiv 2402.18668; rivals as cited. Chapter: attention/based.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import autograd.numpy as np
import numpy

from toolkit.kernels.selective_scan import scan_to_train, selective_scan
from toolkit.learn.layers import causal_mask, linear, merge_heads, rotary, short_convolution, silu, softmax_attention
from toolkit.learn.layers import split_heads as split
from toolkit.runtime.arrays import leaves
from toolkit.runtime.errors import ShapeError

from . import based


class Mixer(NamedTuple):
    """weights(random) -> dict; train(weights, x) -> y; start(weights, batch) -> state;
    advance(weights, state, x) -> (y, state); floats(tokens) -> numbers that one sequence's state holds."""

    weights: Callable
    train: Callable
    start: Callable
    advance: Callable
    floats: Callable


def state_bytes(state):
    """Bytes of the arrays in a state: an array or a nested tuple of arrays; a counter counts as nothing."""
    return sum(array.nbytes for array in leaves(state))


def _projections(random, channels, width, dtype):
    """Weights of queries and keys (channels, width), values and output (channels, channels)."""
    shapes = {"q": width, "k": width, "v": channels, "o": channels}
    return {name: linear(random, channels, size, dtype) for name, size in shapes.items()}


def _head_dim(channels, heads):
    if heads < 1 or channels % heads:
        raise ShapeError(f"{channels} channels do not divide into {heads} heads")
    return channels // heads


def _qkv(heads, weights, x):
    return [split(x @ weights[name], heads) for name in "qkv"]


# ---- BASED: Taylor linear attention, a window, a gated short convolution ---------------------------------------------


def linear_attention(channels, feature_dim=16, heads=1, dtype="float32"):
    """Global, fixed state: h (D̃ d + D̃) numbers, D̃ = 1 + d' + d'², d = channels / heads."""
    features, head_dim = 1 + feature_dim + feature_dim**2, _head_dim(channels, heads)

    def train(w, x):
        return merge_heads(based.attention_to_train(*_qkv(heads, w, x))) @ w["o"]

    def start(w, batch):
        return numpy.zeros((batch, heads, features, head_dim + 1), dtype)

    def advance(w, state, x):
        out, state = based.chunked(*_qkv(heads, w, x), state=state)
        return merge_heads(out) @ w["o"], state

    weights = partial(_projections, channels=channels, width=heads * feature_dim, dtype=dtype)
    return Mixer(weights, train, start, advance, lambda tokens: features * (channels + heads))


def softmax(channels, window=None, heads=1, dtype="float32"):
    """Exact attention with rotary positions: a cache of 2 N D numbers, or a ring of 2 w D."""
    head_dim = _head_dim(channels, heads)

    def turned(w, x, first):
        q, k, v = _qkv(heads, w, x)
        positions = first + numpy.arange(x.shape[1])
        return rotary(q, positions), rotary(k, positions), v

    def train(w, x):
        return merge_heads(softmax_attention(*turned(w, x, 0), causal_mask(x.shape[1], window))) @ w["o"]

    def start(w, batch):
        nothing = numpy.zeros((batch, heads, 0, head_dim), dtype)
        return based.empty_cache(nothing, nothing, window)

    def advance(w, state, x):
        out, state = based.cached_attention(state, *turned(w, x, state[2]), window)
        return merge_heads(out) @ w["o"], state

    weights = partial(_projections, channels=channels, width=channels, dtype=dtype)
    return Mixer(weights, train, start, advance, lambda tokens: 2 * channels * (window or tokens))


def gated_convolution(channels, width=3, dtype="float32"):
    """BaseConv: a linear map of x times a causal convolution of x, channel by channel. State: (width - 1) D numbers."""

    def weights(random):
        kernel = random.standard_normal((width, channels)) / width**0.5
        names = {name: linear(random, channels, channels, dtype) for name in ("gate", "o")}
        return {"kernel": kernel.astype(dtype), "bias": numpy.ones(channels, dtype), **names}

    def gated(w, x, mixed):
        return ((x @ w["gate"] + w["bias"]) * mixed) @ w["o"]

    def train(w, x):
        return gated(w, x, short_convolution(x, w["kernel"]))

    def start(w, batch):
        return numpy.zeros((batch, width - 1, channels), dtype)

    def advance(w, state, x):
        seen = numpy.concatenate([state, x], axis=1)
        return gated(w, x, short_convolution(seen, w["kernel"])[:, width - 1 :]), seen[:, x.shape[1] :]

    return Mixer(weights, train, start, advance, lambda tokens: (width - 1) * channels)


# ---- rivals ----------------------------------------------------------------------------------------------------------


def plain_linear_attention(channels, features=None, feature_dim=16, heads=1, dtype="float32"):
    """Linear attention with elementwise features such as `based.elu_features`: h (d' d + d') numbers.

    features   None: q and k themselves. Their weights may sum to 0, so there is no normaliser: h d' d numbers.
    """
    head_dim, normaliser = _head_dim(channels, heads), int(features is not None)
    phi = features or (lambda x: x * feature_dim**-0.5)

    def finish(w, sums):
        return merge_heads(based.normalised(sums) if normaliser else sums) @ w["o"]

    def train(w, x):
        q, k, v = _qkv(heads, w, x)
        weights = phi(q) @ np.swapaxes(phi(k), -1, -2) * numpy.tri(x.shape[1], dtype=dtype)
        return finish(w, weights @ (based.with_ones(v) if normaliser else v))

    def start(w, batch):
        return numpy.zeros((batch, heads, feature_dim, head_dim + normaliser), dtype)

    def advance(w, state, x):
        q, k, v = _qkv(heads, w, x)
        outer = phi(k)[..., :, None] * (based.with_ones(v) if normaliser else v)[..., None, :]
        states = state[:, :, None] + numpy.cumsum(outer, axis=2)
        return finish(w, (phi(q)[..., None, :] @ states)[..., 0, :]), states[:, :, -1]

    weights = partial(_projections, channels=channels, width=heads * feature_dim, dtype=dtype)
    return Mixer(weights, train, start, advance, lambda tokens: feature_dim * (channels + normaliser * heads))


def selective_ssm(channels, states=16, expand=2, width=4, dtype="float32"):
    """Mamba's block (Gu and Dao 2023): d_inner = expand D; state d_inner (states + width - 1) numbers."""
    inner, rank = expand * channels, max(8, channels // 16)  # Mamba has D / 16; 2 would be too few for D = 32

    def weights(random):
        step = numpy.exp(random.uniform(numpy.log(0.1), numpy.log(1.0), inner))  # steps for short sequences
        return {
            "in": linear(random, channels, inner, dtype),
            "gate": linear(random, channels, inner, dtype),
            "kernel": (random.standard_normal((width, inner)) / width**0.5).astype(dtype),
            "b": linear(random, inner, states, dtype),
            "c": linear(random, inner, states, dtype),
            "down": linear(random, inner, rank, dtype),
            "up": linear(random, rank, inner, dtype),
            "step": numpy.log(numpy.expm1(step)).astype(dtype),  # softplus of it is `step`
            "log_a": numpy.log(numpy.tile(numpy.linspace(0.02, 1.0, states)[:, None], inner)).astype(dtype),
            "skip": numpy.ones(inner, dtype),
            "o": linear(random, inner, channels, dtype),
        }

    def scanned(w, u, scan):
        """`scan` of the step sizes, inputs and readouts that u (batch, tokens, inner) asks for."""
        delta = np.logaddexp(u @ w["down"] @ w["up"] + w["step"], 0.0)
        return scan(u, delta, -np.exp(w["log_a"]), u @ w["b"], u @ w["c"])

    def train(w, x):
        u = silu(short_convolution(x @ w["in"], w["kernel"]))
        return ((scanned(w, u, scan_to_train) + w["skip"] * u) * silu(x @ w["gate"])) @ w["o"]

    def start(w, batch):
        return numpy.zeros((batch, states, inner), dtype), numpy.zeros((batch, width - 1, inner), dtype)

    def advance(w, state, x):
        h, tail = state
        seen = numpy.concatenate([tail, x @ w["in"]], axis=1)
        u = silu(short_convolution(seen, w["kernel"])[:, width - 1 :])
        y, h = scanned(w, u, partial(selective_scan, state=h))
        return ((y + w["skip"] * u) * silu(x @ w["gate"])) @ w["o"], (h, seen[:, x.shape[1] :])

    return Mixer(weights, train, start, advance, lambda tokens: inner * (states + width - 1))


def gated_long_convolution(channels, states=16, width=3, dtype="float32"):
    """H3 (Fu et al. 2023): q times a long convolution of (short convolution of k) times v.

    The filter of a channel is a sum of `states` decaying exponentials: as long as the sequence, and a recurrence when
    decoding. State: D (states + width - 1) numbers.
    """

    def weights(random):
        rate = numpy.exp(random.uniform(numpy.log(1e-3), numpy.log(1.0), (channels, states)))
        return {
            **_projections(random, channels, channels, dtype),
            "kernel": (random.standard_normal((width, channels)) / width**0.5).astype(dtype),
            "log_rate": numpy.log(rate).astype(dtype),
            "amplitude": (random.standard_normal((channels, states)) / states**0.5).astype(dtype),
            "skip": numpy.ones(channels, dtype),
        }

    def long_filter(w, tokens):
        """(tokens, channels): Σ_s amplitude_s exp(-rate_s t)."""
        age = numpy.arange(tokens, dtype=dtype)[:, None, None]
        return np.sum(w["amplitude"] * np.exp(-np.exp(w["log_rate"]) * age), axis=-1)

    def train(w, x):
        tokens = x.shape[1]
        u = short_convolution(x @ w["k"], w["kernel"]) * (x @ w["v"])
        spectrum = np.fft.rfft(u, 2 * tokens, axis=1) * np.fft.rfft(long_filter(w, tokens), 2 * tokens, axis=0)
        mixed = np.fft.irfft(spectrum, 2 * tokens, axis=1)[:, :tokens]
        return ((mixed + w["skip"] * u) * (x @ w["q"])) @ w["o"]

    def start(w, batch):
        return numpy.zeros((batch, channels, states), dtype), numpy.zeros((batch, width - 1, channels), dtype)

    def advance(w, state, x):
        h, tail = state
        seen = numpy.concatenate([tail, x @ w["k"]], axis=1)
        u = short_convolution(seen, w["kernel"])[:, width - 1 :] * (x @ w["v"])
        decay, mixed = numpy.exp(-numpy.exp(w["log_rate"])), numpy.empty_like(u)
        for t in range(x.shape[1]):
            h = decay * h + u[:, t, :, None]
            mixed[:, t] = numpy.sum(w["amplitude"] * h, axis=-1)
        return ((mixed + w["skip"] * u) * (x @ w["q"])) @ w["o"], (h, seen[:, x.shape[1] :])

    return Mixer(weights, train, start, advance, lambda tokens: channels * (states + width - 1))
