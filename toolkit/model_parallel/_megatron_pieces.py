"""The pieces of a step of Megatron-LM at the paper's scale, each run shape-only on as many ranks as it has.

A layer and the two ends of the model run on one tensor group, by the code that trains; collectives on the ranks that
they join. `_megatron_scale` puts a step together from their seconds and bytes.
Chapter: model_parallel/megatron.
"""

from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace

import numpy as np

from toolkit.kernels.layers import add, linear_grad_w
from toolkit.runtime import Cluster, hardware, like, topology
from toolkit.runtime.hardware import Device, Link
from toolkit.sequence_parallel._block import block_weights

from . import _layers as layers
from ._megatron_attention import scores_again, scores_in_memory
from ._model import add_up, cut_block


@dataclass(frozen=True)
class Machine:
    """Nodes of `node` devices with `link` between them, and a `nic` of each device's own to other nodes."""

    device: Device
    node: int
    link: Link
    nic: Link


MACHINES = {
    "a100": Machine(hardware.A100, 8, hardware.NVLINK3, hardware.IB_HDR),  # Selene: Narayanan et al. 2021, section 5
    "h100": Machine(hardware.H100, 8, hardware.NVLINK4, hardware.IB_NDR),  # DGX H100, data sheet
}


def nodes_of(count, per_node, machine="a100"):
    """`count` ranks on nodes that have `per_node` of them each."""
    inside, on = min(count, per_node), MACHINES[machine]
    return topology.two_level(count // inside, inside, on.link, on.nic, inside="switch")


@cache
def layer_seconds(job, efficiency):
    """Of a layer, the embedding and the head on one tensor group, what a rank needs; `job` as of `shape`.

    layer, embedding, head   seconds {"F": …, "B": …}, of which {"W": …} products for weights' gradients
    talk                     seconds {"F": …, "B": …} in which a layer computes nothing
    kept                     bytes of a layer from its forward to its backward pass
    peak                     bytes at most
    """
    run, ends = _run(job, efficiency, ("layer",)), _ends(replace(job, recompute="full"), efficiency)
    found, kept = run.outputs[0]
    kernels = run.trace.kernels
    starts, stops = kernels[kernels[:, 0] == 0][:, 3:5].T

    def silent(start, stop):
        inside = (start <= starts) & (starts < stop)
        return stop - start - float((stops - starts)[inside].sum())

    start, middle, stop = found["layer"]
    talk = {"F": silent(start, middle), "B": silent(middle, stop)}
    layer = {"F": middle - start, "B": stop - middle, "W": ends.product_of_layer}
    peak = max(*run.peak_memory, ends.peak)
    return SimpleNamespace(layer=layer, embedding=ends.embedding, head=ends.head, talk=talk, kept=kept, peak=peak)


@cache
def _ends(job, efficiency):
    """What recomputation does not change: the embedding, the head, and the products for weights' gradients."""
    run = _run(job, efficiency, ("embedding", "head"))
    lasts = {name: {"F": b - a, "B": c - b} for name, (a, b, c) in run.outputs[0][0].items()}
    device = replace(MACHINES[job.machine].device, compute_efficiency=efficiency)
    of_layer, of_head = Cluster(topology.switch(1, hardware.NVLINK3), device).run(products, job).outputs[0]
    lasts["embedding"]["W"], lasts["head"]["W"] = 0.0, of_head
    return SimpleNamespace(**lasts, product_of_layer=of_layer, peak=max(run.peak_memory))


def _run(job, efficiency, names):
    """`pieces` of these names on one tensor group."""
    machine = MACHINES[job.machine]
    device = replace(machine.device, compute_efficiency=efficiency)
    return Cluster(nodes_of(job.t, machine.node, job.machine), device).run(pieces, job, names)


def pieces(comm, job, names=("layer", "embedding", "head")):
    """Run each piece forward and backward and look at the clock: ({piece: its three times}, bytes a layer keeps)."""
    head_dim, tokens = job.h // job.heads, job.b * job.s
    whole = block_weights(None, job.h, job.heads, job.heads, head_dim, 4 * job.h, "float16")
    attention = scores_again(dropout=0.1) if job.recompute == "attention" else scores_in_memory(dropout=0.1)
    setting = layers.Setting(comm, comm.group([comm.rank]), attention, head_dim, np.arange(job.s))
    weights, table = cut_block(whole, comm.rank, comm.size, head_dim), like((job.vocabulary // job.t, job.h), "float16")
    x, norm, text = like((tokens, job.h), "float16"), like((job.h,), "float16"), like((tokens,), "int64")
    losses, kept = like((tokens,), "float32"), []
    forward, backward = layers.block, layers.block_backward
    if job.recompute == "full":
        forward, backward = layers.recomputed, layers.recomputed_backward

    def layer():
        _, saved = forward(setting, weights, x)
        kept.append(bytes_in(saved))
        yield
        _, grads = backward(setting, weights, saved, x)
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

    known = {"layer": layer, "embedding": embedding, "head": head}
    return {name: timed(comm, known[name]()) for name in names}, sum(kept)


def products(comm, job):
    """Seconds of the products for weights' gradients: (of a layer, of the head)."""
    whole = block_weights(None, job.h, job.heads, job.heads, job.h // job.heads, 4 * job.h, "float16")
    times = [comm.now]
    for matrices in (
        [a for a in cut_block(whole, 0, job.t, job.h // job.heads).values() if a.ndim == 2],
        [like((job.h, job.vocabulary // job.t), "float16")],
    ):
        for a in matrices:
            linear_grad_w(*(like((job.b * job.s, channels), "float16") for channels in a.shape))
        times.append(comm.now)
    return np.diff(times).tolist()


def bytes_in(saved):
    """Of all arrays in nested tuples, each counted once."""
    arrays, rest = {}, [saved]
    while rest:
        one = rest.pop()
        if isinstance(one, np.ndarray):
            arrays[id(one)] = one.nbytes
        elif isinstance(one, tuple | list):
            rest += one
    return sum(arrays.values())


def timed(comm, both_ways):
    """When the two halves of a piece start and end."""
    return comm.now, (next(both_ways), comm.now)[1], (next(both_ways), comm.now)[1]


@cache
def gather_seconds(t, part, machine="a100"):
    """Seconds to put a message of `t` parts together in a tensor group."""
    group = Cluster(nodes_of(t, MACHINES[machine].node, machine), MACHINES[machine].device)
    return group.run(lambda comm: layers.all_gather(comm, like(part, "float16")) is None).makespan


def all_reduce_seconds(ranks, per_node, numbers, machine="a100"):
    """Seconds to all-reduce 16-bit numbers over ranks, `per_node` of them on a node.

    That is a latency and a rate, so two runs tell it for all numbers.
    """
    latency, each = _line(ranks, per_node, machine)
    return latency + each * numbers


@cache
def _line(ranks, per_node, machine):
    """Seconds of an all-reduce of no numbers, and for each number."""

    def seconds(numbers):
        return everyone.run(lambda comm: layers.all_reduce(comm, like((numbers,), "float16")) is None).makespan

    everyone, few = Cluster(nodes_of(ranks, per_node, machine), MACHINES[machine].device), 2**18 * ranks
    once, twice = seconds(few), seconds(2 * few)
    return 2 * once - twice, (twice - once) / few


def wire_seconds(ranks, per_node, numbers, machine="a100"):
    """The same without latencies, by formula: never more. A ring in each node, then rings across with a share each."""
    inside, on = min(ranks, per_node), MACHINES[machine]
    nodes, sent = ranks // inside, 2 * numbers * 2  # an all-reduce sends 2 (k - 1) / k of its bytes
    across = sent / inside * (nodes - 1) / nodes / on.nic.bandwidth
    return across + sent * (inside - 1) / inside / on.link.bandwidth
