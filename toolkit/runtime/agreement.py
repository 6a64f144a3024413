"""Agreement: the ranks of a communicator enter the same collectives in the same order, or hear who did not."""

from typing import NamedTuple

from greenlet import getcurrent

from .errors import CollectiveMismatch


class Entry(NamedTuple):
    """One rank enters a collective: what it says it does, and where in its source."""

    name: str
    signature: dict
    rank: int
    site: str


def compare(number, mine, theirs):
    """Raise CollectiveMismatch, naming both ranks, if two entries are not the same."""
    if (theirs.name, theirs.signature) == (mine.name, mine.signature):
        return
    same_name = theirs.name == mine.name
    differs = [k for k in mine.signature if theirs.signature.get(k) != mine.signature[k]] if same_name else []
    said = [(entry, ", ".join(f"{k}={entry.signature[k]!r}" for k in differs)) for entry in (theirs, mine)]
    rows = "\n".join(f"  rank {entry.rank}   {entry.name}({what})   {entry.site}" for entry, what in said)
    raise CollectiveMismatch(
        f"collective number {number} of this communicator is not the same on all ranks:\n{rows}\n"
        "Every rank must enter the same collectives, in the same order, with the same "
        f"{' and '.join(differs) or 'operation'}."
    )


class Agreement:
    """How ranks that share a memory agree: outside the network, and in no time."""

    def __init__(self):
        self.contexts = {}  # what a communicator or collective is called -> its number
        self._entered = {}  # collective in progress -> [the first entry, ranks still to come]
        self._meetings = {}  # (context, number) -> ({rank: value}, tasks that wait)

    def agree(self, comm, mine):
        """Compare with the first rank that entered this collective."""
        key = (comm._context, comm._entered)
        first = self._entered.setdefault(key, [mine, comm.size])
        first[1] -= 1
        if not first[1]:
            del self._entered[key]
        compare(comm._entered, mine, first[0])

    def meet(self, comm, name, value):
        """Wait for all ranks of `comm`; returns {rank: value}."""
        values, waiting = self._meetings.setdefault((comm._context, comm._entered), ({}, []))
        values[comm.rank] = value
        if len(values) < comm.size:
            waiting.append(getcurrent())
            self.engine.park(f"{name}: not all of its {comm.size} ranks have called it")
        else:
            for task in waiting:
                self.engine.wake(task)
        return values
