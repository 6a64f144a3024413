"""Recipe for Frontier: price every knob, let failures teach a search, ask which knob mattered.

    step = evaluate(RECIPES["175b"], MODELS["175b"])
    step.failure, step.seconds, step.efficiency         # why it cannot run, or what a step takes

A step is put together from a 1F1B pipeline, of layers that are recomputed, tensor sums inside them, messages between
stages, a sum over replicas and the optimiser. Ranks wait for what they send, and nothing overlaps.

Rates count *hardware* operations, with the recomputed forward pass, as the code base (Megatron-DeepSpeed) prints them;
`model_rate` leaves recomputation out. Which one the paper's percentages are, it does not say.

The curve of products has two constants and there is one published point. So c is set by geometry, half a wave of tiles
at the width of the 22B model, and η_max is fitted: the 22B recipe attains 38.38 % of 191.5 TFLOP/s. Neither is
fitted to 175B and 1T, but c was settled after their efficiencies had been seen for a range of constants: an earlier
choice, η_max = 0.7 and c fitted, gave 42.7 % and 45.6 %. So they are no blind predictions. `fitted(c)` has the range.
Source: Dash et al. 2023, arXiv 2312.12705. Where its tables were not at hand (shapes of models, recipes, the space of
the search) they are those of the specification, and the 22B recipe is ours: one node, t = 2, p = 4.
Chapter: model_parallel/frontier_recipe.
"""

from dataclasses import dataclass, replace
from functools import cache
from math import nan

from scipy.optimize import brentq

from toolkit.runtime import Cluster, like, topology
from toolkit.runtime.errors import ShapeError

from ._pipeline import CLOCK, replay
from ._recipe_costs import (
    ADAM_BYTES,
    OUT,
    PEAK,
    Machine,
    data_sum,
    head_seconds,
    hop,
    layer_seconds,
)
from ._recipe_memory import (
    GRADIENTS,
    OPTIMISER,
    RESERVE,
    WEIGHTS,
    Config,
    Memory,
    Model,
    failure,
    memory_per_gcd,
    parameters_of_stage,
)
from ._recipe_search import search
from ._recipe_shapley import shapley
from ._schedule import one_f_one_b

__all__ = ["MODELS", "RECIPES", "Config", "Model", "evaluate", "memory_per_gcd", "one_knob", "rule_of_thumb", "search",
           "shapley", "simulated", "strong_scaling", "weak_scaling", "with_batch"]  # fmt: skip

MODELS = {
    "22b": Model(48, 6144, 48, 22e9),
    "175b": Model(96, 12_288, 96, 175e9),
    "1t": Model(128, 25_600, 128, 1e12),
}
RECIPES = {  # one replica's microbatches; 64 and 512 GCDs a replica
    "22b": Config(t=2, p=4, b=1, m=128),
    "175b": Config(t=4, p=16, b=1, m=640, zero=1, nodes=128),
    "1t": Config(t=8, p=64, b=1, m=1600, zero=1, nodes=384),
}
BYTES_A_PARAMETER = WEIGHTS + GRADIENTS + OPTIMISER
SPACE = {  # of the search; a configuration that does not divide or fit is a failure
    "p": (1, 2, 4, 8, 12, 16),
    "t": (1, 2, 4, 8),
    "b": tuple(range(4, 21)),
    "m": (5, 10),
    "zero": (0, 1),
    "nodes": (12, 16),
}
# Start-up of a product, c in multiply-adds: its last wave of 128 × 128 tiles on 110 compute units is half empty.
HALF_A_WAVE = 110 * 128 * 128 * 6144 / 2


@dataclass(frozen=True)
class Step:
    """Seconds of one step, by what the fullest stage does with them; all nan if `failure` says why there is none."""

    config: Config
    model: Model
    memory: Memory
    failure: str | None = None
    compute: float = nan
    tensor: float = nan  # sums inside layers
    messages: float = nan  # between stages
    bubble: float = nan
    data: float = nan  # sums over replicas
    optimiser: float = nan

    @property
    def seconds(self):
        return self.compute + self.tensor + self.messages + self.bubble + self.data + self.optimiser

    @property
    def rate(self):
        """Hardware operations a second and GCD."""
        return self.model.flops(self.config.batch) / self.seconds / self.config.gcds

    @property
    def model_rate(self):
        """The same without the forward passes that are run again."""
        return self.model.flops(self.config.batch, recomputed=False) / self.seconds / self.config.gcds

    @property
    def efficiency(self):
        return self.rate / PEAK

    @property
    def tokens_per_second(self):
        return self.config.batch * self.model.s / self.seconds


# ---- one configuration -----------------------------------------------------------------------------------------------


def evaluate(config, model, machine=None, flash=True, reserve=RESERVE):
    """Price a configuration.

    machine  of `_recipe_costs`; None: Frontier, fitted
    flash    False: attention writes its scores to memory
    returns  Step; one that does not fit has a `failure`
    raises   ShapeError  t · p · d is not 8 · nodes, or heads or layers do not divide
    """
    memory, why = memory_per_gcd(config, model, flash), failure(config, model, flash, reserve)
    if why:
        return Step(config, model, memory, why)
    machine = machine or fitted()
    stages = [stage_seconds(machine, config, model, stage, flash) for stage in range(config.p)]
    totals = [sum(parts) for parts in stages]
    compute, tensor, messages = (config.m * part for part in max(stages, key=sum))
    mine = max(parameters_of_stage(config, model, stage)[0] for stage in (0, config.p - 1))
    return Step(
        config,
        model,
        memory,
        None,
        compute,
        tensor,
        messages,
        sum(totals) - max(totals),
        data_sum(machine, config, 2 * mine),
        ADAM_BYTES * mine / (config.d if config.zero else 1) / machine.device.memory_bandwidth,
    )


def stage_seconds(machine, config, model, stage, flash=True, kinds="FB"):
    """(compute, sums, messages) of one microbatch in one stage."""
    layer = layer_seconds(machine, model, config.t, config.b, flash)
    head = head_seconds(machine, model, config.t, config.b)
    each, last = model.layers // config.p, config.p - 1
    nbytes = 2 * config.b * model.s * model.h
    compute = sum(each * layer[kind][0] + (stage == last) * head[kind] for kind in kinds)
    tensor = sum(each * layer[kind][1] for kind in kinds)
    onward, back = (at < last and hop(machine, config, at, nbytes) for at in (stage, stage - 1))
    ways = {"F": onward, "B": stage > 0 and back}
    return compute, tensor, float(sum(ways[kind] for kind in kinds))


def simulated(config, model, machine=None):
    """Seconds of the pipeline alone, replayed on the runtime: a rank a stage, messages on links of a NIC's share.

    All GCDs of a stage do the same at the same time, so one stands for all.
    """
    machine = machine or fitted()

    def seconds(kind, stage):
        return sum(stage_seconds(machine, config, model, stage, kinds=kind)[:2])

    message = like((config.b * model.s, model.h), "float16")
    line = Cluster(topology.switch(config.p, replace(OUT, latency=OUT.latency / 2)), CLOCK)
    return line.run(replay, one_f_one_b(config.p, config.m), seconds, message, overlap=False).makespan


@cache
def fitted(start_up=HALF_A_WAVE):
    """Frontier with the share of the peak for which the 22B recipe attains 38.38 %: the one published point in use.

    start_up  c, multiply-adds of the products' curve
    """
    model, config = MODELS["22b"], RECIPES["22b"]

    def machine(share):
        return Machine(share, 2 * start_up / (share * PEAK))

    return machine(brentq(lambda x: evaluate(config, model, machine(x)).efficiency - 0.3838, 0.1, 1.0, xtol=1e-6))


# ---- one knob, and many GCDs -----------------------------------------------------------------------------------------


def one_knob(model, base, knob, values, **options):
    """A Step for each value of one field of `base`, a Config. `options` of `evaluate`; d follows from t · p."""
    return [evaluate(replace(base, **{knob: value}), model, **options) for value in values]


def with_batch(base, batch, **knobs):
    """Config with other knobs and as many microbatches as `batch` sequences then need.

    raises  ShapeError  they cannot be shared out
    """
    config = replace(base, **knobs)
    if config.d < 1:
        raise ShapeError(f"t·p = {config.t}·{config.p} needs more than the {config.gcds} GCDs there are")
    if batch % (config.d * config.b):
        raise ShapeError(f"{config.d} replicas cannot share {batch} sequences in microbatches of {config.b}")
    return replace(config, m=batch // (config.d * config.b))


def weak_scaling(model, recipe, replicas, **options):
    """A Step for each number of replicas; each has its own batch, b · m."""
    each = recipe.t * recipe.p
    return [evaluate(replace(recipe, nodes=_nodes(each * d)), model, **options) for d in replicas]


def strong_scaling(model, recipe, replicas, batch, **options):
    """A Step for each number of replicas that share `batch` sequences. raises  ShapeError  they cannot be shared out"""
    each = recipe.t * recipe.p
    return [evaluate(with_batch(recipe, batch, nodes=_nodes(each * d)), model, **options) for d in replicas]


def _nodes(gcds):
    if gcds % 8:
        raise ShapeError(f"{gcds} GCDs are no whole nodes of 8")
    return gcds // 8


def relative(steps):
    """Efficiency of each Step against the first: tokens/s and GCD over the first's."""
    first = steps[0].tokens_per_second / steps[0].config.gcds
    return [step.tokens_per_second / step.config.gcds / first for step in steps]


def bubble_bound(p, microbatches, k):
    """Strong-scaling efficiency on k times the GCDs if nothing but the bubble grew.

    Stages are equal here. With the head on the last one its microbatches take longer, and the bubble is a smaller part:
    the 1T recipe then comes out a tenth of a percent above this.
    """
    return (microbatches + p - 1) / (k * (microbatches / k + p - 1))


# ---- a rival without a search, and what a search needs ---------------------------------------------------------------


def rule_of_thumb(model, nodes, b, m, **options):
    """Megatron's: as many tensor ranks as a node has GCDs, the fewest stages that fit, replicas of the rest.

    returns  Step; its failure is that of the longest pipeline if none fits
    """
    for p in (p for p in range(1, nodes + 1) if nodes % p == 0 and model.layers % p == 0):
        step = evaluate(Config(8, p, b, m, 1, nodes), model, **options)
        if not step.failure:
            break
    return step


START_UP = 120.0  # seconds


def objective(model, **options):
    """A function knobs -> (hardware operations a second and GCD, seconds until that is known); nan for a failure.

    A trial starts up in two minutes, an assumption, then fails or runs a step.
    """

    def tried(**knobs):
        try:
            step = evaluate(Config(**knobs), model, **options)
        except ShapeError:
            return nan, START_UP
        return (nan, START_UP) if step.failure else (step.rate, START_UP + step.seconds)

    return tried
