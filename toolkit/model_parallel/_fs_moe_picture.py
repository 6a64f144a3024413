"""Three lanes of a backward pass, and the four bounds of which the largest is a layer's time.

Chapter: model_parallel/fs_moe.
"""

from toolkit.show.axis import TimeAxis
from toolkit.show.ink import INK, readable_on
from toolkit.show.picture import bar, drawn, label, number

from ._fs_moe_gradients import partition_gradients
from ._fs_moe_times import DEGREES, TERMS, simulate_layer, terms

WIDTH, LEFT, RIGHT, TALL, STEP = 720, 116, 706, 24, 32  # px
COLOURS = {"D": INK.sky, "AG": INK.green, "E": INK.blue, "dense": INK.grey, "GAR": INK.orange}
COLOURS |= {"C": COLOURS["D"], "RS": COLOURS["AG"]}
LEGEND = {"D": "D dispatch, C combine", "AG": "AG gather, RS scatter", "E": "E experts", "dense": "dense part"}
LEGEND |= {"GAR": "gradients"}
ROWS = {"inter": "between nodes", "intra": "inside nodes", "compute": "compute"}
MODES = {  # how `partition_gradients` is called
    "at the end": {"method": "end"},
    "beside dense parts": {"method": "greedy", "kinds": ("dense",)},
    "adaptive": {"method": "dp"},
}


def draw(layers, costs, r, mode):
    """Picture of a backward pass with r chunks a layer.

    layers   of `_fs_moe_gradients`, equal ones         costs   of the forward pass
    mode     one of MODES
    """
    plan = partition_gradients(layers, costs, degrees=(r,), **MODES[mode])
    events, total = timeline(layers, costs.backward(), r, plan)
    longest = max(partition_gradients(layers, costs, degrees=(n,), method="end").seconds for n in DEGREES)
    axis, bottom = TimeAxis(longest, LEFT, RIGHT), 40 + STEP * len(ROWS)
    body = [*_legend(), *axis.lines(34, bottom)]
    body += [label(110, 40 + STEP * i + 16, name, "m e") for i, name in enumerate(ROWS.values())]
    body += _bars(events, axis)
    end = number(axis.x(total))
    body.append(f'<path class="k" stroke-dasharray="4 2" d="M{end} 34V{bottom}"/>')
    bounds = terms(r, costs.backward().chunk(layers[0].work, r), float(costs.reduce(plan.pieces[-2])))
    body += _bounds(bounds, bottom + 52)
    words = _words(r, mode, plan, bounds, total)
    return drawn(WIDTH, bottom + 62 + 20 * len(TERMS), body, f"{r} chunks, gradients {mode}", words)


def timeline(layers, costs, r, plan):
    """([(resource, name, chunk, start, end), …], seconds) of all windows one after the other, and what is left."""
    now, events = 0.0, []
    for (kind, which), piece in zip(plan.windows, plan.pieces, strict=True):
        layer, reducing = layers[which], float(costs.reduce(piece))
        if kind == "experts":
            finish, inside = simulate_layer(costs.chunk(layer.work, r), r, reducing)
        else:
            finish = max(layer.dense, reducing)
            inside = [("compute", "dense", 0, 0.0, layer.dense), ("inter", "GAR", 0, 0.0, reducing)]
        events += [(where, name, i, now + start, now + end) for where, name, i, start, end in inside if end > start]
        now += finish
    rest = float(costs.reduce(plan.rest))
    return [*events, *([("inter", "GAR", 0, now, now + rest)] if rest else [])], now + rest


def _bars(events, axis):
    rows = list(ROWS)
    for where, name, chunk, start, end in events:
        x, width, y = axis.x(start), max(axis.x(end) - axis.x(start), 0.4), 40 + STEP * rows.index(where)
        gap, colour = min(0.8, width / 4), COLOURS[name]
        yield f'<path fill="{colour}" d="{bar(x + gap / 2, y, width - gap, TALL)}"/>'
        text = name if name in ("dense", "GAR") else f"{name}{chunk + 1}"
        text = text if width > 7 * len(text) else name if width > 7 * len(name) else ""
        if text:
            look = f'class="n" style="font-size:10px;fill:{readable_on(colour)}"'
            yield f'<text {look} x="{number(x + width / 2)}" y="{y + 16}">{text}</text>'


def _legend():
    x = LEFT
    for name, words in LEGEND.items():
        yield f'<path fill="{COLOURS[name]}" d="{bar(x, 8, 14, 12)}"/>'
        yield label(x + 18, 18, words, "m")
        x += 36 + 5.8 * len(words)


def _bounds(bounds, y):
    yield label(4, y - 8, "The last layer to run takes the longest of", "b")
    most = max(bounds)
    for i, (name, seconds) in enumerate(zip(TERMS, bounds, strict=True)):
        top, binds = y + 20 * i, seconds == most
        yield label(110, top + 12, name, "b e" if binds else "m e")
        width = (RIGHT - LEFT - 150) * seconds / most
        yield f'<path fill="{INK.critical if binds else INK.grey}" d="{bar(LEFT, top, width, 15)}"/>'
        said = f"{seconds * 1e3:.1f} ms{', binds' if binds else ''}"
        yield label(LEFT + width + 5, top + 12, said, "b" if binds else "m")


def _words(r, mode, plan, bounds, total):
    each = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in zip(TERMS, bounds, strict=True))
    hidden = 1 - plan.rest / (plan.rest + sum(plan.pieces))
    return (
        f"Backward pass of {len(plan.degrees)} layers in {r} chunks, gradients {mode}: {total * 1e3:.1f} ms. "
        f"{hidden:.0%} of the gradients travel before the end. Bounds of the layer that runs last, in ms: {each}."
    )
