"""The machine behind a run: it matches messages, moves them over the network, and keeps the books.

A transfer starts when both sides have posted (rendezvous). From then until it ends the sent array is read-only, and
the receiver's copy counts as the receiver's memory.
"""

import numpy as np
from greenlet import getcurrent

from .agreement import Agreement
from .algorithms import CHOICES
from .arrays import copy_of, first_array, is_shape_only, leaves, round_to, same_bits
from .deadlock import deadlock_report
from .engine import Engine
from .errors import BufferInUse, DeadlockError, UnreceivedMessage
from .network import FluidNetwork
from .processor import Processor
from .requests import Send, site_text
from .trace import Trace


class Machine(Agreement):
    """Everything one run shares: clock, network, mailboxes, trace."""

    algorithms = CHOICES  # of each collective; the first is the default

    def __init__(self, topology, devices):
        super().__init__()
        self.topology, self._ranks = topology, topology.ranks
        self._slowdown = any(device.overlap_slowdown for device in devices)
        self.network = FluidNetwork(topology, self._arrived)
        self.engine = Engine(self.network)
        self.trace = Trace()
        self.processors = [Processor(self, rank, device) for rank, device in enumerate(devices)]
        self._sends, self._receives = {}, {}  # (dest, context, tag) -> posted halves, oldest first
        self._arrivals = [f"receive from rank {rank}" for rank in range(len(devices))]
        self._floors = {}  # (source, dest) -> seconds that a message takes at least
        self._late = []  # messages whose bytes are there and whose floor is not over
        self._protected = {}  # id of an array in flight -> [messages it is in, the array]

    # ---- messages -------------------------------------------------------------------------------------------------

    def post_send(self, send):
        """Match a send with the oldest receive that takes it, or keep it."""
        waiting = self._receives.get(send.key)
        if waiting is not None:
            for index, receive in enumerate(waiting):
                if receive.sender is None or receive.sender == send.rank:
                    take(self._receives, send.key, waiting, index)
                    return self._start(send, receive)
        self._sends.setdefault(send.key, []).append(send)

    def post_receive(self, receive):
        waiting = self._sends.get(receive.key)
        if waiting:
            for index, send in enumerate(waiting):
                if receive.sender is None or receive.sender == send.rank:
                    take(self._sends, receive.key, waiting, index)
                    return self._start(send, receive)
        self._receives.setdefault(receive.key, []).append(receive)

    def withdraw(self, half):
        """Take back a posted half that has not met its other side."""
        for box in (self._sends, self._receives):
            posted = box.get(half.key, ())
            if half in posted:
                take(box, half.key, posted, posted.index(half))
        if isinstance(half, Send):
            self._release(half)

    def _start(self, send, receive):
        send.matched = receive.matched = True
        receive.sender = send.rank
        receive.payload = send.snapshot
        send.snapshot = None
        self.processors[receive.rank].memory.track(receive.payload, self._arrivals[send.rank])
        if self._slowdown:
            self._flows_changed(send, receive, +1)
        ranks = self._ranks
        self.network.start(ranks[send.rank], ranks[receive.rank], send.nbytes, (send, receive, self.engine.now))

    def _arrived(self, message):
        send, receive, start = message
        source, dest, now = send.rank, receive.rank, self.engine.now
        floor = self._floors.get((source, dest))
        if (due := start + (self._floor(source, dest) if floor is None else floor)) > now:
            self._late.append(message)
            return self.engine.call_at(due, lambda: self._arrived(self._late.pop(self._late.index(message))))
        if self._slowdown:
            self._flows_changed(send, receive, -1)
        self.trace.message(source, dest, send.label, send.nbytes, send.posted, receive.posted, start, now)
        if send.protected:
            self._check_untouched(send, receive.payload)
            self._release(send)
        send.payload = None
        if send.waiters:
            send.complete()
        else:
            send.done = True
        payload, receive.payload = receive.payload, None
        if send.wire is not None:
            round_to(send.wire, payload)
        receive.complete(payload)

    def _floor(self, source, dest):
        """Seconds that a message takes at least: the largest floor of the links on its route."""
        a, b = self._ranks[source], self._ranks[dest]
        links = (self.topology.link(u, v) for u, v in self.topology.route(a, b))
        found = self._floors[source, dest] = max((link.floor for link in links), default=0.0)
        return found

    def _flows_changed(self, send, receive, by):
        for rank in {send.rank, receive.rank}:
            self.processors[rank].flows_changed(by)

    # ---- buffers in flight ----------------------------------------------------------------------------------------

    def protect(self, send):
        """Copy what is sent and make the originals read-only until the message has arrived."""
        payload, send.protected = send.payload, None
        send.snapshot = copy_of(payload)
        first = payload if type(payload) is np.ndarray else first_array(payload)
        if first is None or is_shape_only(first):
            return
        send.protected = list(leaves(send.payload))
        self.lock(send.protected)

    def lock(self, arrays):
        """Make arrays read-only until `_release`."""
        for array in arrays:
            if entry := self._protected.get(id(array)):
                entry[0] += 1
            elif array.flags.writeable:
                array.flags.writeable = False
                self._protected[id(array)] = [1, array]

    def _release(self, send):
        for array in send.protected or ():
            entry = self._protected.get(id(array))
            if entry:
                entry[0] -= 1
                if not entry[0]:
                    del self._protected[id(array)]
                    array.flags.writeable = True
        send.protected = None

    def _check_untouched(self, send, received):
        """A write through another view of the memory escapes the read-only flag; the contents do not."""
        for now, before in zip(leaves(send.payload), leaves(received), strict=True):
            if not is_shape_only(now) and not same_bits(now, before):
                raise self.buffer_in_use(send.rank, [send])

    def buffer_in_use(self, rank, sends):
        lines = "\n".join(f"  {s}   posted at {site_text(s.site)}" for s in sends)
        return BufferInUse(
            f"rank {rank} wrote to an array that is being sent:\n{lines}\n"
            "Wait for the request first, or send a copy: the network may read the array until then."
        )

    def sends_in_flight(self, rank):
        """Sends of `rank` whose arrays are read-only now."""
        pending = [s for box in self._sends.values() for s in box if s.rank == rank]
        moving = [m[0] for m in (*self.network.in_flight(), *self._late) if m[0].rank == rank]
        return pending + moving

    # ---- waiting --------------------------------------------------------------------------------------------------

    def block(self, request, timeout=None):
        """Park the running task until `request` is done, or its timeout is over."""
        engine, task = self.engine, getcurrent()
        start = engine.now
        if timeout is None:
            while not request.done:
                _join(request, task)
                engine.park(request, task)
        else:
            self._block_until(request, task, start + timeout)
        if engine.now > start:
            self.trace.wait(task.rank, request.label, start, engine.now)

    def join(self, request):
        """Somebody has waited for this sub-task. An engine that only queues work sees to the order here."""

    def _block_until(self, request, task, deadline):
        engine, expired = self.engine, []
        timer = engine.call_at(deadline, lambda: (expired.append(True), engine.wake(task)), task.rank)
        while not request.done and not expired:
            _join(request, task)
            engine.park(request)
        timer.cancel()
        if request.waiters and task in request.waiters:
            request.waiters.remove(task)

    def block_any(self, requests):
        engine, task = self.engine, getcurrent()
        start, plain = (
            engine.now,
            [part for request in requests for part in request.requests() if not part.done],
        )
        for part in plain:
            _join(part, task)
        engine.park("wait_any of " + ", ".join(map(str, requests)))
        for part in plain:
            if part.waiters and task in part.waiters:
                part.waiters.remove(task)
        if engine.now > start:
            self.trace.wait(task.rank, "wait_any", start, engine.now)

    # ---- mistakes -------------------------------------------------------------------------------------------------

    def deadlock(self):
        """Say who waits for what, since when, and where in the source."""
        raise DeadlockError(deadlock_report(self.engine, len(self.processors)))

    def check_nothing_left(self):
        """After a clean end: no message may be left without its other side."""
        for box, what, advice in (
            (self._sends, "never received", "Post a receive with the same source and tag, or do not send."),
            (self._receives, "never served", "Send a message with the same tag, or cancel() the receive."),
        ):
            left = [half for halves in box.values() for half in halves]
            if left:
                rows = [f"  rank {h.rank}   {h}   posted at {site_text(h.site)}" for h in left[:8]]
                first = f"the run ended with messages that were {what}: {len(left)}."
                raise UnreceivedMessage("\n".join([first, *rows, advice]))


def take(box, key, posted, index):
    """Remove one of the halves posted under `key`; no empty list stays in the box."""
    if len(posted) == 1:
        del box[key]
    else:
        del posted[index]


def _join(request, task):
    if request.waiters is None:
        request.waiters = [task]
    else:
        request.waiters.append(task)
