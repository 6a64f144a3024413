"""FlashFFTConv's claims. Times on an H100 are predicted from counted bytes and the paper's own cost model.

Published figures are those of the README of the authors' repository and of their announcement; the body of the paper
was not at hand. README times are scaled to 64 sequences of 768 channels. Chapter: attention/flash_fft_conv.
"""

from functools import cache
from time import perf_counter

import numpy as np

from toolkit.attention import _flash_fft_conv_costs as costs
from toolkit.attention import _flash_fft_conv_rivals as rivals
from toolkit.attention import flash_fft_conv as fft
from toolkit.claims import claim
from toolkit.kernels.attention import attention
from toolkit.runtime import Cluster, Cost, hardware, kernel, like, topology

BATCH, CHANNELS = 64, 768
# sequence -> (batch, channels) that the authors' benchmark can hold, PyTorch ms, FlashFFTConv ms, memory ratio
README = {
    256: (64, 768, 0.62, 0.11, 6.65),
    1024: (64, 768, 2.30, 0.29, 6.40),
    4096: (64, 768, 9.49, 1.43, 6.35),
    8192: (64, 768, 19.4, 3.58, 6.34),
    16_384: (32, 768, 29.9, 12.2, 6.17),
    32_768: (16, 768, 84.8, 26.3, 5.87),
    2**20: (8, 48, 3071.4, 1768.9, 2.82),
    2**21: (8, 32, 6342.6, 4623.5, 2.81),
    2**22: (8, 16, 13_031.2, 10_049.4, 2.81),
}
ATTAINED = hardware.replace(hardware.H100, memory_bandwidth=costs.H100.slow)
ONE_H100 = Cluster(topology.ring(1, hardware.NVLINK4), ATTAINED)


# ---- the gated convolution of the README, both ways ------------------------------------------------------------------


def arrays(n):
    batch, channels = README[n][:2]
    return like((batch, channels, n), np.float16), like((channels, n), np.float32)


@cache
def library_run(n):
    """The library's kernels on an H100, shape-only."""
    u, k = arrays(n)
    return ONE_H100.run(rivals.library_conv, u, k, n, u, u)


def scaled(n, seconds):
    batch, channels = README[n][:2]
    return seconds * BATCH * CHANNELS / (batch * channels)


def library_seconds(n):
    return scaled(n, library_run(n).makespan)


@cache
def fused_run(n):
    """FlashFFTConv on an H100, shape-only: one kernel, or three where the sequence exceeds fast memory."""
    u, k = arrays(n)
    return ONE_H100.run(fused if n <= fft.FAST else fused_inside_an_outer_stage, u, k, n, u, u)


def fused_seconds(n):
    """The cost model with all slow-memory traffic counted, inputs and result included; nothing overlaps."""
    plan = fft.shipped(n)
    outer = sum(slow for _, slow, _ in costs.stage_seconds(plan.factors, costs.H100))
    model = costs.model_seconds(plan.factors, costs.H100, BATCH, CHANNELS) - BATCH * CHANNELS * outer
    moved = sum(event.bytes for event in fused_run(n).trace)
    return model + scaled(n, moved / costs.H100.slow)


def speed_up(n):
    return library_seconds(n) / fused_seconds(n)


def fused(comm, u, k, n, pre_gate, post_gate):
    bins = filter_bins(k, n)
    return convolve(u, bins, pre_gate, post_gate)


def fused_inside_an_outer_stage(comm, u, k, n, pre_gate, post_gate):
    """The long sequence is cut by its first factor in slow memory; what remains is fused."""
    bins = filter_bins(k, n)
    cut = outer_stage(u, pre_gate, n)
    filtered = convolve_inside(cut, bins)
    return outer_stage_back(filtered, post_gate)


def complex_16(u, n):
    return like((2, *u.shape[:-1], n), np.float16)  # real and imaginary parts


@kernel(cost=lambda k, n: Cost(0, 3 * k.nbytes), out=lambda k, n: complex_16(k, n))
def filter_bins(k, n): ...


@kernel(cost=lambda u, bins, *gates: Cost(0, 4 * u.nbytes + bins.nbytes), out=lambda u, *_: like(u))
def convolve(u, bins, pre_gate, post_gate): ...


@kernel(
    cost=lambda u, gate, n: Cost(0, 2 * u.nbytes + complex_16(u, n).nbytes), out=lambda u, gate, n: complex_16(u, n)
)
def outer_stage(u, gate, n): ...


@kernel(cost=lambda x, bins: Cost(0, 2 * x.nbytes + bins.nbytes), out=lambda x, bins: like(x))
def convolve_inside(x, bins): ...


@kernel(cost=lambda x, gate: Cost(0, x.nbytes + 2 * gate.nbytes), out=lambda x, gate: like(gate))
def outer_stage_back(x, gate): ...


GATED = "authors' README, gated convolution, H100, 64 × 768 sequences of "


@claim(
    says="Up to 7.93 times as fast as PyTorch's FFT convolution, at 1 024 samples",
    value=7.93,
    unit="×",
    where=GATED + "1 K",
    same_side_of=1.0,
    why="predicted: bytes counted kernel by kernel, the paper's model for the fused kernel",
    paper="flash_fft_conv",
)
def speed_up_at_1k():
    return speed_up(1024)


@claim(
    says="3.22 times as fast at 32 768 samples",
    value=3.22,
    unit="×",
    where=GATED + "32 K",
    same_side_of=1.0,
    why="the model lets one sequence fill fast memory at full speed; the real kernel slows down by 2 from 8 K to 16 K",
    paper="flash_fft_conv",
)
def speed_up_at_32k():
    return speed_up(32_768)


@claim(
    says="1.30 times as fast at 4 194 304 samples",
    value=1.30,
    unit="×",
    where=GATED + "4 M",
    same_side_of=1.0,
    why="we charge the outer stage its bytes at the full attained rate; the published time is several times that",
    paper="flash_fft_conv",
)
def speed_up_at_4m():
    return speed_up(2**22)


@claim(
    says="The speed-up shrinks once an outer stage goes through slow memory",
    holds=lambda ratio: ratio < 1,
    direction="below 1",
    unit="of the speed-up at 32 K is left at 1 M",
    where="authors' README: 1.74 / 3.22 = 0.54",
    paper="flash_fft_conv",
)
def shrinks():
    return speed_up(2**20) / speed_up(32_768)


@claim(
    says="PyTorch's FFT convolution takes 2.30 ms",
    value=2.30,
    unit="ms",
    where=GATED + "1 K",
    why="each kernel at 87 % of the memory's peak; the order of passes is ours",
    same_side_of=0.29,
    paper="flash_fft_conv",
)
def library_at_1k():
    return 1e3 * library_seconds(1024)


def memory_ratio(n):
    return library_run(n).peak_memory[0] / fused_run(n).peak_memory[0]


@claim(
    says="6.40 times less memory at 1 024 samples",
    value=6.40,
    unit="×",
    where=GATED + "1 K",
    same_side_of=1.0,
    why="we count what a library keeps for its gradients; which temporaries it frees early is not published",
    paper="flash_fft_conv",
)
def memory_at_1k():
    return memory_ratio(1024)


@claim(
    says="2.81 times less memory at 4 194 304 samples",
    value=2.81,
    unit="×",
    where=GATED + "4 M",
    same_side_of=1.0,
    why="two complex copies in 16 bits pass through slow memory",
    paper="flash_fft_conv",
)
def memory_at_4m():
    return memory_ratio(2**22)


# ---- how many matrices -----------------------------------------------------------------------------------------------


@claim(
    says="The cost model chooses the factors that are shipped",
    value=13,
    unit="of 13 sizes",
    tolerance=0,
    where="tables in the authors' code, the complex plans from 256 to 4 M; orders 1 to 4",
    paper="flash_fft_conv",
)
def sizes_chosen_as_shipped():
    plain = {n: factors for n, (factors, real) in fft.SHIPPED.items() if real == "plain"}
    return sum(sorted(costs.best_factors(n)) == sorted(factors) for n, factors in plain.items())


@claim(
    says="Three matrices beat two from 4 096 samples on",
    value=4096,
    unit="samples",
    tolerance=0,
    where="tables in the authors' code: two matrices at 1 K, three at 4 K",
    paper="flash_fft_conv",
)
def three_from():
    return next(1 << b for b in range(8, 23) if len(costs.best_factors(1 << b, orders=(2, 3, 4))) == 3)


@claim(
    says="Four matrices suffice up to 4 M samples",
    value=4,
    unit="matrices",
    tolerance=0,
    where="tables in the authors' code, 4 M",
    same_side_of=3.5,
    why="with five allowed, the model would take 16 five times from 1 M on: it does not charge a stage its overhead",
    paper="flash_fft_conv",
)
def matrices_at_4m():
    return len(costs.best_factors(2**22, orders=range(1, 7)))


# ---- against attention -----------------------------------------------------------------------------------------------


AS_MEASURED = hardware.replace(hardware.H100, curves=hardware.H200.curves)  # shares of the peak that an H200 attains


def attention_seconds(n, device=hardware.H100):
    """Causal attention of 64 sequences, 12 heads of 64 (768 channels): unless told otherwise at its peak."""
    q = like((BATCH * CHANNELS // 64, n, 64), np.float16)
    return Cluster(ONE_H100.topology, device).run(lambda comm, q: attention(q, q, q, True), q).makespan


def gated_seconds(n):
    """A gated causal convolution of 768 channels by the model: FFT size 2 n, half of two stages absent."""
    plan = fft.shipped(2 * n)
    padding = 16 * plan.n * plan.factors[0] / 2 / costs.H100.matrix
    moved = 4 * 2 * n + 4 * plan.n / BATCH  # u, two gates, the result; bins are read once
    return BATCH * CHANNELS * (costs.model_seconds(plan.factors, costs.H100) - padding + moved / costs.H100.slow)


@claim(
    says="As fast as FlashAttention-2 from 2 K samples on",
    value=2048,
    unit="samples",
    where="authors' announcement, end to end",
    same_side_of=32_768,
    why="attention is given all of its peak here; at the rate that an H200 attains, it is slower from 128 samples on",
    paper="flash_fft_conv",
)
def overtakes_attention(device=hardware.H100):
    return next(n for n in (1 << b for b in range(7, 16)) if gated_seconds(n) < attention_seconds(n, device))


# ---- on this CPU -----------------------------------------------------------------------------------------------------


@cache
def race(batch=4, channels=16, length=2048, turns=9):
    """Median over turns of (our seconds, scipy's seconds), float32, causal, the filter transformed by each as well."""
    random = np.random.default_rng(0)
    u, k = (random.standard_normal(s).astype(np.float32) for s in ((batch, channels, length), (channels, length)))

    def timed(function, *args):
        start = perf_counter()
        function(*args)
        return perf_counter() - start

    runs = (fft.conv, u, k), (rivals.pocketfft, u, k, 2 * length, 2)
    times = [[timed(*run) for run in runs] for _ in range(turns + 1)][1:]
    return np.median(times, axis=0)


def flops_here(batch=4, channels=16, length=2048):
    """(operations of our products, operations that a real split-radix FFT would do) for the shapes of `race`."""
    plan = fft.causal_plan(batch, length, length)
    ours = channels * (2 * plan.transforms(batch) * plan.flops(length) + plan.flops(length))
    n = plan.n
    return ours, channels * (2 * batch + 1) * 2 * n * np.log2(n)


@claim(
    says="More operations at a higher rate: on tensor cores the rate wins",
    holds=lambda ratio: ratio > 1,
    direction="above 1",
    unit="× the operations per second of scipy's FFT, on this CPU",
    where="section 1, of GPUs: FFTs do not use the matrix units",
    why="this CPU's rate for small matrices fell short",
    paper="flash_fft_conv",
)
def rate_here():
    ours, theirs = flops_here()
    seconds, scipy_seconds = race()
    return (ours / seconds) / (theirs / scipy_seconds)


@claim(
    says="So the convolution is faster too; here, on a CPU",
    holds=lambda ratio: ratio > 1,
    direction="above 1",
    unit="× as fast as scipy's real FFTs, on this CPU",
    where="the paper's claim is for GPUs",
    why="without tensor cores the higher rate does not pay for all of the extra operations",
    paper="flash_fft_conv",
)
def faster_here():
    seconds, scipy_seconds = race()
    return scipy_seconds / seconds


# ---- sparse ----------------------------------------------------------------------------------------------------------

LENGTH = 256


def smooth_teacher(channels=8, width=12.0):
    """Filters of decaying waves, blurred over `width` samples: (channels, 256)."""
    random, t = np.random.default_rng(1), np.arange(LENGTH)
    decay, wave = random.uniform(30, 90, channels)[:, None], random.uniform(0.0, 0.03, channels)[:, None]
    raw = np.exp(-t / decay) * np.cos(2 * np.pi * wave * t) * (1 - np.exp(-t / width)) ** 2
    return (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype(np.float32)


@cache
def trained(steps=300, batch=8):
    """A long-convolution layer that learns the teacher from noise, by Adam on `conv_backward`: its filters."""
    random = np.random.default_rng(2)
    teacher = smooth_teacher()
    k, mean, square = np.zeros_like(teacher), np.zeros_like(teacher), np.zeros_like(teacher)
    for step in range(1, steps + 1):
        u, noise = (random.standard_normal((batch, *teacher.shape), np.float32) for _ in range(2))
        error = fft.conv(u, k) - fft.conv(u, teacher) - np.float32(0.1) * noise
        grad = fft.conv_backward(u, k, error / batch)[1]
        mean, square = 0.9 * mean + 0.1 * grad, 0.99 * square + 0.01 * grad**2
        rate = 0.01 * (1 - step / (steps + 1))
        k -= rate * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.99**step)) + 1e-9)
    return k


@cache
def explained(kept=32):
    """Share of the variance of held-out outputs that the trained filters explain with `kept` of 32 blocks of bins."""
    u = np.random.default_rng(3).standard_normal((16, 8, LENGTH), np.float32)
    want = fft.conv(u, smooth_teacher())
    plan = fft.Plan(2 * LENGTH, (8, 64), keep=(8, kept))  # 32 of 64 blocks: the others mirror them
    return 1 - ((fft.conv(u, trained(), plan) - want) ** 2).sum() / (want**2).sum()


@claim(
    says="79 % of the frequencies can go without a loss in quality",
    value=0.79,
    unit="of the frequencies, for less than 0.01 of the variance explained",
    where="HyenaDNA-1M, from memory of the paper's table; here 8 filters of 256 taps",
    same_side_of=0.5,
    why="a filter's smoothness decides, and we chose how smooth the teacher is",
    paper="flash_fft_conv",
)
def frequencies_to_spare():
    return next(1 - kept / 32 for kept in range(1, 33) if explained(kept) > explained() - 0.01)


@claim(
    says="Partial filters extend a model to 2.3 M samples: chunks equal the whole",
    value=0.0,
    unit="(error)",
    tolerance=1e-5,
    where="HyenaDNA, the longest human genes; here one channel, 1 024 taps, 2.3 M samples, in float32",
    paper="flash_fft_conv",
)
def chunks_are_exact():
    random = np.random.default_rng(4)
    u, k = (random.standard_normal(shape, np.float32) for shape in ((1, 1, 2_300_000), (1, 1024)))
    k /= 32
    chunks = fft.partial_conv(u, k, 1024, 8192)
    return abs(chunks - rivals.pocketfft(u, k, 2_400_000)).max()
