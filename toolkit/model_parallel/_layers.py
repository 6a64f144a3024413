"""A transformer's layers cut by tensor parallelism: each forward with its backward right under it.

A block's first product is cut by columns and its second by rows, so that nothing need be said between them. What is
said at the two ends of such a pair is an `Edge`:

    REPLICATED   f: nothing, and backward an all-reduce; g: an all-reduce, and backward nothing (Shoeybi et al. 2019)
    SEQUENCE     f: all-gather of tokens, and backward reduce-scatter; g: the reverse. Between pairs a rank has its own
                 part of the tokens, so norms and residuals are cut, too (Korthikanti et al. 2022)

Activations are (tokens, h), of one or more sequences one after the other; parameters are plain dicts, gradients dicts
of the same names. They are complete, but for the sum over ranks with other tokens (data, context) and, under SEQUENCE,
for norms, whose sum over `tp` is the caller's (`_model.sum_gradients`).
Context parallelism is the attention's business: `Attention.forward(cp, q, k, v)`, as in `sequence_parallel._block`.
Norms are RMS norms, positions rotary, and there are no biases: the project's block, not GPT's. Products are the same.
Chapter: model_parallel/megatron.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

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
from toolkit.sequence_parallel import _two_level
from toolkit.sequence_parallel._block import Attention, project, project_backward

from ._vocabulary import embed_rows, embed_rows_backward, entropy, entropy_backward

# ---- what ranks say to each other ------------------------------------------------------------------------------------


def nothing(_comm, x):
    return x


def all_reduce(comm, x, op="sum"):
    """A ring in a node; over several nodes rings inside and across, so that all NICs carry their part."""
    if comm.size == 1:
        return x
    nodes, _, inside, _ = _two_level.levels(comm)
    return comm.all_reduce(x, op=op, algorithm="hierarchical" if nodes > 1 and inside.size > 1 else "ring")


def all_gather(comm, x):
    return x if comm.size == 1 else _two_level.all_gather(comm, x)


def reduce_scatter(comm, x):
    return x if comm.size == 1 else _two_level.reduce_scatter(comm, x)


@dataclass(frozen=True)
class Edge:
    """How a pair of cut products is entered (f) and left (g), and what that does to gradients: (comm, x) -> x."""

    enter: Callable
    enter_backward: Callable
    leave: Callable
    leave_backward: Callable


REPLICATED = Edge(nothing, all_reduce, all_reduce, nothing)
SEQUENCE = Edge(all_gather, reduce_scatter, reduce_scatter, all_gather)


@dataclass(frozen=True)
class Setting:
    """What a layer needs beside its weights and its input.

    tp, cp      communicators                 edge       REPLICATED or SEQUENCE
    attention   Attention over `cp`           head_dim   channels of a head
    where       (n,) global positions of this rank's tokens of a sequence
    """

    tp: Any
    cp: Any
    attention: Attention
    head_dim: int
    where: np.ndarray
    edge: Edge = REPLICATED


# ---- one block -------------------------------------------------------------------------------------------------------


def block(setting, weights, x):
    """x + attention(norm(x)), then x + MLP(norm(x)).

    weights    this rank's shards, see `_model.cut_block`
    x          (tokens, h): all of this rank's sequences; under SEQUENCE, its part of them
    returns    (y, saved)
    sends      REPLICATED: 2 all-reduces of x; SEQUENCE: as many bytes
    """
    middle, kept = attend(setting, weights, x)
    y, kept_2 = mlp(setting, weights, middle)
    return y, (kept, kept_2)


def block_backward(setting, weights, saved, grad):
    """(dx, grads) of `block`. REPLICATED: 2 all-reduces; SEQUENCE gathers what it did not keep: half as many again."""
    kept, kept_2 = saved
    d_middle, grads = mlp_backward(setting, weights, kept_2, grad)
    dx, more = attend_backward(setting, weights, kept, d_middle)
    return dx, grads | more


def attend(setting, weights, x):
    """x + o(attention(q, k, v of norm(x))), some heads on each rank. Returns (y, saved)."""
    tp, edge = setting.tp, setting.edge
    normed = rms_norm(x, weights["norm_1"])
    inside = edge.enter(tp, normed)
    sequences = len(inside) // len(setting.where)
    heads = project(weights, inside, np.tile(setting.where, sequences), setting.head_dim)
    out, kept = setting.attention.forward(setting.cp, *(by_sequence(make(), sequences) for make in heads))
    merged = merge_heads(by_token(out, sequences))
    return add(x, edge.leave(tp, linear(merged, weights["o"]))), (x, normed, merged, kept)


def attend_backward(setting, weights, saved, grad):
    tp, edge = setting.tp, setting.edge
    x, normed, merged, kept = saved
    sequences = len(merged) // len(setting.where)
    d_merged, d_o = linear_backward(merged, weights["o"], edge.leave_backward(tp, grad))
    d_out = by_sequence(split_heads(d_merged, setting.head_dim), sequences)
    d_heads = (by_token(d, sequences) for d in setting.attention.backward(setting.cp, kept, d_out))
    where = np.tile(setting.where, sequences)
    d_inside, grads = project_backward(weights, edge.enter(tp, normed), where, d_heads)
    dx, d_norm = rms_norm_backward(x, weights["norm_1"], edge.enter_backward(tp, d_inside))
    return add(dx, grad), grads | {"o": d_o, "norm_1": d_norm}


def mlp(setting, weights, x):
    """x + down(gelu(up(norm(x)))), some channels on each rank. Returns (y, saved)."""
    normed = rms_norm(x, weights["norm_2"])
    raised = linear(setting.edge.enter(setting.tp, normed), weights["up"])
    return add(x, setting.edge.leave(setting.tp, linear(gelu(raised), weights["down"]))), (x, normed, raised)


def mlp_backward(setting, weights, saved, grad):
    tp, edge = setting.tp, setting.edge
    x, normed, raised = saved
    d_active, d_down = linear_backward(gelu(raised), weights["down"], edge.leave_backward(tp, grad))
    d_inside, d_up = linear_backward(edge.enter(tp, normed), weights["up"], gelu_backward(raised, d_active))
    dx, d_norm = rms_norm_backward(x, weights["norm_2"], edge.enter_backward(tp, d_inside))
    return add(dx, grad), {"norm_2": d_norm, "up": d_up, "down": d_down}


def recomputed(setting, weights, x):
    """`block` that keeps its input only."""
    return block(setting, weights, x)[0], x


def recomputed_backward(setting, weights, saved, grad):
    """The forward pass again, with all it says to others, then `block_backward`."""
    return block_backward(setting, weights, block(setting, weights, saved)[1], grad)


def by_sequence(heads, sequences):
    """(heads, sequences·n, d) -> (sequences·heads, n, d): attention stays in a sequence. Not charged: a batched product
    reads any strides."""
    count, _, d = heads.shape
    return heads.reshape(count, sequences, -1, d).swapaxes(0, 1).reshape(count * sequences, -1, d)


def by_token(heads, sequences):
    """The reverse of `by_sequence`."""
    count, n, d = heads.shape
    return heads.reshape(sequences, -1, n, d).swapaxes(0, 1).reshape(count // sequences, -1, d)


# ---- the two ends of a language model --------------------------------------------------------------------------------


def embedding(setting, table, tokens):
    """Rows of a table that is cut by rows: a rank looks up what it has, zeros elsewhere, and the sum is complete.

    table   (vocabulary / t, h)      tokens   (n,) integers      returns   (n, h); under SEQUENCE this rank's part
    """
    return setting.edge.leave(setting.tp, embed_rows(table, tokens, setting.tp.rank * len(table)))


def embedding_backward(setting, table, tokens, grad):
    """Gradient of the rows that this rank has."""
    whole = setting.edge.leave_backward(setting.tp, grad)
    return embed_rows_backward(table, tokens, setting.tp.rank * len(table), whole)


def head(setting, norm, weights, x, targets):
    """Cross-entropy of each token, logits cut by columns and never gathered.

    norm      (h,)                         weights   (h, vocabulary / t)
    targets   (n,) integers
    returns   (losses (n,) in nats, saved)
    sends     all-reduces of (n,) and (2, n)
    """
    normed = rms_norm(x, norm)
    logits = linear(setting.edge.enter(setting.tp, normed), weights)
    losses, kept = entropy(setting.tp, all_reduce, logits, targets)
    return losses, (x, normed, logits, kept)


def head_backward(setting, norm, weights, saved, targets, grad):
    """(dx, d_norm, d_weights) of `head`; grad (n,), of each loss."""
    x, normed, logits, kept = saved
    d_logits = entropy_backward(setting.tp, logits, kept, targets, grad)
    d_inside, d_weights = linear_backward(setting.edge.enter(setting.tp, normed), weights, d_logits)
    dx, d_norm = rms_norm_backward(x, norm, setting.edge.enter_backward(setting.tp, d_inside))
    return dx, d_norm, d_weights
