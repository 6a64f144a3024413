"""Networks of many switches: torus, leaf-spine, fat tree, dragonfly. All equal paths of a pair are in `paths`."""

from collections.abc import Sequence
from math import ceil, prod

from ..errors import ShapeError
from ..hardware import replace
from .graph import Topology, blocks, by_destination, empty, join, whole


def torus(shape, link):
    """Devices in a grid whose rows, columns, … are rings; the last dimension counts fastest in the ranks.

    shape    lengths, (4, 4) or (4, 4, 4) say; a length of 2 is one link, not two
    The default path is dimension-ordered: along the first dimension to the end, the shorter way round and ties
    forward, then along the second (Dally and Seitz 1987). All paths of the fewest hops count as equal.
    """
    if not isinstance(shape, Sequence) or not shape:
        raise ShapeError(f"shape={shape!r}: give the lengths of a torus, (4, 4) for example")
    for length in shape:
        whole(shape=length)
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    n = prod(shape)
    graph = empty(n)
    graph.graph["grid"] = tuple(shape)

    def neighbour(a, axis, step):
        place = a // strides[axis] % shape[axis]
        return a + ((place + step) % shape[axis] - place) * strides[axis]

    for a in range(n):
        for axis, length in enumerate(shape):
            b = neighbour(a, axis, 1)
            if b > a or length > 2:
                join(graph, a, b, link)

    def path(a, b):
        nodes = [a]
        for axis, length in enumerate(shape):
            ahead = (b // strides[axis] - a // strides[axis]) % length
            step = 1 if 2 * ahead <= length else -1
            for _ in range(min(ahead, length - ahead)):
                nodes.append(neighbour(nodes[-1], axis, step))
        return nodes

    return Topology(f"torus of {' × '.join(map(str, shape))}", graph, tuple(range(n)), path)


def leaf_spine(leaves, per_leaf, spines, port, uplink=None, *, oversubscription=None):
    """Racks of devices under leaf switches; every leaf has a link to every spine.

    port              Link of each device to its leaf
    uplink            Link of each leaf to each spine; like `port` if not given
    oversubscription  what a leaf takes in over what it can pass up: per_leaf · port / (spines · uplink). Instead of
                      `uplink`, and then its bandwidth follows
    Between racks there is one path over each spine; by default the destination chooses (see `graph.by_destination`).
    """
    whole(leaves=leaves, per_leaf=per_leaf)
    whole("spine", spines=spines)
    if oversubscription is not None:
        if uplink is not None:
            raise ShapeError(f"oversubscription={oversubscription!r} and uplink={uplink!r}: give one of the two")
        if not oversubscription > 0:
            raise ShapeError(f"oversubscription={oversubscription!r}: give a ratio above 0; 1 is non-blocking")
        uplink = replace(port, bandwidth=per_leaf * port.bandwidth / (spines * oversubscription))
    n = leaves * per_leaf
    graph = empty(n)
    for a in range(n):
        join(graph, a, f"leaf{a // per_leaf}", port)
    for leaf in range(leaves):
        for spine in range(spines):
            join(graph, f"leaf{leaf}", f"spine{spine}", uplink or port)

    def count(a, b):
        return 1 if a // per_leaf == b // per_leaf else spines

    def nth(a, b, i):
        up, down = f"leaf{a // per_leaf}", f"leaf{b // per_leaf}"
        return [a, up, b] if up == down else [a, up, f"spine{i}", down, b]

    path, paths = by_destination(count, nth)
    name = f"leaf-spine of {leaves} × {per_leaf}, {spines} spine{'s' * (spines > 1)}"
    return Topology(name, graph, tuple(range(n)), path, blocks(leaves, per_leaf), paths)


def fat_tree(k, link, *, oversubscription=1):
    """Three levels of equal switches with k ports: k pods of k/2 edge switches (Al-Fares, Loukissas, Vahdat 2008).

    oversubscription  ports down over ports up at an edge switch. 1: k/2 each, k³/4 devices, k²/4 cores, any permutation
                      at full speed. r: k·r/(r+1) down, k/(r+1) up, as many aggregation switches a pod, fewer cores
    Between pods there is one path over each core; by default the destination chooses (see `graph.by_destination`).
    `groups` are the devices under one edge switch.
    """
    whole("port", 2, k=k)
    half = k // 2
    if k % 2:
        raise ShapeError(f"k={k!r}: half of a switch's ports go up, so k is even")
    ratios = {(k - up) / up: up for up in range(half, 0, -1)}
    up = next((up for ratio, up in ratios.items() if abs(ratio - oversubscription) < 1e-6), None)
    if up is None:
        fit = ", ".join(f"{ratio:g}" for ratio in ratios)
        raise ShapeError(f"oversubscription={oversubscription!r}: with {k} ports a switch the ratio can be {fit}")
    per_edge = k - up
    per_pod = half * per_edge
    n = k * per_pod
    graph = empty(n)
    for pod in range(k):
        for edge in range(pod * half, (pod + 1) * half):
            for a in range(edge * per_edge, (edge + 1) * per_edge):
                join(graph, a, f"edge{edge}", link)
            for agg in range(pod * up, (pod + 1) * up):
                join(graph, f"edge{edge}", f"agg{agg}", link)
        for agg in range(up):
            for core in range(agg * half, (agg + 1) * half):
                join(graph, f"agg{pod * up + agg}", f"core{core}", link)

    def count(a, b):
        return 1 if a // per_edge == b // per_edge else up if a // per_pod == b // per_pod else up * half

    def nth(a, b, i):
        (first, pod), (last, other) = ((d // per_edge, d // per_pod) for d in (a, b))
        if first == last:
            return [a, f"edge{first}", b]
        rise = [a, f"edge{first}", f"agg{pod * up + i % up}"]
        if pod == other:
            return [*rise, f"edge{last}", b]
        return [*rise, f"core{i % up * half + i // up}", f"agg{other * up + i % up}", f"edge{last}", b]

    path, paths = by_destination(count, nth)
    name = f"fat tree of {k}-port switches" + ("" if up == half else f", {per_edge / up:g}:1")
    return Topology(name, graph, tuple(range(n)), path, blocks(n // per_edge, per_edge), paths)


def dragonfly(groups, routers, per_router, port, local=None, across=None, *, cables=1):
    """Groups of fully connected routers; between any two groups lie `cables` long links (Kim, Dally, Scott, Abts 2008).

    port     Link of a device to its router
    local    Link of two routers of a group; like `port` if not given
    across   Link of two groups; like `port` if not given
    cables   how many of these lie between each pair of groups, at most one a router
    Routing is minimal: at most one hop in the first group, one across, one in the last. Of the cables between two
    groups those that need the fewest hops are equal; the destination chooses (see `graph.by_destination`).
    Long links are dealt to the routers of a group in order, ⌈cables · (groups - 1) / routers⌉ each.
    """
    whole(groups=groups, routers=routers, per_router=per_router)
    whole("link between groups", cables=cables)
    if cables > routers:
        raise ShapeError(f"cables={cables}: a group has {routers} routers and each takes one cable to another group")
    local, across = local or port, across or port
    per_group, n = routers * per_router, groups * routers * per_router
    each = ceil(cables * (groups - 1) / routers)  # long links a router
    graph = empty(n)

    def gate(group, other, cable):
        """The router of `group` where this cable to `other` begins."""
        return f"router{group}.{(cable * (groups - 1) + other - (other > group)) // each}"

    for group in range(groups):
        for r in range(routers):
            for a in range(group * per_group + r * per_router, group * per_group + (r + 1) * per_router):
                join(graph, a, f"router{group}.{r}", port)
            for before in range(r):
                join(graph, f"router{group}.{before}", f"router{group}.{r}", local)
        for other in range(group):
            for cable in range(cables):
                join(graph, gate(group, other, cable), gate(other, group, cable), across)

    def ways(a, b):
        g, h = a // per_group, b // per_group
        first, last = f"router{g}.{a // per_router % routers}", f"router{h}.{b // per_router % routers}"
        if g == h:
            return [[a, first, b] if first == last else [a, first, last, b]]
        routes = []
        for cable in range(cables):
            out, into = gate(g, h, cable), gate(h, g, cable)
            routes.append([a, first, *[out] * (out != first), *[into] * (into != last), last, b])
        fewest = min(map(len, routes))
        return [route for route in routes if len(route) == fewest]

    path, paths = by_destination(lambda a, b: len(ways(a, b)), lambda a, b, i: ways(a, b)[i])
    name = f"dragonfly of {groups} × {routers} × {per_router}"
    return Topology(name, graph, tuple(range(n)), path, blocks(groups, per_group), paths)
