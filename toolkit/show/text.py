"""Pictures for a terminal: the timeline in letters, and plain tables."""

from ..runtime.units import seconds
from .axis import ticks, unit
from .rows import chosen_ranks, layout

IDLE, COMPUTE, WAIT, SEND, RECV, BOTH = "·", "█", "░", "▀", "▄", "▓"
LEGEND = f"{COMPUTE} compute   {SEND} send   {RECV} receive   {BOTH} both   {WAIT} waits for a message   {IDLE} idle"


def timeline(run, width=78, ranks=None):
    """A row a rank and stream. Each letter says what the rank did at the middle of its slice of time.

    width    columns in all
    ranks    as in `toolkit.show.timeline`
    returns  str, several lines, none longer than `width`
    raises   ValueError  a width that leaves no room, a rank that the run does not have
    """
    chosen = chosen_ranks([run], ranks)
    rows = layout(run, chosen)
    names = [f"rank {row.rank}" if row.label == "compute" else f"  {row.label}" for row in rows]
    gutter = max(map(len, names)) + 1
    columns = width - gutter
    if columns < 20:
        enough = gutter + 20
        raise ValueError(f"timeline: {width} columns leave {columns} for time, needs 20; use width={enough} or more.")
    step = run.makespan / columns
    lines = [f"{seconds(run.makespan)}, {seconds(run.exposed())} exposed communication"]
    lines += [f"{name:<{gutter}}" + _row(row, columns, step) for name, row in zip(names, rows, strict=True)]
    lines += [" " * gutter + line for line in _axis(run.makespan, columns)]
    hidden = run.cluster.size - len(chosen)
    if hidden:
        lines.append(f"{hidden} more rank{'s' * (hidden > 1)} not drawn")
    return "\n".join([*lines, LEGEND] if len(LEGEND) <= width else lines)


def _row(row, columns, step):
    """Letters of one row."""
    working = _covered([e for e in row.bars if e.kind == "compute"], columns, step)
    waiting = _covered([e for e in row.bars if e.kind == "wait"], columns, step)
    sending = _covered([e for lane in row.sends for e in lane], columns, step)
    receiving = _covered([e for lane in row.recvs for e in lane], columns, step)

    def letter(i):
        if i in working:
            return COMPUTE
        if i in sending and i in receiving:
            return BOTH
        return SEND if i in sending else RECV if i in receiving else WAIT if i in waiting else IDLE

    return "".join(map(letter, range(columns)))


def _covered(events, columns, step):
    """Columns whose middle lies within one of the events."""
    if not step:
        return set()
    spans = ((round(e.start / step), round(e.end / step)) for e in events)  # middles i + ½ with start ≤ i + ½ < end
    return {i for first, end in spans for i in range(first, min(end, columns))}


def _axis(makespan, columns):
    """Two lines: marks at round times, and the times."""
    scale, name = unit(makespan)
    marks, numbers = ["─"] * columns, [" "] * columns
    for value in ticks(makespan / scale, about=4):
        at = min(round(value * scale / makespan * columns) if makespan else 0, columns - 1)
        word = f"{value:.10g} {name}"
        marks[at] = "┴"
        start = min(at, columns - len(word))
        numbers[start : start + len(word)] = word
    return "".join(marks), "".join(numbers)


def table(rows, headers):
    """Columns as wide as their widest cell, numbers to the right, words to the left.

    rows     list of sequences, each as long as `headers`; cells are shown by `str`
    returns  str, several lines
    raises   ValueError  a row of another length
    """
    cells = [[str(cell) for cell in row] for row in rows]
    for row in cells:
        if len(row) != len(headers):
            raise ValueError(f"table: row {row} has {len(row)} cells for {len(headers)} headers {list(headers)}.")
    columns = list(zip(headers, *cells, strict=True)) if cells else [(h,) for h in headers]
    widths = [max(map(len, column)) for column in columns]
    right = [len(column) > 1 and all(map(_number, column[1:])) for column in columns]
    lines = [headers, ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(f"{c:>{w}}" if r else f"{c:<{w}}" for c, w, r in zip(line, widths, right, strict=True)).rstrip()
        for line in lines
    )


def _number(cell):
    """Whether a cell starts as a number does; an empty one does not decide."""
    return not cell or cell.lstrip("+-−")[:1].isdigit()


def claims(verdicts):
    """Verdicts for the terminal: one paragraph a claim, then the count."""
    from .claims import claims_text

    return claims_text(verdicts)
