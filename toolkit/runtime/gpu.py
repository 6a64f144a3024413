"""The same programs on real GPUs: torch tensors, NCCL, one process a GPU, started by torchrun.

    from toolkit.runtime import gpu
    run = gpu.Cluster().run(program, shard(q, axis=1), causal=True)      # in every process; rank 0 gets the Run

NCCL wants to know every shape beforehand, and it matches messages by their order alone. So the program first runs
without data, on the virtual machine: that run is the plan (`plan`). From then on nothing waits for the host: messages
that are posted together leave as one NCCL group, right before the next kernel is launched or somebody waits, on a
stream of their own; `wait()` makes the next kernel wait, not the program. Since nothing waits for the host, a whole
run can also be recorded once, as a CUDA graph, and then replayed: the host takes no part in it any more.

Times are the GPU's, by events. A machine without GPUs runs the same code with gloo on tensors of the CPU.
Needs: pip install '.[gpu]'. Limits: no source=ANY, no message whose shape depends on data, no timeouts.
"""

import atexit
import os
from collections import deque
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from greenlet import getcurrent

from toolkit.kernels.gpu import KERNELS

from . import topology
from .arrays import like, map_arrays
from .cluster import Run, own
from .errors import RuntimeFault
from .hardware import IDEAL, NVLINK4
from .machine import Machine
from .plan import execute, form, plan
from .processor import Processor
from .requests import Send
from .trace import Trace
from .wall import SameEverywhere, WallEngine


class Cluster:
    """The processes that torchrun started, one rank and one GPU each."""

    def __init__(self):
        self.cuda = torch.cuda.is_available()
        self.place = torch.device("cpu")
        if self.cuda:
            self.place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.place)
            urgent = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)  # else a large kernel goes first
            dist.init_process_group("nccl", device_id=self.place, pg_options=urgent)
        else:
            dist.init_process_group("gloo")
        atexit.register(dist.destroy_process_group)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.topology = topology.switch(self.size, NVLINK4)
        self.device, self.devices = IDEAL, [IDEAL] * self.size
        self._plans = {}

    def run(self, program, *args, **options):
        """Run `program(comm, …)` on every GPU; all processes call this, with arguments as for the virtual cluster.

        returns   Run: outputs as numpy arrays and times of all ranks, in rank 0; None in the others
        raises    whatever the program raises; torchrun then ends the other processes
        """
        machine, output = self.prepare(program, args, options)()
        mine = _to_numpy(output), machine.trace, machine.makespan, machine.peak
        parts = [None] * self.size if self.rank == 0 else None
        dist.gather_object(mine, parts, 0, group=self._gloo())
        if self.rank:
            return None
        outputs, traces, makespans, peaks = zip(*parts, strict=True)
        trace = Trace()
        for part in traces:
            trace.add(part)
        memories = [SimpleNamespace(peak=peak, history=lambda: (np.zeros(0), np.zeros(0))) for peak in peaks]
        return Run(self, list(outputs), trace, max(makespans), memories)

    def prepare(self, program, args, options, graph=False):
        """Plan a run and bring its arguments to this GPU.

        graph     record the run as a CUDA graph: kernels and messages then start without the host
        returns   a function that runs once: this rank's GpuMachine, its trace complete, and its output as tensors
        """
        key = (program, tuple(form(a) for a in args), tuple((k, form(v)) for k, v in options.items()))
        if key not in self._plans:
            self._plans[key] = plan(program, args, options, self.size)
        mine = [self._placed(own(a, self.rank, self.size)) for a in args]

        def enqueue():
            machine = GpuMachine(self, *self._plans[key])
            self.align()
            machine.begin()
            outputs = execute(machine, [machine.processor], program, mine, options)
            machine.end()
            return machine, outputs[self.rank]

        enqueue = self.recorded(enqueue) if graph else enqueue

        def once():
            dist.barrier()
            machine, output = enqueue()
            machine.read()
            return machine, output

        return once

    def recorded(self, enqueue):
        """What `enqueue` lets the GPU do, as a CUDA graph: a function that replays it and gives the same result.

        `enqueue` runs twice: communicators and compiled kernels must be there before it is recorded.
        """
        if not self.cuda:
            raise RuntimeFault("a CUDA graph needs a GPU: run without graph=True")
        enqueue()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's own thread may go on
            result = enqueue()

        def replay():
            graph.replay()
            return result

        replay.reads = enqueue  # whose tensors must live as long as the graph
        return replay

    def align(self):
        """No GPU goes on before all have come."""
        if self.cuda:
            dist.all_reduce(self.empty(like((1,), "float32")).zero_())
        else:
            dist.barrier()

    def __repr__(self):
        kind = torch.cuda.get_device_name() if self.cuda else "CPU process (no GPU here)"
        return f"{self.size} × {kind}"

    def _placed(self, value):
        if isinstance(value, tuple):
            return tuple(map(self._placed, value))
        return torch.from_numpy(value).to(self.place) if isinstance(value, np.ndarray) else value

    def empty(self, spec):
        """Room for an array of that shape and dtype."""
        return torch.empty(spec.shape, dtype=_torch(spec.dtype), device=self.place)

    def _gloo(self):
        if not hasattr(self, "_cpu_group"):
            self._cpu_group = dist.new_group(backend="gloo")
        return self._cpu_group


# ---- the machine ---------------------------------------------------------------------------------------------------


class GpuMachine(Machine):
    """One GPU and its side of every message."""

    def __init__(self, cluster, specs, met, orders):
        self.cluster, self.topology, self.met, self.trace = cluster, cluster.topology, met, Trace()
        self.specs = {channel: iter(found) for channel, found in specs.items()}
        self.coming = [deque(c for c in order if c[1] == cluster.rank) for order in orders]  # by source
        self.early = {}  # channel -> messages whose room is made, and that nobody has asked for yet
        self.engine = GpuEngine(self, patience=60.0)
        self.contexts = SameEverywhere()
        self.processor = GpuProcessor(self, cluster.rank, IDEAL)
        self.posted, self.pending = [], {}  # the group to come; request -> its Moving
        self.beside = []  # sends of streams, waited for at the end
        self.kernels = []  # (name, lane, event before, event after)
        self.processors = [self.processor]
        self._sends, self._receives = {}, {}

    def progress(self):
        """The GPU moves things by itself."""
        return False

    def block_any(self, requests):
        self.block(next(part for request in requests for part in request.requests() if not part.done))

    def protect(self, send):
        send.protected = send.snapshot = None

    def post_send(self, send):
        operations = [dist.P2POp(dist.isend, tensor, send.key[0]) for tensor in _cast(send.payload, send.wire)]
        self.pending[send] = self._post(Moving(operations, None))

    def post_receive(self, receive):
        """Make room in the order in which the source sends, as NCCL matches, up to the message that is asked for."""
        channel = receive.sender, *receive.key
        waiting = self.early.setdefault(channel, deque())
        while not waiting:
            next_channel = self.coming[receive.sender].popleft()
            wire, whole = next(self.specs[next_channel])
            room = map_arrays(self.cluster.empty, wire)
            operations = [dist.P2POp(dist.irecv, tensor, receive.sender) for tensor in _flat(room)]
            self.early.setdefault(next_channel, deque()).append(self._post(Moving(operations, (room, whole))))
        self.pending[receive] = waiting.popleft()

    def _post(self, moving):
        self.posted.append(moving)
        return moving

    def flush(self):
        """Let go what was posted, as one group: sends and receives of all channels move together."""
        posted, self.posted = self.posted, []
        operations = [operation for moving in posted for operation in moving.operations]
        works = dist.batch_isend_irecv(operations) if operations else []
        for moving in posted:
            moving.works = works

    def block(self, request, timeout=None):
        """What this GPU does next comes after the message; the program itself goes on."""
        moving = self.pending.pop(request, None)
        if moving is None:  # a sub-task
            return super().block(request, timeout)
        if type(request) is Send and getcurrent() is not self.processor.main:  # of a stream: it holds up nobody
            self.beside.append(moving)
            return request.complete()
        if moving.works is None:
            self.flush()
        while moving.works:  # a group is waited for once, whoever of its messages comes first
            moving.works.pop().wait()
        request.complete(moving.room and map_arrays(lambda tensor, spec: tensor.to(_torch(spec.dtype)), *moving.room))

    def agree(self, comm, mine):
        """The plan has checked it."""

    def meet(self, comm, name, value):
        return self.met[comm._context, comm._entered]

    # ---- time ------------------------------------------------------------------------------------------------------

    def mark(self):
        """A point in the GPU's stream of work (the wall's clock where there is no GPU)."""
        if not self.cluster.cuda:
            return self.engine.now
        return event()

    def begin(self):
        if self.cluster.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.origin = self.mark()

    def end(self):
        """Let everything that was begun end on the GPU."""
        self.flush()
        for request in list(self.pending):
            self.block(request)
        for moving in self.beside:
            while moving.works:
                moving.works.pop().wait()
        self.last = self.mark()
        self.peak = torch.cuda.max_memory_allocated() if self.cluster.cuda else 0

    def read(self):
        """Wait for the GPU, then write the trace from its events."""
        if self.cluster.cuda:
            torch.cuda.synchronize()
        self.makespan, self.trace, free = self.seconds(self.last), Trace(), 0.0
        for name, lane, before, after in self.kernels:
            began, ended = self.seconds(before), self.seconds(after)
            if began > free:  # the stream had nothing to do, or waited for a message
                self.trace.wait(self.cluster.rank, "message", free, began)
            self.trace.kernel(self.cluster.rank, lane, name, began, ended, 0, 0)
            free = ended
        if self.makespan > free:
            self.trace.wait(self.cluster.rank, "message", free, self.makespan)

    def kernel_seconds(self):
        """Seconds of each kernel, in order of launch. After `read`."""
        return [self.seconds(after) - self.seconds(before) for _, _, before, after in self.kernels]

    def seconds(self, mark):
        return self.origin.elapsed_time(mark) * 1e-3 if self.cluster.cuda else mark - self.origin


class Moving:
    """A message of a group: its operations, room for what arrives, and, when it has left, what to wait for."""

    def __init__(self, operations, room):
        self.operations, self.room, self.works = operations, room, None


class GpuEngine(WallEngine):
    def poll(self, waiting_for):
        """To ask whether a message has come is to queue what follows behind it."""
        for request in waiting_for.requests():
            if not request.done:
                self.network.block(request)


class GpuProcessor(Processor):
    """Launches kernels; they run when the GPU gets to them."""

    def launch(self, kernel, args, options):
        machine = self.machine
        machine.flush()
        before = machine.mark()
        result = KERNELS.get(kernel, kernel.__wrapped__)(*args, **options)
        machine.kernels.append((kernel.__name__, "compute", before, machine.mark()))
        return result


def event():
    """A point in this GPU's stream of work, with its time; when a graph is replayed, the time of the replay."""
    point = torch.cuda.Event(enable_timing=True, external=True)
    point.record()
    return point


# ---- tensors -------------------------------------------------------------------------------------------------------


def _torch(dtype):
    return getattr(torch, str(dtype))


def _flat(value):
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in _flat(part)]
    return [value]


def _cast(payload, wire):
    """The tensors of a message, contiguous, in the dtype in which they travel."""
    if not isinstance(payload, (tuple, list)):
        return [(payload if wire is None else payload.to(_torch(wire))).contiguous()]
    each = wire if isinstance(wire, (tuple, list)) else [wire] * len(payload)
    return [tensor for part, kind in zip(payload, each, strict=True) for tensor in _cast(part, kind)]


def _to_numpy(value):
    if isinstance(value, (tuple, list)):
        return tuple(map(_to_numpy, value))
    return value.cpu().numpy() if isinstance(value, torch.Tensor) else value
