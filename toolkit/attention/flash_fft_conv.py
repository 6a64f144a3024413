"""FlashFFTConv: the FFT of a long convolution as a few small matrix products that stay in fast memory.

A transform of length N = N₁·N₂·…·Nₚ is p stages. Stage i multiplies by the Nᵢ × Nᵢ Fourier matrix, then by twiddle
factors (order-p Monarch decomposition). `dft` writes that in six lines. `conv` does the same in compiled tiles: load,
gate, p stages, times the filter's bins, p stages back, gate, store. Bins stay in the order in which the stages leave
them, since the filter's lie in the same order. Zeros that pad the input are not stored: they are columns that the first
matrix does not have.

Two sparse forms leave parts out: `partial_conv` (few taps, so inputs of any length go in chunks) and `Plan.keep` (few
frequencies: rows that the matrices do not have, which saves work in every later stage).

Shipped sizes and factors are those of the authors' code: 2 097 152 and 4 194 304 are 64 and 128 times 32 768. That code
transforms the filter with a library's FFT; here it passes the same stages.
Source: Fu et al. 2023, arXiv 2311.05908, and the code it publishes. Chapter: attention/flash_fft_conv.
"""

from functools import cache
from math import prod
from typing import NamedTuple

import numpy as np

from toolkit.attention._flash_fft_conv_plan import (
    FAST,
    REAL,
    SHIPPED,
    Plan,
    bins,
    causal_plan,
    check_factors,
    even_factors,
    fourier,
    shipped,
    tables,
    twiddles,
    weights,
)
from toolkit.kernels.threads import share, threads_for
from toolkit.runtime.arrays import like
from toolkit.runtime.errors import DtypeError, ShapeError
from toolkit.runtime.kernel import Cost, kernel

__all__ = [
    "FAST",
    "SHIPPED",
    "Plan",
    "Spectrum",
    "bins",
    "causal_plan",
    "conv",
    "conv_backward",
    "dft",
    "even_factors",
    "fourier",
    "inverse_dft",
    "partial_conv",
    "shipped",
    "spectrum",
    "twiddles",
]

# ---- the decomposition, as the paper draws it ------------------------------------------------------------------------


def dft(x, factors):
    """Order-p Monarch transform over the last axis; bins in the order of `bins(factors)`.

    x        (..., N)   float or complex, N the product of `factors`
    returns  (..., N)   complex
    raises   ShapeError
    """
    check_factors(x.shape[-1], factors)
    first, *rest = factors
    if not rest:
        return x @ fourier(first)
    columns = fourier(first) @ x.reshape(*x.shape[:-1], first, -1)
    return dft(columns * twiddles(first, columns.shape[-1]), rest).reshape(x.shape)


def inverse_dft(z, factors):
    """What undoes `dft`: the same matrices, conjugate, in the opposite order."""
    check_factors(z.shape[-1], factors)
    first, *rest = factors
    if not rest:
        return z @ fourier(first).conj() / first
    rows = inverse_dft(z.reshape(*z.shape[:-1], first, -1), rest)
    return (fourier(first).conj() @ (rows * twiddles(first, rows.shape[-1]).conj()) / first).reshape(z.shape)


# ---- the convolution -------------------------------------------------------------------------------------------------


class Spectrum(NamedTuple):
    """A filter's bins (channels, bins before, 2, last), in the order of its plan; d is empty unless packed."""

    plan: Plan
    taps: int
    s: np.ndarray
    d: np.ndarray


def spectrum(k, plan):
    """Transform filters once, to use them in many calls of `conv`.

    k        (channels, taps)   float16, float32 or float64
    returns  Spectrum
    raises   ShapeError, DtypeError
    """
    if k.ndim != 2:
        raise ShapeError(f"spectrum: k is {k.shape}: it must be (channels, taps)")
    if k.shape[1] > plan.n:
        raise ShapeError(f"spectrum: {k.shape[1]} taps do not fit into FFT size {plan.n}")
    loops, dtype = _loops(), _accumulation(k.dtype)
    kind = loops.PACKED if plan.real == "packed" else loops.PLAIN  # filters differ, so they make no pairs
    s = np.empty((len(k), prod(plan.kept[:-1]), 2, plan.kept[-1]), dtype)
    d = np.empty_like(s) if plan.real == "packed" else s[:, :0]
    rows, tile = _plain(k, dtype)[:, None], _tile(plan, len(k))
    share(
        threads_for(len(k) * plan.flops(k.shape[1])),
        -(-len(k) // tile),
        loops.transform,
        *(tables(plan, k.shape[1], dtype), kind, tile, rows, s, d),
    )
    s *= weights(plan, dtype)
    return Spectrum(plan, k.shape[1], s, d)


def _conv_cost(u, k, plan=None, pre_gate=None, post_gate=None):
    plan = _check(u, k, plan, pre_gate, post_gate)
    batch, channels, length = u.shape
    sequences, complex_bytes = plan.transforms(batch), 2 * u.dtype.itemsize
    tiles = -(-sequences // _tile(plan, sequences))
    spectra = prod(plan.kept) * complex_bytes * (2 if plan.real == "packed" else 1)
    flops = channels * (2 * sequences * plan.flops(length) + plan.flops(k.shape[1]))
    moved = 2 * u.nbytes + sum(g.nbytes for g in (pre_gate, post_gate) if g is not None)
    moved += channels * (spectra * (1 + tiles) + 4 * sequences * plan.outer() * plan.length * complex_bytes) + k.nbytes
    return Cost(flops, moved)


@kernel(cost=_conv_cost, out=lambda u, *_, **__: like(u))
def conv(u, k, plan=None, pre_gate=None, post_gate=None):
    """post_gate · ((u · pre_gate) ∗ k): a convolution per channel over the last axis, the first L samples of it.

    u          (batch, channels, L)    float16, float32 or float64; float16 is computed in float32
    k          (channels, taps)        same dtype, taps ≤ L; or a Spectrum, whose plan then counts
    plan       Plan; default: `causal_plan`. A smaller n closes the convolution on a circle of n samples
    gates      shape and dtype of u
    returns    shape and dtype of u
    costs      2 · transforms · plan.flops(L), and plan.flops(taps) a channel. Reads u, gates and k once, writes the
               result; writes the filter's bins once and reads them once a tile
    memory     one pair of tiles a thread, and the filter's bins
    raises     ShapeError, DtypeError
    """
    plan = _check(u, k, plan, pre_gate, post_gate)
    filters = k if isinstance(k, Spectrum) else spectrum(k, plan)
    loops, dtype, kind = _loops(), _accumulation(u.dtype), REAL.index(plan.real)
    batch, channels, length = u.shape
    sequences = plan.transforms(batch)
    tile = _tile(plan, sequences)
    units = [(h, b, min(tile, sequences - b)) for h in range(channels) for b in range(0, sequences, tile)]
    out = np.empty(u.shape, dtype)
    share(threads_for(2 * channels * sequences * plan.flops(length)), len(units), loops.convolve,
          tables(plan, length, dtype), kind, np.array(units, np.int64), _plain(u, dtype), filters.s, filters.d,
          *_gates(u, dtype, pre_gate, post_gate), out)  # fmt: skip
    return out.astype(u.dtype, copy=False)


def _backward_cost(u, k, grad_out, plan=None, pre_gate=None, post_gate=None):
    plan = _check(u, k, plan, pre_gate, post_gate, grad_out)
    batch, channels, length = u.shape
    ways = 3 if post_gate is None else 4  # transforms of u and grad_out; back for du, and for the forward result
    arrays = 3 + 2 * sum(g is not None for g in (pre_gate, post_gate))
    flops = channels * (ways * plan.transforms(batch) * plan.flops(length) + 2 * plan.flops(k.shape[1]))
    spectra = channels * prod(plan.kept) * 2 * u.dtype.itemsize * (2 if plan.real == "packed" else 1)
    return Cost(flops, arrays * u.nbytes + 2 * k.nbytes + 2 * spectra)


def _backward_out(u, k, grad_out, plan=None, pre_gate=None, post_gate=None):
    return (like(u), like(k), None if pre_gate is None else like(u), None if post_gate is None else like(u))


@kernel(cost=_backward_cost, out=_backward_out)
def conv_backward(u, k, grad_out, plan=None, pre_gate=None, post_gate=None):
    """Gradients of sum(grad_out · conv(u, k, plan, …)): (du, dk, dpre_gate, dpost_gate); None for a missing gate.

    Arguments and errors as in `conv`, grad_out like u; k is an array. The forward pass keeps nothing: the bins of u are
    computed again. dk sums over the batch, so a channel is a unit of work.
    """
    plan = _check(u, k, plan, pre_gate, post_gate, grad_out)
    filters = spectrum(k, plan)
    loops, dtype, kind = _loops(), _accumulation(u.dtype), REAL.index(plan.real)
    batch, channels, length = u.shape
    gates = _gates(u, dtype, pre_gate, post_gate)
    du, dk = np.empty(u.shape, dtype), np.empty((1, *k.shape), dtype)
    dgates = [np.empty(gate.shape, dtype) for gate in gates]
    spread = np.broadcast_to(weights(plan, dtype), filters.s.shape[1:]).reshape(-1)
    share(threads_for(3 * channels * plan.transforms(batch) * plan.flops(length)), channels, loops.differentiate,
          tables(plan, length, dtype), tables(plan, k.shape[1], dtype), kind, plan.transforms(batch),
          _plain(u, dtype), filters.s, filters.d, spread, *gates, _plain(grad_out, dtype), du, dk, *dgates)  # fmt: skip
    given = (du, dk[0], *(a if a.size else None for a in dgates))
    return tuple(a if a is None else a.astype(u.dtype, copy=False) for a in given)


def partial_conv(u, k, taps, n):
    """Causal convolution with the first `taps` taps, in chunks of n - taps + 1 samples (overlap-save).

    u        (batch, channels, L)   any L; memory and FFT size do not depend on it, apart from u and the result
    k        (channels, any)        n  FFT size, a power of two above taps
    returns  shape and dtype of u
    raises   ShapeError, DtypeError
    """
    if not 1 <= taps <= k.shape[1] or n <= taps:
        raise ShapeError(f"partial_conv: {taps} taps of {k.shape[1]}, FFT size {n}: taps must be fewer than either")
    filters = spectrum(k[:, :taps], Plan(n, even_factors(n), "paired" if len(u) > 1 else "plain"))
    out, window, past = np.empty_like(u), np.empty((*u.shape[:2], n), u.dtype), taps - 1
    for start in range(0, u.shape[2], n - past):
        have = u[:, :, max(0, start - past) : start + n - past]
        window[:] = 0
        lead = max(0, past - start)  # nothing came before the first sample
        window[:, :, lead : lead + have.shape[2]] = have
        chunk = out[:, :, start : start + n - past]
        chunk[:] = conv(window, filters)[:, :, past : past + chunk.shape[2]]  # the first `past` samples wrap round
    return out


# ---- what the loops get ----------------------------------------------------------------------------------------------


@cache
def _loops():
    """The compiled loops; numba and scipy load at the first call, not with the import of this module."""
    from toolkit.attention import _flash_fft_conv_loops

    return _flash_fft_conv_loops


def _accumulation(dtype):
    if dtype not in (np.float16, np.float32, np.float64):
        raise DtypeError(f"conv: {dtype} is none of float16, float32, float64")
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def _tile(plan, sequences):
    """Sequences of a tile: what fits into fast memory, at least one."""
    return max(1, min(sequences, FAST // plan.length))


def _plain(array, dtype):
    return np.ascontiguousarray(array, dtype)


def _gates(u, dtype, *gates):
    """Gates as arrays; an empty one where there is none."""
    return [np.empty((0, *u.shape[1:]), dtype) if gate is None else _plain(gate, dtype) for gate in gates]


def _check(u, k, plan, pre_gate, post_gate, grad_out=None):
    """Refuse what the loops cannot take; returns the plan that counts."""
    bank, taps = (k.s, k.taps) if isinstance(k, Spectrum) else (k, k.shape[-1])
    if u.ndim != 3 or len(bank) != u.shape[1] or (bank is k and k.ndim != 2):
        raise ShapeError(f"conv: u {u.shape}, k {bank.shape}: they must be (batch, channels, L) and (channels, taps)")
    if taps > u.shape[2] or taps == 0 or u.shape[0] == 0:
        raise ShapeError(f"conv: {taps} taps, u {u.shape}: needs 1 ≤ taps ≤ L, later taps meet no sample")
    for name, array in (("pre_gate", pre_gate), ("post_gate", post_gate), ("grad_out", grad_out)):
        if array is not None and array.shape != u.shape:
            raise ShapeError(f"conv: {name} is {array.shape}: it must have the shape of u, {u.shape}")
        if array is not None and array.dtype != u.dtype:
            raise DtypeError(f"conv: {name} is {array.dtype} and u {u.dtype}: they must be the same")
    if _accumulation(u.dtype) != _accumulation(bank.dtype) or (bank is k and k.dtype != u.dtype):
        raise DtypeError(f"conv: u is {u.dtype} and k {bank.dtype}: they must be the same")
    if isinstance(k, Spectrum):
        if plan not in (None, k.plan):
            raise ShapeError("conv: k is a Spectrum and has a plan of its own: leave plan out")
        plan = k.plan
    plan = plan or causal_plan(u.shape[0], u.shape[2], taps)
    if u.shape[2] > plan.n:
        raise ShapeError(f"conv: L = {u.shape[2]} exceeds FFT size {plan.n}: take a larger plan, or partial_conv")
    if plan.real == "packed" and u.shape[2] % 2:
        raise ShapeError(f"conv: packed needs an even L, got {u.shape[2]}: pad one sample, or take another plan")
    return plan
