"""A mixture of experts over ranks: tokens travel to the experts that a gate chose for them, and back.

    gate → order → dispatch → experts → combine → back in order        each replaceable, each forward with its backward

A rank has some experts whole (or, with tensor parallelism, some channels of each) and tokens of its own. Order puts a
rank's tokens into a buffer (experts, capacity, h): a slot a chosen pair, in token order; what overflows is dropped and
keeps its residual only, and empty slots are zero. Dispatch is an all-to-all over the ranks `ep` that share the experts.

In a placed model (`layer`) nothing is dropped and no balance is asked for: both depend on which tokens are together, so
no two grids would agree. The capacity is then the largest load of any expert, agreed on by one small all-reduce.
Source: GShard, Lepikhin et al. 2020, arXiv 2006.16668. Chapter: model_parallel/fs_moe.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from toolkit.kernels.layers import add, gelu, gelu_backward, matmul, rms_norm, rms_norm_backward
from toolkit.runtime.algorithms import concatenate
from toolkit.runtime.arrays import is_shape_only, like
from toolkit.runtime.errors import ShapeError
from toolkit.runtime.kernel import Cost, kernel
from toolkit.sequence_parallel._megatron_sp import NORMS

from . import _layers as layers

EXPERTS = ("expert_up", "expert_down")  # (E, h, f), (E, f, h): a rank's own, and so are their gradients

# ---- gate and order --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Route:
    """Where tokens went.

    token   (E, C) integers: the token in each slot, -1 where there is none
    mix     (tokens, E): weight of each expert's output, zero where not chosen
    saved   what the gate's backward needs
    """

    token: np.ndarray
    mix: np.ndarray
    saved: Any


def capacity(tokens, experts, factor):
    """Slots of an expert for one rank's tokens: factor · tokens / experts, rounded up.

    factor   experts a token, times the slack: 2.4 is two experts and 20 %
    """
    return math.ceil(factor * tokens / experts - 1e-9)


def route(gate, weights, x, slots, multiple=1):
    """Ask the gate for these tokens, (tokens, h): a Route of `slots` slots an expert, and empty ones to a multiple."""
    chosen, mix, saved = gate.forward(weights, x, slots)
    return Route(place(chosen, slots, -slots % multiple), mix, saved)


@kernel(
    cost=lambda chosen, slots, empty=0: Cost(0, 9 * chosen.size),
    out=lambda chosen, slots, empty=0: like((chosen.shape[1], slots + empty), "int64"),
)
def place(chosen, slots, empty=0):
    """(E, slots + empty): for each expert the first tokens that chose it, -1 where there are fewer than slots."""
    rank = np.cumsum(chosen, axis=0) - 1  # of a token among those that chose the expert
    token, expert = np.nonzero(chosen & (rank < slots))
    found = np.full((chosen.shape[1], slots + empty), -1)
    found[expert, rank[token, expert]] = token
    return found


def _buffer(x, token):
    return like((*token.shape, x.shape[1]), x.dtype)


@kernel(cost=lambda x, token: Cost(0, 2 * _buffer(x, token).nbytes), out=_buffer)
def order(x, token):
    """(E, C, h): each slot its token's row of x (tokens, h), zero where empty."""
    return np.where((token >= 0)[..., None], x[token], x.dtype.type(0))


@kernel(cost=lambda x, token, grad: Cost(0, 2 * grad.nbytes + x.nbytes), out=lambda x, token, grad: like(x))
def order_backward(x, token, grad):
    dx = np.zeros(x.shape, x.dtype)
    for slots, rows in zip(token, grad, strict=True):  # an expert has a token once
        dx[slots[slots >= 0]] += rows[slots >= 0]
    return dx


@kernel(
    cost=lambda buffer, token, mix: Cost(0, 2 * buffer.nbytes),
    out=lambda buffer, token, mix: like((len(mix), buffer.shape[2]), buffer.dtype),
)
def unorder(buffer, token, mix):
    """(tokens, h): each token the sum of its experts' outputs, weighted."""
    y = np.zeros((len(mix), buffer.shape[2]), buffer.dtype)
    for e, slots in enumerate(token):
        used = slots[slots >= 0]
        y[used] += mix[used, e, None] * buffer[e, slots >= 0]
    return y


@kernel(
    cost=lambda buffer, token, mix, grad: Cost(0, 3 * buffer.nbytes),
    out=lambda buffer, token, mix, grad: (like(buffer), like(mix)),
)
def unorder_backward(buffer, token, mix, grad):
    """(d_buffer, d_mix); empty slots get no gradient."""
    d_buffer, d_mix = np.zeros(buffer.shape, buffer.dtype), np.zeros(mix.shape, mix.dtype)
    for e, slots in enumerate(token):
        here = slots >= 0
        rows = grad[slots[here]]
        d_buffer[e, here] = mix[slots[here], e, None] * rows
        d_mix[slots[here], e] = (buffer[e, here] * rows).sum(axis=1)
    return d_buffer, d_mix


# ---- dispatch, experts, combine --------------------------------------------------------------------------------------


def dispatch(ep, buffer):
    """(E, C, h) of this rank's tokens -> (E/p, p·C, h) of this rank's experts, ranks one after the other."""
    n = experts_each(ep, len(buffer))
    received = ep.all_to_all([buffer[j * n : (j + 1) * n] for j in range(ep.size)])
    return received[0] if ep.size == 1 else concatenate(tuple(received), axis=1)


def combine(ep, buffer):
    """The way back: (E/p, p·C, h) -> (E, C, h). Inverse of `dispatch`, and its adjoint."""
    c = buffer.shape[1] // ep.size
    received = ep.all_to_all([buffer[:, j * c : (j + 1) * c] for j in range(ep.size)])
    return received[0] if ep.size == 1 else concatenate(tuple(received))


def experts_each(ep, count):
    """Experts of a rank. Raises ShapeError if they do not divide."""
    if count % ep.size:
        raise ShapeError(f"{count} experts do not divide among {ep.size} ranks")
    return count // ep.size


def experts(up, down, x):
    """Each expert on its slots: gelu(x · up) · down.

    up, down   (n, h, f), (n, f, h)      x   (n, slots, h)      returns   (y, saved)
    """
    raised = matmul(x, up)
    return matmul(gelu(raised), down), (x, raised)


def experts_backward(up, down, saved, grad):
    """(dx, d_up, d_down) of `experts`: twice its products."""
    x, raised = saved
    d_raised = gelu_backward(raised, matmul(grad, down.swapaxes(1, 2)))
    d_down = matmul(gelu(raised).swapaxes(1, 2), grad)
    return matmul(d_raised, up.swapaxes(1, 2)), matmul(x.swapaxes(1, 2), d_raised), d_down


# ---- the layer, and a block with it ----------------------------------------------------------------------------------


def mixture(ep, gate, weights, x, slots=None):
    """Experts' outputs for this rank's tokens.

    weights   {"router": the gate's, whole; "expert_up", "expert_down": of this rank's experts}
    x         (tokens, h)          slots   of an expert for this rank's tokens; None: as many as the fullest needs
    returns   (y, saved)
    sends     two all-to-alls of (p-1)/p of the buffer (E, slots, h)
    """
    if slots is None:
        chosen, mix, kept = gate.forward(weights["router"], x, None)
        where = Route(place(chosen, fullest(ep, chosen, gate)), mix, kept)
    else:
        where = route(gate, weights["router"], x, slots)
    out, kept = experts(*(weights[name] for name in EXPERTS), dispatch(ep, order(x, where.token)))
    back = combine(ep, out)
    return unorder(back, where.token, where.mix), (x, where, kept, back)


def mixture_backward(ep, gate, weights, saved, grad):
    """(dx, gradients): of the experts complete over `ep`, of the router this rank's share."""
    x, where, kept, back = saved
    d_back, d_mix = unorder_backward(back, where.token, where.mix, grad)
    d_in, d_up, d_down = experts_backward(*(weights[name] for name in EXPERTS), kept, dispatch(ep, d_back))
    dx = order_backward(x, where.token, combine(ep, d_in))
    more, d_router = gate.backward(weights["router"], where.saved, d_mix)
    return add(dx, more), {"router": d_router, "expert_up": d_up, "expert_down": d_down}


def fullest(ep, chosen, gate):
    """The largest load of any expert by any rank; in a shape-only run, as if loads were equal."""
    if is_shape_only(chosen):
        return capacity(*chosen.shape, gate.per_token)
    return int(ep.all_reduce(chosen.sum(axis=0).max(keepdims=True), op="max")[0])


def layer(ep, gate):
    """The pair (forward, backward) that `_model.Layer` wants: blocks with a "router" have experts for an MLP.

    sends   what `_layers.block` sends, two all-to-alls a pass over `ep`, and over `tp` the router's gradient
    """

    def forward(setting, weights, x):
        if "router" not in weights:
            return layers.block(setting, weights, x)
        middle, kept = layers.attend(setting, weights, x)
        normed = rms_norm(middle, weights["norm_2"])
        y, kept_2 = mixture(ep, gate, weights, setting.edge.enter(setting.tp, normed))
        return add(middle, setting.edge.leave(setting.tp, y)), (kept, middle, kept_2)

    def backward(setting, weights, saved, grad):
        if "router" not in weights:
            return layers.block_backward(setting, weights, saved, grad)
        (kept, middle, kept_2), tp, edge = saved, setting.tp, setting.edge
        d_inside, grads = mixture_backward(ep, gate, weights, kept_2, edge.leave_backward(tp, grad))
        # Outputs are shares of `tp` ranks, so what they tell the router is a share, too.
        grads["router"] = {name: layers.all_reduce(tp, g) for name, g in grads["router"].items()}
        d_middle, d_norm = rms_norm_backward(middle, weights["norm_2"], edge.enter_backward(tp, d_inside))
        dx, more = layers.attend_backward(setting, weights, kept, add(d_middle, grad))
        return dx, grads | more | {"norm_2": d_norm}

    return forward, backward


# ---- who has what ----------------------------------------------------------------------------------------------------


def expert_weights(random, gate, h, hidden, count):
    """{"router", "expert_up", "expert_down"} of `count` experts of h · hidden channels, whole, float64."""
    up, down = (random.standard_normal((count, a, b)) / a**0.5 for a, b in ((h, hidden), (hidden, h)))
    return {"router": gate.init(random, h, count), "expert_up": up, "expert_down": down}


def cut_block(weights, grid, head_dim):
    """This rank's part of a block with experts: its heads, its experts, of each its channels.

    raises   ShapeError  heads or channels do not divide among `grid.tp`, experts among `grid.ep`
    """
    heads = (("q", 1, "query heads"), ("k", 1, "key heads"), ("v", 1, "key heads"), ("o", 0, "query heads"))
    attention = {name: part(weights[name], axis, grid.tp, what, head_dim) for name, axis, what in heads}
    return attention | {name: weights[name] for name in NORMS} | cut_experts(weights, grid.ep, grid.tp)


def cut_experts(weights, ep, tp):
    """This rank's experts, and of each its channels. The router is whole everywhere."""
    up, down = (part(weights[name], 0, ep, "experts") for name in EXPERTS)
    up, down = (part(w, axis, tp, "channels of an expert") for w, axis in ((up, 2), (down, 1)))
    return {"router": weights["router"], "expert_up": up, "expert_down": down}


def part(w, axis, comm, what, unit=1):
    """Slice `comm.rank` of an array along an axis that counts `what`, `unit` numbers each."""
    count = w.shape[axis] // unit
    if count % comm.size:
        raise ShapeError(f"{count} {what} do not divide among {comm.size} ranks")
    n = count // comm.size * unit
    if is_shape_only(w):
        return like((*w.shape[:axis], n, *w.shape[axis + 1 :]), w.dtype)
    return w.take(range(comm.rank * n, (comm.rank + 1) * n), axis)
