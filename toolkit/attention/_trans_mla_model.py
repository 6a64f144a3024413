"""A small transformer to convert: two layers of grouped attention that learned a generated language.

The language: the next token's logits are a sum of random rows, one chosen by each of the last REACH tokens. So
attention must find tokens by their distance, which takes RoPE, and the best loss is known: the source's entropy.

A model is the nested parameters of `toolkit.learn.stack` whose mixers are layers: GQA, FactoredKV or MLA, in any
mixture. benchmarks/train_trans_mla.py made the weights and the curves in _trans_mla.npz.
"""

from functools import cache
from pathlib import Path

import numpy as np
from autograd.misc import flatten

from toolkit.attention import _trans_mla_layers as layers
from toolkit.attention import trans_mla
from toolkit.attention._trans_mla_layers import GQA, MLA, FactoredKV
from toolkit.learn.layers import cross_entropy, linear
from toolkit.learn.optimise import adam
from toolkit.learn.stack import language_model, logits

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, MLP = 64, 8, 2, 8, 2, 32
VOCABULARY, TOKENS, REACH, STRENGTH = 32, 32, 6, 1.0
THETA = layers.frequencies(HEAD_DIM, base=100.0)  # sequences are short
COMPUTE = {GQA: layers.grouped_attention, FactoredKV: layers.factored_attention, MLA: layers.latent_attention}
WEIGHTS = Path(__file__).with_name("_trans_mla.npz")


def untrained(seed=0, dtype="float32"):
    """A model of grouped layers with random weights."""
    random = np.random.default_rng(seed)

    def projections(heads):
        return np.stack([linear(random, HIDDEN, HEAD_DIM, dtype) for _ in range(heads)])

    def layer():
        out = linear(random, HEADS * HEAD_DIM, HIDDEN, dtype).reshape(HEADS, HEAD_DIM, HIDDEN)
        return GQA(projections(HEADS), projections(KV_HEADS), projections(KV_HEADS), out, THETA)

    return language_model(random, VOCABULARY, HIDDEN, [layer() for _ in range(LAYERS)], MLP, dtype)


@cache
def pretrained():
    """The shipped model of grouped layers, in float64."""
    vector = stored()["weights"].astype(np.float64)
    params, kinds = split(untrained(dtype="float64"))
    return joined(flatten(params)[1](vector), kinds)


@cache
def stored():
    """What the training script wrote: dict of arrays."""
    with np.load(WEIGHTS) as file:
        return dict(file)


# ---- layers in and out -----------------------------------------------------------------------------------------------


def mixers(model):
    """The mixers of a model, in order."""
    return [layer["mixer"] for layer in model["layers"]]


def with_layers(model, new):
    """The same model with other mixers."""
    pairs = zip(model["layers"], new, strict=True)
    return {**model, "layers": [{**layer, "mixer": mixer} for layer, mixer in pairs]}


def split(model):
    """(params, kinds): plain dicts of what can be trained, and the class and theta of each layer."""
    weights = [{k: w for k, w in layer._asdict().items() if k != "theta"} for layer in mixers(model)]
    return with_layers(model, weights), [(type(layer), layer.theta) for layer in mixers(model)]


def joined(params, kinds):
    """The inverse of `split`."""
    return with_layers(params, [kind(**{**w, "theta": t}) for w, (kind, t) in zip(mixers(params), kinds, strict=True)])


# ---- using and training ----------------------------------------------------------------------------------------------


def predict(model, tokens, watch=None):
    """Logits (batch, tokens, vocabulary). watch: a list that gets the input of each layer, (batch, tokens, hidden)."""

    def mix(layer, x):
        if watch is not None:
            watch.append(x)
        return COMPUTE[type(layer)](layer, x)

    return logits(model, tokens, [mix] * len(model["layers"]))


@cache
def grammar():
    """(REACH, VOCABULARY, VOCABULARY): what a token, so many places back, adds to the logits of the next."""
    return STRENGTH * np.random.default_rng(2502).standard_normal((REACH, VOCABULARY, VOCABULARY))


def sentences(random, batch, tokens=TOKENS):
    """Sequences of the language, started with REACH random tokens that are cut off.

    returns  tokens (batch, tokens + 1) int64; entropy, mean over places of that of the next token given the past, nats
    """
    x = random.integers(VOCABULARY, size=(batch, REACH + tokens + 1))
    rows, entropy = np.arange(REACH)[:, None], 0.0
    for t in range(REACH, x.shape[1]):
        scores = grammar()[rows, x[:, t - REACH : t].T[::-1]].sum(axis=0)
        x[:, t] = np.argmax(scores + random.gumbel(size=scores.shape), axis=1)
        if t > REACH:
            p = np.exp(scores - scores.max(axis=1, keepdims=True))
            p /= p.sum(axis=1, keepdims=True)
            entropy -= np.mean(np.sum(p * np.log(p), axis=1)) / tokens
    return x[:, REACH:], entropy


def language(batch):
    """random -> (inputs, targets, mask), what `adam` asks for a batch. Scored where all of the past is in sight."""

    def draw(random):
        x, _ = sentences(random, batch)
        mask = np.broadcast_to(np.arange(TOKENS) >= REACH - 1, (batch, TOKENS))
        return x[:, :-1], x[:, 1:], mask

    return draw


def train(model, steps, rate, batch=16, seed=0):
    """(model, losses): `adam` on sentences of the language."""
    params, kinds = split(model)

    def loss(params, inputs, targets, mask):
        return cross_entropy(predict(joined(params, kinds), inputs), targets, mask)

    params, losses = adam(loss, params, language(batch), steps=steps, rate=rate, seed=seed)
    return joined(params, kinds), losses


def evaluate(model, batch=128, seed=999):
    """Loss, nats a token, on sentences that no training saw."""
    inputs, targets, mask = language(batch)(np.random.default_rng(seed))
    return float(cross_entropy(predict(model, inputs), targets, mask))


# ---- converting ------------------------------------------------------------------------------------------------------


def inputs_of(model, batch=64, seed=777):
    """Calibration data: what enters each layer, a list of (batch · tokens, hidden)."""
    seen = []
    predict(model, language(batch)(np.random.default_rng(seed))[0], seen)
    return [x.reshape(-1, x.shape[-1]) for x in seen]


def without_most_rope(model, rope_dims, fold=1, mixture=trans_mla.principal_mixture):
    """Every layer after partial RoPE, nothing compressed."""
    pairs = zip(mixers(model), inputs_of(model), strict=True)
    return with_layers(model, [trans_mla.partial_rope(gqa, mixture(gqa, x, fold), rope_dims) for gqa, x in pairs])


def compressed(full, rank, balance=True):
    """Every layer after joint PCA, calibrated on the model whose RoPE is gone, as the authors do."""
    pairs = zip(mixers(full), inputs_of(full), strict=True)
    return with_layers(full, [trans_mla.compress(layer, x, rank, balance) for layer, x in pairs])


def unmixed(gqa, x, fold=1):
    """Instead of RoRoPE: the heads as they are."""
    return trans_mla.no_mixture(gqa, fold)


def wider(model, extra, seed=0):
    """A control: as many more parameters in the MLPs, which for now add nothing. extra: columns for each MLP."""
    random = np.random.default_rng(seed)

    def widened(gate, up, down):
        dtype = gate.dtype
        new = [linear(random, HIDDEN, extra, dtype) for _ in "gu"]
        rows = np.concatenate([down, np.zeros((extra, HIDDEN), dtype)])
        return [np.concatenate([gate, new[0]], 1), np.concatenate([up, new[1]], 1), rows]

    return {**model, "layers": [{**layer, "mlp": widened(*layer["mlp"])} for layer in model["layers"]]}


def arms(model):
    """What continues: the layer as it is, the same with as many more parameters in the MLP, and the latent form."""
    extra = 2 * HEADS * HEAD_DIM * KV_HEADS * HEAD_DIM  # of up_k and up_v
    return {
        "GQA": model,
        "GQA, wider MLP": wider(model, -(-extra // (3 * HIDDEN))),
        "MLA": with_layers(model, [trans_mla.exact(layer) for layer in mixers(model)]),
    }
