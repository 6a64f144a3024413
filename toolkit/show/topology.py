"""The machine as a graph: devices, switches and hosts; each direction of a link drawn by itself, thick by its load."""

from html import escape
from math import cos, hypot, pi, sin

import networkx as nx

from ..runtime.units import size
from .ink import INK
from .picture import drawn, label, number

WIDTH, RADIUS, LAYER = 720, 14, 90  # px: picture, a device's disc, between layers of a tree
TIERS = ("host", "disk")  # drawn under the devices


def picture(topology, by_link=None):
    """Draw a topology: a circle or a grid of devices, or a tree where there are switches, with memory tiers below.

    by_link  {(u, v): bytes}, `run.traffic.by_link` for example; None: links without load, a faster one thicker, and
             hovering shows their speed
    returns  Picture
    raises   ValueError  by_link names an edge that the topology does not have
    """
    load = dict(by_link or {})
    for edge in load:
        if edge not in topology.graph.edges:
            raise ValueError(f"topology: {topology.name} has no link {edge}; was the load measured on another machine?")
    places, height, radius = _places(topology)
    heaviest, discs = max(load.values(), default=0), set(topology.ranks)
    speeds = {link.bandwidth for _, _, link in topology.graph.edges(data="link")}
    most = heaviest or (max(speeds) if len(speeds) > 1 else 0)
    body = [label(4, 16, topology.name + (f", busiest link {size(heaviest)}" if heaviest else ""), "b")]
    for u, v in sorted(topology.graph.edges, key=lambda edge: (load.get(edge, 0), str(edge))):
        count = None if by_link is None else load.get((u, v), 0)
        bend = _bend(places[u], places[v], _side(topology, places, u, v))
        body.append(_edge(bend, f"{u} → {v}", topology.link(u, v), count, most))
    named = radius > 1 + 2.8 * max(len(str(d)) for d in topology.ranks)
    for node, (x, y) in places.items():
        body.append(
            _disc(str(node), x, y, radius, named) if node in discs else _box(str(node), x, y, _room(places, node))
        )
    if heaviest:
        body += _key(height, heaviest)
    return drawn(WIDTH, height + (24 if heaviest else 4), body, topology.name, _words(topology, by_link, load))


def _places(topology):
    """({node: (x, y)}, height, radius of a disc): devices on a circle, in a grid, or in a row between the others."""
    devices, others = list(topology.ranks), [node for node in topology.graph if node not in topology.ranks]
    if others:
        return _row(topology, devices, others)
    shape = topology.graph.graph.get("grid", ())
    if 2 <= len(shape) <= 3 and max(shape) <= 16:
        return _grid(devices, shape)
    n = len(devices)
    r = min(190, 60 + 14 * n)
    angles = [2 * pi * i / n for i in range(n)]
    circle = [(WIDTH / 2 + r * sin(a), 48 + r - r * cos(a)) for a in angles]
    return dict(zip(devices, circle, strict=True)), 2 * r + 74, min(RADIUS, 2.5 * r / n)


def _grid(devices, shape):
    """A torus as it is drawn on paper: rows and columns; a third dimension goes up and to the right."""
    depth, rows, columns = (1, *shape)[-3:]
    step = min(90, (WIDTH - 90) / (columns + 0.4 * depth))
    left = (WIDTH - step * (columns - 1 + 0.4 * (depth - 1))) / 2
    top = 70 + 0.3 * step * (depth - 1)
    places = {}
    for d in devices:
        z, (y, x) = d // (rows * columns), divmod(d % (rows * columns), columns)
        places[d] = left + step * (x + 0.4 * z), top + step * (y - 0.3 * z)
    return places, top + step * (rows - 1) + 46, min(RADIUS, 0.16 * step if depth > 1 else 0.4 * step)


def _row(topology, devices, others):
    """Devices in a row, switches in layers above, hosts and disks in layers below."""
    graph, n = topology.graph, len(devices)
    pitch = (WIDTH - 60) / n
    across = {d: 30 + pitch * (i + 0.5) for i, d in enumerate(devices)}
    above, below = {}, {}  # (hops to a device, devices beneath, how far apart) -> its nodes; fewer are drawn nearer
    for node in others:
        hops, nearest = _devices_below(graph, node, devices)
        tier = graph.nodes[node].get("kind") in TIERS
        span = round(max(across[d] for d in nearest) - min(across[d] for d in nearest))
        layers, key = (below, hops) if tier else (above, (hops, len(nearest), span))
        layers.setdefault(key, {})[node] = sum(across[d] for d in nearest) / len(nearest)
    rows = [(_even(nodes), i + 1) for i, (_, nodes) in enumerate(sorted(above.items()))]
    rows += [(_even(nodes), -i - 1) for i, (_, nodes) in enumerate(sorted(below.items()))]
    row_of = {node: level for nodes, level in rows for node in nodes} | dict.fromkeys(devices, 0)
    x_of = across | {node: x for nodes, _ in rows for node, x in nodes.items()}
    arcs = {}  # level -> the longest link between two of its nodes
    for u, v in graph.edges:
        if row_of[u] == row_of[v]:
            arcs[row_of[u]] = max(arcs.get(row_of[u], 0), abs(x_of[u] - x_of[v]))
    deep = {level: _depth(far) for level, far in arcs.items()}
    floor = 46 + LAYER * len(above) + sum(deep[level] for level in deep if level > 0)
    y_of, up = {0: floor}, floor
    for level in range(1, len(above) + 1):
        y_of[level] = up = up - LAYER - deep.get(level - 1, 0) * (level > 1)
    for level in range(1, len(below) + 1):
        y_of[-level] = floor + deep.get(0, 0) + 0.8 * LAYER * level
    places = {node: (x, y_of[row_of[node]]) for node, x in x_of.items()}
    bottom = floor + (0.8 * LAYER * len(below)) + deep.get(0, 0)
    return places, bottom + 24, min(RADIUS, 0.46 * pitch)


def _even(nodes):
    """Where a layer's nodes lie; several over the same devices side by side."""
    crowded = len(set(nodes.values())) < len(nodes)
    return {n: WIDTH * (j + 1) / (len(nodes) + 1) for j, n in enumerate(nodes)} if crowded else nodes


def _devices_below(graph, node, devices):
    """(hops, devices): the nearest devices of a switch or host. A node that reaches none lies above all."""
    hops = nx.single_source_shortest_path_length(graph, node)
    nearest = min((hops[d] for d in devices if d in hops), default=0)
    return nearest, [d for d in devices if hops.get(d) == nearest] or devices


def _depth(far):
    """How deep the arc between two devices of one row hangs."""
    return 26 + 0.16 * far


def _side(topology, places, u, v):
    """How a link bends: +1 below its row of devices, -1 above a row of switches, 0 slightly to its own right."""
    devices = u in topology.ranks and v in topology.ranks
    if len(topology.ranks) == len(places) or places[u][1] != places[v][1]:
        return 0
    return 1 if devices else -1


def _bend(start, end, side):
    """(start, control point, end) of one direction of a link; `side` as in `_side`."""
    (x0, y0), (x1, y1) = start, end
    far = hypot(x1 - x0, y1 - y0)
    dx, dy = (x1 - x0) / far, (y1 - y0) / far
    if side:  # the control point lies twice as deep as the arc
        return start, ((x0 + x1) / 2, y0 + side * (2 * _depth(far) - (16 if dx > 0 else 0))), end
    out = 9 + min(51, max(0, 0.3 * (far - 120))) * (abs(dx * dy) < 1e-9)  # in a row or column: round the discs between
    return start, ((x0 + x1) / 2 - dy * out, (y0 + y1) / 2 + dx * out), end


def _edge(bend, name, link, load, most):
    """One direction of a link, thick by its share of the heaviest load or fastest link; an arrow head half way."""
    (x0, y0), (cx, cy), (x1, y1) = bend
    speed = f"{size(link.bandwidth)}/s" + ("" if link.duplex else ", shared by both directions")
    hint = f"<title>{escape(name)}: {speed if load is None else f'{size(load)} over {speed}'}</title>"
    d = f"M{number(x0)} {number(y0)}Q{number(cx)} {number(cy)} {number(x1)} {number(y1)}"
    if load == 0:
        return f'<path class="a" stroke-dasharray="2 3" d="{d}">{hint}</path>'
    width = _thickness(load / most) if load else 0.6 + 2 * min(1, link.bandwidth / most) if most else 1
    style = f'class="l" {_look(load / most)}' if load else f'class="a" stroke-width="{number(width)}"'
    far = hypot(x1 - x0, y1 - y0)
    head = _head((x0 + 2 * cx + x1) / 4, (y0 + 2 * cy + y1) / 4, (x1 - x0) / far, (y1 - y0) / far, 4 + width)
    return f'<path {style} d="{d}">{hint}</path><path d="{head}"/>'


def _thickness(share):
    return 1.5 + 6 * share


def _look(share):
    """Thick and strong where the load is heavy, thin and pale where it is light."""
    return f'stroke-width="{number(_thickness(share))}" stroke-opacity="{0.4 + 0.6 * share:.2f}"'


def _head(x, y, dx, dy, length):
    """Path of a small triangle at (x, y) that points along (dx, dy)."""
    along, across = (dx * length / 2, dy * length / 2), (-dy * length * 0.4, dx * length * 0.4)
    left, back = x - along[0], y - along[1]
    corners = (x + along[0], y + along[1]), (left + across[0], back + across[1]), (left - across[0], back - across[1])
    return "M" + "L".join(f"{number(a)} {number(b)}" for a, b in corners) + "z"


def _room(places, node):
    """Half of the way to the next node of the row."""
    x, y = places[node]
    return min((abs(x - other) for other, row in places.values() if row == y and other != x), default=WIDTH) / 2


def _disc(name, x, y, radius, named):
    """A device; its name inside, or on hovering where there are too many."""
    shape = f'<circle cx="{number(x)}" cy="{number(y)}" r="{number(radius)}"'
    return _named(shape, name, name, x, y, named)


def _box(name, x, y, room):
    """A switch, host or disk; where its row is crowded the letters of its name are left out, then all of it."""
    short = name if 6 + 3.4 * len(name) < room else name.lstrip("abcdefghijklmnopqrstuvwxyz") or name
    half = min(6 + 3.4 * len(short), max(3, room - 1))
    shape = f'<rect x="{number(x - half)}" y="{number(y - 12)}" width="{number(2 * half)}" height="24" rx="3"'
    return _named(shape, name, short, x, y, half > 3 * len(short))


def _named(shape, name, short, x, y, fits):
    hint = "" if fits and short == name else f"<title>{escape(name)}</title>"
    text = f'<text class="v" x="{number(x)}" y="{number(y + 4)}">{escape(short)}</text>' if fits else ""
    return f'{shape} fill="{INK.blue}" stroke="currentColor">{hint}</{shape[1 : shape.index(" ")]}>{text}'


def _key(height, heaviest):
    """What thickness means: half of the heaviest load, and all of it."""
    body, x = [], 30
    for share in (0.5, 1.0):
        body.append(f'<path class="l" {_look(share)} d="M{x} {number(height + 8)}h30"/>')
        body.append(label(x + 36, height + 12, size(heaviest * share), "m"))
        x += 130
    body.append(f'<path class="a" stroke-dasharray="2 3" d="M{x} {number(height + 8)}h30"/>')
    return [*body, label(x + 36, height + 12, "no bytes", "m")]


def _words(topology, by_link, load):
    graph = topology.graph
    said = f"{topology.name}: {len(topology.ranks)} devices, {graph.number_of_edges()} directed links"
    if by_link is None:
        speeds = sorted({data["link"].bandwidth for _, _, data in graph.edges(data=True)})
        return f"{said} of {' and '.join(f'{size(s)}/s' for s in speeds)}."
    used = {edge: count for edge, count in load.items() if count}
    if not used:
        return f"{said}; none carries bytes."
    u, v = max(sorted(used, key=str), key=used.get)
    most, least = size(used[u, v]), size(min(used.values()))
    return f"{said}; {len(used)} carry bytes, the busiest {most} ({u} → {v}), the lightest {least}."
