"""One scheme of GNN training as a picture: who computes when, what an epoch sends, which links read old values.

Chapter: model_parallel/gnn_pipe.
"""

import numpy as np

from toolkit.runtime.units import seconds, size
from toolkit.show.axis import TimeAxis
from toolkit.show.ink import INK
from toolkit.show.picture import bar, drawn, label

WIDTH, LEFT, RIGHT, ROW = 720, 84, 500, 18  # px: picture, time axis, a device
SQUARE, AT = 152, 554  # px: side and left edge of the heat map
NAMES, BARS, LONGEST = 120, 128, 300  # px: right edge of names, left edge and length of the bars of bytes


def draw(run, name, sent, links, old):
    """Picture of one epoch.

    run     of `gnn_pipe.train`          name   of its scheme, a key of `sent`
    sent    {scheme: bytes an epoch}     links  (K, K) number of links [to chunk, from chunk]
    old     (K, K) bool, True where a historical value is read
    """
    ranks, idle = run.cluster.size, []
    axis, bottom = TimeAxis(run.makespan, LEFT, RIGHT), 30 + ROW * run.cluster.size
    body = [label(4, 14, f"{name}: {seconds(run.makespan)} an epoch", "b"), *axis.lines(24, bottom)]
    for rank in range(ranks):
        y, spans = 30 + ROW * rank, computing(run, rank)
        idle.append(1 - np.sum(spans[:, 1] - spans[:, 0]) / run.makespan)
        path = "".join(bar(axis.x(a), y, axis.x(b) - axis.x(a), ROW - 5) for a, b in spans)
        body += [label(LEFT - 6, y + 11, f"device {rank}", "m e"), f'<path fill="{INK.compute}" d="{path}"/>']
    body.append(label(RIGHT, 14, f"blue: computes; idle {100 * np.mean(idle):.0f} %", "m e"))
    body += _bars(sent, name, bottom + 56)
    share = links[old].sum() / links.sum()
    body += [label(AT, 14, f"{100 * share:.0f} % of links are old", "b"), *_heat(links, old)]
    body.append(label(AT, 24 + SQUARE + 30, "orange: old, blue: fresh" if old.any() else "blue: all fresh", "m"))
    words = (
        f"{name}: an epoch takes {seconds(run.makespan)}; devices idle {100 * np.mean(idle):.0f} %. Sent an epoch: "
        + ", ".join(f"{scheme} {size(n)}" for scheme, n in sent.items())
        + f". {100 * share:.0f} % of links read historical values."
    )
    return drawn(WIDTH, bottom + 60 + ROW * len(sent), body, name, words)


def computing(run, rank):
    """(n, 2) start and end of the spans in which a rank computes; gaps too thin to see are closed."""
    kernels = run.trace.kernels
    spans = kernels[kernels[:, 0] == rank][:, 3:5]
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    gap = np.flatnonzero(spans[1:, 0] - spans[:-1, 1] > run.makespan / 400) + 1
    return np.column_stack([spans[np.r_[0, gap], 0], spans[np.r_[gap - 1, len(spans) - 1], 1]])


def _bars(sent, chosen, top):
    most = max(sent.values())
    yield label(4, top - 8, "sent an epoch", "b")
    for i, (scheme, n) in enumerate(sent.items()):
        y, colour = top + ROW * i, INK.send if scheme == chosen else INK.grey
        yield label(NAMES, y + 11, scheme, "b m e" if scheme == chosen else "m e")
        yield f'<path fill="{colour}" d="{bar(BARS, y, LONGEST * n / most, ROW - 5)}"/>'
        yield label(BARS + LONGEST * n / most + 6, y + 11, size(n), "m")


def _heat(links, old):
    """A square for each pair of chunks that share links, darker where there are more."""
    cell, full = SQUARE / len(links), np.percentile(links[links > 0], 90)
    yield f'<path class="a" d="{bar(AT, 24, SQUARE, SQUARE)}"/>'
    for colour, which in ((INK.vermillion, old), (INK.blue, ~old)):
        for level in (1, 2, 3, 4):
            shade = np.ceil(4 * np.minimum(1, links / full)) == level
            path = "".join(bar(AT + cell * s, 24 + cell * t, cell, cell) for t, s in np.argwhere(shade & which))
            yield f'<path fill="{colour}" fill-opacity="{level / 4}" d="{path}"/>'
    yield label(AT + SQUARE / 2, 24 + SQUARE + 13, "from chunk →", "m n")
    yield label(AT - 8, 24 + SQUARE / 2, "to ↓", "m e")
