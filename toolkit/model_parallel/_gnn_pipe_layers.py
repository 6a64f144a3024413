"""Layers of graph networks as one pattern: mix a vertex with its neighbours, multiply by a matrix, apply ReLU.

    gcn     y = relu(a W)                                                Kipf and Welling 2017
    sage    y = relu([x, a] W)                                           Hamilton et al. 2017, mean of neighbours
    gcnii   y = relu(m ((1-β) I + β W)),  m = (1-α) a + α x0             Chen et al. 2020; β = log(λ / l + 1)
    dense   y = relu(x W)                                                no neighbours: the ends of GCNII

a = Â x sums over neighbours; x0 is GCNII's first hidden state. Each kernel's backward stands under its forward.
Chapter: model_parallel/gnn_pipe.
"""

from dataclasses import dataclass
from math import log

import numpy as np

from toolkit.runtime import Cost, kernel, like
from toolkit.runtime.errors import ShapeError

ALPHA, LAMBDA = 0.1, 0.5  # GCNII's usual constants
INDEX = 4  # bytes of a column number in CSR
MODELS = ("gcn", "sage", "gcnii")


@dataclass(frozen=True)
class Layer:
    """kind as above; fan_in counts the input x alone. beta: GCNII's share of the matrix."""

    kind: str
    fan_in: int
    fan_out: int
    relu: bool = True
    beta: float = 1.0

    @property
    def shape(self):
        """Of the matrix."""
        return self.fan_in * (2 if self.kind == "sage" else 1), self.fan_out


def layers_of(model, depth, width, hidden, classes):
    """The layers of a network, first to last: `depth` of them look at neighbours.

    raises   ShapeError  an unknown model, or no layer
    """
    if model not in MODELS:
        raise ShapeError(f"model {model!r} is not one of {', '.join(MODELS)}")
    if depth < 1:
        raise ShapeError(f"depth={depth}: a network needs a layer")
    if model == "gcnii":
        middle = [Layer("gcnii", hidden, hidden, beta=log(LAMBDA / (i + 1) + 1)) for i in range(depth)]
        return (Layer("dense", width, hidden), *middle, Layer("dense", hidden, classes, relu=False))
    widths = [width, *[hidden] * (depth - 1), classes]
    return tuple(Layer(model, widths[i], widths[i + 1], relu=i < depth - 1) for i in range(depth))


def first_weights(layers, seed=0, dtype=np.float64):
    """Glorot's uniform start, one matrix a layer; shape-only matrices with seed=None."""
    if seed is None:
        return tuple(like(layer.shape, dtype) for layer in layers)
    random = np.random.default_rng(seed)
    reach = [(6 / sum(layer.shape)) ** 0.5 for layer in layers]
    return tuple(random.uniform(-r, r, layer.shape).astype(dtype) for r, layer in zip(reach, layers, strict=True))


# ---- neighbours ------------------------------------------------------------------------------------------------------


def _traffic(matrix, table):
    """CSR from memory, one row of the table for each nonzero, the result: no cache is assumed."""
    return matrix.nnz * (INDEX + table.itemsize + table.shape[1] * table.itemsize)


@kernel(
    cost=lambda matrix, table: Cost(
        2 * matrix.nnz * table.shape[1],
        _traffic(matrix, table) + matrix.shape[0] * table.shape[1] * table.itemsize,
        table.dtype,
    ),
    out=lambda matrix, table: like((matrix.shape[0], table.shape[1]), table.dtype),
)
def neighbour_sum(matrix, table):
    """matrix (rows, n) sparse times table (n, width)."""
    return matrix @ table


@kernel(
    cost=lambda total, matrix, table: Cost(2 * matrix.nnz * table.shape[1], _traffic(matrix, table) + 2 * total.nbytes),
    out=lambda total, matrix, table: total,
)
def add_neighbour_sum(total, matrix, table):
    """total += matrix @ table, in place."""
    total += matrix @ table
    return total


@kernel(cost=lambda a, x0: Cost(0, 3 * a.nbytes), out=lambda a, x0: like(a))
def blend(a, x0):
    return (1 - ALPHA) * a + ALPHA * x0


@kernel(cost=lambda grad: Cost(0, 3 * grad.nbytes), out=lambda grad: (like(grad), like(grad)))
def blend_backward(grad):
    return (1 - ALPHA) * grad, ALPHA * grad


@kernel(cost=lambda x, a: Cost(0, 4 * a.nbytes), out=lambda x, a: like((x.shape[0], x.shape[1] + a.shape[1]), x.dtype))
def beside(x, a):
    return np.concatenate((x, a), axis=1)


def mix(kind, a, x, x0):
    """What meets the matrix."""
    if kind == "gcn":
        return a
    return beside(x, a) if kind == "sage" else blend(a, x0)


def mix_backward(kind, grad):
    """Gradients (of a, of x, of x0); None where there is none."""
    if kind == "gcn":
        return grad, None, None
    if kind == "sage":
        half = grad.shape[1] // 2
        return grad[:, half:], grad[:, :half], None
    da, dx0 = blend_backward(grad)
    return da, None, dx0


# ---- the matrix ------------------------------------------------------------------------------------------------------


@kernel(
    cost=lambda m, w, beta=1.0, relu=True: Cost(
        2 * m.shape[0] * w.size, m.nbytes + w.nbytes + m.shape[0] * w.shape[1] * m.itemsize
    ),
    out=lambda m, w, beta=1.0, relu=True: like((m.shape[0], w.shape[1]), m.dtype),
)
def transform(m, w, beta=1.0, relu=True):
    z = m @ w if beta == 1.0 else beta * (m @ w) + (1 - beta) * m
    return np.maximum(z, 0, out=z) if relu else z


@kernel(
    cost=lambda total, m, y, grad, beta=1.0, relu=True: Cost(
        2 * m.size * y.shape[1], m.nbytes + 2 * y.nbytes + 2 * total.nbytes
    ),
    out=lambda total, m, y, grad, beta=1.0, relu=True: like(grad),
)
def weight_gradient(total, m, y, grad, beta=1.0, relu=True):
    """Add the matrix' gradient to `total`, in place. Returns the gradient before ReLU."""
    dz = grad * (y > 0) if relu else grad
    total += beta * (m.T @ dz)
    return dz


@kernel(
    cost=lambda dz, w, beta=1.0: Cost(
        2 * dz.shape[0] * w.size, dz.nbytes + w.nbytes + dz.shape[0] * w.shape[0] * dz.itemsize
    ),
    out=lambda dz, w, beta=1.0: like((dz.shape[0], w.shape[0]), dz.dtype),
)
def input_gradient(dz, w, beta=1.0):
    return dz @ w.T if beta == 1.0 else beta * (dz @ w.T) + (1 - beta) * dz


@kernel(
    cost=lambda logits, labels, weight: Cost(0, 3 * logits.nbytes),
    out=lambda logits, labels, weight: (like((1,), logits.dtype), like(logits)),
)
def cross_entropy(logits, labels, weight):
    """(sum over rows of weight · -log softmax[label], as (1,); its gradient)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_share = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    rows = np.arange(len(labels))
    grad = np.exp(log_share) * weight[:, None]
    grad[rows, labels] -= weight
    return np.array([-(weight * log_share[rows, labels]).sum()]), grad


@kernel(
    cost=lambda w, grad, mean, square, step, rate: Cost(0, 7 * w.nbytes),
    out=lambda w, grad, mean, square, step, rate: w,
)
def adam_step(w, grad, mean, square, step, rate):
    """One step of Adam (Kingma and Ba 2015) in place; step counts from 1."""
    mean += 0.1 * (grad - mean)
    square += 0.001 * (grad * grad - square)
    w -= rate * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
    return w


# ---- tables ----------------------------------------------------------------------------------------------------------


@kernel(
    cost=lambda x, rows, width: Cost(0, rows * width * x.itemsize),
    out=lambda x, rows, width: like((rows, width), x.dtype),
)
def new_table(x, rows, width):
    """Zeros, of the dtype of x."""
    return np.zeros((rows, width), x.dtype)


@kernel(cost=lambda table, rows, x: Cost(0, 2 * x.nbytes), out=lambda table, rows, x: table)
def write(table, rows, x):
    table[rows] = x
    return table


@kernel(cost=lambda table: Cost(0, table.nbytes), out=lambda table: table)
def clear(table):
    table[...] = 0
    return table


@kernel(
    cost=lambda table, rows: Cost(0, 2 * len(rows) * table.shape[1] * table.itemsize),
    out=lambda table, rows: like((len(rows), table.shape[1]), table.dtype),
)
def pick(table, rows):
    return table[rows]
