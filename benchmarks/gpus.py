"""Measure real GPUs: kernels, messages and collectives to calibrate with, and whole algorithms to be predicted.

    torchrun --nproc-per-node 2 benchmarks/gpus.py --environment "NVLink" --out nvlink.json
    NCCL_P2P_DISABLE=1 torchrun …      messages through host memory
    NCCL_MAX_NCHANNELS=1 torchrun …    one channel

The file has the rows that `python -m toolkit calibrate` fits ("micro"), and for each algorithm its step time, the
seconds of its kernels, and what is left: communication that nothing hid. All by CUDA events, of the slowest rank
("algorithms"). Every algorithm is first compared with one GPU in float32.
"""

import argparse
import json
import os
import sys
import time
from datetime import date
from statistics import median

import numpy as np
import torch
import torch.distributed as dist

from toolkit.kernels.gpu import attention
from toolkit.runtime import gpu, shard
from toolkit.sequence_parallel import lasp2, ring_attention, token_ring, ulysses

KB, MB = 2**10, 2**20
HEAD_DIM = 128
ALGORITHMS = {  # name -> (program, options)
    "ring": (ring_attention.attention, {}),
    "bidirectional ring": (ring_attention.bidirectional_attention, {}),
    "zigzag ring": (ring_attention.attention, {"causal": True, "layout": "zigzag"}),
    "TokenRing": (token_ring.attention, {}),
    "TokenRing zigzag": (token_ring.attention, {"causal": True, "layout": "zigzag"}),
    "Ulysses": (ulysses.attention, {}),
    "Ulysses causal": (ulysses.attention, {"causal": True}),
    "LASP-2": (lasp2.attention, {"causal": True}),
}


def timed(call, repetitions=12, warm=3):
    """{median, min, max} seconds of call(), by CUDA events on this rank; all ranks start together."""
    times = []
    for turn in range(warm + repetitions):
        dist.barrier()
        torch.cuda.synchronize()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        torch.cuda.synchronize()
        if turn >= warm:
            times.append(before.elapsed_time(after) * 1e-3)
    return {"median": median(times), "min": min(times), "max": max(times)}


def rows(column, sizes, make):
    """One row a size; make(size) returns the call to time."""
    return [{column: size, **timed(make(size))} for size in sizes]


def half(count):
    return torch.randn(count // 2, device="cuda").to(torch.float16)


def micro(cluster):
    """The row sets of toolkit/runtime/measurements.py."""
    rank, size = cluster.rank, cluster.size
    after, before = (rank + 1) % size, (rank - 1) % size

    def gemm(n):
        a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        return lambda: a @ b

    def copy(n):
        source, target = half(n), half(n)
        return lambda: target.copy_(source)

    def shift(n):
        out, into = half(n), half(n)
        operations = [dist.P2POp(dist.isend, out, after), dist.P2POp(dist.irecv, into, before)]
        return lambda: [work.wait() for work in dist.batch_isend_irecv(operations)]

    def one_way(n):
        x = half(n)
        operation = [dist.P2POp(dist.isend, x, 1)] if rank == 0 else [dist.P2POp(dist.irecv, x, 0)] if rank == 1 else []
        return lambda: [work.wait() for work in dist.batch_isend_irecv(operation)] if operation else None

    def all_reduce(n):
        x = torch.zeros(n // 2, device="cuda", dtype=torch.float16)
        return lambda: dist.all_reduce(x)

    def all_gather(n):
        x, out = half(n), half(n * size)
        return lambda: dist.all_gather_into_tensor(out, x)

    def reduce_scatter(n):
        x, out = half(n), half(n // size)
        return lambda: dist.reduce_scatter_tensor(out, x)

    def all_to_all(n):
        x, out = half(n), half(n)
        return lambda: dist.all_to_all_single(out, x)

    messages = [KB * 4**k for k in range(10)]
    collectives = [4 * KB * 4**k for k in range(9)]
    column = "bytes_per_rank_input"
    return {
        "gemm_bf16": rows("n", [512, 1024, 2048, 4096, 8192], gemm),
        "copy": rows("bytes", [MB, 16 * MB, 256 * MB, 1024 * MB], copy),
        "flash_fwd": [flash(heads, n, causal) for heads in (32, 8) for causal in (False, True)
                      for n in (1024, 2048, 4096, 8192, 16384, 32768)],
        "p2p_ring_shift": rows("bytes", messages, shift),
        "p2p_one_way": rows("bytes", messages, one_way),
        "all_reduce": rows(column, collectives, all_reduce),
        "all_gather": rows(column, collectives, all_gather),
        "reduce_scatter": rows(column, collectives, reduce_scatter),
        "all_to_all": rows(column, collectives, all_to_all),
    }  # fmt: skip


def flash(heads, n, causal):
    q, k, v = (torch.randn(heads, n, HEAD_DIM, device="cuda").to(torch.float16) for _ in range(3))
    return {"heads": heads, "n": n, "d": HEAD_DIM, "causal": causal, **timed(lambda: attention(q, k, v, causal, True))}


def arrays(tokens, heads, kv_heads, layout, dtype=np.float16):
    """Shards of q, k and v; 4 096 random tokens over and over, since drawing a million takes minutes."""
    rng, some = np.random.default_rng(0), min(tokens, 4096)
    drawn = [rng.standard_normal((h, some, HEAD_DIM), np.float32).astype(dtype) for h in (heads, kv_heads, kv_heads)]
    return [shard(np.tile(a, (1, tokens // some, 1)), 1, layout) for a in drawn]


def algorithm(cluster, name, tokens, heads, kv_heads, repetitions=9, warm=3):
    """Medians over the repetitions of the slowest rank: step, kernels, exposed."""
    program, options = ALGORITHMS[name]
    shards = arrays(tokens, heads, kv_heads, options.get("layout", "contiguous"))
    steps, kernels, once = [], [], cluster.prepare(program, shards, options)
    for turn in range(warm + repetitions):
        machine, _ = once()
        mine = torch.tensor([machine.makespan, sum(machine.kernel_seconds())], device=cluster.place)
        everyone = [torch.empty_like(mine) for _ in range(cluster.size)]
        dist.all_gather(everyone, mine)
        step, busy = torch.stack(everyone).max(0).values.tolist()
        if turn >= warm:
            steps.append(step)
            kernels.append(busy)
    return {
        "algorithm": name, "tokens": tokens, "heads": heads, "kv_heads": kv_heads, "head_dim": HEAD_DIM,
        "dtype": "float16", "median": median(steps), "min": min(steps), "max": max(steps),
        "kernels": median(kernels), "exposed": median(s - k for s, k in zip(steps, kernels, strict=True)),
    }  # fmt: skip


def errors(cluster, tokens):
    """Largest difference to one GPU in float32, by algorithm, for inputs in float16."""
    found = {}
    for name, (program, options) in ALGORITHMS.items():
        layout = options.get("layout", "contiguous")
        shards = arrays(tokens, 8, 8, layout)
        run = cluster.run(program, *shards, **options)
        if run and name != "LASP-2":
            q, k, v = (torch.from_numpy(s.array).to(cluster.place).float() for s in shards)
            scores = q @ k.swapaxes(1, 2) / HEAD_DIM**0.5
            if options.get("causal"):
                scores = scores.masked_fill(~torch.ones(scores.shape[1:], device=q.device).tril().bool(), -torch.inf)
            want = torch.softmax(scores, -1) @ v
            found[name] = float(np.abs(run.gather(1, layout) - want.cpu().numpy()).max())
    return found


def overlap(cluster, name, tokens, heads=32):
    """From the profiler: seconds of NCCL's kernels, and how many of them pass while another kernel runs."""
    from torch.profiler import ProfilerActivity, profile

    program, options = ALGORITHMS[name]
    shards = arrays(tokens, heads, heads, options.get("layout", "contiguous"))
    once = cluster.prepare(program, shards, options)
    for _ in range(3):
        once()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        once()
    spans = {True: [], False: []}
    for event in profiler.events():
        if event.device_type.name == "CUDA" and not event.name.startswith(("Memcpy", "Memset")):
            spans["nccl" in event.name.lower()].append((event.time_range.start, event.time_range.end))
    moving = sum(end - start for start, end in spans[True])
    both = sum(max(0, min(a, b) - max(s, t)) for s, a in spans[True] for t, b in spans[False])
    return {"algorithm": name, "tokens": tokens, "nccl_seconds": moving * 1e-6, "hidden_seconds": both * 1e-6}


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--environment", default="default")
    options.add_argument("--out", required=True)
    options.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536])
    options.add_argument("--skip-micro", action="store_true")
    options = options.parse_args()
    cluster, began = gpu.Cluster(), time.monotonic()
    result = {
        "gpu": torch.cuda.get_device_name() if cluster.cuda else "CPU",
        "world": cluster.size,
        "environment": options.environment,
        "command": " ".join(["torchrun", f"--nproc-per-node {cluster.size}", *sys.argv]),
        "variables": {name: value for name, value in os.environ.items() if name.startswith("NCCL_")},
        "torch": torch.__version__,
        "nccl": str(torch.cuda.nccl.version()) if cluster.cuda else "",
        "date": date.today().isoformat(),
        "units": "seconds, CUDA events on the slowest rank; median, min, max of 9 to 12 runs after 3 to warm up",
    }
    result["errors"] = errors(cluster, 512)
    if not options.skip_micro:
        result["micro"] = micro(cluster)
    result["algorithms"] = []
    for tokens in options.tokens:
        for kv_heads in (32, 8):
            for name in ALGORITHMS:
                result["algorithms"].append(algorithm(cluster, name, tokens, 32, kv_heads if name != "LASP-2" else 32))
        if cluster.rank == 0:
            print(f"{options.environment}: {tokens:,} tokens, {time.monotonic() - began:.0f} s", flush=True)
    if cluster.cuda:
        shown = ("ring", "zigzag ring", "TokenRing", "Ulysses", "LASP-2")
        result["overlap"] = [overlap(cluster, name, options.tokens[-1]) for name in shown]
    if cluster.rank == 0:
        with open(options.out, "w", encoding="utf-8") as out:
            json.dump(result, out, indent=1)


if __name__ == "__main__":
    main()
