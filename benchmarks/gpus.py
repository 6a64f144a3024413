"""Measure real GPUs: kernels, messages and collectives to calibrate with, and whole algorithms to be predicted.

    torchrun --nproc-per-node 2 benchmarks/gpus.py --environment "NVLink" --out nvlink.json
    NCCL_P2P_DISABLE=1 torchrun …                         messages through host memory
    NCCL_MAX_NCHANNELS=1 torchrun …                       one channel
    NCCL_ALGO=Ring torchrun … --parts all_reduce          the all-reduce alone, 1 KB to 256 MB, by rings

The file has the rows that `python -m toolkit calibrate` fits ("micro"), and for each algorithm, forward and forward
with backward, its step time, the seconds of its kernels, and what is left: communication that nothing hid. All by
CUDA events, of the slowest rank ("algorithms"). Every algorithm is first compared with one GPU in float32.
What the virtual machine says of the same rows: benchmarks/predict.py.
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

from toolkit.kernels.gpu import attention, attention_backward
from toolkit.runtime import gpu, shard
from toolkit.sequence_parallel import _real_machines as book
from toolkit.sequence_parallel._real_machines import program, shapes

KB, MB = 2**10, 2**20
HEAD_DIM, TOKENS = 128, [4096, 8192, 16384, 32768, 65536]
PARTS = ["errors", "micro", "algorithms", "overlap", "all_reduce"]


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
        "flash_fwd_bwd": [flash(32, n, causal, backward=True) for causal in (False, True)
                          for n in (1024, 2048, 4096, 8192, 16384)],
        "p2p_ring_shift": rows("bytes", messages, shift),
        "p2p_one_way": rows("bytes", messages, one_way),
        "all_reduce": rows(column, collectives, all_reduce),
        "all_gather": rows(column, collectives, all_gather),
        "reduce_scatter": rows(column, collectives, reduce_scatter),
        "all_to_all": rows(column, collectives, all_to_all),
    }  # fmt: skip


def all_reduce(n):
    x = torch.zeros(n // 2, device="cuda", dtype=torch.float16)
    return lambda: dist.all_reduce(x)


def flash(heads, n, causal, backward=False):
    q, k, v, grad = (torch.randn(heads, n, HEAD_DIM, device="cuda").to(torch.float16) for _ in range(4))

    def call():
        out, lse = attention(q, k, v, causal, True)
        if backward:
            attention_backward(q, k, v, out, lse, grad, causal)

    return {"heads": heads, "n": n, "d": HEAD_DIM, "causal": causal, **timed(call)}


def inputs(row, layout):
    """Shards of random float16; 4 096 tokens over and over, since drawing a million takes minutes."""
    rng, some, found = np.random.default_rng(0), min(row["tokens"], 4096), []
    for heads, tokens, width in shapes(row):
        drawn = rng.standard_normal((heads, some, width), np.float32).astype(np.float16)
        found.append(shard(np.tile(drawn, (1, tokens // some, 1)), 1, layout))
    return found


def algorithm(cluster, row, repetitions=9, warm=3):
    """The row with medians over the repetitions of the slowest rank: step, kernels, exposed."""
    call, options, layout = program(row)
    steps, kernels, once = [], [], cluster.prepare(call, inputs(row, layout), options)
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
        **row, "median": median(steps), "min": min(steps), "max": max(steps),
        "kernels": median(kernels), "exposed": median(s - k for s, k in zip(steps, kernels, strict=True)),
    }  # fmt: skip


def errors(cluster, tokens):
    """Largest difference to one GPU in float32, by algorithm, for inputs in float16: of the result, of gradients."""
    found = {}
    for name, backward in book.TASKS:
        if name == "LASP-2":  # not softmax
            continue
        asked = book.row(name, tokens, 8, backward, heads=8)
        call, options, layout = program(asked)
        shards = inputs(asked, layout)
        run = cluster.run(call, *shards, **options)
        if run:
            ours = run.gather(1, layout)
            want = dense([torch.from_numpy(s.array).to(cluster.place).float() for s in shards], options)
            pairs = zip(ours if backward else [ours], want, strict=True)
            found[name + " backward" * backward] = max(float(np.abs(a - b.cpu().numpy()).max()) for a, b in pairs)
    return found


def dense(arrays, options):
    """[out], or with a gradient among the arrays [dq, dk, dv], by autograd."""
    q, k, v = (a.requires_grad_() for a in arrays[:3])
    scores = q @ k.swapaxes(1, 2) / HEAD_DIM**0.5
    if options.get("causal"):
        scores = scores.masked_fill(~torch.ones(scores.shape[1:], device=q.device).tril().bool(), -torch.inf)
    out = torch.softmax(scores, -1) @ v
    return [out.detach()] if len(arrays) == 3 else torch.autograd.grad(out, (q, k, v), arrays[3])


def overlap(cluster, name, tokens):
    """From the profiler: seconds of NCCL's kernels, and how many of them pass while another kernel runs."""
    from torch.profiler import ProfilerActivity, profile

    asked = book.row(name, tokens, 32)
    call, options, layout = program(asked)
    once = cluster.prepare(call, inputs(asked, layout), options)
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
    options.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    options.add_argument("--parts", nargs="+", default=PARTS[:4], choices=PARTS)
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
    for part in options.parts:
        result[part] = measure(cluster, part, options.tokens)
        if cluster.rank == 0:
            print(f"{options.environment}: {part}, {time.monotonic() - began:.0f} s", flush=True)
            with open(options.out, "w", encoding="utf-8") as out:  # what there is, should the next part fail
                json.dump(result, out, indent=1)


def measure(cluster, part, tokens):
    if part == "errors":
        return errors(cluster, 512)
    if part == "micro":
        return micro(cluster)
    if part == "algorithms":
        return [algorithm(cluster, asked) for asked in book.rows(tokens)]
    if part == "overlap":
        shown = ("ring", "zigzag ring", "TokenRing", "Ulysses", "LASP-2")
        return [overlap(cluster, name, tokens[-1]) for name in shown]
    return rows("bytes_per_rank_input", book.ALL_REDUCE, all_reduce)


if __name__ == "__main__":
    main()
