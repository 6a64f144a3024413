"""Ulysses' claims: bytes counted, results compared, and steps of GPT models on DGX A100 nodes, all shape-only but two.

Sizes come from the text of the paper and of the authors' blog (DeepSpeed repository, blogs/deepspeed-ulysses), which
give parameters and GPUs, not widths: ours are the usual ones, with heads for as many ranks as there are GPUs.
Chapter: sequence_parallel/ulysses.
"""

from functools import cache
from typing import NamedTuple

import numpy as np

from toolkit.claims import claim
from toolkit.kernels.attention import attention as dense
from toolkit.kernels.attention import attention_backward as dense_backward
from toolkit.kernels.linear_attention import chunked, chunked_backward
from toolkit.runtime import Cluster, hardware, like, per_rank, shard, topology
from toolkit.runtime.algorithms import concatenate
from toolkit.sequence_parallel import _block as blocks
from toolkit.sequence_parallel import _megatron_sp as megatron
from toolkit.sequence_parallel import _zero3 as zero3
from toolkit.sequence_parallel import ulysses
from toolkit.sequence_parallel._two_level import all_gather, reduce_scatter

# ---- models and machines ---------------------------------------------------------------------------------------------


class GPT(NamedTuple):
    """A model without its vocabulary: MLPs are four times as wide as h, every head has keys of its own."""

    layers: int
    heads: int
    head_dim: int

    @property
    def h(self):
        return self.heads * self.head_dim

    @property
    def sizes(self):
        """What `blocks.block_weights` takes."""
        return self.h, self.heads, self.heads, self.head_dim, 4 * self.h

    @property
    def parameters(self):
        return self.layers * sum(np.prod(shape) for shape in blocks.shapes(*self.sizes).values())


GPT_1B, GPT_7B, GPT_30B = GPT(24, 64, 32), GPT(32, 32, 128), GPT(48, 64, 112)
STATES = (
    16  # bytes a parameter: weight and gradient in 16 bits, Adam's two moments and a copy in 32 (ZeRO, section 3.1)
)

# Attention: FlashAttention-2's abstract says 50 to 73 % of an A100's peak, forward and backward. Products: assumed.
A100 = hardware.replace(
    hardware.A100, name="A100, 40 GB", memory_bandwidth=1.555e12, memory_capacity=40e9,
    curves={
        "compute": hardware.Curve(0.75), "memory": hardware.Curve(0.85),
        "attention": hardware.Curve(0.60), "causal attention": hardware.Curve(0.60),
        "attention_backward": hardware.Curve(0.55), "causal attention_backward": hardware.Curve(0.55),
    },
)  # fmt: skip
METER = hardware.replace(A100, memory_capacity=np.inf)  # counts memory and never refuses


def dgx(gpus):
    """DGX A100 nodes: eight GPUs on an NVSwitch, each with a NIC of 200 Gb/s (data sheet, 2020)."""
    if gpus <= 8:
        return topology.switch(gpus, hardware.NVLINK3)
    return topology.two_level(gpus // 8, 8, hardware.NVLINK3, hardware.IB_HDR, inside="switch")


# ---- one layer of training -------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What one layer's forward pass, second forward pass (nothing but its input was kept) and backward pass take."""

    seconds: float
    flops: float  # of a rank
    memory: float  # bytes: peak of a rank
    kept: float  # bytes of the input that each layer keeps


def _megatron_layer(comm, weights, x, where, head_dim):
    attention, start = blocks.one_device(True), comm.now
    y, _ = megatron.block(comm, weights, x, where, attention, head_dim)
    del y, _
    _, saved = megatron.block(comm, weights, x, where, attention, head_dim)
    megatron.block_backward(comm, weights, saved, x, attention, head_dim)
    return np.array(comm.now - start)


def _ulysses_layer(comm, piece, x, where, head_dim, sizes):
    """A layer in the middle of many: the next one's weights and the last one's gradients travel meanwhile."""
    attention = ulysses.pair(causal=True, overlap="qkv_pipeline")
    weights = zero3.views(all_gather(comm, piece), blocks.shapes(*sizes))
    gathers, scatters, start = comm.split(0), comm.split(0), comm.now
    coming = gathers.spawn(all_gather, gathers, piece)
    y, _ = blocks.block(comm, weights, x, where, attention, head_dim)
    del y, _
    coming.wait()
    coming = gathers.spawn(all_gather, gathers, piece)
    leaving = scatters.spawn(reduce_scatter, scatters, like(comm.size * piece.size, piece.dtype))
    _, saved = blocks.block(comm, weights, x, where, attention, head_dim)
    _, grads = blocks.block_backward(comm, weights, saved, x, attention, head_dim)
    coming.wait()
    leaving.wait()
    del grads
    return np.array(comm.now - start)


@cache
def step(scheme, model, gpus, tokens):
    """One layer over `gpus` GPUs, all of which hold parts of the same sequence. scheme: "megatron" or "ulysses"."""
    weights = blocks.block_weights(None, *model.sizes, "float16")
    x, cluster = shard(like((tokens, model.h), "float16")), Cluster(dgx(gpus), METER)
    if scheme == "megatron":
        shards = per_rank([megatron.shard_weights(weights, 0, gpus, model.head_dim)] * gpus)
        run = cluster.run(_megatron_layer, shards, x, like(tokens, "int64"), model.head_dim)
    else:
        pieces = per_rank(zero3.pieces(weights, gpus))
        run = cluster.run(_ulysses_layer, pieces, x, like(tokens // gpus, "int64"), model.head_dim, model.sizes)
    kept = tokens // gpus * model.h * 2
    flops = run.trace.kernels[:, 6].sum() / gpus
    return Step(float(run.outputs[0]), flops, max(run.peak_memory), kept)


def step_seconds(scheme, model, gpus, tokens):
    """All layers."""
    return model.layers * step(scheme, model, gpus, tokens).seconds


@cache
def longest(scheme, model, gpus, total=None, lengths=(65_536, 131_072)):
    """Most tokens of one sequence on `gpus` GPUs: model states, a kept input a layer and the busiest layer fill memory.

    Peak memory is a straight line in tokens; two runs fix it. total: GPUs over which ZeRO-3 spreads the states.
    """
    peaks = [one.memory + model.layers * one.kept for one in (step(scheme, model, gpus, tokens) for tokens in lengths)]
    slope = (peaks[1] - peaks[0]) / (lengths[1] - lengths[0])
    states = STATES * model.parameters / (total or gpus)
    return int((A100.memory_capacity - states - (peaks[0] - slope * lengths[0])) / slope)


COMPARED = {"7B on 32 GPUs": GPT_7B, "30B on 32 of 64 GPUs": GPT_30B}  # the other 32 have another sequence
LENGTHS = 65_536, 131_072


def gain(model, tokens, degree=32):
    """How many times as fast as Megatron with as many ranks for a sequence (degree 32), or with `degree` of them.

    With fewer ranks for a sequence the same GPUs train more sequences at once.
    """
    theirs = step_seconds("megatron", model, degree, tokens) * degree / 32
    return theirs / step_seconds("ulysses", model, 32, tokens)


@claim(
    says="Trains up to 2.5 times as fast as Megatron-LM's sequence parallelism",
    value=2.5,
    unit="×",
    where="abstract; 7B and 30B GPT on 32 and 64 A100. Here the best of 64k and 128k tokens, 32 ranks a sequence",
    same_side_of=1.0,
    why="our Megatron gathers through all eight NICs of a node; widths and settings are not given",
    paper="ulysses",
)
def speed_up():
    return max(gain(model, tokens) for model in COMPARED.values() for tokens in LENGTHS)


@claim(
    says="Trains up to 2.5 times as fast, where Megatron stays inside nodes of 8 and trains four sequences at once",
    value=2.5,
    unit="×",
    where="abstract: the baseline has its best configuration. Here 7B, 128k tokens, 32 A100",
    same_side_of=1.0,
    why="all of Megatron's messages are on NVLink then; what is left of the gain is memory",
    paper="ulysses",
)
def speed_up_over_one_node():
    return gain(GPT_7B, 131_072, degree=8)


@claim(
    says="Trains sequences 4 times as long",
    value=4.0,
    unit="×",
    where="abstract. Here 7B on 32 A100 of 40 GB, only layers' inputs kept, without vocabulary",
    same_side_of=1.0,
    why="both keep 1/P of the inputs; the rest is Megatron's gathered copies, which depend on what it frees when",
    paper="ulysses",
)
def longer():
    return longest("ulysses", GPT_7B, 32) / longest("megatron", GPT_7B, 32)


@claim(
    says="Trains sequences of over a million tokens",
    holds=lambda tokens: tokens > 1e6,
    direction="above 1 million",
    unit="tokens",
    where="abstract and figure 2; 1.2B GPT on 64 A100. Here on 32, without vocabulary",
    paper="ulysses",
)
def million_tokens():
    return longest("ulysses", GPT_1B, 32, lengths=(262_144, 524_288))


@claim(
    says="Sustains more than 54 % of an A100's peak, 175 Tflop/s",
    value=175.0,
    unit="Tflop/s",
    where="authors' blog; 1.2B GPT. Here 512k tokens on 32 GPUs. Attention at 60 and 55 % of the peak is assumed: "
    "what is measured is how little the rest costs",
    paper="ulysses",
)
def attained():
    one = step("ulysses", GPT_1B, 32, 524_288)
    return one.flops / one.seconds / 1e12


# ---- bytes -----------------------------------------------------------------------------------------------------------


@cache
def forward_run(scheme, gpus=32, tokens=1_048_576, model=GPT_1B):
    """Forward pass of one layer of the 1.2B model, whole weights on every rank."""
    weights = blocks.block_weights(None, *model.sizes, "float16")
    x, cluster = shard(like((tokens, model.h), "float16")), Cluster(dgx(gpus), METER)
    if scheme == "megatron":
        shards = per_rank([megatron.shard_weights(weights, 0, gpus, model.head_dim)] * gpus)
        given = shards, x, like(tokens, "int64"), blocks.one_device(True), megatron
    else:
        given = weights, x, like(tokens // gpus, "int64"), ulysses.pair(causal=True), blocks
    return cluster.run(_forward, *given, model.head_dim)


def _forward(comm, weights, x, where, attention, module, head_dim):
    module.block(comm, weights, x, where, attention, head_dim)


@claim(
    says="Communication is reduced by more than 10 times; by the analysis, P times",
    value=32.0,
    unit="×",
    tolerance=1e-9,
    where="authors' blog; section 3.2: 4Nh against 4Nh/P. Here 32 GPUs, bytes that a rank sends",
    paper="ulysses",
)
def fewer_bytes():
    return forward_run("megatron").traffic.total / forward_run("ulysses").traffic.total


def nic_bytes(run):
    """What the busiest NIC sends."""
    return max(count for (_, to), count in run.traffic.by_link.items() if to == "fabric")


@claim(
    says="The volume per link falls P times",
    value=32.0,
    unit="×",
    where="section 3.2. Here 32 GPUs in nodes of eight, bytes on the busiest NIC",
    same_side_of=1.0,
    why="a gathered token enters a node once, for its eight GPUs; swapped heads enter for one. The NICs see P/8",
    paper="ulysses",
)
def fewer_bytes_on_a_nic():
    return nic_bytes(forward_run("megatron")) / nic_bytes(forward_run("ulysses"))


def swap_bytes(ranks, tokens):
    """Bytes that a rank sends to attend: four all-to-alls."""
    q = shard(like((64, tokens, 32), "float16"), 1)
    return Cluster(topology.switch(ranks, hardware.NVLINK3)).run(ulysses.attention, q, q, q).traffic.total / ranks


@claim(
    says="Bytes stay constant when tokens and GPUs grow together: 8 times, from 2 GPUs to 16",
    value=1.0,
    unit="×",
    where="abstract and section 3.2; here 1 024 tokens on 2 GPUs to 8 192 on 16",
    holds=lambda growth: growth < 2,
    why="a rank keeps 1/P of its data: the formula is 4Nh/P · (P-1)/P, and (P-1)/P grows from 1/2 to 15/16",
    paper="ulysses",
)
def growth_of_bytes():
    return swap_bytes(16, 8192) / swap_bytes(2, 1024)


@claim(
    says="Bytes stay constant when tokens and GPUs grow together: from 16 GPUs to 32",
    value=1.0,
    unit="×",
    tolerance=0.05,
    where="abstract and section 3.2; here 8 192 tokens on 16 GPUs to 16 384 on 32",
    paper="ulysses",
)
def growth_of_bytes_on_many():
    return swap_bytes(32, 16_384) / swap_bytes(16, 8192)


# ---- results ---------------------------------------------------------------------------------------------------------


def local_blocks(width):
    """Block-sparse attention: tokens in blocks of `width` see their own block, causally, and all of the one before."""

    def spans(tokens):
        return [(slice(at, at + width), slice(max(0, at - width), at + width)) for at in range(0, tokens, width)]

    def forward(_comm, q, k, v):
        parts = [dense(q[:, now], k[:, seen], v[:, seen], True, True) for now, seen in spans(q.shape[1])]
        out, lse = (concatenate(tuple(part), axis=1) for part in zip(*parts, strict=True))
        return out, (q, k, v, out, lse)

    def backward(_comm, saved, grad):
        q, k, v, out, lse = saved
        dq, dk, dv = (np.zeros_like(a) for a in (q, k, v))
        for now, seen in spans(q.shape[1]):
            rows = (a[:, now] for a in (out, lse, grad))
            parts = dense_backward(q[:, now], k[:, seen], v[:, seen], *rows, True)
            for total, among, part in zip((dq, dk, dv), (now, seen, seen), parts, strict=True):
                total[:, among] += part
        return dq, dk, dv

    return blocks.Attention(forward, backward)


def linear_attention():
    """Linear attention with Taylor features, in chunks (chapter attention/based)."""

    def forward(_comm, q, k, v):
        out, _ = chunked(q, k, v)
        return out, (q, k, v, out)

    return blocks.Attention(forward, lambda _comm, saved, grad: chunked_backward(*saved, grad)[:3])


INNER = {
    "dense": blocks.one_device(),
    "dense, causal": blocks.one_device(True),
    "block-sparse": local_blocks(32),
    "linear": linear_attention(),
}


def _both_ways(comm, q, k, v, grad, attention):
    out, saved = attention.forward(comm, q, k, v)
    return out, *attention.backward(comm, saved, grad)


def error_of(name, ranks=4):
    """Largest difference, over outputs and gradients, between Ulysses on `ranks` ranks and one device."""
    arrays = np.random.default_rng(0).standard_normal((4, 8, 256, 8))
    want = _both_ways(None, *arrays, INNER[name])
    cluster = Cluster(topology.switch(ranks, hardware.NVLINK3))
    run = cluster.run(_both_ways, *(shard(a, 1) for a in arrays), ulysses.pair(inner=INNER[name]))
    return max(np.abs(a - b).max() for a, b in zip(run.gather(1), want, strict=True))


@claim(
    says="Any attention runs inside unchanged: dense, sparse, causal, and whatever comes",
    value=0.0,
    unit="(error)",
    tolerance=1e-10,
    where="sections 1 and 3.3. Here dense, block-sparse and linear, outputs and gradients, float64",
    paper="ulysses",
)
def any_attention():
    return max(map(error_of, INNER))


SMALL = GPT(2, 8, 4)


def train(comm, params, tokens, targets, attention, steps):
    """Losses of this rank's tokens, (steps, tokens), under gradient descent; weights whole on every rank."""
    n, losses = len(tokens), []
    where = np.arange(comm.rank * n, comm.rank * n + n)
    for _ in range(steps):
        found, grads = blocks.loss_and_gradients(
            comm, params, tokens, targets, where, attention, SMALL.head_dim, n * comm.size
        )
        params = _descended(params, blocks.sum_gradients(comm, grads), rate=0.5)
        losses.append(found)
    return np.array(losses)


def _descended(params, grads, rate):
    if isinstance(params, np.ndarray):
        return params - rate * grads
    if isinstance(params, dict):
        return {name: _descended(params[name], grads[name], rate) for name in params}
    return [_descended(*pair, rate) for pair in zip(params, grads, strict=True)]


@cache
def losses(ranks, steps=12):
    """(steps, 64) losses of a model of two layers that learns 64 random letters by heart."""
    random = np.random.default_rng(0)
    params = blocks.model_weights(random, 8, SMALL.layers, *SMALL.sizes)
    text = random.integers(0, 8, 65)
    cluster = Cluster(topology.switch(ranks, hardware.NVLINK3))
    attention = ulysses.pair(causal=True)
    return cluster.run(train, params, shard(text[:-1]), shard(text[1:]), attention, steps).gather(1)


@claim(
    says="Training converges as without it",
    value=0.0,
    unit="(difference)",
    tolerance=1e-10,
    where="figure on convergence, 1.3B GPT on 4 of 8 A100. Here losses of 12 steps, 2 layers, 4 ranks against 1",
    paper="ulysses",
)
def same_losses():
    return np.abs(losses(4) - losses(1)).max()
