"""What may go wrong with a machine: slow devices, slow and dead links, crashes, jitter. Part of its description.

    Cluster(topology.ring(4, NVLINK4), H100, faults=[SlowDevice(2, factor=3), DeadLink(0, 1, start=1e-3, end=2e-3)])

Faults change times, and who is alive; never the numbers that a rank computes. Times are virtual seconds since the run
began; a fault holds from `start` until before `end`. Several faults of one device or link multiply.
"""

from dataclasses import dataclass
from math import inf, isfinite

import numpy as np

from .errors import InvalidFault

PARETO_SHAPE = 2.0  # the mean is finite and the variance is not: a heavy tail


@dataclass(frozen=True)
class SlowDevice:
    """Kernels of `rank` take `factor` times as long; one that crosses `start` or `end` is slow in that part only."""

    rank: int
    factor: float
    start: float = 0.0
    end: float = inf

    def __post_init__(self):
        _check_factor(self)
        _check_window(self)


@dataclass(frozen=True)
class SlowLink:
    """The link u → v has its bandwidth divided by `factor`; flows on it share anew at `start` and `end`."""

    u: object
    v: object
    factor: float
    start: float = 0.0
    end: float = inf

    def __post_init__(self):
        _check_factor(self)
        _check_window(self)


@dataclass(frozen=True)
class DeadLink:
    """Nothing passes the link u → v from `start` to `end`. A transfer under way stops, and goes on afterwards.

    Several of them are a flapping link. Both directions of a cable need one each; a half-duplex medium needs one.
    """

    u: object
    v: object
    start: float = 0.0
    end: float = inf

    def __post_init__(self):
        _check_window(self)


@dataclass(frozen=True)
class Crash:
    """`rank` ends at `time` and returns nothing. Whoever waits for it gets PeerCrashed; all others go on.

    A transfer under way at `time` arrives; a posted message that has not met its other side is lost.
    """

    rank: int
    time: float

    def __post_init__(self):
        if not 0 <= self.time < inf:
            raise InvalidFault(f"{self}: the time of a crash is finite and at least 0 s")


@dataclass(frozen=True)
class Jitter:
    """Kernel durations, message latencies or both, multiplied by random factors; each rank has generators of its own.

    kind   "lognormal"   e^(sigma·N - sigma²/2): mean 1
           "pareto"      1 + sigma·P, P of Lomax' law with shape 2: never below 1, mean 1 + sigma, variance infinite
    """

    seed: int
    sigma: float
    kind: str = "lognormal"
    kernels: bool = True
    messages: bool = False

    def __post_init__(self):
        if self.kind not in ("lognormal", "pareto"):
            raise InvalidFault(f"{self}: kind is 'lognormal' or 'pareto'")
        if not 0 <= self.sigma < inf:
            raise InvalidFault(f"{self}: sigma is finite and at least 0")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise InvalidFault(f"{self}: the seed is a whole number of at least 0")

    def draws(self, rank, what):
        """A function that gives the next factor of `rank`; `what` is 0 for kernels and 1 for messages."""
        random = np.random.default_rng((self.seed, rank, what))
        if self.kind == "lognormal":
            return lambda: float(random.lognormal(-(self.sigma**2) / 2, self.sigma))
        return lambda: 1.0 + self.sigma * float(random.pareto(PARETO_SHAPE))


def checked(faults, topology):
    """The faults as a tuple. Raises InvalidFault for one that names a rank or a link that the topology lacks."""
    faults = tuple(faults)
    for fault in faults:
        if isinstance(fault, (SlowDevice, Crash)):
            if not isinstance(fault.rank, int) or not 0 <= fault.rank < len(topology.ranks):
                raise InvalidFault(f"{fault}: {topology.name} has ranks 0 … {len(topology.ranks) - 1}")
        elif isinstance(fault, (SlowLink, DeadLink)):
            if not topology.graph.has_edge(fault.u, fault.v):
                known = ", ".join(f"{u} → {v}" for u, v in list(topology.graph.edges)[:4])
                raise InvalidFault(f"{fault}: {topology.name} has no such link; it has {known}, …")
        elif not isinstance(fault, Jitter):
            raise InvalidFault(f"{fault!r} is no fault; give SlowDevice, SlowLink, DeadLink, Crash or Jitter")
    return faults


def pace(faults, rank):
    """How long kernels of `rank` take: a function (start, seconds) -> seconds; None when they take what they take."""
    slow = [f for f in faults if isinstance(f, SlowDevice) and f.rank == rank]
    draws = [f.draws(rank, 0) for f in faults if isinstance(f, Jitter) and f.kernels]
    edges = sorted({t for f in slow for t in (f.start, f.end) if t < inf})
    if not slow and not draws:
        return None

    def stretched(start, work):
        for draw in draws:
            work *= draw()
        now, taken = start, 0.0
        for edge in (*(t for t in edges if t > start), inf):
            factor = 1.0
            for fault in slow:
                factor *= fault.factor if fault.start <= now < fault.end else 1.0
            if work * factor <= edge - now:
                return taken + work * factor
            work, taken, now = work - (edge - now) / factor, taken + edge - now, edge

    return stretched


def _check_factor(fault):
    if not (fault.factor > 0 and isfinite(fault.factor)):
        raise InvalidFault(f"{fault}: factor says how many times slower, a finite number above 0")


def _check_window(fault):
    if not 0 <= fault.start < fault.end:
        raise InvalidFault(f"{fault}: start is at least 0 s and before end")
