"""LightSeq's claims: training iterations of Llama-7B and variants, shape-only, on 8 and 16 A100, against five rivals.

An iteration is forward, loss and backward of two of the 32 layers. Every rival has its own way with weights and
checkpoints: see `RIVALS`. Percentages of the overlap ablation and the checkpointing figure are quoted from
secondary accounts. Assumed, because the abstract says nothing of it: A100 at half of its peak, and between two nodes
eight NICs of 100 Gb/s, over which NCCL spreads a message.
Chapter: sequence_parallel/light_seq.
"""

from functools import cache, partial
from math import inf

import numpy as np
from scipy.optimize import brentq

from toolkit.claims import claim
from toolkit.kernels.attention import attention as dense
from toolkit.runtime import Cluster, hardware, like, positions, shard, topology
from toolkit.sequence_parallel import _block as blocks
from toolkit.sequence_parallel import _light_seq_rsa as rsa
from toolkit.sequence_parallel import _megatron_sp as megatron
from toolkit.sequence_parallel import _zero3 as zero3
from toolkit.sequence_parallel import light_seq, ring_attention, ulysses
from toolkit.sequence_parallel._light_seq_layers import layer, layer_backward

HEAD_DIM, HIDDEN = 128, 16_512  # Llama-7B: 32 heads; 16 512 channels in two matrices are its 11 008 in three
PARAMETERS, LAYERS, STATE = 6.7e9, 32, 16  # STATE: bytes a parameter, weights and Adam's state, shared by all ranks
A100 = hardware.replace(hardware.A100, compute_efficiency=0.5)
NODE = hardware.Link(8 * 12.5e9, 3e-6, name="eight NICs of 100 Gb/s")
KILO = 1024  # tokens, as papers count them


def machine(gpus):
    """One node of up to 8 A100 on NVSwitch, or nodes of 8."""
    if gpus <= 8:
        return topology.switch(gpus, hardware.NVLINK3)
    return topology.pcie_tree(gpus // 8, 8, hardware.NVLINK3, NODE)


# ---- one iteration ---------------------------------------------------------------------------------------------------

RIVALS = {  # name -> (attention, layout of the tokens, checkpoint)
    "LightSeq": (light_seq.pair(wire_dtype="float16"), "contiguous", "remat_aware"),
    "unbalanced": (light_seq.pair(balanced=False, wire_dtype="float16"), "contiguous", "remat_aware"),
    "ring": (blocks.exact(ring_attention, causal=True), "contiguous", "remat_aware"),
    "zigzag ring": (blocks.exact(ring_attention, causal=True, layout="zigzag"), "zigzag", "remat_aware"),
    "Ulysses": (ulysses.pair(causal=True), "contiguous", "layer"),
    "ring self-attention": (rsa.pair(), "contiguous", "layer"),
}  # and "Megatron": heads and channels in shards, layer checkpoints. Rings send gradients of keys in float32


def sequence_parallel(comm, x, layers, attention, head_dim, layout, checkpoint, zero):
    """Ranks share tokens. zero: weights are cut by ZeRO-3 and gathered for each layer and pass, gradients reduced."""
    where = positions(layout, comm.rank, comm.size, comm.size * len(x))

    def ahead(weights, x):
        return layer(comm, weights, x, where, attention, head_dim, checkpoint)

    def back(weights, kept, grad):
        return layer_backward(comm, weights, kept, where, grad, attention, head_dim, checkpoint)

    if zero:
        shapes, mine = (
            {n: w.shape for n, w in layers[0].items()},
            [zero3.pieces(w, comm.size)[comm.rank] for w in layers],
        )
        y, kept = zero3.forward(comm, mine, shapes, x, ahead)
        return zero3.backward(comm, mine, shapes, kept, y, back)[0]
    kept = []
    for weights in layers:
        x, its = ahead(weights, x)
        kept.append(its)
    for weights in reversed(layers):
        x, _ = back(weights, kept.pop(), x)
    return x


def tensor_parallel(comm, x, shards, head_dim):
    """Megatron: ranks share heads and channels, and tokens between products; layers run again in the backward pass."""
    where, attention, kept = np.arange(comm.size * len(x)), blocks.one_device(causal=True), []
    for weights in shards:
        kept.append(x)
        x, _ = megatron.block(comm, weights, x, where, attention, head_dim)
    for weights in reversed(shards):
        _, saved = megatron.block(comm, weights, kept.pop(), where, attention, head_dim)
        x, _ = megatron.block_backward(comm, weights, saved, x, attention, head_dim)
    return x


def padded(heads, gpus):
    """Heads that a rival computes which cannot cut one: a multiple of the GPUs."""
    return -(-heads // gpus) * gpus


@cache
def iteration(rival, gpus, tokens, heads=32, checkpoint=None, head_dim=HEAD_DIM, layers=2, zero=True):
    """A shape-only run in float16; `tokens` of the whole sequence.

    zero   False: weights are whole on every rank and cost nothing, and memory is endless. For bytes and memory of
           activations alone
    """
    h, uncut = heads * head_dim, rival in ("Megatron", "Ulysses")
    weights = blocks.block_weights(None, h, *[padded(heads, gpus) if uncut else heads] * 2, head_dim, HIDDEN, "float16")
    device, x = A100 if zero else hardware.replace(A100, memory_capacity=inf), like((tokens, h), "float16")
    run = Cluster(machine(gpus), device).run
    if rival == "Megatron":
        return run(tensor_parallel, shard(x), [megatron.shard_weights(weights, 0, gpus, head_dim)] * layers, head_dim)
    attention, layout, usual = RIVALS[rival]
    how = attention, head_dim, layout, checkpoint or usual, zero
    return run(sequence_parallel, shard(x, 0, layout), [weights] * layers, *how)


def gain(rival, gpus, tokens, heads=32):
    """How many times as fast LightSeq is."""
    return iteration(rival, gpus, tokens, heads).makespan / iteration("LightSeq", gpus, tokens, heads).makespan


# ---- against Megatron ------------------------------------------------------------------------------------------------


@claim(
    says="LightSeq sends up to 4.7 times fewer bytes than Megatron-LM",
    value=4.7,
    unit="×",
    where="abstract; 8 ranks, 32 heads, one layer with checkpoints",
    tolerance=0.02,
    paper="light_seq",
)
def fewer_bytes():
    theirs, ours = (iteration(r, 8, 32 * KILO, layers=1, zero=False).traffic.total for r in ("Megatron", "LightSeq"))
    return theirs / ours


LENGTHS = [32 * KILO, 128 * KILO, 512 * KILO]


@claim(
    says="1.24 times as fast as Megatron-LM at least: on one node",
    value=1.24,
    unit="×",
    where="abstract; Llama-7B on 8 A100, least of 32K, 128K and 512K tokens",
    same_side_of=1.0,
    paper="light_seq",
)
def least_gain_over_megatron_on_one_node():
    return min(gain("Megatron", 8, tokens) for tokens in LENGTHS)


@claim(
    says="1.24 times as fast as Megatron-LM at least: on two nodes",
    value=1.24,
    unit="×",
    where="abstract; Llama-7B on 16 A100, least of 32K, 128K and 512K tokens",
    same_side_of=1.0,
    why="with 2K tokens a device nothing hides the messages that cross between the nodes; longer sequences gain",
    paper="light_seq",
)
def least_gain_over_megatron_on_two_nodes():
    return min(gain("Megatron", 16, tokens) for tokens in LENGTHS)


@claim(
    says="2.01 times as fast as Megatron-LM at most",
    value=2.01,
    unit="×",
    where="abstract; 33 heads, which Megatron pads to 48 on 16 A100, 512K tokens",
    same_side_of=1.24,
    paper="light_seq",
)
def greatest_gain_over_megatron():
    return gain("Megatron", 16, 512 * KILO, heads=33)


# ---- how long a sequence fits ----------------------------------------------------------------------------------------


@cache
def longest(rival, gpus, heads=32, checkpoint=None):
    """Tokens of the longest sequence that an iteration of 32 layers fits, for Llama-7B's width cut into `heads` heads.

    States of parameters are shared by 16 GPUs whatever the rival: those that it cannot give tokens hold other layers.
    """

    def free(tokens):  # memory left
        two, three = (
            max(iteration(rival, gpus, gpus * tokens, heads, checkpoint, 4096 // heads, layers, zero=False).peak_memory)
            for layers in (2, 3)
        )
        return A100.memory_capacity - STATE * PARAMETERS / 16 - two - (LAYERS - 2) * (three - two)

    sizes = (
        (16, 32, 48) if rival == "ring self-attention" else (16, 48)
    )  # memory ∝ tokens; of whole rows also ∝ tokens²
    tokens = [n * KILO for n in sizes]
    left = np.polynomial.Polynomial.fit(tokens, [free(n) for n in tokens], len(tokens) - 1)
    return gpus * brentq(left, 1, 1e6)


def longer(heads):
    """LightSeq on 16 A100 over Megatron, which can share tokens among as many as there are heads."""
    return longest("LightSeq", 16, heads) / longest("Megatron", min(heads, 16), heads)


WHY_NOT_LONGER = "a layer's checkpoint keeps two tensors where Megatron's keeps one"


@claim(
    says="With 2 heads, a sequence 8 times as long as Megatron-LM's fits",
    value=8,
    unit="×",
    where="abstract (2 to 8 times, fewer heads); 16 A100",
    same_side_of=1,
    why=WHY_NOT_LONGER,
    paper="light_seq",
)
def longer_with_two_heads():
    return longer(2)


@claim(
    says="With 8 heads, a sequence twice as long as Megatron-LM's fits",
    value=2,
    unit="×",
    where="abstract (2 to 8 times, fewer heads); 16 A100",
    same_side_of=1,
    why=WHY_NOT_LONGER,
    paper="light_seq",
)
def longer_with_eight_heads():
    return longer(8)


# ---- against those that share tokens, too ----------------------------------------------------------------------------


@claim(
    says="At least 4.45 times as fast as ring self-attention",
    value=4.45,
    unit="×",
    where="COLM abstract; Llama-7B, 8 A100, 32K tokens",
    same_side_of=1,
    why="ours scales, masks and normalises in one pass over the scores, float16 throughout; unfused kernels take more",
    paper="light_seq",
)
def gain_over_ring_self_attention():
    return gain("ring self-attention", 8, 32 * KILO)


@claim(
    says="A sequence 8 times as long as ring self-attention's fits",
    value=8,
    unit="×",
    where="COLM abstract; Llama-7B, 8 A100",
    same_side_of=1,
    why="live arrays alone are counted, not what an allocator wastes; the paper doubles lengths until one fails",
    paper="light_seq",
)
def longer_than_ring_self_attention():
    return longest("LightSeq", 8) / longest("ring self-attention", 8)


@claim(
    says="1.67 times as fast as Ring Attention",
    value=1.67,
    unit="×",
    where="COLM abstract; Llama-7B, 16 A100, 512K tokens, the same checkpoints",
    same_side_of=1,
    paper="light_seq",
)
def gain_over_ring_attention():
    return gain("ring", 16, 512 * KILO)


@claim(
    says="1.26 times as fast as Ulysses, the lower end",
    value=1.26,
    unit="×",
    where="COLM abstract; 32 heads, 16 A100, 512K tokens",
    same_side_of=1,
    paper="light_seq",
)
def least_gain_over_ulysses():
    return gain("Ulysses", 16, 512 * KILO)


@claim(
    says="1.88 times as fast as Ulysses, the upper end",
    value=1.88,
    unit="×",
    where="COLM abstract; 33 heads padded to 48, 16 A100, 512K tokens",
    same_side_of=1.26,
    paper="light_seq",
)
def greatest_gain_over_ulysses():
    return gain("Ulysses", 16, 512 * KILO, heads=33)


# ---- what each of the three ideas gives ------------------------------------------------------------------------------


def idle_share(ranks, balanced):
    """Idle slots over P², counted from the kernels of a run: a slot is a step of a rank."""
    q = shard(like((1, 8 * ranks, 8)), 1)
    run = Cluster(topology.full_mesh(ranks, hardware.NVLINK3)).run(light_seq.attention, q, q, q, balanced=balanced)
    done = np.bincount([e.rank for e in run.trace if e.name == "attention"])
    return (done.max() - done).sum() / ranks**2


@claim(
    says="With helpers a share 1/2P of P² slots is idle",
    value=1 / 32,
    unit="of the slots",
    where="section 3.2, by a secondary account; 16 ranks",
    tolerance=0,
    paper="light_seq",
)
def idle_with_helpers():
    return idle_share(16, balanced=True)


@claim(
    says="Without helpers (P² - P)/2P² of the slots are idle",
    value=15 / 32,
    unit="of the slots",
    where="section 3.2, by a secondary account; 16 ranks",
    tolerance=0,
    paper="light_seq",
)
def idle_without_helpers():
    return idle_share(16, balanced=False)


@cache
def overhead(mode, tokens):
    """Time that communication adds to attention, forward and backward, on two nodes; in % of the compute."""

    def seconds(mode):
        q = shard(like((32, tokens, HEAD_DIM), "float16"), 1)
        run = partial(Cluster(machine(16), A100).run, mode=mode)
        forward = run(light_seq.attention, q, q, q, return_lse=True)
        kept = forward.output(0), forward.output(1)
        backward = run(light_seq.attention_backward, q, q, q, *kept, q, wire_dtype="float16")
        return forward.makespan + backward.makespan

    return 100 * (seconds(mode) / seconds("nocomm") - 1)


ABLATION = "overlap ablation on two nodes, by a secondary account; 16 A100"
NETWORK = "depends on the network between the nodes, which we assume"


@claim(
    says="Without overlap, communication adds 105 % at 128K tokens",
    value=105,
    unit="%",
    where=ABLATION,
    same_side_of=44,
    why=NETWORK,
    paper="light_seq",
)
def overhead_at_128k():
    return overhead("sync", 128 * KILO)


@claim(
    says="With overlap, communication adds 44 % at 128K tokens",
    value=44,
    unit="%",
    where=ABLATION,
    same_side_of=105,
    why=NETWORK,
    paper="light_seq",
)
def overlapped_at_128k():
    return overhead("overlap", 128 * KILO)


@claim(
    says="Without overlap, communication adds 33 % at 512K tokens",
    value=33,
    unit="%",
    where=ABLATION,
    same_side_of=1,
    why=NETWORK,
    paper="light_seq",
)
def overhead_at_512k():
    return overhead("sync", 512 * KILO)


@claim(
    says="With overlap, communication adds 1 % at 512K tokens",
    value=1,
    unit="%",
    where=ABLATION,
    same_side_of=33,
    why=NETWORK,
    paper="light_seq",
)
def overlapped_at_512k():
    return overhead("overlap", 512 * KILO)


@claim(
    says="Keeping attention's output makes an iteration 1.31 times as fast",
    value=1.31,
    unit="×",
    where="by a secondary account; Llama-7B, 8 A100, 32K tokens read as those of each",
    same_side_of=1,
    paper="light_seq",
)
def gain_of_the_checkpoint():
    usual = iteration("LightSeq", 8, 256 * KILO, checkpoint="layer")
    return usual.makespan / iteration("LightSeq", 8, 256 * KILO).makespan


@claim(
    says="The result is that of exact attention, for any number of heads and devices",
    value=0.0,
    unit="(error)",
    tolerance=1e-10,
    where="abstract (agnostic to the architecture); H = 1, 6 and 33 on 5 and 8 ranks",
    paper="light_seq",
)
def error_for_any_heads():
    random, worst = np.random.default_rng(0), 0.0
    for heads in (1, 6, 33):
        for ranks in (5, 8):
            q, k, v = random.standard_normal((3, heads, 120, 8))
            run = Cluster(topology.full_mesh(ranks, hardware.NVLINK3)).run(
                light_seq.attention, *(shard(a, 1) for a in (q, k, v))
            )
            worst = max(worst, np.abs(run.gather(1) - dense(q, k, v, True)).max())
    return worst
