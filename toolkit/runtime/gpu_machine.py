"""One GPU and its side of every message: the machine under `gpu.Cluster`, one process a GPU.

The rank's program has a CUDA stream, in which its kernels run in order; each sub-task has one of its own; NCCL's
messages have one more. What must come after what, streams tell each other: the host never waits, so a sub-task has
queued all it does before the program goes on.
"""

from collections import Counter, deque

import torch
import torch.distributed as dist
from greenlet import getcurrent

from toolkit.kernels.gpu import KERNELS

from .arrays import map_arrays
from .engine import Task
from .hardware import IDEAL
from .machine import Machine
from .processor import Processor
from .requests import Send
from .trace import Trace
from .wall import SameEverywhere, WallEngine

HEAD_START = 3000  # cycles of the GPU, some 2 µs


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
        self.sides = {}  # sub-task -> its stream
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
        tensors = _cast(send.payload, send.wire)
        self.used_here(tensors)
        operations = [dist.P2POp(dist.isend, tensor, send.key[0]) for tensor in tensors]
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
        group = Group(dist.batch_isend_irecv(operations) if operations else [])
        for moving in posted:
            moving.group = group
        if operations:
            head_start()

    def block(self, request, timeout=None):
        """What this GPU does next comes after the message; the program itself goes on."""
        moving = self.pending.pop(request, None)
        if moving is None:  # a sub-task
            return super().block(request, timeout)
        if type(request) is Send and getcurrent() is not self.processor.main:  # of a stream: it holds up nobody
            self.beside.append(moving)
            return request.complete()
        if moving.group is None:
            self.flush()
        moving.group.wait(self.here())
        if moving.room is None:
            return request.complete()
        self.used_here(moving.room[0])
        request.complete(map_arrays(lambda tensor, spec: tensor.to(torch_dtype(spec.dtype)), *moving.room))

    def join(self, request):
        """What follows in this stream comes after the sub-task."""
        if request.task in self.sides:
            self.here().wait_stream(self.sides[request.task])
            self.used_here(request.value)

    def here(self):
        """The stream of whoever runs; None without a GPU."""
        return torch.cuda.current_stream() if self.cluster.cuda else None

    def used_here(self, value):
        """Tensors that another stream may have made: their memory is not free before this one has used them."""
        if self.sides:
            for tensor in _flat(value):
                if isinstance(tensor, torch.Tensor):
                    tensor.record_stream(self.here())

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
            moving.group.wait(self.here())
        for side in self.sides.values():
            self.here().wait_stream(side)
        self.last = self.mark()
        self.peak = torch.cuda.max_memory_allocated() if self.cluster.cuda else 0

    def read(self):
        """Wait for the GPU, then write the trace from its events."""
        if self.cluster.cuda:
            torch.cuda.synchronize()
        self.makespan, self.trace, free = self.seconds(self.last), Trace(), 0.0
        spans = [(self.seconds(before), self.seconds(after), name, lane) for name, lane, before, after in self.kernels]
        for began, ended, name, lane in sorted(spans):
            if began > free:  # no stream had anything to do, or all waited for a message
                self.trace.wait(self.cluster.rank, "message", free, began)
            self.trace.kernel(self.cluster.rank, lane, name, began, ended, 0, 0)
            free = max(free, ended)
        if self.makespan > free:
            self.trace.wait(self.cluster.rank, "message", free, self.makespan)

    def kernel_seconds(self):
        """{name: seconds of its launches}. After `read`."""
        found = Counter()
        for name, _, before, after in self.kernels:
            found[name] += self.seconds(after) - self.seconds(before)
        return found

    def busy_seconds(self):
        """Seconds in which a kernel runs. After `read`."""
        spans, total, until = sorted((self.seconds(b), self.seconds(a)) for _, _, b, a in self.kernels), 0.0, 0.0
        for began, ended in spans:
            total += max(0.0, ended - max(began, until))
            until = max(until, ended)
        return total

    def seconds(self, mark):
        return self.origin.elapsed_time(mark) * 1e-3 if self.cluster.cuda else mark - self.origin


class Moving:
    """A message: its operations, room for what arrives, and the group in which it has left."""

    def __init__(self, operations, room):
        self.operations, self.room, self.group = operations, room, None


class Group:
    """Messages under way together; a stream waits for them once, whoever of them is asked for first."""

    def __init__(self, works):
        self.works, self.heard = works, set()

    def wait(self, stream):
        if stream not in self.heard:
            self.heard.add(stream)
            for work in self.works:
                work.wait()


class GpuEngine(WallEngine):
    def poll(self, waiting_for):
        """To ask whether a message has come is to queue what follows behind it."""
        for request in waiting_for.requests():
            if not request.done:
                self.network.block(request)


class GpuProcessor(Processor):
    """Launches kernels; they run when the GPU gets to them."""

    def spawn(self, function, site=None, lane="compute"):
        machine = self.machine
        if not machine.cluster.cuda or type(getcurrent()) is not Task:  # the rank's program itself
            return super().spawn(function, site, lane)
        side = torch.cuda.Stream()
        side.wait_stream(machine.here())

        def beside():
            machine.sides[getcurrent()] = side
            with torch.cuda.stream(side):
                function()
                machine.flush()

        return super().spawn(beside, site, lane)

    def launch(self, kernel, args, options):
        machine = self.machine
        machine.flush()
        machine.used_here(args)
        before = machine.mark()
        result = KERNELS.get(kernel, kernel.__wrapped__)(*args, **options)
        machine.kernels.append((kernel.__name__, "compute", before, machine.mark()))
        return result


def head_start():
    """In a graph, messages that were just begun and the next kernel are ready together: let the messages go first.

    A large kernel fills the GPU, and NCCL's would wait for the first of its tiles to end.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        torch.cuda._sleep(HEAD_START)


def event():
    """A point in this GPU's stream of work, with its time; when a graph is replayed, the time of the replay."""
    point = torch.cuda.Event(enable_timing=True, external=True)
    point.record()
    return point


# ---- tensors -------------------------------------------------------------------------------------------------------


def torch_dtype(dtype):
    """torch's dtype of that name."""
    return getattr(torch, str(dtype))


def _flat(value):
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in _flat(part)]
    return [value]


def _cast(payload, wire):
    """The tensors of a message, contiguous, in the dtype in which they travel."""
    if not isinstance(payload, (tuple, list)):
        return [(payload if wire is None else payload.to(torch_dtype(wire))).contiguous()]
    each = wire if isinstance(wire, (tuple, list)) else [wire] * len(payload)
    return [tensor for part, kind in zip(payload, each, strict=True) for tensor in _cast(part, kind)]
