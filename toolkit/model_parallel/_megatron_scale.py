"""Megatron-LM at the paper's scale, predicted from small shape-only runs of the same code.

A trillion parameters on 3 072 GPUs is 6 equal replicas of 64 stages of 8 equal tensor ranks. So a step is put together:
  1. one layer, and the two ends of the model, run on one tensor group: seconds forward and backward;
  2. one pipeline, a rank a stage, by `_schedule.makespan`, with passes of those seconds and messages between them;
  3. the all-reduce of one rank's gradients over its replicas, run;
  4. the optimiser reads and writes its states.
Nothing of this overlaps, as in the code of 2021: a rank waits for what it sends, too.

Machine: nodes of 8 A100, NVLink 3 between them, a 200 Gb/s NIC each. Products attain a constant share of the peak, the
one number that is fitted. Attention writes its scores to memory; layers are recomputed in the backward pass.
Chapter: model_parallel/megatron.
"""

from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace

import numpy as np
from scipy.optimize import brentq

from toolkit.kernels.layers import add
from toolkit.runtime import Cluster, hardware, like, topology
from toolkit.sequence_parallel._block import block_weights

from . import _layers as layers
from . import megatron
from ._megatron_attention import scores_in_memory
from ._model import add_up, cut_block
from ._schedule import makespan, peaks

NODE, NVLINK, NIC = 8, hardware.NVLINK3, hardware.IB_HDR
ADAM_BYTES = 28  # a parameter: reads a 2-byte gradient, reads and writes 3 numbers of 4 bytes, writes 2-byte weights


@dataclass(frozen=True)
class Job:
    """One training run.

    layers, h, heads   the model                   batch     B, sequences
    t, p, d            the grid                    b, v      sequences a microbatch, chunks of layers a rank
    kind               see `megatron.schedule`
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
    """Predict one step: a Step. efficiency: share of the A100's peak that products attain."""
    order, mine = megatron.schedule(job.kind, job.p, job.microbatches, job.v), numbers_of(job)
    gradients = all_reduce_seconds(job.d, max(1, NODE // job.t), mine)
    gradients += all_reduce_seconds(min(job.p, 2), 1, job.vocabulary * job.h // job.t)  # the tied embedding
    optimiser = ADAM_BYTES * mine / hardware.A100.memory_bandwidth
    return Step(job, makespan(order, pass_seconds(job, order, efficiency)), gradients, optimiser)


def pass_seconds(job, order, efficiency):
    """(kind, stage) -> seconds of a pass, with the gather of what comes in and the way of what goes out.

    Who waits for its send is as busy as if the pass took longer, so a pass of `pass + message` seconds and a hop of 0
    are the same schedule; on the machine, `_pipeline.replay(…, overlap=False)`.
    """
    cost, last, each = layer_seconds(shape(job), efficiency), order.stages - 1, job.layers // order.stages
    message = like((job.b * job.s // (job.t if job.scatter_gather else 1), job.h), "float16")
    gather = gather_seconds(job.t, message.shape) if job.scatter_gather else 0.0
    inside = NODE // (job.t * job.d)  # stages of a pipeline on one node

    def way(a, b):
        """Seconds from stage a to stage b, of which one may not exist."""
        if not (0 <= a <= last and 0 <= b <= last) or job.p == 1:
            return 0.0
        link = NVLINK if inside > 1 and a % job.p // inside == b % job.p // inside else NIC
        return link.latency * 2 + message.nbytes / link.bandwidth

    def seconds(kind, stage):
        work = each * cost.layer[kind] + (stage == 0) * cost.embedding[kind] + (stage == last) * cost.head[kind]
        ahead = 1 if kind == "F" else -1
        return work + way(stage, stage + ahead) + gather * (way(stage - ahead, stage) > 0)

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


# ---- the runs that tell how long a piece takes -----------------------------------------------------------------------


def nodes_of(count, per_node):
    """`count` ranks on nodes that have `per_node` of them each."""
    inside = min(count, per_node)
    return topology.two_level(count // inside, inside, NVLINK, NIC, inside="switch")


def shape(job):
    """What a layer's time depends on."""
    return Job(1, job.h, job.heads, 1, t=job.t, b=job.b, s=job.s, vocabulary=job.vocabulary)


@cache
def layer_seconds(job, efficiency):
    """Of a layer, the embedding and the head on one tensor group: seconds, {"F": …, "B": …}, and the peak of memory."""
    device = replace(hardware.A100, compute_efficiency=efficiency)
    run = Cluster(nodes_of(job.t, NODE), device).run(pieces, job)
    return SimpleNamespace(peak=max(run.peak_memory), **run.outputs[0])


def pieces(comm, job):
    """Run each piece forward and backward and look at the clock."""
    head_dim, tokens = job.h // job.heads, job.b * job.s
    whole = block_weights(None, job.h, job.heads, job.heads, head_dim, 4 * job.h, "float16")
    setting = layers.Setting(comm, comm.group([comm.rank]), scores_in_memory(dropout=0.1), head_dim, np.arange(job.s))
    weights, table = cut_block(whole, comm.rank, comm.size, head_dim), like((job.vocabulary // job.t, job.h), "float16")
    x, norm, text = like((tokens, job.h), "float16"), like((job.h,), "float16"), like((tokens,), "int64")
    losses = like((tokens,), "float32")

    def layer():
        _, saved = layers.recomputed(setting, weights, x)
        yield
        _, grads = layers.recomputed_backward(setting, weights, saved, x)
        add_up(grads, grads)  # to those of earlier microbatches
        yield

    def embedding():
        layers.embedding(setting, table, text)
        yield
        add(table, layers.embedding_backward(setting, table, text, x))
        yield

    def head():
        _, saved = layers.head(setting, norm, table.T, x, text)
        yield
        add(table, layers.head_backward(setting, norm, table.T, saved, text, losses)[2].T)
        yield

    return {piece.__name__: timed(comm, piece()) for piece in (layer, embedding, head)}


def timed(comm, both_ways):
    start = comm.now
    next(both_ways)
    middle = comm.now
    next(both_ways)
    return {"F": middle - start, "B": comm.now - middle}


@cache
def gather_seconds(t, part):
    """Seconds to put a message of `t` parts together in a tensor group."""
    group = Cluster(nodes_of(t, NODE), hardware.A100)
    return group.run(lambda comm: layers.all_gather(comm, like(part, "float16")) is None).makespan


@cache
def all_reduce_seconds(ranks, per_node, numbers):
    """Seconds to all-reduce 16-bit numbers over ranks, `per_node` of them on a node."""
    everyone = Cluster(nodes_of(ranks, per_node), hardware.A100)
    return everyone.run(lambda comm: layers.all_reduce(comm, like((numbers,), "float16")) is None).makespan


@cache
def fitted(job, rate):
    """The share of the peak that products must attain for `job` to reach `rate` operations/s and GPU."""
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
