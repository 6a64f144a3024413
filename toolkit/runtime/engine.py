"""The event engine: a virtual clock, tasks that are greenlets, timers. Knows nothing of ranks' programs or messages.

The engine always resumes the runnable task with the smallest virtual time, ties by rank, then by sequence number:
the same program gives the same order of events, always. Nothing runs ahead of the clock.
"""

from heapq import heapify, heappop, heappush

from greenlet import GreenletExit, getcurrent, greenlet

AFTER_ALL_RANKS = 1 << 60


class Task(greenlet):
    """One line of execution. `rank` orders ties; `owner` is whatever the creator wants to find again."""

    def __init__(self, function, rank, owner=None):
        super().__init__(function)
        self.rank, self.owner = rank, owner
        self.stream = None  # where `with comm.stream(…)` sends kernels and messages
        self.lane = "compute"  # the timeline row of this task's kernels
        self.in_kernel = False
        self.waiting_for = None  # a Request, or text, while parked and not yet woken
        self.site = None  # where it was started, when that is the best place to name
        self.since = 0.0


class Timer:
    """A function to call at a time, unless cancelled."""

    __slots__ = ("cancelled", "function")

    def __init__(self, function):
        self.function, self.cancelled = function, False

    def cancel(self):
        self.cancelled = True


class Engine:
    """Runs tasks and timers in virtual time, together with one source of timed events, the network.

    The network offers `settle(now)` (take in what started at this instant), `next_time` and `advance(time)`.
    """

    def __init__(self, network):
        self.now = 0.0
        self.network = network
        self.tasks = []  # every task that has not ended, in order of creation
        self._heap, self._sequence, self._polling = [], 0, []
        self._hub = getcurrent()

    def spawn(self, function, rank, owner=None, lane="compute", site=None):
        """Start `function()` as a task at the current instant. lane, site: as in Task."""

        def body():
            try:
                function()
            finally:
                self.tasks.remove(task)

        task = Task(body, rank, owner)
        task.lane, task.site = lane, site
        task.parent = self._hub
        self.tasks.append(task)
        self._resume_at(self.now, task.rank, task)
        return task

    def wake(self, task):
        """Make a parked task runnable at the current instant; one that is not parked, or was woken already, is left."""
        if task.waiting_for is not None:
            task.waiting_for = None
            self._sequence += 1
            heappush(self._heap, (self.now, task.rank, self._sequence, task))

    def _resume_at(self, time, rank, target):
        self._sequence += 1
        heappush(self._heap, (time, rank, self._sequence, target))

    def call_at(self, time, function, rank=-1):
        """Call `function()` at a virtual time (not before now). Returns the Timer."""
        timer = Timer(function)
        self._resume_at(max(time, self.now), rank, timer)
        return timer

    def sleep_until(self, time):
        """Suspend the running task until `time`; a time that has passed is now."""
        task = getcurrent()
        self._resume_at(max(time, self.now), task.rank, task)
        self._hub.switch()

    def park(self, waiting_for, task=None):
        """Suspend the running task (a caller that has it at hand may give it) until somebody wakes it."""
        task = task or getcurrent()
        task.waiting_for, task.since = waiting_for, self.now
        self._hub.switch()

    def poll(self, waiting_for):
        """Suspend the running task until anything at all has happened: what a polling loop must do to let time pass."""
        self._polling.append(getcurrent())
        self.park(waiting_for)

    def run(self, on_deadlock):
        """Run until every task has ended. Calls `on_deadlock()` when tasks remain that nothing can wake."""
        heap, network = self._heap, self.network
        try:
            while True:
                if not heap or heap[0][0] > self.now:
                    network.settle(self.now)
                    if self._polling and self._has_work():
                        self._release_pollers()
                time = network.next_time
                if heap and heap[0][0] < time:
                    time, _, _, target = heappop(heap)
                    if type(target) is Task:
                        self.now = time
                        target.switch()
                    elif not target.cancelled:
                        self.now = time
                        target.function()
                elif time < float("inf"):
                    self.now = time
                    network.advance(time)
                elif not self.tasks:
                    return
                else:
                    on_deadlock()
        finally:
            self._end_tasks()

    def forget(self, rank):
        """End every task of `rank`, at once and for good, and drop its timers. Called from a timer."""
        for task in [task for task in self.tasks if task.rank == rank]:
            task.throw(GreenletExit)  # its `finally` blocks run
            task.waiting_for = None  # whoever wakes it later finds nobody
        self.tasks[:] = [task for task in self.tasks if task.rank != rank]  # one that had not begun is still listed
        self._heap[:] = [e for e in self._heap if (e[3].rank if type(e[3]) is Task else e[1]) != rank]
        heapify(self._heap)

    def _has_work(self):
        return any(type(e[3]) is Task or not e[3].cancelled for e in self._heap) or self.network.next_time < float(
            "inf"
        )

    def _release_pollers(self):
        """Resume polling tasks right after the next event, whenever that is."""
        soonest = min([e[0] for e in self._heap[:1]] + [self.network.next_time])
        for task in self._polling:
            if task.waiting_for is not None:
                task.waiting_for = None
                self._resume_at(soonest, AFTER_ALL_RANKS, task)
        self._polling = []

    def _end_tasks(self):
        """Unwind what is left after an error, so that no frame keeps arrays alive."""
        for task in list(self.tasks):
            if task:
                task.throw(GreenletExit)
