"""Does it still learn in packets? Small models trained on 16 ranks of Frontier, 200 steps of text from a small grammar.

`frontier_partitioning.npz` holds the losses that `python -m toolkit.model_parallel._partition_trained` measured in
minutes: {scheme: (SEEDS, STEPS)}. Weights are float32, so packets are all that differs.
Chapter: model_parallel/frontier_partitioning.
"""

from dataclasses import replace
from functools import cache
from math import inf
from pathlib import Path

import numpy as np

from toolkit.runtime import Cluster

from . import frontier_partitioning as fp
from ._ladder_trained import VOCABULARY, text
from ._partition_model import Model
from ._partition_scale import DEVICE

MODEL = Model(layers=2, h=32, heads=4, vocabulary=VOCABULARY)
RANKS, STEPS, SEEDS, RATE, BATCH = 16, 200, 2, 4e-3, 32
FILE = Path(__file__).with_name("frontier_partitioning.npz")


def schemes():
    """What is compared, by name."""
    three = fp.three_level(RANKS)
    coarse = replace(three, qw=4, q2=4)
    return {
        "ZeRO-3": fp.zero(3, RANKS),
        "ZeRO++": fp.zero_pp(RANKS),
        "3-level": three,
        "3-level, no blocks": replace(three, block=inf),
        "all 4 bit": coarse,
        "all 4 bit, no blocks": replace(coarse, block=inf),
    }


def losses(scheme, seed, steps=STEPS):
    """Training loss before each step, nats a token: (steps,)."""
    random = np.random.default_rng(seed)
    weights = MODEL.weights(random, "float32")
    pairs = [text(random, BATCH) for _ in range(steps)]
    tokens, targets = (np.stack(part) for part in zip(*pairs, strict=True))
    return fp.train(Cluster(fp.frontier(2), DEVICE), MODEL, scheme, weights, tokens, targets, RATE)[0]


@cache
def measured():
    """{scheme: (SEEDS, STEPS)} of the file."""
    with np.load(FILE) as file:
        return {name: file[name] for name in file.files}


def final(name, last=20):
    """Mean loss of the last steps, over seeds."""
    return float(measured()[name][:, -last:].mean())


if __name__ == "__main__":
    found = {name: np.stack([losses(s, seed) for seed in range(SEEDS)]) for name, s in schemes().items()}
    np.savez_compressed(FILE, **{name: table.astype("float32") for name, table in found.items()})
    print({name: final(name) for name in found})
