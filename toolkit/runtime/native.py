"""MPI's own collectives behind the names of ours: `algorithm="native"`, the default on real processes.

A native collective must be entered by all processes in one order. So it serves blocking calls on all ranks; parts of
the ranks, and the `i…` forms that run beside the program, take the first textbook algorithm.
"""

import pickle

import numpy as np
from greenlet import getcurrent

from .algorithms import CHOICES

OPERATIONS = {"sum": "SUM", "max": "MAX", "min": "MIN", "prod": "PROD"}


def algorithms(world):
    """CHOICES with "native" before the others."""
    natives = {
        "broadcast": _broadcast,
        "reduce": _reduce,
        "all_gather": _all_gather,
        "reduce_scatter": _reduce_scatter,
        "all_reduce": _all_reduce,
        "all_to_all": _all_to_all,
        "barrier": _barrier,
    }
    found = {name: dict(ours) for name, ours in CHOICES.items()}
    for name, theirs in natives.items():
        found[name] = {"native": _choosing(theirs, next(iter(CHOICES[name].values())), world), **CHOICES[name]}
    return found


def _choosing(theirs, ours, world):
    everybody = tuple(range(world.size))

    def go(comm, x, **options):
        together = comm.ranks == everybody and getcurrent() is comm._processor.main
        return theirs(world, comm, x, **options) if together else ours(comm, x, **options)

    return go


def _await(comm, request):
    """Let messages move while MPI's collective does."""
    while not request.Test():
        comm._machine.engine.poll("a collective of MPI")


def _operation(op):
    from mpi4py import MPI

    return getattr(MPI, OPERATIONS[op])


def _broadcast(world, comm, x, root):
    form = np.zeros(1, np.int64)
    blob = pack((x.shape, x.dtype.str)) if comm.rank == root else None
    if blob is not None:
        form[0] = len(blob)
    _await(comm, world.Ibcast(form, root))
    blob = np.empty(form[0], np.uint8) if blob is None else blob
    _await(comm, world.Ibcast(blob, root))
    if comm.rank != root:
        x = np.empty(*unpack(blob))
    whole = np.ascontiguousarray(x)
    _await(comm, world.Ibcast(_bytes(whole), root))
    return x


def _reduce(world, comm, x, root, op):
    out = np.empty(x.shape, x.dtype) if comm.rank == root else None
    _await(comm, world.Ireduce(np.ascontiguousarray(x), out, _operation(op), root))
    return out


def _all_gather(world, comm, x):
    shapes = np.empty((comm.size, x.ndim), np.int64)
    _await(comm, world.Iallgather(np.array(x.shape, np.int64), shapes))
    sizes = shapes.prod(axis=1)
    joined = np.empty(sizes.sum() * x.itemsize, np.uint8)
    _await(comm, world.Iallgatherv(_bytes(np.ascontiguousarray(x)), [joined, sizes * x.itemsize]))
    parts = np.split(joined.view(x.dtype), np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _reduce_scatter(world, comm, parts, op):
    flat = np.concatenate([part.reshape(-1) for part in parts])
    out = np.empty(parts[comm.rank].shape, flat.dtype)
    _await(comm, world.Ireduce_scatter(flat, out, [part.size for part in parts], _operation(op)))
    return out


def _all_reduce(world, comm, x, op):
    out = np.empty(x.shape, x.dtype)
    _await(comm, world.Iallreduce(np.ascontiguousarray(x), out, _operation(op)))
    return out


def _all_to_all(world, comm, parts):
    forms = _exchange(world, comm, [pack((part.shape, part.dtype.str)) for part in parts])
    whole = _exchange(world, comm, [_bytes(np.ascontiguousarray(part)) for part in parts])
    return [data.view(dtype).reshape(shape) for data, (shape, dtype) in zip(whole, map(unpack, forms), strict=True)]


def _exchange(world, comm, parts):
    """All-to-all of runs of bytes whose lengths only their senders know."""
    sizes = np.array([part.size for part in parts])
    theirs = np.empty_like(sizes)
    _await(comm, world.Ialltoall(sizes, theirs))
    joined = np.empty(theirs.sum(), np.uint8)
    _await(comm, world.Ialltoallv([np.concatenate(parts), sizes], [joined, theirs]))
    return np.split(joined, np.cumsum(theirs)[:-1])


def _barrier(world, comm, _):
    _await(comm, world.Ibarrier())


def _bytes(array):
    return array.reshape(-1).view(np.uint8)


def pack(value):
    """Any value as an array of bytes."""
    return np.frombuffer(pickle.dumps(value), np.uint8).copy()


def unpack(array):
    return pickle.loads(array.tobytes())
