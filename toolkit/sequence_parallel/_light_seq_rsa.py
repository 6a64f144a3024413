"""Ring self-attention: whole rows of scores, one ring for keys and another for values. A baseline of LightSeq.

A rank keeps the scores of its queries with *all* keys, (heads, n, N), masks and normalises whole rows, and weighs
values as they pass. It computes what the mask hides, and its memory grows with the length of the sequence.
Source: Li et al. 2021, arXiv 2105.13120; the mask is ours. Chapter: sequence_parallel/light_seq.
"""

import numpy as np

from toolkit.kernels.elementwise import accumulate
from toolkit.kernels.layers import matmul
from toolkit.runtime import Cost, kernel, like
from toolkit.runtime.algorithms import concatenate

from ._block import Attention


def pair():
    """Causal ring self-attention as the Attention of a block: as many key heads as heads, equal runs of tokens."""
    return Attention(forward, backward)


def forward(comm, q, k, v):
    """(out, saved): out like q; saved has the weights of all keys, (heads, n, N)."""
    scores = {columns.start: matmul(q, transposed(keys)) for columns, keys in passing(comm, k)}
    weights = causal_softmax(joined(scores), comm.rank * q.shape[1], q.shape[2])
    out = total(matmul(weights[:, :, columns], values) for columns, values in passing(comm, v))
    return out, (q, k, v, weights)


def backward(comm, saved, grad_out):
    """(dq, dk, dv). Shares of dk and dv are added up on a ring, at whose end they are at home."""
    q, k, v, weights = saved
    d_weights = {columns.start: matmul(grad_out, transposed(values)) for columns, values in passing(comm, v)}
    d_scores = causal_softmax_backward(weights, joined(d_weights), q.shape[2])
    dq = total(matmul(d_scores[:, :, columns], keys) for columns, keys in passing(comm, k))
    return dq, *(
        comm.reduce_scatter([matmul(transposed(part), rows) for part in np.split(table, comm.size, axis=2)])
        for table, rows in ((d_scores, q), (weights, grad_out))
    )


def passing(comm, x):
    """Yields (columns of the scores, x of one rank) for every rank, while the next one's is on its way."""
    n = x.shape[1]
    for step in range(comm.size):
        coming = comm.ishift(x, by=1, tag="ring") if step < comm.size - 1 else None
        holder = (comm.rank - step) % comm.size
        yield slice(holder * n, (holder + 1) * n), x
        if coming:
            x = coming.wait()


def joined(parts):
    """Parts of rows in the order of their columns, side by side."""
    return concatenate(tuple(parts[start] for start in sorted(parts)), axis=2)


def total(shares):
    """The sum of arrays, added into the first."""
    first = next(shares)
    for share in shares:
        accumulate(first, share)
    return first


def transposed(x):
    return x.transpose(0, 2, 1)


@kernel(
    cost=lambda scores, first, head_dim: Cost(0, 2 * scores.nbytes), out=lambda scores, first, head_dim: like(scores)
)
def causal_softmax(scores, first, head_dim):
    """Softmax of scores / sqrt(head_dim), (heads, n, N), for the queries `first`, first + 1, … of all N tokens."""
    n, columns = scores.shape[1:]
    hidden = np.arange(columns) > first + np.arange(n)[:, None]
    scaled = np.where(hidden, -np.inf, scores / np.sqrt(head_dim))
    weights = np.exp(scaled - scaled.max(axis=2, keepdims=True))
    return (weights / weights.sum(axis=2, keepdims=True)).astype(scores.dtype, copy=False)


@kernel(
    cost=lambda weights, grad, head_dim: Cost(0, 3 * weights.nbytes), out=lambda weights, grad, head_dim: like(weights)
)
def causal_softmax_backward(weights, grad, head_dim):
    """Gradient of the scores before the division by sqrt(head_dim)."""
    mean = np.sum(weights * grad, axis=2, keepdims=True)
    return (weights * (grad - mean) / np.sqrt(head_dim)).astype(weights.dtype, copy=False)
