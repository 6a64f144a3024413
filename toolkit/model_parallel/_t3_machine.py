"""T3's machine: the runtime's clock, network and trace, and one DMA lane a GPU. No rank has a program here.

Chapter: model_parallel/t3.
"""

from collections import deque

from toolkit.runtime.engine import Engine
from toolkit.runtime.network import FluidNetwork
from toolkit.runtime.trace import Trace


class Machine:
    """Events of all GPUs on one clock.

    deliver   (dest rank, tile, value) -> None, called when a message has arrived: whoever owns the GPUs sets it
    """

    def __init__(self, cluster):
        self.topology, self.size = cluster.topology, cluster.size
        self.network = FluidNetwork(cluster.topology, self._arrived)
        self.engine, self.trace = Engine(self.network), Trace()

    @property
    def now(self):
        return self.engine.now

    def run(self, beginnings):
        """Call all `beginnings`, then let events follow until none is left."""
        for rank, begin in enumerate(beginnings):
            self.engine.call_at(0.0, begin, rank)
        self.engine.run(on_deadlock=None)  # nothing waits here: every event is a timer or an arrival

    def compute(self, rank, name, seconds, then):
        """Hold the compute units of `rank`, then call `then()`. The caller asks for one job at a time."""
        start = self.now

        def done():
            self.trace.kernel(rank, "compute", name, start, self.now, 0, 0.0)
            then()

        self.engine.call_at(start + seconds, done, rank)

    def send(self, message):
        """Begin to move the bytes of a Message."""
        ends = (self.topology.ranks[rank] for rank in (message.source, message.dest))
        self.network.start(*ends, message.value.nbytes, message)

    def _arrived(self, message):
        if self.now < message.earliest:  # the link was faster than the stores
            self.engine.call_at(message.earliest, lambda: self._take_in(message), message.dest)
        else:
            self._take_in(message)

    def _take_in(self, message):
        m, start = message, message.start
        self.trace.message(m.source, m.dest, m.name, m.value.nbytes, start, start, start, self.now)
        self.deliver(m.dest, m.tile, m.value)


class Message:
    """A tile on its way."""

    def __init__(self, source, dest, tile, value, name):
        self.source, self.dest, self.tile, self.value, self.name = source, dest, tile, value, name
        self.start = self.earliest = 0.0


class Lane:
    """The DMA engine of one GPU: commands in order, one at a time on the link to its neighbour."""

    def __init__(self, machine, source, dest):
        self.machine, self.source, self.dest = machine, source, dest
        ranks, topology = machine.topology.ranks, machine.topology
        links = [topology.link(u, v) for u, v in topology.route(ranks[source], ranks[dest])]
        self.bandwidth = min(min(link.bandwidth, link.flow_cap) for link in links)
        self.latency = sum(link.latency for link in links)
        self._queue, self._busy = deque(), False

    def send(self, tile, value, name, produced=0.0):
        """Queue a tile. produced: when its last byte is stored, which may be later than now."""
        self._queue.append((Message(self.source, self.dest, tile, value, name), produced))
        self._next()

    def _next(self):
        if self._busy or not self._queue:
            return
        self._busy, machine = True, self.machine
        message, produced = self._queue.popleft()
        message.start, message.earliest = machine.now, produced + self.latency
        machine.send(message)
        free = max(machine.now + message.value.nbytes / self.bandwidth, produced)
        machine.engine.call_at(free, self._free, self.source)

    def _free(self):
        self._busy = False
        self._next()
