"""ZeRO stage 3: every rank keeps 1/P of the weights of each block, and has a block whole only while it runs.

To ZeRO a rank that holds other tokens of the same text is a rank with other data: weights are gathered over all ranks
before a block runs, forward and again backward, and its gradients are summed and cut by a reduce-scatter.
The weights of a block are one vector, so a block costs one message a step and nothing is padded. The next block's
weights travel while this one computes.

Sent by a rank and block of W bytes: forward (P-1)/P · W, backward (P-1)/P · 2W. Tokens do not enter.
Sources: Rajbhandari et al. 2020, arXiv 1910.02054; over sequence ranks, Jacobs et al. 2023, arXiv 2309.14509.
Chapter: sequence_parallel/ulysses.
"""

import math

import numpy as np

from toolkit.runtime.algorithms import concatenate


def pieces(weights, size):
    """The vector of a block's weights, cut into one piece for each rank; sizes differ by at most one."""
    return np.array_split(vector(weights), size)


def vector(weights):
    """A dict of arrays as one vector, in the order of names."""
    return concatenate(tuple(weights[name].reshape(-1) for name in sorted(weights)))


def views(whole, shapes):
    """The reverse: a dict of views of the vector. shapes: {name: shape}, as `_block.shapes` gives them."""
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
    saved, coming = [], comm.iall_gather(mine[0])
    for index in range(len(mine)):
        weights = views(coming.wait(), shapes)
        coming = comm.iall_gather(mine[index + 1]) if index + 1 < len(mine) else None
        x, kept = block(weights, x)
        saved.append(kept)
    return x, saved


def backward(comm, mine, shapes, saved, grad, block_backward):
    """Gradients of `forward`, in reverse order.

    block_backward   (weights, saved, grad) -> (dx, grads as this rank's share)
    returns          (dx, [this rank's piece of each block's gradient, summed over all ranks])
    """
    leaving, coming = [None] * len(mine), comm.iall_gather(mine[-1])
    for index in reversed(range(len(mine))):
        weights = views(coming.wait(), shapes)
        coming = comm.iall_gather(mine[index - 1]) if index else None
        grad, grads = block_backward(weights, saved.pop(), grad)
        leaving[index] = comm.ireduce_scatter(np.array_split(vector(grads), comm.size))
    return grad, [share.wait() for share in leaving]
