"""Live bytes of each rank over the time of a run."""

from ..runtime.units import seconds, size
from .axis import TimeAxis
from .ink import INK
from .picture import drawn, label, number
from .rows import SHOWN, chosen_ranks

WIDTH, LEFT, RIGHT, HIGH, PITCH = 720, 84, 640, 34, 44  # px; the peaks are written to the right


def picture(run, ranks=None):
    """One strip a rank, all on the same scales, each peak marked with its number.

    ranks    None: the first 8; an int: the first so many; or a list
    returns  Picture
    raises   ValueError  a rank that the run does not have
    """
    total = run.cluster.size
    chosen = chosen_ranks([run], SHOWN if ranks is None else ranks)
    axis = TimeAxis(run.makespan, LEFT, RIGHT)
    peaks = [run.peak_memory[rank] for rank in chosen]
    top = max([*peaks, 1])
    body, y = [label(4, 14, f"Live memory by rank; every strip is {size(top)} high", "b")], 24
    for rank, peak in zip(chosen, peaks, strict=True):
        body += _strip(rank, run.memory(rank), peak, run.makespan, axis, y, HIGH / top)
        y += PITCH
    if len(chosen) < total:
        body.append(label(LEFT, y + 6, f"{total - len(chosen)} more ranks not drawn", "m"))
        y += 14
    return drawn(WIDTH, y + 34, [*axis.lines(22, y), *body], "Live memory over time", _words(run, peaks, chosen))


def _strip(rank, history, peak, makespan, axis, y, per_byte):
    """Steps of one rank as a filled shape on its base line, with the first instant of the peak marked."""
    times, live = (list(map(float, column)) for column in history)
    base = y + HIGH
    shape, level, at = f"M{LEFT} {base}", base, None
    for i, (time, count) in enumerate(zip(times, live, strict=True)):
        following = times[i + 1] if i + 1 < len(times) else None
        if following is not None and axis.x(following) - axis.x(time) < 0.05 and count < peak:
            continue  # over in less than a pixel, and not the peak
        if count >= peak and at is None:
            at = time
        new = number(base - count * per_byte)
        if new != level:
            at_x = number(axis.x(time))
            shape += f"V{new}" if at_x == LEFT else f"H{at_x}V{new}"
            level = new
    shape += f"H{number(axis.x(makespan))}V{base}z"
    at = at or 0.0
    x, tip = number(axis.x(at)), number(base - peak * per_byte)
    return [
        label(LEFT - 6, base - 6, f"rank {rank}", "e"),
        f'<path fill="{INK.blue}" fill-opacity=".6" stroke="{INK.blue}" d="{shape}">'
        f"<title>rank {rank}: at most {size(peak)}, first at {seconds(at)}</title></path>",
        f'<circle fill="{INK.vermillion}" cx="{x}" cy="{tip}" r="3"/>{label(RIGHT + 6, tip + 8, size(peak), "m")}',
    ]


def _words(run, peaks, chosen):
    highest, lowest = max(peaks), min(peaks)
    where = chosen[peaks.index(highest)]
    if lowest == highest:
        said = f"Every rank drawn reaches {size(highest)}"
    else:
        said = f"Rank {where} needs most, {size(highest)}; rank {chosen[peaks.index(lowest)]} least, {size(lowest)}"
    return f"Live memory over {seconds(run.makespan)}, {len(chosen)} of {run.cluster.size} ranks. {said}."
