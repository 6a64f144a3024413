"""What a run of the artifact shows: passes as bars, memory beside them; and what its trace says in numbers.

Chapter: model_parallel/vocabulary_parallel.
"""

from itertools import pairwise
from math import inf

import numpy as np

from toolkit.show.axis import TimeAxis
from toolkit.show.ink import INK, readable_on
from toolkit.show.picture import bar, drawn, label, number

from ._schedule import makespan, peaks, times
from ._vocabulary_scale import GIB, PEAK

WIDTH, LEFT, RIGHT, TALL, STEP = 720, 150, 706, 16, 20  # px
MEMORY, BAR = 44, 102  # px: the longest memory bar, where it starts
COLOURS = {"F": INK.blue, "B": INK.orange, "V": INK.green}
NAMES = {"F": "forward", "B": "backward", "V": "vocabulary"}
GAP = 1e-6  # s: a longer pause ends a pass
SETTLED, PATTERN = 5, 3  # microbatches at the end of which the last rank is faster; rounds after which a round repeats


def spans(step):
    """{(rank, "F" | "B" | "V"): [(start, end), …]}: all layers of a pass are one, as are kernels in a row of "V"."""
    layer, found = step.job.layer_flops, {}
    kernels = step.run.trace.kernels[:, [0, 3, 4, 6]]
    for rank in range(step.job.stages):
        _, starts, ends, flops = kernels[kernels[:, 0] == rank].T
        kinds = np.select([flops == layer, flops == 2 * layer], [0, 1], 2)
        for kind, which in enumerate("FBV"):
            mine = kinds == kind
            found[rank, which] = _joined(starts[mine], ends[mine], step.layers[rank] if which != "V" else None)
    return found


def _joined(starts, ends, count):
    """Every `count` intervals as one; None: those that touch."""
    if not len(starts) or count == 0:
        return []
    if count:
        return list(zip(starts[::count].tolist(), ends[count - 1 :: count].tolist(), strict=True))
    new = np.concatenate([[True], starts[1:] > ends[:-1] + GAP])
    first = np.flatnonzero(new)
    last = np.concatenate([first[1:] - 1, [len(ends) - 1]])
    return list(zip(starts[first].tolist(), ends[last].tolist(), strict=True))


def peak_inflight(step):
    """The most microbatches of each rank between the start of F and the end of B, as the trace has them."""
    found = spans(step)
    return [_most([a for a, _ in found[r, "F"]], [b for _, b in found[r, "B"]]) for r in range(step.job.stages)]


def _most(opened, closed):
    times = sorted([(t, 1) for t in opened] + [(t, -1) for t in closed])
    return int(max(np.cumsum([change for _, change in times]), default=0))


def barriers(run, nbytes, rank=0):
    """How many of a rank's passes are followed by messages, in a run of `output_layer`.

    A pass is kernels in a row. nbytes: a kernel that moves fewer does not start one.
    """
    mine = [e for e in run.trace if e.rank == rank]
    kernels = sorted((e.start, e.end) for e in mine if e.kind == "compute" and e.bytes >= nbytes)
    starts = [kernels[0][0], *(after for (_, end), (after, _) in pairwise(kernels) if after > end + GAP), inf]
    sent = [e.start for e in mine if e.kind in ("send", "recv")]
    return sum(any(a < start < b for start in sent) for a, b in pairwise(starts))


def longer(step, microbatches):
    """Seconds of the same job with more microbatches: what lies in the middle of a step is repeated."""
    rank = max(r for r, count in enumerate(step.layers) if count)
    ends = [end for _, end in spans(step)[rank, "B"]]
    last, count = len(ends) - SETTLED, (len(ends) - 2 * SETTLED) // PATTERN * PATTERN
    return step.seconds + (microbatches - len(ends)) * (ends[last] - ends[last - count]) / count


def mfu(step, microbatches):
    """MFU of a job with that many microbatches, from a shorter one."""
    flops = step.job.flops / step.job.microbatches * microbatches
    return flops / (longer(step, microbatches) * step.job.stages * PEAK)


def draw(step, title, until=None, full=None):
    """Picture of one step.

    until   seconds at the right end; None: its own end       full   bytes of the longest memory bar; None: its own
    """
    found, sizes = spans(step), [nbytes / GIB for nbytes in step.peak]
    bars = [size / (full / GIB if full else max(sizes)) for size in sizes]
    said = [f"{size:.1f}" for size in sizes]
    body, height = _rows(found, bars, said, "peak GiB", until or step.seconds, step.seconds)
    return drawn(WIDTH, height, body, title, _words(step, found, title))


def draw_rounds(schedule, seconds, until, full):
    """Picture of a schedule by `_schedule.times`; F and B have the number of their microbatch.

    full   microbatches that the longest bar stands for
    """
    ranks, kept = range(len(schedule.passes)), peaks(schedule)
    found = {(rank, kind): [] for rank in ranks for kind in COLOURS}
    passes = times(schedule, seconds)
    for (rank, step), span in passes.items():
        found[rank, step.kind if step.kind in "FB" else "V"].append(span)
    end = makespan(schedule, seconds)
    body, height = _rows(found, [n / full for n in kept], [str(n) for n in kept], "kept", until, end)
    axis = TimeAxis(until, LEFT, RIGHT)
    body += [
        f'<text class="n" style="font-size:10px;fill:{readable_on(COLOURS[step.kind])}" '
        f'x="{number(axis.x((start + stop) / 2))}" y="{54 + STEP * rank}">{step.microbatch}</text>'
        for (rank, step), (start, stop) in passes.items()
        if step.kind in "FB"
    ]
    idle = end - sum(b - a for kind in COLOURS for a, b in found[0, kind])
    words = (
        f"{schedule.name}: {end:.4g} s, of which rank 0 idles {idle:.4g} s. Microbatches that each rank keeps: {kept}."
    )
    return drawn(WIDTH, height, body, schedule.name, words)


def _rows(found, bars, said, heading, until, end):
    """(SVG elements, height): passes of each rank, a bar for what it keeps, the end of the step."""
    axis, bottom = TimeAxis(until, LEFT, RIGHT), 42 + STEP * len(bars)
    body = [*_legend(), label(BAR, 34, heading, "m"), *axis.lines(38, bottom)]
    for rank, (share, text) in enumerate(zip(bars, said, strict=True)):
        y = 42 + STEP * rank
        body += [label(4, y + 12, f"rank {rank}", "m"), label(BAR - 6, y + 12, text, "m e")]
        body.append(f'<path fill="{INK.grey}" fill-opacity=".5" d="{bar(BAR, y + 2, MEMORY * share, TALL - 4)}"/>')
        for kind, colour in COLOURS.items():
            shapes = "".join(_line(axis, y, start, stop) for start, stop in found[rank, kind])
            body.append(f'<path stroke="{colour}" stroke-width="{TALL}" d="{shapes}"/>' if shapes else "")
    x = number(axis.x(end))
    body.append(f'<path class="k" stroke-dasharray="4 2" d="M{x} 38V{bottom}"/>')
    return body, bottom + 32


def _line(axis, y, start, end):
    x, width = axis.x(start), axis.x(end) - axis.x(start)
    gap = min(0.5, width / 4)
    return f"M{number(x + gap / 2)} {y + TALL // 2}h{number(max(width - gap, 0.2))}"


def _legend():
    x = LEFT
    for kind, colour in COLOURS.items():
        yield f'<path fill="{colour}" d="{bar(x, 8, 16, 12)}"/>'
        yield label(x + 21, 18, NAMES[kind], "m")
        x += 96
    yield label(x, 18, "empty: idle. Dashed: end of the step", "m")


def _words(step, found, title):
    ranks = range(step.job.stages)
    work = [sum(end - start for kind in "FBV" for start, end in found[rank, kind]) for rank in ranks]
    return (
        f"{title}: {step.job.microbatches} microbatches take {step.seconds:.3g} s. Rank 0 works {work[0]:.3g} s, the "
        f"last {work[-1]:.3g} s. Peak memory from {min(step.peak) / GIB:.1f} to {max(step.peak) / GIB:.1f} GiB a rank."
    )
