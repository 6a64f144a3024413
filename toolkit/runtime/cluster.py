"""A cluster runs an SPMD program: the same function on every rank, each with its own communicator and shards."""

import gc
from collections.abc import Sequence
from contextlib import contextmanager
from functools import cached_property, partial

import numpy as np
from greenlet import getcurrent

from .arrays import copy_of, with_parts
from .communicator import Communicator
from .engine import Task
from .errors import RuntimeFault, ShapeError
from .faults import checked
from .faulty import FaultyMachine
from .hardware import H100, Device
from .layout import PerRank, Shard, assemble
from .machine import Machine
from .topology import Topology
from .trace import Trace
from .units import seconds


class Cluster:
    """Devices joined by a topology.

        cluster = Cluster(topology.full_mesh(8, hardware.NVLINK4), device=hardware.H100)
        run = cluster.run(program, shard(x, axis=1), causal=True)

    device   one hardware.Device for all ranks, or one per rank
    faults   what goes wrong and when: see toolkit.runtime.faults
    raises   ShapeError  another number of devices than ranks; InvalidFault
    """

    def __init__(self, topology: Topology, device: Device | Sequence[Device] = H100, faults: Sequence = ()):
        self.topology = topology
        self.size = len(topology.ranks)
        self.devices = [device] * self.size if isinstance(device, Device) else list(device)
        if len(self.devices) != self.size:
            raise ShapeError(f"{len(self.devices)} devices were given for the {self.size} ranks of {topology.name}")
        self.faults = checked(faults, topology)

    @property
    def device(self):
        """The device of rank 0."""
        return self.devices[0]

    def run(self, program, *args, **options):
        """Run `program(comm, *args, **options)` on every rank until all have returned.

        args, options   `shard(x, axis)` and `per_rank(values)` give each rank its own; every other array is copied to
                        each rank; everything else is handed over as it is
        returns         Run
        raises          whatever a rank raises, with a note naming the rank; DeadlockError; UnreceivedMessage
        """
        if isinstance(getcurrent(), Task):
            raise RuntimeFault("cluster.run was called inside a rank's program; call it from outside")
        parts = self.topology, self.devices
        machine = FaultyMachine(*parts, self.faults) if self.faults else Machine(*parts)
        outputs = [None] * self.size
        everyone, call = tuple(range(self.size)), caller(len(args), options)
        for processor in machine.processors:
            start(call, program, Communicator(processor, everyone), args, options, outputs)
        with _without_collector():
            machine.engine.run(machine.deadlock)
        machine.check_nothing_left()
        memories = [processor.memory for processor in machine.processors]
        return Run(self, outputs, machine.trace, machine.engine.now, memories)


@contextmanager
def _without_collector():
    """Python's cycle collector runs when it likes, which would free arrays at times that differ from run to run."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def own(value, rank, size):
    """What one rank gets of an argument."""
    if isinstance(value, (Shard, PerRank)):
        return value.of(rank, size)
    if isinstance(value, np.ndarray):
        return copy_of(value)
    if isinstance(value, tuple):
        return with_parts(value, (own(part, rank, size) for part in value))
    return value


def start(call, program, comm, args, options, outputs):
    """Give one rank its own arguments, and let its program begin."""
    mine = [own(value, comm.rank, comm.size) for value in reversed(args)]
    named = {name: own(value, comm.rank, comm.size) for name, value in options.items()}
    comm._processor.memory.track((mine, list(named.values())), "argument")
    comm._processor.main = comm._processor.spawn(partial(_run, call, program, comm, mine, named, outputs))


def _run(call, program, comm, positional, named, outputs):
    outputs[comm.rank] = call(program, comm, positional, named)


def caller(positional, named):
    """A function that calls `program(comm, *positional, **named)` with every argument spelled out and popped.

    The program's own frame then holds the only reference to its arrays: a rank that rebinds `k` frees the memory.
    A call f(*args) would keep the tuple alive.
    """
    words = ["comm", *("positional.pop()" for _ in range(positional)), *(f"{n}=named.pop({n!r})" for n in named)]
    return eval(f"lambda program, comm, positional, named: program({', '.join(words)})")


class Run:
    """What a program did: results, times, bytes, memory."""

    def __init__(self, cluster, outputs, trace, makespan, memories):
        self.cluster, self.outputs = cluster, outputs
        self.trace: Trace = trace
        self.makespan = makespan  # virtual seconds until the last rank returned
        self.peak_memory = [memory.peak for memory in memories]  # bytes per rank
        self._memory = memories

    def gather(self, axis=0, layout="contiguous"):
        """The ranks' outputs joined along `axis`: the inverse of `shard`. Tuples are joined part by part."""
        return assemble(self.outputs, axis, layout)

    def output(self, index):
        """Part `index` of every rank's output tuple, ready to be handed to another run."""
        return PerRank(tuple(output[index] for output in self.outputs))

    def memory(self, rank):
        """(times, live bytes) of one rank: a step function."""
        return self._memory[rank].history()

    @cached_property
    def traffic(self):
        """Bytes moved: `total`, `by_pair[source, dest]`, `by_link[u, v]`."""
        return Traffic(self.trace.messages, self.cluster)

    def exposed(self, rank=None):
        """Seconds in which a rank waits for messages and computes nothing; without `rank`, the longest of all ranks.

        Sub-tasks that wait at the same time count once.
        """
        tables = self.trace.waits[:, [0, 2, 3]], self.trace.kernels[:, [0, 3, 4]]
        waits, kernels = (_by_rank(table, self.cluster.size) for table in tables)
        ranks = range(self.cluster.size) if rank is None else [rank]
        return max(_alone(waits[r], kernels[r]) for r in ranks)

    def timeline(self, **options):
        """The picture of the run: one row a rank and stream."""
        from toolkit.show.timeline import timeline

        return timeline(self, **options)

    def save_perfetto(self, path):
        """Write the trace for ui.perfetto.dev (Chrome trace JSON), one track a rank and stream."""
        from toolkit.show.perfetto import save

        save(self, path)

    def __repr__(self):
        return f"Run of {self.cluster.size} ranks: {seconds(self.makespan)}, {len(self.trace)} events"


def _by_rank(table, size):
    """Rows of (rank, start, end) as one array of (start, end) for each rank."""
    table = table[np.argsort(table[:, 0], kind="stable")]
    return np.split(table[:, 1:], np.searchsorted(table[:, 0], np.arange(1, size)))


def _alone(spans, others):
    """Seconds that lie in at least one of `spans` and in none of `others`; rows of (start, end)."""
    times = np.concatenate([spans.ravel(), others.ravel()])
    opens, hides = np.zeros(len(times)), np.zeros(len(times))
    opens[: spans.size] = np.tile([1, -1], len(spans))
    hides[spans.size :] = np.tile([1, -1], len(others))
    order = np.argsort(times, kind="stable")
    open_now, hidden = np.cumsum(opens[order])[:-1] > 0, np.cumsum(hides[order])[:-1] > 0
    return float(np.diff(times[order])[open_now & ~hidden].sum())


class Traffic:
    """Payload bytes of all messages, each counted once."""

    def __init__(self, messages, cluster):
        source, dest, nbytes = messages[:, [0, 1, 3]].astype(np.int64).T
        self.total = int(nbytes.sum())
        self.by_pair = np.zeros((cluster.size, cluster.size), np.int64)
        np.add.at(self.by_pair, (source, dest), nbytes)
        self.by_link = {}
        ranks = cluster.topology.ranks
        for a, b in sorted(set(zip(source.tolist(), dest.tolist(), strict=True))):
            for edge, share in cluster.topology.carried(ranks[a], ranks[b]).items():
                self.by_link[edge] = self.by_link.get(edge, 0) + int(self.by_pair[a, b]) * share
        self.by_link = {edge: int(n) if n == int(n) else float(n) for edge, n in self.by_link.items()}

    def __repr__(self):
        return f"Traffic(total={self.total})"
