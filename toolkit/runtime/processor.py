"""One rank's device: its compute engine, its memory, its streams."""

from greenlet import getcurrent

from .memory import Memory
from .units import seconds


class Processor:
    """One rank's device: its compute engine, its memory, its streams, its messages in flight."""

    launch = None  # (kernel, args, options) -> result, on a device that runs kernels in its own way

    def __init__(self, machine, rank, device):
        self.machine, self.rank, self.device = machine, rank, device
        self.memory = Memory(rank, device, machine.engine)
        self.free_at = 0.0  # when the compute engine has done all that was started
        self.streams = {}
        self.pace = None  # (start, seconds) -> seconds, when faults change how long kernels take
        self.flows = 0  # transfers that enter or leave this device now
        self.queue = []  # tasks that compute at a speed that depends on `flows`: the first runs, the others wait

    def spawn(self, function, site=None, lane="compute"):
        """Run `function()`, asked for at `site`, as a task of this rank. What it raises ends the run, with its rank."""

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

        return self.machine.engine.spawn(body, self.rank, self, lane, site)

    def call(self, function, args, options):
        """The arithmetic of a kernel."""
        return function(*args, **options)

    def compute(self, name, flops, nbytes, dtype, result, kind=None):
        """Run a kernel: take the engine when it is free, for as long as the roofline and the curve of its kind say."""
        task = getcurrent()
        if result is not None:
            self.memory.track(result, name)
        duration = self.device.seconds(flops, nbytes, dtype, kind or name)
        if task.stream is None:
            self.occupy(name, flops, nbytes, duration, task.lane)
        else:
            lane = task.stream.name
            task.stream.enqueue(lambda: self.occupy(name, flops, nbytes, duration, lane))

    def occupy(self, name, flops, nbytes, duration, lane):
        """Hold the compute engine for `duration`; kernels of one device take turns."""
        engine = self.machine.engine
        start = max(engine.now, self.free_at)
        if self.pace is not None:
            duration = self.pace(start, duration)
        if duration == 0.0 and start == engine.now:
            pass  # an ideal device: nothing to wait for, but a row in the trace
        elif self.device.overlap_slowdown:
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
