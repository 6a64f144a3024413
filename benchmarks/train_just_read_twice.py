"""Train the small models of "Just read twice" and keep them in toolkit/attention/just_read_twice.npz.

    python benchmarks/train_just_read_twice.py

Every model sees the same lists in the same order; only how tokens see each other differs. Ten minutes of one
core of a busy machine. Sizes and steps were settled by about 110 trial runs; with d' of 2 or 3 a second reading
sometimes lost. The models that ship were trained one by one, through `train`. Chapter: attention/just_read_twice.
"""

import time

import numpy as np

from toolkit.attention import _just_read_twice_model as small
from toolkit.attention._just_read_twice_model import Model
from toolkit.learn.optimise import adam

SIZES = [(4, 8), (8, 4), (4, 16), (16, 4), (8, 32), (32, 8), (4, 32), (32, 4)]
BATCH, RATE = 64, 5e-3
MODELS = {  # so many steps that the losses have settled; the last one's has not, quite
    "once": (Model("linear"), 2200),
    "once, larger state": (Model("linear", feature=6), 1600),
    "twice": (Model("linear", readings=2), 2000),
    "prefix": (Model("prefix linear"), 2200),
    "softmax": (Model("softmax", feature=8), 500),
    "prefix softmax": (Model("prefix softmax", feature=8), 1000),
}


def train(model, steps, seed=0):
    """(params, losses) after so many batches."""

    def batch(random):
        return small.read_lists(random, model, BATCH, *SIZES[random.integers(len(SIZES))])

    def loss(params, tokens, prefix):
        return small.loss(small.predict(params, model, tokens[:, :-1], prefix), tokens, prefix)

    start = small.fresh(np.random.default_rng(seed), model)
    return adam(loss, start, batch, steps=steps, rate=RATE, seed=seed + 1)


def main():
    models = {}
    for name, (model, steps) in MODELS.items():
        began = time.process_time()
        params, losses = train(model, steps)
        models[name] = model, params
        right = [small.accuracy(params, model, *sizes) for sizes in SIZES]
        seconds = time.process_time() - began
        print(f"{name:22} loss {losses[-50:].mean():.2f}   right {np.mean(right):.3f}   {seconds:.0f} s", flush=True)
    small.save(small.SHIPPED, models)
    print(f"{small.SHIPPED.name}: {small.SHIPPED.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
