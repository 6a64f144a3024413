"""Who computes which block of an attention matrix, and when.

A schedule is plain data, one (step, rank, query owner, key owner, area) a block: at that step, that rank computes the
scores of one rank's queries on one rank's keys. `area` is the share of the block that is visible, 0 to 1.
"""

from .ink import ramp, readable_on
from .picture import bar, drawn, label, number

LEFT, TOP, SIDE = 62, 56, 380  # px: the grid's corner, its largest side


def ownership(blocks, step=None):
    """The grid of blocks, queries down and keys across; a cell says its rank, its colour and second line its step.

        explore(lambda step: ownership(plan, step), step=range(8), play="step")

    blocks   list of (step, rank, query_owner, key_owner, area)
    step     None: all steps. A number: blocks up to that step; those of the step itself are framed, and a list tells
             which queries and keys each rank has at hand
    returns  Picture
    raises   ValueError  nothing to draw, a negative owner, an area outside 0 … 1, a block computed twice
    """
    blocks = sorted(blocks)
    _check(blocks)
    n = 1 + max(max(b[2], b[3]) for b in blocks)
    last = max(b[0] for b in blocks)
    cell = min(48, SIDE // n)
    body = [label(4, 16, _title(blocks, step, last), "b"), *_frame(n, cell)]
    done = [b for b in blocks if step is None or b[0] <= step]
    draw = _cells if n <= 16 else _small_cells
    body.append(f'<g stroke="currentColor" stroke-opacity=".35">{"".join(draw(done, cell, last))}</g>')
    if step is not None:
        now = "".join(bar(*_square(b, cell)) for b in blocks if b[0] == step)
        body.append(f'<path class="k" d="{now}"/>')
    x = LEFT + n * cell + 20
    aside = _key(x, last) if step is None else _at_hand(x, step, blocks)
    height = TOP + max(n * cell, 16 * len(aside)) + 12
    return drawn(LEFT + SIDE + 250, height, [*body, *aside], "Attention blocks", _words(blocks, step, n, last))


def _check(blocks):
    if not blocks:
        raise ValueError("ownership: no blocks to draw.")
    seen = {}
    for step, rank, query, key, area in blocks:
        if min(step, rank, query, key) < 0 or not 0 <= area <= 1:
            block = (step, rank, query, key, area)
            raise ValueError(f"ownership: block {block} needs numbers from 0 and an area in 0 … 1.")
        if area and (query, key) in seen and seen[query, key] + area > 1 + 1e-9:
            raise ValueError(f"ownership: queries of rank {query} on keys of rank {key} are computed more than once.")
        seen[query, key] = seen.get((query, key), 0) + area


def _frame(n, cell):
    """Grid lines, owners along both sides, and what the sides are."""
    end, bottom = LEFT + n * cell, TOP + n * cell
    lines = "".join(f"M{LEFT + i * cell} {TOP}V{bottom}M{LEFT} {TOP + i * cell}H{end}" for i in range(n + 1))
    body = [f'<path class="g" d="{lines}"/>', label(LEFT, TOP - 22, "keys and values of rank →", "m")]
    body.append(label(LEFT - 6, TOP - 6, "queries ↓", "m e"))
    every = 1 if cell >= 14 else 4
    for i in range(0, n, every):
        body.append(label(LEFT + (i + 0.5) * cell, TOP - 6, f"{i}", "m n"))
        body.append(label(LEFT - 6, TOP + (i + 0.5) * cell + 4, f"{i}", "m e"))
    return body


def _square(block, cell):
    """(x, y, width, height) of a block: a square whose area is the visible share of the cell's."""
    _, _, query, key, area = block
    side = (cell - 3) * area**0.5
    return LEFT + (key + 0.5) * cell - side / 2, TOP + (query + 0.5) * cell - side / 2, side, side


def _cells(blocks, cell, last):
    """Squares with rank and step written inside (as rank·step where there is less room), in full on hovering."""
    for block in blocks:
        step, rank, query, key, area = block
        colour, (x, y, side, _) = ramp(step / max(1, last)), _square(block, cell)
        hint = f"step {step}, rank {rank}: queries {query} × keys {key}, {area:.0%} visible"
        yield f'<path fill="{colour}" d="{bar(x, y, side, side)}"><title>{hint}</title></path>'
        look = f'class="v" style="fill:{readable_on(colour)}" stroke="none"'
        middle = number(x + side / 2)
        if side >= 38:
            second = f'<tspan x="{middle}" dy="11">step {step}</tspan>'
            yield f'<text {look} x="{middle}" y="{number(y + side / 2 - 1)}">rank {rank}{second}</text>'
        elif side >= 16:
            yield f'<text {look} x="{middle}" y="{number(y + side / 2 + 4)}">{rank}·{step}</text>'


def _small_cells(blocks, cell, last):
    """One path a step: a thousand cells stay light."""
    for step in sorted({b[0] for b in blocks}):
        squares = "".join(bar(*_square(b, cell)) for b in blocks if b[0] == step)
        yield f'<path fill="{ramp(step / max(1, last))}" d="{squares}"><title>step {step}</title></path>'


def _key(x, last):
    """First, middle and last step's colour with their names, right of the grid."""
    body = []
    for i, step in enumerate(sorted({0, last // 2, last})):
        body.append(f'<path fill="{ramp(step / max(1, last))}" d="{bar(x, TOP + 20 * i, 14, 14)}"/>')
        body.append(label(x + 20, TOP + 12 + 20 * i, f"step {step}", "m"))
    return body


def _at_hand(x, step, blocks):
    """What each rank works on in a step, one line a rank."""
    lines = [_held(b) for b in blocks if b[0] == step] or ["nothing is computed"]
    below = [label(x, TOP + 30 + 16 * i, line, "m") for i, line in enumerate(lines)]
    return [label(x, TOP + 12, f"step {step}", "b"), *below]


def _held(block):
    _, rank, query, key, area = block
    return f"rank {rank}: Q of {query}, K and V of {key}" + (f" ({area:.0%} visible)" if area < 1 else "")


def _title(blocks, step, last):
    if step is None:
        return f"{len(blocks)} blocks in {last + 1} steps"
    return f"After step {step} of 0 … {last}: {sum(b[0] <= step for b in blocks)} of {len(blocks)} blocks"


def _words(blocks, step, n, last):
    if step is None:
        loads = {r: sum(b[4] for b in blocks if b[1] == r) for r in sorted({b[1] for b in blocks})}
        most, least = max(loads.values()), min(loads.values())
        return (
            f"{len(blocks)} attention blocks of {n} ranks in {last + 1} steps. "
            f"A rank computes {least:.3g} to {most:.3g} blocks' area."
        )
    now = "; ".join(_held(b) for b in blocks if b[0] == step)
    return f"{_title(blocks, step, last)}. {now or 'Nothing is computed'}."
