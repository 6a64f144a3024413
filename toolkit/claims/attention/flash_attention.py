"""FlashAttention-2's claims. The A100 is a model: 108 cores, each with its share of the data sheet's rates.

A core takes the larger of two times: its counted work, at one speed for matrix products, a sixteenth for all else and
the shared-memory rate for what warps exchange, nothing overlapped; and its slow-memory words. Matrix products run at
79.6 % of the peak, which is what we measured on an H200. Tiles are 128 x 128. The last claim is this machine's own.
Chapter: attention/flash_attention.
"""

from functools import cache
from statistics import median
from time import perf_counter

import numpy as np

from toolkit.attention import flash_attention
from toolkit.attention._flash_attention_baselines import heads_on_cores
from toolkit.claims import claim
from toolkit.kernels.attention import attention, visible_area
from toolkit.runtime import Cluster, Cost, hardware, kernel, like, topology

CORES, HIDDEN, TOKENS = 108, 2048, 16_384  # the paper's sweep: 16 k tokens in all, hidden size 2048 (Section 4.1)
SHARE = hardware.H200.curves["compute"].share
A100 = hardware.replace(hardware.A100, compute_efficiency=SHARE, launch_overhead=0.0)
PEAK = A100.flops["float16"]
CORE = hardware.Device("an A100's core", {"float16": PEAK * SHARE / CORES}, A100.memory_bandwidth / CORES)
PROGRAMS = {1: heads_on_cores, 2: flash_attention.on_cores}


@cache
def step(version, heads, tokens, head_dim=64, causal=False, cores=CORES):
    """A shape-only forward pass on `cores` cores of an A100: its run."""
    array = like((heads, tokens, head_dim), "float16")
    cluster = Cluster(topology.ring(cores, hardware.NVLINK3), CORE)  # a ring that carries nothing
    return cluster.run(PROGRAMS[version], array, array, array, causal=causal)


def of_peak(version, tokens=2048, head_dim=64, causal=False):
    """Share of the A100's peak in the paper's sweep. Under a causal mask half the flops count, as in the paper."""
    heads = TOKENS // tokens * HIDDEN // head_dim
    flops = 4 * heads * tokens**2 * head_dim / (2 if causal else 1)
    return flops / step(version, heads, tokens, head_dim, causal).makespan / PEAK


@claim(
    says="FlashAttention-1 reaches 25 to 40 % of the peak",
    holds=lambda share: 0.25 <= share <= 0.40,
    direction="0.25 to 0.40",
    where="abstract, A100; ours a model, 2048 tokens, heads of 64",
    paper="flash_attention",
)
def version_1_of_peak():
    return of_peak(1)


@claim(
    says="FlashAttention-2 reaches 50 to 73 % of the peak",
    holds=lambda share: 0.50 <= share <= 0.73,
    direction="0.50 to 0.73",
    where="abstract, A100; ours a model, 2048 tokens, heads of 64",
    paper="flash_attention",
)
def version_2_of_peak():
    return of_peak(2)


@claim(
    says="Version 2 is about twice as fast as version 1",
    value=2.0,
    unit="×",
    where="abstract, A100; ours a model, 2048 tokens, heads of 64",
    same_side_of=1.0,
    why="in the model no exchange between version 1's warps hides behind products; on the chip some does",
    paper="flash_attention",
)
def gain():
    return of_peak(2) / of_peak(1)


@claim(
    says="A causal mask makes it 1.7 to 1.8 times as fast",
    value=1.75,
    unit="×",
    where="Section 3.1, A100; ours a model, 2048 tokens, heads of 64",
    same_side_of=1.0,
    paper="flash_attention",
)
def causal_gain():
    return 2 * of_peak(2, causal=True) / of_peak(2)


@claim(
    says="With few heads, sharing work along the sequence uses the cores that heads alone leave idle",
    holds=lambda gain: gain > 1,
    direction="above 1, which is version 1's",
    unit="× of one core's speed on 108",
    where="Section 3.2; ours a model of an A100, one head of 8192 tokens",
    paper="flash_attention",
)
def one_head():
    return step(2, 1, 8192, cores=1).makespan / step(2, 1, 8192).makespan


# ---- end to end: a GPT of 2.7 billion parameters, 8192 tokens --------------------------------------------------------

LAYERS, WIDTH, HEADS, VOCABULARY, LENGTH = 32, 2560, 32, 50_257, 8192  # GPT-3's 2.7B row
PARAMETERS = 12 * LAYERS * WIDTH**2 + VOCABULARY * WIDTH


@kernel(cost=lambda x, flops: Cost(flops, 2 * x.nbytes), out=lambda x, flops: x)
def products(x, flops): ...


@kernel(cost=lambda x, arrays: Cost(0, arrays * x.nbytes), out=lambda x, arrays: x)
def element_wise(x, arrays): ...


@kernel(cost=lambda x, effort, words: Cost(effort, 2 * words), out=lambda x, effort, words: x)
def attend(x, effort, words): ...


def training_step(comm, x):
    """Forward and backward of one sequence, x (tokens, width), as a list of kernels.

    Element-wise arrays of x's size a layer: two norms (4), GELU on four times the width (8), two residual sums (6);
    backward twice as many.
    """
    forward, backward = attention_work()
    for works, times in ((forward, 1), (backward, 2)):
        for _ in range(LAYERS):
            products(x, times * 2 * 12 * WIDTH**2 * len(x))
            element_wise(x, times * 18)
            attend(x, HEADS * works.effort, HEADS * works.words)
        products(x, times * 2 * VOCABULARY * WIDTH * len(x))


@cache
def attention_work(tile=128):
    """Count of one causal head, forward and backward."""
    d, forward = WIDTH // HEADS, flash_attention.Count()
    for _, row in flash_attention.units(1, LENGTH, tile):
        forward += flash_attention.query_block_work(tile, d, LENGTH, row + 1, tile)
    words = 6 * LENGTH * d + 2 * LENGTH + forward.tiles * (4 * tile * d + 2 * tile)
    other = 4 * tile**2 * forward.tiles + tile**2 * forward.masked + 2 * LENGTH * d
    return forward, flash_attention.Count(matmul=5 * forward.matmul // 2, other=other, words=words)


@claim(
    says="A GPT of 2.7 billion parameters trains at 225 TFLOP/s per A100, 72 % of its peak, at 8 k tokens",
    value=0.72,
    unit="of the peak",
    where="abstract and Table 1, 8×A100; ours a list of kernels on one",
    same_side_of=0.56,  # 175 TFLOP/s, the same model with version 1
    why="optimizer and communication between the 8 GPUs are left out",
    paper="flash_attention",
)
def training():
    run = Cluster(topology.ring(1, hardware.NVLINK3), A100).run(training_step, like((LENGTH, WIDTH), "float16"))
    counted = 6 * LENGTH * PARAMETERS + 12 * LAYERS * WIDTH * LENGTH**2  # the paper's formula: no half for the mask
    return counted / run.makespan / PEAK


# ---- this machine ----------------------------------------------------------------------------------------------------


SIDE = 1024  # of the square matrices whose product is the yardstick


def race(heads=8, tokens=1024, head_dim=128, causal=False, turns=5):
    """Turns of (seconds of our kernel, seconds of a matrix product, flops of each), all cores, one after the other."""
    q, k, v = np.random.default_rng(0).normal(size=(3, heads, tokens, head_dim)).astype(np.float32)
    square = np.random.default_rng(1).normal(size=(SIDE, SIDE)).astype(np.float32)
    runs = [lambda: attention(q, k, v, causal), lambda: square @ square]
    times = []
    for _ in range(turns + 1):
        times.append([])
        for run in runs:
            start = perf_counter()
            run()
            times[-1].append(perf_counter() - start)
    flops = 4 * heads * visible_area(tokens, tokens, causal) * head_dim
    return [(ours, product, flops, 2 * SIDE**3) for ours, product in times[1:]]


def of_product(**shape):
    """Our rate over the rate of a product of large matrices: median of paired turns."""
    return median(flops / ours / (most / product) for ours, product, flops, most in race(**shape))


@claim(
    says="Attention runs at 50 to 73 % of what the machine's matrix products reach",
    holds=lambda share: share >= 0.50,
    direction="0.50 or more",
    where="abstract, A100; ours the compiled kernel on the cores that built this page, float32",
    why="other work on the same cores slows one of the two more than the other",
    paper="flash_attention",
)
def this_machine():
    return of_product()
