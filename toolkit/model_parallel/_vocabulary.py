"""A vocabulary cut over ranks: rows of the embedding, columns of the logits, and the cross-entropy across the cut.

Logits stay where they are: each rank tells its largest logit of a token, then its sum of exponentials and the target's
logit, if it has it. Three numbers a token instead of a vocabulary (Shoeybi et al. 2019, section 3).
Chapter: model_parallel/megatron.
"""

import numpy as np

from toolkit.kernels.layers import embed, embed_backward
from toolkit.runtime import Cost, kernel, like


def _sums_dtype(dtype):
    return np.dtype(np.float64 if dtype.itemsize == 8 else np.float32)


def _held(targets, first, count):
    """(which targets lie in first … first + count, their columns here; column 0 for the others)."""
    here = (targets >= first) & (targets < first + count)
    return here, np.where(here, targets - first, 0)


@kernel(
    cost=lambda table, tokens, first: Cost(0, 2 * tokens.size * table.shape[1] * table.dtype.itemsize),
    out=lambda table, tokens, first: like((*tokens.shape, table.shape[1]), table.dtype),
)
def embed_rows(table, tokens, first):
    """Rows of `table`, which starts with that of token `first`; zeros for tokens that it does not have."""
    here, rows = _held(tokens, first, len(table))
    return embed(table, rows) * here[:, None].astype(table.dtype)


@kernel(
    cost=lambda table, tokens, first, grad: Cost(0, table.nbytes + 2 * grad.nbytes),
    out=lambda table, tokens, first, grad: like(table),
)
def embed_rows_backward(table, tokens, first, grad):
    """Gradient of the table, from that of `embed_rows`."""
    here, rows = _held(tokens, first, len(table))
    return embed_backward(table, rows, grad * here[:, None].astype(table.dtype))


@kernel(
    cost=lambda logits: Cost(0, logits.nbytes), out=lambda logits: like(logits.shape[:1], _sums_dtype(logits.dtype))
)
def largest(logits):
    """The largest logit of each token: (n, columns) -> (n,)."""
    return logits.max(axis=1).astype(_sums_dtype(logits.dtype))


@kernel(
    cost=lambda logits, top, targets, first: Cost(0, logits.nbytes + targets.nbytes),
    out=lambda logits, top, targets, first: like((2, len(targets)), top.dtype),
)
def sums(logits, top, targets, first):
    """(sum of exp(logit - top), the target's logit - top or 0): (2, n)."""
    here, columns = _held(targets, first, logits.shape[1])
    shifted = logits - top[:, None]
    return np.stack([np.exp(shifted).sum(axis=1), np.where(here, shifted[np.arange(len(targets)), columns], 0)])


def entropy(comm, all_reduce, logits, targets):
    """-log softmax of the target, over logits of all ranks of `comm`.

    logits    (n, columns): rank r has columns r·columns … of the vocabulary
    returns   (losses (n,), saved), the same on every rank
    """
    first = comm.rank * logits.shape[1]
    top = all_reduce(comm, largest(logits), "max")
    both = all_reduce(comm, sums(logits, top, targets, first))
    return loss_of(both), (top, both)


@kernel(cost=lambda both: Cost(0, 2 * both.nbytes), out=lambda both: like(both.shape[1:], both.dtype))
def loss_of(both):
    """log of the sum, minus the target's logit."""
    return np.log(both[0]) - both[1]


def entropy_backward(comm, logits, saved, targets, grad):
    """Gradient of the logits that this rank has, without a message; grad (n,), of each loss."""
    return softmax_minus_target(logits, *saved, targets, comm.rank * logits.shape[1], grad)


@kernel(
    cost=lambda logits, top, both, targets, first, grad: Cost(0, 2 * logits.nbytes + targets.nbytes + grad.nbytes),
    out=lambda logits, top, both, targets, first, grad: like(logits),
)
def softmax_minus_target(logits, top, both, targets, first, grad):
    """(softmax - one-hot) · grad, in the columns of this rank."""
    here, columns = _held(targets, first, logits.shape[1])
    weights = np.exp(logits - top[:, None]) / both[0][:, None]
    weights[np.arange(len(targets)), columns] -= here
    return (weights * grad[:, None]).astype(logits.dtype, copy=False)
