"""Llama-3-70B and -405B at their own size: how long a token takes, from kernels, one all-reduce and the recurrence.

The authors' repository gives tokens/s of four architectures. Two rows calibrate and two are predicted:

    no communication   the device: attained memory bandwidth, and seconds to launch a kernel (three TP degrees, batch 1)
    standard           the link: what an all-reduce of one token takes (batch 1, each TP degree by itself)
    ladder, parallel   predicted; so is every other batch

Llama's gated MLP has three matrices; ours has two that are 3/2 as wide, which is as many bytes and flops.
Chapter: model_parallel/ladder_residual.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from toolkit.kernels.layers import add, embed, linear, rms_norm
from toolkit.runtime import Cluster, hardware, like, topology
from toolkit.sequence_parallel._block import model_weights

from . import _ladder_modules as pieces
from . import ladder_residual as ladder

PROMPT, NEW = 1024, 512
COMPUTE_EFFICIENCY = 0.7  # of long products: an assumption


@dataclass(frozen=True)
class Model:
    """Shapes of a model. kv_heads: with more ranks than these, each rank has one of its own, as serving systems do."""

    layers: int
    width: int
    heads: int
    hidden: int
    kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 128_256


LLAMA_70B = Model(80, 8192, 64, 28_672 * 3 // 2)
LLAMA_405B = Model(126, 16_384, 128, 53_248 * 3 // 2)

# ---- what the authors' repository says: tools/plot-70b.py and tools/plot-405b.py -------------------------------------

DEGREES, BATCHES = (2, 4, 8), (1, 4, 16, 64)


def _rows(text):
    return np.array(text.split(), float).reshape(len(BATCHES), len(DEGREES))


PUBLISHED = {  # tokens/s by architecture and peer-to-peer links; TP 2, 4, 8 for each batch (nan: none given)
    ("standard", True): _rows("35.42 59.41 77.39  120.58 185.01 258.56  nan 585.23 843.15  nan 1249.67 1940.99"),
    ("ladder", True): _rows("36.69 67.51 101.22  126.09 204.3 331.45  nan 635.98 1003.52  nan 1358.65 2242.1"),
    ("parallel", True): _rows("36.67 65.4 94.22  123.66 201.62 307.34  nan 628.23 973.74  nan 1311.54 2259.38"),
    ("none", True): _rows("38.24 69.04 110.59  130.77 213.73 355.8  nan 665.07 1109.65  nan 1433.53 2474.49"),
    ("standard", False): _rows("33.77 53.35 51.66  106.6 158.77 173.62  nan 518.41 546.68  nan 1199.62 1454.42"),
    ("ladder", False): _rows("36.94 66.6 82.59  125.55 204.24 271.82  nan 598.71 738.56  nan 1313.44 1864.05"),
    ("parallel", False): _rows("36.12 61.93 72.36  116.83 183.53 241.08  nan 583.48 744.33  nan 1276.66 1873.71"),
}
BOUND_405B = {True: 1.52073085, False: 2.106763285}  # no communication over standard: TP 16 in two nodes, batch 1
LADDER_405B = {True: 1.364019677, False: 1.489855072}
BYTES_PER_SECOND = {True: hardware.NVLINK4.bandwidth, False: hardware.H200_HOST_MEMORY.flow_cap}


def published(arch, tp, batch=1, p2p=True):
    """Tokens/s."""
    return PUBLISHED[arch, p2p][BATCHES.index(batch), DEGREES.index(tp)]


# ---- one token -------------------------------------------------------------------------------------------------------


@cache
def kernels(model, tp, batch, new=1, past=PROMPT + NEW // 2):
    """Kernels of one rank in a pass of `new` tokens a sequence behind `past`: (attention, mlp, ends).

    Each a tuple of (name, flops, bytes). attention and mlp are one layer's, each with one addition to the
    stream; ends are embedding, last norm and output layer (of the last token only, as generation needs).
    """
    shapes = (model.vocabulary, 1, model.width, model.heads, max(model.kv_heads, tp), model.head_dim, model.hidden)
    params = ladder.cut(model_weights(None, *shapes, dtype="float16"), 0, tp, model.head_dim)
    x, last = (like((rows, model.width), "float16") for rows in (batch * new, batch))
    heads = batch * max(model.kv_heads, tp) // tp
    pair = (like((heads, past, model.head_dim), "float16"),) * 2 if past else None
    where = np.arange(past, past + new)

    def attention(_comm):
        pieces.attention(params["layers"][0], add(x, x), where, model.head_dim, pair)

    def mlp(_comm):
        pieces.mlp(params["layers"][0], add(x, x))

    def ends(_comm):
        embed(params["embedding"], like((batch * new,), "int64"))
        linear(rms_norm(last, params["norm"]), params["head"])

    one = Cluster(topology.switch(1, hardware.NVLINK4), hardware.IDEAL)
    return tuple(
        tuple((e.name, e.flops, e.bytes) for e in one.run(part).trace if e.kind == "compute")
        for part in (attention, mlp, ends)
    )


def whole_pass(model, tp, batch, new=1, past=PROMPT + NEW // 2):
    """Kernels of all layers and both ends."""
    attention, mlp, ends = kernels(model, tp, batch, new, past)
    return (attention + mlp) * model.layers + ends


@cache
def device():
    """An H100 as fast as the rows without communication tell: three numbers, least squares of relative errors.

    They are launch overhead, attained memory bandwidth, and how much longer attention takes than its bytes say (their
    code repeats each key for every query that shares it). Prefill is charged at 0.7 of the peak, not fitted.
    """
    rows, peak = [], hardware.H100.flops["float16"] * COMPUTE_EFFICIENCY
    for batch in BATCHES:
        for tp in DEGREES:
            seconds = batch / published("none", tp, batch)
            if np.isnan(seconds):
                continue
            seconds -= sum(flops for _, flops, _ in whole_pass(LLAMA_70B, tp, batch, PROMPT, 0)) / peak / NEW
            every = whole_pass(LLAMA_70B, tp, batch)
            read = sum(nbytes for name, _, nbytes in every if name == "attention")
            moved = np.array([sum(nbytes for *_, nbytes in every) - read, read]) / hardware.H100.memory_bandwidth
            rows.append(np.array([len(every), *moved]) / seconds)
    launch, others, attention = np.linalg.lstsq(np.array(rows), np.ones(len(rows)), rcond=None)[0]
    return hardware.replace(
        hardware.H100,
        name="H100, fitted",
        launch_overhead=float(launch),
        memory_efficiency=float(1 / others),
        compute_efficiency=COMPUTE_EFFICIENCY,
        curves={"causal attention": hardware.Curve(float(others / attention))},
    )


def compute(model, tp, batch, new=1, past=PROMPT + NEW // 2):
    """(c, ends): (2L,) seconds of the modules, and seconds of embedding and output layer."""
    kinds = {"attention": "causal attention"}
    times = [
        sum(device().seconds(flops, nbytes, "float16", kinds.get(name)) for name, flops, nbytes in part)
        for part in kernels(model, tp, batch, new, past)
    ]
    return np.tile(times[:2], model.layers), times[2]


@cache
def all_reduce(nbytes, machine, *args):
    """Seconds of one all-reduce alone, simulated on machine(*args): `topology.switch`, or `two_nodes`."""
    run = Cluster(machine(*args), hardware.IDEAL).run(
        lambda comm: pieces.fused_sum(comm, like((nbytes // 2,), "float16"))
    )
    return run.makespan


def two_nodes(tp, inside, between):
    """Two switches; every GPU has a NIC of its own to the other node."""
    return topology.two_level(2, tp // 2, inside, between, inside="switch")


def with_latency(seconds_of, seconds):
    """The latency, at least 0, with which an all-reduce takes `seconds`. seconds_of: latency -> seconds, affine."""
    none, some = seconds_of(0.0), seconds_of(1e-6)
    return max(0.0, (seconds - none) / (some - none) * 1e-6)


@cache
def port(tp, p2p=True):
    """A GPU's link, bandwidth from elsewhere, latency such that the standard row of batch 1 comes out."""
    c, ends = compute(LLAMA_70B, tp, 1)
    each = (1 / published("standard", tp, p2p=p2p) - c.sum() - ends) / len(c)
    rate, nbytes = BYTES_PER_SECOND[p2p], LLAMA_70B.width * 2

    def seconds_of(latency):
        return all_reduce(nbytes, topology.switch, tp, hardware.Link(rate, latency))

    return hardware.Link(rate, with_latency(seconds_of, each))


def token_seconds(model, tp, batch, a, arch="standard", interference=0.0, new=1, past=PROMPT + NEW // 2):
    """Seconds of one pass, by the recurrence. a: seconds of one all-reduce. arch "none": without any."""
    c, ends = compute(model, tp, batch, new, past)
    rule = {"arch": "desync", "desync_pattern": "none"} if arch == "none" else {"arch": arch}
    return ends + ladder.timeline(c, np.full(len(c), a), interference=interference, **rule)[0]


@cache
def tokens_per_second(arch, tp, batch=1, p2p=True, interference=0.0):
    """Of Llama-3-70B, prompt and new tokens together, as the authors count."""
    total, a_token = 0.0, batch * LLAMA_70B.width * 2
    for new, past, passes in ((PROMPT, 0, 1), (1, PROMPT + NEW // 2, NEW - 1)):
        a = all_reduce(new * a_token, topology.switch, tp, port(tp, p2p))
        total += passes * token_seconds(LLAMA_70B, tp, batch, a, arch, interference, new, past)
    return batch * NEW / total


def gain(tp=8, batch=1, p2p=True, arch="ladder", interference=0.0):
    """Times as fast as the standard model, which an all-reduce never slows."""
    return tokens_per_second(arch, tp, batch, p2p, interference) / tokens_per_second("standard", tp, batch, p2p)


def decoded(arch, tp=8, batch=1, p2p=True, model=LLAMA_70B, **options):
    """A run of the tested program itself: one token of every sequence, all layers, shape-only."""
    shapes = (model.vocabulary, model.layers, model.width, model.heads, max(model.kv_heads, tp))
    params = model_weights(None, *shapes, model.head_dim, model.hidden, "float16")
    keys = like((batch * max(model.kv_heads, tp) // tp, PROMPT + NEW // 2, model.head_dim), "float16")

    def program(comm):
        shards = ladder.cut(params, comm.rank, comm.size, model.head_dim)
        cache, token = [(keys, keys)] * model.layers, like((batch, 1), "int64")
        ladder.forward(comm, shards, token, head_dim=model.head_dim, arch=arch, cache=cache, **options)

    return Cluster(topology.switch(tp, port(tp, p2p)), device()).run(program)


@cache
def between(p2p=True):
    """A GPU's link to the other of two nodes of 8, latency such that 405B without communication gains what they say."""
    c, ends = compute(LLAMA_405B, 16, 1)
    each = (c.sum() + ends) * (BOUND_405B[p2p] - 1) / len(c)
    rate, nbytes = hardware.IB_NDR.bandwidth, LLAMA_405B.width * 2

    def seconds_of(latency):
        return all_reduce(nbytes, two_nodes, 16, port(8, p2p), hardware.Link(rate, latency))

    return hardware.Link(rate, with_latency(seconds_of, each))


@cache
def gain_405b(arch="ladder", p2p=True):
    """Times as fast as standard: Llama-3.1-405B, TP 16 in two nodes, batch 1."""
    a = all_reduce(LLAMA_405B.width * 2, two_nodes, 16, port(8, p2p), between(p2p))
    return token_seconds(LLAMA_405B, 16, 1, a) / token_seconds(LLAMA_405B, 16, 1, a, arch)
