"""What two neighbours on T3's ring do, and below it what the memory of one serves, by `_t3_queue`.

Chapter: model_parallel/t3.
"""

import numpy as np

from toolkit.runtime.units import seconds
from toolkit.show.axis import TimeAxis
from toolkit.show.ink import INK, readable_on
from toolkit.show.picture import bar, drawn, label, number

from . import _t3_queue as memory
from . import _t3_ticks as kind
from .t3 import chunk_order

WIDTH, LEFT, RIGHT, TALL, STACK, BINS = 720, 92, 706, 15, 64, 120  # px; columns of the stack
ROWS = {"GEMM": INK.blue, "link": INK.orange, "updates": INK.sky}
LAYERS = {
    "GEMM reads": (INK.grey, (kind.GEMM_READ,)),
    "GEMM writes": (INK.blue, (kind.GEMM_WRITE,)),
    "sum reads": (INK.orange, memory.READS),
    "sum writes": (INK.sky, memory.WRITES),
}
SCHEMES = {  # name -> mechanism, policy
    "sequential": (memory.SEQUENTIAL, "fcfs"),
    "on 16 shared units": (memory.shared(16), "rr"),
    "T3": (memory.T3, "rr"),
    "T3 + MCA": (memory.T3, "mca"),
    "ideal": (memory.SEQUENTIAL, "fcfs"),
}


def simulate(n, stage, link, scheme):
    """(ticks, Served, what the memory served): "ideal" is the reduce-scatter alone beside a GEMM alone."""
    mechanism, policy = SCHEMES[scheme]
    found = memory.hbm_queue(n, stage, mechanism, policy, link=link, gemm=scheme != "ideal")
    if scheme != "ideal":
        return found.ticks, found, [found.served]
    bursts = np.repeat([kind.GEMM_READ, 0, kind.GEMM_WRITE], [stage.reads, stage.compute, stage.requests])
    product = np.tile(bursts, n)
    return max(len(product), found.ticks), found, [product, found.served]


def draw(n, stage, link, scheme, tick, ticks_shown):
    """Picture of one scheme.

    stage, link   as for `hbm_queue`        tick   seconds        ticks_shown   at the right end, for comparisons
    """
    ticks, found, served = simulate(n, stage, link, scheme)
    ends = (np.arange(n) + 1) * stage.alone if scheme == "ideal" else found.stage_ends
    axis = TimeAxis(ticks_shown * tick, LEFT, RIGHT)
    title = f"{scheme}: {seconds(ticks * tick)}"
    body, y = [label(4, 14, title, "b"), label(RIGHT, 14, "numbers: chunks", "m e")], 24
    spans = {"GEMM": np.column_stack([[0, *ends[:-1]], ends]), "link": found.sends, "updates": found.arrivals}
    top = y
    for rank in (0, 1):
        order = chunk_order(rank, n, scheme not in ("sequential", "ideal"))
        shown = {"GEMM": order, "link": chunk_order(rank, n)[:-1], "updates": chunk_order(rank, n)[1:]}
        for row, colour in ROWS.items():
            name = f"GPU {rank} {row}" if row == "GEMM" else row
            body.append(label(LEFT - 6, y + 12, name, "e" if row == "GEMM" else "m e"))
            body += _bars(spans[row] * tick, shown[row], colour, axis, y)
            y += TALL + 3
        y += 6
    body += _stack(served, axis, tick, _edges(stage.alone, ticks_shown), y + 18) + list(_legend(y + 12))
    bottom = y + 18 + STACK
    end = number(axis.x(ticks * tick))
    body.append(f'<path class="k" stroke-dasharray="4 2" d="M{end} {top}V{bottom}"/>')
    body += axis.lines(top - 2, bottom)
    return drawn(WIDTH, bottom + 34, body, f"{scheme} on {n} GPUs", _words(n, stage, scheme, ticks, found, tick))


def _bars(spans, chunks, colour, axis, y):
    for (start, end), chunk in zip(spans, chunks, strict=True):
        x, width = axis.x(start), axis.x(end) - axis.x(start)
        gap = min(0.8, width / 4)
        yield f'<path fill="{colour}" d="{bar(x + gap / 2, y, max(width - gap, 0.4), TALL)}"/>'
        if width > 9 * len(str(chunk)):
            look = f'class="n" style="font-size:10px;fill:{readable_on(colour)}"'
            yield f'<text {look} x="{number(x + width / 2)}" y="{y + 11}">{chunk}</text>'


def _edges(alone, ticks_shown):
    """Where columns of the stack begin: a whole number of them a stage, so that equal stages look equal."""
    width = alone / max(1, BINS * alone // ticks_shown)
    return np.round(np.arange(ticks_shown // width + 2) * width).astype(int).clip(max=ticks_shown)


def _stack(served, axis, tick, edges, top):
    """Share of the memory's ticks that each kind of request takes, stacked."""
    edges = np.unique(edges)
    counts = np.zeros((8, len(edges) - 1))
    for kinds in served:
        for which in range(1, 8):
            upto = np.concatenate([[0], np.cumsum(kinds == which)])
            counts[which] += np.diff(upto[np.minimum(edges, len(kinds))])
    shares, floor = counts / np.diff(edges), np.zeros(len(edges) - 1)
    scale = STACK / max(1.0, shares.sum(axis=0).max())  # ideal: two memories, so more than one may be full
    body = [label(LEFT - 6, top + STACK - 4, "memory", "e")]
    body.append(label(LEFT - 6, top + 10, f"{100 * STACK / scale:.0f} %", "m e"))
    x = [number(axis.x(edge * tick)) for edge in edges]
    for colour, kinds in LAYERS.values():
        share = shares[list(kinds)].sum(axis=0)
        path = ""
        for i in np.flatnonzero(share):
            height, base = share[i] * scale, top + STACK - floor[i] * scale
            path += f"M{x[i]} {number(base)}V{number(base - height)}H{x[i + 1]}V{number(base)}z"
        body.append(f'<path fill="{colour}" d="{path}"/>')
        floor += share
    return body


def _legend(y):
    x = LEFT
    for words, (colour, _) in LAYERS.items():
        yield f'<path fill="{colour}" d="{bar(x, y - 9, 14, 10)}"/>'
        yield label(x + 18, y, words, "m")
        x += 118


def _words(n, stage, scheme, ticks, found, tick):
    written, read, updated = (count / stage.requests for count in found.dram)
    written = n if scheme == "ideal" else written
    return (
        f"{scheme}, {n} GPUs: the sum is scattered after {seconds(ticks * tick)}; the GEMM alone takes "
        f"{seconds(n * stage.alone * tick)}. One GPU's memory, in chunks: the GEMM writes {written:.0f}, the sum reads "
        f"{read:.0f} and writes {updated:.0f}."
    )
