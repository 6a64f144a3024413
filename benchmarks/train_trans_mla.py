"""Train the small model of the chapter on TransMLA, and what it compares. Writes toolkit/attention/_trans_mla.npz.

    python benchmarks/train_trans_mla.py            about two minutes of one idle core

weights              the trained model, float16, flattened
arms, seeds          names of the arms; seeds of their data
curves               (arms, seeds, steps)  loss before each step of the continued training
held_out             (arms, seeds + 1)     loss on sequences that no training saw; the last column is before training
ranks, recovery      (cases,), (cases, steps)   loss while a model converted to that rank trains
recovered            (cases, 2)            its loss on sequences that no training saw, before and after
"""

import time

import numpy as np
from autograd.misc import flatten

from toolkit.attention import _trans_mla_model as tiny
from toolkit.claims.attention.trans_mla import LIKE_QWEN, RANK

PRETRAIN, CONTINUE, RECOVER, SEEDS = 1000, 250, 200, (1, 2, 3)
RATE, SMALL_RATE = 1e-2, 3e-3


def single(model):
    """The same model in float32."""
    params, kinds = tiny.split(model)
    vector, unflatten = flatten(params)
    return tiny.joined(unflatten(vector.astype(np.float32)), kinds)


def main():
    began = time.process_time()
    model, losses = tiny.train(tiny.untrained(), PRETRAIN, RATE)
    print(f"trained: {losses[-100:].mean():.3f}, {time.process_time() - began:.0f} s")
    params, kinds = tiny.split(model)
    vector, unflatten = flatten(params)
    weights = vector.astype(np.float16)
    model = tiny.joined(unflatten(weights.astype(np.float32)), kinds)
    print("held out:", tiny.evaluate(model))
    curves, held_out = {}, {}
    for name, arm in tiny.arms(model).items():
        arm = single(arm)
        runs = [tiny.train(arm, CONTINUE, SMALL_RATE, seed=seed) for seed in SEEDS]
        curves[name] = [losses for _, losses in runs]
        held_out[name] = [tiny.evaluate(trained) for trained, _ in runs] + [tiny.evaluate(arm)]
        print(name, np.round(held_out[name], 4), f"{time.process_time() - began:.0f} s")
    recovery, recovered = [], []
    for rank in (RANK, 6):
        converted = single(tiny.compressed(tiny.without_most_rope(model, **LIKE_QWEN), rank))
        trained, losses = tiny.train(converted, RECOVER, SMALL_RATE)
        recovery.append(losses)
        recovered.append((tiny.evaluate(converted), tiny.evaluate(trained)))
        print("recovery", rank, np.round(recovered[-1], 4), f"{time.process_time() - began:.0f} s")
    np.savez_compressed(
        tiny.WEIGHTS,
        weights=weights,
        arms=np.array(list(curves)),
        seeds=np.array(SEEDS),
        curves=np.array(list(curves.values()), np.float32),
        held_out=np.array(list(held_out.values()), np.float32),
        recovery=np.array(recovery, np.float32),
        recovered=np.array(recovered, np.float32),
        ranks=np.array([RANK, 6]),
    )


if __name__ == "__main__":
    main()
