"""Two lanes an architecture, compute and all-reduce, by the recurrence; below, tokens/s of the whole model.

Chapter: model_parallel/ladder_residual.
"""

from toolkit.show.axis import TimeAxis
from toolkit.show.ink import INK, readable_on
from toolkit.show.picture import bar, drawn, label, number

from .ladder_residual import timeline

WIDTH, LEFT, RIGHT, TALL = 720, 128, 706, 15  # px
COLOURS = {"A": INK.sky, "M": INK.blue, "L": INK.blue, "all_reduce": INK.orange}
NAMES = {"standard": "standard", "parallel": "parallel", "ladder": "ladder", "none": "no communication"}


def draw(c, a, speeds, title):
    """Picture of standard, parallel and ladder.

    c, a     (2l,) seconds of the modules of the l layers to draw, and of their all-reduces
    speeds   {"standard", "parallel", "ladder", "none": tokens/s}
    """
    runs = {arch: timeline(c, a, arch) for arch in ("standard", "parallel", "ladder")}
    axis = TimeAxis(max(finish for finish, _ in runs.values()), LEFT, RIGHT)
    body, y = list(_legend()), 30
    for arch, (finish, events) in runs.items():
        letters = "L" if arch == "parallel" else "AM"
        body += [label(4, y + 13, NAMES[arch], "b"), label(122, y + 12, "compute", "m e")]
        body.append(label(122, y + 30, "all-reduce", "m e"))
        body += _bars(events, letters, axis, y)
        end = number(axis.x(finish))
        body.append(f'<path class="k" stroke-dasharray="4 2" d="M{end} {y}v34"/>')
        y += 46
    body += axis.lines(28, y)
    return drawn(WIDTH, y + 126, body + list(_speeds(speeds, y + 42)), title, _words(runs, a, speeds))


def _bars(events, letters, axis, y):
    for kind, k, start, end in events:
        x, width = axis.x(start), max(axis.x(end) - axis.x(start), 0.3)
        gap, top = min(0.8, width / 4), y + (0 if kind == "compute" else 18)
        letter = letters[k % len(letters)] if kind == "compute" else ""
        yield f'<path fill="{COLOURS[letter or kind]}" d="{bar(x + gap / 2, top, width - gap, TALL)}"/>'
        if letter and width > 12:
            text = f"{letter}{k // len(letters) + 1}" if width > 22 else letter
            look = f'class="n" style="font-size:10px;fill:{readable_on(COLOURS[letter])}"'
            yield f'<text {look} x="{number(x + width / 2)}" y="{top + 11}">{text}</text>'


def _legend():
    x = LEFT
    for colour, words in (
        (COLOURS["A"], "A attention"),
        (COLOURS["M"], "M MLP, L both"),
        (COLOURS["all_reduce"], "all-reduce"),
    ):
        yield f'<path fill="{colour}" d="{bar(x, 6, 16, 12)}"/>'
        yield label(x + 21, 16, words, "m")
        x += 130


def _speeds(speeds, y):
    most = max(speeds.values())
    for i, (arch, name) in enumerate(NAMES.items()):
        width, top = (RIGHT - LEFT - 70) * speeds[arch] / most, y + 20 * i
        yield label(122, top + 12, name, "m e")
        yield f'<path fill="{INK.grey if arch == "none" else INK.green}" d="{bar(LEFT, top, width, TALL)}"/>'
        yield label(LEFT + width + 5, top + 12, f"{speeds[arch]:.0f} tokens/s", "m")


def exposed(events, finish):
    """Seconds in which nothing is computed."""
    return finish - sum(end - start for kind, _, start, end in events if kind == "compute")


def _words(runs, a, speeds):
    parts = [
        f"{NAMES[arch]} takes {finish * 1e6:.0f} µs, of which {exposed(events, finish) * 1e6:.0f} µs without compute"
        for arch, (finish, events) in runs.items()
    ]
    whole = ", ".join(f"{NAMES[arch]} {speed:.0f}" for arch, speed in speeds.items())
    return f"{len(a) // 2} layers, all-reduce {a[0] * 1e6:.0f} µs: {'; '.join(parts)}. Tokens/s of the model: {whole}."
