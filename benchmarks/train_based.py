"""Train small models on MQAR and keep what they recall, in toolkit/claims/attention/based.npz: five minutes, one core.

    python benchmarks/train_based.py

Each model is a gated short convolution, then one mixer; only the mixer differs. Each is trained with the same steps on
the same sequences, at each of RATES, and the better one is kept. Losses are kept at every hundredth of the way.
Chapter: attention/based.
"""

import time
from pathlib import Path

import numpy as np

from toolkit.attention import _based_trained as trained

RATES = 3e-3, 1e-2
TARGET = Path(__file__).resolve().parents[1] / "toolkit" / "claims" / "attention" / "based.npz"


def main():
    rows = []
    for name in trained.MIXERS:
        began = time.perf_counter()
        best = max((trained.run(name, rate=rate) for rate in RATES), key=lambda result: result.accuracy)
        rows.append((name, best.state, best.accuracy, best.losses[:: len(best.losses) // 100]))
        seconds = time.perf_counter() - began
        print(f"{name:24} {best.state:6} numbers   recalls {best.accuracy:.3f}   {seconds:.0f} s", flush=True)
    names, states, accuracies, losses = (np.array(column) for column in zip(*rows, strict=True))
    np.savez_compressed(TARGET, names=names, states=states, accuracies=accuracies, losses=losses.astype("float32"))


if __name__ == "__main__":
    main()
