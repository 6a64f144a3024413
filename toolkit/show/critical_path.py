"""Why a run took as long as it did: the chain of kernels and messages that nothing could have shortened but itself."""

from bisect import bisect_right


def critical_path(run):
    """Walk back from the event that ended last: what had to end for this one to start?

    A kernel starts when its rank is free: after the message that the rank waited for, or after the kernel before it.
    A message starts when both sides have posted: after whatever ended on the side that posted later. Where nothing
    ended exactly then (a timer, say), the path goes on, after a gap, from what ended last on that rank.

    run      has `.trace`, a sequence of Event
    returns  list of Event in order of time: kernels and messages (the side the path came by), no waits.
             Without gaps their durations add up to the makespan.
    """
    events = [e for e in run.trace if e.kind != "wait"]
    waits = {(e.rank, e.end) for e in run.trace if e.kind == "wait" and e.end > e.start}
    ends = _by_end(events)
    if not any(e.end > e.start for e in events):
        return []
    here = max((e for e in events if e.end > e.start), key=lambda e: (e.end, -e.rank, e.kind == "compute", e.stream))
    path, seen = [here], {here}
    while here is not None:
        rank, moment = _cause(here, ends)
        here = _ended(rank, moment, ends, waits, seen)
        if here is not None:
            path.append(here)
            seen.add(here)
    return path[::-1]


def _by_end(events):
    """rank -> (sorted ends, events in that order)."""
    ranks = {}
    for e in sorted(events, key=lambda e: (e.end, e.start)):
        ends, found = ranks.setdefault(e.rank, ([], []))
        ends.append(e.end)
        found.append(e)
    return ranks


def _cause(event, ends):
    """(rank, moment): where and when something had to end so that `event` could start."""
    if event.kind == "compute":
        return event.rank, event.start
    if event.posted >= event.start:
        return event.rank, event.posted  # this side was the later one
    other = _other_side(event, ends)
    return event.peer, (event.start if other is None else other.posted)


def _other_side(message, ends):
    """The same message as its peer saw it."""
    for e in _ending(message.peer, message.end, ends):
        if (e.peer, e.start, e.name, e.bytes) == (message.rank, message.start, message.name, message.bytes):
            if e.kind != message.kind:
                return e
    return None


def _ending(rank, moment, ends):
    """Events of a rank that end exactly at a moment."""
    times, events = ends.get(rank, ([], []))
    i = bisect_right(times, moment)
    while i and times[i - 1] == moment:
        i -= 1
        yield events[i]


def _ended(rank, moment, ends, waits, seen):
    """What the rank had to finish to be free at a moment; None at the start of the run."""
    now = [e for e in _ending(rank, moment, ends) if e not in seen]
    waited = (rank, moment) in waits
    order = ("recv", "send", "compute") if waited else ("compute", "recv", "send")
    for instant in (False, True):  # an event without duration explains something only as a message between ranks
        found = [e for e in now if (e.end == e.start) == instant and not (instant and e.kind == "compute")]
        if found:
            return min(found, key=lambda e: (order.index(e.kind), e.start, e.stream))
    times, events = ends.get(rank, ([], []))
    earlier = (e for e in reversed(events[: bisect_right(times, moment)]) if e.end > e.start and e not in seen)
    return next((e for e in earlier if e.end < moment), None)
