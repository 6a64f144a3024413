"""One GPU of ExFlow or of its baseline: what it holds, and the steps that both ways through the layers are made of.

Chapter: model_parallel/ex_flow.
"""

import numpy as np

from toolkit.kernels.layers import add, linear, rms_norm
from toolkit.runtime.arrays import is_shape_only

from ._ex_flow_model import attend, experts, gate, project
from ._ex_flow_wire import exchange


class Rank:
    """What one GPU has: the model with its own experts only, a cache of the sequences it attends over, its wires."""

    def __init__(self, comm, model, heads, placement, context, first, routes, way):
        self.comm, self.size, self.layers, self.heads = comm, comm.size, len(placement), heads
        self.model, self.placement, self.context = model, placement, context
        self.first, self.routes, self.way = first, routes, way
        mine = [np.flatnonzero(layer == comm.rank) for layer in placement]
        self.local = np.zeros(placement.shape, int)  # an expert's number among those of its GPU
        for number, own in zip(self.local, mine, strict=True):
            number[own] = np.arange(len(own))
        self.own = [
            [_some(layer[name], own) for name in ("expert_up", "expert_down")]
            for layer, own in zip(model["layers"], mine, strict=True)
        ]

    def now(self, sequence):
        """Positions of new tokens: all sequences are equally long."""
        return np.full(len(sequence), self.context.position)

    def attention(self, j, x, sequence, where):
        layer = self.model["layers"][j]
        q, pairs = project(layer, x, where, self.heads)
        self.context.add(j, pairs, sequence - self.first, where)
        attended = attend(q, self.context.caches[j], sequence - self.first, where, self.heads)
        return add(x, linear(attended, layer["o"]))

    def gate(self, j, x, sequence, where):
        layer = self.model["layers"][j]
        normed = rms_norm(x, layer["norm_2"])
        forced = None if self.routes is None else self.routes[sequence, where, j]
        expert, weight = gate(normed, layer["router"], forced)
        return normed, expert.astype(np.int32), weight

    def experts(self, j, x, expert):
        return experts(x, self.local[j][expert], *self.own[j])

    def exchange(self, parcels):
        return exchange(self.comm, parcels, self.way)

    def head(self, x):
        """(logits, likeliest tokens)."""
        logits = linear(rms_norm(x, self.model["norm"]), self.model["head"])
        return logits, np.zeros(len(x), np.int32) if is_shape_only(logits) else logits.argmax(axis=1).astype(np.int32)


def _some(weights, own):
    return weights[: len(own)] if is_shape_only(weights) else weights[own]
