"""Where tokens go from layer to layer: experts grouped by GPU, what stays in the GPU's colour, what crosses in grey.

Chapter: model_parallel/ex_flow.
"""

import numpy as np

from toolkit.show.ink import INK, readable_on
from toolkit.show.picture import bar, drawn, label, number

from ._ex_flow_placement import distance, placement_cost, transition_counts

COLOURS = (INK.blue, INK.orange, INK.green, INK.purple, INK.sky, INK.vermillion, "#F0E442", "#666666")
WIDTH, LEFT, TOP, ROW, BOX, RIGHT = 720, 62, 24, 24, 22, 700  # px
PURPOSES = {"dispatch": INK.orange, "combine": INK.vermillion, "tokens": INK.green, "K/V": INK.blue}


def draw(routes, placement, gpus, sent, longest, scheme):
    """Picture of tokens between layers, and of an iteration's bytes below.

    routes    (tokens, L)        placement   (L, E) ranks
    sent      {"dispatch", "combine", "tokens", "K/V": bytes}        longest   bytes that fill a bar
    """
    counts = transition_counts(routes, placement.shape[1])
    crossed = placement_cost(counts, placement, distance(gpus)) / len(counts)
    layers, experts = placement.shape
    place = np.argsort(np.argsort(placement, axis=1, kind="stable"), axis=1)  # an expert's row in its layer
    step = (RIGHT - LEFT - BOX) / (layers - 1)
    body = [label(LEFT + j * step + BOX / 2, 14, f"layer {j + 1}", "m n") for j in range(layers)]
    body += _ways(counts, placement, place, step, len(routes))
    for j in range(layers):
        for e in range(experts):
            body += _box(LEFT + j * step, TOP + ROW * place[j, e], e, placement[j, e])
    body += _groups(gpus, experts)
    bottom = TOP + ROW * experts + 26
    body.append(label(LEFT, bottom - 8, "bytes in one iteration", "b"))
    body += _bytes(sent, longest, bottom)
    title = f"{experts} experts on {gpus} GPUs, {scheme}"
    return drawn(WIDTH, bottom + 86, body, title, _words(title, crossed, sent))


def _ways(counts, placement, place, step, tokens):
    """Lines as wide as their tokens, those of one look and width in one path."""
    paths = {}
    for j, n in enumerate(counts):
        for a, b in zip(*np.nonzero(n), strict=True):
            width = number(max(0.3, 0.8 * ROW * n[a, b] / (tokens / len(n))))
            stays = placement[j, a] == placement[j + 1, b]
            x, y = number(LEFT + j * step + BOX), number(TOP + ROW * (place[j, a] + 0.42))
            look = (COLOURS[placement[j, a]] if stays else INK.grey, width)
            paths.setdefault(look, []).append(
                f"M{x} {y}l{number(step - BOX)} {number(ROW * (place[j + 1, b] - place[j, a]))}"
            )
    for (colour, width), lines in sorted(paths.items(), key=lambda item: item[0][0] != INK.grey):
        faint = ' stroke-opacity=".35"' if colour == INK.grey else ""
        yield f'<path fill="none" stroke="{colour}" stroke-width="{width}"{faint} d="{"".join(lines)}"/>'


def _box(x, y, expert, gpu):
    yield f'<path fill="{COLOURS[gpu]}" d="{bar(x, y, BOX, ROW - 4)}"/>'
    look = f'class="n" style="font-size:11px;fill:{readable_on(COLOURS[gpu])}"'
    yield f'<text {look} x="{number(x + BOX / 2)}" y="{number(y + 14)}">{expert}</text>'


def _groups(gpus, experts):
    tall = ROW * experts / gpus
    for g in range(gpus):
        yield label(LEFT - 6, TOP + tall * g + tall / 2 + 2, f"GPU {g}", "m e")
        if g:
            yield f'<path class="g" d="M{LEFT - 50} {number(TOP + tall * g - 2)}H{RIGHT}"/>'


def _bytes(sent, longest, y):
    for i, (purpose, colour) in enumerate(PURPOSES.items()):
        width, top = (RIGHT - LEFT - 96) * sent[purpose] / longest, y + 20 * i
        yield label(LEFT - 6, top + 12, purpose, "m e")
        yield f'<path fill="{colour}" d="{bar(LEFT, top, max(width, 0.5), 15)}"/>'
        yield label(LEFT + width + 5, top + 12, _amount(sent[purpose]), "m")


def _amount(nbytes):
    return "0" if not nbytes else f"{nbytes / 1e6:.2f} MB" if nbytes >= 1e4 else f"{nbytes / 1e3:.1f} kB"


def _words(title, crossed, sent):
    parts = ", ".join(f"{purpose} {_amount(nbytes)}" for purpose, nbytes in sent.items())
    share = f"{100 * crossed:.0f} % of the steps from layer to layer change the GPU"
    return f"{title}: {share}. Bytes in one iteration: {parts}."
