"""Layers of a transformer as kernels: each forward with its backward right under it, each with its cost.

Activations are (tokens, channels), with any axes in front; weights are (inputs, outputs), as in `toolkit.learn.layers`.
A backward kernel takes the forward's inputs and the gradient of its output and gives gradients of the inputs: of the
activations in full, of the weights the share that these tokens contribute. Sums over the tokens of all ranks are the
caller's. float16 is computed in float32; what comes out has the dtype of what goes in.

Costs: matrix products are charged exactly, and read and write each array once. Element-wise work is charged 0 flops and
its bytes, as in `toolkit.kernels.attention`.
Chapter: sequence_parallel/ulysses.
"""

import math

import numpy as np

from toolkit.runtime.arrays import like
from toolkit.runtime.errors import DtypeError, ShapeError
from toolkit.runtime.kernel import Cost, kernel

# ---- matrix products -------------------------------------------------------------------------------------------------


def _product(a, b):
    """Shape of a @ b, and its flops."""
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2]:
        raise ShapeError(f"matmul: {a.shape} @ {b.shape}: the first's last axis must be the second's last but one")
    if a.dtype != b.dtype:
        raise DtypeError(f"matmul: {a.dtype} @ {b.dtype}: cast one of them")
    shape = (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    return shape, 2 * math.prod(shape) * a.shape[-1]


def _matmul_cost(a, b):
    shape, flops = _product(a, b)
    return Cost(flops, a.nbytes + b.nbytes + math.prod(shape) * a.dtype.itemsize)


@kernel(cost=_matmul_cost, out=lambda a, b: like(_product(a, b)[0], a.dtype))
def matmul(a, b):
    """a @ b. a (…, n, k), b (…, k, m); axes in front broadcast. Costs 2·n·k·m flops for each of them.

    raises   ShapeError, DtypeError
    """
    shape, _ = _product(a, b)
    return np.matmul(_wide(a), _wide(b)).astype(a.dtype, copy=False).reshape(shape)


def _linear_cost(x, w):
    _check(w.ndim == 2 and x.ndim > 1 and x.shape[-1] == w.shape[0], "linear", x=x, w=w)
    tokens, (inputs, outputs) = math.prod(x.shape[:-1]), w.shape
    moved = (tokens * inputs + inputs * outputs + tokens * outputs) * x.dtype.itemsize
    return Cost(2 * tokens * inputs * outputs, moved, kind="matmul")


@kernel(cost=_linear_cost, out=lambda x, w: like((*x.shape[:-1], w.shape[1]), x.dtype))
def linear(x, w):
    """x @ w. x (…, tokens, inputs), w (inputs, outputs). Costs 2·tokens·inputs·outputs flops."""
    _linear_cost(x, w)
    return matmul(x, w)


@kernel(
    cost=lambda w, grad: _linear_cost(grad, w.T), out=lambda w, grad: like((*grad.shape[:-1], w.shape[0]), grad.dtype)
)
def linear_grad_x(w, grad):
    """Gradient of x: grad @ wᵀ. Needs no x: with `linear_grad_w` the two halves of a linear layer's backward."""
    _linear_cost(grad, w.T)
    return matmul(grad, w.T)


def _grad_w_cost(x, grad):
    _check(x.ndim > 1 and x.shape[:-1] == grad.shape[:-1], "linear_grad_w", x=x, grad=grad)
    return _linear_cost(x, like((x.shape[-1], grad.shape[-1]), x.dtype))


@kernel(cost=_grad_w_cost, out=lambda x, grad: like((x.shape[-1], grad.shape[-1]), x.dtype))
def linear_grad_w(x, grad):
    """This rank's share of the gradient of w: xᵀ @ grad, summed over all axes in front."""
    _grad_w_cost(x, grad)
    return matmul(x.reshape(-1, x.shape[-1]).T, grad.reshape(-1, grad.shape[-1]))


def linear_backward(x, w, grad):
    """(dx, dw) of `linear`: two products, 4·tokens·inputs·outputs flops."""
    return linear_grad_x(w, grad), linear_grad_w(x, grad)


# ---- normalisation ---------------------------------------------------------------------------------------------------


def _norm_cost(x, gain, epsilon=1e-6):
    _check(gain.ndim == 1 and x.shape[-1:] == gain.shape, "rms_norm", x=x, gain=gain)
    return Cost(0, 2 * x.nbytes + gain.nbytes)


@kernel(cost=_norm_cost, out=lambda x, gain, epsilon=1e-6: like(x))
def rms_norm(x, gain, epsilon=1e-6):
    """x over the root of its mean square along channels, times `gain` (channels,). Zhang and Sennrich 2019."""
    _norm_cost(x, gain)
    wide = _wide(x)
    return (wide / _root_mean_square(wide, epsilon) * gain).astype(x.dtype, copy=False)


@kernel(
    cost=lambda x, gain, grad, epsilon=1e-6: Cost(0, 3 * x.nbytes + 2 * gain.nbytes),
    out=lambda x, gain, grad, epsilon=1e-6: (like(x), like(gain)),
)
def rms_norm_backward(x, gain, grad, epsilon=1e-6):
    """(dx, dgain) of `rms_norm`, from x itself: the root is computed again."""
    _norm_cost(x, gain)
    root = _root_mean_square(_wide(x), epsilon)
    unit, scaled = x / root, _wide(grad) * gain
    dx = (scaled - unit * np.mean(scaled * unit, axis=-1, keepdims=True)) / root
    dgain = np.sum(_wide(grad) * unit, axis=tuple(range(x.ndim - 1)))
    return dx.astype(x.dtype, copy=False), dgain.astype(gain.dtype, copy=False)


def _root_mean_square(x, epsilon):
    return np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(epsilon))


# ---- element by element ----------------------------------------------------------------------------------------------

TANH_SCALE, TANH_CUBE = math.sqrt(2 / math.pi), 0.044715  # Hendrycks and Gimpel 2016, as GPT-2 has it


@kernel(cost=lambda x: Cost(0, 2 * x.nbytes), out=lambda x: like(x))
def gelu(x):
    """x times the normal distribution function, by its tanh approximation."""
    wide = _wide(x)
    return (0.5 * wide * (1 + _gelu_tanh(wide))).astype(x.dtype, copy=False)


@kernel(cost=lambda x, grad: Cost(0, 3 * x.nbytes), out=lambda x, grad: like(x))
def gelu_backward(x, grad):
    """Gradient of x."""
    wide = _wide(x)
    tanh = _gelu_tanh(wide)
    inner = TANH_SCALE * (1 + 3 * TANH_CUBE * wide * wide)
    slope = 0.5 * (1 + tanh) + 0.5 * wide * (1 - tanh * tanh) * inner
    return (grad * slope).astype(x.dtype, copy=False)


def _gelu_tanh(x):
    return np.tanh(TANH_SCALE * (x + TANH_CUBE * x * x * x))


@kernel(cost=lambda x, y: Cost(0, 3 * x.nbytes), out=lambda x, y: like(x))
def add(x, y):
    """x + y in the dtype of x: a residual connection. Its backward hands the gradient to both."""
    return (x + y).astype(x.dtype, copy=False)


@kernel(
    cost=lambda x, dtype: Cost(0, 0 if x.dtype == dtype else x.nbytes + x.size * np.dtype(dtype).itemsize),
    out=lambda x, dtype: x if x.dtype == dtype else like(x, dtype),
)
def cast(x, dtype):
    """x rounded to `dtype`; x itself, at no cost, if it has that dtype."""
    return x.astype(dtype, copy=False)


# ---- heads and positions ---------------------------------------------------------------------------------------------


def split_heads(x, head_dim):
    """(tokens, heads·head_dim) -> (heads, tokens, head_dim), a view.

    raises   ShapeError  head_dim does not divide the channels
    """
    tokens, channels = x.shape
    if head_dim < 1 or channels % head_dim:
        raise ShapeError(f"split_heads: {channels} channels do not divide into heads of {head_dim}")
    return x.reshape(tokens, channels // head_dim, head_dim).transpose(1, 0, 2)


@kernel(cost=lambda x: Cost(0, 2 * x.nbytes), out=lambda x: like((x.shape[1], x.shape[0] * x.shape[2]), x.dtype))
def merge_heads(x):
    """(heads, tokens, head_dim) -> (tokens, heads·head_dim): the adjoint of `split_heads`, and its inverse."""
    return np.ascontiguousarray(x.transpose(1, 0, 2)).reshape(x.shape[1], -1)


def _rotary_cost(x, where, base=10_000.0, inverse=False):
    if x.shape[-1] % 2 or where.shape != x.shape[-2:-1]:
        raise ShapeError(f"rotary: x is {x.shape} with {where.shape} positions: give one a token, and an even head_dim")
    return Cost(0, 2 * x.nbytes)


@kernel(cost=_rotary_cost, out=lambda x, where, base=10_000.0, inverse=False: like(x))
def rotary(x, where, base=10_000.0, inverse=False):
    """Rotate plane l of each token by position · base^(-2l / head_dim). The gradient of x is grad rotated back.

    x         (heads, tokens, head_dim)   plane l is the pair of channels (l, l + head_dim / 2). Su et al. 2021
    where     (tokens,)                   global positions: `toolkit.runtime.positions(layout, rank, size, n)`
    inverse   rotate back
    """
    _rotary_cost(x, where)
    half, wide = x.shape[-1] // 2, _wide(x)
    angle = where[:, None] * base ** (-np.arange(half) / half) * (-1 if inverse else 1)
    cos, sin = np.cos(angle).astype(wide.dtype), np.sin(angle).astype(wide.dtype)
    a, b = wide[..., :half], wide[..., half:]
    return np.concatenate((a * cos - b * sin, a * sin + b * cos), axis=-1).astype(x.dtype, copy=False)


# ---- the two ends of a language model --------------------------------------------------------------------------------


def _embed_shape(table, tokens):
    return (*tokens.shape, table.shape[1])


@kernel(
    cost=lambda table, tokens: Cost(0, 2 * tokens.size * table.shape[1] * table.dtype.itemsize),
    out=lambda table, tokens: like(_embed_shape(table, tokens), table.dtype),
)
def embed(table, tokens):
    """Rows of `table` (vocabulary, channels) for integer `tokens` (tokens,)."""
    return table[tokens]


@kernel(
    cost=lambda table, tokens, grad: Cost(0, table.nbytes + 2 * grad.nbytes),
    out=lambda table, tokens, grad: like(table),
)
def embed_backward(table, tokens, grad):
    """This rank's share of the gradient of the table: rows of tokens that occur more than once add up."""
    total = np.zeros(table.shape, table.dtype)
    np.add.at(total, tokens, grad)
    return total


def _entropy_cost(logits, targets):
    fits = logits.ndim == 2 and targets.shape == logits.shape[:1]
    _check(fits, "softmax_cross_entropy", logits=logits, targets=targets)
    return Cost(0, logits.nbytes + targets.nbytes)


@kernel(cost=_entropy_cost, out=lambda logits, targets: like(targets.shape, _accumulation(logits.dtype)))
def softmax_cross_entropy(logits, targets):
    """-log softmax(logits)[target] of each token, in nats: (tokens,), float64 for float64 and else float32.

    logits   (tokens, vocabulary)       targets   (tokens,) integers
    """
    _entropy_cost(logits, targets)
    shifted = _shifted(logits)
    return np.log(np.exp(shifted).sum(axis=-1)) - shifted[np.arange(len(targets)), targets]


@kernel(
    cost=lambda logits, targets, grad: Cost(0, 2 * logits.nbytes + targets.nbytes + grad.nbytes),
    out=lambda logits, targets, grad: like(logits),
)
def softmax_cross_entropy_backward(logits, targets, grad):
    """Gradient of the logits, (softmax - one-hot) · grad. grad: (tokens,), of each token's loss; 1/n for their mean."""
    _entropy_cost(logits, targets)
    weights = np.exp(_shifted(logits))
    weights /= weights.sum(axis=-1, keepdims=True)
    weights[np.arange(len(targets)), targets] -= 1
    return (weights * grad[:, None]).astype(logits.dtype, copy=False)


def _shifted(logits):
    wide = _wide(logits)
    return wide - wide.max(axis=-1, keepdims=True)


# ---- inside ----------------------------------------------------------------------------------------------------------


def _accumulation(dtype):
    return np.dtype(np.float64 if dtype.itemsize == 8 else np.float32)


def _wide(x):
    return x.astype(_accumulation(x.dtype), copy=False)


def _check(fits, name, **arrays):
    if not fits:
        shapes = ", ".join(f"{what} {array.shape}" for what, array in arrays.items())
        raise ShapeError(f"{name}: shapes do not fit: {shapes}")
