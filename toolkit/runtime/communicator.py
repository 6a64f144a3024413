"""The communicator: what a rank's program sees of the machine. The vocabulary is MPI's and torch.distributed's.

Messages are arrays or nested tuples of arrays; they match by (source, tag) in order. A send waits for its receive
(rendezvous): `send` before `recv` on both sides is a deadlock, and the runtime says so.
Collectives are written in this vocabulary, in `collectives`.
"""

from math import isfinite

import numpy as np
from greenlet import getcurrent

from . import collectives
from .engine import Engine
from .errors import RequestTimeout, ShapeError, UnknownRank
from .requests import Both, Receive, Request, Send, SubTask, call_site
from .stream import Stream

ANY = None  # recv(source=ANY): whoever sends first


class Communicator(collectives.Collectives):
    """A group of ranks, seen from one of them.

    rank, size    this rank's number in the group, and how many there are
    ranks         the group's members as ranks of the whole cluster
    """

    def __init__(self, processor, ranks, context=0):
        self._processor, self._machine = processor, processor.machine
        self.ranks, self.size = ranks, len(ranks)
        self.rank = ranks.index(processor.rank)
        self._context = context
        self._label = None  # set inside a collective: what its messages are called in the trace
        self._entered = 0  # collectives this rank has entered

    @property
    def now(self):
        """Virtual seconds since the run began."""
        return self._machine.engine.now

    @property
    def device(self):
        """The hardware.Device that this rank computes on."""
        return self._processor.device

    @property
    def topology(self):
        """The machine's Topology."""
        return self._machine.topology

    # ---- messages -------------------------------------------------------------------------------------------------

    def isend(self, x, dest, tag=0, *, nbytes=None, nbits=None, wire=None):
        """Start sending `x`. Returns a Request; `x`, and any view taken of it meanwhile, is read-only until it is done.

        x        array or nested tuple of arrays; () is a message of no bytes
        wire     dtype that values are rounded to on the way, or a nested tuple of dtypes and None, one an array
        nbytes   size on the wire instead of the arrays' own (entropy-coded payloads); `nbits` is rounded up to bytes
        raises   UnknownRank, DtypeError
        """
        return self._isend(x, dest, tag, wire, nbytes if nbits is None else -(-nbits // 8), call_site())

    def irecv(self, source=ANY, tag=0):
        """Start receiving. Returns a Request whose `wait()` gives the arrays; `request.source` tells who sent them."""
        return self._irecv(source, tag, call_site())

    def send(self, x, dest, tag=0, **wire):
        """Send and wait until it has arrived. Options as for `isend`."""
        self.isend(x, dest, tag, **wire).wait()

    def recv(self, source=ANY, tag=0, timeout=None):
        """Receive and wait. Returns the arrays.

        timeout  virtual seconds until somebody must have sent; a transfer under way by then is waited for
        raises   RequestTimeout  and takes the receive back
        """
        receive = self._irecv(source, tag, call_site())
        try:
            return receive.wait(timeout)
        except RequestTimeout:
            if receive.cancel():
                raise
            return receive.wait()

    def sendrecv(self, x, dest, source=ANY, tag=0):
        """Send and receive at once. Returns what arrived."""
        site = call_site()
        return Both(self._isend(x, dest, tag, None, None, site), self._irecv(source, tag, site)).wait()

    def ishift(self, x, by=1, tag=0, *, wire=None):
        """Send to rank + by and receive from rank - by, round the ring. Returns a Request for what arrives."""
        site, rank, size = call_site(), self.rank, self.size
        return Both(
            self._isend(x, (rank + by) % size, tag, wire, None, site),
            self._irecv((rank - by) % size, tag, site),
        )

    # ---- time and side tracks -------------------------------------------------------------------------------------

    def sleep(self, seconds):
        """Let virtual time pass."""
        self.sleep_until(self.now + seconds)

    def sleep_until(self, time):
        """Let virtual time pass until `time`, if that is ahead."""
        if not isfinite(time):
            raise ValueError(f"rank {self.rank} cannot sleep until {time} s: give a finite time")
        engine: Engine = self._machine.engine
        engine.sleep_until(time)

    def stream(self, name):
        """The stream `name` of this rank: `with comm.stream("copy") as s:` queues work; `s.wait()` waits for it."""
        streams = self._processor.streams
        if name not in streams:
            streams[name] = Stream(self._processor, name)
        return streams[name]

    def spawn(self, function, *args, name=None, **options):
        """Run `function(*args, **options)` beside this rank's program. Returns a Request for its result."""
        request = SubTask(self._machine, name or getattr(function, "__name__", "task"), call_site())

        def body():
            request.complete(function(*args, **options))

        request.task = self._processor.spawn(body, request.site, getcurrent().lane)
        return request

    # ---- groups ---------------------------------------------------------------------------------------------------

    def group(self, ranks):
        """A communicator of some of this one's ranks, without a word being sent: every member names the same ranks."""
        ranks = tuple(ranks)
        if self.rank not in ranks or len(set(ranks)) != len(ranks):
            raise UnknownRank(f"rank {self.rank} must be in the group it forms, once; it named {ranks}")
        world = tuple(self.ranks[self._checked(r, "group member")] for r in ranks)
        return self._with(world, ("group", world))

    def split(self, color, key=0):
        """One communicator per color, its ranks ordered by (key, rank). All ranks call it; it takes no time."""
        table = self._meet("split", (), (color, key))
        members = sorted((k, r) for r, (c, k) in table.items() if c == color)
        return self._with(tuple(self.ranks[r] for _, r in members), ("split", self._entered, str(color)))

    def _with(self, ranks, what, label=None):
        context = self._machine.contexts.setdefault((self._context, *what), len(self._machine.contexts) + 1)
        other = Communicator(self._processor, ranks, context)
        other._label = label
        return other

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _isend(self, x, dest, tag, wire, nbytes, site):
        machine, label = self._machine, self._label or (tag if type(tag) is str else "message")
        key = (self._world(dest, "dest"), self._context, tag)
        send = Send(machine, label, site, self._processor.rank, key, self._label)
        send.peer, send.payload = dest, tuple(x) if type(x) is list else x
        send.wire = None if type(x) is tuple and not x else wire
        if nbytes is not None and nbytes < 0:
            raise ShapeError(f"a message cannot have {nbytes} bytes on the wire")
        machine.protect(send)
        send.nbytes = _wire_bytes(send.payload, send.wire) if nbytes is None else nbytes
        if getcurrent().stream is None:
            machine.post_send(send)
        else:
            self._enqueue(send, machine.post_send)
        return send

    def _irecv(self, source, tag, site):
        rank, label = self._processor.rank, self._label or (tag if type(tag) is str else "message")
        receive = Receive(self._machine, label, site, rank, (rank, self._context, tag), self._label)
        receive.payload, receive.wanted, receive.ranks = None, source, self.ranks
        receive.sender = ANY if source is ANY else self._world(source, "source")
        if getcurrent().stream is None:
            self._machine.post_receive(receive)
        else:
            self._enqueue(receive, self._machine.post_receive)
        return receive

    def _enqueue(self, half, post):
        """Post in the stream's own time; what is queued behind waits until the message has arrived."""

        def later():
            half.posted = self.now
            post(half)
            Request.wait(half)

        getcurrent().stream.enqueue(later)

    def _checked(self, rank, what):
        if not hasattr(rank, "__index__") or not 0 <= rank < self.size:
            raise UnknownRank(
                f"rank {self.rank}: {what}={rank!r} is not a rank of this communicator (0 … {self.size - 1})"
            )
        return int(rank)

    def _world(self, rank, what):
        if type(rank) is int and 0 <= rank < self.size:
            return self.ranks[rank]
        return self.ranks[self._checked(rank, what)]


def _wire_bytes(payload, wire):
    if not isinstance(payload, (tuple, list)):
        return payload.nbytes if wire is None else payload.nbytes // payload.itemsize * np.dtype(wire).itemsize
    if wire is None:
        return sum([_wire_bytes(part, None) for part in payload])
    each = wire if isinstance(wire, (tuple, list)) else [wire] * len(payload)
    if len(each) != len(payload):
        raise ShapeError(f"wire has {len(each)} dtypes for a message of {len(payload)} parts: give one each, or None")
    return sum(_wire_bytes(part, kind) for part, kind in zip(payload, each, strict=True))
