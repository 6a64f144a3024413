"""Calibration: fit a device and a link to timings of a real machine, and say how far off every row stays.

    python -m toolkit calibrate measured.json

The model has one idea: a call takes the larger of what the machine needs and what launching it costs.

    kernel      max(floor, launch overhead + curve of its kind)                                         hardware.Curve
    message     max(floor, latency + bytes / rate); one flow has a rate of its own, and both directions of a port share
                another: the processors and buffers that move bytes out also move bytes in              hardware.Link
    collective  our own collective, run on the virtual machine with that link; nothing of it is fitted but three things:
                its floor, the rate at which it copies results into place, and the rate of short messages

All fits take the least mean |log(predicted / measured)|, which a stray row cannot bend.
Chapter: foundations/how_far_to_trust_the_clock.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from . import hardware, topology
from .arrays import like
from .cluster import Cluster
from .hardware import Curve, Device, Link
from .measurements import SETS, Measured, MeasurementError, load

KERNEL_SETS = ("gemm_bf16", "copy", "flash_fwd", "flash_fwd_bwd")
MESSAGE_SETS = ("p2p_ring_shift", "p2p_one_way")
COLLECTIVE_SETS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
POWER = {"attention": 1.0, "attention_backward": 1.0, "causal attention": 0.5, "causal attention_backward": 0.5}
SHORT, SHORT_SETS = 2**20, COLLECTIVE_SETS[:3]  # bytes up to which these collectives may use a protocol for short messages


@dataclass(frozen=True)
class Calibration:
    """A fitted machine.

    floors      seconds that a call takes at least, by row set
    short_rate  bytes/s of one flow in the collectives of SHORT_SETS when a rank's input is at most SHORT bytes
    """

    device: Device
    link: Link | None = None
    short_rate: float = np.inf
    floors: dict = field(default_factory=dict)
    world: int = 2

    def predict(self, row):
        """Seconds that the model gives for a row."""
        if row.set in KERNEL_SETS:
            return max(self.floors.get(row.set, 0.0), self.kernels(row))
        return self.run(row).makespan

    def run(self, row):
        """The virtual run of a message or collective row."""
        link = replace(self.link, latency=self.link.latency / 2, floor=self.floors.get(row.set, 0.0))  # two hops
        if row.set in SHORT_SETS and row.nbytes <= SHORT:
            link = replace(link, flow_cap=min(link.flow_cap, self.short_rate))
        cluster = Cluster(topology.switch(self.world, link), device=self.device)
        return cluster.run(PROGRAMS[row.set], like((row.nbytes // 2,), np.float16))

    def kernels(self, row):
        """Seconds of a row's kernels, without a floor."""
        return sum(self.device.seconds(flops, nbytes, "bfloat16", kind) for kind, flops, nbytes in calls(row))

    def parts(self, row):
        """(seconds that a floor can hide, seconds that come on top): a call's kernels, or its messages and its copies."""
        if row.set in KERNEL_SETS:
            return self.kernels(row), 0.0
        run = replace(self, floors={}).run(row)
        moving = sum(event.end - event.start for event in run.trace if event.kind == "send" and event.rank == 0)
        return moving, run.makespan - moving


# ---- what was timed -------------------------------------------------------------------------------------------------


def calls(row):
    """The kernels of a row: (kind, flops, bytes) each. Same costs as toolkit.kernels declares."""
    size = row.size
    if row.set == "gemm_bf16":
        return [("compute", 2 * size["n"] ** 3, 6 * size["n"] ** 2)]
    if row.set == "copy":
        return [("memory", 0, 2 * size["bytes"])]
    heads, n, d, causal = (size[column] for column in ("heads", "n", "d", "causal"))
    product, array = 2 * heads * d * (n * (n + 1) // 2 if causal else n * n), 2 * heads * n * d
    prefix = "causal " if causal else ""
    forward = (f"{prefix}attention", 2 * product, 4 * array)
    return [forward] if row.set == "flash_fwd" else [forward, (f"{prefix}attention_backward", 5 * product, 8 * array)]


def _one_way(comm, x):
    if comm.rank == 0:
        comm.send(x, 1)
    elif comm.rank == 1:
        comm.recv(0)


def _all_reduce(comm, x):
    return comm.all_reduce(x, algorithm="recursive_doubling" if comm.size == 2 else "ring")


PROGRAMS = {
    "p2p_ring_shift": lambda comm, x: comm.ishift(x, by=1).wait(),
    "p2p_one_way": _one_way,
    "all_reduce": _all_reduce,
    "all_gather": lambda comm, x: comm.all_gather(x),
    "reduce_scatter": lambda comm, x: comm.reduce_scatter(x),
    "all_to_all": lambda comm, x: comm.all_to_all(x),
}


# ---- the fit ----------------------------------------------------------------------------------------------------------


def fit(measured: Measured) -> Calibration:
    """The machine that predicts these rows best. Raises MeasurementError if collectives come without messages."""
    calibration = Calibration(_unfitted(measured), world=measured.world)
    for kind, sets in (
        ("compute", "gemm_bf16"),
        ("memory", "copy"),
        ("attention", "flash_fwd"),
        ("causal attention", "flash_fwd"),
        ("attention_backward", "flash_fwd_bwd"),
        ("causal attention_backward", "flash_fwd_bwd"),
    ):
        rows = [row for row in measured.only(sets) if calls(row)[-1][0] == kind]
        if rows:
            calibration = _fit_curve(calibration, kind, rows)
    calibration = _fit_link(calibration, measured)
    copying = [row for row in measured.only("all_gather", "all_to_all") if row.nbytes > SHORT]
    if copying:
        calibration = _fit_copies(calibration, copying)
    return _fit_floors(calibration, measured)


def _unfitted(measured):
    """The data sheet's device whose name the file gives; for an unknown one, its own fastest rows are the peak."""
    known = [device for name, device in hardware.devices().items() if name in measured.gpu.split()]
    if known:
        return replace(known[0], curves={})
    rates = [(kind, (flops or nbytes) / row.seconds) for row in measured.rows if row.set in KERNEL_SETS
             for kind, flops, nbytes in calls(row)[-1:]]  # fmt: skip
    fastest = {side: max((rate for kind, rate in rates if (kind == "memory") == side), default=np.inf) for side in (0, 1)}
    return Device(measured.gpu or "unknown", fastest[0], fastest[1])


def _fit_curve(calibration, kind, rows):
    """Share (and half, for attention) of one kind. A floor is tried along, so that launch-bound rows do not bend it."""
    device, power = calibration.device, POWER.get(kind)
    own = [calls(row)[-1] for row in rows]
    peak = replace(device, curves={}, launch_overhead=0.0)
    ideal = np.array([peak.seconds(flops, nbytes, "bfloat16") for _, flops, nbytes in own])
    others = [calibration.kernels(row) - device.seconds(*call[1:], "bfloat16", kind) for row, call in zip(rows, own, strict=True)]
    rest = np.array(others) + device.launch_overhead

    def curve(x):
        return Curve(float(min(1.0, np.exp(x[0]))), float(np.exp(x[1])), power) if power else Curve(float(min(1.0, np.exp(x[0]))))

    starts = [(share, half) for share in (0.3, 0.8) for half in (1e-6, 3e-5)] if power else [(0.3,), (0.8,)]
    best = curve(_least(lambda x: _floor(rows, rest + curve(x).seconds(ideal))[0], starts))
    if best.half < 1e-7:  # below what any row can tell
        best = replace(best, half=0.0)
    return replace(calibration, device=replace(device, curves={**device.curves, kind: best}))


def _fit_link(calibration, measured):
    """Latency, rate of one flow and rate of both directions together, from the messages alone."""
    shift, one_way = (measured.only(name) for name in MESSAGE_SETS)
    if not shift or not one_way:
        if measured.only(*MESSAGE_SETS, *COLLECTIVE_SETS):
            raise MeasurementError(f"{measured.name}: a link needs rows of both {' and '.join(MESSAGE_SETS)}")
        return calibration
    shifted, sent = (np.array([row.nbytes for row in rows], float) for rows in (shift, one_way))

    def loss(x):
        latency, flow, both = np.exp(x)
        there_and_back = latency + shifted / min(flow, both / 2)
        return _floor(shift, there_and_back)[0] + _floor(one_way, latency + sent / flow)[0]

    flow = max(row.nbytes / row.seconds for row in one_way)
    both = max(2 * row.nbytes / row.seconds for row in shift)
    latency, flow, both = np.exp(_least(loss, [(latency, flow, both) for latency in (2e-6, 1e-5, 4e-5)])).tolist()
    return replace(calibration, link=Link(both, latency, duplex=False, flow_cap=flow, name=measured.environment))


def _fit_copies(calibration, rows):
    """Collectives copy at the memory's rate, or slower: with few channels, few processors copy."""
    device = calibration.device
    rest, ideal = np.zeros(len(rows)), np.zeros(len(rows))
    for i, row in enumerate(rows):
        run = calibration.run(row)
        copies = [event for event in run.trace if event.name == "concatenate" and event.rank == 0]
        ideal[i] = sum(e.bytes for e in copies) / device.memory_bandwidth
        rest[i] = run.makespan - sum(e.end - e.start - device.launch_overhead for e in copies)
    seen = np.array([row.seconds for row in rows])
    fastest = device.curves.get("memory", Curve()).share
    shares = [fastest, *(share for share in ideal / np.maximum(seen - rest, 1e-12) if share < fastest)]
    share = min(shares, key=lambda share: _error(rows, rest + ideal / share))
    return replace(calibration, device=replace(device, curves={**device.curves, "concatenate": Curve(float(share))}))


def _fit_floors(calibration, measured):
    """What launching costs, by row set; then the rate of short messages, from the collectives that stay too fast."""
    floors, rates = {}, []
    for name in SETS:
        rows = measured.only(name)
        moving, rest = np.transpose([calibration.parts(row) for row in rows]) if rows else (np.zeros(0), 0.0)
        floors[name] = _floor(rows, moving, rest, even=True)[1] if rows else 0.0
        for row, flight, more in zip(rows, moving, rest, strict=True) if name in SHORT_SETS else ():
            if row.nbytes <= SHORT and row.seconds > 1.5 * (max(floors[name], flight) + more):
                nbytes = calibration.run(row).traffic.by_pair.sum(axis=1)[0]
                rates.append(nbytes / (row.seconds - more - calibration.link.latency))
    return replace(calibration, floors=floors, short_rate=float(np.median(rates)) if rates else np.inf)


# ---- errors -----------------------------------------------------------------------------------------------------------


def _error(rows, times, even=False):
    """Mean |log(times / measured)|; unless `even`, a row counts the more, the better its own runs repeat."""
    seen, spread = np.array([row.seconds for row in rows]), np.log([row.high / row.low for row in rows])
    return np.average(np.abs(np.log(times / seen)), weights=None if even else 1 / (0.1 + spread), axis=-1)


def _floor(rows, times, rest=0.0, even=False):
    """(error, floor): the floor under `times`, `rest` coming on top, that fits best; 0 unless two rows stand on it."""
    floors = np.append(0.0, np.array([row.seconds for row in rows]) - rest)
    floors = floors[[floor == 0 or (times < floor).sum() >= 2 for floor in floors]]
    errors = _error(rows, np.maximum(times, floors[:, None]) + rest, even)
    best = int(np.argmin(errors))
    return errors[best], float(floors[best])


def _least(loss, starts):
    """The logarithms of positive parameters with the least loss, from several starts."""
    from scipy.optimize import minimize

    options = {"xatol": 1e-5, "fatol": 1e-9, "maxiter": 4000}
    found = (minimize(loss, np.log(start), method="Nelder-Mead", options=options) for start in starts)
    return min(found, key=lambda result: result.fun).x
