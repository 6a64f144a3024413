"""Does the ladder cost quality? Small language models trained from scratch, and one that is converted after training.

The model is the definition, on one device: a module reads the embedding plus the outputs of the modules that its rule
lets it see (`reads`). Weights have the names and shapes of `sequence_parallel._block.model_weights`, so the
tensor-parallel program runs them as they are. Text is drawn from a small grammar with nested clauses, in which verbs
agree with a noun some words back.
`ladder_residual.npz` holds the losses and one model that `python -m toolkit.model_parallel._ladder_trained` made in
minutes. Chapter: model_parallel/ladder_residual.
"""

from functools import cache, partial
from pathlib import Path

import autograd.numpy as np
import numpy

from toolkit.learn import layers
from toolkit.learn.optimise import adam, flat, shaped
from toolkit.sequence_parallel._block import model_weights

WIDTH, HEADS, HIDDEN, TOKENS, BATCH = 32, 4, 128, 32, 16
STEPS, RATE, SEEDS, DEPTHS = 400, 4e-3, 3, (2, 6)
FILE = Path(__file__).with_name("ladder_residual.npz")

# ---- the text --------------------------------------------------------------------------------------------------------

NOUNS, VERBS, ADJECTIVES = 6, 6, 4
STOP, THAT, THE = 0, 1, 2
SINGULAR, PLURAL = 3, 3 + NOUNS  # nouns; then verbs in both forms, then adjectives
DOES, DO = 3 + 2 * NOUNS, 3 + 2 * NOUNS + VERBS
LOVELY = DO + VERBS
VOCABULARY = LOVELY + ADJECTIVES


def sentence(random, depth=0):
    """the (adjective) noun (that sentence-without-stop) verb: a verb's form and kind follow its own noun."""
    noun, plural = int(random.integers(NOUNS)), int(random.integers(2))
    words = [THE] + [LOVELY + int(random.integers(ADJECTIVES))] * int(random.integers(2))
    words.append((PLURAL if plural else SINGULAR) + noun)
    if depth < 2 and random.random() < 0.4:
        words += [THAT, *sentence(random, depth + 1)]
    kind = (noun + int(random.integers(2))) % VERBS  # two verbs suit each noun
    return [*words, (DO if plural else DOES) + kind]


def text(random, batch, tokens=TOKENS):
    """(inputs, targets), both (batch, tokens) int64."""
    rows = numpy.empty((batch, tokens + 1), numpy.int64)
    for row in rows:
        words = []
        while len(words) <= tokens:
            words += [*sentence(random), STOP]
        row[:] = words[: tokens + 1]
    return rows[:, :-1], rows[:, 1:]


# ---- the model, by definition ----------------------------------------------------------------------------------------


def reads(arch, depth, ladder_layers=None):
    """For each of the 2·depth modules, how many outputs before it are in the stream that it reads.

    The first few in order: standard 0, 1, 2, 3, …; ladder 0, 0, 1, 2, …; parallel 0, 0, 2, 2, …
    """
    rungs = range(depth) if ladder_layers is None else ladder_layers
    if arch == "parallel":
        return [k // 2 * 2 for k in range(2 * depth)]
    return [max(0, k - (arch == "ladder" and k // 2 in rungs)) for k in range(2 * depth)]


def logits(params, tokens, seen, head_dim=WIDTH // HEADS):
    """Scores of the next token, (batch, tokens, vocabulary). seen: as `reads` gives it."""
    streams = [layers.embed(params["embedding"], tokens)]  # streams[k]: the embedding and the first k outputs
    for k, count in enumerate(seen):
        weights, module = params["layers"][k // 2], (attention, mlp)[k % 2]
        streams.append(streams[k] + module(weights, streams[count], head_dim))
    return layers.rms_norm(streams[-1], params["norm"]) @ params["head"]


def attention(weights, x, head_dim):
    normed = layers.rms_norm(x, weights["norm_1"])
    q, k, v = (layers.split_heads(normed @ weights[name], weights[name].shape[1] // head_dim) for name in "qkv")
    return layers.merge_heads(layers.softmax_attention(layers.rotary(q), layers.rotary(k), v)) @ weights["o"]


def mlp(weights, x, _head_dim):
    raised = layers.rms_norm(x, weights["norm_2"]) @ weights["up"]
    active = 0.5 * raised * (1 + np.tanh((2 / np.pi) ** 0.5 * (raised + 0.044715 * raised**3)))
    return active @ weights["down"]


# ---- training --------------------------------------------------------------------------------------------------------


def loss(seen, params, inputs, targets):
    """Mean nats a token."""
    return layers.cross_entropy(logits(params, inputs, seen), targets, numpy.ones(targets.shape, bool))


def fresh(depth, seed):
    """Parameters before training, float32."""
    random = numpy.random.default_rng(seed)
    return model_weights(random, VOCABULARY, depth, WIDTH, HEADS, HEADS, WIDTH // HEADS, HIDDEN, "float32")


def train(params, seen, steps=STEPS, rate=RATE, seed=0):
    """(params, losses) after so many steps. Every rule sees the same text in the same order."""
    return adam(partial(loss, seen), params, lambda random: text(random, BATCH), steps=steps, rate=rate, seed=seed)


@cache
def unseen():
    return text(numpy.random.default_rng(10**6), 128)


def held_out(params, seen):
    """Loss on text it has not seen."""
    return float(loss(seen, params, *unseen()))


# ---- what is shipped -------------------------------------------------------------------------------------------------


@cache
def scratch():
    """{(arch, depth): held-out losses (SEEDS,)} of models trained from scratch."""
    with numpy.load(FILE) as kept:
        return {
            (arch, depth): kept[f"{arch}/{depth}"] for arch in ("standard", "ladder", "parallel") for depth in DEPTHS
        }


@cache
def trained():
    """The trained standard model of the largest depth, float32."""
    with numpy.load(FILE) as kept:
        return shaped(kept["weights"].astype("float32"), fresh(DEPTHS[-1], 0))


@cache
def conversion(last):
    """Held-out losses: (as trained, rule of the last layers changed, trained on, standard trained on as long).

    last    layers that get the ladder's rule; 0 of them for the standard model. On: a twentieth of the first training
    """
    depth = DEPTHS[-1]
    seen, standard = reads("ladder", depth, range(depth - last, depth)), reads("standard", depth)
    params, _ = train(trained(), seen, STEPS // 20, rate=RATE / 4, seed=SEEDS)
    after = held_out(params, seen)
    return held_out(trained(), standard), held_out(trained(), seen), after, conversion(0)[2] if last else after


def main():
    """Train all that is shipped and write it."""
    kept = {}
    for depth in DEPTHS:
        for arch in ("standard", "ladder", "parallel"):
            losses = []
            for seed in range(SEEDS):
                params, _ = train(fresh(depth, seed), reads(arch, depth), seed=seed)
                losses.append(held_out(params, reads(arch, depth)))
                if (arch, depth, seed) == ("standard", DEPTHS[-1], 0):
                    kept["weights"] = flat(params).astype("float16")
            kept[f"{arch}/{depth}"] = numpy.array(losses)
            print(arch, depth, losses, flush=True)
    numpy.savez_compressed(FILE, **kept)


if __name__ == "__main__":
    main()
