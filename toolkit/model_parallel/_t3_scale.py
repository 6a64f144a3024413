"""T3 at the paper's size: products that end in a reduce-scatter, on the GPU that its authors simulate.

From the paper, by secondary accounts: the models, tensor parallelism of 8 and 16, 80 compute units at 1.4 GHz, 16 MB of
L2, 1 TB/s, a ring of 150 GB/s (we take both directions together), 500 ns. Assumed here: 1024 FP16 operations a unit and
cycle, output tiles of 128 × 128, the number of tokens (times grow with it, ratios hardly change), a GEMM that attains
0.55 of the peak, where the ideal overlap is near its best, and a launch of 5 µs. Fitted: what 8 units can move.

Memory is `_t3_queue`'s: a chunk is 64 requests, a tick what one of them takes at 1 TB/s.
Source: Pati et al. 2024, arXiv 2401.16677. Chapter: model_parallel/t3.
"""

from dataclasses import dataclass
from functools import cache
from math import ceil

import numpy as np

from . import _t3_queue as memory
from .t3 import dram_traffic

PEAK = memory.UNITS * 1024 * 1.4e9  # FP16 operations/s
EFFICIENCY, LAUNCH = 0.55, 5e-6  # of the peak; seconds
CACHE, BANDWIDTH, LINK, LATENCY = 16e6, 1e12, 75e9, 500e-9  # bytes, bytes/s, bytes/s one way, seconds
REQUESTS, TILE = 64, 128


@dataclass(frozen=True)
class Sublayer:
    """A product (tokens, inner / tp) @ (inner / tp, hidden) in FP16, and the sum over tp GPUs that follows."""

    model: str
    part: str
    tokens: int
    hidden: int
    inner: int
    tp: int

    @property
    def chunk(self):
        """Bytes of a chunk of the output."""
        return self.tokens * self.hidden * 2 / self.tp

    @property
    def flops(self):
        return 2 * self.tokens * self.hidden * self.inner / self.tp

    @property
    def gemm_reads(self):
        """Chunks read, the output being cut by rows or by columns, whichever reads less.

        Rows: each stage has activations of its own, and reads all weights again if they do not fit in the cache.
        """
        weights, activations = (n * self.inner / self.tp * 2 for n in (self.hidden, self.tokens))
        again = [1 if whole <= CACHE else self.tp for whole in (weights, activations)]
        return min(activations + again[0] * weights, weights + again[1] * activations) / self.chunk

    @property
    def tick(self):
        """Seconds that the memory takes for a request."""
        return self.chunk / REQUESTS / BANDWIDTH

    def moved(self, scheme):
        """Chunks to and from one GPU's memory: product, reduce-scatter by `t3.dram_traffic`, and all-gather."""
        return self.gemm_reads + sum(dram_traffic(self.tp, scheme)) + 2 * (self.tp - 1)


MODELS = {  # hidden size, tokens
    "Mega-GPT-2": (3072, 16 * 1024),
    "T-NLG": (4256, 8 * 1024),
    "PALM": (18_432, 2 * 1024),
    "MT-NLG": (20_480, 2 * 1024),
}
PARTS = {"OP": 1, "FC-2": 4, "FC-1": 4, "IP": 3}  # inner dimension in hidden sizes; two forward, two backward
LARGE = ("PALM", "MT-NLG"), (32,)
CONTEXT = 1024  # tokens of a sequence: for attention's share of a layer


def sublayers(models=("Mega-GPT-2", "T-NLG"), degrees=(8, 16), times=1):
    """All parts of the models at each degree of tensor parallelism; times: as many tokens."""
    return [
        Sublayer(model, part, MODELS[model][1] * times, MODELS[model][0], width * MODELS[model][0], tp)
        for model in models
        for tp in degrees
        for part, width in PARTS.items()
    ]


def stage(layer, efficiency=EFFICIENCY):
    """The queue's Stage: a GEMM as long as the roofline says; it computes when it neither reads nor writes."""
    reads = round(layer.gemm_reads / layer.tp * REQUESTS)
    compute = layer.flops / layer.tp / (PEAK * efficiency) / layer.tick
    waves = ceil(ceil(layer.tokens / TILE) * ceil(layer.hidden / TILE) / memory.UNITS / layer.tp)
    return memory.Stage(reads, max(0, round(compute) - reads - REQUESTS), REQUESTS, min(waves, REQUESTS))


@cache
def ticks(layer, mechanism, policy, efficiency, **options):
    """Of the GEMM and its reduce-scatter."""
    options |= {"link": BANDWIDTH / LINK, "latency": LATENCY / layer.tick}
    return memory.hbm_queue(layer.tp, stage(layer, efficiency), mechanism, policy, **options).ticks


def seconds(layer, scheme, efficiency=EFFICIENCY):
    """Until the sum is scattered.

    scheme   "sequential" · "ideal": both at once, nothing shared · "ideal + NMC" · "T3" · "T3-MCA" · "T3 without NMC" ·
             8, 16, …: a reduce-scatter kernel on so many compute units · "decomposed": the same on 16, and the GEMM in
             one kernel for each chunk
    """
    simulated = {
        "sequential": (memory.SEQUENTIAL, "fcfs"),
        "ideal": (memory.SEQUENTIAL, "fcfs"),
        "ideal + NMC": (memory.SCATTER_WITH_NMC, "fcfs"),
        "T3": (memory.T3, "rr"),
        "T3-MCA": (memory.T3, "mca"),
        "T3 without NMC": (memory.T3_WITHOUT_NMC, "mca"),
    }
    if scheme == "decomposed":
        return layer.tick * ticks(layer, memory.shared(16), "rr", efficiency, launch=round(LAUNCH / layer.tick))
    if scheme not in simulated:
        return layer.tick * ticks(layer, memory.shared(scheme), "rr", efficiency)
    if scheme.startswith("ideal"):
        alone = layer.tp * stage(layer, efficiency).alone
        return layer.tick * max(alone, ticks(layer, *simulated[scheme], efficiency, gemm=False))
    return layer.tick * ticks(layer, *simulated[scheme], efficiency)


def gather_seconds(layer):
    """Of the all-gather, which nothing hides: a ring of tp - 1 steps."""
    return (layer.tp - 1) * (layer.chunk / LINK + LATENCY)


def gain(layer, scheme, efficiency=EFFICIENCY, gather=True):
    """Times as fast as sequential: the whole sublayer, or without its all-gather."""
    rest = gather_seconds(layer) if gather else 0.0
    return (seconds(layer, "sequential", efficiency) + rest) / (seconds(layer, scheme, efficiency) + rest)


def end_to_end(model, tp, training):
    """Times as fast as sequential: all products and sums of a layer, of which only the sublayers gain.

    training   True: forward and backward, 36 · hidden² products a token; False: forward, 12. Attention's own products
               are counted, norms and the like, and the optimiser, are not
    """
    layers = {layer.part: layer for layer in sublayers((model,), (tp,))}
    chosen = [layers[part] for part in (PARTS if training else ("OP", "FC-2"))]
    (hidden, tokens), share = MODELS[model], sum(PARTS[layer.part] for layer in chosen)
    passes = 3 if training else 1
    others = (12 * passes - share + passes * 2 * CONTEXT / hidden) * 2 * tokens * hidden**2 / tp / (PEAK * EFFICIENCY)
    before, after = (
        others + sum(seconds(layer, s) + gather_seconds(layer) for layer in chosen) for s in ("sequential", "T3-MCA")
    )
    return before / after


def geomean(values):
    """Geometric mean."""
    return float(np.exp(np.mean(np.log(list(values)))))
