"""Recall without training: how many facts does a state of so many numbers give back, and how few can it be?

Tier A of the experiments: random keys, values that are codes of ±1, one query for each fact. And the lower bound as a
program: a state that recalls any of n bits is a message from which any of n bits can be read (the problem INDEX).
Source: Arora et al. 2024, arXiv 2402.18668. Chapter: attention/based.
"""

from functools import partial

import numpy as np
from scipy.linalg import hadamard

from toolkit.runtime.errors import ShapeError

from . import based

VALUE_DIM = 64
CODES = hadamard(VALUE_DIM).astype(float)  # 64 values of 64 channels, orthogonal to each other
STRENGTH = 20.0  # length of a key and of a query


def facts(random, count, feature_dim):
    """(keys (1, count, d'), codes (count,) of the values): random directions of length STRENGTH, random values."""
    if feature_dim < 1 or count < 1:
        raise ShapeError(f"facts: {count} facts with keys of dimension {feature_dim}; both must be at least 1")
    keys = random.standard_normal((1, count, feature_dim))
    keys *= STRENGTH / np.linalg.norm(keys, axis=-1, keepdims=True)
    return keys, random.integers(len(CODES), size=count)


def recalled_by_state(keys, codes, features=based.taylor_features):
    """Which facts come back from a state Σ φ(k) vᵀ when every key is asked. (facts,) bool.

    The nearest code decides, so the normaliser does not matter; features whose weights sum to 0 are not at a loss.
    """
    values = CODES[codes][None]
    state = based.absorb(based.empty_state(keys, values, features), keys, values, features=features)
    answers = (features(keys) @ state)[0, :, :-1]
    return np.argmax(answers @ CODES.T, axis=-1) == codes


def recalled_by_cache(keys, codes, window=None):
    """The same from softmax attention over all keys, or over a ring of the last `window`. (facts,) bool."""
    values = CODES[codes][None]
    cache = based.empty_cache(keys, values, window)
    _, (held, kept, seen) = based.cached_attention(cache, keys, keys, values, window)
    slots = min(seen, held.shape[-2])
    answers = based.softmax_attention(keys, held[:, :slots], kept[:, :slots], np.ones((1, slots), bool))
    return np.argmax(answers[0] @ CODES.T, axis=-1) == codes


def recall(count, feature_dim=None, window=0, features=based.taylor_features, trials=20, seed=0):
    """Share of `count` facts that come back; the window answers the last ones, the state the rest.

    feature_dim   d' of the state; None: softmax with a cache of everything, d' = 16
    window        0: no window
    returns       float, mean over `trials` sets of facts
    """
    random, shares = np.random.default_rng(seed), []
    for _ in range(trials):
        keys, codes = facts(random, count, feature_dim or 16)
        if feature_dim is None:
            known = recalled_by_cache(keys, codes)
        else:
            known = recalled_by_state(keys, codes, features)
            if window:
                held = np.arange(count) >= count - window
                known = np.where(held, recalled_by_cache(keys, codes, window), known)
        shares.append(known.mean())
    return float(np.mean(shares))


def state_numbers(feature_dim, window=0, features=based.taylor_features):
    """Numbers that the state and the window of `recall` hold: D̃ (d + 1), and w (d' + d)."""
    size = features(np.zeros((1, feature_dim))).shape[-1]
    return size * (VALUE_DIM + 1) + window * (feature_dim + VALUE_DIM)


# ---- INDEX: a state is a message -------------------------------------------------------------------------------------


def message(state, scale, bits):
    """Alice: every number of the state in `bits` bits, packed. scale: what both know about its size, same shape.

    returns   uint8 array of ⌈numbers · bits / 8⌉ bytes
    """
    levels = 2**bits
    place = np.clip(np.floor((state / scale / 6 + 0.5) * levels), 0, levels - 1).astype(np.int64)  # ±3 scales
    return np.packbits((place[..., None] >> np.arange(bits)) & 1)


def unpacked(packed, scale, bits):
    """Bob: the state again, at the middle of each number's interval."""
    digits = np.unpackbits(packed, count=scale.size * bits).reshape(*scale.shape, bits).astype(np.int64)
    place = (digits << np.arange(bits)).sum(axis=-1)
    return ((place + 0.5) / 2**bits - 0.5) * 6 * scale


def index_protocol(count, feature_dim, bits, trials=20, seed=0):
    """Alice has `count` secret bits and feeds (key, ±1) to the recurrence; Bob gets the state and is asked for any bit.

    Keys are public, so the normaliser is too and is not sent. Features are stored symmetrically, or each number of
    order 2 would be sent twice.
    returns   (bits sent, share of the bits that Bob gets wrong)
    """
    features = partial(based.taylor_features, symmetric=True)
    random, wrong = np.random.default_rng(seed), []
    for _ in range(trials):
        keys, _ = facts(random, count, feature_dim)
        secret = random.choice([-1.0, 1.0], size=(1, count, 1))
        known = features(keys)
        state = np.swapaxes(known, -1, -2) @ secret
        scale = np.sqrt((known**2).sum(axis=-2))[..., None]
        sent = message(state, scale, bits)
        answer = known @ unpacked(sent, scale, bits)
        wrong.append(np.mean(np.where(answer > 0, 1, -1) != secret))
    return state.size * bits, float(np.mean(wrong))


def entropy(p):
    """H₂(p) in bits."""
    p = np.clip(p, 1e-300, 1 - 1e-16)
    return -p * np.log2(p) - (1 - p) * np.log2(1 - p)


def least_bits(count, error):
    """n (1 - H₂(δ)): no message of fewer bits lets every one of n bits be read with average error δ."""
    return count * (1 - entropy(min(error, 0.5)))
