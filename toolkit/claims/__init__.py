"""What papers say, as numbers, beside what we get.

    @claim(says="a step is 1.2 times as fast as ring attention's", value=1.2, unit="×", where="Figure 6, 4×A10",
           tolerance=0.15, same_side_of=1.0, why="our PCIe model has no host traffic", paper="wang2024tokenring")
    def speed_up():
        return ring_run.makespan / token_ring_run.makespan

Claims of a system live in `toolkit/claims/<part>/<system>.py` and are found by the place of that file. The decorated
function stays an ordinary function, so the chapter calls it for its figures. A claim that does not reproduce stays.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

REPRODUCED, DIRECTION, NOT_REPRODUCED, FAILED = "reproduced", "direction only", "not reproduced", "failed"


@dataclass(frozen=True)
class Claim:
    """One statement of a paper and the function that measures it. The fields are `claim`'s arguments."""

    measure: Callable
    part: str
    system: str
    says: str
    value: float | None
    unit: str
    where: str
    tolerance: float
    same_side_of: float | None
    holds: Callable | None
    direction: str
    why: str
    paper: str


@dataclass(frozen=True)
class Verdict:
    """A claim beside its measurement.

    paper_value  the paper's number, or the direction it states ("above 1") where it gives none
    ours         our number; None where measuring failed
    ratio        ours / paper_value; None where either is missing or the paper's is 0
    verdict      "reproduced"      |ours - value| ≤ tolerance · |value| (value 0: |ours| ≤ tolerance);
                                   for a claim without a number: `holds(ours)`
                 "direction only"  outside the tolerance, but on the same side of `same_side_of` as the paper's number,
                                   or `holds(ours)` where that is given
                 "not reproduced"  neither
                 "failed"          measuring raised, or returned no finite number; `why` says what happened
    why          the author's words on the difference; empty when reproduced
    seconds      wall-clock time of measuring
    """

    system: str
    part: str
    says: str
    where: str
    paper_value: float | str
    ours: float | None
    unit: str
    ratio: float | None
    verdict: str
    why: str
    seconds: float


_registry = {}  # (module, function name) -> Claim, in the order of definition


def claim(
    *, says, where, value=None, unit="", tolerance=0.15, same_side_of=None, holds=None, direction="", why="", paper=""
):
    """Register the decorated function, which takes no arguments and returns our number, as a measurement of a claim.

    says          what the paper says, one sentence
    where         table, figure or section, and the machine
    value         the paper's number in `unit`; None for a claim that gives a direction only
    tolerance     largest relative difference that counts as reproduced
    same_side_of  a number that separates two directions, for example 1.0 for speed-ups
    holds         ours -> bool: whether the stated direction holds; needed when value is None
    direction     that direction in words ("above 1"); needed when value is None
    why           why our number differs, when it does
    paper         key in references.bib
    raises        ValueError  one of the above is missing or contradicts another
    """
    _check(says, where, value, tolerance, same_side_of, holds, direction)

    def register(measure):
        part, system = _place(measure.__module__)
        _registry[measure.__module__, measure.__qualname__] = Claim(
            measure, part, system, says, value, unit, where, tolerance, same_side_of, holds, direction, why, paper
        )
        return measure

    return register


def _check(says, where, value, tolerance, same_side_of, holds, direction):
    problem = None
    if not says.strip() or not where.strip():
        problem = "says and where must not be empty: a claim names its source"
    elif value is None and (holds is None or not direction.strip()):
        problem = "value=None needs holds=lambda ours: … and direction='above 1', say: otherwise nothing can be checked"
    elif value is not None and not math.isfinite(value):
        problem = f"value={value} is not finite"
    elif not 0 <= tolerance < math.inf:
        problem = f"tolerance={tolerance} must be at least 0 and finite; 0.15 means 15 %"
    elif same_side_of is not None and (value is None or value == same_side_of):
        problem = f"same_side_of={same_side_of} needs a value that lies on one side of it, got value={value}"
    elif same_side_of is not None and holds is not None:
        problem = "same_side_of and holds both decide the direction: give one of them"
    if problem:
        raise ValueError(f"claim {says!r}: {problem}.")


def _place(module):
    """'toolkit.claims.attention.flash' -> ('attention', 'flash')."""
    *_, part, system = ["", *module.split(".")]
    return part, system


def systems():
    """(part, system) of every claims file, in order of name. Found by walking the tree: none can be forgotten."""
    files = sorted(Path(__file__).parent.glob("*/*.py"))
    return [(file.parent.name, file.stem) for file in files if not file.stem.startswith("_")]


def claims(system=None):
    """Claims of one system, or of all: a list of Claim.

    raises  ValueError  no claims file has that name; the message lists those that exist
    """
    known = [(part, name) for part, name in systems() if system in (None, name)]
    if not known and system is not None:
        names = ", ".join(name for _, name in systems()) or "no system"
        raise ValueError(f"no claims for {system!r}; there are claims for {names}.")
    modules = [f"{__name__}.{part}.{name}" for part, name in known]
    for module in modules:
        import_module(module)
    return [found for module in modules for (where, _), found in _registry.items() if where == module]


def run_claims(system=None, progress=True):
    """Measure the claims of one system, or of all.

    progress  show a progress bar on standard error
    returns   list of Verdict
    raises    ValueError  an unknown system
    """
    chosen = claims(system)
    if progress:
        from tqdm import tqdm

        chosen = tqdm(chosen, desc="claims", unit="claim")
    return [judge(found) for found in chosen]


def judge(found):
    """Measure one Claim: its Verdict. What the measuring function raises becomes the verdict "failed"."""
    began = time.perf_counter()
    paper_value = found.direction if found.value is None else found.value
    try:
        ours = found.measure()
        number = math.nan if ours is None else float(ours)
        if not math.isfinite(number):
            raise ValueError(f"{found.measure.__name__} returned {ours}; a claim's function returns a finite number")
        verdict, why = _verdict(found, number), found.why
    except Exception as error:  # a broken measurement is a result, too: the table must show it
        number, verdict, why = None, FAILED, f"{type(error).__name__}: {error}"
    ratio = number / found.value if number is not None and found.value else None
    return Verdict(found.system, found.part, found.says, found.where, paper_value, number, found.unit, ratio, verdict,
                   "" if verdict == REPRODUCED else why, time.perf_counter() - began)  # fmt: skip


def _verdict(found, ours):
    if found.value is None:
        return REPRODUCED if found.holds(ours) else NOT_REPRODUCED
    if abs(ours - found.value) <= found.tolerance * (abs(found.value) or 1.0):
        return REPRODUCED
    if found.holds is not None:
        return DIRECTION if found.holds(ours) else NOT_REPRODUCED
    side = found.same_side_of
    return DIRECTION if side is not None and (ours - side) * (found.value - side) > 0 else NOT_REPRODUCED
