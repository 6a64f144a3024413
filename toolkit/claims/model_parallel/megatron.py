"""Megatron-LM's claims. One number is fitted, on one row of its table; the other rows and figures are predictions.

The paper's text was not at hand. Its table agrees with its own formulas to 0.5 % (parameters, and the total rate
against the rate a GPU), tested; the settings of its figures carry less certainty.
Chapter: model_parallel/megatron.
"""

from dataclasses import replace
from functools import cache

import numpy as np

from toolkit.claims import claim
from toolkit.model_parallel import _megatron_scale as scale
from toolkit.model_parallel import megatron
from toolkit.model_parallel._megatron_scale import Job
from toolkit.model_parallel._schedule import bubble
from toolkit.runtime import Cluster, hardware, topology
from toolkit.sequence_parallel._block import model_weights

# ---- Table 1: weak scaling -------------------------------------------------------------------------------------------

# layers, hidden, heads, batch, t, p, GPUs, TFLOP/s a GPU; 51 200 words, 2 048 tokens. Chunks of layers are our choice.
TABLE = [
    (24, 2304, 24, 512, 1, 1, 32, 137),
    (30, 3072, 32, 512, 2, 1, 64, 138),
    (36, 4096, 32, 512, 4, 1, 128, 142),
    (40, 6144, 48, 1024, 8, 1, 256, 135),
    (48, 8192, 64, 1536, 8, 2, 512, 138),
    (60, 10240, 80, 1792, 8, 4, 1024, 140),
    (80, 12288, 96, 2304, 8, 8, 1536, 148),
    (96, 16384, 128, 2160, 8, 16, 1920, 155),
    (105, 20480, 128, 2520, 8, 35, 2520, 163),
    (128, 25600, 160, 3072, 8, 64, 3072, 163),
]
FITTED = 6  # the 145.6 billion of all three parallelisms at work


def job(row):
    """The run of a row of the table, interleaved with 2 chunks of layers a rank, or 3 where 2 do not divide."""
    layers, h, heads, batch, t, p, devices, _ = TABLE[row]
    v = 1 if p == 1 else 2 if layers // p % 2 == 0 else 3
    return Job(layers, h, heads, batch, t, p, devices // (t * p), v=v)


@cache
def efficiency():
    """Share of the A100's peak that products attain: fitted on one row."""
    return scale.fitted(job(FITTED), TABLE[FITTED][-1] * 1e12)


@cache
def predicted(row):
    """The Step of a row, with the fastest microbatch that fits."""
    return scale.best(job(row), efficiency())


def rate(row):
    """TFLOP/s and GPU."""
    return predicted(row).rate / 1e12


@claim(
    says="A model of a trillion parameters trains at 163 TFLOP/s a GPU, 52 % of the peak",
    value=163,
    unit="TFLOP/s",
    where="Table 1, 3 072 A100",
    paper="megatron",
)
def trillion_rate():
    return rate(-1)


@claim(
    says="All 3 072 GPUs together reach 502 PFLOP/s",
    value=502,
    unit="PFLOP/s",
    where="abstract; Table 1",
    paper="megatron",
)
def trillion_total():
    return rate(-1) * 3072 / 1e3


@claim(says="1.7 billion parameters on 32 GPUs: 137 TFLOP/s a GPU", value=137, unit="TFLOP/s",
       where="Table 1, no model parallelism", paper="megatron")  # fmt: skip
def smallest_rate():
    return rate(0)


@claim(says="18.4 billion, t = 8: 135 TFLOP/s, the lowest of the table", value=135, unit="TFLOP/s",
       where="Table 1, 256 A100", paper="megatron")  # fmt: skip
def tensor_rate():
    return rate(3)


@claim(says="529.6 billion, p = 35: 163 TFLOP/s", value=163, unit="TFLOP/s",
       where="Table 1, 2 520 A100", paper="megatron")  # fmt: skip
def half_trillion_rate():
    return rate(8)


@claim(
    says="One efficiency of products, fitted on the row of 145.6 billion, predicts the nine other rows",
    holds=lambda worst: worst < 0.15,
    direction="worst error below 15 %",
    unit="(error)",
    where="Table 1",
    paper="megatron",
)
def worst_row():
    return max(abs(rate(row) / TABLE[row][-1] - 1) for row in range(len(TABLE)) if row != FITTED)


@claim(
    says="The rate rises from the 18.4 billion to the trillion: larger products, the same share of talk",
    value=163 / 135,
    unit="×",
    where="Table 1",
    same_side_of=1.0,
    paper="megatron",
)
def rise():
    return rate(-1) / rate(3)


# ---- formulas --------------------------------------------------------------------------------------------------------


@claim(says="128 layers of 25 600 are 1 008 billion parameters", value=1008.0, unit="billion", tolerance=1e-3,
       where="equation 2; Table 1", paper="megatron")  # fmt: skip
def trillion_parameters():
    return megatron.parameters(128, 25_600) / 1e9


@claim(says="450 billion tokens take the trillion-parameter model 84 days", value=84, unit="days", tolerance=0.01,
       where="equation 4, 3 072 A100 at 163 TFLOP/s", paper="megatron")  # fmt: skip
def trillion_days():
    return megatron.days(450e9, 1008e9, 3072, 163e12)


@claim(says="300 billion tokens take GPT-3 34 days", value=34, unit="days", tolerance=0.01,
       where="equation 4, 1 024 A100 at 140 TFLOP/s", paper="megatron")  # fmt: skip
def gpt3_days():
    return megatron.days(300e9, 175e9, 1024, 140e12)


@claim(says="Interleaving v chunks divides the bubble by v", value=2.0, unit="×", tolerance=1e-9,
       where="section 2.2, p = 8, m = 32, v = 2", paper="megatron")  # fmt: skip
def bubble_ratio():
    return bubble(megatron.schedule("1F1B", 8, 32)) / bubble(megatron.schedule("interleaved", 8, 32, 2))


# ---- strict semantics ------------------------------------------------------------------------------------------------


@claim(
    says="The flush keeps strict semantics: a step on (p, t, d) = (2, 2, 2) is a step of one device",
    value=0.0,
    unit="(error)",
    tolerance=1e-10,
    where="section 2.2; float64, losses of three steps",
    paper="megatron",
)
def strict_semantics():
    random = np.random.default_rng(0)
    params = model_weights(random, 32, 4, 16, 4, 4, 4, 64)
    text = random.integers(0, 32, (3, 8, 9))
    batches = [(part[:, :-1], part[:, 1:]) for part in text]
    options = dict(head_dim=4, microbatches=2)
    one, eight = (
        Cluster(topology.switch(p * t * d, hardware.NVLINK3)).run(
            megatron.train, params, batches, p=p, t=t, d=d, kind=kind, v=v, **options
        )
        for p, t, d, kind, v in ((1, 1, 1, "GPipe", 1), (2, 2, 2, "interleaved", 2))
    )
    return np.abs(one.outputs[0][0] - eight.outputs[0][0]).max()


# ---- interleaving, scatter and gather: 175 billion on 96 GPUs --------------------------------------------------------

GPT3 = Job(96, 12_288, 96, 12, t=8, p=12, v=1, kind="1F1B")  # one replica, one sequence a microbatch
INTERLEAVED = replace(GPT3, kind="interleaved", v=2)


def gain(base, other):
    """How many times as fast `other` is."""
    return scale.step(base, efficiency()).seconds / scale.step(other, efficiency()).seconds


def interleaving(batch, v=2):
    return gain(replace(GPT3, batch=batch), replace(INTERLEAVED, batch=batch, v=v))


@claim(
    says="Interleaving makes a batch of 12 at least 10 % faster",
    holds=lambda gain: gain >= 1.1,
    direction="at least 1.1",
    unit="×",
    where="abstract; Figure 12, 175 billion on 96 A100, smallest batch",
    paper="megatron",
)
def interleaving_small_batch():
    return interleaving(12)


@claim(
    says="The gain shrinks as the batch grows",
    holds=lambda ratio: ratio < 1,
    direction="below 1",
    unit="× from batch 12 to batch 60",
    where="Figure 12, 175 billion on 96 A100",
    paper="megatron",
)
def interleaving_trend():
    return (interleaving(60) - 1) / (interleaving(12) - 1)


def scatter_gather(batch, v):
    job = replace(INTERLEAVED, batch=batch, v=v)
    return gain(replace(job, scatter_gather=False), job)


@claim(
    says="Scatter and gather of what stages send: up to 11 % faster",
    value=1.11,
    unit="×",
    where="Figure 18, 175 billion on 96 A100, interleaved; ours: one layer a chunk, v = 8, batch 60",
    tolerance=0.03,
    same_side_of=1.0,
    paper="megatron",
)
def scatter_gather_gain():
    return scatter_gather(60, v=8)


@claim(
    says="Bytes between nodes fall by t",
    value=8,
    unit="×",
    tolerance=0,
    where="section 4.1, t = 8",
    paper="megatron",
)
def scatter_gather_bytes():
    return megatron.stage_bytes(1, 2048, 12_288, scatter_gather=False) / megatron.stage_bytes(1, 2048, 12_288, t=8)


# ---- which mix: 162 billion on 64 GPUs -------------------------------------------------------------------------------

MIXES = [2, 4, 8, 16, 32]  # t; p = 64 / t


@cache
def mix(t, batch=128):
    """TFLOP/s and GPU."""
    job = Job(32, 20_480, 128, batch, t=t, p=64 // t, kind="1F1B")
    return scale.step(job, efficiency()).rate / 1e12


@claim(
    says="The best mix has t = 8, the GPUs of a node",
    value=8,
    unit="t",
    tolerance=0,
    where="Figure 13, 162 billion on 64 A100, batch 128",
    same_side_of=12,
    why="a smaller t talks less; the paper's pipeline of 32 stages loses more than its bubble tells",
    paper="megatron",
)
def best_mix():
    return max(MIXES, key=mix)


@claim(
    says="Tensor parallelism beyond a node is slow: t = 16 against t = 8",
    holds=lambda ratio: ratio < 1,
    direction="below 1",
    unit="×",
    where="Figure 13, 162 billion on 64 A100, batch 128",
    paper="megatron",
)
def beyond_a_node():
    return mix(16) / mix(8)


# ---- ZeRO-3: 175 billion, batch 1 536 --------------------------------------------------------------------------------

MEGATRON = Job(96, 12_288, 96, 1536, t=8, p=12, v=2)
ZERO = Job(96, 12_288, 96, 1536)


@cache
def against_zero(devices, nics=1):
    """(Megatron, ZeRO-3), TFLOP/s and GPU, at the same batch."""
    zero = scale.zero3(replace(ZERO, d=devices, b=1536 // devices), efficiency(), nics)
    return scale.step(replace(MEGATRON, d=devices // 96), efficiency()).rate / 1e12, zero.rate / 1e12


@claim(
    says="On 1 536 GPUs Megatron reaches 141 TFLOP/s a GPU",
    value=141,
    unit="TFLOP/s",
    where="Table 2, 175 billion, batch 1 536",
    paper="megatron",
)
def megatron_rate():
    return against_zero(1536)[0]


@claim(
    says="With twice the GPUs and the same batch, Megatron is 1.7 times as fast as ZeRO-3",
    value=149 / 88,
    unit="×",
    where="Table 2, 175 billion on 768 A100",
    same_side_of=1.0,
    why="our ZeRO-3 hides its gathers behind products perfectly, at the full rate of a NIC",
    paper="megatron",
)
def zero_768():
    ours, zero = against_zero(768)
    return ours / zero


@claim(
    says="With four times the GPUs it is 3.2 times as fast",
    value=141 / 44,
    unit="×",
    where="Table 2, 175 billion on 1 536 A100",
    same_side_of=1.0,
    why="our ZeRO-3 hides its gathers behind products perfectly, at the full rate of a NIC",
    paper="megatron",
)
def zero_1536():
    ours, zero = against_zero(1536)
    return ours / zero


@claim(
    says="Megatron is faster than ZeRO-3 on 1 536 GPUs; here with collectives that use all 8 NICs of a node",
    holds=lambda ratio: ratio > 1,
    direction="above 1",
    unit="×",
    where="Table 2, 175 billion on 1 536 A100",
    why="eight NICs carry eight times as much: gathers then hide behind products even with one sequence a GPU",
    paper="megatron",
)
def zero_with_all_nics():
    ours, zero = against_zero(1536, nics=8)
    return ours / zero
