"""Does it learn? Linear, hybrid and softmax models of four layers on associative recall.

The three differ in one thing: which layers are linear attention. A hybrid has softmax in every fourth layer, as LASP-2H
does. A linear layer has the features 1 + elu and the normaliser, so that all layers put out averages of their values.
Queries, keys and values pass a short convolution each, which gives order and ties a value to the key before it.
Training takes minutes: `lasp2.npz` holds the weights that `python -m toolkit.sequence_parallel._lasp2_recall` made.
Chapter: sequence_parallel/lasp2.
"""

from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import autograd.numpy as np
import numpy

from toolkit.attention.based import elu_features
from toolkit.learn import layers
from toolkit.learn.optimise import adam
from toolkit.learn.recall import mqar
from toolkit.learn.stack import language_model, logits

CHANNELS, HEADS, WIDTH = 32, 2, 3
TOKENS, PAIRS, VOCABULARY = 32, 8, 32
STEPS, BATCH, RATE, SEEDS = 400, 32, 5e-3, 2
MODELS = {"linear": ("linear",) * 4, "hybrid": ("linear",) * 3 + ("softmax",), "softmax": ("softmax",) * 4}
FILE = Path(__file__).with_name("lasp2.npz")


def mix(kind, weights, x):
    """One layer's attention over a batch. x (batch, tokens, channels)."""
    q, k, v = (layers.short_convolution(x @ weights[name], weights[name + "_kernel"]) for name in "qkv")
    q, k, v = (layers.split_heads(part, HEADS) for part in (q, k, v))
    if kind == "softmax":
        out = layers.softmax_attention(q, k, v)
    else:
        pairs = np.tril(elu_features(q) @ np.swapaxes(elu_features(k), -1, -2))
        out = pairs @ v / np.sum(pairs, axis=-1, keepdims=True)
    return layers.merge_heads(out) @ weights["o"]


def fresh(random):
    """Weights of one layer, the same for both kinds."""
    kernels = {f"{name}_kernel": layers.linear(random, WIDTH, CHANNELS) for name in "qkv"}
    return kernels | {name: layers.linear(random, CHANNELS, CHANNELS) for name in "qkvo"}


def sample(random, batch):
    """(inputs, targets, mask) of `batch` sequences: 8 pairs of key and value, then the keys again, in any order."""
    return mqar(random, batch, TOKENS, PAIRS, VOCABULARY, 1.0)


class Trained(NamedTuple):
    """A model of MODELS and what it is worth."""

    accuracy: float  # on 400 sequences it has not seen; guessing a value gives 1/16
    losses: numpy.ndarray  # (steps,), nats
    params: dict


def mixers(name):
    """One function (weights, x) -> y a layer."""
    return [partial(mix, kind) for kind in MODELS[name]]


def start(name, random):
    """Parameters before training."""
    return language_model(random, VOCABULARY, CHANNELS, [fresh(random) for _ in MODELS[name]])


def train(name, seed=0, steps=STEPS):
    """Train one of MODELS. Returns (params, losses)."""

    def loss(params, inputs, targets, mask):
        return layers.cross_entropy(logits(params, inputs, mixers(name)), targets, mask)

    params = start(name, numpy.random.default_rng(seed))
    return adam(loss, params, lambda random: sample(random, BATCH), steps=steps, rate=RATE, seed=seed)


def measured(name, params, losses):
    """The Trained of these parameters."""
    inputs, targets, mask = sample(numpy.random.default_rng(1), 400)
    right = layers.accuracy(logits(params, inputs, mixers(name)), targets, mask)
    return Trained(float(right), losses, params)


@cache
def trained(name, seed=0):
    """The model as `lasp2.npz` has it; seeds 0 … SEEDS - 1."""
    place = f"{name}/{seed}"
    with numpy.load(FILE) as file:
        arrays = {key: file[key].astype("float32") for key in file.files if key.startswith(f"{place}/")}
    params = filled(start(name, numpy.random.default_rng(0)), arrays, place)
    return measured(name, params, arrays[f"{place}/losses"])


def recall(name):
    """Accuracy of each seed."""
    return [trained(name, seed).accuracy for seed in range(SEEDS)]


def flat(value, name):
    """{"name/layers/0/norm": array, …} of nested dicts and lists."""
    if isinstance(value, numpy.ndarray):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: array for part, inner in items for key, array in flat(inner, f"{name}/{part}").items()}


def filled(value, arrays, name):
    """The inverse: nested like `value`, with these arrays."""
    if isinstance(value, numpy.ndarray):
        return arrays[name]
    if isinstance(value, dict):
        return {part: filled(inner, arrays, f"{name}/{part}") for part, inner in value.items()}
    return [filled(inner, arrays, f"{name}/{i}") for i, inner in enumerate(value)]


if __name__ == "__main__":
    kept = {}
    for model in MODELS:
        for number in range(SEEDS):
            weights, history = train(model, number)
            print(model, number, measured(model, weights, history).accuracy, flush=True)
            kept |= flat(weights, f"{model}/{number}") | {f"{model}/{number}/losses": history}
    numpy.savez_compressed(FILE, **{key: array.astype("float16") for key, array in kept.items()})
