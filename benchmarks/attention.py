"""Race: our attention against PyTorch's CPU scaled_dot_product_attention, on the same arrays and threads.

    python benchmarks/attention.py [--heads 8 1] [--tokens 1024 2048 4096 8192] [--head-dim 64 128] [--repetitions 7]

In each turn ours, PyTorch and a product of two 2048 x 2048 float32 matrices run one after another, so a slow moment of
the machine hits all of them; every second turn runs backwards. `ratio` is the median over the turns of PyTorch's time
divided by ours: above 1 we are faster. GFLOP/s count the visible scores only (4 flops per pair and channel forward, 14
with the backward pass); `of gemm` is the median over the turns of our rate divided by the product's, numpy's or
PyTorch's, whichever is faster in that turn. One head shows whether work is shared along the sequence.
Compilation, and one warm-up call of each, come before the clock starts. Needs torch; the package does not.
"""
import argparse
from itertools import product as combinations
from statistics import geometric_mean, median
from time import perf_counter, sleep

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from toolkit.kernels.attention import attention, attention_backward, visible_area

SIDE = 2048


def seconds(function):
    sleep(0.25)                                # idle threads of OpenBLAS and OpenMP spin first: let them fall asleep
    start = perf_counter()
    function()
    return perf_counter() - start


def contestants(heads, tokens, head_dim, causal, backward):
    """Two functions without arguments that do the same work: ours and PyTorch's."""
    q, k, v, grad = np.random.default_rng(1).normal(size=(4, heads, tokens, head_dim)).astype(np.float32)
    tensors = [torch.from_numpy(a)[None].clone().requires_grad_(backward) for a in (q, k, v)]
    tensor_grad = torch.from_numpy(grad)[None]

    def ours():
        out, lse = attention(q, k, v, causal=causal, return_lse=True)
        return attention_backward(q, k, v, out, lse, grad, causal=causal) if backward else out

    def theirs():
        out = scaled_dot_product_attention(*tensors, is_causal=causal)
        return torch.autograd.grad(out, tensors, tensor_grad) if backward else out

    return ours, theirs


def products():
    """The same matrix product by numpy's library and by PyTorch's: the faster one is the machine's peak."""
    square = np.random.default_rng(0).normal(size=(SIDE, SIDE)).astype(np.float32)
    tensor = torch.from_numpy(square)
    return (lambda: square @ square), (lambda: tensor @ tensor)


def race(runs, repetitions):
    """Seconds of each run in each turn, after one call of each that does not count."""
    for run in runs:
        run()
    orders = [runs if turn % 2 == 0 else runs[::-1] for turn in range(repetitions)]
    turns = [[seconds(run) for run in order] for order in orders]
    return [turn if order is runs else turn[::-1] for turn, order in zip(turns, orders, strict=True)]


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--heads", type=int, nargs="+", default=[8, 1])
    options.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    options.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    options.add_argument("--repetitions", type=int, default=7)
    options = options.parse_args()
    gemms, ratios = products(), []
    print(f"torch {torch.__version__} on {torch.get_num_threads()} threads")
    print("pass     causal heads tokens  dim  ours ms torch ms  GFLOP/s of gemm  ratio")
    for h, backward, causal, d, n in combinations(
            options.heads, (False, True), (False, True), options.head_dim, options.tokens):
        turns = race((*contestants(h, n, d, causal, backward), *gemms), options.repetitions)
        ours, theirs, *_ = (median(times) for times in zip(*turns, strict=True))
        ratios.append(median(b / a for a, b, *_ in turns))
        flops = (14 if backward else 4) * h * visible_area(n, n, causal) * d
        fraction = median(flops / a / (2 * SIDE**3 / min(peak)) for a, _, *peak in turns)
        case = f"{'fwd+bwd' if backward else 'forward':8} {'yes' if causal else 'no':6} {h:5} {n:6} {d:4}"
        times = f"{ours * 1e3:8.1f} {theirs * 1e3:8.1f} {flops / ours / 1e9:8.0f}"
        print(f"{case} {times} {fraction:7.0%} {ratios[-1]:6.2f}", flush=True)
    print(f"{sum(r >= 1 for r in ratios)} of {len(ratios)} at 1.00 or more; lowest {min(ratios):.2f}, "
          f"geometric mean {geometric_mean(ratios):.2f}")


if __name__ == "__main__":
    main()
