"""A transformer block whose tokens are spread over ranks: only attention talks, and any attention will do.

Norms, projections and MLP treat each token by itself, so a rank applies them to the tokens that it holds. Attention is
a pair of functions (see `Attention`). Weights are whole on every rank; their gradients come out as this rank's share,
and `sum_gradients` adds the shares up, as data parallelism does.

Weights of a block are a dict: norm_1, norm_2 (h,); q (h, H·d); k, v (h, Hkv·d); o (H·d, h); up (h, f); down (f, h).
Activations are (tokens, h). Positions are rotary, by the global numbers of a rank's tokens.
Chapter: sequence_parallel/ulysses.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from toolkit.kernels.attention import attention as dense_attention
from toolkit.kernels.attention import attention_backward as dense_attention_backward
from toolkit.kernels.layers import (
    add,
    cast,
    embed,
    embed_backward,
    gelu,
    gelu_backward,
    linear,
    linear_backward,
    linear_grad_w,
    linear_grad_x,
    merge_heads,
    rms_norm,
    rms_norm_backward,
    rotary,
    softmax_cross_entropy,
    softmax_cross_entropy_backward,
    split_heads,
)
from toolkit.runtime.arrays import like


@dataclass(frozen=True)
class Attention:
    """Attention over the tokens of all ranks, and its gradient, as a block calls them.

    forward    (comm, q, k, v) -> (out, saved)            q (heads, tokens, head_dim), k, v (kv_heads, tokens, head_dim)
    backward   (comm, saved, grad_out) -> dq, dk, dv      in any float dtype; an iterator will do
    lazy       overlap: forward is given functions that make q, k and v, so that one can travel while the next is made,
               and a weight's gradient is computed beside what backward sends first
    """

    forward: Callable
    backward: Callable
    lazy: bool = False


def exact(module, **options):
    """The Attention of a module with `attention` and `attention_backward`, such as `ring_attention`.

    options   causal, layout and what else both functions take
    """

    def forward(comm, q, k, v):
        out, lse = module.attention(comm, q, k, v, return_lse=True, **options)
        return out, (q, k, v, out, lse)

    def backward(comm, saved, grad_out):
        return module.attention_backward(comm, *saved, grad_out, **options)

    return Attention(forward, backward)


def one_device(causal=False):
    """The Attention of a rank that has all tokens of its heads: softmax, no messages."""

    def forward(_comm, q, k, v):
        out, lse = dense_attention(q, k, v, causal, return_lse=True)
        return out, (q, k, v, out, lse)

    def backward(_comm, saved, grad_out):
        return dense_attention_backward(*saved, grad_out, causal)

    return Attention(forward, backward)


# ---- one block -------------------------------------------------------------------------------------------------------


def block(comm, weights, x, where, attention, head_dim):
    """x + attention(norm(x)), then x + MLP(norm(x)).

    x          (tokens, h)   this rank's tokens
    where      (tokens,)     their global positions
    returns    (y, saved): like x; what `block_backward` needs
    raises     ShapeError, DtypeError
    """
    middle, kept = attend(comm, weights, x, where, attention, head_dim)
    y, kept_2 = mlp(weights, middle)
    return y, (kept, kept_2)


def block_backward(comm, weights, saved, grad, attention, head_dim):
    """Gradients of `block`.

    grad       (tokens, h)   of y
    returns    (dx, grads): like x; dict like `weights`, this rank's share
    """
    kept, kept_2 = saved
    d_middle, grads = mlp_backward(weights, kept_2, grad)
    dx, more = attend_backward(comm, weights, kept, d_middle, attention, head_dim)
    return dx, grads | more


def attend(comm, weights, x, where, attention, head_dim):
    """The half of a block that talks: x + o(attention(q, k, v of norm(x))). Returns (y, saved)."""
    normed = rms_norm(x, weights["norm_1"])
    heads = project(weights, normed, where, head_dim)
    out, kept = attention.forward(comm, *(heads if attention.lazy else [make() for make in heads]))
    merged = merge_heads(out)
    return add(x, linear(merged, weights["o"])), (x, where, normed, merged, kept)


def attend_backward(comm, weights, saved, grad, attention, head_dim):
    """Gradients (dx, grads) of `attend`."""
    x, where, normed, merged, kept = saved
    d_out = split_heads(linear_grad_x(weights["o"], grad), head_dim)
    # The weights' gradient waits for nobody: it can be computed while attention's first message travels.
    d_o = comm.spawn(linear_grad_w, merged, grad).wait if attention.lazy else partial(linear_grad_w, merged, grad)
    d_heads = attention.backward(comm, kept, d_out)
    d_normed, grads = project_backward(weights, normed, where, d_heads)
    dx, d_norm = rms_norm_backward(x, weights["norm_1"], d_normed)
    return add(dx, grad), grads | {"o": d_o(), "norm_1": d_norm}


def project(weights, normed, where, head_dim):
    """Three functions that make q, k and v, (heads, tokens, head_dim), of (tokens, h)."""

    def make(name):
        heads = split_heads(linear(normed, weights[name]), head_dim)
        return rotary(heads, where) if name in "qk" else heads

    return [partial(make, name) for name in "qkv"]


def project_backward(weights, normed, where, d_heads):
    """(d_normed, grads) of `project`, from the gradients of q, k and v, taken one at a time."""
    total, grads = None, {}
    for name, d_head in zip("qkv", d_heads, strict=True):
        d_head = cast(d_head, normed.dtype)
        if name in "qk":
            d_head = rotary(d_head, where, inverse=True)
        share, grads[name] = linear_backward(normed, weights[name], merge_heads(d_head))
        total = share if total is None else add(total, share)
    return total, grads


def mlp(weights, x):
    """The half of a block that does not: x + down(gelu(up(norm(x)))). Returns (y, saved)."""
    normed = rms_norm(x, weights["norm_2"])
    raised = linear(normed, weights["up"])
    return add(x, linear(gelu(raised), weights["down"])), (x, normed, raised)


def mlp_backward(weights, saved, grad):
    """Gradients (dx, grads) of `mlp`; gelu is computed again."""
    x, normed, raised = saved
    d_active, d_down = linear_backward(gelu(raised), weights["down"], grad)
    d_normed, d_up = linear_backward(normed, weights["up"], gelu_backward(raised, d_active))
    dx, d_norm = rms_norm_backward(x, weights["norm_2"], d_normed)
    return add(dx, grad), {"norm_2": d_norm, "up": d_up, "down": d_down}


def sum_gradients(comm, grads):
    """The ranks' shares added up, on every rank: one all-reduce for each array of a nested dict or list."""
    if isinstance(grads, np.ndarray):
        return comm.all_reduce(grads)
    if isinstance(grads, dict):
        return {name: sum_gradients(comm, grads[name]) for name in sorted(grads)}
    return [sum_gradients(comm, part) for part in grads]


# ---- blocks stacked into a language model ----------------------------------------------------------------------------


def loss_and_gradients(comm, params, tokens, targets, where, attention, head_dim, total):
    """Cross-entropy of this rank's tokens, and this rank's share of the gradients of its mean over all tokens.

    params     as `model_weights` makes them
    tokens     (n,) integers, this rank's              targets   (n,), what comes next: of another rank at a seam
    where      (n,) their global positions             total     tokens of all ranks together
    returns    (losses, grads): (n,) nats; like `params`, to be added up by `sum_gradients`
    """
    x, saved = embed(params["embedding"], tokens), []
    for weights in params["layers"]:
        x, kept = block(comm, weights, x, where, attention, head_dim)
        saved.append(kept)
    normed = rms_norm(x, params["norm"])
    logits = linear(normed, params["head"])
    losses = softmax_cross_entropy(logits, targets)

    grads = {"layers": []}
    d_logits = softmax_cross_entropy_backward(logits, targets, np.full(len(tokens), 1 / total))
    d_normed, grads["head"] = linear_backward(normed, params["head"], d_logits)
    grad, grads["norm"] = rms_norm_backward(x, params["norm"], d_normed)
    for weights in reversed(params["layers"]):
        grad, share = block_backward(comm, weights, saved.pop(), grad, attention, head_dim)
        grads["layers"].insert(0, share)
    grads["embedding"] = embed_backward(params["embedding"], tokens, grad)
    return losses, grads


def shapes(h, heads, kv_heads, head_dim, hidden):
    """Shapes of a block's weights, by name."""
    wide, narrow = (h, heads * head_dim), (h, kv_heads * head_dim)
    return {
        "norm_1": (h,), "q": wide, "k": narrow, "v": narrow, "o": wide[::-1],
        "norm_2": (h,), "up": (h, hidden), "down": (hidden, h),
    }  # fmt: skip


def block_weights(random, h, heads, kv_heads, head_dim, hidden, dtype="float64"):
    """Weights of a block: gains of 1, the rest normal with variance 1 / inputs. `random` None: shape-only."""
    return {name: _drawn(random, shape, dtype) for name, shape in shapes(h, heads, kv_heads, head_dim, hidden).items()}


def model_weights(random, vocabulary, layers, h, heads, kv_heads, head_dim, hidden, dtype="float64"):
    """{"embedding": (vocabulary, h), "layers": [weights of a block, …], "norm": (h,), "head": (h, vocabulary)}."""
    return {
        "embedding": _drawn(random, (vocabulary, h), dtype),
        "layers": [block_weights(random, h, heads, kv_heads, head_dim, hidden, dtype) for _ in range(layers)],
        "norm": _drawn(random, (h,), dtype),
        "head": _drawn(random, (h, vocabulary), dtype),
    }


def _drawn(random, shape, dtype):
    if random is None:
        return like(shape, dtype)
    if len(shape) == 1:
        return np.ones(shape, dtype)
    return (random.standard_normal(shape) / shape[0] ** 0.5).astype(dtype)
