"""The same programs on real processes, with messages through MPI: `mpiexec -n 4 python program.py`.

    from toolkit.runtime import mpi
    run = mpi.Cluster().run(program, shard(q, axis=1), causal=True)      # in every process; rank 0 gets the Run

All that a machine must provide to a communicator is in `ProcessMachine`: protect what is sent, post a send, post a
receive, agree, meet. Tasks, streams, requests and the textbook collectives are the runtime's own. A message is a header
(for whom, which shapes and dtypes) and its arrays as they lie in memory; nobody has to know a shape beforehand.

Needs mpi4py and an MPI: pip install '.[mpi]'. Chapter: foundations/machine_in_a_notebook.
"""

import sys
import traceback
from math import inf
from time import perf_counter
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from . import native, topology
from .agreement import compare
from .algorithms import ring_all_gather
from .arrays import first_array, is_shape_only, leaves
from .cluster import Run, caller, start
from .communicator import Communicator
from .deadlock import deadlock_report
from .errors import DeadlockError, DtypeError, UnreceivedMessage
from .hardware import IDEAL, Link
from .machine import Machine, take
from .requests import site_text
from .trace import Trace
from .wall import SameEverywhere, WallEngine, WallProcessor

HEADER, ARRAYS = 0, 1  # MPI's tags; the arrays of one sender come in the order of their headers


class Cluster:
    """The processes that mpiexec started, one rank each.

    debug      compare what all ranks say before a collective runs: a mismatch is an error instead of a hang
    patience   seconds that a rank hears nothing until it ends the run with DeadlockError
    raises     ImportError  mpi4py or an MPI is not installed
    """

    def __init__(self, *, debug=False, patience=60.0):
        from mpi4py import MPI

        self.world, self.debug, self.patience = MPI.COMM_WORLD.Dup(), debug, patience
        self.rank, self.size = self.world.rank, self.world.size
        self.topology = topology.switch(self.size, Link(inf))
        self.device, self.devices = IDEAL, [IDEAL] * self.size

    def run(self, program, *args, **options):
        """Run `program(comm, …)` in every process; all of them call this, with arguments as for the virtual cluster.

        returns   Run with wall-clock times, all ranks' outputs and events: in rank 0; None in the others
        An error in any rank is printed with its rank and ends all processes with status 1.
        """
        machine = ProcessMachine(self)
        comm, outputs = Communicator(machine.processor, tuple(range(self.size)), context=()), {}
        start(caller(len(args), options), program, comm, args, options, outputs)
        self.world.Barrier()
        machine.engine.began = perf_counter()
        try:
            machine.engine.run(machine.deadlock)
            makespan = machine.engine.now
            machine.drain()
            machine.check_nothing_left()
        except BaseException:
            print(f"rank {self.rank} of {self.size}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            self.world.Abort(1)
        return self._gather(machine, outputs[self.rank], makespan)

    def __repr__(self):
        return f"{self.size} real processes"

    def _gather(self, machine, output, makespan):
        memory = machine.processor.memory
        parts = self.world.gather((output, machine.trace, makespan, memory.peak, memory.history()))
        if self.rank:
            return None
        outputs, traces, makespans, peaks, histories = zip(*parts, strict=True)
        trace = Trace()
        for part in traces:
            trace.add(part)
        memories = [SimpleNamespace(peak=p, history=lambda h=h: h) for p, h in zip(peaks, histories, strict=True)]
        return Run(self, list(outputs), trace, max(makespans), memories)


class ProcessMachine(Machine):
    """One process: its mailbox, and its side of every message."""

    def __init__(self, cluster):
        self.cluster, self.topology = cluster, cluster.topology
        self.wire = Wire(cluster.world, self)
        self.engine = WallEngine(self.wire, cluster.patience)
        self.trace, self.contexts = Trace(), SameEverywhere()
        self.processor = WallProcessor(self, cluster.rank, IDEAL)
        self.algorithms = native.algorithms(cluster.world)
        self._headers, self._sends, self._receives, self._protected = {}, {}, {}, {}

    # ---- what a communicator needs of a machine --------------------------------------------------------------------

    def protect(self, send):
        """What is sent is read-only until it has left: MPI reads the arrays where they lie."""
        first = first_array(send.payload)
        if first is not None and is_shape_only(first):
            raise DtypeError("shape-only arrays run on the virtual machine only; real processes need data")
        send.protected = list(leaves(send.payload))
        self.lock(send.protected)

    def post_send(self, send):
        self.wire.send(send)

    def post_receive(self, receive):
        waiting = self._headers.get(receive.key, ())
        for index, incoming in enumerate(waiting):
            if receive.sender is None or receive.sender == incoming.source:
                take(self._headers, receive.key, waiting, index)
                return self._match(incoming, receive)
        self._receives.setdefault(receive.key, []).append(receive)

    def agree(self, comm, mine):
        if self.cluster.debug:
            for theirs in self._exchange(comm, mine, "signatures").values():
                compare(comm._entered, mine, theirs)

    def meet(self, comm, name, value):
        return self._exchange(comm, value, name)

    @staticmethod
    def _exchange(comm, value, name):
        channel = comm._with(comm.ranks, ("exchange", name, comm._entered), label=name)
        return dict(enumerate(native.unpack(part) for part in ring_all_gather(channel, native.pack(value))))

    # ---- what the wire reports -------------------------------------------------------------------------------------

    def announced(self, incoming):
        """A header is here: give it to the oldest receive that takes it, or keep it."""
        waiting = self._receives.get(incoming.key, ())
        for index, receive in enumerate(waiting):
            if receive.sender is None or receive.sender == incoming.source:
                take(self._receives, incoming.key, waiting, index)
                return self._match(incoming, receive)
        self._headers.setdefault(incoming.key, []).append(incoming)

    def _match(self, incoming, receive):
        incoming.receive, receive.sender, receive.matched = receive, incoming.source, True
        if not incoming.missing:
            self.arrived(incoming)

    def arrived(self, incoming):
        """All arrays of a message are here."""
        if incoming.receive is not None:
            payload = _filled(incoming.specs, iter(incoming.arrays))
            self.processor.memory.track(payload, f"receive from rank {incoming.source}")
            incoming.receive.complete(payload)

    def left(self, send):
        """The arrays of a message may be written to again."""
        posted = send.posted
        self.trace.message(send.rank, send.key[0], send.label, send.nbytes, posted, posted, posted, self.engine.now)
        self._release(send)
        send.payload = None
        send.complete()

    def sends_in_flight(self, rank):
        return [send for _, send in self.wire.sending]

    def deadlock(self):
        raise DeadlockError(
            f"nothing has happened here for {self.engine.patience:g} s.\n{deadlock_report(self.engine, 1)}\n"
            "If other ranks are only slow, give the cluster more patience."
        )

    def drain(self):
        """Serve the others until all have returned."""
        everybody = self.cluster.world.Ibarrier()
        while not everybody.Test() or self.wire.busy:
            self.wire.progress()
        while self.wire.progress():
            pass

    def check_nothing_left(self):
        super().check_nothing_left()
        left = [incoming for waiting in self._headers.values() for incoming in waiting]
        if left:
            rows = [f"  rank {i.source}   {i.what}   posted at {i.site}" for i in left[:8]]
            first = f"the run ended with messages to rank {self.cluster.rank} that were never received: {len(left)}."
            raise UnreceivedMessage("\n".join([first, *rows, "Post a receive with the same source and tag."]))


class Spec(NamedTuple):
    """One array of a message: what it is, and as what it travels."""

    shape: tuple
    dtype: str
    wire: str


class Incoming:
    """A message whose header is here. `missing` arrays are still on the way."""

    def __init__(self, source, key, specs, what, site):
        self.source, self.key, self.specs, self.what, self.site = source, key, specs, what, site
        self.receive = None
        self.arrays = [np.empty(spec.shape, spec.wire) for spec in _flat(specs)]
        self.missing = len(self.arrays)


class Wire:
    """Messages to and from other processes; `progress` moves what can move."""

    def __init__(self, world, machine):
        from mpi4py import MPI

        self.world, self.machine, self._mpi = world, machine, MPI
        self.sending, self._receiving = [], []  # (MPI requests, Send); (MPI request, Incoming)

    @property
    def busy(self):
        return bool(self.sending or self._receiving)

    def send(self, send):
        dest, *channel = send.key
        specs = _specs(send.payload, send.wire)
        header = tuple(channel), specs, str(send), site_text(send.site)
        requests = [self.world.isend(header, dest, HEADER)]
        for array, spec in zip(leaves(send.payload), _flat(specs), strict=True):
            requests.append(self.world.Isend(_bytes(np.ascontiguousarray(array, spec.wire)), dest, ARRAYS))
        self.sending.append((requests, send))

    def progress(self):
        """Take in headers, finish arrays, let go of what was sent. True if anything happened."""
        moved, status = False, self._mpi.Status()
        while (message := self.world.improbe(tag=HEADER, status=status)) is not None:
            moved = True
            channel, *rest = message.recv()
            incoming = Incoming(status.source, (self.world.rank, *channel), *rest)
            for array in incoming.arrays:
                self._receiving.append((self.world.Irecv(_bytes(array), status.source, ARRAYS), incoming))
            self.machine.announced(incoming)
        finished = [request.Test() for request, _ in self._receiving]
        if any(finished):
            moved, pairs = True, list(zip(finished, self._receiving, strict=True))
            self._receiving = [pair for done, pair in pairs if not done]
            for done, (_, incoming) in pairs:
                incoming.missing -= done
                if done and not incoming.missing:
                    self.machine.arrived(incoming)
        for pair in [pair for pair in self.sending if self._mpi.Request.Testall(pair[0])]:
            moved = True
            self.sending.remove(pair)
            self.machine.left(pair[1])
        return moved


def _specs(payload, wire):
    if isinstance(payload, np.ndarray):
        return Spec(payload.shape, payload.dtype.str, np.dtype(wire or payload.dtype).str)
    wires = wire if isinstance(wire, (tuple, list)) else [wire] * len(payload)
    return [_specs(part, kind) for part, kind in zip(payload, wires, strict=True)]


def _flat(specs):
    if isinstance(specs, Spec):
        yield specs
    else:
        for part in specs:
            yield from _flat(part)


def _filled(specs, arrays):
    if isinstance(specs, Spec):
        return next(arrays).astype(specs.dtype, copy=False)
    return tuple([_filled(part, arrays) for part in specs])


def _bytes(array):
    return array.reshape(-1).view(np.uint8)
