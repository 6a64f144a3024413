"""A step of the 20B model on up to 384 GCDs: the program of `frontier_partitioning`, run on one of many equal ranks.

All ranks of a job do the same at the same time. So one rank runs the program shape-only, with the kernels of its
device, and its groups are stand-ins that take as long as the collective does on Frontier with all groups at it at once:

  - inside a node, simulated at the job's size in bytes: two sizes, and the line through them;
  - between nodes, simulated on 3 and on 4 nodes with parts of the same bytes: each node more adds the same time.

Collectives take turns in one queue, beside the kernels. Ranks are placed so that a ring in a node uses direct links.
Assumed: products attain half of the peak; links attain all of theirs; no contention with another job.
Chapter: model_parallel/frontier_partitioning.
"""

from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace

import numpy as np

from toolkit.runtime import Cluster, hardware, like, topology
from toolkit.sequence_parallel import _zero3 as vectors

from . import frontier_partitioning as fp
from ._partition_layout import NIC, NODE, AllNics, Groups, frontier, spans
from ._partition_model import Model
from ._zero import State

GPT_20B = Model(layers=44, h=6144, heads=48, vocabulary=50_304, recompute=True)
GPT_10B = Model(layers=22, h=6144, heads=48, vocabulary=50_304, recompute=True)
DEVICE = replace(hardware.MI250X, compute_efficiency=0.5)
SIZES, NODES = (1 << 20, 1 << 22), (3, 4)  # what is simulated: bytes of a part, nodes


# ---- seconds of a collective -----------------------------------------------------------------------------------------


def collective(comm, name, inner, outer, part, one_nic):
    """`name` once in every group of the span; a part has that many bytes."""
    group = comm.split((comm.rank % inner, comm.rank // outer), comm.rank)
    if inner < NODE < outer and not one_nic:
        group = AllNics(group)
    whole = like((group.size * part,), "uint8")
    getattr(group, name)(whole[:part] if name == "all_gather" else whole)


@cache
def simulated(name, inner, outer, part, nodes, nic, one_nic=False):
    """Seconds of the collective itself, on all ranks of so many nodes."""
    return Cluster(frontier(nodes, nic), DEVICE).run(collective, name, inner, outer, part, one_nic).makespan


@cache
def line(name, inner, outer, nic=NIC, one_nic=False):
    """(seconds of an empty part, seconds a byte of a part) of a collective; outer = all ranks if it leaves the node.

    one_nic   a collective over all ranks is one ring, which enters and leaves each node by one NIC
    """
    nodes = max(1, outer // NODE)
    if nodes <= NODES[1]:
        low, high = (simulated(name, inner, outer, part, nodes, nic, one_nic) for part in SIZES)
        slope = (high - low) / (SIZES[1] - SIZES[0])
        return low - slope * SIZES[0], slope
    few, more = (np.array(line(name, inner, count * NODE, nic, one_nic)) for count in NODES)
    return tuple(few + (more - few) * (nodes - NODES[0]) / (NODES[1] - NODES[0]))


def prices(scheme, n, nic=NIC, one_nic=False):
    """{(name, span): line} of every collective that the scheme uses."""
    gradient = "all_to_all" if scheme.qg else "reduce_scatter"
    names = dict(forward="all_gather", second="all_gather", refresh="all_gather", step="reduce_scatter", micro=gradient)
    used = [(names[phase], span) for phase, some in spans(scheme, n).items() for span in some]
    return {
        (name, span): line(name, *span, nic, one_nic and span[0] < NODE) if span[1] > NODE else line(name, *span)
        for name, span in used
    }


# ---- one rank --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StandIn:
    """A group of which one rank runs. `log` gets (class of links, start, end) of every collective."""

    comm: object
    span: tuple
    prices: dict
    log: list
    rank: int = 0

    @property
    def size(self):
        return self.span[1] // self.span[0]

    def _take(self, name, part, shape, dtype):
        start = self.comm.now
        fixed, a_byte = self.prices[name, self.span]
        self.comm.sleep(fixed + a_byte * part)
        self.log.append((fp.group_of(*self.span), start, self.comm.now))
        return like(shape, dtype)

    def all_gather(self, x):
        return self._take("all_gather", x.nbytes, (x.size * self.size,), x.dtype)

    def reduce_scatter(self, x):
        return self._take("reduce_scatter", x.nbytes // self.size, (x.size // self.size,), x.dtype)

    def all_to_all(self, x):
        return self._take("all_to_all", x.nbytes // self.size, x.shape, x.dtype)


def one_of_many(comm, scheme, n, model, sequences, tokens, costs):
    """Two microbatches and the optimiser's step of one rank of n: (times between them, the log)."""
    log, weights = [], model.weights()
    stand_ins = {name: tuple(StandIn(comm, s, costs, log) for s in some) for name, some in spans(scheme, n).items()}
    second = stand_ins.pop("second")
    groups = Groups(**stand_ins, second=second[0] if second else None, order=tuple(range(scheme.s_g)))
    shapes = [{name: a.shape for name, a in bucket.items()} for bucket in weights]
    kept = []
    for bucket in weights:
        psi = vectors.padded(vectors.vector(bucket), n).size
        kept.append(fp.Kept(like((psi // scheme.s_w,), "float16"), State(*[like((psi // scheme.s_o,), "float32")] * 3)))
    text, times = like((sequences, tokens), "int64"), [comm.now]
    for _ in range(2):
        buckets = model.buckets(comm, text, text, 1.0)
        fp.micro_step(comm, groups, scheme, kept, buckets, shapes, n)
        times.append(comm.now)
    fp.optimizer_step(comm, groups, scheme, kept, 1e-3)
    return [*times, comm.now], log


@cache
def step(scheme, n, gamma=1, model=GPT_20B, sequences=1, tokens=2048, nic=NIC, one_nic=False):
    """Seconds of one optimiser's step of gamma microbatches.

    sequences   of a rank and microbatch
    nic         bytes/s of a NIC                one_nic     see `line`
    returns     .seconds, .compute, .exposed {group of `group_of`: seconds without compute}, .rate flops/s a GCD: 6 a
                parameter and token, without attention's scores and what is computed again
    """
    one_nic = one_nic and any(inner < NODE < outer for some in spans(scheme, n).values() for inner, outer in some)
    times, log, kernels = _parts(scheme, n, model, sequences, tokens, nic, one_nic)
    busy = np.add.reduceat(kernels[:, 1] - kernels[:, 0], np.searchsorted(kernels[:, 0], times[:-1]))
    weights = np.array([1, gamma - 1, 1])  # the first microbatch, those like the second, the optimiser
    exposed = {}
    for group, start, end in log:
        alone = end - start - _covered(kernels, start, end)
        phase = np.searchsorted(times, start, side="right") - 1
        exposed[group] = exposed.get(group, 0.0) + float(weights[phase]) * alone
    total = float(np.dot(np.diff(times), weights))
    flops = 6 * parameters(model) * sequences * tokens * gamma
    return SimpleNamespace(seconds=total, compute=float(np.dot(busy, weights)), exposed=exposed, rate=flops / total)


@cache
def _parts(scheme, n, model, sequences, tokens, nic, one_nic):
    alone = Cluster(topology.switch(1, hardware.INFINITY_FABRIC), DEVICE)
    costs = prices(scheme, n, nic, one_nic)
    run = alone.run(one_of_many, scheme, n, model, sequences, tokens, costs)
    times, log = run.outputs[0]
    kernels = run.trace.kernels[:, 3:5]
    return np.array(times), log, kernels[np.argsort(kernels[:, 0], kind="stable")]


def _covered(kernels, start, end):
    """Seconds of start … end in which a kernel runs."""
    near = kernels[np.searchsorted(kernels[:, 1], start) : np.searchsorted(kernels[:, 0], end)]
    return float((np.minimum(near[:, 1], end) - np.maximum(near[:, 0], start)).clip(0).sum())


@cache
def parameters(model):
    return sum(a.size for bucket in model.weights() for a in bucket.values())
