"""Plans of `flash_fft_conv.py`: factors, packing of real samples, what is skipped, and the matrices of it all.

Chapter: attention/flash_fft_conv.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np

from toolkit.runtime.errors import ShapeError

FAST = 32_768  # complex samples that fast memory holds: the longest sequence that the authors' kernel fuses
REAL = ("plain", "packed", "paired")

# FFT size -> (factors, how real samples are packed), as shipped: `flashfftconv/conv.py` of the authors' repository.
SHIPPED = {
    256: ((16, 16), "plain"),
    512: ((16, 16), "packed"),
    1024: ((32, 32), "plain"),
    2048: ((32, 32), "packed"),
    4096: ((16, 16, 16), "plain"),
    8192: ((32, 16, 16), "plain"),
    16_384: ((16, 32, 32), "plain"),
    32_768: ((32, 32, 32), "plain"),
}
for _outer, _inner in ((16, 4096), (32, 4096), (32, 8192), (32, 16_384), (32, 32_768), (64, 32_768), (128, 32_768)):
    SHIPPED[_outer * _inner] = ((_outer, *SHIPPED[_inner][0]), "plain")


def fourier(n):
    """The Fourier matrix: entry (k, j) is exp(-2πi k j / n). complex128 (n, n)."""
    return _roots(np.outer(np.arange(n), np.arange(n)), n)


def twiddles(n, rest):
    """Turns bin k of a stage for sample r behind it: exp(-2πi k r / (n rest)). complex128 (n, rest)."""
    return _roots(np.outer(np.arange(n), np.arange(rest)), n * rest)


def _roots(exponents, n):
    return np.exp(-2j * np.pi / n * (exponents % n))


def bins(factors):
    """Which bin lies where: place (k₁, …, kₚ) of the result holds bin k₁ + N₁k₂ + N₁N₂k₃ + …  int64 (N,)"""
    return np.arange(prod(factors)).reshape(factors[::-1]).transpose().reshape(-1)


@dataclass(frozen=True)
class Plan:
    """How a convolution of FFT size n is computed.

    n        length of the circle on which the convolution closes; causal if n ≥ L + taps - 1
    factors  their product is n, or n / 2 when packed
    real     "plain"   a transform carries one real sequence, its imaginary part is 0
             "packed"  even samples are the real, odd ones the imaginary part: half the length
             "paired"  two sequences of the batch, one in each part: half as many transforms
    keep     the first keep[i] bins of factor i; the other bins are 0 and skipped. A bin counts as kept when it or its
             mirror image -k lies in that block, as real filters need. Only "plain"
    raises   ShapeError
    """

    n: int
    factors: tuple
    real: str = "plain"
    keep: tuple | None = None

    def __post_init__(self):
        if self.real not in REAL:
            raise ShapeError(f"Plan: real={self.real!r} is none of {', '.join(REAL)}")
        check_factors(self.length, self.factors, f" (n = {self.n}, {self.real})")
        if self.real == "packed" and self.n % 2:
            raise ShapeError(f"Plan: packed needs an even n, got {self.n}: even and odd samples make pairs")
        if self.keep is not None:
            if self.real != "plain":
                raise ShapeError(f"Plan: keep needs real='plain', not {self.real!r}, which mixes a bin with another")
            if len(self.keep) != len(self.factors) or not all(
                1 <= c <= f for c, f in zip(self.keep, self.factors, strict=True)
            ):
                raise ShapeError(f"Plan: keep={self.keep} must give 1 … Nᵢ for each of the factors {self.factors}")

    @property
    def length(self):
        """Complex samples of one transform."""
        return self.n // 2 if self.real == "packed" else self.n

    @property
    def kept(self):
        """Bins that each factor keeps."""
        return self.keep or self.factors

    def transforms(self, batch):
        """Transforms that carry a batch, per channel."""
        return -(-batch // 2) if self.real == "paired" else batch

    def inputs(self, samples):
        """Columns of the first matrix that meet samples other than padding."""
        complex_samples = -(-samples // 2) if self.real == "packed" else samples
        return -(-complex_samples // (self.length // self.factors[0]))

    def flops(self, samples):
        """Real operations of the matrix products of one transform, one way; the way back takes as many."""
        total, before, rest = 0, 1, self.length
        for i, (factor, kept) in enumerate(zip(self.factors, self.kept, strict=True)):
            rest //= factor
            total += 8 * before * kept * (self.inputs(samples) if i == 0 else factor) * rest
            before *= kept
        return total

    def outer(self):
        """Stages whose sequences exceed fast memory: their results pass through slow memory."""
        return sum(prod(self.factors[i:]) > FAST for i in range(len(self.factors)))


def shipped(n):
    """The plan that the authors ship for FFT size n: a power of two from 256 to 4 194 304. Raises ShapeError."""
    if n not in SHIPPED:
        raise ShapeError(f"no plan is shipped for FFT size {n}: sizes are powers of two, 256 … {max(SHIPPED):,}")
    return Plan(n, *SHIPPED[n])


def even_factors(n, largest=32):
    """Powers of two, none above `largest`, as few and as equal as possible. Raises ShapeError."""
    if n < 2 or n & (n - 1):
        raise ShapeError(f"even_factors: {n} is no power of two from 2 on")
    bits, most = n.bit_length() - 1, largest.bit_length() - 1
    p = -(-bits // most)
    return tuple(1 << (bits // p + (i < bits % p)) for i in range(p))


def causal_plan(batch, length, taps):
    """What `conv` uses unless told otherwise: no wrap-around, two real sequences or samples in each complex one."""
    n = max(4, 1 << (length + taps - 2).bit_length())
    real = "paired" if batch > 1 else "plain" if length % 2 else "packed"
    return Plan(n, even_factors(n // 2 if real == "packed" else n), real)


def check_factors(n, factors, note=""):
    if len(factors) == 0 or any(f < 1 for f in factors) or prod(factors) != n:
        text = " · ".join(map(str, factors)) or "nothing"
        raise ShapeError(f"factors {text} make {prod(factors)}, not a transform of length {n}{note}")


# ---- what the loops get ----------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def tables(plan, samples, dtype):
    """`Tables` of a plan for sequences of that many samples."""
    stages, starts, parts, rest = [], [], ([], [], []), plan.length
    for i, (factor, kept) in enumerate(zip(plan.factors, plan.kept, strict=True)):
        rest //= factor
        inputs = plan.inputs(samples) if i == 0 else factor
        stages.append((inputs, kept, rest))
        starts.append([sum(a.size for a in part) for part in parts])
        matrix = fourier(factor)[:kept, :inputs]
        back = matrix.conj().T / (plan.length if i == 0 else 1)
        last = i == len(plan.factors) - 1
        for part, m in zip(parts, (matrix, back), strict=False):
            real = np.block([[m.real, -m.imag], [m.imag, m.real]])
            part.append(real.T if last else real)
        parts[2].append(twiddles(factor, rest)[:kept])
    forward, inverse, turns = (np.concatenate([a.reshape(-1) for a in part]) for part in parts)
    order, mirror, turn = bins(plan.factors), np.empty(0, np.int64), np.empty((2, 0))
    if plan.real == "packed":
        place = np.empty_like(order)
        place[order] = np.arange(plan.length)
        rows, m = divmod(place[-order], plan.factors[-1])
        mirror = rows * 2 * plan.factors[-1] + m
        turn = _roots(order, plan.length)
        turn = np.stack([turn.real, turn.imag])
    numbers = (a.astype(dtype) for a in (forward, inverse, turns.real, turns.imag))
    from toolkit.attention._flash_fft_conv_stages import Tables  # numba loads here, not with the import of this module

    return Tables(np.array(stages), np.array(starts), *numbers, mirror, turn.astype(dtype))


@lru_cache(maxsize=64)
def weights(plan, dtype):
    """1, or 2 for a kept bin that stands for its mirror image too. (bins before, 1, last)"""
    block = bins(plan.factors).reshape(plan.factors)[tuple(slice(c) for c in plan.kept)].reshape(-1)
    inside = np.zeros(plan.length, bool)
    inside[block] = True
    alone = ~inside[-block] if plan.keep else np.zeros(len(block), bool)
    return (1 + alone).astype(dtype).reshape(-1, 1, plan.kept[-1])
