"""Timings of real machines: JSON files of medians, and the errors that say what is wrong with one.

    {"gpu": "NVIDIA H200", "world": 2, "environment": "NVLink", "micro": {"copy": [{"bytes": 1048576, "median": 1.9e-05,
     "min": 1.6e-05, "max": 3.8e-05}, …], …}, "beside": […]}

Seconds and bytes. A file may hold any of the row sets in `SETS`, and rows of `Beside`. benchmarks/gpus.py writes one.
Three files lie in `measured/`: two H200 GPUs of one host, three ways to carry their messages.
Chapter: foundations/how_far_to_trust_the_clock.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

COLUMNS = {  # row set -> what its rows vary: matrix size, bytes of each rank's input, attention's shape
    "gemm_bf16": ("n",),
    "copy": ("bytes",),
    "flash_fwd": ("heads", "n", "d", "causal"),
    "flash_fwd_bwd": ("heads", "n", "d", "causal"),
    "linear_fwd": ("heads", "n", "d", "chunk"),
    "p2p_ring_shift": ("bytes",),
    "p2p_one_way": ("bytes",),
    "all_reduce": ("bytes_per_rank_input",),
    "all_gather": ("bytes_per_rank_input",),
    "reduce_scatter": ("bytes_per_rank_input",),
    "all_to_all": ("bytes_per_rank_input",),
}
SETS = tuple(COLUMNS)


class MeasurementError(ValueError):
    """A file of measurements that cannot be used: which, where in it, and what to change."""


class Row(NamedTuple):
    """One timing: the median of several runs, with the fastest and the slowest of them."""

    set: str
    size: dict  # column -> value
    seconds: float
    low: float
    high: float

    @property
    def noisy(self):
        """The slowest run took more than twice as long as the fastest: there is no one time to predict."""
        return self.high > 2 * self.low

    @property
    def nbytes(self):
        """Bytes of one rank's input (copy, messages, collectives)."""
        return next(iter(self.size.values()))

    def __str__(self):
        if "heads" in self.size:
            return f"{self.size['n']:,} tokens{', causal' if self.size.get('causal') else ''}"
        return f"{self.nbytes:,}" if self.set == "gemm_bf16" else f"{self.nbytes:,} B"


class Beside(NamedTuple):
    """Seconds of an attention kernel and of a shift: each alone, and the kernel when both begin together."""

    kernel: float
    message: float
    kernel_beside: float


@dataclass(frozen=True)
class Measured:
    """What one file holds.

    rows     of Row     beside   of Beside: kernels that ran while a message passed
    """

    name: str
    environment: str
    gpu: str
    world: int
    rows: tuple
    beside: tuple = ()

    def only(self, *sets):
        """The rows of these sets, in the file's order."""
        return [row for row in self.rows if row.set in sets]


def load(path):
    """Read and check a file. Raises MeasurementError."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MeasurementError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise MeasurementError(f"{path}: is not JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("micro"), dict):
        raise MeasurementError(f'{path}: has no "micro": it must hold {{"gpu": …, "world": …, "micro": {{…}}}}')
    world = content.get("world", 2)
    if not isinstance(world, int) or world < 2:
        raise MeasurementError(f'{path}: "world" is {world!r}: it must be a number of ranks, 2 or more')
    rows = [row for name, entries in content["micro"].items() for row in _rows(path, name, entries)]
    if not rows:
        raise MeasurementError(f'{path}: "micro" has no rows')
    beside = tuple(_beside(f"{path}: beside row {n}", entry) for n, entry in enumerate(content.get("beside", ()), 1))
    environment, gpu = str(content.get("environment", path.stem)), str(content.get("gpu", ""))
    return Measured(path.stem, environment, gpu, world, tuple(rows), beside)


def shipped():
    """The files of this package: name -> Measured. Source: timed by this project, PyTorch 2.11, NCCL 2.28.9."""
    folder = Path(__file__).parent / "measured"
    return {name: load(folder / f"h200x2_{name}.json") for name in ("nvlink", "host_memory", "one_channel")}


def _rows(path, name, entries):
    if name not in COLUMNS:
        raise MeasurementError(f"{path}: row set {name!r} is not known; known are {', '.join(SETS)}")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise MeasurementError(f"{path}: row set {name!r} must be a list of objects")
    return [_row(f"{path}: {name} row {number}", name, entry) for number, entry in enumerate(entries, 1)]


def _beside(where, entry):
    try:
        found = Beside(*(float(entry[name]["median"]) for name in Beside._fields))
    except (KeyError, TypeError, ValueError) as error:
        needed = ", ".join(f'"{name}": {{"median": …}}' for name in Beside._fields)
        raise MeasurementError(f"{where} must hold {needed}: {error!r}") from error
    if not all(0 < value < math.inf for value in found):
        raise MeasurementError(f"{where}: {found} must be numbers above 0")
    return found


def _row(where, name, entry):
    needed = (*COLUMNS[name], "median")
    for column in needed:
        if column not in entry:
            raise MeasurementError(f"{where} has no {column!r}: it needs {', '.join(needed)}")
    median = entry["median"]
    times = [entry.get("min", median), median, entry.get("max", median)]
    for column, value in zip(("min", "median", "max"), times, strict=True):
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise MeasurementError(f"{where}: {column!r} is {value!r}: it must be a number above 0")
    for column in COLUMNS[name]:
        if not isinstance(entry[column], int) or (entry[column] <= 0 and column != "causal"):
            raise MeasurementError(f"{where}: {column!r} is {entry[column]!r}: it must be a whole number above 0")
    if not times == sorted(times):
        raise MeasurementError(f"{where}: min {times[0]}, median {times[1]}, max {times[2]} are not in this order")
    return Row(name, {column: entry[column] for column in COLUMNS[name]}, median, times[0], times[2])
