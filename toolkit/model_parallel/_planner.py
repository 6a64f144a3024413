"""Where to put a model: every grid, schedule, recomputation and ZeRO stage that fits is bounded, the best are timed.

    found = search(Job(*GPTS["gpt-175b"], batch=1536), 1024, EFFICIENCY)
    found.steps[0].job                 # the fastest; found.steps has the `keep` fastest, in order
    found.refused                      # {what is the matter: how many}; `refusal(job)` tells of one
    memory(job).states                 # bytes; what a rank needs, part by part

A placement is a `Job`. One that does not divide or does not fit is refused, with the reason. `bound` is never more than
`step`, and costs no schedule: placements are timed in the order of their bounds, until the next bound is slower than
all that are kept. So the kept ones are the fastest of all, not of those that were timed.

Memory: states as `_zero` cuts them; activations as Korthikanti et al. count them, in as many copies as the schedule
keeps; and what the measured pieces need while they run.
Sources: Korthikanti et al. 2022, arXiv 2205.05198, section 4; Narayanan et al. 2021, arXiv 2104.04473.
Chapter: model_parallel/place_a_model.
"""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from toolkit.runtime.units import size

from . import _megatron_scale as scale
from ._megatron_pieces import MACHINES, layer_seconds, wire_seconds
from ._megatron_scale import SPLIT, outline, pass_seconds, schedule, shape
from ._schedule import peaks
from ._zero import bytes_a_parameter

GPTS = {  # layers, h, heads: Korthikanti et al. 2022, table 3
    "gpt-22b": (48, 6144, 64),
    "gpt-175b": (96, 12_288, 96),
    "gpt-530b": (105, 20_480, 128),
    "gpt-1t": (128, 25_600, 160),
}
KINDS = ("1F1B", "GPipe", "interleaved", *SPLIT)
RECOMPUTE = ("full", "attention", "none")
EFFICIENCY = 0.687  # of products: fitted on one row of Megatron-LM's table, `claims.model_parallel.megatron`
MICROBATCHES = (1, 2, 3, 4, 8)  # sequences


# ---- does it fit? ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank."""

    states: float  # weights, gradients, the optimiser's numbers
    activations: float
    work: float  # of one layer or one end of the model while it runs, beyond what it keeps

    @property
    def total(self):
        return self.states + self.activations + self.work


def activation_bytes(job):
    """Bytes that a layer keeps of a microbatch from its forward to its backward pass: Korthikanti et al., section 4.

    The dropout masks are theirs; ours are drawn again, and we compute the GeLU again, too. See the tests.
    """
    a_hidden_state = job.s * job.b * job.h
    if job.recompute == "full":
        return 2 * a_hidden_state
    scores = 5 * job.heads * job.s / (job.h * job.t) if job.recompute == "none" else 0
    return a_hidden_state * (10 + 24 / job.t + scores)


def product_bytes(job):
    """Bytes that a layer keeps from B to W: inputs of its four products, and the gradients of their outputs."""
    return job.s * job.b * job.h * (8 + 24 / job.t)


@cache
def kept(kind, p, m, v, left):
    """Chunk activations on the fullest rank. But for GPipe, more microbatches than a few rounds change nothing."""
    return max(peaks(rounds(kind, p, m if kind == "GPipe" else min(m, 3 * p), v), left))


rounds = cache(schedule)


def state_bytes(job):
    """Bytes of weights, gradients and the optimiser's numbers on a rank of the first stage."""
    ends = job.vocabulary * job.h // job.t
    layers = scale.numbers_of(job) - ends
    return bytes_a_parameter(job.zero, job.d) * layers + bytes_a_parameter(min(job.zero, 2), job.d) * ends


@cache
def memory(job, efficiency=1.0):
    """A Memory. Only the input of the model's ends, a hidden state or less, is left out.

    efficiency   any: pieces that have run at it need not run again
    """
    each, layer = job.layers // outline(job.kind, job.p, job.v).stages, activation_bytes(job)
    copies = kept(job.kind, job.p, job.microbatches, job.v, product_bytes(job) / layer if job.kind in SPLIT else 1)
    pieces = layer_seconds(shape(job), efficiency)
    return Memory(state_bytes(job), copies * each * layer, pieces.peak - pieces.kept)


def refusal(job, efficiency=1.0):
    """Why this placement cannot be, or None."""
    for count, of, parts, named in (
        (job.heads, "heads", job.t, "tensor ranks"),
        (job.layers, "layers", job.p * chunks(job), "chunks"),
        (job.batch, "sequences", job.d * job.b, "replicas × sequences a microbatch"),
    ):
        if count % parts:
            return f"{count} {of} do not divide among {parts} {named}"
    if job.kind == "interleaved" and job.microbatches % job.p:
        return f"interleaving needs a multiple of {job.p} microbatches, not {job.microbatches}"
    capacity, states = MACHINES[job.machine].device.memory_capacity, state_bytes(job)
    if states > capacity:
        return f"needs {size(states)} of {size(capacity)} for weights, gradients and states alone"
    needs = memory(job, efficiency)
    if needs.total > capacity:
        return f"needs {size(needs.total)} of {size(capacity)}, {size(needs.activations)} for activations"
    return None


def chunks(job):
    """Of layers a rank."""
    return 2 if job.kind.startswith("V-") else job.v


# ---- how fast at best? -----------------------------------------------------------------------------------------------


@cache
def bound(job, efficiency):
    """Seconds, never more than `step`'s, without a schedule.

    A rank cannot start before a microbatch has come down to its lowest stage, must do its passes, and afterwards the
    last gradient must go up again; if its last pass may be a W, it need not. Replicas sum without latency.
    """
    order = outline(job.kind, job.p, job.v)
    seconds = pass_seconds(job, order, efficiency, wire_seconds)

    def least(stages):
        outside = range(min(stages))
        ways = sum(seconds("F", stage) + (0 if order.split else seconds("B", stage)) for stage in outside)
        return ways + job.microbatches * sum(seconds(kind, stage) for stage in stages for kind in passes(order))

    fastest = MACHINES[job.machine].device.memory_bandwidth
    optimiser = scale.ADAM_BYTES * scale.numbers_of(job) // (job.d if job.zero else 1) / fastest
    return max(map(least, order.where)) + scale.flush_seconds(job, wire_seconds) + optimiser


def passes(order):
    """Kinds of passes that each rank has."""
    return ("F", "B", "W") if order.split else ("F", "B")


def model_share(step):
    """Share of the peak that operations of the model are, none counted twice: 72 B s l h² (…), Korthikanti et al."""
    job = step.job
    ends = 1 + job.s / (6 * job.h) + job.vocabulary / (12 * job.layers * job.h)
    operations = 72 * job.batch * job.s * job.layers * job.h**2 * ends
    return operations / step.seconds / job.devices / MACHINES[job.machine].device.flops["float16"]


# ---- all of them -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """Of a search: the fastest Steps, in order; how many placements were refused, by reason; bounded only; timed."""

    steps: list
    refused: Counter
    bounded: int
    timed: int


def placements(job, devices, kinds=KINDS, recompute=RECOMPUTE, zero=(0, 1, 2, 3), grids=None):
    """Every way to place the model of `job` and its batch: Jobs. One stage has one schedule, one replica no ZeRO.

    grids   of (t, p, b) only; None: all
    """
    for t, p, b in grids or product(divisors(devices), divisors(devices), MICROBATCHES):
        if devices % (t * p):
            continue
        d = devices // (t * p)
        for kind, again, stage in product(kinds if p > 1 else kinds[:1], recompute, zero if d > 1 else (0,)):
            ways = [v for v in divisors(job.layers // p) if v > 1] if kind == "interleaved" else [1]
            for v in ways:
                yield replace(job, t=t, p=p, d=d, b=b, v=v, kind=kind, recompute=again, zero=stage)


def divisors(n):
    return [k for k in range(1, n + 1) if n % k == 0]


def search(job, devices, efficiency, keep=10, **choices):
    """A Found. choices: of `placements`, to search among fewer."""
    refused, fits = Counter(), []
    for one in placements(job, devices, **choices):
        why = refusal(one, efficiency)
        if why:
            refused["needs more memory" if why.startswith("needs") else why] += 1
        else:
            fits.append((bound(one, efficiency), len(fits), one))
    best, timed = [], 0
    for least, _, one in sorted(fits):
        if len(best) == keep and least > best[-1].seconds:
            break
        best = sorted([*best, scale.step(one, efficiency)], key=lambda step: step.seconds)[:keep]
        timed += 1
    return Found(best, refused, len(fits), timed)
