"""The compiled transform under `flash_fft_conv.py`: every stage is one product of matrices.

A complex product is done as one real product of twice the size, [[re, -im], [im, re]] times [re; im]: 8 real operations
per complex one, no pass that combines four results. Before stage i the data lie so that this product is wide:

    (2, inputs, prefix, rest)    all stages but the last; 2 is re, im; prefix counts rows of the tile and earlier bins
    (prefix, 2, inputs)          the last stage, whose matrix multiplies from the right

The twiddle factors are applied in the copy from the result of one stage to the layout of the next. Nothing else moves.

Chapter: attention/flash_fft_conv.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from toolkit.kernels._tile_product import multiply

UNPACKED = 10**6  # rows · columns · inner dimension of a product that OpenBLAS does without packing its operands

FAST_MATH = {"reassoc", "contract", "nsz"}
inline = njit(fastmath=FAST_MATH)


class Tables(NamedTuple):
    """What the loops need to know of a plan, for sequences of one length.

    stages     int64 [p, 3]  of each stage: inputs, outputs (bins kept), rest (samples behind one input)
    starts     int64 [p, 3]  where its forward matrix, inverse matrix and twiddle factors begin
    forward    float [...]   real matrices, (2 outputs × 2 inputs); the last one transposed
    inverse    float [...]   the same for the way back, 1/N in the first one
    cos, sin   float [...]   twiddle factors, (outputs × rest)
    mirror     int64 [bins]  where the bin -k lies, in floats; empty unless packed
    turn       float [2, bins]   w², w = exp(-2πi k / 2N); empty unless packed
    """

    stages: np.ndarray
    starts: np.ndarray
    forward: np.ndarray
    inverse: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    mirror: np.ndarray
    turn: np.ndarray


@inline
def layout(t, i, prefix):
    """How the input of stage i lies: runs a prefix, length of a run; distance of im from re, of runs, of prefixes."""
    inputs, _, rest = t.stages[i]
    if i == len(t.stages) - 1:
        return 1, inputs, inputs, 0, 2 * inputs
    return inputs, rest, inputs * prefix * rest, prefix * rest, rest


@inline
def _matrix(flat, start, rows, columns):
    return flat[start : start + rows * columns].reshape(rows, columns)


@inline
def _product(t, i, prefix, matrices, way, x, y):
    """y = stage i of x; way 0 is forward, 1 inverse. In parts that BLAS multiplies without packing them first."""
    inputs, outputs, rest = t.stages[i]
    if way == 1:
        inputs, outputs = outputs, inputs
    start = t.starts[i, way]
    zero, one = np.zeros(1, x.dtype), np.ones(1, x.dtype)
    part = max(16, UNPACKED // (4 * inputs * outputs) // 16 * 16)
    if i == len(t.stages) - 1:
        matrix = _matrix(matrices, start, 2 * inputs, 2 * outputs)
        given, made = _matrix(x, 0, prefix, 2 * inputs), _matrix(y, 0, prefix, 2 * outputs)
        for row in range(0, prefix, part):
            multiply(one, given[row : row + part], False, matrix, zero, made[row : row + part])
    else:
        matrix = _matrix(matrices, start, 2 * outputs, 2 * inputs)
        given, made = _matrix(x, 0, 2 * inputs, prefix * rest), _matrix(y, 0, 2 * outputs, prefix * rest)
        for column in range(0, prefix * rest, part):
            multiply(one, matrix, False, given[:, column : column + part], zero, made[:, column : column + part])


@inline
def _twist(t, i, prefix, x, y, way):
    """Between the result y of stage i, (2, outputs, prefix, rest), and the input x of stage i + 1.

    way 0: from y to x, times the twiddle factors.    way 1: from x to y, times their conjugates.
    """
    outputs, rest, start = t.stages[i, 1], t.stages[i, 2], t.starts[i, 2]
    runs, length, to_im, by_run, by_prefix = layout(t, i + 1, prefix * outputs)
    half = outputs * prefix * rest
    for k in range(outputs):
        for q in range(prefix):
            for run in range(runs):
                at = start + k * rest + run * length
                c, s = t.cos[at : at + length], t.sin[at : at + length]
                at = (k * prefix + q) * rest + run * length
                y_re, y_im = y[at : at + length], y[half + at : half + at + length]
                at = (q * outputs + k) * by_prefix + run * by_run
                x_re, x_im = x[at : at + length], x[to_im + at : to_im + at + length]
                if way == 0:
                    for j in range(length):
                        x_re[j], x_im[j] = y_re[j] * c[j] - y_im[j] * s[j], y_re[j] * s[j] + y_im[j] * c[j]
                else:
                    for j in range(length):
                        y_re[j], y_im[j] = x_re[j] * c[j] + x_im[j] * s[j], x_im[j] * c[j] - x_re[j] * s[j]


@inline
def to_bins(t, tile, x, y):
    """The transform of `tile` sequences: x in the layout of stage 0, the bins in y as (tile × bins before, 2, last)."""
    prefix, way = tile, np.int64(0)  # a number of no type Literal: numba would compile `_product` once for each value
    for i in range(len(t.stages)):
        _product(t, i, prefix, t.forward, way, x, y)
        if i < len(t.stages) - 1:
            _twist(t, i, prefix, x, y, 0)
            prefix *= t.stages[i, 1]


@inline
def from_bins(t, tile, y, x):
    """The inverse: the same stages backwards. Destroys y."""
    prefix, way = tile, np.int64(1)
    for i in range(len(t.stages) - 1):
        prefix *= t.stages[i, 1]
    for i in range(len(t.stages) - 1, -1, -1):
        _product(t, i, prefix, t.inverse, way, y, x)
        if i > 0:
            prefix //= t.stages[i - 1, 1]
            _twist(t, i - 1, prefix, x, y, 1)


@inline
def room(t, tile):
    """Floats that a buffer needs: the largest input or output of any stage."""
    floats, prefix = 0, tile
    for i in range(len(t.stages)):
        inputs, outputs, rest = t.stages[i]
        floats = max(floats, 2 * prefix * inputs * rest, 2 * prefix * outputs * rest)
        prefix *= outputs
    return floats
