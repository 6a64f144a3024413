"""Recall that is learned: two-layer models on MQAR, one mixer against another.

Tier B of the experiments. Layer 1 is a gated short convolution, layer 2 the mixer; no MLPs, as in zoology. Keys come
back anywhere, so that a window of w tokens can answer only those within w.
Source: Arora et al. 2024, arXiv 2402.18668; data as in `learn.recall`. Chapter: attention/based.
"""

from typing import NamedTuple

import numpy as np

from toolkit.learn.layers import accuracy, cross_entropy
from toolkit.learn.optimise import adam
from toolkit.learn.recall import mqar
from toolkit.learn.stack import language_model, logits

from . import _based_mixers as mixers
from . import based

CHANNELS, VOCABULARY, TOKENS, PAIRS = 32, 32, 32, 4
STEPS, BATCH, POWER = 400, 32, 1.0  # power 1: a key comes back anywhere, not mostly next to its value

MIXERS = {
    "softmax": lambda: mixers.softmax(CHANNELS),
    "window 4": lambda: mixers.softmax(CHANNELS, 4),
    "window 8": lambda: mixers.softmax(CHANNELS, 8),
    "window 16": lambda: mixers.softmax(CHANNELS, 16),
    "Taylor d' = 2": lambda: mixers.linear_attention(CHANNELS, 2),
    "Taylor d' = 4": lambda: mixers.linear_attention(CHANNELS, 4),
    "Taylor d' = 8": lambda: mixers.linear_attention(CHANNELS, 8),
    "elu + 1, d' = 16": lambda: mixers.plain_linear_attention(CHANNELS, based.elu_features, 16),
    "elu + 1, d' = 64": lambda: mixers.plain_linear_attention(CHANNELS, based.elu_features, 64),
    "no features, d' = 16": lambda: mixers.plain_linear_attention(CHANNELS, None, 16),
    "no features, d' = 64": lambda: mixers.plain_linear_attention(CHANNELS, None, 64),
    "selective SSM, 8": lambda: mixers.selective_ssm(CHANNELS, 8, expand=1),
    "selective SSM, 20": lambda: mixers.selective_ssm(CHANNELS, 20, expand=1),
    "selective SSM, 20, 3 × the steps": lambda: mixers.selective_ssm(CHANNELS, 20, expand=1),
    "long convolution, 20": lambda: mixers.gated_long_convolution(CHANNELS, 20),
}


class Result(NamedTuple):
    """What a trained model is worth."""

    state: int  # numbers that one sequence holds in the mixer after TOKENS tokens
    accuracy: float  # on sequences it has not seen
    losses: np.ndarray  # (steps,)
    params: dict


def run(name, rate=1e-2, steps=None, seed=0):
    """Train one model of MIXERS, and ask it 4 times 200 keys of sequences it has not seen. Returns Result."""
    steps = steps or STEPS * (3 if name.endswith("3 × the steps") else 1)
    layers = mixers.gated_convolution(CHANNELS), MIXERS[name]()
    random, mixes = np.random.default_rng(seed), [layer.train for layer in layers]
    params = language_model(random, VOCABULARY, CHANNELS, [layer.weights(random) for layer in layers])

    def loss(params, inputs, targets, mask):
        return cross_entropy(logits(params, inputs, mixes), targets, mask)

    params, losses = adam(loss, params, lambda random: sample(random, BATCH), steps=steps, rate=rate, seed=seed)
    inputs, targets, mask = sample(np.random.default_rng(seed + 1), 200)
    right = float(accuracy(logits(params, inputs, mixes), targets, mask))
    return Result(layers[1].floats(TOKENS), right, losses, params)


def sample(random, batch):
    """(inputs, targets, mask) of `batch` sequences."""
    return mqar(random, batch, TOKENS, PAIRS, VOCABULARY, POWER)
