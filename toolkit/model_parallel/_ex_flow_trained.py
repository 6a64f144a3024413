"""Do experts follow each other? Small mixtures of experts trained on text with topics, and the routes of their tokens.

The model is the definition, on one device: top-1 of E experts in every layer, weighted by the gate's probability, with
Switch's balance loss. Weights have the names of `_ex_flow_model`, so the expert-parallel program runs them as they are.
Text: each document has one of 8 topics; a topic has its own two successors for each of its words, and between words
stand function words that all topics share. Unseen topics use the same words in other company.
`ex_flow.npz` holds the routes and one model that `python -m toolkit.model_parallel._ex_flow_trained` made in minutes.
Chapter: model_parallel/ex_flow.
"""

from functools import cache
from pathlib import Path

import autograd.numpy as np
import numpy
from autograd.tracer import getval

from toolkit.learn import layers
from toolkit.learn.optimise import adam, flat, shaped

from ._ex_flow_model import Shape, weights

TOKENS, BATCH, STEPS, RATE, BALANCE = 32, 16, 500, 4e-3, 0.01
EXPERTS, CHECKPOINTS = (8, 16, 32), (0, 20, 50, 100, 200, 500)
TEXTS = ("profile", "test", "unseen topics")
FILE = Path(__file__).with_name("ex_flow.npz")

# ---- the text --------------------------------------------------------------------------------------------------------

FUNCTION_WORDS, CONTENT_WORDS, WORDS_OF_A_TOPIC, TOPICS = 16, 96, 20, 8
VOCABULARY = FUNCTION_WORDS + CONTENT_WORDS


def shape(experts):
    return Shape(VOCABULARY, layers=6, width=32, heads=4, hidden=32, experts=experts)


@cache
def topic(number):
    """(words (20,), successors (20, 2), function words (20,)) of a topic; numbers from 8 on are never trained on."""
    random = numpy.random.default_rng([2401, number])
    words = FUNCTION_WORDS + random.choice(CONTENT_WORDS, WORDS_OF_A_TOPIC, replace=False)
    followers = random.integers(0, WORDS_OF_A_TOPIC, (WORDS_OF_A_TOPIC, 2))
    return words, followers, random.integers(0, FUNCTION_WORDS, WORDS_OF_A_TOPIC)


def document(random, topics):
    """(TOKENS + 1,) words. Three of five content words are announced by their function word."""
    words, followers, before = topic(int(random.choice(topics)))
    now, text = int(random.integers(len(words))), []
    while len(text) <= TOKENS:
        if random.random() < 0.6:
            text.append(before[now])
        text.append(words[now])
        now = followers[now, random.integers(2)]
    return text[: TOKENS + 1]


def text(random, batch, topics=range(TOPICS)):
    """(inputs, targets), both (batch, TOKENS) int64."""
    rows = numpy.array([document(random, list(topics)) for _ in range(batch)])
    return rows[:, :-1], rows[:, 1:]


@cache
def corpus(kind):
    """Inputs (160, TOKENS), 5 120 tokens, none of them trained on: to profile on, to test on, or of unseen topics."""
    topics = range(TOPICS, 2 * TOPICS) if kind == "unseen topics" else range(TOPICS)
    return text(numpy.random.default_rng([7, TEXTS.index(kind)]), 160, topics)[0]


# ---- the model, by definition ----------------------------------------------------------------------------------------


def forward(params, tokens, heads):
    """(logits (batch, tokens, vocabulary), gates: probabilities (batch, tokens, E) of each layer)."""
    x, gates = layers.embed(params["embedding"], tokens), []
    for layer in params["layers"]:
        normed = layers.rms_norm(x, layer["norm_1"])
        q, k, v = (layers.split_heads(normed @ layer[name], heads) for name in "qkv")
        x = x + layers.merge_heads(layers.softmax_attention(layers.rotary(q), layers.rotary(k), v)) @ layer["o"]
        normed = layers.rms_norm(x, layer["norm_2"])
        gates.append(softmax(normed @ layer["router"]))
        x = x + mixture(layer, normed, gates[-1])
    return layers.rms_norm(x, params["norm"]) @ params["head"], gates


def softmax(scores):
    raised = np.exp(scores - np.max(scores, axis=-1, keepdims=True))
    return raised / np.sum(raised, axis=-1, keepdims=True)


def mixture(layer, normed, gate):
    """The likeliest expert's output, weighted by its probability. All experts are computed, all but one times zero."""
    raised = normed[:, None] @ layer["expert_up"]  # (batch, E, tokens, f)
    active = 0.5 * raised * (1 + np.tanh((2 / np.pi) ** 0.5 * (raised + 0.044715 * raised**3)))
    weight = gate * one_hot(gate)
    return np.sum((active @ layer["expert_down"]) * np.transpose(weight, (0, 2, 1))[..., None], axis=1)


def one_hot(gate):
    plain = getval(gate)
    return (numpy.arange(plain.shape[-1]) == plain.argmax(axis=-1)[..., None]).astype(plain.dtype)


def loss(heads, params, inputs, targets):
    """Nats a token, plus Switch's balance: 0.01 · E · Σ share of tokens · mean probability, a layer."""
    scores, gates = forward(params, inputs, heads)
    balance = 0.0
    for gate in gates:
        share = one_hot(gate).mean(axis=(0, 1))
        balance = balance + gate.shape[-1] * np.sum(share * np.mean(gate, axis=(0, 1)))
    return layers.cross_entropy(scores, targets, numpy.ones(targets.shape, bool)) + BALANCE * balance


def routed(params, tokens, heads):
    """Routes (all tokens, layers) uint8."""
    _, gates = forward(params, tokens, heads)
    return numpy.stack([gate.argmax(axis=-1).ravel() for gate in gates], axis=1).astype("uint8")


def train(experts, steps=STEPS, seed=0):
    """{step: parameters} at the checkpoints."""
    of, kept = shape(experts), {}
    before = weights(numpy.random.default_rng(seed), of, "float32")
    at = iter(range(steps))

    def watched(params, inputs, targets):
        if (step := next(at)) in CHECKPOINTS:
            kept[step] = getval(params)
        return loss(of.heads, params, inputs, targets)

    after, _ = adam(watched, before, lambda random: text(random, BATCH), steps=steps, rate=RATE, seed=seed)
    return kept | {steps: after}


# ---- what is shipped -------------------------------------------------------------------------------------------------


@cache
def routes(experts, kind="test"):
    """Routes (5 120, 6) of the trained model with so many experts, in text of `TEXTS`."""
    with numpy.load(FILE) as kept:
        return kept[f"routes/{experts}/{kind}"].astype("int64")


@cache
def checkpoint(step):
    """Routes (5 120, 6) in test text of the model with 8 experts, after so many steps."""
    with numpy.load(FILE) as kept:
        return kept[f"checkpoint/{step}"].astype("int64")


@cache
def trained():
    """The trained model with 8 experts, float64."""
    of = shape(EXPERTS[0])
    with numpy.load(FILE) as kept:
        return shaped(kept["weights"].astype("float64"), weights(numpy.random.default_rng(0), of))


def main():
    """Train all that is shipped and write it."""
    kept = {}
    for experts in EXPERTS:
        heads, found = shape(experts).heads, train(experts)
        kept |= {f"routes/{experts}/{kind}": routed(found[STEPS], corpus(kind), heads) for kind in TEXTS}
        final = loss(heads, found[STEPS], *text(numpy.random.default_rng(10**6), 64))
        print(experts, "experts: loss", float(final), flush=True)
        if experts == EXPERTS[0]:
            kept["weights"] = flat(found[STEPS]).astype("float16")
            kept |= {f"checkpoint/{step}": routed(found[step], corpus("test"), heads) for step in CHECKPOINTS}
    numpy.savez_compressed(FILE, **kept)


if __name__ == "__main__":
    main()
