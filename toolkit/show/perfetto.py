"""The trace for ui.perfetto.dev and chrome://tracing: Chrome's trace-event JSON, one track a rank and stream.

Format: "Trace Event Format", Google, 2016. A process is a rank, a thread one of its streams, an arrow a message.
"""

import json
from collections import defaultdict, deque

_ORDER = {"compute": 0, "wait": 1, "send": 2, "recv": 3}


def save(run, path):
    """Write `trace_json(run)` to a file. The same run gives the same bytes."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(trace_json(run))


def trace_json(run):
    """Chrome trace JSON text: names of ranks and streams, one complete event each, two flow events a message."""
    events = list(run.trace)
    tracks = _tracks(events, run.cluster.size)
    records = list(_names(tracks, run.cluster.size))
    arrows, count = defaultdict(deque), 0  # sent, not yet received
    for e in sorted(events, key=lambda e: (e.start, e.kind == "recv", e.rank, tracks[e.rank, e.stream])):
        place = {"pid": e.rank, "tid": tracks[e.rank, e.stream], "ts": _micro(e.start)}
        lasting = {"dur": _micro(e.end - e.start), "args": _args(e)}
        records.append({"ph": "X", "name": e.name, "cat": e.kind, **place, **lasting})
        arrow = {"name": e.name, "cat": "message", **place}
        if e.kind == "send":
            arrows[e.rank, e.peer, e.name, e.start, e.end].append(count)
            records.append({"ph": "s", "id": count, **arrow})
            count += 1
        elif e.kind == "recv" and (sent := arrows[e.peer, e.rank, e.name, e.start, e.end]):
            records.append({"ph": "f", "bp": "e", "id": sent.popleft(), **arrow})
    lines = ",\n".join(json.dumps(record, ensure_ascii=False, separators=(",", ":")) for record in records)
    return f'{{"displayTimeUnit":"ms","traceEvents":[\n{lines}\n]}}\n'


def _tracks(events, size):
    """(rank, stream) -> thread number, from 0 on each rank: kernels, waits, then messages by name."""
    found = {(e.rank, e.stream): e.kind for e in events}
    tracks = {}
    for rank in range(size):
        mine = sorted((_ORDER[kind], stream) for (r, stream), kind in found.items() if r == rank)
        tracks |= {(rank, stream): i for i, (_, stream) in enumerate(mine)}
    return tracks


def _names(tracks, size):
    """Metadata records: names and order of ranks and streams."""
    for rank in range(size):
        yield _meta("process_name", rank, 0, {"name": f"rank {rank}"})
        yield _meta("process_sort_index", rank, 0, {"sort_index": rank})
    for (rank, stream), track in tracks.items():
        yield _meta("thread_name", rank, track, {"name": stream})
        yield _meta("thread_sort_index", rank, track, {"sort_index": track})


def _meta(name, pid, tid, args):
    return {"ph": "M", "name": name, "pid": pid, "tid": tid, "args": args}


def _micro(seconds):
    """Microseconds, to the picosecond."""
    return round(seconds * 1e6, 6)


def _args(e):
    """What a click on the event shows."""
    if e.kind == "wait":
        return {}
    if e.kind == "compute":
        return {"bytes": e.bytes, "flops": e.flops}
    return {"bytes": e.bytes, "peer": e.peer, "posted_us": _micro(e.posted)}
