"""What a trace of the two-level machine proves: the counting lemma, epoch by epoch, and the replay game.

Source: Saha and Ye 2024, arXiv 2402.07443. Chapter: attention/io_complexity.
"""

from functools import partial
from typing import NamedTuple

import numpy as np

from toolkit.kernels.fast_memory import add_products
from toolkit.runtime.errors import ShapeError


def epochs(trace, words):
    """Cut a trace between events into stretches of at most `words` I/Os, each as long as can be.

    returns   list of lists of Event
    raises    ShapeError   one transfer alone is longer
    """
    pieces, begin, before = [[]], 0, 0  # the I/O clock when the stretch began, and before this event
    for event in trace:
        if event.io - before > words:
            raise ShapeError(f"a transfer of {event.io - before} words does not fit an epoch of {words}")
        if event.io - begin > words:
            pieces.append([])
            begin = before
        pieces[-1].append(event)
        before = event.io
    return pieces


class Epoch(NamedTuple):
    """What a stretch of at most M transfers did: words moved, scores completed, scalar products q·k made."""

    io: int
    entries: int
    products: int


def progress(fast):
    """Follow every score through the trace of a machine, shape-only or not.

    A score that is not made as a sum of d products, as Strassen's are not, counts for nothing.
    returns  list of Epoch
    """
    scores, result, before = _Scores(fast), [], 0
    for events in epochs(fast.trace, fast.capacity):
        done = [scores.see(event) for event in events]
        result.append(Epoch(events[-1].io - before, sum(e for e, _ in done), sum(p for _, p in done)))
        before = events[-1].io
    return result


class _Scores:
    """How many of its d products each score has, as the events of a trace go by."""

    def __init__(self, fast):
        self.tokens, self.head_dim = fast.slow["q"].shape
        self.have, self.home = np.zeros((self.tokens, self.tokens), np.int32), {}

    def see(self, event):
        """(scores completed, products made) by one event."""
        if event.kind == "load":
            self.home[event.blocks[0]] = event.what
        if event.kind != "compute":
            return 0, 0
        sources = [self.home.get(number) for number in event.blocks]
        for number in event.blocks[: event.what.writes]:  # no longer what was loaded
            self.home.pop(number, None)
        if event.what is not add_products or [source and source[0] for source in sources[1:]] != ["q", "k"]:
            return 0, 0
        q, k = (where for _, where in sources[1:])
        columns = range(self.head_dim)[q[1]] if len(q) > 1 else range(self.head_dim)
        part = self.have[q[0], k[0]]
        part += len(columns)
        return np.count_nonzero(part == self.head_dim) if columns.stop == self.head_dim else 0, part.size * len(columns)


# ---- the replay game -------------------------------------------------------------------------------------------------


class Transcript(NamedTuple):
    """One epoch of the replay game: what Bob is given, and what he has to reproduce.

    events   the schedule, public          completing  for each of its computes: does a tile of scores become complete?
    start    number -> block, all that fast memory holds when the epoch begins
    message  the words loaded in it, in order
    tiles    the scores that Alice completes in it
    """

    events: list
    completing: list
    start: dict
    message: list
    tiles: list

    @property
    def words(self):
        """Words that Bob is given: at most M at the start, and at most M that were loaded."""
        return sum(block.size for block in (*self.start.values(), *self.message))

    @property
    def entries(self):
        """Scores that he has to reproduce."""
        return sum(tile.size for tile in self.tiles)


def transcripts(fast):
    """Alice's part: do the schedule of a finished machine again, and write each epoch of M transfers down.

    returns  list of Transcript
    """
    slow = {name: a.copy() if name in ("q", "k", "v") else np.full(a.shape, np.nan) for name, a in fast.slow.items()}
    held, scores, result = {}, _Scores(fast), []

    def write(block, what):
        slow[what[0]][what[1]] = block

    def read_and_tell(message, what):
        message.append(slow[what[0]][what[1]].copy())
        return message[-1]

    for events in epochs(fast.trace, fast.capacity):
        seen = [(event, scores.see(event)[0]) for event in events]
        completing = [entries > 0 for event, entries in seen if event.kind == "compute"]
        start, message = {number: block.copy() for number, block in held.items()}, []
        tiles = _completed(events, completing, held, partial(read_and_tell, message), write)
        result.append(Transcript(events, completing, start, message, tiles))
    return result


def reproduce(transcript):
    """Bob's part: the tiles of scores that the epoch completes, from its transcript and nothing else.

    This links I/O to communication: scores that take many words to describe cannot come out of few transfers.
    """
    told = iter(transcript.message)
    start = {number: block.copy() for number, block in transcript.start.items()}
    return _completed(
        transcript.events, transcript.completing, start, lambda what: next(told), lambda block, what: None
    )


def _completed(events, completing, held, read, write):
    steps = zip(_execute(events, held, read, write), completing, strict=True)
    return [blocks[event.blocks[0]].copy() for (event, blocks), complete in steps if complete]


def _execute(events, blocks, read, write):
    """Do again what a trace says. A generator: (event, blocks) after each compute.

    blocks   dict: number -> array, what fast memory holds; changed in place
    read     (name, slices) -> the words of a load          write   called with (block, (name, slices)) at a store
    """
    for event in events:
        if event.kind == "load":
            blocks[event.blocks[0]] = np.array(read(event.what), order="C")
        elif event.kind == "alloc":
            blocks[event.blocks[0]] = np.full(*event.what)
        elif event.kind == "store":
            write(blocks[event.blocks[0]], event.what)
        elif event.kind == "free":
            for number in event.blocks:
                del blocks[number]
        else:
            event.what(*(blocks[number] for number in event.blocks))
            yield event, blocks
