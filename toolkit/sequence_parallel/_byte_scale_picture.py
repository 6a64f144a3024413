"""A plan as a picture: who computes, who waits for messages, who has nothing to do; and how it compares.

One row a rank. A long sequence spans the rows of its ring; packs of short ones lie in one row each. Chapter:
sequence_parallel/byte_scale.
"""

from itertools import pairwise

from toolkit.runtime.units import seconds as in_words
from toolkit.show.axis import TimeAxis
from toolkit.show.ink import INK
from toolkit.show.picture import bar, drawn, label, number

WIDTH, LEFT, RIGHT, TOP, HEIGHT, PANEL = 720, 56, 540, 40, 256, 560  # px
PACKS, RINGS, LATE = f"fill:{INK.sky}", f"fill:{INK.blue}", f"fill:{INK.orange}"
THIN = 0.4  # px between bars that are drawn as one


def gantt(plan, name, beside):
    """The Gantt chart of a plan, and beside it time and traffic of several plans.

    beside    dict: name -> Plan, the one drawn among them
    returns   Picture
    """
    starts, ends, _ = plan.flow()
    axis, row = TimeAxis(plan.makespan(), LEFT, RIGHT), HEIGHT / plan.ranks
    packs, rings, late, marks = [], [], [], []
    last = {}  # rank -> [start, end] of a run of packs
    for b, start, end, (compute, exposed) in zip(plan.micro_batches, starts, ends, plan.seconds, strict=True):
        x, y = axis.x(start), axis.x(end)
        if len(b.ranks) == 1:
            rank = b.ranks[0]
            if rank in last and x - last[rank][1] < THIN:
                last[rank][1] = y
            else:
                if rank in last:
                    packs.append((rank, 1, *last[rank]))
                last[rank] = [x, y]
            continue
        middle = x + (y - x) * compute / (compute + exposed)
        for first, count in runs(b.ranks):
            rings.append((first, count, x, middle - 0.5))
            late.append((first, count, middle, y - 0.5))
            if count * row >= 12 and y - x >= 30 and len(b.sequences) == 1:
                place = f'x="{number((x + y) / 2)}" y="{number(TOP + (first + count / 2) * row + 4)}"'
                marks.append(f"<text {place}>{tokens(b.lengths[0])}</text>")
    packs += [(rank, 1, *run) for rank, run in last.items()]

    idle = "".join(f"M{LEFT} {number(TOP + (r + 0.5) * row)}H{RIGHT}" for r in range(plan.ranks))
    body = [*_legend(), f'<path class="w" style="stroke-width:{number(row)}" d="{idle}"/>']
    for style, rects in ((PACKS, packs), (RINGS, rings), (LATE, late)):
        gap = 0.6 if style != PACKS and row > 1 else 0.0
        d = "".join(bar(x, TOP + first * row, y - x, count * row - gap) for first, count, x, y in rects if y - x > 0.05)
        body.append(f'<path style="{style}" d="{d}"/>')
    body += [f'<g class="v">{"".join(marks)}</g>', *axis.lines(TOP, TOP + HEIGHT)]
    body += [label(LEFT - 6, TOP + 10, "rank 0", "m e"), label(LEFT - 6, TOP + HEIGHT, f"{plan.ranks - 1}", "m e")]
    body += _panel("a step takes", {n: (p.makespan(), in_words(p.makespan())) for n, p in beside.items()}, name, TOP)
    hops = {n: p.token_hops / sum(s for b in p.micro_batches for s in b.lengths) for n, p in beside.items()}
    body += _panel("a token's keys make", {n: (h, f"{h:.1f} hops") for n, h in hops.items()}, name, TOP + 130)
    return drawn(WIDTH, TOP + HEIGHT + 34, body, f"{name}: one step", words(plan, name, hops[name]))


def words(plan, name, hops):
    shares = ", ".join(f"{share:.0%} {what}" for what, share in plan.shares.items())
    return (
        f"{name} on {plan.ranks} ranks: a step takes {in_words(plan.makespan())}. Of all ranks' time: {shares}. "
        f"A token's keys make {hops:.1f} hops on average."
    )


def runs(ranks):
    """(first, count) of each run of neighbours."""
    ranks = sorted(ranks)
    cuts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(ranks)) if b != a + 1), len(ranks)]
    return [(ranks[a], b - a) for a, b in pairwise(cuts)]


def tokens(n):
    """A count of tokens as people say it: 2M, 96K."""
    return f"{n / 2**20:.3g}M" if n >= 2**20 else f"{n / 2**10:.0f}K" if n >= 2**10 else str(n)


def _panel(title, values, name, top):
    """Horizontal bars with their values; the one called `name` in bold."""
    most, body = max(value for value, _ in values.values()) or 1.0, [label(PANEL, top + 10, title, "b")]
    for i, (each, (value, text)) in enumerate(values.items()):
        y = top + 30 + 33 * i
        body.append(label(PANEL, y, f"{each}: {text}", "b" if each == name else "m"))
        style = "c" if each == name else "o"
        body.append(f'<path class="{style}" d="M{PANEL} {y + 8}h{number(max(0.5, 150 * value / most))}"/>')
    return body


def _legend():
    body, x = [], LEFT
    signs = ((PACKS, "on one rank"), (RINGS, "on a ring of ranks"), (LATE, "waits for messages"))
    for style, text in signs:
        body += [f'<path style="{style}" d="{bar(x, 8, 14, 12)}"/>', label(x + 19, 18, text, "m")]
        x += 36 + 6 * len(text)
    return [*body, f'<path class="w" style="stroke-width:12" d="M{x} 14h14"/>', label(x + 19, 18, "nothing to do", "m")]
