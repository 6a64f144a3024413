"""T3: a product's stores start its reduce-scatter, tile by tile, with hardware that counts updates.

In tensor parallelism every rank has a partial product and the ranks sum them: GEMM, then reduce-scatter, one after the
other. A GEMM writes its output in stages, so the first chunk could travel while the others are computed. Four
mechanisms, each of which can be switched off:

1. staggered production   rank r computes chunks r+1, r+2, …, r: first the one whose journey starts here
2. address spaces         stores of the first chunk go to the neighbour's memory, the next N-2 chunks are sent by DMA,
                          the last one stays
3. track and trigger      a tile that has its own and the incoming update fires its DMA command
4. near-memory compute    an update adds in memory: no read by compute units, no kernel

The fifth, priority of compute traffic in the memory controller, needs a memory in which both meet: `_t3_queue`. Here
memory is free, and what costs time is compute, links and, without near-memory compute, the adding. The paper keeps the
all-gather that follows as it is; so do we.

Chunk c starts at rank c-1, goes downwards (rank r sends to r-1) and ends at rank c. A tile gets two updates a rank, so
its bits depend on the ring's order alone and never on who came first.
Source: Pati et al. 2024, arXiv 2401.16677. No code is published; times and counts per stage are derived from the
description. Chapter: model_parallel/t3.
"""

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from toolkit.kernels.layers import linear
from toolkit.runtime.algorithms import combine, concatenate
from toolkit.runtime.cluster import Run
from toolkit.runtime.errors import DtypeError, ShapeError

from ._t3_machine import Lane, Machine
from ._t3_tracker import Tracker

# ---- who computes what when, and where its stores go -----------------------------------------------------------------


def chunk_order(r, n, stagger=True):
    """Chunks in the order in which rank r of n computes them: r+1, r+2, …, r; without stagger 0, 1, …, n-1."""
    return [(r + k) % n for k in range(1, n + 1)] if stagger else list(range(n))


def chunk_role(position, n):
    """What happens to the stores of the chunk at a place (0 … n-1) of the staggered order.

    returns   "remote" the neighbour's memory · "dma" one's own, sent on when complete · "local" one's own, to stay
    """
    if not 0 <= position < n:
        raise ValueError(f"position={position}: the order of {n} chunks has places 0 to {n - 1}")
    return "local" if position == n - 1 else "remote" if position == 0 else "dma"


# ---- one GPU ---------------------------------------------------------------------------------------------------------


@dataclass
class Dram:
    """Bytes to and from one GPU's memory, without what the GEMM reads."""

    gemm_writes: int = 0
    reads: int = 0  # of the reduce-scatter
    writes: int = 0  # of the reduce-scatter: incoming updates


class Gpu:
    """One rank's compute units, memory, tracker and DMA lane. Each method is what an event sets off."""

    def __init__(self, machine, rank, a, b, device, *, stagger, tiles, nmc, capacity):
        self.machine, self.rank, self.b, self.nmc, self.size = machine, rank, b, nmc, machine.size
        self.rows = [np.split(chunk, tiles) for chunk in np.split(a, self.size)]
        order = chunk_order(rank, self.size, stagger)
        self.products = deque((chunk, tile) for chunk in order for tile in range(tiles))
        flops, moved, _, kind = linear.cost(a, b)
        self.product_seconds = device.seconds(flops, moved, a.dtype, kind) / len(self.products)
        self.device, self.to_add, self.idle = device, deque(), True
        self.lane = Lane(machine, rank, (rank - 1) % self.size)
        self.tracker, self.memory, self.dram, self.triggers = Tracker(capacity), {}, Dram(), []

    def role(self, chunk):
        return chunk_role((chunk - self.rank - 1) % self.size, self.size)

    def work(self):
        """The compute units take their next job: without near-memory compute, adding comes first."""
        self.idle = not (self.to_add or self.products)
        if self.to_add:
            tile, value = self.to_add.popleft()
            flops, moved, *_ = combine.cost(value, value)
            self.compute("add", self.device.seconds(flops, moved, value.dtype, "combine"), self.update, tile, value)
        elif self.products:
            chunk, part = self.products.popleft()
            value, seconds = linear(self.rows[chunk][part], self.b), self.product_seconds
            if self.role(chunk) == "remote":  # the stores leave while they are produced
                self.lane.send((chunk, part), value, "remote stores", produced=self.machine.now + seconds)
                self.compute(f"chunk {chunk}", seconds, lambda: None)
            else:
                self.compute(f"chunk {chunk}", seconds, self.store, (chunk, part), value)

    def compute(self, name, seconds, then, *args):
        def done():
            then(*args)
            self.work()

        self.machine.compute(self.rank, name, seconds, done)

    def store(self, tile, value):
        """A tile of this rank's own product is written."""
        self.dram.gemm_writes += value.nbytes
        self._apply(tile, value, "local")

    def arrive(self, tile, value):
        """A partial sum comes from upstream, by remote store or by DMA."""
        if self.nmc:
            return self.update(tile, value)
        self.to_add.append((tile, value))
        if self.idle:
            self.work()

    def update(self, tile, value):
        self.dram.reads += 0 if self.nmc else value.nbytes
        self.dram.writes += value.nbytes
        self._apply(tile, value, "incoming")

    def _apply(self, tile, value, source):
        self.memory[tile] = combine(self.memory[tile], value) if tile in self.memory else value
        for trigger in self.tracker.update(tile, source):
            self.trigger(trigger.tile)

    def trigger(self, tile):
        """Both updates are there: the DMA command that was programmed for this tile, if any, fires."""
        self.triggers.append((self.machine.now, tile))
        if self.role(tile[0]) == "dma":
            value = self.memory.pop(tile)
            self.dram.reads += value.nbytes
            self.lane.send(tile, value, "DMA")


# ---- all of them -----------------------------------------------------------------------------------------------------


class Fused(NamedTuple):
    """run: a Run, chunk r of the sum being rank r's output; dram: a Dram a rank; gpus: what they ended as."""

    run: Run
    dram: list
    gpus: list


def fused_gemm_reduce_scatter(cluster, a, b, *, stagger=True, nmc=True, tiles=1, capacity=256):
    """Σ_w a[w] @ b[w], scattered by rows over the ranks, each tile on its way as soon as it is complete.

    a          (N, M, K)   rank w's columns of the activations; real, or shape-only
    b          (N, K, H)   rank w's rows of the weights, same dtype
    stagger    False: every rank computes chunks 0, 1, …, N-1
    nmc        False: compute units add incoming tiles, before their next product
    tiles      tracked tiles in a chunk; each is one DMA command
    capacity   entries of the tracker
    returns    Fused; run.outputs are (M/N, H)
    sends      (N-1) · M · H / N numbers from every rank, as ring reduce-scatter does
    raises     ShapeError, DtypeError; ValueError  capacity below 1
    """
    n = cluster.size
    _check(n, a, b, tiles)
    machine = Machine(cluster)
    options = {"stagger": stagger, "tiles": tiles, "nmc": nmc, "capacity": capacity}
    gpus = [Gpu(machine, r, a[r], b[r], cluster.devices[r], **options) for r in range(n)]
    machine.deliver = lambda dest, tile, value: gpus[dest].arrive(tile, value)
    machine.run([gpu.work for gpu in gpus])
    outputs = [concatenate(tuple(gpu.memory[gpu.rank, part] for part in range(tiles))) for gpu in gpus]
    return Fused(Run(cluster, outputs, machine.trace, machine.now, []), [gpu.dram for gpu in gpus], gpus)


def _check(n, a, b, tiles):
    if n < 2 or tiles < 1:
        raise ShapeError(f"{n} ranks and {tiles} tiles: give at least 2 ranks and 1 tile, or nothing travels")
    if a.ndim != 3 or b.ndim != 3 or len(a) != n or len(b) != n or a.shape[2] != b.shape[1]:
        raise ShapeError(f"a {a.shape} and b {b.shape}: give ({n}, M, K) and ({n}, K, H), a part for each of {n} ranks")
    if a.shape[1] % (n * tiles):
        raise ShapeError(f"{a.shape[1]} output rows do not divide into {n} chunks of {tiles} tiles: pad or cut them")
    if a.dtype != b.dtype or a.dtype.kind != "f":
        raise DtypeError(f"a is {a.dtype}, b is {b.dtype}: give both the same floating-point dtype")


def sequential(comm, a, b):
    """The baseline, a program for `Cluster.run`: the whole GEMM, then a ring reduce-scatter that goes downwards.

    a, b      (M, K), (K, H) of this rank
    returns   (M/N, H), chunk `rank` of the sum
    """
    chunks = np.split(linear(a, b), comm.size)
    down = comm.group(range(comm.size)[::-1])  # the runtime's ring goes upwards
    return down.reduce_scatter(chunks[::-1], algorithm="ring")


# ---- closed forms ----------------------------------------------------------------------------------------------------


def timeline(n, g, tau, latency=0.0, scheme="t3", tiles=1):
    """Seconds until the last chunk is complete: equal ranks, free memory.

    g         seconds of a stage, which is one chunk         tau   seconds that a chunk takes on a link
    scheme    "sequential", "ideal" (the longer of both) or "t3"
    raises    ValueError  another scheme
    """
    if scheme == "sequential":
        return n * g + (n - 1) * (tau + latency)
    if scheme == "ideal":
        return max(n * g, (n - 1) * tau)
    if scheme != "t3":
        raise ValueError(f"scheme={scheme!r}: choose sequential, ideal or t3")
    free, arrived, step, hop = 0.0, [0.0] * tiles, g / tiles, tau / tiles
    for k in range(n - 1):
        for i in range(tiles):
            begun = (k * tiles + i) * step
            if k == 0:  # streams while it is produced
                free = max(begun + step, max(begun, free) + hop)
            else:
                free = max(begun + step, arrived[i], free) + hop
            arrived[i] = free + latency
    return max(n * g, arrived[-1])


def dram_traffic(n, scheme="t3"):
    """(writes of the GEMM, reads and writes of the reduce-scatter) of one GPU, in chunks.

    scheme   "sequential"  hop 1 reads one's own copy, each later hop also the received one, the end both; all N-1
                           received copies and the result are written
             "t3"          the first chunk is never stored here; N-2 chunks are read to be sent; N-1 updates come in
             "t3 without nmc"   every incoming update is also a read
    """
    return {
        "sequential": (n, 2 * n - 1, n),
        "t3": (n - 1, n - 2, n - 1),
        "t3 without nmc": (n - 1, 2 * n - 3, n - 1),
    }[scheme]
