"""FSMoE: a mixture of experts in which traffic between nodes, traffic inside nodes and experts all run at once.

Experts lie on nodes (`ep`), and the devices of a node hold slices of each (`esp`). So a layer has five steps:
all-to-all between nodes (dispatch), all-gather inside a node, experts, reduce-scatter inside, all-to-all (combine).
They use three things that can be busy at once, and each gets a lane, first in, first out:

    inter     D_1 … D_r, then a piece of the dense layers' gradients, then C_1 … C_r
    intra     AG_1 … AG_r, then RS_1 … RS_r
    compute   E_1 … E_r

The capacity is cut into r chunks. Which r is best follows from fitted costs, for each layer and direction
(`_fs_moe_times`); how much gradient fits between, from what is idle (`_fs_moe_gradients`). Backward is the same program
with the experts' gradient for the experts. Nothing of this changes a result.

Beside it: one lane for all traffic ("one network": Tutel, PipeMoE), one for everything ("sequential": DeepSpeed-MoE).
Source: Pan et al. 2025, arXiv 2501.10714, and the code it publishes. Chapter: model_parallel/fs_moe.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from toolkit.kernels.elementwise import accumulate
from toolkit.kernels.layers import add
from toolkit.runtime.algorithms import concatenate
from toolkit.runtime.errors import ShapeError

from . import _fs_moe_wire as wire
from ._experts import (
    EXPERTS,
    Route,
    capacity,
    experts,
    experts_backward,
    order,
    order_backward,
    route,
    unorder,
    unorder_backward,
)
from ._gates import Gate
from ._in_turn import Queue

LANES = {  # which lane each of the three resources gets
    "three": {"inter": "inter", "intra": "intra", "compute": "compute"},
    "one network": {"inter": "network", "intra": "network", "compute": "compute"},
    "sequential": {"inter": "all", "intra": "all", "compute": "all"},
}

# ---- the schedule ----------------------------------------------------------------------------------------------------


def pipeline(start, r, stages, reduce=None):
    """All operations of a layer, issued in the order that each lane works in.

    start     (lane, function, *needs) -> what later operations need; the function gets what they gave
    r         chunks
    stages    (dispatch, gather, work, scatter, combine): functions of (chunk's number, what the stage before gave)
    reduce    () -> a reduced piece of gradients, or None
    returns   (what the r combines will give, what `reduce` will give or None)
    """
    send, gather, work, scatter, back = stages
    worked = []
    for i in range(r):
        sent = start("inter", lambda i=i: send(i, None))
        whole = start("intra", lambda x, i=i: gather(i, x), sent)
        worked.append(start("compute", lambda x, i=i: work(i, x), whole))
    reduced = start("inter", reduce) if reduce else None
    returned = []
    for i in range(r):
        summed = start("intra", lambda y, i=i: scatter(i, y), worked[i])
        returned.append(start("inter", lambda y, i=i: back(i, y), summed))
    return returned, reduced


class Lanes:
    """Operations in turn on each lane, beside the program, each once what it needs is there."""

    def __init__(self, comm, streams):
        queues = {lane: Queue(comm) for lane in LANES[streams].values()}
        self.queue = {resource: queues[lane] for resource, lane in LANES[streams].items()}

    def __call__(self, resource, function, *needs):
        return self.queue[resource].start(lambda: function(*(need.wait() for need in needs)), name=resource)


# ---- the layer -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FSMoELayer:
    """How a layer is run.

    gate           a Gate                          factor   f: experts a token times slack, sets the capacity
    r_fwd, r_bwd   chunks in each direction; empty slots are added up to a multiple of both
    streams        "three", "one network" or "sequential"
    hooks          {place: (function, its adjoint)} of a chunk (experts, slots, h); places are PLACES
    raises         ValueError  an unknown name, or no chunk at all
    """

    gate: Gate
    factor: float
    r_fwd: int = 1
    r_bwd: int = 1
    streams: str = "three"
    hooks: Mapping[str, tuple[Callable, Callable]] = field(default_factory=dict)

    def __post_init__(self):
        if self.streams not in LANES:
            raise ValueError(f"streams={self.streams!r} is none of {', '.join(LANES)}")
        if unknown := sorted(set(self.hooks) - set(PLACES)):
            raise ValueError(f"hooks at {', '.join(unknown)}: places are {', '.join(PLACES)}")
        if min(self.r_fwd, self.r_bwd) < 1:
            raise ValueError(f"r_fwd={self.r_fwd}, r_bwd={self.r_bwd}: a layer has at least one chunk")


PLACES = ("before_dispatch", "after_dispatch", "before_combine", "after_combine")


@dataclass(frozen=True)
class Saved:
    """What `backward` needs of a forward pass."""

    x: Any
    route: Route
    chunks: list  # what the experts kept of each
    back: Any  # (E, C, h), experts' outputs


def forward(layer, grid, weights, x, gradients=None):
    """The experts' outputs for this rank's tokens.

    grid        `ep` between nodes, `tp` inside a node (Grid numbers tp first)
    weights     {"router", "expert_up", "expert_down"}: `_experts.cut_experts`
    x           (tokens, h), each rank's own
    gradients   flat array to all-reduce over `ep` meanwhile, or None
    returns     (y, Saved, the reduced gradients or None)
    sends       2 (p-1)/p of the buffer (E, C, h) between nodes; inside, 2 (q-1) times the buffer's slots on this node
    raises      ShapeError  more chunks than slots
    """
    slots = capacity(len(x), len(weights["expert_up"]) * grid.ep.size, layer.factor)
    if (most := max(layer.r_fwd, layer.r_bwd)) > slots:
        raise ShapeError(f"{most} chunks of {slots} slots an expert: at least one would be empty")
    where = route(layer.gate, weights["router"], x, slots, math.lcm(layer.r_fwd, layer.r_bwd))
    kept = [None] * layer.r_fwd

    def work(i, buffer):
        out, kept[i] = experts(*(weights[name] for name in EXPERTS), buffer)
        return out

    hooks = [layer.hooks.get(place, (_same, _same))[0] for place in PLACES]
    back, reduced = _through(layer, grid, layer.r_fwd, order(x, where.token), work, hooks, gradients)
    return unorder(back, where.token, where.mix), Saved(x, where, kept, back), reduced


def backward(layer, grid, weights, saved, grad, gradients=None):
    """Gradients of `forward`: the combine's adjoint is a dispatch, and so on, so the same pipeline serves.

    grad      (tokens, h)
    returns   (dx, gradients of weights, the reduced gradients or None): experts' complete over the grid's `ep` and
              `tp`, the router's this rank's share
    """
    grads, r = {}, layer.r_bwd
    kept = regrouped(saved.chunks, r, grid.tp.size * grid.ep.size)

    def work(i, d_out):
        dx, *shares = experts_backward(*(weights[name] for name in EXPERTS), kept[i], d_out)
        for name, share in zip(EXPERTS, shares, strict=True):
            grads[name] = accumulate(grads[name], share) if i else share
        return dx

    hooks = [layer.hooks.get(place, (_same, _same))[1] for place in reversed(PLACES)]
    d_back, d_mix = unorder_backward(saved.back, saved.route.token, saved.route.mix, grad)
    d_in, reduced = _through(layer, grid, r, d_back, work, hooks, gradients)
    dx = order_backward(saved.x, saved.route.token, d_in)
    more, grads["router"] = layer.gate.backward(weights["router"], saved.route.saved, d_mix)
    return add(dx, more), grads, reduced


def _through(layer, grid, r, buffer, work, hooks, gradients):
    """The buffer (E, C, h) to the experts and back, in r chunks of its slots."""
    ep, esp, c = grid.ep, grid.tp, buffer.shape[1] // r
    leaving, arriving, returning, home = hooks
    stages = (
        lambda i, _: arriving(wire.dispatch(ep, leaving(buffer[:, i * c : (i + 1) * c]))),
        lambda _, x: wire.gather(esp, x),
        work,
        lambda _, y: wire.scatter(esp, y),
        lambda _, y: home(wire.combine(ep, returning(y))),
    )
    reduce = None if gradients is None else lambda: wire.reduce(ep, gradients)
    chunks, reduced = pipeline(Lanes(grid.comm, layer.streams), r, stages, reduce)
    return wire.joined([chunk.wait() for chunk in chunks], 1), reduced and reduced.wait()


def regrouped(chunks, r, ranks):
    """What experts kept, in r chunks instead of as many as there are: each has slots of every one of `ranks` ranks."""
    if len(chunks) == r:
        return chunks

    def again(parts):
        n, _, width = parts[0].shape
        whole = concatenate(tuple(part.reshape(n, ranks, -1, width) for part in parts), axis=2)
        c = whole.shape[2] // r
        return [whole[:, :, i * c : (i + 1) * c].reshape(n, -1, width) for i in range(r)]

    return list(zip(*map(again, zip(*chunks, strict=True)), strict=True))


def _same(x):
    return x
