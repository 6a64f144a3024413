"""Race: our attention against PyTorch's CPU scaled_dot_product_attention, on the same arrays and threads.

    python benchmarks/attention.py [--tokens 1024 2048 4096] [--head-dim 64 128] [--repetitions 7] [--heads 8]

Ours, PyTorch and one product of two 2048 x 2048 float32 matrices in numpy take turns, so a slow moment of the machine
hits all three. `ratio` is the median over the turns of PyTorch's time divided by ours: above 1 we are faster. GFLOP/s
count the visible scores only (4 flops per pair and channel forward, 14 with the backward pass); `of sgemm` is the
median over the turns of our rate divided by the product's, and can pass 100 %: our tiles need no packing.
Compilation, and one warm-up call of each, come before the clock starts. Needs torch; the package does not.
"""
import argparse
from itertools import product as combinations
from statistics import median
from time import perf_counter, sleep

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from toolkit.kernels.attention import attention, attention_backward, visible_area


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


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--heads", type=int, default=8)
    options.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096])
    options.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    options.add_argument("--repetitions", type=int, default=7)
    options = options.parse_args()
    square = np.random.default_rng(0).normal(size=(2048, 2048)).astype(np.float32)
    print(f"torch {torch.__version__} on {torch.get_num_threads()} threads")
    print("pass     causal tokens  dim  ours ms torch ms  GFLOP/s of sgemm  ratio")
    for backward, causal, d, n in combinations((False, True), (False, True), options.head_dim, options.tokens):
        runs = (*contestants(options.heads, n, d, causal, backward), lambda: square @ square)
        for run in runs:
            run()
        turns = [[seconds(run) for run in runs] for _ in range(options.repetitions)]
        ours, theirs, _ = (median(times) for times in zip(*turns, strict=True))
        ratio = median(b / a for a, b, _ in turns)
        flops = (14 if backward else 4) * options.heads * visible_area(n, n, causal) * d
        fraction = median(flops / a / (2 * 2048**3 / product) for a, _, product in turns)
        print(f"{'fwd+bwd' if backward else 'forward':8} {'yes' if causal else 'no':6} {n:6} {d:4} {ours * 1e3:8.1f} "
              f"{theirs * 1e3:8.1f} {flops / ours / 1e9:8.0f} {fraction:8.0%} {ratio:6.2f}", flush=True)


if __name__ == "__main__":
    main()
