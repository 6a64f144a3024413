"""Small models that read two lists once, twice, or without a causal mask; their loss, and the weights that ship.

A layer is a mixer and an MLP. Queries see their own token and the two before it, keys and values too, through causal
convolutions; then BASED's linear attention, its prefix form, or softmax attention. Keys start out one token late, so
that a token does not find itself. `benchmarks/train_just_read_twice.py` makes the weights.
Source: Arora et al. 2024, arXiv 2407.05483, section 4 and its synthetic task. Chapter: attention/just_read_twice.
"""

from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import autograd.numpy as np
import numpy

from toolkit.learn import layers
from toolkit.learn.optimise import flat, shaped
from toolkit.learn.stack import language_model, logits
from toolkit.learn.two_lists import MASK, overlapping_lists
from toolkit.runtime.errors import ShapeError

from . import just_read_twice as jrt
from .based import attention_to_train

HEADS, CHANNELS, LAYERS, HIDDEN, VOCABULARY = 2, 32, 2, 32, 68
SHIPPED = Path(__file__).with_name("just_read_twice.npz")


class Model(NamedTuple):
    """What is trained.

    kind      "linear", "prefix linear", "softmax" or "prefix softmax"
    feature   d': channels of a head's queries and keys
    readings  how often the prompt stands in the input, in training and in use
    """

    kind: str
    feature: int = 4
    readings: int = 1

    def state_floats(self, prompt):
        """Numbers that a sequence holds after a prompt of so many tokens; convolutions hold two tokens a layer more."""
        value = CHANNELS // HEADS
        if self.kind.endswith("softmax"):
            return LAYERS * HEADS * prompt * self.readings * (self.feature + value)
        return LAYERS * HEADS * (1 + self.feature + self.feature**2) * (value + 1)


# ---- the model -------------------------------------------------------------------------------------------------------


def fresh(random, model, dtype="float32"):
    """Parameters of a model before training. random: numpy Generator."""
    sizes = {"q": model.feature, "k": model.feature, "v": CHANNELS // HEADS}
    if model.kind == "prefix linear":
        sizes |= {"k_enc": model.feature, "v_enc": CHANNELS // HEADS}
    mixers = []
    for _ in range(LAYERS):
        mixer = {name: layers.linear(random, CHANNELS, HEADS * size, dtype) for name, size in sizes.items()}
        mixer |= {name: mixer["q"].copy() for name in sizes if name.startswith("k")}  # equal tokens match at once
        mixer |= {"asks": _taps(0, dtype), "holds": _taps(1, dtype)}
        mixers.append(mixer | {"out": layers.linear(random, CHANNELS, CHANNELS, dtype)})
    params = language_model(random, VOCABULARY, CHANNELS, mixers, HIDDEN, dtype)
    return params | {"unembedding": 5 * params["embedding"].T}  # an answer is a token that was read


def _taps(place, dtype):
    """A convolution over three tokens that only delays by `place`."""
    return numpy.eye(3, dtype=dtype)[place][:, None] * numpy.ones(CHANNELS, dtype)


def predict(params, model, tokens, prefix):
    """Logits (batch, tokens, vocabulary) of the next token; the prompt is the first `prefix` tokens."""
    return logits(params, tokens, [partial(_mix, model.kind, prefix)] * LAYERS)


def _mix(kind, prefix, w, x):
    asks, holds = layers.short_convolution(x, w["asks"]), layers.short_convolution(x, w["holds"])
    q, k, v = (layers.split_heads(y @ w[name], HEADS) for y, name in ((asks, "q"), (holds, "k"), (holds, "v")))
    causal = layers.causal_mask(x.shape[1])
    if kind == "linear":
        out = attention_to_train(q, k, v, causal)
    elif kind == "prefix linear":
        k_enc, v_enc = (layers.split_heads(holds[:, :prefix] @ w[name], HEADS) for name in ("k_enc", "v_enc"))
        keys, values = np.concatenate([k, k_enc], axis=-2), np.concatenate([v, v_enc], axis=-2)
        out = attention_to_train(q, keys, values, jrt.seen(k, k_enc))
    else:
        prompt = numpy.arange(x.shape[1]) < prefix
        out = layers.softmax_attention(q, k, v, causal | prompt if kind == "prefix softmax" else causal)
    return layers.merge_heads(out) @ w["out"]


# ---- the loss --------------------------------------------------------------------------------------------------------


def hide(random, tokens, prefix, probability=0.15):
    """(tokens with a share of the prompt replaced by MASK, hidden): what the masked-token loss asks for.

    tokens   (batch, n) int        prefix  length of the prompt; later tokens stay
    hidden   (batch, n) bool
    """
    hidden = (random.random(tokens.shape) < probability) & (numpy.arange(tokens.shape[1]) < prefix)
    return numpy.where(hidden, MASK, tokens), hidden


def loss(scores, tokens, prefix, hidden=None, weight=0.25):
    """Next token after the prompt, plus `weight` times the hidden tokens inside it: L = L_NTP(i > M) + w L_MLM(i ≤ M).

    scores   (batch, n, vocabulary), from the first n tokens, hidden ones replaced
    tokens   (batch, n + 1): what they were, and the last one's successor
    prefix   M. A token of the prompt has seen those after it: it never predicts the next one
    hidden   (batch, n) bool, see `hide`; None: no masked-token loss
    raises   ShapeError  a hidden token after the prompt; no token after the prompt
    """
    place = numpy.arange(scores.shape[1])
    if prefix >= len(place):
        raise ShapeError(f"a prompt of {prefix} tokens leaves nothing to predict of {len(place)}")
    after = numpy.broadcast_to(place >= prefix, scores.shape[:2])
    next_token = layers.cross_entropy(scores, tokens[:, 1:], after)
    if hidden is None or not hidden.any():
        return next_token
    if (hidden & after).any():
        raise ShapeError(f"{(hidden & after).sum()} tokens after the prompt of {prefix} are hidden: only its own may")
    return next_token + weight * layers.cross_entropy(scores, tokens[:, :-1], hidden)


# ---- the task --------------------------------------------------------------------------------------------------------


def read_lists(random, model, batch, first, second):
    """(tokens, prefix) of the task, the prompt repeated as the model reads it; the answer is the last token."""
    tokens = overlapping_lists(random, batch, first, second, VOCABULARY)
    prompt = jrt.repeat(tokens[:, :-2], tokens[:, -2:-1], model.readings)
    return numpy.concatenate([prompt, tokens[:, -1:]], axis=1), prompt.shape[1] - 1


def accuracy(params, model, first, second, batch=512, seed=1):
    """Share of right answers on fresh lists of `first` and `second` items."""
    tokens, prefix = read_lists(numpy.random.default_rng(seed), model, batch, first, second)
    answers = predict(params, model, tokens[:, :-1], prefix)[:, -1].argmax(axis=-1)
    return float((answers == tokens[:, -1]).mean())


@cache
def trained(name):
    """(model, params) of a model that ships, float32.

    raises  ValueError  no such model; the message lists those that exist
    """
    with numpy.load(SHIPPED) as file:
        if f"{name}/weights" not in file:
            names = sorted(key.split("/")[0] for key in file if key.endswith("/weights"))
            raise ValueError(f"no trained model {name!r}; there are {', '.join(names)}")
        kind, feature, readings = file[f"{name}/model"].tolist()
        model = Model(kind, int(feature), int(readings))
        empty = fresh(numpy.random.default_rng(0), model)
        return model, shaped(file[f"{name}/weights"].astype("float32"), empty)


def save(path, models):
    """Write trained models, half precision. models: name -> (Model, params)."""
    arrays = {}
    for name, (model, params) in models.items():
        arrays[f"{name}/model"] = numpy.array([str(field) for field in model])
        arrays[f"{name}/weights"] = flat(params).astype("float16")
    numpy.savez_compressed(path, **arrays)
