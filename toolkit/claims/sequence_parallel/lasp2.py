"""LASP-2's claims: training steps of a 1B model on 64 A100s without data, small counts with data, small trained models.

The paper's abstract gives the two speed-ups. The machine, the model and where the advantage begins come from secondary
sources. Eight DGX A100: data-sheet links, one 200 Gb/s NIC a GPU. Numbers of 16 bits, states of 32.
Chapter: sequence_parallel/lasp2.
"""

from functools import cache, partial

import numpy as np

from toolkit.claims import claim
from toolkit.runtime import Cluster, hardware, like, shard, topology
from toolkit.sequence_parallel import _lasp2_layers as layers
from toolkit.sequence_parallel import _lasp2_recall as recall
from toolkit.sequence_parallel import _megatron_sp as megatron
from toolkit.sequence_parallel import lasp2
from toolkit.sequence_parallel._block import block, block_backward, block_weights

LAYERS, H, HEADS, HEAD_DIM = 16, 2048, 16, 128
HIDDEN = 3 * 8192 // 2  # Llama's MLP has three matrices of 8 192 channels; ours has two
GPUS, TOKENS = 64, 2**21
ISSUED = hardware.H200_HOST_MEMORY.floor  # seconds that NCCL took at least for a message, measured on two H200
DIRECT = partial(lasp2.gathered, gather=lasp2.direct_all_gather)
SCHEMES = {
    "LASP-2": layers.linear(exchange=DIRECT),
    "LASP-1": layers.linear(exchange=lasp2.handed_on),
    "ring, left product": layers.ring(products="left"),
    "ring, right product": layers.ring(products="right"),
}


# ---- training steps at the paper's scale -----------------------------------------------------------------------------


def stack(comm, x, weights, attention, depth, in_step):
    """Both passes through `depth` equal blocks. in_step: ranks meet after each, as sharded weights force them to."""
    saved = []
    for _ in range(depth):
        x, kept = block(comm, weights, x, np.zeros(x.shape[0]), attention, HEAD_DIM)
        saved.append(kept)
        if in_step:
            comm.barrier()
    grad = x
    for kept in reversed(saved):
        grad, _ = block_backward(comm, weights, kept, grad, attention, HEAD_DIM)
        if in_step:
            comm.barrier()


@cache
def passes(scheme, depth, gpus=GPUS, tokens=TOKENS, in_step=False, issued=0.0):
    """A run of `stack`. issued: seconds that a message takes at least."""
    inner, rail = (hardware.replace(link, floor=issued) for link in (hardware.NVLINK3, hardware.IB_HDR))
    machine = topology.rail_optimised(gpus // 8, 8, inner, rail)
    weights = block_weights(None, H, HEADS, HEADS, HEAD_DIM, HIDDEN, "float16")
    x = shard(like((tokens, H), "float16"), axis=0)
    return Cluster(machine, hardware.A100).run(stack, x, weights, SCHEMES[scheme], depth, in_step)


def step_seconds(scheme, in_step=False, **options):
    """Of all layers. LASP-1's ranks drift apart once if nothing keeps them in step: further layers add less."""
    one = passes(scheme, 1, in_step=in_step, **options).makespan
    if in_step or scheme == "LASP-2":  # whose all-gather keeps the ranks in step
        return LAYERS * one
    further = passes(scheme, 2, **options).makespan - one
    return one + (LAYERS - 1) * further


def megatron_step(comm, x, weights, attention):
    """One block, both passes, by Megatron's sequence parallelism: each rank has some heads of all tokens."""
    tokens = np.zeros(comm.size * x.shape[0])
    shards = megatron.shard_weights(weights, comm.rank, comm.size, HEAD_DIM)
    x, kept = megatron.block(comm, shards, x, tokens, attention, HEAD_DIM)
    megatron.block_backward(comm, shards, kept, x, attention, HEAD_DIM)


def by_megatron(gpus, tokens):
    """A run of `megatron_step`. raises ShapeError where heads do not divide among the GPUs."""
    weights = block_weights(None, H, HEADS, HEADS, HEAD_DIM, HIDDEN, "float16")
    x = shard(like((tokens, H), "float16"), axis=0)
    machine = topology.rail_optimised(gpus // 8, 8, hardware.NVLINK3, hardware.IB_HDR)
    attention = layers.alone(layers.linear(chunks_per_rank=gpus))  # chunks as long as a rank's share of the tokens
    return Cluster(machine, hardware.A100).run(megatron_step, x, weights, attention)


def faster(rival, **options):
    """LASP-2's tokens a second over the rival's, less 1, in per cent."""
    return 100 * (step_seconds(rival, **options) / step_seconds("LASP-2", **options) - 1)


ABSTRACT = "abstract: 64 A100 GPUs, 2 048K tokens"


@claim(
    says="LASP-2 trains 15.2 % faster than LASP-1",
    value=15.2,
    unit="%",
    where=ABSTRACT,
    same_side_of=1.0,  # closer than 1 % is the same speed
    why="nothing keeps our ranks in step: LASP-1's drift apart by one pass of messages, not by one in every layer",
    paper="lasp2",
)
def over_lasp1():
    return faster("LASP-1")


@claim(
    says="LASP-2 trains 15.2 % faster than LASP-1: ranks meet after each layer, messages take what NCCL took",
    value=15.2,
    unit="%",
    where=ABSTRACT,
    same_side_of=1.0,
    why="how long the authors' messages take and what keeps their ranks in step is not published",
    paper="lasp2",
)
def over_lasp1_in_step():
    return faster("LASP-1", in_step=True, issued=ISSUED)


def ring_percent(products):
    """LASP-2 over a ring of keys and values. One layer is enough: every layer costs the ring the same."""
    return 100 * (passes(f"ring, {products} product", 1).makespan / passes("LASP-2", 1).makespan - 1)


@claim(
    says="LASP-2 trains 36.6 % faster than ring attention (ours: with linear attention's right product)",
    value=36.6,
    unit="%",
    where=ABSTRACT,
    same_side_of=0.0,
    why="keys and values of 32 768 tokens are 268 MB a hop through one NIC; 63 hops take longer than all the computing",
    paper="lasp2",
)
def over_ring():
    return ring_percent("right")


@claim(
    says="The advantage over LASP-1 appears from about 64K tokens on (ours: the shortest of three with more than 5 %)",
    value=64.0,
    unit="K tokens",
    where="secondary sources, 64 GPUs",
    why="ours is largest for short sequences, where messages are all there is, and shrinks as computing grows",
    paper="lasp2",
)
def where_the_advantage_begins():
    return min(n for n, gain in gains().items() if gain > 5) / 1024


def gains():
    """{tokens: LASP-2 over LASP-1 in per cent}, ranks in step."""
    lengths = 2**12, 2**16, TOKENS
    return {n: faster("LASP-1", tokens=n, in_step=True, issued=ISSUED) for n in lengths}


@claim(
    says="Memory a GPU stays the same when tokens and GPUs grow together (ours: 64 GPUs over 8)",
    value=1.0,
    unit="×",
    where="section on scalability, up to 128 GPUs",
    tolerance=0.02,
    why="the gathered states grow with the GPUs",
    paper="lasp2",
)
def memory_growth():
    few = passes("LASP-2", 1, gpus=8, tokens=TOKENS // 8)
    return max(passes("LASP-2", 1).peak_memory) / max(few.peak_memory)


# ---- counts ----------------------------------------------------------------------------------------------------------


def both_passes(comm, q, k, v, exchange):
    out, saved = lasp2.attention(comm, q, k, v, exchange=exchange, return_saved=True)
    return lasp2.attention_backward(comm, q, k, v, saved, out, exchange=exchange)


def counted(exchange, ranks=8, tokens=512):
    """A small run with data, forward and backward."""
    x = shard(np.random.default_rng(0).standard_normal((2, tokens, 16)), axis=1)
    return Cluster(topology.full_mesh(ranks, hardware.NVLINK3), hardware.A100).run(both_passes, x, x, x, exchange)


@claim(
    says="The bytes of the all-gather do not depend on the length of the sequence (ours: 4 096 over 512 tokens)",
    value=1.0,
    unit="×",
    where="abstract",
    tolerance=0.0,
    paper="lasp2",
)
def growth_of_bytes():
    return counted(lasp2.gathered, tokens=4096).traffic.total / counted(lasp2.gathered, tokens=512).traffic.total


@claim(
    says="LASP-1 takes 2(W-1) communication steps an iteration, LASP-2 takes 2",
    value=63.0,
    unit="×",
    where="section 3, W = 64",
    tolerance=0.0,
    paper="lasp2",
)
def fewer_steps():
    return steps(lasp2.handed_on) / steps(DIRECT)


def steps(exchange, ranks=GPUS):
    """Messages that wait for each other: the seconds of both passes if nothing took time but 1 s for each message."""
    x = shard(like((1, ranks, 1)), axis=1)
    machine = Cluster(topology.full_mesh(ranks, hardware.Link(np.inf, 1.0)), hardware.IDEAL)
    return machine.run(both_passes, x, x, x, exchange).makespan


# ---- does it learn ---------------------------------------------------------------------------------------------------


@claim(
    says="A hybrid, softmax in every fourth layer, learns about as well as softmax (ours: closes half the gap)",
    where="section on convergence, Linear-Llama3-1B; ours: 4 layers of 32 channels, associative recall, 400 steps",
    holds=lambda share: share > 0.5,
    direction="above 0.5",
    unit="of the gap",
    why="eight pairs fit into linear states too; after so few steps two seeds differ more than linear and hybrid do",
    paper="lasp2",
)
def hybrid_closes_the_gap():
    linear, hybrid, softmax = (np.mean(recall.recall(name)) for name in ("linear", "hybrid", "softmax"))
    return (hybrid - linear) / (softmax - linear)
