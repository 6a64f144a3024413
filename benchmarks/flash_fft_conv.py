"""Race: FlashFFTConv's convolution against scipy.fft (pocketfft) on the same arrays, causal, forward.

    python benchmarks/flash_fft_conv.py [--lengths 512 2048 8192 32768] [--batch 4] [--channels 16] [--threads 2]

Each turn times ours, scipy with as many workers, our stages unfused (in numpy), one dense matrix (short sequences
only) and the direct loop with 16 taps, one after the other, so that a slow moment of the machine hits all. Filters are
transformed once by each side, before the clock starts; `with filter` is the ratio when each transforms them in every
call. `ratio` is the median over the turns of scipy's time divided by ours: above 1 we are faster. GFLOP/s counts what
each does: our matrix products, and 2.5 n log2 n for each real transform of n samples of scipy's. Compilation and one
warm-up call come before the clock starts.

    --attention    instead: ours, gated, against our attention kernel, 12 heads of 64 against 768 channels
"""

import argparse
from statistics import median
from time import perf_counter

import numba
import numpy as np
import threadpoolctl
from scipy import fft as pocketfft

from toolkit.attention import _flash_fft_conv_rivals as rivals
from toolkit.attention import flash_fft_conv as fft
from toolkit.kernels.attention import attention


def seconds(function):
    start = perf_counter()
    function()
    return perf_counter() - start


def turns(runs, repetitions):
    """Times, one row a turn, one column a contestant, after a warm-up of each."""
    for run in runs:
        run()
    return np.array([[seconds(run) for run in runs] for _ in range(repetitions)])


def ratios(times):
    """Median over the turns of each column divided by the first."""
    return [median(column / times[:, 0]) for column in times.T]


def convolutions(batch, channels, length, threads):
    """Contestants by name, and operations of (ours, scipy)."""
    random = np.random.default_rng(0)
    u = random.standard_normal((batch, channels, length)).astype(np.float32)
    k = random.standard_normal((channels, length)).astype(np.float32)
    plan = fft.causal_plan(batch, length, length)
    n = 2 * length
    ours, theirs = fft.spectrum(k, plan), pocketfft.rfft(k, n)
    bins = fft.dft(np.pad(k, ((0, 0), (0, n - length))), fft.even_factors(n)).astype(np.complex64)

    def scipy():
        return pocketfft.irfft(pocketfft.rfft(u, n, workers=threads) * theirs, n, workers=threads)[..., :length]

    runs = {
        "ours": lambda: fft.conv(u, ours),
        "scipy": scipy,
        "unfused": lambda: rivals.unfused(None, u, bins, fft.even_factors(n)),
        "16 taps, direct": lambda: rivals.direct(u, k[:, :16]),
        "with filter": lambda: fft.conv(u, k),
        "scipy with filter": lambda: rivals.pocketfft(u, k, n, threads),
    }
    if n <= 2048:
        dense = fft.spectrum(k, fft.Plan(n, (n,), "paired"))
        runs["dense"] = lambda: fft.conv(u, dense)
    flops = 2 * channels * plan.transforms(batch) * plan.flops(length)
    return runs, flops, 5 * batch * channels * n * np.log2(n)


def against_attention(lengths, repetitions):
    print("samples   attention ms    conv ms   ratio (above 1: the convolution is faster)")
    for length in lengths:
        random = np.random.default_rng(0)
        q = random.standard_normal((12, length, 64)).astype(np.float32)
        u, k = (random.standard_normal(s).astype(np.float32) for s in ((1, 768, length), (768, length)))
        filters = fft.spectrum(k, fft.causal_plan(1, length, length))
        runs = [lambda u=u, f=filters: fft.conv(u, f, None, u, u), lambda q=q: attention(q, q, q, True)]
        times = turns(runs, repetitions)
        ours, theirs = np.median(times, axis=0)
        print(f"{length:7,} {1e3 * theirs:14.1f} {1e3 * ours:10.1f} {ratios(times)[1]:7.2f}", flush=True)


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192, 32_768])
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--channels", type=int, default=16)
    options.add_argument("--repetitions", type=int, default=9)
    options.add_argument("--threads", type=int, default=numba.config.NUMBA_NUM_THREADS)
    options.add_argument("--attention", action="store_true")
    options = options.parse_args()
    numba.config.NUMBA_NUM_THREADS = options.threads
    threadpoolctl.threadpool_limits(options.threads)
    if options.attention:
        return against_attention(options.lengths, options.repetitions)
    print(" length  ours ms   ratio  GFLOP/s ours scipy  unfused   dense  direct  with filter   (times of ours)")
    for length in options.lengths:
        runs, flops, scipy_flops = convolutions(options.batch, options.channels, length, options.threads)
        times = turns(runs.values(), options.repetitions)
        column, over = dict(zip(runs, times.T, strict=True)), dict(zip(runs, ratios(times), strict=True))
        filtered = median(column["scipy with filter"] / column["with filter"])
        dense = f"{over['dense']:7.2f}" if "dense" in over else "      -"
        rates = flops / median(column["ours"]) / 1e9, scipy_flops / median(column["scipy"]) / 1e9
        print(
            f"{length:7,} {1e3 * median(column['ours']):8.2f} {over['scipy']:7.2f} {rates[0]:12.0f} {rates[1]:6.1f}",
            end="",
        )
        print(f" {over['unfused']:8.1f} {dense} {over['16 taps, direct']:7.2f} {filtered:12.2f}", flush=True)


if __name__ == "__main__":
    main()
