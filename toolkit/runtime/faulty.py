"""A machine with faults: the same clock, mailboxes and network, and what changes when something is slow or dies.

Only a cluster that was given faults uses it; a machine without any does no work for them.
"""

from math import prod

import numpy as np

from .deadlock import deadlock_report
from .errors import LinkDown, PeerCrashed
from .faults import Crash, DeadLink, Jitter, SlowLink, pace
from .machine import Machine
from .network import INFINITY, FluidNetwork, loops, whole
from .requests import Send, site_text
from .units import seconds

TRICKLE = 1e-200  # bytes/s of a dead link: shares stay well defined, and one byte takes longer than any run
NEVER = 1e100  # seconds


class FaultyNetwork(FluidNetwork):
    """Links whose bandwidth changes at instants, and latencies that are drawn."""

    def __init__(self, topology, on_finish, faults, ranks):
        super().__init__(topology, on_finish)
        self._faults = {}  # medium -> its faults
        for fault in faults:
            if isinstance(fault, (SlowLink, DeadLink)):
                self._faults.setdefault(topology.medium(fault.u, fault.v), []).append(fault)
        every = (fault for found in self._faults.values() for fault in found)
        self._changes = sorted({t for f in every for t in (f.start, f.end) if t < INFINITY}, reverse=True)
        jitters = [f for f in faults if isinstance(f, Jitter) and f.messages]
        self._draws = [[jitter.draws(rank, 1) for jitter in jitters] for rank in range(ranks)] if jitters else None
        self._now = 0.0
        self.watch = None  # called before time passes

    def settle(self, now):
        self.watch()
        self._now, started = now, self._starting[::3]
        changed = False
        while self._changes and self._changes[-1] <= now:
            self._changes.pop()
            changed = True
        if changed:
            self._change_bandwidths()
        super().settle(now)
        if self._draws:
            self._draw_latencies(started)
        self.next_time = self._next()

    def _next(self):
        """The next end of a flow or of its latency, or the next change of a link while flows are on the way."""
        due = float(self._flows[5].min())
        if self._changes and len(self._free) < len(self._payload):
            due = min(due, self._changes[-1])
        return due if due < NEVER else INFINITY

    def _bandwidth(self, medium, nominal):
        active = [f for f in self._faults[medium] if f.start <= self._now < f.end]
        if any(isinstance(f, DeadLink) for f in active):
            return TRICKLE
        return nominal / prod(f.factor for f in active)

    def _change_bandwidths(self):
        loops().share_anew(self._now, np.array(self._set_bandwidths(), np.int64), *self.columns)

    def extend_tables(self):
        super().extend_tables()
        self._set_bandwidths()

    def _set_bandwidths(self):
        """Bandwidths as they are now. Returns the numbers of the faulty links that a message has used so far."""
        known = {m: self._links[m] for m in self._faults if self._links.get(m, INFINITY) < len(self._capacity.rows)}
        for medium, number in known.items():
            self._capacity.rows[number] = self._bandwidth(medium, self._bandwidths[number])
        return list(known.values())

    def _draw_latencies(self, slots):
        state, due = self._flows[0], self._flows[5]
        for slot in slots:
            if state[slot] == loops().LATENT:
                factor = 1.0
                for draw in self._draws[whole(self._payload[slot])[0].rank]:
                    factor *= draw()
                due[slot] = self._now + factor * (due[slot] - self._now)

    def stuck(self):
        """Messages that wait for a dead link, as (payload, the link)."""
        down = {m for m in self._faults if m in self._links and self._bandwidth(m, 1.0) == TRICKLE}
        ranks, topology = self.topology.ranks, self.topology
        for payload in self.in_flight():
            for u, v in topology.route(ranks[payload[0].rank], ranks[payload[1].rank]):
                if topology.medium(u, v) in down:
                    yield payload, (u, v)
                    break


class FaultyMachine(Machine):
    """A Machine whose devices may be slow or crash, on a FaultyNetwork."""

    def __init__(self, topology, devices, faults):
        super().__init__(topology, devices)
        self.network = FaultyNetwork(topology, self._arrived, faults, len(devices))
        self.engine.network, self.network.watch = self.network, self._forget_crashes
        for processor in self.processors:
            processor.pace = pace(faults, processor.rank)
        self.crashed = {}  # rank -> time
        self._crashes = [
            (f.rank, self.engine.call_at(f.time, lambda rank=f.rank: self._crash(rank)))
            for f in faults
            if isinstance(f, Crash)
        ]

    def _forget_crashes(self):
        """A rank that has returned cannot crash any more: its crash must not keep the clock running."""
        alive = {task.rank for task in self.engine.tasks} if self._crashes else ()
        for rank, timer in self._crashes:
            if rank not in alive:
                timer.cancel()

    def _crash(self, rank):
        """End all that `rank` does, take back what it posted, and tell those who wait for it."""
        self.crashed.setdefault(rank, self.engine.now)
        self.engine.forget(rank)
        halves = [half for box in (self._sends, self._receives) for posted in box.values() for half in posted]
        for half in halves:
            if half.rank == rank:
                self.withdraw(half)
            elif self._other_side(half) == rank:
                self.withdraw(half)
                self._fail(half)

    @staticmethod
    def _other_side(half):
        return half.key[0] if isinstance(half, Send) else half.sender

    def _fail(self, half):
        peer = self._other_side(half)
        half.cancelled = PeerCrashed(
            f"{half} at {site_text(half.site)} waits for rank {peer}, which crashed at {seconds(self.crashed[peer])}. "
            "Catch PeerCrashed, and go on with comm.group() of the ranks that are left."
        )
        half.complete()

    def post_send(self, send):
        if send.key[0] in self.crashed:
            self._release(send)
            return self._fail(send)
        return super().post_send(send)

    def post_receive(self, receive):
        if receive.sender in self.crashed:
            return self._fail(receive)
        return super().post_receive(receive)

    def deadlock(self):
        self._check_links()
        if not self.crashed:
            super().deadlock()
        report = deadlock_report(self.engine, len(self.processors))
        raise PeerCrashed(f"{self._obituary()} Nobody who is left can go on.\n{report}")

    def check_nothing_left(self):
        self._check_links()
        if not self.crashed:  # after a crash, messages without their other side are no mistake
            super().check_nothing_left()

    def _obituary(self):
        return " ".join(f"Rank {rank} crashed at {seconds(time)}." for rank, time in sorted(self.crashed.items()))

    def _check_links(self):
        stuck = list(self.network.stuck())
        if not stuck:
            return
        links = ", ".join(dict.fromkeys(f"{u} → {v}" for _, (u, v) in stuck))
        rows = [
            f"  rank {half.rank}   {half}   posted at {site_text(half.site)}"
            for payload, _ in stuck
            for half in payload[:2]
        ]
        raise LinkDown(
            f"link {links} is dead at {seconds(self.engine.now)} and does not come back, with {len(stuck)} "
            "message(s) on it:\n"
            + "\n".join(rows[:16])
            + "\nGive the DeadLink an end, or wait with a timeout and go on."
        )
