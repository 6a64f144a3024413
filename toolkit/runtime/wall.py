"""A rank on a real machine: tasks, streams and requests as in the virtual one, and the wall's clock."""

from heapq import heappop
from time import perf_counter, sleep

from greenlet import getcurrent

from .engine import AFTER_ALL_RANKS, Engine, Task
from .processor import Processor

PATIENT, SLEEPY = 200, 2000  # polls in vain until other threads may run; until the processor rests between polls


class WallEngine(Engine):
    """Runs the tasks of one process, and polls a wire when none can go on.

    wire       offers `progress()`: move what can move; True if anything happened
    patience   seconds without any event until `on_deadlock` is called
    """

    def __init__(self, wire, patience):
        self.began, self.patience = perf_counter(), patience
        super().__init__(wire)

    @property
    def now(self):
        """Seconds since the run began."""
        return perf_counter() - self.began

    @now.setter
    def now(self, _):
        """The wall's clock is not set."""

    def spawn(self, function, rank, owner=None, lane="compute", site=None):
        """Start `function()` at once, until it first waits: what it sends is then on its way."""
        task = super().spawn(function, rank, owner, lane, site)
        if type(current := getcurrent()) is Task:
            self._resume_at(self.now, current.rank, current)
            self._hub.switch()
        return task

    def poll(self, waiting_for):
        """Let the wire and all other tasks go on, once."""
        task = getcurrent()
        self._resume_at(self.now, AFTER_ALL_RANKS, task)
        self._hub.switch()

    def run(self, on_deadlock):
        heap, idle, heard = self._heap, 0, self.now
        try:
            while self.tasks:
                moved = self.network.progress()
                ready = heap and heap[0][0] <= self.now
                if moved or ready:
                    idle, heard = 0, self.now
                if ready:
                    target = heappop(heap)[3]
                    if type(target) is Task:
                        target.switch()
                    elif not target.cancelled:
                        target.function()
                elif not moved:
                    idle += 1
                    if idle > PATIENT:
                        sleep(0 if idle < SLEEPY else 5e-5)
                    if not heap and self.now - heard > self.patience:
                        on_deadlock()
        finally:
            self._end_tasks()


class WallProcessor(Processor):
    """Kernels take the time they take."""

    def call(self, function, args, options):
        began = self.machine.engine.now
        result = function(*args, **options)
        self._span = began, self.machine.engine.now
        return result

    def compute(self, name, flops, nbytes, dtype, result, kind=None):
        """Write down a kernel that has just run."""
        if result is not None:
            self.memory.track(result, name)
        self.machine.trace.kernel(self.rank, getcurrent().lane, name, *self._span, nbytes, flops)


class SameEverywhere:
    """Names of contexts instead of numbers: each process makes its own, and all make the same."""

    def setdefault(self, key, _):
        return key

    def __len__(self):
        return 0
