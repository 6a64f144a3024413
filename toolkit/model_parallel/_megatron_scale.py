"""Megatron-LM at the paper's scale, predicted from small shape-only runs of the same code.

A trillion parameters on 3 072 GPUs is 6 equal replicas of 64 stages of 8 equal tensor ranks. So a step is put together:
  1. one layer, and the two ends of the model, run on one tensor group: seconds forward and backward;
  2. one pipeline, a rank a stage, by `_schedule.makespan`, with passes of those seconds and messages between them;
  3. the all-reduce of one rank's gradients over its replicas, run;
  4. the optimiser reads and writes its states.
Nothing of this overlaps, as in the code of 2021: a rank waits for what it sends, too. With `overlap`, the weights and
gradients that ZeRO's second and third stage move layer by layer travel beside the products.

Machine: nodes of 8 A100, NVLink 3 between them, a 200 Gb/s NIC each. Products attain a constant share of the peak, the
one number that is fitted. Attention writes its scores to memory; layers are recomputed in the backward pass.
Chapter: model_parallel/megatron.
"""

from dataclasses import dataclass, replace
from functools import cache

from toolkit.runtime import hardware, like

from . import _zero_bubble as zero_bubble
from . import megatron
from ._megatron_pieces import (
    MACHINES,
    all_reduce_seconds,
    gather_seconds,
    layer_seconds,
    nodes_of,
    pieces,
)
from ._schedule import makespan, peaks

__all__ = ["Job", "Step", "all_reduce_seconds", "gather_seconds", "layer_seconds", "nodes_of", "pieces", "step"]

NVLINK, NIC = MACHINES["a100"].link, MACHINES["a100"].nic
SPLIT = {
    "ZB-H1": zero_bubble.zb_h1,
    "ZB-H2": zero_bubble.zb_h2,
    "V-Min": zero_bubble.v_min,
    "V-Half": zero_bubble.v_half,
    "V-ZB": zero_bubble.v_zb,
}
ADAM_BYTES = 28  # a parameter: reads a 2-byte gradient, reads and writes 3 numbers of 4 bytes, writes 2-byte weights


@dataclass(frozen=True)
class Job:
    """One training run.

    layers, h, heads   the model                   batch     B, sequences
    t, p, d            the grid                    b, v      sequences a microbatch, chunks of layers a rank
    kind               see `megatron.schedule`, and SPLIT: those have the chunks that they need
    recompute          in the backward pass: "full" layers, the scores of "attention", or "none"
    zero, overlap      stage of `_zero`; whether what stages 2 and 3 move for each pass travels beside the products
    machine            one of MACHINES
    """

    layers: int
    h: int
    heads: int
    batch: int
    t: int = 1
    p: int = 1
    d: int = 1
    b: int = 1
    v: int = 1
    kind: str = "interleaved"
    scatter_gather: bool = True
    s: int = 2048
    vocabulary: int = 51_200
    recompute: str = "full"
    zero: int = 0
    overlap: bool = False
    machine: str = "a100"

    @property
    def replicas(self):
        """(d, how many of them on a node, machine): what a collective over replicas depends on."""
        return self.d, max(1, MACHINES[self.machine].node // self.t), self.machine

    @property
    def devices(self):
        return self.p * self.t * self.d

    @property
    def microbatches(self):
        return self.batch // (self.d * self.b)

    @property
    def flops(self):
        return megatron.flops(self.batch, self.layers, self.h, self.s, self.vocabulary)


@dataclass(frozen=True)
class Step:
    """Seconds of one step, and of its parts."""

    job: Job
    pipeline: float
    gradients: float
    optimiser: float

    @property
    def seconds(self):
        return self.pipeline + self.gradients + self.optimiser

    @property
    def rate(self):
        """Operations of the paper's formula, a second and GPU."""
        return self.job.flops / self.seconds / self.job.devices


@cache
def step(job, efficiency):
    """Predict one step: a Step. efficiency: share of the device's peak that products attain."""
    few = outline(job.kind, job.p, job.v)
    seconds, mine = pass_seconds(job, few, efficiency), numbers_of(job)
    gradients = flush_seconds(job)
    if few.owner[0][0] != few.owner[few.stages - 1][0]:
        gradients += all_reduce_seconds(2, 1, job.vocabulary * job.h // job.t, job.machine)  # the tied embedding
    moved = ADAM_BYTES * mine // (job.d if job.zero else 1)
    optimiser = moved / MACHINES[job.machine].device.memory_bandwidth
    return Step(
        job, makespan(schedule(job.kind, job.p, job.microbatches, job.v, seconds), seconds), gradients, optimiser
    )


def schedule(kind, p, m, v=1, seconds=zero_bubble.ALIKE):
    """The Schedule of that name. seconds: as for `times`; schedules of SPLIT place their W passes by it."""
    return SPLIT[kind](p, m, seconds) if kind in SPLIT else megatron.schedule(kind, p, m, v)


@cache
def outline(kind, p, v):
    """The schedule for as many microbatches as ranks: what can be told without their number."""
    return schedule(kind, p, p, v)


def flush_seconds(job, all_reduce=all_reduce_seconds):
    """Seconds in which replicas sum gradients, and share weights, once a batch: ZeRO's second stage has summed the
    layers' before, its third has nothing to share."""
    mine, ends = numbers_of(job), job.vocabulary * job.h // job.t
    d, per_node, machine = job.replicas
    if job.zero < 2:
        return all_reduce(d, per_node, mine, machine)
    shared = all_reduce(d, per_node, mine - ends, machine) / 2 if job.zero == 2 else 0.0
    return all_reduce(d, per_node, ends, machine) + shared


def pass_seconds(job, order, efficiency, all_reduce=all_reduce_seconds, messages=True):
    """(kind, stage) -> seconds of a pass, with the gather of what comes in and the way of what goes out.

    Who waits for its send is as busy as if the pass took longer, so a pass of `pass + message` seconds and a hop of 0
    are the same schedule; on the machine, `_pipeline.replay(…, overlap=False)`.
    order        any Schedule of the job's kind, p and v
    all_reduce   seconds of that collective: another than `all_reduce_seconds` for a bound
    messages     False: passes without them
    """
    cost, last, each = layer_seconds(shape(job), efficiency), order.stages - 1, job.layers // order.stages
    message = like((job.b * job.s // (job.t if job.scatter_gather else 1), job.h), "float16")
    gather = gather_seconds(job.t, message.shape, job.machine) if job.scatter_gather else 0.0
    (d, per_node, machine), on = job.replicas, MACHINES[job.machine]
    inside = on.node // (job.t * d)  # stages of a pipeline on one node
    half = all_reduce(d, per_node, each * 12 * job.h**2 // job.t, machine) / 2 if job.zero > 1 else 0.0
    moved = {"F": half * (job.zero == 3), "B": half * (job.zero == 3), "W": half}  # weights come, gradients go

    def way(a, b):
        """Seconds from stage a to stage b, of which one may not exist, or be on the same rank."""
        if not (messages and 0 <= a <= last and 0 <= b <= last) or order.owner[a][0] == order.owner[b][0]:
            return 0.0
        link = on.link if inside > 1 and order.owner[a][0] // inside == order.owner[b][0] // inside else on.nic
        return link.latency * 2 + message.nbytes / link.bandwidth

    def work(kind, stage):
        return each * cost.layer[kind] + (stage == 0) * cost.embedding[kind] + (stage == last) * cost.head[kind]

    @cache
    def seconds(kind, stage):
        products, travels = work(kind, stage), moved[kind]
        if kind == "B" and order.split:
            products -= work("W", stage)
        elif kind == "B":
            travels += moved["W"]
        products = max(products, travels) if job.overlap else products + travels
        ahead = {"F": 1, "B": -1}.get(kind)
        return products + (way(stage, stage + ahead) + gather * (way(stage - ahead, stage) > 0) if ahead else 0.0)

    return seconds


def best(job, efficiency, capacity=hardware.A100.memory_capacity):
    """The fastest step over microbatches of 1, 2, 4, … sequences that fit in memory, as the paper tunes them."""
    found, size = None, 1
    while job.batch % (job.d * size) == 0:
        tried = replace(job, b=size)
        if tried.microbatches % job.p or memory(tried) > capacity:
            break
        this = step(tried, efficiency)
        if found is not None and this.seconds >= found.seconds:
            break
        found, size = this, 2 * size
    return found


def memory(job):
    """Bytes that the fullest rank needs: 16 a parameter, the inputs of layers, and one layer at work."""
    order = megatron.schedule(job.kind, job.p, job.microbatches, job.v)
    inputs = peaks(order)[0] * (job.layers // order.stages) * job.b * job.s * job.h * 2
    return 16 * numbers_of(job) + inputs + layer_seconds(shape(job), 1.0).peak


def numbers_of(job):
    """Parameters of a rank of the first stage."""
    return job.layers // job.p * 12 * job.h**2 // job.t + job.vocabulary * job.h // job.t


def shape(job):
    """What a layer's time depends on."""
    return Job(1, job.h, job.heads, 1, t=job.t, b=job.b, s=job.s, vocabulary=job.vocabulary, recompute=job.recompute,
               machine=job.machine)  # fmt: skip


@cache
def fitted(job, rate):
    """The share of the peak that products must attain for `job` to reach `rate` operations/s and GPU."""
    from scipy.optimize import brentq  # 0.3 s that the command line need not wait for

    return brentq(lambda share: best(job, share).rate - rate, 0.2, 1.0, xtol=1e-3)


# ---- the rival: ZeRO's third stage -----------------------------------------------------------------------------------


def zero3(job, efficiency, nics=1):
    """Seconds of a step when d = n ranks keep 1/n of everything and gather each layer before it runs.

    nics   NICs of a node that a collective uses: 1 for one ring through all ranks, 8 at best
    Gathers and scatters travel beside the products: a layer takes the longer of the two. Bytes, over the slowest link:
    W/nics to gather the W bytes of a layer, forward and again backward, and W/nics to scatter its gradient.
    """
    cost = layer_seconds(shape(job), efficiency)
    share = (job.d - 1) / job.d / nics / NIC.bandwidth
    layer, ends = 12 * job.h**2 * 2 * share, job.vocabulary * job.h * 2 * share
    forward = job.layers * max(cost.layer["F"], layer) + max(cost.embedding["F"] + cost.head["F"], ends)
    backward = job.layers * max(cost.layer["B"], 2 * layer) + max(cost.embedding["B"] + cost.head["B"], 2 * ends)
    numbers = 12 * job.layers * job.h**2 + job.vocabulary * job.h
    optimiser = ADAM_BYTES * numbers / job.d / hardware.A100.memory_bandwidth
    return Step(job, job.microbatches * (forward + backward), 0.0, optimiser)
