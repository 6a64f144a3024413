"""Measure real GPUs: kernels, messages and collectives to calibrate with, and whole algorithms to be predicted.

    torchrun --nproc-per-node 2 benchmarks/gpus.py --environment "NVLink" --out nvlink.json
    NCCL_P2P_DISABLE=1 torchrun …                         messages through host memory
    NCCL_MAX_NCHANNELS=1 torchrun …                       one channel
    torchrun … --launch eager                             kernels and messages launched one by one from Python
    NCCL_ALGO=Ring torchrun … --parts all_reduce          the all-reduce alone, 1 KB to 256 MB, by rings

The file has the rows that `python -m toolkit calibrate` fits ("micro"), what a kernel and a message lose beside each
other ("beside"), and for each algorithm, forward and forward with backward, its step time, the seconds of its kernels,
and what is left: communication that nothing hid ("algorithms"). All by CUDA events, of the slowest rank, from CUDA
graphs unless --launch eager. "errors" compares every algorithm with one GPU in float32.
What the virtual machine says of the same rows: benchmarks/predict.py.
"""

import argparse
import os
import shlex
import sys
import time
from datetime import date
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.distributed as dist
from gpu_micro import Clock, all_reduce, beside, micro

from toolkit.runtime import gpu, shard
from toolkit.sequence_parallel import _real_machines as book
from toolkit.sequence_parallel._real_machines import HEAD_DIM, program, shapes

TOKENS = [4096, 8192, 16384, 32768, 65536]
PARTS = ["errors", "micro", "beside", "algorithms", "overlap", "all_reduce"]


@cache
def drawn(number, heads, tokens, width, layout):
    """Shards of random float16; 4 096 tokens over and over, since drawing a million takes minutes."""
    some = min(tokens, 4096)
    block = np.random.default_rng(number).standard_normal((heads, some, width), np.float32).astype(np.float16)
    return shard(np.tile(block, (1, tokens // some, 1)), 1, layout)


def inputs(row, layout):
    return [drawn(number, *shape, layout) for number, shape in enumerate(shapes(row))]


def algorithm(cluster, graph, row, warm=2):
    """The row with medians over the repetitions of the slowest rank: step, kernels, exposed; rank 0's by kernel."""
    call, options, layout = program(row, cluster.size)
    repetitions = 9 if row["tokens"] < 32768 else 5
    steps, kernels, named, once = [], [], [], cluster.prepare(call, inputs(row, layout), options, graph)
    for turn in range(warm + repetitions):
        machine, _ = once()
        mine = torch.tensor([machine.makespan, machine.busy_seconds()], device=cluster.place)
        everyone = [torch.empty_like(mine) for _ in range(cluster.size)]
        dist.all_gather(everyone, mine)
        step, busy = torch.stack(everyone).max(0).values.tolist()
        if turn >= warm:
            steps.append(step)
            kernels.append(busy)
            named.append(machine.kernel_seconds())
    return {
        **row, "median": median(steps), "min": min(steps), "max": max(steps),
        "kernels": median(kernels), "exposed": median(s - k for s, k in zip(steps, kernels, strict=True)),
        "by_kernel": {name: median(run[name] for run in named) for name in named[0]},
    }  # fmt: skip


def errors(cluster, tokens):
    """Difference to one GPU in float32, by algorithm, for inputs in float16: of the result, of gradients.

    The largest difference, as a share of the largest number.
    """
    found = {}
    for name, backward in book.TASKS:
        asked = book.row(name, tokens, 8, backward, heads=8)
        call, options, layout = program(asked, cluster.size)
        shards = inputs(asked, layout)
        run = cluster.run(call, *shards, **options)
        if run:
            ours = run.gather(1, layout)
            arrays = [torch.from_numpy(s.array).to(cluster.place).float() for s in shards]
            want = [linear_attention(*arrays)] if name == "LASP-2" else dense(arrays, options)
            pairs = zip(ours if backward else [ours], want, strict=True)
            found[name + " backward" * backward] = max(
                float(np.abs(a - b.cpu().numpy()).max() / b.abs().max()) for a, b in pairs
            )
    return found


def linear_attention(q, k, v):
    return (q @ k.swapaxes(1, 2)).tril() @ v


def dense(arrays, options):
    """[out], or with a gradient among the arrays [dq, dk, dv], by autograd."""
    q, k, v = (a.requires_grad_() for a in arrays[:3])
    scores = q @ k.swapaxes(1, 2) / HEAD_DIM**0.5
    if options.get("causal"):
        scores = scores.masked_fill(~torch.ones(scores.shape[1:], device=q.device).tril().bool(), -torch.inf)
    out = torch.softmax(scores, -1) @ v
    return [out.detach()] if len(arrays) == 3 else torch.autograd.grad(out, (q, k, v), arrays[3])


def overlap(cluster, graph, name, tokens, backward=False):
    """From the profiler: seconds of NCCL's messages, and how many of them pass while a kernel runs."""
    from torch.profiler import ProfilerActivity, profile

    asked = book.row(name, tokens, 32, backward)
    call, options, layout = program(asked, cluster.size)
    once = cluster.prepare(call, inputs(asked, layout), options, graph)
    for _ in range(3):
        once()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        once()
    messages, kernels = [], []
    for event in profiler.events():
        if event.device_type.name == "CUDA" and not event.name.startswith(("Memcpy", "Memset")):
            span = event.time_range.start, event.time_range.end
            if "SendRecv" in event.name:
                messages.append(span)
            elif "nccl" not in event.name.lower():
                kernels.append(span)
    moving = sum(end - start for start, end in messages)
    both = sum(max(0, min(a, b) - max(s, t)) for s, a in messages for t, b in kernels)
    return {**asked, "nccl_seconds": moving * 1e-6, "hidden_seconds": both * 1e-6}


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--environment", default="default")
    options.add_argument("--out", required=True)
    options.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    options.add_argument("--parts", nargs="+", default=PARTS[:5], choices=PARTS)
    options.add_argument("--launch", default="graph", choices=["graph", "eager"])
    options = options.parse_args()
    cluster, began = gpu.Cluster(), time.monotonic()
    result = {
        "gpu": torch.cuda.get_device_name() if cluster.cuda else "CPU",
        "world": cluster.size,
        "environment": options.environment,
        "command": command(cluster.size),
        "variables": {name: value for name, value in os.environ.items() if name.startswith("NCCL_")},
        "torch": torch.__version__,
        "nccl": str(torch.cuda.nccl.version()) if cluster.cuda else "",
        "date": date.today().isoformat(),
        "launch": options.launch,
        "units": "seconds, CUDA events on the slowest rank; median, min, max of 5 to 12 runs after 2 or 3 to warm up",
    }
    for part in options.parts:
        result[part] = measure(cluster, part, options.tokens, options.launch == "graph")
        if cluster.rank == 0:
            print(f"{options.environment}: {part}, {time.monotonic() - began:.0f} s", flush=True)
            book.save(result, options.out)  # what there is, should the next part fail


def command(world):
    """How to run this again; the file without its folder, which may be this machine's own."""
    words = [Path(word).name if before == "--out" else word for before, word in pairwise(sys.argv)]
    return shlex.join(["torchrun", "--nproc-per-node", str(world), sys.argv[0], *words])


def measure(cluster, part, tokens, graph):
    clock = Clock(cluster, graph)
    if part == "errors":
        return errors(cluster, 2048)
    if part == "micro":
        return micro(cluster, clock)
    if part == "beside":
        return beside(cluster, clock)
    if part == "algorithms":
        return [algorithm(cluster, graph, asked) for asked in book.rows(tokens)]
    if part == "overlap":
        shown = ("ring", "zigzag ring", "TokenRing", "TokenRing zigzag", "Ulysses", "LASP-2")
        return [overlap(cluster, graph, name, n) for n in sorted({*tokens[:1], *tokens[-1:]}) for name in shown]
    return clock.rows("bytes_per_rank_input", book.ALL_REDUCE, all_reduce)


if __name__ == "__main__":
    main()
