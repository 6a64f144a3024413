"""The machine behind a run: it matches messages, moves them over the network, and keeps the books.

A transfer starts when both sides have posted (rendezvous). From then until it ends the sent array is read-only, and
the receiver's copy counts as the receiver's memory.
"""

from collections import defaultdict

from greenlet import getcurrent

from .arrays import copy_of, first_array, is_shape_only, leaves, map_arrays, round_to, same_bits
from .engine import Engine
from .errors import BufferInUse, DeadlockError, UnreceivedMessage
from .memory import Memory
from .network import FluidNetwork
from .requests import Send, outside_runtime, site_text
from .trace import Trace
from .units import seconds


class Processor:
    """One rank's device: its compute engine, its memory, its streams, its messages in flight."""

    def __init__(self, machine, rank, device):
        self.machine, self.rank, self.device = machine, rank, device
        self.memory = Memory(rank, device, machine.engine)
        self.free_at = 0.0  # when the compute engine has done all that was started
        self.streams = {}
        self.flows = 0  # transfers that enter or leave this device now
        self.queue = []  # tasks that compute at a speed that depends on `flows`: the first runs, the others wait

    def spawn(self, function, site=None):
        """Run `function()`, asked for at `site`, as a task of this rank. What it raises ends the run and names the rank."""

        def body():
            try:
                function()
            except Exception as error:
                machine = self.machine
                if isinstance(error, ValueError) and "read-only" in str(error):
                    if sends := machine.sends_in_flight(self.rank):
                        error = machine.buffer_in_use(self.rank, sends).with_traceback(error.__traceback__)
                error.add_note(f"raised on rank {self.rank} at {seconds(machine.engine.now)}")
                raise error

        task = self.machine.engine.spawn(body, self.rank, self)
        task.site = site
        return task

    def compute(self, name, flops, nbytes, dtype, result):
        """Run a kernel: take the engine when it is free, for as long as the roofline says."""
        task = getcurrent()
        if result is not None:
            self.memory.track(result, name)
        duration = self.device.seconds(flops, nbytes, dtype)
        if task.stream is None:
            self.occupy(name, flops, nbytes, duration, task.lane)
        else:
            lane = task.stream.name
            task.stream.enqueue(lambda: self.occupy(name, flops, nbytes, duration, lane))

    def occupy(self, name, flops, nbytes, duration, lane):
        """Hold the compute engine for `duration`; kernels of one device take turns."""
        engine = self.machine.engine
        start = max(engine.now, self.free_at)
        if duration == 0.0 and start == engine.now:
            return
        if self.device.overlap_slowdown:
            start = self._occupy_while_slowed(duration)
        else:
            self.free_at = start + duration
            engine.sleep_until(self.free_at)
        self.machine.trace.kernel(self.rank, lane, name, start, engine.now, nbytes, flops)

    def _occupy_while_slowed(self, work):
        """Like `occupy`, at 1 - overlap_slowdown of the speed while a transfer touches the device."""
        engine, task, done = self.machine.engine, getcurrent(), []
        self.queue.append(task)
        while self.queue[0] is not task:
            engine.park("the compute engine")
        start = engine.now
        while not done:
            since, speed = engine.now, 1.0 - self.device.overlap_slowdown * (self.flows > 0)
            timer = engine.call_at(since + work / speed, lambda: (done.append(True), engine.wake(task)), self.rank)
            engine.park("compute")
            timer.cancel()
            work = max(0.0, work - (engine.now - since) * speed)
        self.queue.pop(0)
        if self.queue:
            engine.wake(self.queue[0])
        return start

    def flows_changed(self, by):
        before, self.flows = self.flows > 0, self.flows + by
        if self.queue and before != (self.flows > 0):
            self.machine.engine.wake(self.queue[0])


class Machine:
    """Everything one run shares: clock, network, mailboxes, trace."""

    def __init__(self, topology, devices):
        self.topology, self._ranks = topology, topology.ranks
        self._slowdown = any(device.overlap_slowdown for device in devices)
        self.network = FluidNetwork(topology, self._arrived)
        self.engine = Engine(self.network)
        self.trace = Trace()
        self.traffic = defaultdict(int)  # (source, dest) -> payload bytes
        self.processors = [Processor(self, rank, device) for rank, device in enumerate(devices)]
        self.contexts = {}  # what a communicator or collective is called -> its number
        self.collectives = {}  # collective in progress -> (signature, first caller, ranks still to come)
        self._sends, self._receives = {}, {}  # (dest, context, tag) -> posted halves, oldest first
        self._protected = {}  # id of an array in flight -> [messages it is in, the array]

    # ---- messages -------------------------------------------------------------------------------------------------

    def post_send(self, send):
        """Match a send with the oldest receive that takes it, or keep it."""
        waiting = self._receives.get(send.key)
        if waiting is not None:
            for index, receive in enumerate(waiting):
                if receive.sender is None or receive.sender == send.rank:
                    self._take(self._receives, send.key, index)
                    return self._start(send, receive)
        self._sends.setdefault(send.key, []).append(send)

    def post_receive(self, receive):
        waiting = self._sends.get(receive.key)
        if waiting:
            for index, send in enumerate(waiting):
                if receive.sender is None or receive.sender == send.rank:
                    self._take(self._sends, receive.key, index)
                    return self._start(send, receive)
        self._receives.setdefault(receive.key, []).append(receive)

    def withdraw(self, half):
        """Take back a posted half that has not met its other side."""
        for box in (self._sends, self._receives):
            if half in box.get(half.key, ()):
                self._take(box, half.key, box[half.key].index(half))
        if isinstance(half, Send):
            self._release(half)

    @staticmethod
    def _take(box, key, index):
        del box[key][index]
        if not box[key]:
            del box[key]

    def _start(self, send, receive):
        send.matched = receive.matched = True
        receive.sender = send.rank
        receive.payload = send.snapshot
        send.snapshot = None
        sender, receiver = self.processors[send.rank], self.processors[receive.rank]
        receiver.memory.track(receive.payload, f"receive from rank {send.rank}")
        sender.flows_changed(+1)
        receiver.flows_changed(+1)
        ranks = self.topology.ranks
        self.network.start(ranks[send.rank], ranks[receive.rank], send.nbytes, (send, receive, self.engine.now))

    def _arrived(self, message):
        send, receive, start = message
        source, dest = send.rank, receive.rank
        if self._slowdown:
            self._flows_changed(send, receive, -1)
        self.traffic[source, dest] += send.nbytes
        self.trace.message(source, dest, send.label, send.nbytes, send.posted, receive.posted, start, self.engine.now)
        if send.protected:
            self._check_untouched(send, receive.payload)
            self._release(send)
        send.payload = None
        send.complete()
        payload, receive.payload = receive.payload, None
        if send.wire is not None:
            round_to(send.wire, payload)
        receive.complete(payload)

    def _flows_changed(self, send, receive, by):
        for rank in {send.rank, receive.rank}:
            self.processors[rank].flows_changed(by)

    # ---- buffers in flight ----------------------------------------------------------------------------------------

    def protect(self, send):
        """Copy what is sent and make the originals read-only until the message has arrived."""
        payload, send.protected = send.payload, None
        send.snapshot = map_arrays(copy_of, payload)
        if (first := first_array(payload)) is None or is_shape_only(first):
            return
        send.protected = list(leaves(send.payload))
        for array in send.protected:
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
        moving = [m[0] for m in self.network.in_flight() if m[0].rank == rank]
        return pending + moving

    # ---- waiting --------------------------------------------------------------------------------------------------

    def block(self, request, timeout=None):
        """Park the running task until `request` is done, or its timeout is over."""
        engine, task = self.engine, getcurrent()
        start = engine.now
        if timeout is None:
            while not request.done:
                _join(request, task)
                engine.park(request)
        else:
            self._block_until(request, task, start + timeout)
        if engine.now > start:
            self.trace.wait(task.rank, request.label, start, engine.now)

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
        tasks = [t for t in self.engine.tasks if t.waiting_for is not None]
        stuck = sorted((t.rank, str(t.waiting_for), t.since, _blocked_at(t)) for t in tasks)
        width = max(len(what) for _, what, _, _ in stuck)
        lines = [
            f"  rank {r}   {what:<{width}}   since {seconds(since)}   {site}" for r, what, since, site in stuck[:16]
        ]
        if len(stuck) > 16:
            lines.append(f"  … and {len(stuck) - 16} more")
        waits = [what for _, what, _, _ in stuck]
        first = f"Deadlock at {seconds(self.engine.now)}: {_diagnosis(waits, len(self.processors))}"
        raise DeadlockError("\n".join([first, *lines, _advice(waits)]))

    def check_nothing_left(self):
        """After a clean end: no message may be left without its other side."""
        for box, text, advice in (
            (
                self._sends,
                "was never received",
                "Post a receive with the same source and tag, or do not send.",
            ),
            (self._receives, "never got a message", "Send one, or cancel() the receive."),
        ):
            left = [half for halves in box.values() for half in halves]
            if left:
                lines = [f"  rank {h.rank}   {h}   posted at {site_text(h.site)}" for h in left[:8]]
                raise UnreceivedMessage(
                    f"the run ended, and {len(left)} posted operation(s) {text}:\n" + "\n".join(lines) + f"\n{advice}"
                )


def _join(request, task):
    if request.waiters is None:
        request.waiters = [task]
    else:
        request.waiters.append(task)


def _blocked_at(task):
    """Source line, outside the runtime, at which a parked task stands."""
    return site_text(outside_runtime(task.gr_frame) or task.site)


def _diagnosis(waits, ranks):
    who = "both ranks wait" if len(waits) == ranks == 2 else f"{len(waits)} of {ranks} ranks wait"
    if all(what.startswith("recv") for what in waits):
        return f"{who} to receive and nobody sends."
    if all(what.startswith("send") for what in waits):
        return f"{who} to send and nobody receives."
    return f"{who} for something that nobody will do."


def _advice(waits):
    if all(what.startswith(("recv", "send")) for what in waits):
        return "Post one side first: isend before recv, or ishift, which does both."
    return "All ranks must enter the same collectives in the same order; every message needs both sides."
