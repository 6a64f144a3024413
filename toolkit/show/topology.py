"""The machine as a graph: devices, switches and hosts; each direction of a link drawn by itself, thick by its load."""

from html import escape
from math import cos, hypot, pi, sin

import networkx as nx

from ..runtime.units import size
from .ink import INK
from .picture import drawn, label, number

WIDTH, RADIUS, LAYER = 720, 14, 90  # px: picture, a device's disc, between layers of a tree


def picture(topology, by_link=None):
    """Draw a topology: a circle of devices, or a tree where there are switches, hosts or a fabric.

    by_link  {(u, v): bytes}, `run.traffic.by_link` for example; None: links without load, hovering shows their speed
    returns  Picture
    raises   ValueError  by_link names an edge that the topology does not have
    """
    load = dict(by_link or {})
    for edge in load:
        if edge not in topology.graph.edges:
            raise ValueError(f"topology: {topology.name} has no link {edge}; was the load measured on another machine?")
    places, height = _places(topology)
    heaviest, discs = max(load.values(), default=0), set(topology.ranks)
    body = [label(4, 16, topology.name + (f", busiest link {size(heaviest)}" if heaviest else ""), "b")]
    for u, v in sorted(topology.graph.edges, key=lambda edge: (load.get(edge, 0), str(edge))):
        count = None if by_link is None else load.get((u, v), 0)
        bend = _bend(places[u], places[v], beside=u in discs and v in discs and len(discs) < len(places))
        body.append(_edge(bend, f"{u} → {v}", topology.link(u, v), count, heaviest))
    body += [_node(escape(str(node)), *place, node in discs) for node, place in places.items()]
    if heaviest:
        body += _key(height, heaviest)
    return drawn(WIDTH, height + (24 if heaviest else 4), body, topology.name, _words(topology, by_link, load))


def _places(topology):
    """({node: (x, y)}, height): devices on a circle, or in a row with everything else in layers above."""
    devices, others = list(topology.ranks), [node for node in topology.graph if node not in topology.ranks]
    n = len(devices)
    if not others:
        r = min(190, 60 + 14 * n)
        angles = [2 * pi * i / n for i in range(n)]
        circle = [(WIDTH / 2 + r * sin(a), 48 + r - r * cos(a)) for a in angles]
        return dict(zip(devices, circle, strict=True)), 2 * r + 74
    pitch = (WIDTH - 60) / n
    across = {d: 30 + pitch * (i + 0.5) for i, d in enumerate(devices)}
    layers = {}  # (hops to a device, devices below) -> its nodes; fewer of both are drawn lower
    for node in others:
        hops, below = _devices_below(topology.graph, node, devices)
        layers.setdefault((hops, len(below)), {})[node] = sum(across[d] for d in below) / len(below)
    floor = 46 + LAYER * len(layers)
    places = {d: (x, floor) for d, x in across.items()}
    for i, (_, nodes) in enumerate(sorted(layers.items())):
        crowded = len(set(nodes.values())) < len(nodes)  # several over the same devices: side by side
        even = {node: WIDTH * (j + 1) / (len(nodes) + 1) for j, node in enumerate(nodes)}
        places |= {node: (x, floor - LAYER * (i + 1)) for node, x in (even if crowded else nodes).items()}
    arcs = [abs(across[u] - across[v]) for u, v in topology.graph.edges if u in across and v in across]
    return places, floor + 24 + (_depth(max(arcs)) if arcs else 0)


def _devices_below(graph, node, devices):
    """(hops, devices): the nearest devices of a switch or host. A node that reaches none lies above all."""
    hops = nx.single_source_shortest_path_length(graph, node)
    nearest = min((hops[d] for d in devices if d in hops), default=0)
    return nearest, [d for d in devices if hops.get(d) == nearest] or devices


def _depth(far):
    """How deep the arc between two devices of one row hangs."""
    return 26 + 0.16 * far


def _bend(start, end, beside):
    """(start, control point, end) of one direction of a link: right of its line; for devices of one row, below it."""
    (x0, y0), (x1, y1) = start, end
    far = hypot(x1 - x0, y1 - y0)
    dx, dy = (x1 - x0) / far, (y1 - y0) / far
    if beside:  # the control point lies twice as deep as the arc
        return start, ((x0 + x1) / 2, y0 + 2 * _depth(far) - (16 if dx > 0 else 0)), end
    return start, ((x0 + x1) / 2 - dy * 9, (y0 + y1) / 2 + dx * 9), end


def _edge(bend, name, link, load, heaviest):
    """One direction of a link, thick by its share of the heaviest load, with an arrow head half way."""
    (x0, y0), (cx, cy), (x1, y1) = bend
    speed = f"{size(link.bandwidth)}/s" + ("" if link.duplex else ", shared by both directions")
    hint = f"<title>{escape(name)}: {speed if load is None else f'{size(load)} over {speed}'}</title>"
    d = f"M{number(x0)} {number(y0)}Q{number(cx)} {number(cy)} {number(x1)} {number(y1)}"
    if load == 0:
        return f'<path class="a" stroke-dasharray="2 3" d="{d}">{hint}</path>'
    width = _thickness(load / heaviest) if load else 1
    style = f'class="l" {_look(load / heaviest)}' if load else 'class="a"'
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


def _node(name, x, y, device):
    """A disc for a device, a box for anything else, its name inside."""
    half = 6 + 3.4 * len(name)
    shape = (
        f'<circle cx="{number(x)}" cy="{number(y)}" r="{RADIUS}"'
        if device
        else f'<rect x="{number(x - half)}" y="{number(y - 12)}" width="{number(2 * half)}" height="24" rx="3"'
    )
    text = f'<text class="v" x="{number(x)}" y="{number(y + 4)}">{name}</text>'
    return f'{shape} fill="{INK.blue}" stroke="currentColor"/>{text}'


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
