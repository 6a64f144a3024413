"""ZeRO stage 3: every rank keeps 1/P of the weights of each block, and has a block whole only while it runs.

To ZeRO a rank that holds other tokens of the same text is a rank with other data: weights are gathered over all ranks
before a block runs, forward and again backward, and its gradients are summed and cut by a reduce-scatter.
The weights of a block are one vector, so that a step of a collective is one message. The next block's weights, and the
last one's gradients, travel while this one computes.

Sent by a rank and block of W bytes: forward (P-1)/P · W, backward (P-1)/P · 2W. Tokens do not enter.
Sources: Rajbhandari et al. 2020, arXiv 1910.02054; over sequence ranks, Jacobs et al. 2023, arXiv 2309.14509.
Chapter: sequence_parallel/ulysses.
"""

import math

import numpy as np

from toolkit.runtime import Cost, kernel, like
from toolkit.runtime.algorithms import concatenate

from ._two_level import all_gather, reduce_scatter


def pieces(weights, size):
    """The vector of a block's weights in one piece for each rank, the last ones filled with zeros to equal length."""
    return np.split(padded(vector(weights), size), size)


def vector(weights):
    """A dict of arrays as one vector, in the order of names."""
    return concatenate(tuple(weights[name].reshape(-1) for name in sorted(weights)))


def views(whole, shapes):
    """The reverse: a dict of views of the vector, which may be longer. shapes: {name: shape}, see `_block.shapes`."""
    weights, start = {}, 0
    for name in sorted(shapes):
        size = math.prod(shapes[name])
        weights[name] = whole[start : start + size].reshape(shapes[name])
        start += size
    return weights


def forward(comm, mine, shapes, x, block):
    """Run blocks one after the other.

    mine      this rank's piece of each block        block   (weights, x) -> (y, saved)
    returns   (y, [saved, …])
    """
    saved, gathers = [], comm.split(0)  # a communicator of its own: weights travel beside the blocks' messages
    coming = gathers.spawn(all_gather, gathers, mine[0])
    for index in range(len(mine)):
        weights = views(coming.wait(), shapes)
        if index + 1 < len(mine):
            coming = gathers.spawn(all_gather, gathers, mine[index + 1])
        x, kept = block(weights, x)
        saved.append(kept)
    return x, saved


def backward(comm, mine, shapes, saved, grad, block_backward):
    """Gradients of `forward`, in reverse order.

    block_backward   (weights, saved, grad) -> (dx, grads as this rank's share)
    returns          (dx, [this rank's piece of each block's gradient, summed over all ranks])
    """
    gathers, scatters, leaving = comm.split(0), comm.split(0), []
    coming = gathers.spawn(all_gather, gathers, mine[-1])
    for index in reversed(range(len(mine))):
        weights = views(coming.wait(), shapes)
        if index:
            coming = gathers.spawn(all_gather, gathers, mine[index - 1])
        grad, grads = block_backward(weights, saved.pop(), grad)
        if leaving:
            leaving[-1].wait()
        leaving.append(scatters.spawn(reduce_scatter, scatters, padded(vector(grads), comm.size)))
    return grad, [share.wait() for share in reversed(leaving)]


@kernel(
    cost=lambda x, size: Cost(0, 0 if x.size % size == 0 else 2 * x.nbytes),
    out=lambda x, size: x if x.size % size == 0 else like(-(-x.size // size) * size, x.dtype),
)
def padded(x, size):
    """A vector with zeros at its end until it divides by `size`; itself, if it does."""
    return np.pad(x, (0, -x.size % size)) if x.size % size else x
