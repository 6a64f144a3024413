"""Megatron-LM: pipeline × tensor × data parallelism, each where the wires suit it, and pipelines whose bubble shrinks.

Tensor parallelism talks inside every layer, so it stays in a node; pipelines talk between stages, so they cross nodes;
data parallelism talks once a batch. Ranks are numbered tensor first, then data, then pipeline. Weights exist as slices
only, gradients are those of one device: there is one version of the weights, and a flush before each step.

The pieces are the part's: layers with their conjugate operators f and g in `_layers`, embedding and cross-entropy over
a cut vocabulary in `_vocabulary`, schedules in `_schedule`, what runs them in `_pipeline`. What is the paper's own is
here: the order of a step, scatter/gather of what stages send, and the closed forms.

The paper's layers have biases, LayerNorm and learned positions; ours have none, RMS norms and rotary positions. The
matrix products, the bytes and the schedule are the same. `parameters` counts the paper's model.
Source: Narayanan et al. 2021, arXiv 2104.04473; layers from Shoeybi et al. 2019, arXiv 1909.08053.
Chapter: model_parallel/megatron.
"""

from functools import partial

import numpy as np

from toolkit.runtime import Cost, kernel, like
from toolkit.runtime.errors import ShapeError
from toolkit.sequence_parallel._block import one_device

from . import _layers as layers
from ._mesh import Grid
from ._model import KEEP, RECOMPUTE, Plan, cut, loss_and_gradients, share_of
from ._schedule import gpipe, interleaved, one_f_one_b

# ---- a step of training ----------------------------------------------------------------------------------------------


def train(
    comm, params, batches, *, p, t, d, head_dim, microbatches, kind="1F1B", v=1, recompute=False,
    scatter_gather=True, rate=0.1,
):  # fmt: skip
    """Gradient descent on a language model that lies on a grid of p × t × d ranks.

    params         whole, as `_model` describes them; with one embedding for both ends if there is no "head"
    batches        list of (tokens, targets), both (B, s) integers
    p, t, d        sizes of pipeline, tensor and data parallelism; their product is the number of ranks
    microbatches   m = B / (d · b) of b sequences each
    kind, v        see `schedule`
    recompute      keep a layer's input only, and run it forward again: half as many bytes again inside a tensor group
    scatter_gather a rank sends its 1/t of what a stage sends
    returns        (losses, the same on all ranks, as an array; this rank's chunks after the last step)
    raises         ShapeError, a ValueError, before anything is sent: what does not divide
    """
    grid, order = Grid(comm, tp=t, dp=d, pp=p), schedule(kind, p, microbatches, v)
    chunks, losses = cut(params, grid, order, head_dim), []
    for tokens, targets in batches:
        setting = layers.Setting(grid.tp, grid.cp, one_device(causal=True), head_dim, np.arange(tokens.shape[1]))
        travel = dict(zip(("pack", "unpack"), scattered(grid.tp), strict=True)) if scatter_gather and t > 1 else {}
        layer = RECOMPUTE if recompute else KEEP
        plan = Plan(grid, order, setting, "head" not in params, layer, travel)
        loss, chunks = train_step(plan, chunks, tokens, targets, rate)
        losses.append(loss)
    return np.array(losses), chunks


def train_step(plan, chunks, tokens, targets, rate):
    """One step on a batch, (B, s) integers. Returns (loss, chunks after it)."""
    mine = (share_of(plan.grid, text, plan.schedule.microbatches, plan.setting.where) for text in (tokens, targets))
    loss, grads, _ = loss_and_gradients(plan, chunks, *mine, total=tokens.size)  # pipeline, flush, all-reduce
    return loss, descend(chunks, grads, rate)


def schedule(kind, p, m, v=1):
    """The schedule of that name: "GPipe", "1F1B", or "interleaved" with v chunks of layers a rank.

    raises   ShapeError  no such name; chunks where there are none; m no multiple of p when interleaved
    """
    plain = {"GPipe": gpipe, "1F1B": one_f_one_b}
    if kind not in (*plain, "interleaved"):
        raise ShapeError(f"kind={kind!r} is none of GPipe, 1F1B, interleaved")
    if kind in plain and v != 1:
        raise ShapeError(f"{kind} has one chunk of layers a rank, not {v}: interleaved has more")
    return interleaved(p, m, v) if kind == "interleaved" else plain[kind](p, m)


def scattered(tp):
    """(pack, unpack): of what a stage sends, each tensor rank takes its part across, and the part is gathered there.

    All t ranks hold the same activations, and each has a NIC: t copies would cross, and one suffices.
    """

    def part(x):
        return x[len(x) * tp.rank // tp.size : len(x) * (tp.rank + 1) // tp.size]

    return part, partial(layers.all_gather, tp)


def descend(weights, grads, rate):
    """weights - rate · grads, for nested dicts and lists of arrays."""
    if isinstance(weights, dict):
        return {name: descend(weights[name], grads[name], rate) for name in weights}
    if isinstance(weights, list):
        return [descend(w, g, rate) for w, g in zip(weights, grads, strict=True)]
    return moved(weights, grads, rate)


@kernel(cost=lambda w, grad, rate: Cost(0, 3 * w.nbytes), out=lambda w, grad, rate: like(w))
def moved(w, grad, rate):
    return w - rate * grad


# ---- the paper's closed forms ----------------------------------------------------------------------------------------


def bubble(p, m, v=1):
    """Idle over ideal time of a flushed pipeline, messages free: section 2.2.

    v   chunks of layers a rank; 1 for GPipe and 1F1B
    """
    return (p - 1) / (v * m)


def pipeline_seconds(p, m, forward, backward, v=1):
    """Seconds of a batch; forward, backward: of one microbatch through all of a rank's layers."""
    return (m + (p - 1) / v) * (forward + backward)


def tensor_bytes(t, b, s, h, layers, microbatches, itemsize=2, recompute=False):
    """Bytes that a rank sends inside its tensor group in a step, for its `layers`: section 3.2.

    An all-reduce of b·s·h numbers sends 2 (t - 1) / t of them; a layer has two forward and two backward, and with
    recomputation the two forward ones once more.
    """
    return (12 if recompute else 8) * b * s * h * (t - 1) * itemsize * layers * microbatches // t


def stage_bytes(b, s, h, t=1, itemsize=2, scatter_gather=True):
    """Bytes that a rank sends to the next stage for a microbatch: section 4.1."""
    return b * s * h * itemsize // (t if scatter_gather else 1)


def gradient_bytes(d, numbers, itemsize=2):
    """Bytes that a rank sends to all-reduce that many gradients over d ranks, once a batch."""
    return 2 * (d - 1) * numbers * itemsize // d


def parameters(layers, h, s=2048, vocabulary=51_200):
    """Numbers in a GPT model with biases, LayerNorm, learned positions: equation 2."""
    return 12 * layers * h * h * (1 + 13 / (12 * h) + (vocabulary + s) / (12 * layers * h))


def flops(batch, layers, h, s=2048, vocabulary=51_200):
    """Operations of a step, each layer's forward pass done twice: equation 3."""
    return 96 * batch * s * layers * h * h * (1 + s / (6 * h) + vocabulary / (16 * layers * h))


def days(tokens, parameters, devices, rate):
    """Days of training: 8 operations a token and parameter, `rate` operations/s a device. Equation 4."""
    return 8 * tokens * parameters / (devices * rate) / 86_400
