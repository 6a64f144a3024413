"""Ladder residual: a module reads the stream of one output ago, so that its predecessor's all-reduce has time.

Tensor parallelism ends every attention and every MLP with an all-reduce that the next module waits for. Here the next
module does not wait: it reads the residual stream as it is, without the output still on its way.

    standard   x_k = x_{k-1} + sum over ranks of h_k(x_{k-1})
    ladder     x_k = x_{k-1} + sum over ranks of h_k(x_{k-2}),   x_{-1} = x_0 = the embedding

The bytes are the same, and so are the weights. The function differs: it is trained for, or adapted to (`convert`).
Beside it: "parallel" (attention and MLP read the same stream, one all-reduce a layer), "desync" (all-reduces are left
out) and `forward_interleaved` (exact: one half of the batch computes while the other half's sum is on its way).

Embedding and output layer are whole on every rank, as in the authors' code; the MLP is the project's, without a gate.
Source: Zhang et al. 2025, arXiv 2501.06589, and the code it publishes. Chapter: model_parallel/ladder_residual.
"""

from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from toolkit.kernels.layers import add, embed, embed_backward, linear, linear_backward, rms_norm, rms_norm_backward
from toolkit.runtime.algorithms import concatenate
from toolkit.runtime.arrays import is_shape_only, like
from toolkit.runtime.errors import ShapeError
from toolkit.sequence_parallel._megatron_sp import shard_weights

from ._ladder_modules import attention, isum, mlp, run_backward, run_module, sum_norms
from ._ladder_rivals import drift, drift_backward, interleave, reducing

ARCHITECTURES = ("standard", "ladder", "parallel", "desync")

# ---- the rule --------------------------------------------------------------------------------------------------------


def climb(comm, program, stale, run, x):
    """All modules, each with an all-reduce that the next ones may be faster than.

    program   modules in order                  run   (module, stream) -> (this rank's partial output, what it keeps)
    stale     for each module, how many outputs may still be on their way when it reads the stream: standard 0, ladder 1
    x         (tokens, D), the embedding
    returns   (stream with all outputs, [(kept, outputs in the stream that the module read), …])
    """
    waiting, saved = deque(), []
    for k, module in enumerate(program):
        while len(waiting) > stale[k]:
            x = add(x, waiting.popleft().wait())
        partial_output, kept = run(module, x)
        saved.append((kept, k - len(waiting)))
        waiting.append(isum(comm, partial_output, after=waiting[-1] if waiting else None))
    while waiting:  # the head needs all of them
        x = add(x, waiting.popleft().wait())
    return x, saved


def climb_backward(comm, program, saved, run, g):
    """Downwards: module k waits for the gradients of those modules only that read its output.

    run       (module, kept, gradient of its output) -> this rank's partial gradient of the stream it read
    g         (tokens, D), gradient of the stream with all outputs
    returns   gradient of the embedding
    """
    waiting = deque()
    for k in reversed(range(len(program))):
        while waiting and waiting[0][0] > k:
            g = add(g, waiting.popleft()[1].wait())
        kept, seen = saved[k]
        partial_gradient = run(program[k], kept, g)
        waiting.append((seen, isum(comm, partial_gradient, after=waiting[-1][1] if waiting else None)))
    while waiting:
        g = add(g, waiting.popleft()[1].wait())
    return g


def modules(arch, layers):
    """The model in order: (layer, parts), parts being `attention` or `mlp`. Each module is summed once."""
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch={arch!r}: choose from {', '.join(ARCHITECTURES)}")
    if arch == "parallel":
        return [(layer, (attention, mlp)) for layer in range(layers)]
    return [(layer, (part,)) for layer in range(layers) for part in (attention, mlp)]


def staleness(arch, layers, ladder_layers=None):
    """For each module, how many outputs may be on their way when it starts.

    ladder_layers   layers with the ladder's rule, the others being standard; None: all
    raises          ValueError  a layer out of range, or ladder_layers of another arch
    """
    program = modules(arch, layers)
    if ladder_layers is not None and arch != "ladder":
        raise ValueError(f"ladder_layers={ladder_layers!r} is for arch='ladder', not {arch!r}")
    rungs = set(range(layers) if ladder_layers is None else ladder_layers)
    if not rungs <= set(range(layers)):
        raise ValueError(f"ladder_layers={sorted(rungs)}: a model of {layers} layers has layers 0 to {layers - 1}")
    return [int(arch == "ladder" and layer in rungs) for layer, _ in program]


def convert(params, last_n):
    """Options of `forward` that give a trained standard model the ladder's rule in its last n layers. Weights stay.

    raises   ValueError  more layers than there are
    """
    layers = len(params["layers"])
    if not 0 <= last_n <= layers:
        raise ValueError(f"last_n={last_n}: the model has {layers} layers")
    return {"arch": "ladder", "ladder_layers": tuple(range(layers - last_n, layers))}


# ---- the model -------------------------------------------------------------------------------------------------------


def cut(params, rank, size, head_dim):
    """This rank's shards of whole parameters (`sequence_parallel._block.model_weights`).

    raises   ShapeError  heads or the MLP's channels do not divide among the ranks
    """
    return params | {"layers": [shard_weights(weights, rank, size, head_dim) for weights in params["layers"]]}


@dataclass(frozen=True)
class Saved:
    """What `backward` needs of a forward pass."""

    program: list
    reduces: set | None  # desync: modules that reduce
    modules: list
    context: tuple  # where, head_dim
    tokens: Any
    top: tuple  # stream with all outputs, normalised


def forward(comm, shards, tokens, *, head_dim, arch="standard", ladder_layers=None, desync_pattern=None, cache=None):
    """Scores of the next token.

    shards           what `cut` gives this rank
    tokens           (sequences, n) integers, the same on every rank
    arch             "standard", "ladder", "parallel" or "desync"
    ladder_layers    arch "ladder": layers with its rule; None: all
    desync_pattern   arch "desync": "2x" (MLPs reduce), "4x" (every second MLP), "all", or "none"
    cache            list with None or (k, v) a layer: `tokens` follow what is in it, and it is brought up to date
    returns          (logits (sequences · n, vocabulary), Saved)
    sends            2L all-reduces of sequences · n · D numbers; parallel L; desync those of its pattern
    raises           ShapeError, ValueError
    """
    layers = len(shards["layers"])
    program, stale = modules(arch, layers), staleness(arch, layers, ladder_layers)
    reduces = reducing(desync_pattern, len(program)) if arch == "desync" else None
    context = _positions(tokens, cache, layers), head_dim
    x = embed(shards["embedding"], tokens.reshape(-1))
    run = partial(run_module, shards, context, cache)
    if arch == "desync":
        x, saved = drift(comm, program, reduces, run, x)
    else:
        x, saved = climb(comm, program, stale, run, x)
    normed = rms_norm(x, shards["norm"])
    return linear(normed, shards["head"]), Saved(program, reduces, saved, context, tokens.reshape(-1), (x, normed))


def backward(comm, shards, saved, d_logits):
    """Gradients of `shards`, complete on every rank.

    d_logits   (sequences · n, vocabulary), the same on every rank
    sends      as many all-reduces of the stream's size as `forward`, hidden in the same way, and one of all gains
    raises     ValueError  desync without a last all-reduce: ranks have different logits
    """
    program, reduces = saved.program, saved.reduces
    if reduces is not None and len(program) - 1 not in reduces:
        raise ValueError("backward: without an all-reduce after the last module, the ranks' logits differ")
    x, normed = saved.top
    d_normed, d_head = linear_backward(normed, shards["head"], d_logits)
    g, d_norm = rms_norm_backward(x, shards["norm"], d_normed)
    grads = [{} for _ in shards["layers"]]
    run = partial(run_backward, shards, saved.context, grads)
    if reduces is None:
        g = climb_backward(comm, program, saved.modules, run, g)
    else:
        g = drift_backward(comm, program, reduces, saved.modules, run, g)
    sum_norms(comm, grads)
    table = embed_backward(shards["embedding"], saved.tokens, g)
    return {"embedding": table, "layers": grads, "norm": d_norm, "head": d_head}


def _positions(tokens, cache, layers):
    if tokens.ndim != 2:
        raise ShapeError(f"tokens are {tokens.shape}: give (sequences, n)")
    if cache is not None and len(cache) != layers:
        raise ShapeError(f"a cache of {len(cache)} entries for {layers} layers: start with [None] * {layers}")
    past = cache[0][0].shape[1] if cache and cache[0] is not None else 0
    return np.arange(past, past + tokens.shape[1])


def forward_interleaved(comm, shards, tokens, *, head_dim):
    """The standard model, exactly, with the batch in two halves that compute and communicate in turn.

    tokens    (sequences, n), an even number of sequences
    returns   logits (sequences · n, vocabulary)
    sends     4L all-reduces of half the size
    """
    layers = len(shards["layers"])
    if len(tokens) % 2:
        raise ShapeError(f"{len(tokens)} sequences do not divide into two halves")
    halves = np.split(tokens, 2) if not is_shape_only(tokens) else [tokens[: len(tokens) // 2]] * 2
    context = _positions(tokens, None, layers), head_dim
    run = partial(run_module, shards, context, None)
    streams = [embed(shards["embedding"], half.reshape(-1)) for half in halves]
    streams = interleave(comm, modules("standard", layers), run, streams)
    return concatenate(tuple(linear(rms_norm(x, shards["norm"]), shards["head"]) for x in streams))


def generate(comm, shards, prompt, n, arch="standard", **options):
    """The n likeliest tokens, one after the other: prefill, then decoding with a cache.

    prompt    (sequences, m) integers            options   as for `forward`; head_dim is needed
    returns   (tokens (sequences, n), virtual seconds)
    """
    start, cache, tokens, found = comm.now, [None] * len(shards["layers"]), prompt, []
    for _ in range(n):
        logits, _ = forward(comm, shards, tokens, arch=arch, cache=cache, **options)
        last = logits.reshape(*tokens.shape, -1)[:, -1]
        tokens = like((len(prompt), 1), "int64") if is_shape_only(last) else last.argmax(axis=-1)[:, None]
        found.append(tokens)
    found = like((len(prompt), n), "int64") if is_shape_only(tokens) else np.concatenate(found, axis=1)
    return found, comm.now - start


# ---- when it is done -------------------------------------------------------------------------------------------------


def timeline(c, a, arch="standard", *, ladder_layers=None, desync_pattern=None, interference=0.0):
    """The recurrence: module k starts when module k-1 has computed and what it reads has arrived.

    c, a           (2L,) seconds of each module's compute and of its all-reduce; all-reduces take turns
    interference   share of compute lost while an all-reduce is under way
    returns        (finish, events): seconds; a list of ("compute" | "all_reduce", module, start, end)
    raises         ShapeError, ValueError
    """
    if len(c) != len(a) or len(c) % 2:
        raise ShapeError(f"{len(c)} compute times and {len(a)} all-reduces: give both for each attention and each MLP")
    layers = len(c) // 2
    program, stale = modules(arch, layers), staleness(arch, layers, ladder_layers)
    reduces = reducing(desync_pattern, len(program)) if arch == "desync" else range(len(program))
    if arch == "parallel":  # one sum of two outputs, as long as either's
        c, a = np.add(c[0::2], c[1::2]), a[1::2]
    free, arrived, events = 0.0, [0.0, 0.0], []  # arrived: when the outputs of modules 0 … are summed, two before 0
    for k in range(len(program)):
        start = max(free, arrived[-1 - stale[k]])
        busy = max(0.0, arrived[-1] - start)  # the predecessor's all-reduce, beside this module
        slowed = min(busy, c[k] / (1 - interference))
        free = start + c[k] + interference * slowed
        events.append(("compute", k, start, free))
        begins = max(free, arrived[-1])
        arrived.append(begins + a[k] if k in reduces else free)
        if k in reduces:
            events.append(("all_reduce", k, begins, arrived[-1]))
    return max(free, arrived[-1]), events
