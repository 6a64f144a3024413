"""A language model: embedding, a residual stack of sequence mixers and MLPs, and logits.

A mixer is a function `mix(weights, x)` on (batch, tokens, channels); `weights` is its own dict of arrays. The model
does not know what a mixer does: causality is the mixer's promise. No positions are added; short convolutions or
`rotary` give order. Chapter: all that train.
"""

import numpy as np

from .layers import embed, linear, rms_norm, swiglu


def language_model(random, vocabulary, channels, weights, hidden=None, dtype="float32"):
    """Parameters for `logits`.

    weights  list: the weights of each mixer, in the order of the layers
    hidden   width of the MLP after each mixer; None: no MLPs
    returns  dict of arrays, lists and dicts, as `adam` takes it
    """
    ones = np.ones(channels, dtype)
    params = {
        "embedding": (0.02 * random.standard_normal((vocabulary, channels))).astype(dtype),
        "layers": [{"norm": ones, "mixer": mixer} for mixer in weights],
        "norm": ones,
        "unembedding": linear(random, channels, vocabulary, dtype),
    }
    if hidden is not None:
        for layer in params["layers"]:
            shapes = ((channels, hidden), (channels, hidden), (hidden, channels))
            layer["mlp_norm"] = ones
            layer["mlp"] = [linear(random, *shape, dtype) for shape in shapes]
    return params


def logits(params, tokens, mixers):
    """Scores of the next token at each place. tokens (batch, tokens) int -> (batch, tokens, vocabulary).

    mixers   one function `mix(weights, x)` a layer, in order
    """
    x = embed(params["embedding"], tokens)
    for layer, mix in zip(params["layers"], mixers, strict=True):
        x = x + mix(layer["mixer"], rms_norm(x, layer["norm"]))
        if "mlp" in layer:
            x = x + swiglu(rms_norm(x, layer["mlp_norm"]), *layer["mlp"])
    return rms_norm(x, params["norm"]) @ params["unembedding"]


def count(params):
    """Number of parameters in nested dicts and lists."""
    if isinstance(params, np.ndarray):
        return params.size
    return sum(map(count, params.values() if isinstance(params, dict) else params))
