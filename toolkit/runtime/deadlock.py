"""What a deadlock looks like from outside: who waits for what, since when, and where in the source."""

from .requests import outside_runtime, site_text
from .units import seconds

SHOWN = 16  # ranks named in a report


def deadlock_report(engine, ranks):
    """The message of a DeadlockError: a diagnosis, a row for each stuck task, advice."""
    tasks = [t for t in engine.tasks if t.waiting_for is not None]
    stuck = sorted((t.rank, str(t.waiting_for), t.since, _blocked_at(t)) for t in tasks)
    waits = [what for _, what, _, _ in stuck]
    width = max(map(len, waits))
    rows = [f"  rank {r}   {what:<{width}}   since {seconds(t)}   {site}" for r, what, t, site in stuck[:SHOWN]]
    if len(stuck) > SHOWN:
        rows.append(f"  … and {len(stuck) - SHOWN} more")
    first = f"Deadlock at {seconds(engine.now)}: {_diagnosis(waits, ranks)}"
    return "\n".join([first, *rows, _advice(waits)])


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
    in_collective = any(" in " in what for what in waits)
    if not in_collective and all(what.startswith(("recv", "send")) for what in waits):
        return "Post one side first: isend before recv, or ishift, which does both."
    return "All ranks must enter the same collectives in the same order; every message needs both sides."
