"""ZeRO: ranks that differ in their data keep one copy of the optimiser's states, gradients, weights between them.

    stage   cut over d ranks                        bytes a parameter, Adam in mixed precision
    0       nothing                                 2 + 2 + 12
    1       states                                  2 + 2 + 12/d
    2       states, and gradients between passes    2 + (2 + 12)/d
    3       states, gradients, and layers' weights  (2 + 2 + 12)/d

A layer, or the two ends of the model, is one vector, cut into d pieces (`sequence_parallel._zero3`). Stage 1 sums
gradients by a reduce-scatter, moves its piece, and gathers weights: as many bytes as an all-reduce. Stages 2 and 3 sum
after every microbatch, and stage 3 gathers a layer before each pass. Its embedding and head stay whole, as in stage 2.
Nothing overlaps here; `sequence_parallel._zero3` gathers ahead.

    plan = Plan(grid, schedule, setting, layer=zero.layer(data, stage, shapes), across=zero.across(stage))
    chunks, states = zero.begin(data, chunks, stage)
    loss, grads, _ = loss_and_gradients(plan, chunks, tokens, targets, total)
    chunks = zero.update(data, stage, chunks, states, grads, rate)

Source: Rajbhandari et al. 2020, arXiv 1910.02054. Chapter: model_parallel/megatron.
"""

from dataclasses import dataclass

import numpy as np

from toolkit.runtime import Cost, kernel
from toolkit.runtime.errors import ShapeError
from toolkit.sequence_parallel import _zero3 as vectors

from . import _layers as layers
from ._model import KEEP, Layer, summed


def bytes_a_parameter(stage, d, states=12):
    """Bytes that a rank keeps for each parameter. states: of the optimiser; Adam has three 4-byte numbers."""
    _known(stage)
    return (2 / d if stage == 3 else 2) + (2 / d if stage >= 2 else 2) + (states / d if stage else states)


# ---- weights and gradients -------------------------------------------------------------------------------------------


def layer(comm, stage, shapes, inner=KEEP):
    """A Layer for `Plan`: stage 3 gathers weights before a pass, stages 2 and 3 cut gradients after it.

    shapes   of a block's weights on this rank, by name
    """

    def whole(weights):
        return vectors.views(layers.all_gather(comm, weights), shapes) if _known(stage) == 3 else weights

    def forward(setting, weights, x):
        return inner.forward(setting, whole(weights), x)

    def backward(setting, weights, saved, grad):
        dx, grads = inner.backward(setting, whole(weights), saved, grad)
        return dx, piece_of_sum(comm, grads) if stage >= 2 else grads

    return Layer(forward, backward)


def across(stage):
    """`Plan.across`: from stage 1 on, pieces of the sums; layers that `layer` has cut already are left as they are."""

    def pieces(comm, grads):
        if not _known(stage):
            return summed(comm, grads)
        blocks = grads["layers"] if stage >= 2 else [piece_of_sum(comm, block) for block in grads["layers"]]
        return {"layers": blocks, "ends": piece_of_sum(comm, _ends(grads))} if _ends(grads) else {"layers": blocks}

    return pieces


def piece_of_sum(comm, grads):
    """This rank's piece of the vector of gradients, summed over ranks."""
    return layers.reduce_scatter(comm, vectors.padded(vectors.vector(grads), comm.size))


# ---- the optimiser's states ------------------------------------------------------------------------------------------


@dataclass
class State:
    """Adam's states of one vector, or of this rank's piece of it."""

    master: np.ndarray
    mean: np.ndarray
    square: np.ndarray
    steps: int = 0


def begin(comm, chunks, stage):
    """(chunks as `update` gives them, their states)."""
    kept = [chunk | {"layers": [_kept(comm, block, stage) for block in chunk["layers"]]} for chunk in chunks]
    return kept, [[_state(comm, unit, stage) for unit in _units(chunk)] for chunk in chunks]


def update(comm, stage, chunks, states, grads, rate, betas=(0.9, 0.999), epsilon=1e-8):
    """One step of Adam on pieces; then everyone gets the weights that it keeps whole. Returns new chunks."""
    moved = []
    for chunk, mine, share in zip(chunks, states, grads, strict=True):
        found = []
        shares = [*share["layers"], share.get("ends") if stage else _ends(share)]
        for weights, state, grad in zip(_units(chunk), mine, shares, strict=False):
            grad = grad if stage else vectors.vector(grad)
            state.steps += 1
            adam(state.master, state.mean, state.square, grad, state.steps, rate, betas, epsilon)
            found.append(_weights(comm, stage, weights, state.master))
        count = len(chunk["layers"])
        ends = found[count] if len(found) > count else {}
        moved.append({"layers": found[:count], **ends})
    return moved


def _weights(comm, stage, old, master):
    """What a rank keeps of the moved vector: its piece, or all of it in the shapes of `old`."""
    if isinstance(old, np.ndarray):
        return master.astype(old.dtype)
    shapes = {name: a.shape for name, a in old.items()}
    narrow = master.astype(next(iter(old.values())).dtype)  # what travels has the weights' dtype
    return vectors.views(layers.all_gather(comm, narrow) if stage else narrow, shapes)


@kernel(
    cost=lambda master, mean, square, grad, *_: Cost(0, grad.nbytes + 6 * master.nbytes),
    out=lambda master, mean, square, grad, *_: master,
)
def adam(master, mean, square, grad, steps, rate, betas, epsilon):
    """Kingma and Ba 2015, in place: master, mean and square (n,) of one dtype; grad may be narrower."""
    mean += (1 - betas[0]) * (grad - mean)
    square += (1 - betas[1]) * (grad * grad - square)
    unbiased = mean / (1 - betas[0] ** steps), square / (1 - betas[1] ** steps)
    master -= rate * unbiased[0] / (np.sqrt(unbiased[1]) + epsilon)
    return master


# ---- inside ----------------------------------------------------------------------------------------------------------


def _ends(chunk):
    return {name: a for name, a in chunk.items() if name not in ("layers", "ends")}


def _units(chunk):
    """The vectors of a chunk: its layers, and its share of the model's two ends."""
    return [*chunk["layers"], *([_ends(chunk)] if _ends(chunk) else [])]


def _kept(comm, block, stage):
    return vectors.pieces(block, comm.size)[comm.rank].copy() if _known(stage) == 3 else block


def _state(comm, unit, stage):
    whole = vectors.pieces(unit, comm.size)[comm.rank] if stage else vectors.vector(unit)
    master = whole.astype(np.float64 if whole.dtype.itemsize == 8 else np.float32)  # a copy
    return State(master, np.zeros_like(master), np.zeros_like(master))


def _known(stage):
    if stage not in (0, 1, 2, 3):
        raise ShapeError(f"stage={stage!r}: ZeRO has stages 1, 2 and 3, and 0 keeps everything everywhere")
    return stage
