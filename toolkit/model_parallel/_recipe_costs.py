"""What a layer, a sum and a message take on Frontier.

Products follow one saturating curve, η = η_max · MNK / (MNK + c): the runtime's `Curve` of power 1. Everything else of
a layer moves bytes. Sums of tensor ranks are run on the described node; sums of replicas and messages between stages
are formulas, which the tests hold against runs: eight GCDs of a node send at once, so each has an eighth of its NICs.
Placement is DeepSpeed's: tensor ranks are neighbours, then replicas, then stages.
Chapter: model_parallel/frontier_recipe.
"""

from dataclasses import dataclass, replace
from functools import cache, cached_property
from math import gcd, inf

from toolkit.runtime import Cluster, hardware, like, topology
from toolkit.runtime.hardware import INFINITY_FABRIC, Curve, Link
from toolkit.runtime.topology.machines import GCD_TO_NIC, SLINGSHOT

from . import _layers as layers

PEAK = hardware.MI250X.rate("float16")  # 191.5 TFLOP/s of a GCD; an MI250X has two
OUT = Link(4 * SLINGSHOT.bandwidth / 8, 2 * (SLINGSHOT.latency + GCD_TO_NIC.latency), name="an eighth of four NICs")
RING = (0, 1, 3, 2, 4, 5, 7, 6)  # GCDs so that neighbours have a link of their own, as RCCL's rings do
ADAM_BYTES = 28  # a parameter: reads a gradient, reads and writes three fp32 numbers, writes a weight


@dataclass(frozen=True)
class Machine:
    """Frontier whose products attain `share` of the peak in the limit, and half of that if they take `half` seconds.

    ideal  True: memory moves bytes and links send messages in no time
    """

    share: float = 1.0
    half: float = 0.0
    ideal: bool = False

    @cached_property
    def device(self):
        gcd = replace(hardware.MI250X, curves={"compute": Curve(self.share, self.half)})
        return replace(gcd, memory_bandwidth=inf, launch_overhead=0.0) if self.ideal else gcd


def products(model, t, b):
    """(M, N, K) of the products of a layer's forward pass on one GCD: four with weights, two in attention."""
    tokens, h, heads, s = b * model.s, model.h, model.heads // t, model.s
    return (
        (tokens, 3 * h // t, h),
        (b * heads * s, s, h // model.heads),
        (b * heads * s, h // model.heads, s),
        (tokens, h, h // t),
        (tokens, 4 * h // t, h),
        (tokens, h, 4 * h // t),
    )


def bytes_moved(model, t, b, flash):
    """Bytes that the rest of a layer's forward pass moves in memory.

    Two LayerNorms read and write, two sums with the residual read two and write one: 10 hidden states. GeLU reads and
    writes 4h/t. Attention without flash: scores are written, softmax and dropout read and write, the product reads,
    with a byte of mask: 13 bytes a score.
    """
    states = model.s * b * model.h
    scores = 0 if flash else 13 * b * model.heads // t * model.s**2
    return 10 * 2 * states + 2 * 8 * states / t + scores


@cache
def layer_seconds(machine, model, t, b, flash=True):
    """{"F": (compute, sums), "B": …}: seconds of a layer whose backward pass runs the forward pass again."""
    work = sum(product_seconds(machine, shape) for shape in products(model, t, b))
    rest = bytes_moved(model, t, b, flash) / machine.device.memory_bandwidth
    both = 2 * tensor_sum(machine, t, b * model.s * model.h)
    return {"F": (work + rest, both), "B": (3 * (work + rest), 2 * both)}


@cache
def head_seconds(machine, model, t, b):
    """{"F": …, "B": …} of the logits, which nobody runs again."""
    shape = (b * model.s, model.vocabulary // t, model.h)
    once = product_seconds(machine, shape) if model.vocabulary else 0.0
    return {"F": once, "B": 2 * once}


def product_seconds(machine, shape):
    m, n, k = shape
    return machine.device.seconds(2 * m * n * k, 2 * (m * n + m * k + n * k), "float16")


def tensor_sum(machine, t, numbers):
    """Seconds to all-reduce 16-bit numbers over t neighbours. That is a latency and a rate, so two runs tell it."""
    if t == 1 or machine.ideal:
        return 0.0
    latency, each = _line(t)
    return latency + each * numbers


@cache
def _line(t):
    def seconds(numbers):
        return run_sum(t, numbers).makespan

    few = 2**18 * t
    once, twice = seconds(few), seconds(2 * few)
    return 2 * once - twice, (twice - once) / few


def run_sum(t, numbers):
    """The all-reduce itself, on the first t GCDs of as many nodes as that takes. Other groups of a node share no link
    with it: their rings are the same ones, shifted."""
    nodes = nodes_in_rings(-(-t // 8))
    everyone = Cluster(replace(nodes, ranks=nodes.ranks[:t], groups=_groups(t)), hardware.IDEAL)
    return everyone.run(lambda comm: layers.all_reduce(comm, like((numbers,), "float16")) is None)


def nodes_in_rings(count):
    """`count` nodes of Frontier, GCDs numbered along RING."""
    nodes = topology.frontier(count)
    return replace(nodes, ranks=tuple(8 * node + g for node in range(count) for g in RING))


def _groups(t):
    return tuple(tuple(range(first, min(first + 8, t))) for first in range(0, t, 8))


def data_sum(machine, config, nbytes):
    """Seconds of an all-reduce of `nbytes` over d replicas, all groups of the node at once; reduce-scatter and
    all-gather, which ZeRO-1 has instead, are its two halves.

    A ring among the k replicas of a node, then rings across nodes, each with a k-th of the bytes.
    """
    if config.d == 1 or machine.ideal:
        return 0.0
    k = gcd(config.d, max(1, 8 // config.t))
    n = config.d // k
    inside = 2 * (k - 1) * (nbytes / k / INFINITY_FABRIC.bandwidth + INFINITY_FABRIC.latency)
    return inside + 2 * (n - 1) * (nbytes / k / n / OUT.bandwidth + OUT.latency)


def hop(machine, config, stage, nbytes):
    """Seconds of a message from a stage to the next: inside a node if several stages fit there."""
    if machine.ideal:
        return 0.0
    ranks = config.t * config.d
    near = 8 % ranks == 0 and (stage * ranks) // 8 == ((stage + 1) * ranks) // 8
    link = INFINITY_FABRIC if near else OUT
    return link.latency + nbytes / link.bandwidth
