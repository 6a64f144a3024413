"""Calibration: fit a device and a link to timings of a real machine, and say how far off every row stays.

    python -m toolkit calibrate measured.json

What is fitted: for each kind of kernel the share of the peak (for attention also where small sizes lose it), and what
it loses beside a message; for the network latency, rate of one flow and rate of both directions, from messages alone.
Collectives are predicted, but for the rate at which they copy and the rate of short messages. A launch floor for each
row set. Fits minimise the mean |log(predicted / measured)|, which a stray row cannot bend. The model: calibrated.py.
Chapter: foundations/how_far_to_trust_the_clock.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from . import hardware
from .calibrated import COLLECTIVE_SETS, KERNEL_SETS, MESSAGE_SETS, SHORT, SHORT_SETS, Calibrated, calls
from .hardware import Curve, Device, Link
from .measurements import SETS, Measured, MeasurementError, load
from .units import seconds, size

LAUNCH = 5e-6  # seconds per kernel of a GPU without a data sheet here
POWER = {"attention": 1.0, "attention_backward": 1.0, "causal attention": 0.5, "causal attention_backward": 0.5}


def fit(measured: Measured) -> Calibrated:
    """The machine that predicts these rows best. Raises MeasurementError if collectives come without messages."""
    calibration = Calibrated(_unfitted(measured), world=measured.world)
    for kind, sets in (
        ("compute", "gemm_bf16"),
        ("memory", "copy"),
        ("attention", "flash_fwd"),
        ("causal attention", "flash_fwd"),
        ("attention_backward", "flash_fwd_bwd"),
        ("causal attention_backward", "flash_fwd_bwd"),
        ("inside", "linear_fwd"),
    ):
        rows = [row for row in measured.only(sets) if calls(row)[-1][0] == kind]
        if rows:
            calibration = _fit_curve(calibration, kind, rows)
    calibration = _fit_link(calibration, measured)
    copying = [row for row in measured.only("all_gather", "all_to_all") if row.nbytes > SHORT]
    if copying:
        calibration = _fit_copies(calibration, copying)
    if measured.beside:
        calibration = _fit_slowdown(calibration, measured.beside)
    return _fit_floors(calibration, measured)


def _unfitted(measured):
    """The data sheet's device whose name the file gives; for an unknown one, its own fastest rows are the peak."""
    known = [device for name, device in hardware.devices().items() if name in measured.gpu.split()]
    if known:
        return replace(known[0], curves={})
    flops, nbytes = [np.inf], [np.inf]
    for row in measured.only(*KERNEL_SETS):
        kind, operations, moved = calls(row)[-1]
        working = max(row.seconds - LAUNCH, row.seconds / 2)
        (nbytes if kind == "memory" else flops).append((operations or moved) / working)
    fastest = [max(rates[1:] or rates) for rates in (flops, nbytes)]
    return Device(measured.gpu or "unknown", *fastest, launch_overhead=LAUNCH)


def _fit_curve(calibration, kind, rows):
    """Share (and half, for attention) of one kind. A floor is tried along, so that launch-bound rows do not bend it."""
    device, power = calibration.device, POWER.get(kind)
    own = [calls(row)[-1] for row in rows]
    peak = replace(device, curves={}, launch_overhead=0.0)
    ideal = np.array([peak.seconds(flops, nbytes, "bfloat16") for _, flops, nbytes in own])
    mine = [device.seconds(flops, nbytes, "bfloat16", kind) for _, flops, nbytes in own]
    rest = np.array([calibration.kernels(row) for row in rows]) - mine + device.launch_overhead

    def curve(x):
        share = min(1.0, float(np.exp(x[0])))
        return Curve(share, float(np.exp(x[1])), power) if power else Curve(share)

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
        rest[i] = run.makespan - sum(e.end - e.start for e in copies)
    seen = np.array([row.seconds for row in rows])
    fastest = device.curves.get("memory", Curve()).share
    shares = [fastest, *(share for share in ideal / np.maximum(seen - rest, 1e-12) if share < fastest)]
    share = min(shares, key=lambda share: _error(rows, rest + ideal / share))
    return replace(calibration, copying=Curve(float(share)))


def _fit_slowdown(calibration, beside):
    """The share of compute that a message in flight takes: its copies need processors and memory, as kernels do."""
    kernel, message, seen = np.transpose(beside)

    def error(share):  # the kernel is slow all along, or as long as the message passes
        expected = np.minimum(kernel / (1 - share), kernel + share * message)
        return np.abs(np.log(expected / seen)).mean()

    shares = [0.0, *(1 - kernel / seen), *((seen - kernel) / message)]
    best = min((share for share in shares if 0 <= share < 1), key=error)
    return replace(calibration, device=replace(calibration.device, overlap_slowdown=float(best)))


def _fit_floors(calibration, measured):
    """What launching costs, by row set; then the rate of short messages, from the collectives that stay too fast."""
    floors, rates = {}, []
    for name in [name for name in SETS if measured.only(name)]:
        rows = measured.only(name)
        moving, rest = np.transpose([calibration.parts(row) for row in rows])
        floors[name] = _floor(rows, moving, rest, even=True)[1]
        for row, flight, copies in zip(rows, moving, rest, strict=True):
            expected = max(floors[name], flight) + copies
            if name in SHORT_SETS and row.nbytes <= SHORT and row.seconds > 1.5 * expected:
                sent = calibration.run(row).traffic.by_pair[0].sum()
                rates.append(sent / (row.seconds - copies - calibration.link.latency))
    return replace(calibration, floors=floors, short_rate=float(np.median(rates)) if rates else np.inf)


# ---- errors ---------------------------------------------------------------------------------------------------------


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


def geometric_error(rows, times):
    """exp(mean |log(times / measured)|) - 1: 0.1 says that a prediction is typically off by a factor of 1.1."""
    return float(np.exp(_error(rows, np.array(times), even=True)) - 1)


# ---- the report -----------------------------------------------------------------------------------------------------


class SetError(NamedTuple):
    """Geometric errors of one row set: of all rows; of those that take longer than a launch (None without any); of all
    rows, each predicted by a fit that did not see it (None if not asked for)."""

    set: str
    rows: int
    error: float
    working_rows: int
    working_error: float | None
    left_out_error: float | None


def without_seeing(measured: Measured) -> list:
    """Each row's prediction by a fit without it: fold k leaves out row k of every set; nan for an only row."""
    number = {}
    for rows in map(measured.only, SETS):
        number |= {id(row): k for k, row in enumerate(rows) if len(rows) > 1}
    times = {}
    for fold in range(max(number.values(), default=-1) + 1):
        calibrated = fit(replace(measured, rows=tuple(row for row in measured.rows if number.get(id(row)) != fold)))
        times |= {id(row): calibrated.predict(row) for row in measured.rows if number.get(id(row)) == fold}
    return [times.get(id(row), np.nan) for row in measured.rows]


def summary(measured: Measured, calibrated: Calibrated, left_out=None) -> list:
    """A SetError for each row set of the file; `left_out` is what `without_seeing` returned."""
    rows = []
    for name in [name for name in SETS if measured.only(name)]:
        mine = measured.only(name)
        working = [row for row in mine if not calibrated.launch_bound(row)]
        unseen = [t for row, t in zip(measured.rows, left_out or (), strict=bool(left_out)) if row.set == name]
        rows.append(SetError(
            name,
            len(mine),
            geometric_error(mine, [calibrated.predict(row) for row in mine]),
            len(working),
            geometric_error(working, [calibrated.predict(row) for row in working]) if working else None,
            geometric_error(mine, unseen) if left_out else None,
        ))  # fmt: skip
    return rows


def run_calibrate(path):
    """Print the fitted machine, the error of every row and the geometric error of every row set."""
    from toolkit.show import text

    measured = load(path)
    calibrated = fit(measured)
    print(f"{measured.gpu}, {measured.world} ranks: {measured.environment}\n")
    print(text.table([_row(row, calibrated) for row in measured.rows], ROW_HEADERS))
    errors = summary(measured, calibrated, without_seeing(measured))
    print("\n" + text.table([(e.set, e.rows, *map(_percent, (e.error, e.left_out_error)), e.working_rows,
                              _percent(e.working_error)) for e in errors], SET_HEADERS))  # fmt: skip
    print("\n" + "\n".join(describe(calibrated)))


ROW_HEADERS = ("row set", "size", "measured", "fastest … slowest run", "predicted", "error", "")
SET_HEADERS = ("row set", "rows", "error", "error of unseen rows", "rows above the launch floor", "their error")


def _row(row, calibrated):
    predicted = calibrated.predict(row)
    notes = [*(["launch"] if calibrated.launch_bound(row) else []), *(["runs differ by 2 ×"] if row.noisy else [])]
    spread, error = f"{seconds(row.low)} … {seconds(row.high)}", f"{predicted / row.seconds - 1:+.0%}"
    return row.set, str(row), seconds(row.seconds), spread, seconds(predicted), error, ", ".join(notes)


def _percent(error):
    return "" if error is None or np.isnan(error) else f"{error:.1%}"


def describe(calibrated):
    """The fitted numbers, one line each."""
    for kind, curve in calibrated.device.curves.items():
        half = f", half of it at {seconds(curve.half)} of work (power {curve.power:g})" if curve.half else ""
        yield f"{kind}: {curve.share:.1%} of the peak{half}"
    if slowdown := calibrated.device.overlap_slowdown:
        yield f"beside a message: kernels lose {slowdown:.1%} of their speed"
    if calibrated.copying.share < 1:
        yield f"copies inside a collective: {calibrated.copying.share:.1%} of the peak"
    if calibrated.link:
        link = calibrated.link
        yield (f"link: latency {seconds(link.latency)}, one flow {size(link.flow_cap)}/s, "
               f"both directions together {size(link.bandwidth)}/s")  # fmt: skip
    if np.isfinite(calibrated.short_rate):
        yield f"collectives up to {size(SHORT)}: {size(calibrated.short_rate)}/s"
    yield "launch floors: " + ", ".join(f"{name} {seconds(floor)}" for name, floor in calibrated.floors.items())
