"""What a ladder is made of: attention and MLP as partial outputs, and a sum over ranks that runs beside compute.

Each rank has some heads and some channels of the MLP. A module begins with its norm and ends with a partial sum of its
output: nothing is said in between, and nothing is added to the stream here. Forward stands over backward.

NCCL adds what arrives inside its own kernel, on a stream of its own, one collective after the other. `isum` does the
same: adding occupies no compute engine (`Device.overlap_slowdown` says what it takes from it).
Chapter: model_parallel/ladder_residual.
"""

import numpy as np

from toolkit.kernels.attention import attention as dense_attention
from toolkit.kernels.attention import attention_backward as dense_attention_backward
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
from toolkit.runtime.kernel import Cost, kernel
from toolkit.sequence_parallel._block import project, project_backward
from toolkit.sequence_parallel._megatron_sp import NORMS
from toolkit.sequence_parallel._two_level import levels

from ._layers import by_sequence, by_token

# ---- the sum over ranks ----------------------------------------------------------------------------------------------


def isum(comm, x, after=None):
    """Start the sum of `x` over all ranks, once the Request `after` is done. Returns a Request.

    sends   2 (p-1)/p of x.nbytes from every rank, in two rounds: slices to their adders, then sums to everybody; over
            several nodes a round in each, and two between ranks of the same place
    """

    def in_turn():
        if after is not None:
            after.wait()
        return fused_sum(comm, x)

    return comm.spawn(in_turn, name="all_reduce")


def fused_sum(comm, x):
    """The sum of `x` over all ranks: the same bits everywhere."""
    if comm.size == 1:
        return x
    nodes, _, inside, across = levels(comm)
    mine = _scatter_sum(inside, x.reshape(-1))
    if nodes > 1:
        mine = _gather(across, _scatter_sum(across, mine))
    return _gather(inside, mine).reshape(x.shape)


def _scatter_sum(comm, flat):
    """Slice `rank` of the sum: every rank sends every other its slice, all at once."""
    slices = [flat[len(flat) * r // comm.size : len(flat) * (r + 1) // comm.size] for r in range(comm.size)]
    parts = _exchange(comm, slices)
    return parts[comm.rank] if is_shape_only(flat) else sum(parts[1:], parts[0])


def _gather(comm, mine):
    parts = _exchange(comm, [mine] * comm.size)
    return like(sum(map(len, parts)), mine.dtype) if is_shape_only(mine) else np.concatenate(parts)


def _exchange(comm, parts):
    """Part r goes to rank r; returns what came from each rank, one's own included."""
    others = [(comm.rank + hop) % comm.size for hop in range(1, comm.size)]
    incoming = {r: comm.irecv(r, tag="all_reduce") for r in others}
    outgoing = [comm.isend(parts[r], r, tag="all_reduce") for r in others]
    received = [parts[r] if r == comm.rank else incoming[r].wait() for r in range(comm.size)]
    for sent in outgoing:
        sent.wait()
    return received


# ---- the two modules -------------------------------------------------------------------------------------------------


def attention(weights, x, where, head_dim, past=None):
    """Partial output of this rank's heads.

    x         (sequences · n, D)                     where     (n,) positions of a sequence's tokens
    past      (k, v) of the tokens before, or None
    returns   (partial, saved, (k, v) with these tokens)
    """
    normed = rms_norm(x, weights["norm_1"])
    sequences = len(x) // len(where)
    heads = project(weights, normed, np.tile(where, sequences), head_dim)
    q, k, v = (by_sequence(make(), sequences) for make in heads)
    if past is not None:
        k, v = append(past[0], k), append(past[1], v)
    out, lse = dense_attention(q, k, v, True, return_lse=True)
    merged = merge_heads(by_token(out, sequences))
    return linear(merged, weights["o"]), (x, normed, merged, (q, k, v, out, lse)), (k, v)


def attention_backward(weights, saved, grad, where, head_dim):
    """(partial gradient of x, gradients): complete but for the norm's, which is this rank's share."""
    x, normed, merged, kept = saved
    sequences = len(x) // len(where)
    d_merged, d_o = linear_backward(merged, weights["o"], grad)
    d_heads = dense_attention_backward(*kept, by_sequence(split_heads(d_merged, head_dim), sequences), True)
    d_heads = (by_token(d, sequences) for d in d_heads)
    d_normed, grads = project_backward(weights, normed, np.tile(where, sequences), d_heads)
    dx, d_norm = rms_norm_backward(x, weights["norm_1"], d_normed)
    return dx, grads | {"o": d_o, "norm_1": d_norm}


def mlp(weights, x, _where=None, _head_dim=None, _past=None):
    """Partial output of this rank's channels; it needs no cache. Returns (partial, saved, None)."""
    normed = rms_norm(x, weights["norm_2"])
    raised = linear(normed, weights["up"])
    return linear(gelu(raised), weights["down"]), (x, normed, raised), None


def mlp_backward(weights, saved, grad, _where=None, _head_dim=None):
    x, normed, raised = saved
    d_active, d_down = linear_backward(gelu(raised), weights["down"], grad)
    d_normed, d_up = linear_backward(normed, weights["up"], gelu_backward(raised, d_active))
    dx, d_norm = rms_norm_backward(x, weights["norm_2"], d_normed)
    return dx, {"norm_2": d_norm, "up": d_up, "down": d_down}


BACKWARD = {attention: attention_backward, mlp: mlp_backward}


def run_module(shards, context, cache, module, x):
    """(this rank's partial output of a module, what its backward needs)."""
    layer, parts = module
    total, kept = None, []
    for part in parts:
        past = cache[layer] if cache is not None and part is attention else None
        output, saved, pair = part(shards["layers"][layer], x, *context, past)
        if cache is not None and part is attention:
            cache[layer] = pair
        total = output if total is None else add(total, output)
        kept.append(saved)
    return total, kept


def run_backward(shards, context, grads, module, kept, grad):
    """This rank's partial gradient of what a module read; gradients of its weights go to `grads`."""
    layer, parts = module
    total = None
    for part, saved in zip(parts, kept, strict=True):
        dx, shares = BACKWARD[part](shards["layers"][layer], saved, grad, *context)
        grads[layer] |= shares
        total = dx if total is None else add(total, dx)
    return total


def sum_norms(comm, grads):
    """The gains' gradients of all layers, which are shares of ranks, summed in one message."""
    if is_shape_only(grads[0]["norm_1"]):
        fused_sum(comm, like((len(grads) * len(NORMS), len(grads[0]["norm_1"])), grads[0]["norm_1"].dtype))
        return
    total = iter(fused_sum(comm, np.stack([layer[name] for layer in grads for name in NORMS])))
    for layer in grads:
        layer |= {name: next(total) for name in NORMS}


@kernel(
    cost=lambda past, new: Cost(0, 2 * new.nbytes),
    out=lambda past, new: like((past.shape[0], past.shape[1] + new.shape[1], past.shape[2]), past.dtype),
)
def append(past, new):
    """Keys or values of new tokens behind those in the cache; charged as a cache that has the space already."""
    return np.concatenate((past, new), axis=1)


@kernel(cost=lambda partial, x, size: Cost(0, 3 * x.nbytes), out=lambda partial, x, size: like(x))
def add_share(partial, x, size):
    """partial + x / size: summed over `size` ranks, outputs add up and streams are averaged."""
    return (partial + x / size).astype(x.dtype, copy=False)
