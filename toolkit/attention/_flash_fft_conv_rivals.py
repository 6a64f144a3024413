"""What FlashFFTConv is compared with: a library's FFT, the definition, and its own stages as separate kernels.

`library_conv` and `unfused` are programs of kernels: in a cluster, every pass over memory is an event with its bytes.
Chapter: attention/flash_fft_conv.
"""

from math import ceil, log2, prod

import numpy as np

from toolkit.attention.flash_fft_conv import _loops, fourier, twiddles
from toolkit.kernels.threads import share, threads_for
from toolkit.runtime.arrays import like
from toolkit.runtime.kernel import Cost, kernel

IN_ONE_PASS = 14  # log2 of the longest complex64 transform that fits into the 227 kB of a multiprocessor


def pocketfft(u, k, n, workers=None):
    """The usual three lines, with scipy's real transforms: the first L samples of u ∗ k on a circle of n samples."""
    from scipy import fft

    spectrum = fft.rfft(u, n, workers=workers) * fft.rfft(k, n, workers=workers)
    return fft.irfft(spectrum, n, workers=workers)[..., : u.shape[-1]]


def direct(u, k):
    """Causal convolution by its definition, 2 · L · taps operations: unbeaten for a few taps.

    u  (batch, channels, L)    k  (channels, taps)   same dtype, float32 or float64
    """
    channels, length = u.shape[1:]
    out = np.empty_like(u)
    for one, result in zip(np.ascontiguousarray(u), out, strict=True):
        share(threads_for(2 * k.size * length), channels, _loops().direct, one, np.ascontiguousarray(k), result)
    return out


# ---- the stages of FlashFFTConv, one kernel each: every result goes to memory and comes back -------------------------


def unfused(comm, u, k_bins, factors):
    """Convolution on a circle of n = product of factors: each stage is a kernel over the whole batch.

    u        (batch, channels, L)   float32 or float64, L ≤ n
    k_bins   (channels, n)          complex: `dft` of the filters, padded
    returns  shape and dtype of u
    moves    u and the result, k_bins, and 4 p + 3 + L / n times the complex batch
    """
    x = padded(u, prod(factors))
    for i in range(len(factors)):
        x = stage(x, factors, i)
    x = times_filter(x, k_bins)
    for i in reversed(range(len(factors))):
        x = stage_back(x, factors, i)
    return first_samples(x, u)


def _complex(dtype):
    return np.dtype(np.complex128 if dtype == np.float64 else np.complex64)


def _padded_like(u, n):
    return like((*u.shape[:-1], n), _complex(u.dtype))


@kernel(cost=lambda u, n: Cost(0, u.nbytes + _padded_like(u, n).nbytes), out=_padded_like)
def padded(u, n):
    x = np.zeros((*u.shape[:-1], n), _complex(u.dtype))
    x[..., : u.shape[-1]] = u
    return x


def _stage_cost(x, factors, i):
    return Cost(8 * x.size * factors[i], 2 * x.nbytes, x.real.dtype)


@kernel(cost=_stage_cost, out=lambda x, factors, i: like(x))
def stage(x, factors, i):
    n, before = factors[i], prod(factors[:i])
    columns = fourier(n).astype(x.dtype) @ x.reshape(*x.shape[:-1], before, n, -1)
    return (columns * twiddles(n, columns.shape[-1]).astype(x.dtype)).reshape(x.shape)


@kernel(cost=_stage_cost, out=lambda x, factors, i: like(x))
def stage_back(x, factors, i):
    n, before = factors[i], prod(factors[:i])
    columns = x.reshape(*x.shape[:-1], before, n, -1)
    columns = columns * twiddles(n, columns.shape[-1]).conj().astype(x.dtype)
    return (fourier(n).conj().astype(x.dtype) @ columns / n).astype(x.dtype).reshape(x.shape)


@kernel(cost=lambda x, y: Cost(0, 2 * x.nbytes + y.nbytes), out=lambda x, y: like(x))
def times_filter(x, y):
    return x * y


@kernel(cost=lambda x, u: Cost(0, x[..., : u.shape[-1]].nbytes + u.nbytes), out=lambda x, u: like(u))
def first_samples(x, u):
    return x[..., : u.shape[-1]].real.astype(u.dtype)


# ---- a gated convolution as a deep-learning library runs it ----------------------------------------------------------


def library_conv(comm, u, k, n, pre_gate, post_gate):
    """The rival of the authors' benchmark, kernel by kernel: 16-bit arrays, transforms in complex64.

    u, gates   (batch, channels, L)   float16        k   (channels, taps)   float32
    Names stay alive until the end, as they do in a library that keeps what its gradients need.
    """
    gate, signal = cast(pre_gate), cast(u)
    gated = multiply(gate, signal)
    u_bins = library_fft(gated, n)
    k_bins = library_fft(k, n)
    y_bins = times_filter(u_bins, k_bins)
    y = scale(library_inverse_fft(y_bins))
    gate_after = cast(post_gate)
    out = multiply_real(y, gate_after)
    return cast_back(out, u)


@kernel(cost=lambda x: Cost(0, x.nbytes + 4 * x.size), out=lambda x: like(x, np.float32))
def cast(x):
    return x.astype(np.float32)


@kernel(cost=lambda x, y: Cost(0, 3 * x.nbytes), out=lambda x, y: like(x))
def multiply(x, y):
    return x * y


def _fft_cost(x, n):
    """Real to half of the bins in passes through memory, then a pass that fills in the other half."""
    rows, passes = x.size // x.shape[-1], ceil(log2(n) / IN_ONE_PASS)
    return Cost(2.5 * rows * n * log2(n), x.nbytes + 4 * rows * n * (2 * passes - 1) + 8 * rows * n, np.float32)


@kernel(cost=_fft_cost, out=lambda x, n: like((*x.shape[:-1], n), np.complex64))
def library_fft(x, n):
    from scipy import fft

    return fft.fft(x, n).astype(np.complex64)


def _inverse_cost(x):
    n = x.shape[-1]
    return Cost(5 * x.size * log2(n), 2 * x.nbytes * ceil(log2(n) / IN_ONE_PASS), np.float32)


@kernel(cost=_inverse_cost, out=lambda x: like(x))
def library_inverse_fft(x):
    from scipy import fft

    return fft.ifft(x, norm="forward").astype(np.complex64)  # `scale` divides by n


@kernel(cost=lambda x: Cost(0, 2 * x.nbytes), out=lambda x: x)
def scale(x):
    x /= x.shape[-1]
    return x


@kernel(cost=lambda y, gate: Cost(0, y[..., : gate.shape[-1]].nbytes + 2 * gate.nbytes), out=lambda y, gate: like(gate))
def multiply_real(y, gate):
    return y[..., : gate.shape[-1]].real * gate


@kernel(cost=lambda x, u: Cost(0, x.nbytes + u.nbytes), out=lambda x, u: like(u))
def cast_back(x, u):
    return x.astype(u.dtype)
