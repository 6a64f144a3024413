"""Two lists that share one token: which one? The order of a long and a short list decides what a small state can do.

Source: the synthetic task published with "Just read twice", Arora et al. 2024, arXiv 2407.05483.
Chapter: attention/just_read_twice.
"""

import numpy as np

from toolkit.runtime.errors import ShapeError

MASK, PREFIX, BETWEEN, ANSWER = range(4)  # special tokens; items are 4 … vocabulary-1
SPECIAL = 4


def overlapping_lists(random, batch, first, second, vocabulary):
    """Sequences  PREFIX, first list, BETWEEN, second list, ANSWER, the shared token.

    The lists come from two halves of the vocabulary, cut anew for each sequence; then one item of the first list is
    planted in the second.

    random     numpy Generator
    first      items in the first list           second  items in the second, the planted one included
    returns    (batch, first + second + 4) int64
    raises     ShapeError  a list longer than half of the items, or empty
    """
    half = (vocabulary - SPECIAL) // 2
    if not 1 <= min(first, second) <= max(first, second) <= half:
        raise ShapeError(f"lists of {first} and {second} items: each needs 1 to {half}, half of {vocabulary - SPECIAL}")
    items = random.permuted(np.tile(np.arange(SPECIAL, vocabulary), (batch, 1)), axis=1)
    one, other, rows = items[:, :first], items[:, half : half + second], np.arange(batch)
    shared = one[rows, random.integers(first, size=batch)]
    other[rows, random.integers(second, size=batch)] = shared
    mark = np.ones((batch, 1), np.int64)
    return np.concatenate([PREFIX * mark, one, BETWEEN * mark, other, ANSWER * mark, shared[:, None]], axis=1)
