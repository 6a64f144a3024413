"""T3's memory: one HBM channel where a GEMM's bursts meet communication, request by request, tick by tick.

A GEMM proceeds in waves: a burst of reads, a compute phase when the last one is served, a burst of writes. The DMA
lane reads what it sends; what arrives is written. All GPUs of the ring do the same at the same time, so what one sends
is what it receives, and one GPU is enough. A request is `1 / requests` of a chunk; the memory serves one a tick.

Between the two streams and the memory stands its queue of `room` requests. The policy says which stream may enter:

    rr     in turns                     fcfs   who came first
    mca    compute first; communication only while the queue holds less than `threshold`, or when it has waited for
           longer than `starvation` ticks, one request at a time

Source: Pati et al. 2024, arXiv 2401.16677; the reduced scale is ours. Chapter: model_parallel/t3.
"""

from dataclasses import dataclass, replace

import numpy as np

from toolkit.runtime.errors import RuntimeFault, ShapeError

from . import _t3_ticks as kind

POLICIES = ("rr", "fcfs", "mca")
UNITS = 80  # compute units of a GPU
SHARE = 1.75  # of the memory a unit can use, in 1/80: fitted to the paper's overlap on 8 units (`_t3_scale`)
TICKS = 200_000  # no simulation runs longer
READS = kind.SEND_READ, kind.UPDATE_READ, kind.LAST_READ  # of the reduce-scatter
WRITES = kind.UPDATE_WRITE, kind.LAST_WRITE


@dataclass(frozen=True)
class Stage:
    """One chunk of a GEMM, in requests and ticks, which are shared among its waves."""

    reads: int
    compute: int  # ticks
    requests: int  # that write the chunk, or carry it over the link
    waves: int = 1

    @property
    def alone(self):
        """Ticks of a stage that has the memory for itself."""
        return self.reads + self.compute + self.requests

    @property
    def intensity(self):
        """Share of these ticks in which the memory serves it: what the first stage tells the controller."""
        return (self.reads + self.requests) / self.alone


@dataclass(frozen=True)
class Mechanism:
    """How a reduce-scatter uses memory and compute units.

    early     chunk k may leave when stage k is done, else when the GEMM is
    stream    the first chunk's stores go to the link, not to memory
    sends     reads for each request sent: of the first chunk, of later ones
    rereads   reads for each request that arrives, which is then written
    last      what stays is summed at the end, from two copies: two reads and a write for each request
    units     compute units taken from the GEMM; one moves 1.75/80 of what the memory can. 0: DMA
    adds      compute ticks that the GEMM loses for each request that arrives
    """

    early: bool = True
    stream: bool = True
    sends: tuple = (0, 1)
    rereads: int = 0
    last: bool = False
    units: int = 0
    adds: int = 0


T3 = Mechanism()
T3_WITHOUT_NMC = replace(T3, rereads=1, adds=1)
SEQUENTIAL = Mechanism(early=False, stream=False, sends=(1, 2), last=True)
SCATTER_WITH_NMC = replace(SEQUENTIAL, sends=(1, 1), last=False)  # near-memory adders, no fusion


def shared(units):
    """A reduce-scatter kernel beside the GEMM, on compute units of its own, chunk by chunk.

    raises   ValueError  no unit, or none left
    """
    if not 0 < units < UNITS:
        raise ValueError(f"units={units}: give the reduce-scatter 1 to {UNITS - 1} of {UNITS}")
    return replace(SEQUENTIAL, early=True, units=units)


@dataclass(frozen=True)
class Served:
    """What `hbm_queue` found, in ticks."""

    stage_ends: np.ndarray  # (N,)
    sends: np.ndarray  # (N-1, 2) when the first request of each chunk is on the link, and when the last has left it
    arrivals: np.ndarray  # (N-1, 2) when the first request of each received chunk came, and when the last was stored
    served: np.ndarray  # (ticks,) what the memory did: IDLE, GEMM_READ, …
    waited: int  # longest wait of a communication request in front of the queue

    @property
    def ticks(self):
        return len(self.served)

    @property
    def dram(self):
        """Requests: (writes of the GEMM, reads and writes of the reduce-scatter)."""
        n = np.bincount(self.served, minlength=8)
        reads, writes = n[list(READS)].sum(), n[list(WRITES)].sum()
        return int(n[kind.GEMM_WRITE]), int(reads), int(writes)


def measured_threshold(stage, room=32):
    """Requests in the queue below which communication may enter: few beside a GEMM that lives on memory."""
    return max(1, round(room * (1 - stage.intensity)))


def hbm_queue(
    n, stage, mechanism=T3, policy="mca", *, link=4.0, latency=0.0, threshold=None, starvation=64, room=32,
    launch=0, gemm=True,
):  # fmt: skip
    """Simulate one of n equal GPUs.

    link        ticks that a request takes on the link      latency   ticks
    threshold   None: `measured_threshold`                  starvation   ticks         room   requests
    launch      ticks before each stage: a GEMM cut into n kernels
    gemm        False: the reduce-scatter alone
    returns     Served
    raises      ValueError    unknown policy, threshold outside [0, room], starvation below 1
                ShapeError    fewer than 2 GPUs, a negative stage, fewer requests than waves
                RuntimeFault  not done after 200 000 ticks
    """
    threshold = measured_threshold(stage, room) if threshold is None else threshold
    _check(n, stage, policy, threshold, starvation, room)
    waves, ready = _waves(n, stage, mechanism, launch, gemm)
    reads = np.repeat([mechanism.sends[0], *[mechanism.sends[1]] * (n - 2)], stage.requests)
    served = np.zeros(TICKS, np.int8)
    ticks, ends, sends, arrivals, waited = kind.simulate(
        waves, ready, np.cumsum(reads), stage.requests, stage.waves, mechanism.stream, mechanism.rereads,
        mechanism.last, float(link), float(latency), UNITS / mechanism.units / SHARE if mechanism.units else 0.0,
        (POLICIES.index(policy), threshold, starvation), room, served,
    )  # fmt: skip
    if ticks < 0:
        raise RuntimeFault(f"{n} GPUs are not done after {TICKS:,} ticks: give smaller stages or a faster link")
    return Served(ends[stage.waves - 1 :: stage.waves], sends, arrivals, served[:ticks], waited)


def _waves(n, stage, mechanism, launch, gemm):
    """((N · waves, 3) reads, compute and writes; (N,) last wave of the stage after which each chunk may leave)."""
    w = stage.waves
    waves, ends = np.zeros((n * w, 3), np.int64), np.arange(1, n + 1) * w - 1
    if gemm:
        for column, total in enumerate((stage.reads, stage.compute, stage.requests)):
            waves[:, column] = np.tile(np.diff(np.arange(w + 1) * total // w), n)
        waves[w:, kind.COMPUTES] += mechanism.adds * stage.requests // w
        waves[:, kind.COMPUTES] = np.ceil(waves[:, kind.COMPUTES] * UNITS / (UNITS - mechanism.units))
        waves[::w, kind.COMPUTES] += launch
        waves[: w * mechanism.stream, kind.WRITES] = 0
    return waves, ends if mechanism.early else np.full(n, n * w - 1)


def _check(n, stage, policy, threshold, starvation, room):
    if policy not in POLICIES:
        raise ValueError(f"policy={policy!r}: choose from {', '.join(POLICIES)}")
    if room < 1 or not 0 <= threshold <= room:
        raise ValueError(f"threshold={threshold}: a queue of {room} holds 0 to {room} requests")
    if starvation < 1:
        raise ValueError(f"starvation={starvation}: give at least 1 tick")
    if n < 2 or min(stage.reads, stage.compute) < 0 or not 1 <= stage.waves <= stage.requests:
        raise ShapeError(f"{n} GPUs, {stage}: give at least 2, nothing negative, and a request for every wave")
