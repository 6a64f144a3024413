"""What the tests draw: events written by hand, and a ring whose kernels cost time and compute nothing."""

from types import SimpleNamespace

import numpy as np

from toolkit.runtime import Cost, Event, kernel, like


def fake_run(events, size, makespan, waited):
    """What the drawing functions ask of a run, from events written by hand."""
    memory = {rank: (np.array([0.0, makespan / 2]), np.array([1e6 * (rank + 1), 5e5])) for rank in range(size)}
    return SimpleNamespace(
        trace=sorted(events, key=lambda e: (e.start, e.rank, e.stream)),
        makespan=makespan,
        cluster=SimpleNamespace(size=size),
        exposed=lambda: waited,
        memory=lambda rank: memory[rank],
        peak_memory=[int(memory[rank][1].max()) for rank in range(size)],
    )


def computes(rank, name, start, end, stream="compute"):
    return Event(rank, stream, "compute", name, start, end, 4000, 8000.0, -1, start)


def message(source, dest, name, start, end, nbytes, sent, received, lane=""):
    """Both events of a message; `sent` and `received` say when each side posted."""
    send = Event(source, f"{name} send{lane}", "send", name, start, end, nbytes, 0.0, dest, sent)
    return [send, Event(dest, f"{name} recv{lane}", "recv", name, start, end, nbytes, 0.0, source, received)]


def waits(rank, name, start, end):
    return Event(rank, "wait", "wait", name, start, end, 0, 0.0, -1, start)


@kernel(cost=lambda q, k: Cost(4 * q.size * k.shape[1], q.nbytes + k.nbytes), out=lambda q, k: like(q))
def block(q, k):
    return q


@kernel(cost=lambda a, b: Cost(3 * a.size, 3 * a.nbytes), out=lambda a, b: like(a))
def merge(a, b):
    return a


def ring(comm, q, k):
    """The communication of ring attention, with kernels of the right cost and no numerics."""
    acc = None
    for step in range(comm.size):
        passing = comm.ishift((k, k), by=1, tag="kv") if step < comm.size - 1 else None
        part = block(q, k)
        acc = part if acc is None else merge(acc, part)
        if passing:
            k, _ = passing.wait()
    return acc
