"""Requests: what non-blocking operations return. `wait`, `test`, `cancel`, as in MPI."""

import sys
from pathlib import Path

from .errors import RequestCancelled, RequestTimeout

_HERE = str(Path(__file__).parent)


class _Own(dict):
    """File name -> is it one of the runtime's own? Remembered, because every message asks."""

    def __missing__(self, file):
        self[file] = file.startswith(_HERE)
        return self[file]


_own = _Own()


def call_site():
    """Where the program called the runtime; `site_text` reads it."""
    frame = sys._getframe(2)
    return outside_runtime(frame) if _own[frame.f_code.co_filename] else (frame.f_code, frame.f_lasti)


def outside_runtime(frame):
    """(code, last instruction) of the innermost frame that is not the runtime's own, or None."""
    while frame is not None and _own[frame.f_code.co_filename]:
        frame = frame.f_back
    return None if frame is None else (frame.f_code, frame.f_lasti)


def site_text(site):
    """`'my_ring.py:31'` for what `call_site` returned; `'cell [4] line 2'` in a notebook."""
    if site is None:
        return "?"
    code, last = site
    line = next((line for start, end, line in code.co_lines() if start <= last < end and line), code.co_firstlineno)
    cell = _cell(code.co_filename)
    return f"{cell} line {line}" if cell else f"{Path(code.co_filename).name}:{line}"


def _cell(file):
    """`'cell [4]'` for the source of a notebook's cell, else None. A kernel writes cells to files of odd names."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    named = shell.compile.format_code_name(file) if shell else None  # ("Cell", "In[4]")
    if named:
        return "cell " + named[1].removeprefix("In")
    return "cell," if Path(file).parent.name.startswith("ipykernel_") else None


class Request:
    """Something under way. `wait()` returns its value: the received arrays, or a sub-task's result."""

    __slots__ = ("cancelled", "done", "label", "machine", "posted", "site", "value", "waiters")

    def __init__(self, machine, label, site):
        self.machine, self.label, self.site = machine, label, site
        self.posted = machine.engine.now
        self.done = self.cancelled = False
        self.value = self.waiters = None

    def wait(self, timeout=None):
        """Block until done and return the value.

        timeout  virtual seconds
        raises   RequestTimeout, RequestCancelled, PeerCrashed
        """
        if timeout is not None and not timeout >= 0:
            raise ValueError(f"a timeout is a number of seconds, at least 0, not {timeout}")
        if not self.done:
            self.machine.block(self, timeout)
            if not self.done:
                raise RequestTimeout(f"{self} at {site_text(self.site)} was not done within {timeout} s")
        if self.cancelled:
            if self.cancelled is not True:
                raise self.cancelled  # the other side has crashed
            raise RequestCancelled(f"{self} at {site_text(self.site)} was cancelled; do not wait for it")
        return self.value

    def test(self):
        """True when done. Otherwise lets time pass to the next event of the run, so that polling ends."""
        if not self.done:
            self.machine.engine.poll(self)
        return self.done

    def cancel(self):
        """Take back a message that has not met its other side. True if it was taken back."""
        return False

    def complete(self, value=None):
        self.done, self.value = True, value
        if self.waiters:
            for task in self.waiters:
                self.machine.engine.wake(task)
            self.waiters = None

    def requests(self):
        """The plain requests this one stands for."""
        return (self,)


class Half(Request):
    """One side of a message; it starts to move when the other side has posted too."""

    __slots__ = ("collective", "key", "matched", "rank")

    def __init__(self, machine, label, site, rank, key, collective):
        self.machine, self.label, self.site = machine, label, site
        self.posted = machine.engine.now
        self.done = self.cancelled = self.matched = False
        self.value = self.waiters = None
        self.rank, self.key, self.collective = rank, key, collective

    def cancel(self):
        if self.matched or self.done:
            return False
        self.machine.withdraw(self)
        self.cancelled = True
        self.complete()
        return True


class Send(Half):
    """A posted send. The buffer is read-only until it is done."""

    __slots__ = ("nbytes", "payload", "peer", "protected", "snapshot", "wire")

    def __str__(self):
        return f"send(dest={self.peer}{tag_text(self.key)})" + _inside(self)


class Receive(Half):
    """A posted receive. `value` is the payload; `source` the rank that sent it."""

    __slots__ = ("payload", "ranks", "sender", "wanted")

    @property
    def source(self):
        """The rank that sends, in the communicator of the receive; None while nobody has been found."""
        return None if self.sender is None else self.ranks.index(self.sender)

    def __str__(self):
        return f"recv(source={'ANY' if self.wanted is None else self.wanted}{tag_text(self.key)})" + _inside(self)


class Both(Request):
    """A send and a receive waited for together: what `ishift` returns; `wait()` gives what arrived."""

    __slots__ = ("receive", "send")

    def __init__(self, send, receive):
        self.send, self.receive = send, receive

    @property
    def machine(self):
        return self.send.machine

    @property
    def done(self):
        return self.send.done and self.receive.done

    @property
    def value(self):
        return self.receive.value

    def wait(self, timeout=None):
        deadline = None if timeout is None else self.machine.engine.now + timeout
        received = self.receive.wait(timeout)
        if not self.send.done:
            self.send.wait(None if deadline is None else deadline - self.machine.engine.now)
        return received

    def cancel(self):
        if self.send.matched or self.receive.matched:
            return False
        return self.send.cancel() and self.receive.cancel()

    def requests(self):
        return (self.send, self.receive)

    def __str__(self):
        return f"{self.send} and {self.receive}"


class SubTask(Request):
    """A function running beside its rank's program, as `task`; `wait()` gives its result."""

    __slots__ = ("task",)

    def wait(self, timeout=None):
        value = super().wait(timeout)
        self.machine.join(self)
        return value

    def __str__(self):
        return self.label


def tag_text(key):
    tag = key[-1]
    return f", tag={tag!r}" if tag != 0 else ""


def _inside(half):
    return f" in {half.collective}" if half.collective else ""


def wait_any(requests):
    """Block until one of the requests is done. Returns (index, value) of the first in the list that is."""
    requests = list(requests)
    if not requests:
        raise ValueError("wait_any needs at least one request")
    while True:
        for index, request in enumerate(requests):
            if request.done:
                return index, request.wait()
        requests[0].machine.block_any(requests)


def wait_all(requests):
    """Wait for every request. Returns their values in order."""
    return [request.wait() for request in requests]
