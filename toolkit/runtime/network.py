"""The fluid network: flows that share a link share it max-min fairly (progressive filling).

A flow first pays its route's latency, then moves its bytes at its current fair rate. When flows start or end, only
the flows that are connected to them through shared links get new rates; all others keep their finish times to the bit.
The model is SimGrid's CM02 without TCP correction factors (Casanova et al. 2014), and the answers agree with it where
all latencies are equal: there a flow's share of a link falls with its latency, as TCP's does; here shares are equal.
"""

from functools import cache

import numpy as np

INFINITY = float("inf")


@cache
def loops():
    """The compiled arithmetic. Numba loads when a network first moves something (0.3 s), not with this module."""
    from . import fair_share

    return fair_share


class _Column:
    """A numpy array that grows at its end; `rows` is what it holds."""

    def __init__(self, kind, values=()):
        self._room, self.rows = np.empty(64, kind), np.empty(0, kind)
        self.extend(values)

    def extend(self, values):
        old, n = len(self.rows), len(self.rows) + len(values)
        if n > len(self._room):
            self._room = np.resize(self._room, 2 * n)
        self.rows = self._room[:n]
        self.rows[old:] = values


class _Pieces:
    """A message that travels as several flows: it has arrived when the last of them has."""

    __slots__ = ("left", "payload")

    def __init__(self, payload, left):
        self.payload, self.left = payload, left


class FluidNetwork:
    """Flows in flight on a topology. Drives nothing by itself: the engine asks `next_time` and calls `advance`.

    on_finish(payload)   called for every flow that ends, in the order of their slots
    """

    def __init__(self, topology, on_finish):
        self.topology, self.on_finish = topology, on_finish
        self.next_time = INFINITY
        self._links, self._bandwidths = {}, []  # medium -> number; bytes/s
        self._routes_of, self._routes = {}, 0  # (a, b) -> numbers; how many there are
        self._new_routes = []  # ({link number: share}, latency, flow cap), not yet in the columns
        self._capacity, self._head = _Column(float), _Column(np.int64)  # by link: bytes/s; the first flow on it
        self._hops, self._share = _Column(np.int64), _Column(float)  # by route and hop
        self._first, self._latency, self._cap = _Column(np.int64, [0]), _Column(float), _Column(float)  # by route
        self._payload, self._free = [], []
        self._starting = []  # (slot, route, bytes) of this instant
        self._grow(64)

    def start(self, a, b, nbytes, payload):
        """Begin to move `nbytes` from device a to device b at the current instant (rates follow in `settle`)."""
        routes = self._routes_of.get((a, b)) or self.routes(a, b)
        if len(routes) > 1:
            payload, nbytes = _Pieces(payload, len(routes)), nbytes / len(routes)
        for route in routes:
            if not self._free:
                self._grow(2 * len(self._payload))
            slot = self._free.pop()
            self._payload[slot] = payload
            self._starting += (slot, route, nbytes)

    def in_flight(self):
        """Payloads that have started and not arrived, in the order of their slots."""
        return list(dict.fromkeys(whole(payload) for payload in self._payload if payload is not None))

    def settle(self, now):
        """Give rates to everything that started at this instant."""
        if self._starting:
            if self._new_routes:
                self.extend_tables()
            table = np.array(self._starting, np.float64).reshape(-1, 3)
            self._starting = []
            slots, routes = table[:, :2].T.astype(np.int64)
            self.next_time = loops().begin(now, slots, routes, table[:, 2].copy(), *self.columns)

    def advance(self, now):
        """Move to `now`: end the flows that are due, let those whose latency is over in, share anew."""
        ended, self.next_time = loops().advance(now, *self.columns)
        slots = ended.tolist()
        payloads = [self._payload[slot] for slot in slots]
        for slot in slots:
            self._payload[slot] = None
        self._free += slots[::-1]
        for payload in payloads:
            if type(payload) is _Pieces:
                payload.left -= 1
                if payload.left:
                    continue
                payload = payload.payload
            self.on_finish(payload)

    def routes(self, a, b):
        """Numbers of the routes of a message, one a flow."""
        if (a, b) in self._routes_of:
            return self._routes_of[a, b]
        new, first = [self._route(paths) for paths in self.topology.flows(a, b)], self._routes
        self._new_routes += new
        self._routes += len(new)
        found = self._routes_of[a, b] = range(first, self._routes)
        return found

    def _route(self, paths):
        """One flow, spread evenly over `paths`. It has arrived when the longest way has been gone."""
        times, latency, cap = {}, 0.0, INFINITY  # link number -> how many of the paths use it
        for edges in paths:
            links = [self.topology.link(u, v) for u, v in edges]
            media = {self.topology.medium(u, v): link for (u, v), link in zip(edges, links, strict=True)}
            for medium, link in media.items():  # there and back over one shared medium is one use
                if medium not in self._links:
                    self._links[medium] = len(self._bandwidths)
                    self._bandwidths.append(link.bandwidth)
                number = self._links[medium]
                times[number] = times.get(number, 0) + 1
            latency = max(latency, sum(link.latency for link in links))
            cap = min(cap, *(link.flow_cap * len(paths) for link in links), INFINITY)
        return {number: count / len(paths) for number, count in times.items()}, latency, cap

    def extend_tables(self):
        """Put the new routes, and the links they are the first to use, at the end of the columns."""
        new, self._new_routes = self._new_routes, []
        uses = [shares for shares, _, _ in new]
        self._hops.extend([number for shares in uses for number in shares])
        self._share.extend([share for shares in uses for share in shares.values()])
        self._first.extend(self._first.rows[-1] + np.cumsum([len(shares) for shares in uses]))
        self._latency.extend([latency for _, latency, _ in new])
        self._cap.extend([cap for _, _, cap in new])
        links = self._bandwidths[len(self._capacity.rows) :]
        self._capacity.extend(links)
        self._head.extend([-1] * len(links))
        width = max(map(len, uses))
        if width > self._hooks[0].shape[1]:
            self._hooks = self._hooks_of(len(self._payload), width, self._hooks)

    @property
    def columns(self):
        """What the functions of `fair_share` take, in their order."""
        routes = (self._hops, self._share, self._first, self._latency, self._cap)
        return self._capacity.rows, *(column.rows for column in routes), *self._flows, self._head.rows, *self._hooks

    def _grow(self, slots):
        """Room for `slots` flows. Columns: state, route, bytes left, rate, time of last change, next time."""
        old = len(self._payload)
        self._payload += [None] * (slots - old)
        self._free += range(slots - 1, old - 1, -1)
        columns = [np.zeros(slots, kind) for kind in (np.int8, np.int64, float, float, float, float)]
        columns[5][:] = INFINITY
        if old:
            for new, before in zip(columns, self._flows, strict=True):
                new[:old] = before
        self._flows = tuple(columns)
        width = self._hooks[0].shape[1] if old else 1
        self._hooks = self._hooks_of(slots, width, self._hooks if old else None)

    @staticmethod
    def _hooks_of(slots, width, old):
        """The flows of a link are a doubly linked list: (after, before) of entry (slot, hop), named slot·2¹⁰ + hop."""
        new = np.full((slots, width), -1, np.int64), np.full((slots, width), -1, np.int64)
        for array, former in zip(new, old or (), strict=False):
            array[: former.shape[0], : former.shape[1]] = former
        return new


def whole(payload):
    """The message that a flow belongs to."""
    return payload.payload if type(payload) is _Pieces else payload


def rates(topology, pairs):
    """Max-min fair rates of messages that are all under way, without any program.

    pairs    sequence of (source device, destination device), one a message
    returns  numpy array of bytes/s, in the order of `pairs`
    raises   ShapeError  an unknown device
    """
    network = FluidNetwork(topology, None)
    numbers = [network.routes(a, b) for a, b in pairs]
    network.extend_tables()
    capacity, hops, share, first, _, cap = network.columns[:6]
    route = np.array([number for found in numbers for number in found], np.int64)
    links, flows = np.arange(len(capacity)), np.arange(len(route))
    fair = loops().fill(links, flows, capacity, hops, share, first, cap, route)
    return np.add.reduceat(fair, np.cumsum([0] + [len(found) for found in numbers[:-1]]))


def simulate(topology, flows):
    """Finish times of raw flows, without any program.

    flows    sequence of (source device, destination device, bytes, start seconds)
    returns  numpy array of finish times in seconds, in the order of `flows`
    raises   ShapeError  an unknown device; ValueError  negative bytes or start
    """
    flows = list(flows)
    for a, b, nbytes, start in flows:
        if not 0 <= nbytes < INFINITY or not 0 <= start < INFINITY:
            raise ValueError(
                f"flow {a!r} → {b!r}: bytes and start must be finite and at least 0, got {nbytes} and {start}"
            )
    finish, now = np.zeros(len(flows)), 0.0

    def done(i):
        finish[i] = now

    network = FluidNetwork(topology, done)
    waiting = sorted(range(len(flows)), key=lambda i: -flows[i][3])
    while waiting or network.next_time < INFINITY:
        start = flows[waiting[-1]][3] if waiting else INFINITY
        now = min(start, network.next_time)
        if network.next_time <= now:
            network.advance(now)
        while waiting and flows[waiting[-1]][3] <= now:
            i = waiting.pop()
            network.start(*flows[i][:3], i)
        network.settle(now)
    return finish
