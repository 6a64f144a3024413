"""Shapley values: what each knob adds to a prediction, on average over all orders of turning knobs.

Chapter: model_parallel/frontier_recipe.
"""

from itertools import product
from math import factorial

import numpy as np


def shapley(predict, x, background):
    """Exact, over all 2^k coalitions of knobs; knobs outside a coalition take the values of the background.

    predict      rows (n, k) -> (n,); a forest's `mean`, or any function
    x            (k,) or (n, k)     background  (r, k)
    returns      (values like x, float64; the base, mean of predict(background)); values of a row sum to
                 predict(row) - base
    """
    x, background = np.asarray(x, dtype="float64"), np.asarray(background, dtype="float64")
    rows, k = np.atleast_2d(x), background.shape[1]
    inside = np.array(list(product((False, True), repeat=k)))  # coalition number = its bits
    worth = np.stack([_mixed(predict, rows, background, chosen) for chosen in inside])
    values = np.zeros_like(rows)
    for knob in range(k):
        bit = 1 << (k - 1 - knob)
        for number, chosen in enumerate(inside):
            if not chosen[knob]:
                before = int(chosen.sum())
                weight = factorial(before) * factorial(k - 1 - before) / factorial(k)
                values[:, knob] += weight * (worth[number | bit] - worth[number])
    return values.reshape(x.shape), float(worth[0, 0])


def _mixed(predict, rows, background, chosen):
    """Mean prediction of each row's chosen knobs with the others' values of every row of the background."""
    mixed = np.where(chosen, rows[:, None], background[None])
    return np.asarray(predict(mixed.reshape(-1, rows.shape[1]))).reshape(len(rows), -1).mean(axis=1)
