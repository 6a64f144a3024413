"""A pipeline schedule as a picture: a row a rank, time to the right, forward and backward passes in two colours.

Beside each row a bar says how many microbatches' activations the rank keeps at its peak. Later chunks of layers are
paler; idle time stays empty. Chapter: model_parallel/megatron.
"""

from collections import defaultdict

from toolkit.show.axis import TimeAxis
from toolkit.show.ink import INK
from toolkit.show.picture import bar, drawn, label, number

from ._schedule import makespan, peaks, times

WIDTH, LEFT, RIGHT, TALL, STEP = 720, 150, 706, 16, 20  # px
MEMORY, BAR = 44, 98  # px: the longest memory bar, where it starts
COLOURS = {"F": INK.blue, "B": INK.orange}
OTHER = INK.green


def draw(schedule, seconds, hop=0.0, until=None, full=None):
    """Picture of a schedule, each pass as early as `times` lets it.

    seconds   as for `times`
    hop       seconds a message takes
    until     seconds at the right end; None: the makespan. The same for two pictures makes them comparable
    full      microbatches that the longest memory bar stands for; None: this schedule's own peak
    """
    found, total = times(schedule, seconds, hop), makespan(schedule, seconds, hop)
    chunks = len(schedule.where[0])
    kept = [n / chunks for n in peaks(schedule)]
    axis = TimeAxis(until or total, LEFT, RIGHT)
    bottom = 42 + STEP * len(schedule.passes)
    body = [*_legend(found), label(BAR, 34, "kept", "m"), *axis.lines(38, bottom)]
    for rank, n in enumerate(kept):
        y = 42 + STEP * rank
        body.append(label(4, y + 12, f"rank {rank}", "m"))
        width = MEMORY * n / (full or max(kept))
        body.append(f'<path fill="{INK.grey}" fill-opacity=".5" d="{bar(BAR, y + 2, width, TALL - 4)}"/>')
        body.append(label(BAR - 6, y + 12, f"{n:.3g}", "m e"))
    body += _bars(found, schedule, axis, chunks)
    end = number(axis.x(total))
    body.append(f'<path class="k" stroke-dasharray="4 2" d="M{end} 38V{bottom}"/>')
    return drawn(WIDTH, bottom + 32, body, schedule.name, _words(schedule, seconds, total, kept))


def _bars(found, schedule, axis, chunks):
    """All passes of one rank, kind and chunk in one path; numbers of microbatches where they fit."""
    shapes, numbers = defaultdict(list), []
    for (rank, step), (start, end) in found.items():
        x, width, y = axis.x(start), axis.x(end) - axis.x(start), 42 + STEP * rank
        gap = min(0.6, width / 4)
        line = f"M{number(x + gap / 2)} {y + TALL // 2}h{number(max(width - gap, 0.3))}"
        shapes[step.kind, step.chunk].append(line)
        if width >= 11 and len(found) <= 200:
            dark = "" if step[::2] == ("F", 0) else ' style="fill:#000"'
            numbers.append(f'<text x="{number(x + width / 2)}" y="{y + 12}"{dark}>{step.microbatch}</text>')
    for (kind, chunk), paths in sorted(shapes.items()):
        shade = 1 - 0.55 * chunk / max(1, chunks - 1) if chunks > 1 else 1
        look = f'stroke="{COLOURS.get(kind, OTHER)}" stroke-width="{TALL}" stroke-opacity="{shade:.2f}"'
        yield f'<path {look} d="{"".join(paths)}"/>'
    yield f'<g class="v">{"".join(numbers)}</g>'


def _legend(found):
    names = {"F": "forward", "B": "backward", "W": "weights"}
    x = LEFT
    for kind in sorted({step.kind for _, step in found}, key="FBW".find):
        yield f'<path fill="{COLOURS.get(kind, OTHER)}" d="{bar(x, 8, 16, 12)}"/>'
        yield label(x + 21, 18, names.get(kind, kind), "m")
        x += 90
    yield label(x, 18, "empty: idle. Number: microbatch; paler: later chunk", "m")


def _words(schedule, seconds, total, kept):
    ranks, m = len(schedule.passes), schedule.microbatches
    work = sum(_duration(seconds, step, stage) for step, stage in _of_rank(schedule, 0))
    return (
        f"{schedule.name}, {ranks} ranks, {m} microbatches: {total:.4g} s, of which rank 0 works {work:.4g} s; "
        f"idle over work {total / work - 1:.4g}. Rank 0 keeps {kept[0]:.3g} microbatches' activations, "
        f"rank {ranks - 1} keeps {kept[-1]:.3g}."
    )


def _of_rank(schedule, rank):
    return [(step, schedule.where[rank][step.chunk]) for step in schedule.passes[rank]]


def _duration(seconds, step, stage):
    return seconds(step.kind, stage) if callable(seconds) else seconds[step.kind]
