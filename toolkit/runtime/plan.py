"""The plan of a program: what travels between ranks, found by running it without data and without messages.

An engine that must know every message beforehand (NCCL knows no tags and no shapes) asks here. First the program runs
shape-only on the virtual machine: that tells what each channel carries. Then each rank runs alone, every message being
there at once: that tells in which order it sends when nothing makes it wait.

Limits: no recv(source=ANY), no message whose shape depends on data.
"""

import numpy as np

from . import topology
from .arrays import like, map_arrays, with_parts
from .cluster import caller, start
from .communicator import Communicator
from .errors import RuntimeFault
from .hardware import IDEAL, NVLINK4
from .layout import PerRank, Shard
from .machine import Machine
from .processor import Processor
from .trace import Trace
from .wall import SameEverywhere, WallEngine


class PlanningMachine(Machine):
    """A virtual machine that writes down what travels on each channel, and what ranks hear when they meet."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.contexts = SameEverywhere()
        self.specs, self.met = {}, {}

    def _start(self, send, receive):
        wire = _rounded(send.payload, send.wire)
        channel = send.rank, receive.rank, *receive.key[1:]
        self.specs.setdefault(channel, []).append((wire, map_arrays(like, send.payload)))
        super()._start(send, receive)

    def meet(self, comm, name, value):
        values = self.met[comm._context, comm._entered] = super().meet(comm, name, value)
        return values


class Rehearsal(Machine):
    """One rank without the others: every message is there at once. Says in which order the rank sends."""

    def __init__(self, rank, size, specs, met):
        self.rank, self.met, self.sent = rank, met, []
        self.expected = {channel: iter(found) for channel, found in specs.items()}
        self.topology, self.contexts, self.trace = topology.switch(size, NVLINK4), SameEverywhere(), Trace()
        self.engine = WallEngine(self, patience=60.0)
        self.processor = RehearsingProcessor(self, rank, IDEAL)
        self.processors, self._sends, self._receives = [self.processor], {}, {}

    def progress(self):
        return False

    def protect(self, send):
        send.protected = send.snapshot = None

    def post_send(self, send):
        self.sent.append((self.rank, *send.key))
        send.complete()

    def post_receive(self, receive):
        if receive.sender is None:
            raise RuntimeFault(f"{receive}: NCCL has no recv(source=ANY): name the source")
        receive.complete(next(self.expected[receive.sender, *receive.key])[1])

    def agree(self, comm, mine):
        """The virtual run has checked it."""

    def meet(self, comm, name, value):
        return self.met[comm._context, comm._entered]


class RehearsingProcessor(Processor):
    def launch(self, kernel, args, options):
        return kernel.shapes(*args, **options)


def plan(program, args, options, size):
    """What travels: ({channel: [(shapes on the wire, shapes)]}, what ranks hear, [the channels of each rank's sends]).

    A channel is (source, dest, context, tag). A virtual run finds what each message holds; a rehearsal of each rank in
    which order it sends, because a program that never waits sends in an order of its own.
    """
    shapes = [_shapes(arg) for arg in args]
    machine = PlanningMachine(topology.switch(size, NVLINK4), [IDEAL] * size)
    execute(machine, machine.processors, program, shapes, options)
    machine.check_nothing_left()
    orders = []
    for rank in range(size):
        rehearsal = Rehearsal(rank, size, machine.specs, machine.met)
        execute(rehearsal, rehearsal.processors, program, shapes, options)
        orders.append(rehearsal.sent)
    return machine.specs, machine.met, orders


def _shapes(arg):
    """An argument without its numbers."""
    if isinstance(arg, Shard):
        return Shard(like(arg.array), arg.axis, arg.layout)
    if isinstance(arg, PerRank):
        return PerRank(tuple(map(_shapes, arg.values)))
    if isinstance(arg, tuple):
        return with_parts(arg, map(_shapes, arg))
    return like(arg) if isinstance(arg, np.ndarray) else arg


def execute(machine, processors, program, args, options):
    size = len(machine.topology.ranks)
    outputs, call = [None] * size, caller(len(args), options)
    for processor in processors:
        start(call, program, Communicator(processor, tuple(range(size)), context=()), args, options, outputs)
    machine.engine.run(machine.deadlock)
    return outputs


def _rounded(payload, wire):
    """Shapes of a message as it travels."""
    if isinstance(payload, np.ndarray):
        return like(payload, wire) if wire else like(payload)
    each = wire if isinstance(wire, (tuple, list)) else [wire] * len(payload)
    return tuple(_rounded(part, kind) for part, kind in zip(payload, each, strict=True))


def form(value):
    """What the plan depends on: shapes, dtypes and layouts, not numbers."""
    if isinstance(value, Shard):
        return value.array.shape, str(value.array.dtype), value.axis, value.layout
    if isinstance(value, PerRank):
        return tuple(map(form, value.values))
    if isinstance(value, tuple):
        return tuple(map(form, value))
    return (value.shape, str(value.dtype)) if isinstance(value, np.ndarray) else value
