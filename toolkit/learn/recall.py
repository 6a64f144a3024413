"""Multi-query associative recall (MQAR): key-value pairs first, then each key once more; what was its value?

Source: Arora et al., "Zoology", 2023, arXiv 2312.04927, and the code it publishes. Chapter: attention/based.
"""

import numpy as np

from toolkit.runtime.errors import ShapeError


def mqar(random, batch, tokens, pairs, vocabulary, power=0.01):
    """Sequences that start with `pairs` keys, each followed by its value; each key comes back once, later.

    random   numpy Generator
    tokens   length N of a sequence; even, at least 4 * pairs
    power    gaps to the repeated keys follow p(gap) ~ gap^(power - 1): most are near. 1 makes all gaps equally likely
    returns  inputs (batch, tokens) int64: keys in 1 … V/2 - 1, values in V/2 … V - 1, fillers any token
             targets (batch, tokens) int64: the value of the key at that place, 0 elsewhere
             mask (batch, tokens) bool: where a key is repeated; `pairs` places a sequence
    raises   ShapeError  sizes that leave no room
    """
    if tokens % 2 or tokens < 4 * pairs or pairs < 1:
        raise ShapeError(f"mqar: {pairs} pairs in {tokens} tokens; needs an even length of 4 * pairs or more")
    half = vocabulary // 2
    if half - 1 < pairs:
        raise ShapeError(f"mqar: {vocabulary} tokens hold {half - 1} keys for {pairs} pairs; use {2 * pairs + 2}")
    rows, context = np.arange(batch)[:, None], 2 * pairs
    keys = 1 + without_replacement(random, np.ones(half - 1), batch, pairs)
    values = half + without_replacement(random, np.ones(vocabulary - half), batch, pairs)
    gaps = np.arange(1, (tokens - context) // 2 + 1)
    places = context + 2 * without_replacement(random, gaps ** (power - 1.0), batch, pairs)
    inputs = random.integers(vocabulary, size=(batch, tokens))
    inputs[:, 0:context:2], inputs[:, 1:context:2], inputs[rows, places] = keys, values, keys
    targets, mask = np.zeros_like(inputs), np.zeros(inputs.shape, bool)
    targets[rows, places], mask[rows, places] = values, True
    return inputs, targets, mask


def without_replacement(random, weights, batch, count):
    """Rows of `count` different indices, drawn one after the other in proportion to `weights`. (batch, count) int64.

    The `count` first arrivals of exponential clocks with these rates have that law (Efraimidis and Spirakis 2006).
    """
    arrivals = random.exponential(size=(batch, len(weights))) / weights
    return np.argsort(arrivals, axis=1)[:, :count]
