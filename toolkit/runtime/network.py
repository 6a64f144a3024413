"""The fluid network: flows that share a link share it max-min fairly (progressive filling).

A flow first pays its route's latency, then moves its bytes at its current fair rate. When flows start or end, only
the flows that are connected to them through shared links get new rates; all others keep their finish times to the bit.
The model is SimGrid's CM02 without TCP correction factors (Casanova et al. 2014), and the answers agree with it where
all latencies are equal: there a flow's share of a link falls with its latency, as TCP's does; here shares are equal.
"""

import numpy as np

from . import fair_share
from .fair_share import INFINITY


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
        self._links, self._capacity = {}, []  # medium -> number; bytes/s
        self._routes_of, self._routes = {}, []  # (a, b) -> numbers; ({link number: share}, latency, flow cap)
        self._payload, self._free = [], []
        self._starting = []  # (slot, route, bytes) of this instant
        self._tables_stale = True
        self._grow(64)

    def start(self, a, b, nbytes, payload):
        """Begin to move `nbytes` from device a to device b at the current instant (rates follow in `settle`)."""
        routes = self._routes_of.get((a, b)) or self._add_routes(a, b)
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
            if self._tables_stale:
                self._rebuild_tables()
            table = np.array(self._starting, np.float64).reshape(-1, 3)
            self._starting = []
            slots, routes = table[:, :2].T.astype(np.int64)
            columns = *self._tables, *self._flows, *self._members
            self.next_time = fair_share.begin(now, slots, routes, table[:, 2].copy(), *columns)

    def advance(self, now):
        """Move to `now`: end the flows that are due, let those whose latency is over in, share anew."""
        ended, self.next_time = fair_share.advance(now, *self._tables, *self._flows, *self._members)
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

    def _add_routes(self, a, b):
        first = len(self._routes)
        self._routes += [self._route(paths) for paths in self.topology.flows(a, b)]
        self._tables_stale = True
        found = self._routes_of[a, b] = range(first, len(self._routes))
        return found

    def _route(self, paths):
        """One flow, spread evenly over `paths`. It has arrived when the longest way has been gone."""
        times, latency, cap = {}, 0.0, INFINITY  # link number -> how many of the paths use it
        for edges in paths:
            links = [self.topology.link(u, v) for u, v in edges]
            media = {self.topology.medium(u, v): link for (u, v), link in zip(edges, links, strict=True)}
            for medium, link in media.items():  # there and back over one shared medium is one use
                if medium not in self._links:
                    self._links[medium] = len(self._capacity)
                    self._capacity.append(link.bandwidth)
                number = self._links[medium]
                times[number] = times.get(number, 0) + 1
            latency = max(latency, sum(link.latency for link in links))
            cap = min(cap, *(link.flow_cap * len(paths) for link in links), INFINITY)
        return {number: count / len(paths) for number, count in times.items()}, latency, cap

    def _rebuild_tables(self):
        hops = np.array([n for shares, _, _ in self._routes for n in shares], np.int64)
        share = np.array([s for shares, _, _ in self._routes for s in shares.values()], np.float64)
        first = np.cumsum([0] + [len(shares) for shares, _, _ in self._routes])
        latency = np.array([latency for _, latency, _ in self._routes])
        cap = np.array([cap for _, _, cap in self._routes])
        self._tables = (np.array(self._capacity), hops, share, first, latency, cap)
        self._widen(max(1, int(np.diff(first).max())), len(self._capacity))
        self._tables_stale = False

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
        width = self._members[1].shape[1] if old else 1
        self._members = self._membership(slots, width, self._members if old else None, 0)

    def _widen(self, width, links):
        head, after, _ = self._members
        if width > after.shape[1] or links > len(head):
            self._members = self._membership(len(after), max(width, after.shape[1]), self._members, links)

    @staticmethod
    def _membership(slots, width, old, links):
        """Who uses each link: doubly linked lists. Entry (slot, hop) is known by the flat number slot·2¹⁰ + hop."""
        head = np.full(max(links, len(old[0]) if old else 0), -1, np.int64)
        after, before = np.full((slots, width), -1, np.int64), np.full((slots, width), -1, np.int64)
        if old:
            head[: len(old[0])] = old[0]
            after[: old[1].shape[0], : old[1].shape[1]] = old[1]
            before[: old[2].shape[0], : old[2].shape[1]] = old[2]
        return head, after, before


def whole(payload):
    """The message that a flow belongs to."""
    return payload.payload if type(payload) is _Pieces else payload


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
