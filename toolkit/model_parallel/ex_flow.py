"""ExFlow: a token stays where its last expert is, and experts that follow each other live together.

Expert parallelism sends a token to the GPU of its expert and back home, in every layer: two all-to-alls. Home is where
its sequence's keys and values are. Here every GPU has those of all sequences, so the next layer's attention can run
where the token is: one all-to-all a layer, and one all-gather of new tokens an iteration. A placement by affinity
(`_ex_flow_placement`) then makes the next expert likely to be on the same GPU, and a token that stays sends nothing.

Keys and values of a new token are made on as many GPUs as it visits, and must reach all others. The authors' code asks
for one all-gather of the new tokens, which brings ids. `COHERENCE` names what is done here:

    "kv"      an all-gather of 2·L·h numbers a new token ends the iteration: exact, and all bytes are paid
    "early"   the same bytes, layer by layer beside the computation, waited for one iteration later
    "fetch"   a GPU asks for what it lacks when it needs it, and keeps it: exact, two more all-to-alls a layer
    "ids"     ids only; a store outside the machine serves the numbers: exact values, and K/V movement is NOT charged

Top-1 routing only: with two experts a token would have to stay in two places. Results do not depend on the placement.
Source: Yao et al. 2024, arXiv 2401.08383, and the README of its code. Chapter: model_parallel/ex_flow.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from toolkit.kernels.layers import embed, rms_norm
from toolkit.runtime import shard
from toolkit.runtime.arrays import is_shape_only
from toolkit.runtime.errors import ShapeError

from ._ex_flow_context import Context, empty_caches
from ._ex_flow_model import add_weighted, spread, take
from ._ex_flow_rank import Rank
from ._ex_flow_wire import pack, unpack, unsort

SCHEMES = ("home", "coherent")
COHERENCE = ("kv", "early", "fetch", "ids")
NOT_CHARGED = "K/V movement not charged: a store outside the machine serves what other GPUs made"

# ---- one pass through the layers -------------------------------------------------------------------------------------


def through_home(rank, x, sequence, where):
    """DeepSpeed-MoE: attention at home, to the expert, back home. Two all-to-alls a layer.

    x   (n, h), tokens whose home is here    sequence, where   (n,) integers, which sequence and which position
    """
    for j in range(rank.layers):
        x = rank.attention(j, x, sequence, where)
        normed, expert, weight = rank.gate(j, x, sequence, where)
        there = rank.placement[j][expert]
        arrived = rank.exchange(pack((normed, expert), there, rank.size))
        out = rank.experts(j, *unpack(arrived))
        source = np.repeat(np.arange(rank.size), [len(parcel[0]) for parcel in arrived])
        (back,) = unpack(rank.exchange(pack((out,), source, rank.size)))
        x = add_weighted(x, unsort(back, there), weight)
    return x


def through_coherent(rank, x, sequence):
    """ExFlow: attention where the token is, to the expert, and stay. One all-to-all a layer.

    Who a token is travels along: the stream x with all that was added before, the gate's weight, sequence and expert.
    """
    for j in range(rank.layers):
        x = rank.attention(j, x, sequence, rank.now(sequence))
        _, expert, weight = rank.gate(j, x, sequence, rank.now(sequence))
        record = x, weight, np.stack((sequence, expert), axis=1)
        x, weight, who = unpack(rank.exchange(pack(record, rank.placement[j][expert], rank.size)))
        sequence, expert = who.T
        out = rank.experts(j, rms_norm(x, rank.model["layers"][j]["norm_2"]), expert)
        x = add_weighted(x, out, weight)
    return x, sequence


def through_everywhere(rank, x, sequence, where):
    """ExFlow's prefill: every GPU runs all prompts, and its own experts for them. An all-reduce a layer."""
    for j in range(rank.layers):
        x = rank.attention(j, x, sequence, where)
        normed, expert, weight = rank.gate(j, x, sequence, where)
        mine = np.flatnonzero(rank.placement[j][expert] == rank.comm.rank)
        out = rank.experts(j, take(normed, mine), expert[mine])
        x = add_weighted(x, rank.comm.all_reduce(spread(out, mine, len(x)), algorithm="ring"), weight)
    return x


# ---- generating ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decoded:
    """What `decode` gives.

    tokens    (T, n) integers                   seconds   (n,) virtual seconds of each new token; with prefill the first
    run       the Run: trace, traffic, memory             is the prefill's
    note      what was not charged, or ""
    """

    tokens: np.ndarray
    seconds: np.ndarray
    run: Any
    note: str

    @property
    def logits(self):
        """(T, n, V), of whichever GPU each token ended on."""
        steps = zip(*(output[2] for output in self.run.outputs), strict=True)
        whole = [tuple(map(np.concatenate, zip(*step, strict=True))) for step in steps]
        return np.stack([logits[np.argsort(sequence)] for sequence, logits in whole], axis=1)


def decode(cluster, model, prompts, n, placement, *, scheme="coherent", coherence="kv", **options):
    """`generate` on `cluster`: n tokens of T sequences.

    prompts     (T, m) integers; sequence s is at home on rank s // (T / G)
    returns     Decoded
    raises      ShapeError  sequences or experts do not divide; else as `generate`, whose other arguments these are
    """
    ranks, (sequences, m), e = cluster.size, prompts.shape, placement.shape[1]
    if sequences % ranks or e % ranks:
        raise ShapeError(f"{sequences} sequences and {e} experts on {ranks} ranks: each rank must get as many")
    charged = ranks == 1 or scheme == "home" or coherence != "ids"
    outside = None if charged else _caches(model, sequences, m + n)
    program = partial(generate, model=model, n=n, placement=placement, scheme=scheme, coherence=coherence,
                      outside=outside, **options)  # fmt: skip
    run = cluster.run(program, prompts=shard(np.asarray(prompts, np.int32)))
    tokens = np.concatenate([output[0] for output in run.outputs]) if scheme == "home" else run.outputs[0][0]
    ends = np.max([output[1] for output in run.outputs], axis=0)
    return Decoded(tokens, np.diff(ends, prepend=0.0), run, "" if charged else NOT_CHARGED)


def generate(comm, model, prompts, n, placement, *, heads, scheme="coherent", coherence="kv", routes=None,
             way="direct", prefill=True, outside=None):  # fmt: skip
    """One rank's program: n tokens of each sequence, the likeliest ones, with experts spread over all G ranks.

    model       `_ex_flow_model.weights`, shape-only for a shape-only run
    prompts     (T / G, m) integers, of the sequences whose home is here: as many on every rank
    placement   (L, E) integers, the rank of each expert: as many in every layer and on every rank
    scheme      "home" or "coherent"               coherence   see the module; for "coherent" only
    routes      (T, m + n, L) experts to take instead of the gate's; a shape-only run needs them
    way         all-to-all: "direct", "pairwise" or "hierarchical"
    prefill     False: the prompts' keys and values are there already, and the first tokens at position m are 0
    outside     the store of "ids": caches that all ranks share, which needs all ranks in one process
    returns     (tokens (sequences it knows of, n), time of each, [(sequences that ended here, their logits), …])
    raises      ShapeError  what must divide does not; ValueError  an unknown name, or no store
    """
    ranks, m, (layers, e) = comm.size, prompts.shape[1], placement.shape
    if scheme not in SCHEMES or coherence not in COHERENCE:
        raise ValueError(f"scheme={scheme!r}, coherence={coherence!r}: take of {SCHEMES} and of {COHERENCE}")
    held = np.stack([(placement == rank).sum(axis=1) for rank in range(ranks)])
    if layers != len(model["layers"]) or (held * ranks != e).any():
        raise ShapeError(f"placement {placement.shape}: give {e // ranks} experts of each of {len(model['layers'])} "
                         f"layers to every rank; it gives between {held.min()} and {held.max()}")  # fmt: skip
    coherent, here = scheme == "coherent", len(prompts)
    if coherent and coherence == "ids" and outside is None and ranks > 1:
        raise ValueError('coherence="ids" needs a store that all ranks share: let `decode` make it, or take "kv"')
    own = _caches(model, here * ranks if coherent else here, m + n) if outside is None else outside
    first = 0 if coherent else comm.rank * here
    rank = Rank(comm, model, heads, placement, Context(comm, own, m), first, routes, way)
    return _generate(rank, prompts, n, scheme, coherence, prefill)


def _caches(model, sequences, positions):
    table = model["embedding"]
    return empty_caches(len(model["layers"]), sequences, positions, table.shape[1], table.dtype, is_shape_only(table))


def _generate(rank, prompts, n, scheme, coherence, prefill):
    """What `generate` returns."""
    comm, context, coherent, table = rank.comm, rank.context, scheme == "coherent", rank.model["embedding"]
    (here, m), tokens, ends, logits = prompts.shape, [], [], []
    mine = np.arange(comm.rank * here, (comm.rank + 1) * here, dtype=np.int32)

    def finish(x, sequence):
        scores, token = rank.head(x)
        logits.append((sequence, scores))
        tokens.append(context.end(sequence, token) if coherent else token)
        ends.append(comm.now)

    if prefill:
        context.position = m - 1  # the last token that is known
        known, through = (comm.all_gather(prompts), through_everywhere) if coherent else (prompts, through_home)
        sequence = np.repeat(np.arange(len(known)) + rank.first, m)
        x = through(rank, embed(table, known.reshape(-1)), sequence, np.tile(np.arange(m), len(known)))
        finish(take(x, (mine - rank.first) * m + m - 1), mine)
        context.position = m
    context.coherence, sequence = coherence if coherent else "ids", mine
    while len(tokens) < n:
        token = tokens[-1] if tokens else np.zeros(len(table), np.int32)
        x = embed(table, token[sequence - rank.first])
        if coherent:
            x, sequence = through_coherent(rank, x, sequence)
        else:
            x = through_home(rank, x, sequence, rank.now(sequence))
        finish(x, sequence)
        context.position += 1
    context.settle()
    return np.stack(tokens, axis=1), ends, logits
