"""Programs that real processes and the virtual machine both run, with equal results.

    mpiexec -n 4 python tests/runtime/real_programs.py mpi FILE                  runs them; rank 0 writes the outputs
    torchrun --nproc-per-node 2 tests/runtime/real_programs.py gpu FILE          the same on torch tensors
"""

import pickle
import sys
from functools import partial
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[1]))  # where `runtime` is, when this file runs as a script

from runtime import book_programs
from toolkit.runtime import Cluster, hardware, shard, topology, wait_all, wait_any
from toolkit.runtime.algorithms import CHOICES
from toolkit.sequence_parallel import ring_attention, token_ring

SHORT = "float32"  # "float16" on GPUs, whose flash kernel takes no other
TOKENS = 48  # divides into 2 · 4 zigzag chunks of 1, 2, 3 and 4 ranks


def numbers(*shape, seed=0, dtype="float64"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def attend(program, causal=False, layout="contiguous", dtype=None, **options):
    q, k, v = (shard(numbers(h, TOKENS, 8, seed=h, dtype=dtype or SHORT), 1, layout) for h in (4, 2, 2))
    return program, (q, k, v), {"causal": causal, "layout": layout, **options}


def forward_and_back(comm, q, k, v, grad_out, *, system, **options):
    out, lse = system.attention(comm, q, k, v, return_lse=True, **options)
    return out, lse, system.attention_backward(comm, q, k, v, out, lse, grad_out, **options)


def train(system, layout, causal):
    program, shards, options = attend(partial(forward_and_back, system=system), causal, layout)
    return program, (*shards, shard(numbers(4, TOKENS, 8, seed=9, dtype=SHORT), 1, layout)), options


def collective(comm, x, *, name, algorithm):
    rank, size = comm.rank, comm.size
    x = x + rank
    if name in ("broadcast", "reduce"):
        return getattr(comm, name)(x, root=size - 1, algorithm=algorithm)
    if name == "scatter":
        return comm.scatter([x[: r + 1] for r in range(size)] if rank == 0 else None, algorithm=algorithm)
    if name in ("gather", "all_gather"):
        return getattr(comm, name)(x[: rank + 1], algorithm=algorithm)
    if name in ("reduce_scatter", "all_to_all"):
        return getattr(comm, name)([x[: r + 1] for r in range(size)], algorithm=algorithm)
    if name == "barrier":
        return comm.barrier(algorithm=algorithm)
    return comm.all_reduce(x, algorithm=algorithm)


def channels(comm, x):
    """Two logical channels to one peer, waited for in the wrong order; nested tuples; an empty message."""
    size, rank = comm.size, comm.rank
    after, before = (rank + 1) % size, (rank - 1) % size
    sent = [comm.isend((x, (x[:2], x[2:, :1])), after, "a"), comm.isend(x * 2, after, "b"), comm.isend((), after, 7)]
    b, a, nothing = comm.irecv(before, "b"), comm.irecv(before, "a"), comm.irecv(before, 7)
    got = b.wait(), a.wait(), nothing.wait()
    wait_all(sent)
    return got


def in_order(comm, x):
    """Messages of one channel match in the order of posting."""
    sent = [comm.isend(x + i, (comm.rank + 1) % comm.size) for i in range(5)]
    received = [comm.irecv((comm.rank - 1) % comm.size) for _ in range(5)]
    values = [request.wait() for request in received[::-1]][::-1]
    wait_all(sent)
    return tuple(values)


def from_anyone(comm, x):
    if comm.rank:
        return comm.send(x * comm.rank, 0)
    return sum((comm.recv() for _ in range(1, comm.size)), start=x)


def on_the_wire(comm, x):
    return comm.ishift((x, x), by=1, wire=("float16", None)).wait()


def beside(comm, x):
    """A sub-task, a stream and a collective under way while the program goes on."""
    task = comm.spawn(lambda: comm.ishift(x, by=1, tag="task").wait() + 1)
    total = comm.iall_reduce(x)
    with comm.stream("copy") as copy:
        comm.isend(x, (comm.rank + 1) % comm.size, "stream")
    received = comm.recv((comm.rank - 1) % comm.size, "stream")
    copy.wait()
    return task.wait(), total.wait(), received


def polling(comm, x):
    request = comm.ishift(x, by=1)
    while not request.test():
        pass
    index, value = wait_any([comm.ishift(x, by=-1, tag=1)])
    return request.wait(), value + index


def rows_and_columns(comm, x):
    row = comm.split(comm.rank // 2, key=-comm.rank)
    odd = comm.group(range(comm.rank % 2, comm.size, 2))
    return row.all_gather(x + comm.rank), odd.all_reduce(x * comm.rank)


def programs(size):
    """{name: (program, args, options)}"""
    x = (numbers(6, 3),)
    found = {
        "ring": attend(ring_attention.attention),
        "ring, zigzag": attend(ring_attention.attention, True, "zigzag"),
        "ring, striped": attend(ring_attention.attention, True, "striped", "float64"),
        "ring, contiguous causal": attend(ring_attention.attention, True),
        "bidirectional": attend(ring_attention.bidirectional_attention),
        "all-gather": attend(ring_attention.all_gather_attention),
        "TokenRing": attend(token_ring.attention),
        "TokenRing, float16 wire": attend(token_ring.attention, wire_dtype="float16"),
        "TokenRing, zigzag": attend(token_ring.attention, True, "zigzag"),
        "TokenRing, hybrid": attend(token_ring.hybrid_attention, nodes=2 if size % 2 == 0 else 1),
        "ring, backward": train(ring_attention, "contiguous", False),
        "ring, zigzag backward": train(ring_attention, "zigzag", True),
        "TokenRing, backward": train(token_ring, "contiguous", False),
        "TokenRing, zigzag backward": train(token_ring, "zigzag", True),
        "channels": (channels, x, {}),
        "order": (in_order, x, {}),
        "anyone": (from_anyone, x, {}),
        "wire": (on_the_wire, x, {}),
        "beside": (beside, x, {}),
        "polling": (polling, x, {}),
        "groups": (rows_and_columns, x, {}),
    }
    for name, algorithms in CHOICES.items():
        for algorithm in (None, *(a for a in algorithms if a != "hierarchical")):
            found[f"{name}, {algorithm}"] = collective, x, {"name": name, "algorithm": algorithm}
    return found | book_programs.programs(size)


def flat(value):
    """The arrays of a nested output, in order; None stays."""
    if isinstance(value, (tuple, list)):
        return [array for part in value for array in flat(part)]
    return [value]


def virtual(name, size):
    """Outputs of the virtual machine."""
    program, args, options = programs(size)[name]
    return Cluster(topology.full_mesh(size, hardware.NVLINK4)).run(program, *args, **options).outputs


# What torch tensors do not do: recv(ANY), float64.
NUMPY_ONLY = ("anyone", "ring, striped", *book_programs.programs(1))


def main(backend, file):
    global SHORT
    if backend == "mpi":
        from toolkit.runtime import mpi

        cluster = mpi.Cluster(debug=True)
    else:
        from toolkit.runtime import gpu

        cluster = gpu.Cluster()
        SHORT = "float16" if cluster.cuda else SHORT
    outputs = {}
    for name, (program, args, options) in programs(cluster.size).items():
        if backend == "gpu" and name in NUMPY_ONLY:
            continue
        run = cluster.run(program, *args, **options)
        if run:
            outputs[name] = run.outputs
    if outputs:
        with open(file, "wb") as out:
            pickle.dump(outputs, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
