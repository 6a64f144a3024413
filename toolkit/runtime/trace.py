"""What happened: every kernel, message and wait of a run, kept as columns of numbers and read as `Event`s."""

from collections.abc import Sequence
from functools import cached_property
from struct import Struct
from typing import NamedTuple

import numpy as np

_KERNEL, _MESSAGE, _WAIT = (Struct(f"{columns}d").pack for columns in (7, 8, 4))  # one row of float64


class Event(NamedTuple):
    """One bar of the timeline. Times in virtual seconds."""

    rank: int
    stream: str  # "compute", "send", "recv", "wait", or "<tag> send" …; events of one rank and stream never overlap
    kind: str  # "compute" | "send" | "recv" | "wait"
    name: str  # the kernel, the tag, or what was waited for
    start: float  # a message starts when both sides have posted
    end: float
    bytes: int  # moved by the kernel, or carried by the message
    flops: float
    peer: int  # the other rank of a message, else -1
    posted: float  # when this side posted the message; start for everything else


class _Ids(dict):
    """Name -> number, in order of first use."""

    def __missing__(self, name):
        self[name] = number = len(self)
        return number


class Trace(Sequence):
    """All events of a run, sorted by start, then rank, then stream. A sequence of `Event`."""

    def __init__(self):
        self._ids = _Ids()
        self._kernels, self._messages, self._waits = bytearray(), bytearray(), bytearray()

    def kernel(self, rank, stream, name, start, end, nbytes, flops):
        self._kernels += _KERNEL(rank, self._ids[stream], self._ids[name], start, end, nbytes, flops)

    def message(self, source, dest, tag, nbytes, send_posted, recv_posted, start, end):
        self._messages += _MESSAGE(source, dest, self._ids[tag], nbytes, send_posted, recv_posted, start, end)

    def wait(self, rank, name, start, end):
        self._waits += _WAIT(rank, self._ids[name], start, end)

    def add(self, other):
        """Take in the events of another trace."""
        number = np.array([self._ids[name] for name in other._ids], np.float64)
        for mine, theirs, named in (
            (self._kernels, other.kernels, [1, 2]),
            (self._messages, other.messages, [2]),
            (self._waits, other.waits, [1]),
        ):
            rows = theirs.copy()
            rows[:, named] = number[rows[:, named].astype(int)]
            mine += rows.tobytes()

    @property
    def messages(self):
        """Messages as columns: source, destination, name id, bytes, send posted, receive posted, start, end."""
        return np.frombuffer(self._messages, np.float64).reshape(-1, 8)

    @property
    def kernels(self):
        """Kernel calls as columns: rank, stream id, name id, start, end, bytes, flops."""
        return np.frombuffer(self._kernels, np.float64).reshape(-1, 7)

    @property
    def waits(self):
        """Blocked intervals as columns: rank, name id, start, end."""
        return np.frombuffer(self._waits, np.float64).reshape(-1, 4)

    @cached_property
    def events(self):
        name, found = list(self._ids), []
        for rank, stream, what, start, end, nbytes, flops in self.kernels.tolist():
            found.append(
                Event(
                    int(rank),
                    name[int(stream)],
                    "compute",
                    name[int(what)],
                    start,
                    end,
                    int(nbytes),
                    flops,
                    -1,
                    start,
                )
            )
        for source, dest, tag, nbytes, sent, received, start, end in self.messages.tolist():
            label = name[int(tag)]
            for rank, kind, peer, posted in ((source, "send", dest, sent), (dest, "recv", source, received)):
                stream = f"{label} {kind}" if label != "message" else kind
                found.append(Event(int(rank), stream, kind, label, start, end, int(nbytes), 0.0, int(peer), posted))
        for rank, what, start, end in self.waits.tolist():
            found.append(Event(int(rank), "wait", "wait", name[int(what)], start, end, 0, 0.0, -1, start))
        found.sort()
        return tuple(sorted(_in_lanes(found), key=lambda e: (e.start, e.rank, e.stream, e.end)))

    def __len__(self):
        return len(self.kernels) + 2 * len(self.messages) + len(self.waits)

    def __getitem__(self, index):
        return self.events[index]

    def __repr__(self):
        return "\n".join(map(repr, self.events))


def _in_lanes(events):
    """Give messages that overlap on one stream lanes of their own: "send", "send 2", …"""
    lanes = {}  # (rank, stream) -> end of the last event in each lane
    for event in sorted(events, key=lambda e: (e.start, e.end)):
        ends = lanes.setdefault((event.rank, event.stream), [])
        lane = next((i for i, end in enumerate(ends) if end <= event.start), len(ends))
        ends[lane : lane + 1] = [event.end]
        yield event if lane == 0 else event._replace(stream=f"{event.stream} {lane + 1}")
