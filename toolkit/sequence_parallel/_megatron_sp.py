"""Megatron's sequence parallelism: weights are cut; tokens are gathered before products, sums scattered after.

Column-parallel weights (q, k, v, up) give each rank its heads or channels of all tokens; row-parallel ones (o, down)
give each rank a partial sum for all tokens. So a half of a block is: norm on one's own tokens, all-gather, products,
reduce-scatter back. Nothing leaves a rank twice, but all tokens of the hidden state go everywhere: the bytes that a
rank sends do not fall when ranks are added.

Sent by a rank and block, A = bytes of its own tokens' hidden state: forward 4 (P-1)·A; backward 6 (P-1)·A, because
gathered tokens are not kept but gathered again, while other products run.
The functions are those of `_block`, except that `where` holds the positions of all tokens, weights are this rank's
shards, and their gradients are complete: only those of the norms are shares (`sum_norms`).
Source: Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2. Chapter: sequence_parallel/ulysses.
"""

from toolkit.kernels.layers import (
    add,
    gelu,
    gelu_backward,
    linear,
    linear_backward,
    merge_heads,
    rms_norm,
    rms_norm_backward,
    split_heads,
)
from toolkit.runtime.arrays import is_shape_only, like
from toolkit.runtime.errors import ShapeError

from ._block import project, project_backward
from ._two_level import all_gather, reduce_scatter

COLUMNS, ROWS, NORMS = ("q", "k", "v", "up"), ("o", "down"), ("norm_1", "norm_2")


def shard_weights(weights, rank, size, head_dim):
    """This rank's part of the weights of a block: its heads and its channels of the MLP.

    raises   ShapeError  the query heads, the key heads or the MLP's channels do not divide among the ranks
    """
    for name, axis, unit, what in (("q", 1, head_dim, "query heads"), ("k", 1, head_dim, "key heads"),
                                   ("up", 1, 1, "channels of the MLP")):  # fmt: skip
        if (count := weights[name].shape[axis] // unit) % size:
            raise ShapeError(f"{count} {what} do not divide among {size} ranks: Megatron cuts weights by them")
    return {
        name: w if name in NORMS else _part(w, 1 if name in COLUMNS else 0, rank, size) for name, w in weights.items()
    }


def _part(w, axis, rank, size):
    n = w.shape[axis] // size
    if is_shape_only(w):
        return like((w.shape[0], n) if axis else (n, w.shape[1]), w.dtype)
    return (w[:, rank * n : (rank + 1) * n] if axis else w[rank * n : (rank + 1) * n]).copy()


def sum_norms(comm, grads):
    """The gradients of a block with those of the norms added up over the ranks."""
    return grads | {name: comm.all_reduce(grads[name]) for name in NORMS}


def block(comm, weights, x, where, attention, head_dim):
    """x + attention(norm(x)), then x + MLP(norm(x)).

    x          (n, h)     this rank's tokens            where   (N,)   positions of all tokens
    attention  Attention of one device: it gets all tokens of this rank's heads
    returns    (y, saved): like x; what `block_backward` needs
    """
    middle, kept = attend(comm, weights, x, where, attention, head_dim)
    y, kept_2 = mlp(comm, weights, middle)
    return y, (kept, kept_2)


def block_backward(comm, weights, saved, grad, attention, head_dim):
    """(dx, grads) of `block`: like x; dict like `weights`."""
    kept, kept_2 = saved
    d_middle, grads = mlp_backward(comm, weights, kept_2, grad)
    dx, more = attend_backward(comm, weights, kept, d_middle, attention, head_dim)
    return dx, grads | more


def attend(comm, weights, x, where, attention, head_dim):
    """x + o(attention(q, k, v of norm(x))): gather tokens, attend with some heads, scatter sums. Returns (y, saved)."""
    normed = rms_norm(x, weights["norm_1"])
    everything = all_gather(comm, normed)
    out, kept = attention.forward(comm, *(make() for make in project(weights, everything, where, head_dim)))
    merged = merge_heads(out)
    mine = reduce_scatter(comm, linear(merged, weights["o"]))
    return add(x, mine), (x, where, normed, merged, kept)


def attend_backward(comm, weights, saved, grad, attention, head_dim):
    """Gradients (dx, grads) of `attend`: an all-gather for each reduce-scatter, and the reverse."""
    x, where, normed, merged, kept = saved
    d_everything = all_gather(comm, grad)
    again = comm.spawn(all_gather, comm, normed)
    d_merged, d_o = linear_backward(merged, weights["o"], d_everything)
    d_heads = attention.backward(comm, kept, split_heads(d_merged, head_dim))
    d_everything, grads = project_backward(weights, again.wait(), where, d_heads)
    dx, d_norm = rms_norm_backward(x, weights["norm_1"], reduce_scatter(comm, d_everything))
    return add(dx, grad), grads | {"o": d_o, "norm_1": d_norm}


def mlp(comm, weights, x):
    """x + down(gelu(up(norm(x)))): gather tokens, some channels, scatter sums. Returns (y, saved)."""
    normed = rms_norm(x, weights["norm_2"])
    raised = linear(all_gather(comm, normed), weights["up"])
    mine = reduce_scatter(comm, linear(gelu(raised), weights["down"]))
    return add(x, mine), (x, normed, raised)


def mlp_backward(comm, weights, saved, grad):
    """Gradients (dx, grads) of `mlp`."""
    x, normed, raised = saved
    d_everything = all_gather(comm, grad)
    again = comm.spawn(all_gather, comm, normed)
    d_active, d_down = linear_backward(gelu(raised), weights["down"], d_everything)
    d_everything, d_up = linear_backward(again.wait(), weights["up"], gelu_backward(raised, d_active))
    dx, d_norm = rms_norm_backward(x, weights["norm_2"], reduce_scatter(comm, d_everything))
    return add(dx, grad), {"norm_2": d_norm, "up": d_up, "down": d_down}
