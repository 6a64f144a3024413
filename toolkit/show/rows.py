"""Which rows a timeline has: one a rank and compute stream, one a rank and message channel."""

import re
from typing import NamedTuple

SHOWN = 8  # ranks drawn when the reader names none; more make a picture taller than a screen
EVENTS = 1200  # events drawn when the reader names no ranks; more make a page heavy


class Row(NamedTuple):
    """One row of one rank. `sends` and `recvs` hold a list of events a lane; `bars` kernels and waits."""

    rank: int
    label: str
    bars: list
    sends: list
    recvs: list


def chosen_ranks(runs, ranks=None):
    """Ranks to draw.

    ranks    None: the first ones, 2 to 8, as many as keep the picture light; an int: the first so many; or a list
    returns  list of int
    raises   ValueError  none, or a rank that one of the runs does not have
    """
    size = min(run.cluster.size for run in runs)
    if ranks is None:
        heaviest = max(len(run.trace) / run.cluster.size for run in runs)
        ranks = max(2, min(SHOWN, int(EVENTS / max(1.0, heaviest))))
    chosen = list(range(min(size, ranks))) if isinstance(ranks, int) else list(ranks)
    if not chosen:
        raise ValueError(f"ranks={ranks!r} leaves nothing to draw; name at least one rank.")
    for rank in chosen:
        if not 0 <= rank < size:
            raise ValueError(f"ranks={ranks!r} names rank {rank}, but the run has ranks 0 to {size - 1}.")
    return chosen


def layout(run, chosen):
    """Rows of the ranks to draw: a list of Row. Every rank gets the same rows, so that ranks can be compared."""
    found, streams, channels = {}, {"compute": None}, {}
    for e in run.trace:
        if e.rank not in chosen:
            continue
        if e.kind in ("compute", "wait"):
            row = e.stream if e.kind == "compute" else "compute"
            streams[row] = None
            found.setdefault((e.rank, row), []).append(e)
        else:
            channel, lane = _channel(e)
            lanes = channels.setdefault(channel, {"send": 1, "recv": 1})
            lanes[e.kind] = max(lanes[e.kind], lane)
            found.setdefault((e.rank, channel, e.kind, lane), []).append(e)
    rows = []
    for rank in chosen:
        rows += [Row(rank, name, found.get((rank, name), []), [], []) for name in streams]
        rows += [_channel_row(rank, name, channels[name], found) for name in sorted(channels)]
    return rows


def _channel(event):
    """'kv send 2' -> ('kv', 2); 'recv' -> ('messages', 1)."""
    parts = re.fullmatch(r"(?:(.*) )?(?:send|recv)(?: (\d+))?", event.stream)
    return (parts[1] or "messages", int(parts[2] or 1)) if parts else (event.stream, 1)


def _channel_row(rank, name, lanes, found):
    sends, recvs = (
        [found.get((rank, name, kind, lane), []) for lane in range(1, lanes[kind] + 1)] for kind in ("send", "recv")
    )
    return Row(rank, name, [], sends, recvs)
