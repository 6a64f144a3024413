"""Micro-benchmarks of real GPUs for gpus.py: kernels, messages, collectives, a kernel beside a message."""

from statistics import median

import torch
import torch.distributed as dist

from toolkit.kernels.gpu import attention, attention_backward
from toolkit.runtime.gpu_machine import event, head_start
from toolkit.sequence_parallel import _lasp2_kernels as linear
from toolkit.sequence_parallel._real_machines import CHUNK, HEAD_DIM

KB, MB = 2**10, 2**20


class Clock:
    """Times calls by CUDA events on this rank; all ranks start together."""

    def __init__(self, cluster, graph):
        self.cluster, self.graph = cluster, graph

    def timed(self, call, repetitions=12, warm=3):
        """{median, min, max} seconds of call()."""
        return self.spans(lambda mark: (mark(), call(), mark()), repetitions, warm)[0]

    def spans(self, call, repetitions=12, warm=3):
        """{median, min, max} of the seconds from the first mark to each later one; call(mark) sets them."""

        def enqueue():
            self.cluster.align()
            marks = []
            call(lambda: marks.append(event()))
            return marks

        enqueue, times = self.cluster.recorded(enqueue) if self.graph else enqueue, []
        for turn in range(warm + repetitions):
            dist.barrier()
            first, *later = enqueue()
            torch.cuda.synchronize()
            if turn >= warm:
                times.append([first.elapsed_time(one) * 1e-3 for one in later])
        return [{"median": median(t), "min": min(t), "max": max(t)} for t in zip(*times, strict=True)]

    def rows(self, column, sizes, make):
        """One row a size; make(size) returns the call to time."""
        return [{column: size, **self.timed(make(size))} for size in sizes]


def half(*shape):
    return torch.randn(*shape, device="cuda").to(torch.float16)


def neighbours(cluster):
    return (cluster.rank + 1) % cluster.size, (cluster.rank - 1) % cluster.size


def shifting(cluster, n):
    """A call that begins a shift of n bytes and returns what to wait for."""
    (after, before), out, into = neighbours(cluster), half(n // 2), half(n // 2)
    operations = [dist.P2POp(dist.isend, out, after), dist.P2POp(dist.irecv, into, before)]
    return lambda: dist.batch_isend_irecv(operations)


def micro(cluster, clock):
    """The row sets of toolkit/runtime/measurements.py."""
    rank, size, rows = cluster.rank, cluster.size, clock.rows

    def gemm(n):
        a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        return lambda: a @ b

    def copy(n):
        source, target = half(n // 2), half(n // 2)
        return lambda: target.copy_(source)

    def shift(n):
        begin = shifting(cluster, n)
        return lambda: [work.wait() for work in begin()]

    def one_way(n):
        x = half(n // 2)
        operation = [dist.P2POp(dist.isend, x, 1)] if rank == 0 else [dist.P2POp(dist.irecv, x, 0)] if rank == 1 else []
        return lambda: [work.wait() for work in dist.batch_isend_irecv(operation)] if operation else None

    def all_gather(n):
        x, out = half(n // 2), half(n // 2 * size)
        return lambda: dist.all_gather_into_tensor(out, x)

    def reduce_scatter(n):
        x, out = half(n // 2), half(n // 2 // size)
        return lambda: dist.reduce_scatter_tensor(out, x)

    def all_to_all(n):
        x, out = half(n // 2), half(n // 2)
        return lambda: dist.all_to_all_single(out, x)

    messages = [KB * 4**k for k in range(10)]
    collectives = [4 * KB * 4**k for k in range(9)]
    column = "bytes_per_rank_input"
    return {
        "gemm_bf16": rows("n", [512, 1024, 2048, 4096, 8192], gemm),
        "copy": rows("bytes", [MB, 16 * MB, 256 * MB, 1024 * MB], copy),
        "flash_fwd": [flash(clock, heads, n, causal) for heads in (32, 8) for causal in (False, True)
                      for n in (1024, 2048, 4096, 8192, 16384, 32768)],
        "flash_fwd_bwd": [flash(clock, 32, n, causal, backward=True) for causal in (False, True)
                          for n in (1024, 2048, 4096, 8192, 16384)],
        "linear_fwd": [linear_fwd(clock, 32, n) for n in (1024, 2048, 4096, 8192, 16384, 32768)],
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


def flash(clock, heads, n, causal, backward=False):
    q, k, v, grad = (half(heads, n, HEAD_DIM) for _ in range(4))

    def call():
        out, lse = attention(q, k, v, causal, True)
        if backward:
            attention_backward(q, k, v, out, lse, grad, causal)

    return {"heads": heads, "n": n, "d": HEAD_DIM, "causal": causal, **clock.timed(call)}


def linear_fwd(clock, heads, n):
    q, k, v = (half(heads, n, HEAD_DIM) for _ in range(3))
    states = linear.chunk_states(k, v, n // CHUNK)
    size = {"heads": heads, "n": n, "d": HEAD_DIM, "chunk": CHUNK}
    return {**size, **clock.timed(lambda: linear.inside(q, k, v, states))}


def beside(cluster, clock):
    """What attention and a shift take alone, and beside each other from the same start; the shift outlasts or not."""
    return [_beside(cluster, clock, *size) for size in ((4096, 1024 * MB), (8192, 256 * MB), (8192, 64 * MB))]


def _beside(cluster, clock, n, nbytes):
    begin, q, k, v = shifting(cluster, nbytes), *(half(32, n, HEAD_DIM) for _ in range(3))
    other = torch.cuda.Stream()

    def both(mark):
        mark()
        works = begin()
        head_start()
        attention(q, k, v)
        mark()
        with torch.cuda.stream(other):  # marks the end of the message, which the kernel need not wait for
            for work in works:
                work.wait()
            mark()
        torch.cuda.current_stream().wait_stream(other)

    kernel, message = clock.timed(lambda: attention(q, k, v)), clock.timed(lambda: [w.wait() for w in begin()])
    kernel_beside, message_beside = clock.spans(both)
    return {
        "heads": 32, "n": n, "d": HEAD_DIM, "bytes": nbytes, "kernel": kernel, "kernel_beside": kernel_beside,
        "message": message, "message_beside": message_beside,
    }  # fmt: skip
