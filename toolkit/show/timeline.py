"""The timeline of a run, as compact SVG: who computed, sent, received and waited, and when.

One row a rank and stream. Kernels are tall bars, waiting is striped; a channel's row has what the rank sends in its
upper half and what it receives in its lower half. The outline is the critical path. Several runs stand one above the
other on one time axis, so that two schedules can be compared by eye.
"""

from collections import Counter
from html import escape
from itertools import groupby
from typing import NamedTuple

from ..runtime.units import seconds, size
from .axis import TimeAxis
from .critical_path import critical_path
from .picture import bar, drawn, label, number
from .rows import chosen_ranks, layout

WIDTH, LEFT, RIGHT = 720, 84, 706  # px: picture; first and last instant (the first moves right for long names)
LETTERS = 22  # of a stream's name that are shown
TALL, HALF, SPACE = 14, 6, 4  # px: a row of kernels, half a channel's row, between ranks
THIN, GAP = 0.8, 0.6  # px: neighbours thinner than THIN are drawn as one bar; between messages that touch


class _Bar(NamedTuple):
    """Where an event is drawn: `y` is the middle."""

    event: tuple
    x: float
    y: float
    width: float
    height: float


def timeline(*runs, titles=None, ranks=None, steps=None):
    """Draw one run, or several on one time axis.

        timeline(ring, token_ring, titles=["ring attention", "TokenRing"], ranks=4)

    titles   a name for each run; "run 1", "run 2", … by default, nothing for a single run
    ranks    None: the first ones, at most 8; an int: the first so many; or a list of ranks. What is left out is said.
    steps    name of the kernel whose calls are numbered on each rank, from 0; None: the one that takes longest in all;
             False: no numbers
    returns  Picture: `.svg`, `.words`
    raises   ValueError  no run, titles that do not match, a rank or kernel that does not exist
    """
    if not runs:
        raise ValueError("timeline: give at least one run.")
    if titles is None:
        titles = [f"run {i + 1}" for i in range(len(runs))] if len(runs) > 1 else [""]
    if len(titles) != len(runs):
        raise ValueError(f"timeline: {len(runs)} runs but {len(titles)} titles; give one for each.")
    chosen = chosen_ranks(runs, ranks)
    rows = [layout(run, chosen) for run in runs]
    longest = max(min(len(row.label), LETTERS) for panel in rows for row in panel)
    axis = TimeAxis(max(run.makespan for run in runs), max(LEFT, 14 + 6 * longest), RIGHT)
    panels, y = [], 22
    for run, title, its_rows in zip(runs, titles, rows, strict=True):
        panel, y = _panel(run, title, its_rows, axis, y, chosen, steps)
        panels += panel
    names = " and ".join(title for title in titles if title) or f"{runs[0].cluster.size} ranks"
    body = [*_legend(), *axis.lines(20, y - 2), *panels]
    return drawn(WIDTH, y + 32, body, f"Timeline of {names}", _words(runs, titles, chosen))


def _panel(run, title, rows, axis, top, chosen, steps):
    """Rows of one run from `top` on. Returns (SVG elements, y below)."""
    head = f"{title}: {seconds(run.makespan)}" if title else seconds(run.makespan)
    body = [label(4, top + 13, head, "b"), label(RIGHT, top + 13, _waited(run), "m e")]
    y, bars, middles = top + 20, [], ""
    for _, group in groupby(rows, key=lambda row: row.rank):
        for i, row in enumerate(group):
            height, placed = _placed(row, axis, y)
            name = f"rank {row.rank}" if i == 0 else _short(row.label)
            body.append(label(axis.left - 6, y + height / 2 + 4, name, "e" if i == 0 else "m e"))
            middles += f"M{axis.left} {number(y + height / 2)}H{RIGHT}"
            bars += placed
            y += height + 1
        y += SPACE
    body.append(f'<path class="g" d="{middles}"/>')
    body += [*_draw(bars), *_step_numbers(bars, run, steps), *_critical(bars, critical_path(run))]
    end = number(axis.x(run.makespan))
    body.append(f'<path class="k" d="M{end} {number(top + 17)}V{number(y - SPACE)}" stroke-dasharray="4 2"/>')
    if hidden := _hidden(run, chosen):
        body.append(label(axis.left, y + 9, hidden, "m"))
        y += 14
    return body, y + 8


def _short(name):
    """A stream's name, cut where it would not fit before the first instant."""
    return name if len(name) <= LETTERS else name[: LETTERS - 1] + "…"


def _placed(row, axis, top):
    """(height of a row, its events as bars)."""
    if not (row.sends or row.recvs):
        lines, height = [(row.bars, top + TALL / 2, TALL)], TALL
    else:
        half = max(HALF, 2 * max(len(row.sends), len(row.recvs)))  # 2 px for each of many messages at once
        lines, height = [], 2 * half
        for lanes, edge in ((row.sends, top), (row.recvs, top + half)):
            each = half / max(1, len(lanes))
            lines += [(lane, edge + (i + 0.5) * each, each - 0.5) for i, lane in enumerate(lanes)]
    return height, [
        _Bar(e, axis.x(e.start), y, axis.x(e.end) - axis.x(e.start), thick)
        for events, y, thick in lines
        for e in events
    ]


def _draw(bars):
    """Bars of each kind in one group; waits first, so that kernels of other streams lie above them."""
    body = []
    for kind, style in (("wait", "w"), ("compute", "c"), ("send", "s"), ("recv", "r")):
        mine = sorted((b for b in bars if b.event.kind == kind), key=lambda b: (b.height, b.y, b.x))
        for height, group in groupby(mine, key=lambda b: b.height):
            lines = [list(line) for _, line in groupby(group, key=lambda b: b.y)]
            gap = GAP if kind in ("send", "recv") else 0
            paths = "".join(_path(together, gap) for line in lines for together in _merged(line))
            if gap:  # a darker ground: the rim of pale bars, and the line between two that touch
                ground = "".join(map(_ground, lines))
                body.append(f'<path class="o" style="stroke-width:{number(height + 1)}" d="{ground}"/>')
            thick = "" if kind == "wait" else f' style="stroke-width:{number(height)}"'
            body.append(f'<g class="{style}"{thick}>{paths}</g>')
    return body


def _merged(line):
    """Neighbours of one line that are too thin to be told apart, as one list each."""
    together = line[:1]
    for b in line[1:]:
        last = together[-1]
        if b.x - (last.x + last.width) < THIN / 2 and min(b.width, last.width) < THIN:
            together.append(b)
        else:
            yield together
            together = [b]
    yield together


def _path(bars, gap):
    """One <path> for a bar, or for several that lie too close; hovering tells what it is."""
    first, last = bars[0], bars[-1]
    width = max(last.x + last.width - first.x - gap, 0.4)
    shape = f"M{number(first.x + gap / 2)} {number(first.y)}h{number(width)}"
    return f'<path d="{shape}"><title>{_note([b.event for b in bars])}</title></path>'


def _ground(line):
    """Path data of where a line is busy, bars that touch in one piece."""
    pieces = []
    for b in line:
        if pieces and b.x - pieces[-1][1] < GAP:
            pieces[-1][1] = b.x + b.width
        else:
            pieces.append([b.x, b.x + b.width])
    return "".join(f"M{number(a)} {number(line[0].y)}H{number(b)}" for a, b in pieces)


def _note(events):
    """What happened, when, for how long, how many bytes, with whom. One line."""
    e, last = events[0], events[-1]
    name = escape(e.name, quote=False)
    when = f"at {seconds(e.start)} for {seconds(last.end - e.start)}"
    moved = f", {size(sum(e.bytes for e in events))}" if e.kind in ("send", "recv") else ""
    if len(events) > 1:
        return f"{len(events)} × {name} {when}{moved}"
    what = {"send": f"{name} → rank {e.peer}", "recv": f"{name} ← rank {e.peer}", "wait": f"waits: {name}"}
    return f"{what.get(e.kind, name)} {when}{moved}"


def _step_numbers(bars, run, steps):
    """Number the calls of the step's kernel inside their bars, where a number fits."""
    if steps is False:
        return []
    total = Counter()
    for e in run.trace:
        if e.kind == "compute":
            total[e.name] += e.end - e.start
    if steps is not None and steps not in total:
        raise ValueError(f"timeline: steps={steps!r} is no kernel of this run; it has {', '.join(sorted(total))}.")
    name = steps or max(total, key=lambda k: (total[k], k), default=None)
    calls, body = Counter(), []
    for b in bars:
        if b.event.kind == "compute" and b.event.name == name:
            if b.width >= 9:
                body.append(f'<text x="{number(b.x + b.width / 2)}" y="{number(b.y + 4)}">{calls[b.event.rank]}</text>')
            calls[b.event.rank] += 1
    return [f'<g class="v">{"".join(body)}</g>'] if body else []


def _critical(bars, path):
    """The critical path outlined. Where it passes from rank to rank: both ends of the message, and a line between."""
    at = {(b.event.rank, b.event.kind, b.event.peer, b.event.start, b.event.end, b.event.name): b for b in bars}
    shapes = []
    for before, e in zip([None, *path], path, strict=False):
        mine = at.get((e.rank, e.kind, e.peer, e.start, e.end, e.name))
        passes = before is not None and before.rank == e.peer
        kind = {"send": "recv", "recv": "send"}.get(e.kind)
        other = at.get((e.peer, kind, e.rank, e.start, e.end, e.name)) if passes else None
        for b in (mine, other):
            if b is not None:
                shapes.append(bar(b.x, b.y - b.height / 2, max(b.width, 0.4), b.height))
        if mine is not None and other is not None:
            shapes.append(f"M{number(other.x)} {number(other.y)}L{number(mine.x + mine.width)} {number(mine.y)}")
    return [f'<path class="k" d="{"".join(shapes)}"/>'] if shapes else []


def _legend():
    """One line: the sign of each kind, drawn as it is drawn below, and its name."""
    signs = (
        ("c", "M0 9h16", TALL, "compute", 84),
        ("s", "M0 6h16", HALF, "send: upper half", 128),
        ("r", "M0 12h16", HALF, "receive: lower half", 136),
        ("w", "M0 9h16", HALF, "waits for a message", 146),
        ("k", bar(0, 3, 16, 11), 1.8, "critical path", 0),
    )
    body, x = [], LEFT
    for style, shape, thick, name, width in signs:
        body.append(f'<path class="{style}" style="stroke-width:{thick}" transform="translate({x} 0)" d="{shape}"/>')
        body.append(label(x + 21, 13, name, "m"))
        x += width
    return body


def _waited(run):
    return f"{seconds(run.exposed())} exposed communication"


def _hidden(run, chosen):
    hidden = run.cluster.size - len(chosen)
    return f"{hidden} more rank{'s' * (hidden > 1)} not drawn" if hidden else ""


def _words(runs, titles, chosen):
    """The picture for a reader who does not see it."""
    said = []
    for run, title in zip(runs, titles, strict=True):
        name = f"{title}, " if title else ""
        hidden = f", {_hidden(run, chosen)}" if _hidden(run, chosen) else ""
        said.append(f"{name}{run.cluster.size} ranks: {seconds(run.makespan)}, {_waited(run)}{hidden}")
    text = "Timeline. " + "; ".join(said) + "."
    if len(runs) < 2:
        return text
    (first, winner), *_, (last, loser) = sorted(zip(runs, titles, strict=True), key=lambda pair: pair[0].makespan)
    if last.makespan <= first.makespan * 1.005:
        return f"{text} They end together."
    faster = f"{last.makespan / first.makespan:.2f} times as fast as" if first.makespan else "before"
    return f"{text} {winner} ends first, {faster} {loser}."
