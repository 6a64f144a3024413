"""The cost model that chooses how many matrices, and which: equation 2 of the FlashFFTConv paper.

    seconds = batch · channels · Σᵢ ( 16 N Nᵢ / rate(Nᵢ) + 4 N / bandwidth(i) )

16 N Nᵢ operations are stage i there and back. 4 N bytes are its complex result in 16 bits, through fast memory or,
where the sequence is longer than that holds, slow memory. Chapter: attention/flash_fft_conv.
"""

from math import prod
from time import perf_counter
from typing import NamedTuple

import numpy as np

from toolkit.attention.flash_fft_conv import FAST
from toolkit.kernels.threads import share
from toolkit.runtime import hardware
from toolkit.runtime.errors import ShapeError


class Machine(NamedTuple):
    """What the model knows of a device: operations/s, bytes/s, and two sizes."""

    name: str
    matrix: float  # operations/s of the matrix units
    general: float  # operations/s of everything else
    slow: float  # bytes/s of the device's memory
    fast: float  # bytes/s of the memory beside the arithmetic
    smallest: int = 16  # the smallest matrix that the matrix units take
    holds: int = FAST  # complex samples of one sequence that fast memory holds


# Table 19 of the paper, A100 of 40 GB, as attained. The body of the paper was not at hand: the figures are from memory,
# and a test checks that they choose what the authors ship.
A100 = Machine("A100", 234e12, 17.6e12, 1.35e12, 9.5e12)

# The same shares of the data-sheet peaks. Peaks of the A100 of 40 GB: 312 and 19.5 TFLOP/s, 1.555 TB/s. Fast memory:
# 128 bytes a clock and multiprocessor, 108 at 1.41 GHz in an A100, 132 at 1.83 GHz in an H100.
H100 = Machine(
    "H100",
    A100.matrix / 312e12 * hardware.H100.flops["float16"],
    A100.general / 19.5e12 * hardware.H100.flops["float32"],
    A100.slow / 1.555e12 * hardware.H100.memory_bandwidth,
    A100.fast * (132 * 1.83) / (108 * 1.41),
)


def this_cpu(repetitions=5):
    """Measure one core's four rates, in float32: a matrix product, a sum, copies in and out of the cache. 0.2 s."""
    square, block, long = np.ones((512, 512), np.float32), np.ones(16_384, np.float32), np.ones(2**23, np.float32)
    result, near, far = np.empty_like(square), np.empty_like(block), np.empty_like(long)
    work = (
        lambda: np.dot(square, square, out=result),
        lambda: [np.add(block, block, out=near) for _ in range(50)],
        lambda: np.copyto(far, long),
        lambda: [np.copyto(near, block) for _ in range(50)],
    )
    times = np.empty((repetitions + 1, len(work)))

    def measure(*_):
        for turn, i in np.ndindex(times.shape):
            start = perf_counter()
            work[i]()
            times[turn, i] = perf_counter() - start

    share(1, 1, measure)  # one thread, and one for BLAS
    done = 2 * 512**3, 50 * block.size, 2 * long.nbytes, 2 * 50 * block.nbytes
    return Machine("one core of this CPU", *(done / times[1:].min(axis=0)).tolist(), smallest=1)


def stage_seconds(factors, machine=A100):
    """Seconds of each stage, there and back, for one sequence: a list of (products, slow memory, fast memory)."""
    n, stages = prod(factors), []
    for i, factor in enumerate(factors):
        products = 16 * n * factor / (machine.matrix if factor >= machine.smallest else machine.general)
        outer = prod(factors[i:]) > machine.holds
        stages.append((products, 4 * n / machine.slow, 0.0) if outer else (products, 0.0, 4 * n / machine.fast))
    return stages


def model_seconds(factors, machine=A100, batch=1, channels=1):
    """Seconds of a convolution by the model."""
    return batch * channels * sum(map(sum, stage_seconds(factors, machine)))


def factorisations(n, p):
    """All ways to write n, a power of two, as p factors of at least 2, largest first. An iterator of tuples."""
    if n < 2 or n & (n - 1):
        raise ShapeError(f"factorisations: {n} is no power of two from 2 on")
    yield from _split(n.bit_length() - 1, p, n.bit_length() - 1)


def _split(bits, p, most):
    if p == 1:
        if 1 <= bits <= most:
            yield (1 << bits,)
        return
    for first in range(min(most, bits - p + 1), 0, -1):
        for rest in _split(bits - first, p - 1, first):
            yield (1 << first, *rest)


def best_factors(n, machine=A100, orders=(1, 2, 3, 4)):
    """The factors of least model time among those of the given orders. Raises ShapeError when there are none."""
    found = [factors for p in orders for factors in factorisations(n, p)]
    if not found:
        raise ShapeError(f"best_factors: {n} is no product of {orders} factors of at least 2")
    return min(found, key=lambda factors: model_seconds(factors, machine))
