"""Where the dense layers' gradients travel during a backward pass, and what a step takes then.

Backward runs through the layers from the last to the first, in each first its experts, then its dense part (attention,
norms). A layer's dense gradient exists when its dense part is done, and may be reduced in any later window:

    1. for nothing: in dense parts, where nodes do not talk, and in what dispatch and combine leave idle of a layer
    2. at a price: more than that in a layer, which makes the layer longer, but by less than the end of the pass
    3. at the end, with nothing beside it

Step 1 is greedy. Step 2 asks how much z to push into each layer with experts; a piece can only be of gradients that
exist by then, so sums of z from the start are bounded. The authors solve it by differential evolution under these
constraints. We let each unknown be a share of what is still allowed, which leaves plain bounds; `method="dp"` is exact
on a grid. Step 1 counts what is free with the degree that is best without gradients, step 2 chooses the degree again.
Source: Pan et al. 2025, arXiv 2501.10714, and its tools/optim.py. Chapter: model_parallel/fs_moe.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.optimize import differential_evolution

from ._fs_moe_times import DEGREES, best_degree, moe_time

KINDS, METHODS = ("experts", "dense"), ("end", "greedy", "de", "dp")


@dataclass(frozen=True)
class Layer:
    """A layer of a model.

    work       of its experts: `_fs_moe_costs.workload`
    dense      seconds of the dense part, backward; forward it takes half
    gradient   numbers of dense gradient on a rank
    """

    work: tuple
    dense: float
    gradient: float


@dataclass(frozen=True)
class Partition:
    """What is reduced when, in the order of the backward pass.

    windows   [("experts" | "dense", layer), …]
    pieces    numbers of gradient in each; one message each
    rest      numbers left for the end
    degrees   chunks of each layer in that order, chosen again for its piece
    seconds   of the backward pass
    """

    windows: list
    pieces: tuple
    rest: float
    degrees: tuple
    seconds: float


def windows(layers, costs, streams="three", degrees=DEGREES):
    """[(kind, layer, numbers that fit for nothing, numbers available before it), …] of a backward pass.

    costs   of the backward pass: `Costs.backward`
    """
    found, available = [], 0.0
    for number in reversed(range(len(layers))):
        layer = layers[number]
        found.append(("experts", number, float(costs.numbers(idle(layer.work, costs, streams, degrees))), available))
        found.append(("dense", number, float(costs.numbers(layer.dense)), available))
        available += layer.gradient
    return found


def idle(work, costs, streams="three", degrees=DEGREES):
    """Seconds of a layer in which its network between nodes has nothing to do, at the best degree."""
    r, seconds = best_degree(costs, work, streams=streams, degrees=degrees)
    t0, t1, _, t3 = costs.chunk(work, r)
    return max(0.0, seconds - r * (2 * t0 + (t1 + t3 if streams == "one network" else 0.0)))


def partition_gradients(layers, costs, method="de", streams="three", degrees=DEGREES, kinds=KINDS, seed=0):
    """Place the gradients of a backward pass: a Partition.

    costs    of the forward pass
    method   "end": nothing before the end; "greedy": what is free; then "de": also push, by differential evolution, or
             "dp": exactly, on a grid
    kinds    windows that may be used
    raises   ValueError  no such method
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is none of {', '.join(METHODS)}")
    costs = costs.backward()
    found = windows(layers, costs, streams, degrees)
    pieces, backlog = [], 0.0
    for kind, number, room, _ in found:
        pieces.append(min(backlog, room) if kind in kinds and method != "end" else 0.0)
        backlog += (layers[number].gradient if kind == "dense" else 0.0) - pieces[-1]
    if method in ("de", "dp") and backlog > 0:
        search = partial(_by_evolution, seed=seed) if method == "de" else _by_grid
        pieces = _pushed(layers, costs, found, np.array(pieces), streams, degrees, search).tolist()
    return _done(layers, costs, found, pieces, streams, degrees)


def _done(layers, costs, found, pieces, streams, degrees):
    rest = sum(layer.gradient for layer in layers) - sum(pieces)
    if rest < 1e-9 * sum(layer.gradient for layer in layers):  # rounding
        rest = 0.0
    chosen, seconds = [], 0.0
    for (kind, number, *_), piece in zip(found, pieces, strict=True):
        if kind == "experts":
            r, took = best_degree(costs, layers[number].work, piece, streams, degrees)
            chosen.append(r)
            seconds += took
        else:
            seconds += max(layers[number].dense, float(costs.reduce(piece)))
    seconds += float(costs.reduce(rest))
    return Partition([window[:2] for window in found], tuple(pieces), rest, tuple(chosen), seconds)


# ---- step 2: how much to push ----------------------------------------------------------------------------------------


def _pushed(layers, costs, found, filled, streams, degrees, search):
    """Numbers in each window: `filled`, and what `search` adds in layers with experts."""
    slack = np.array([window[3] for window in found]) - np.cumsum(filled)
    allowed = np.minimum.accumulate(slack[::-1])[::-1]  # what is pushed now is missing in all later windows
    place = [i for i, window in enumerate(found) if window[0] == "experts"]
    bounds, base = np.maximum(allowed[place], 0.0), filled[place]
    total = sum(layer.gradient for layer in layers) - filled.sum()

    def longer(turn, z):
        """Seconds of the layer that runs in this turn, with z more than what is free; an array gives an array."""
        work = layers[found[place[turn]][1]].work
        return np.min([moe_time(r, costs, work, base[turn] + z, streams) for r in degrees], axis=0)

    pieces = filled.copy()
    pieces[place] += search(longer, costs, bounds, total)
    return pieces


def _by_evolution(longer, costs, bounds, total, seed):
    def amounts(shares):
        z, done = [], 0.0
        for share, bound in zip(shares, bounds, strict=True):
            z.append(share * (bound - done))
            done = done + z[-1]
        return z

    def seconds(shares):
        z = amounts(shares)
        return sum(longer(turn, part) for turn, part in enumerate(z)) + costs.reduce(total - sum(z))

    nothing = np.zeros(len(bounds))
    found = differential_evolution(seconds, [(0.0, 1.0)] * len(bounds), rng=seed, vectorized=True, updating="deferred",
                                   x0=nothing, popsize=30, polish=False, maxiter=300, tol=1e-9)  # fmt: skip
    better = float(seconds(found.x)) < float(seconds(nothing))
    return amounts(found.x if better else nothing)


def _by_grid(longer, costs, bounds, total, steps=400):
    """Dynamic programming over how much has been pushed so far."""
    grid = np.linspace(0.0, bounds.max() or 1.0, steps + 1)
    best, choices = np.where(grid > 0, np.inf, 0.0), []
    for turn, bound in enumerate(bounds):
        price = longer(turn, grid)
        costs_to = np.full((steps + 1, steps + 1), np.inf)  # [before, after]
        for before in np.flatnonzero(np.isfinite(best)):
            costs_to[before, before:] = best[before] + price[: steps + 1 - before]
        costs_to[:, grid > bound * (1 + 1e-12)] = np.inf
        choices.append(costs_to.argmin(axis=0))
        best = costs_to.min(axis=0)
    at = int(np.argmin(best + costs.reduce(total - grid)))
    z = []
    for choice in reversed(choices):
        z.append(grid[at] - grid[choice[at]])
        at = choice[at]
    return z[::-1]


# ---- a step of training, and its rivals ------------------------------------------------------------------------------

RIVALS = {  # (lanes, degrees, method, windows)
    "DeepSpeed-MoE": ("sequential", (1,), "end", ()),
    "Tutel": ("one network", DEGREES, "end", ()),
    "Tutel, gradients beside dense parts": ("one network", DEGREES, "greedy", ("dense",)),
    "PipeMoE + Lina": ("one network", DEGREES, "chunks", KINDS),
    "FSMoE, one network": ("one network", DEGREES, "de", KINDS),
    "FSMoE, gradients at the end": ("three", DEGREES, "end", ()),
    "FSMoE, r = 2": ("three", (2,), "de", KINDS),
    "FSMoE": ("three", DEGREES, "de", KINDS),
}


def baseline_time(kind, layers, costs):
    """Seconds of a step, forward and backward, as one of RIVALS runs it. costs: of the forward pass."""
    streams, degrees, method, kinds = RIVALS[kind]
    forward = sum(layer.dense / 2 + best_degree(costs, layer.work, 0.0, streams, degrees)[1] for layer in layers)
    if method == "chunks":
        return forward + min(in_chunks(layers, costs, streams, chunk) for chunk in CHUNKS)
    return forward + partition_gradients(layers, costs, method, streams, degrees, kinds).seconds


CHUNKS = (0.5e6, 1e6, 2e6, 4e6, 8e6, 15e6)  # numbers; Lina's are 30 MB, which the rival may tune here


def in_chunks(layers, costs, streams, chunk):
    """Seconds of a backward pass whose gradients are cut into equal chunks, each layer's by itself, sent in turn where
    a whole one fits beside the experts' own messages, which go first (Lina, Li et al. 2023, arXiv 2210.17223)."""
    costs, waiting, seconds = costs.backward(), [], 0.0
    for layer in reversed(layers):
        took = best_degree(costs, layer.work, streams=streams)[1]
        for room in (idle(layer.work, costs, streams), layer.dense):
            while waiting and costs.reduce(waiting[0]) <= room:
                room -= costs.reduce(waiting.pop(0))
        count = int(np.ceil(layer.gradient / chunk))
        waiting += [layer.gradient / count] * count
        seconds += took + layer.dense
    return seconds + sum(float(costs.reduce(part)) for part in waiting)
