"""A node's links, thick by what a step sends over them; below, memory and seconds a microbatch of every scheme.

Chapter: model_parallel/frontier_partitioning.
"""

from toolkit.show.ink import INK
from toolkit.show.picture import bar, drawn, label, number

from . import _partition_scale as scale
from . import frontier_partitioning as fp

WIDTH, TALL, CAPACITY = 720, 15, 64e9
STATES = {"weights": INK.blue, "second": INK.sky, "gradients": INK.green, "states": INK.purple}
TIMES = {"compute": INK.grey, "pair": INK.sky, "node": INK.orange, "inter": INK.vermillion}
WORDS = {"pair": "in packages", "node": "in the node", "inter": "between nodes"}


def shown(n):
    """The five schemes of the picture, by name."""
    named = fp.named(n)
    del named["ZeRO-1"]
    return named


def by_links(scheme, psi, n, gamma):
    """Bytes that a GCD sends in a step, {"pair", "node", "inter": bytes}; of a flat ring, most stays in the node."""
    leaves = fp.between_nodes(scheme, psi, n, gamma)
    sent = {"pair": 0.0, "node": 0.0, "inter": 0.0}
    for (_, group), count in fp.step_bytes(scheme, psi, n, gamma).items():
        sent["node" if group == "flat" else group] += count
    flat = leaves - sent["inter"]
    return {"pair": sent["pair"], "node": sent["node"] - flat, "inter": leaves}


def split(step):
    """Seconds {"compute", "pair", "node", "inter"}; the rest of the step is launching and waiting for a microbatch."""
    exposed = step.exposed
    inter = exposed.get("inter", 0) + exposed.get("flat", 0)
    return {"compute": step.compute, "pair": exposed.get("pair", 0), "node": exposed.get("node", 0), "inter": inter}


def draw(name, gamma, nic, n=384, tokens=512):
    """Picture of one scheme of `shown`, beside the others."""
    schemes, psi = shown(n), -(-scale.parameters(scale.GPT_20B) // n) * n
    links = by_links(schemes[name], psi, n, gamma)
    steps = {other: scale.step(s, n, gamma, nic=nic, tokens=tokens) for other, s in schemes.items()}
    memory = {other: fp.memory(s, psi, n) for other, s in schemes.items()}
    body = [label(4, 15, f"{name}: bytes a GCD sends in a step of {gamma} microbatch{'es' * (gamma > 1)}", "b")]
    body += [*_node(links), *_bars(name, memory, steps, gamma, 196)]
    return drawn(WIDTH, 196 + 40 + 27 * len(schemes) + 40, body, f"{name} on a node of Frontier", _said(
        name, gamma, links, memory[name], {other: step.seconds / gamma for other, step in steps.items()}
    ))  # fmt: skip


def _node(links):
    thick = {group: 1 + 15 * count / max(links.values()) if count else 0 for group, count in links.items()}
    yield from _line(360, 36, 360, 84, thick["inter"], INK.vermillion)
    yield '<path fill="none" stroke="currentColor" stroke-opacity=".5" d="M60 28h600v12h-600z"/>'
    yield label(68, 38, "Slingshot, to other nodes", "m")
    yield from _line(120, 92, 600, 92, thick["node"], INK.orange)
    for package in range(4):
        x = 120 + 160 * package
        yield from _line(x, 92, x, 122, thick["node"], INK.orange)
        yield f'<path fill="none" stroke="currentColor" stroke-opacity=".5" d="M{x - 56} 122h112v34h-112z"/>'
        yield from _line(x - 30, 139, x + 30, 139, thick["pair"], INK.sky)
        for gcd, left in ((2 * package, x - 50), (2 * package + 1, x + 22)):
            yield f'<path fill="{INK.blue}" d="{bar(left, 127, 28, 24)}"/>'
            yield f'<text class="v" x="{left + 14}" y="143">{gcd}</text>'
    yield label(372, 66, f"between nodes {_size(links['inter'])}", "m")
    yield label(120, 78, f"in the node {_size(links['node'])}", "m")
    yield label(360, 174, f"in each package {_size(links['pair'])}", "m n")


def _line(x0, y0, x1, y1, thick, colour):
    if thick:
        yield f'<path fill="none" stroke="{colour}" stroke-width="{number(thick)}" d="M{x0} {y0}L{x1} {y1}"/>'


def _bars(name, memory, steps, gamma, top):
    most = max(step.seconds / gamma for step in steps.values())
    yield label(120, top + 8, "model states a GCD", "b")
    yield label(400, top + 8, "seconds a microbatch", "b")
    y = top + 16
    for other, step in steps.items():
        chosen = "b" if other == name else "m"
        yield label(112, y + 12, other, f"{chosen} e")
        yield from _stack(memory[other], STATES, 120, y, 150 / CAPACITY)
        yield label(278, y + 12, f"{sum(memory[other].values()) / 1e9:.1f} GB", chosen)
        parts = {group: value / gamma for group, value in split(step).items()}
        x = yield from _stack(parts, TIMES, 400, y, 250 / most)
        yield label(x + 5, y + 12, f"{step.seconds / gamma:.2f} s", chosen)
        y += 27
    yield f'<path class="k" stroke-dasharray="4 2" d="M270 {top + 14}V{y}"/>'
    yield label(270, y + 12, "64 GB", "m n")
    for x, names, colours in ((4, ("weights", "second copy", "gradients", "Adam"), STATES),
                              (330, ("compute", "waits: package", "node", "between nodes"), TIMES)):  # fmt: skip
        for words, colour in zip(names, colours.values(), strict=True):
            yield f'<path fill="{colour}" d="{bar(x, y + 22, 12, 12)}"/>'
            yield label(x + 16, y + 32, words, "m")
            x += 26 + 6.6 * len(words)


def _stack(parts, colours, x, y, scale_):
    """Bars one after the other; returns where they end."""
    for name, colour in colours.items():
        width = parts[name] * scale_
        if width > 0.2:
            yield f'<path fill="{colour}" d="{bar(x, y, width, TALL)}"><title>{name}</title></path>'
        x += width
    return x


def _size(count):
    return f"{count / 1e9:.1f} GB" if count else "nothing"


def _said(name, gamma, links, memory, seconds):
    sent = ", ".join(f"{WORDS[group]} {_size(count)}" for group, count in links.items())
    kept = ", ".join(f"{state} {value / 1e9:.1f}" for state, value in memory.items())
    times = ", ".join(f"{other} {value:.2f}" for other, value in seconds.items())
    return (
        f"{name}, {gamma} microbatch{'es' * (gamma > 1)} a step. A GCD sends {sent}. "
        f"Model states {sum(memory.values()) / 1e9:.1f} GB of 64: {kept}. Seconds a microbatch: {times}."
    )
