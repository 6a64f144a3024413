"""Streams: work queued in order beside the rank's program, as on a GPU.

    with comm.stream("copy") as copy:      # kernels and messages in here are queued, the program goes on
        packed = pack(x)
        sent = comm.isend(packed, dest=1)
    …
    copy.wait()                            # the program waits until the queue is empty

Kernels of all streams share the device's one compute engine; transfers do not occupy it. Results of queued kernels
exist at once for the program, as handles do on a GPU; their time is the stream's.
"""

from collections import deque

from greenlet import getcurrent

from .requests import SubTask, call_site


class Stream:
    """One queue of a rank. Enter it to queue work; `wait()` for all of it."""

    def __init__(self, processor, name):
        self.processor, self.name = processor, name
        self._queue, self._working, self._worker, self._outer = deque(), False, None, []

    def __enter__(self):
        task = getcurrent()
        self._outer.append(task.stream)
        task.stream = self
        return self

    def __exit__(self, *_):
        getcurrent().stream = self._outer.pop()

    def enqueue(self, operation):
        """Run `operation()` in the stream's own time, after all that was queued before."""
        self._queue.append(operation)
        if not self._working:
            self._working = True
            self._worker = self.processor.spawn(self._work, call_site(), self.name)

    def wait(self, timeout=None):
        """Block the program until everything queued so far is done."""
        done = SubTask(self.processor.machine, f"stream {self.name!r}", call_site())
        outer, getcurrent().stream = getcurrent().stream, None
        self.enqueue(done.complete)
        done.task = self._worker
        try:
            done.wait(timeout)
        finally:
            getcurrent().stream = outer

    def _work(self):
        while self._queue:
            self._queue.popleft()()
        self._working = False
