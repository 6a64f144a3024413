"""Models, configurations, and what a GCD must hold: states by the byte, activations by the schedule.

The paper counts 14 bytes a parameter in mixed precision: 6 for weights in two precisions, 4 for a gradient, 4 for the
optimiser. (Adam with two fp32 moments needs 4 more; `_zero` and the planner count those.)
Source: Dash et al. 2023, arXiv 2312.12705. Working set of a layer: Korthikanti et al. 2022, arXiv 2205.05198.
Chapter: model_parallel/frontier_recipe.
"""

from dataclasses import dataclass

from toolkit.runtime.errors import ShapeError
from toolkit.runtime.units import size

from . import megatron

WEIGHTS, GRADIENTS, OPTIMISER = 6, 4, 4  # bytes a parameter
CAPACITY, RESERVE = 64e9, 2e9  # of a GCD; the reserve is for the runtime, RCCL's buffers and fragments


@dataclass(frozen=True)
class Model:
    """A GPT: layers, width h, heads; sequences of s tokens; `nominal` parameters, as its name says."""

    layers: int
    h: int
    heads: int
    nominal: float
    s: int = 2048
    vocabulary: int = 51_200

    @property
    def split(self):
        """Parameters of a layer that tensor ranks share out: four matrices, and biases of what they cut by column."""
        return 12 * self.h**2 + 7 * self.h

    @property
    def whole(self):
        """Parameters of a layer that every tensor rank has: two LayerNorms, two biases added after the sum."""
        return 6 * self.h

    @property
    def parameters(self):
        layers = self.layers * (self.split + self.whole)
        return layers + self.vocabulary * self.h + self.s * self.h + 2 * self.h * (self.vocabulary > 0)

    def flops(self, batch, recomputed=True):
        """Operations of a step of `batch` sequences: each layer's forward pass done twice (8 a token and parameter and
        attention), or once (6)."""
        with_recomputation = megatron.flops(batch, self.layers, self.h, self.s, self.vocabulary)
        head = 6 * batch * self.s * self.h * self.vocabulary
        return with_recomputation if recomputed else (with_recomputation - head) * 3 / 4 + head


@dataclass(frozen=True)
class Config:
    """A recipe: tensor `t`, pipeline `p`, microbatch `b` sequences, `m` microbatches, ZeRO-1, nodes of 8 GCDs."""

    t: int
    p: int
    b: int
    m: int
    zero: int = 0
    nodes: int = 1

    @property
    def gcds(self):
        return 8 * self.nodes

    @property
    def d(self):
        """Replicas: what t · p leaves of the GCDs."""
        return self.gcds // (self.t * self.p)

    @property
    def batch(self):
        """Sequences of a step, on all replicas."""
        return self.d * self.b * self.m


def divided(config, model):
    """The config itself, if everything divides.

    raises   ShapeError  t · p does not divide the GCDs, or h % a, a % t, h % t, l % p is not 0, or a number is under 1
    """
    t, p, a = config.t, config.p, model.heads
    if min(t, p, config.b, config.m, config.nodes) < 1:
        raise ShapeError(f"{config}: every number is at least 1")
    if config.gcds % (t * p):
        raise ShapeError(f"t·p = {t}·{p} does not divide {config.gcds} GCDs: choose t·p·d = 8·nodes")
    for number, by, what in (
        (model.h, a, "h by heads"),
        (a, t, "heads by t"),
        (model.h, t, "h by t"),
        (model.layers, p, "layers by p"),
    ):
        if number % by:
            raise ShapeError(f"{what}: {number} is no multiple of {by}")
    return config


@dataclass(frozen=True)
class Memory:
    """Bytes of one GCD."""

    weights: float
    gradients: float
    optimiser: float
    activations: float  # inputs of layers of the microbatches in flight
    working: float  # of the one layer, or the head, at work

    @property
    def states(self):
        return self.weights + self.gradients + self.optimiser

    @property
    def total(self):
        return self.states + self.activations + self.working


def parameters_of_stage(config, model, stage):
    """Parameters of one GCD: (all, of these the ones that each of the t tensor ranks has whole).

    The first stage has the embeddings, the last the head; with more than one stage the tied matrix is there twice.
    """
    first, last, layers = stage == 0, stage == config.p - 1, model.layers // config.p
    whole = layers * model.whole + first * model.s * model.h + last * 2 * model.h * (model.vocabulary > 0)
    tables = (first or last) * model.vocabulary * model.h
    return (layers * model.split + tables) / config.t + whole, whole


def memory_of_stage(config, model, stage, flash=True):
    t, b, s, h = config.t, config.b, model.s, model.h
    mine, _ = parameters_of_stage(config, model, stage)
    scores = 0 if flash else 5 * model.heads * s / (h * t)
    layer, head = s * b * h * (10 + 24 / t + scores), (stage == config.p - 1) * s * b * model.vocabulary / t * 6
    in_flight = min(config.p - stage, config.m)
    return Memory(
        WEIGHTS * mine,
        GRADIENTS * mine,
        OPTIMISER * mine / (config.d if config.zero else 1),
        in_flight * model.layers // config.p * s * b * h * 2,
        max(layer, head),
    )


def memory_per_gcd(config, model, flash=True):
    """Memory of the fullest GCD. raises  ShapeError  as `divided`"""
    divided(config, model)
    stages = {0, config.p // 2, config.p - 1}  # in between, stages only have fewer microbatches in flight
    return max((memory_of_stage(config, model, stage, flash) for stage in stages), key=lambda found: found.total)


def failure(config, model, flash=True, reserve=RESERVE):
    """Why a configuration that divides cannot run, in words, or None."""
    needed = memory_per_gcd(config, model, flash)
    if needed.total <= CAPACITY - reserve:
        return None
    parts = {"states": needed.states, "activations": needed.activations, "a layer at work": needed.working}
    largest = max(parts, key=parts.get)
    return f"out of memory: {size(needed.total)} of {size(CAPACITY - reserve)}, {size(parts[largest])} of it {largest}"
