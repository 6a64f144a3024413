"""TokenRing's claims. The four A10s are calibrated on the ring; what TokenRing then does is a prediction.

Numbers come from the README of the authors' repository; the paper's body was not at hand, only its abstract.
Chapter: sequence_parallel/token_ring.
"""

from functools import cache

import numpy as np

from toolkit.claims import claim
from toolkit.kernels.attention import attention as dense
from toolkit.runtime import Cluster, hardware, like, shard, topology
from toolkit.sequence_parallel import ring_attention, token_ring

HEADS, HEAD_DIM = 32, 128  # LLaMA2-7B: every query head has keys of its own

# ---- four A10s, 24 000 tokens, causal in zigzag order ----------------------------------------------------------------

TOKENS, RANKS = 24_000, 4
ROUND, COMPUTE, STEP_2 = 7.6e-3, 3.5e-3, 4.6e-3  # seconds, README: ring's round, a step's kernel, TokenRing's step 2
QUERIES = TOKENS // RANKS * HEADS * HEAD_DIM * 2  # bytes of one rank's q; k and v together have twice as many
RESULT = QUERIES + TOKENS // RANKS * HEADS * 4  # bytes of a block's output and its lse
ONE_FLOW = 2 * QUERIES / ROUND  # bytes/s that the ring's round tells
ONE_PORT = (QUERIES + RESULT) / STEP_2  # bytes/s that TokenRing's step 2 tells: queries and a result leave together
AREA = 2 * (TOKENS // RANKS // 2) ** 2  # scores of a zigzag step
PEAK = hardware.A10.flops["float16"]
A10 = hardware.replace(hardware.A10, compute_efficiency=4 * HEADS * AREA * HEAD_DIM / COMPUTE / PEAK)


@cache
def a10(program, port=hardware.PCIE4.bandwidth, slowdown=0.0, memory=A10.memory_bandwidth):
    """A shape-only run on two pairs of A10s, its link and its kernel as calibrated above.

    port       bytes/s of a GPU's PCIe port, each way
    slowdown   share of compute lost while messages are on their way
    memory     bytes/s of a GPU's memory: what merging partial results takes
    """
    link = hardware.Link(port, flow_cap=ONE_FLOW)
    device = hardware.replace(A10, overlap_slowdown=slowdown, memory_bandwidth=memory)
    q, k, v = (shard(like((HEADS, TOKENS, HEAD_DIM), "float16"), axis=1, layout="zigzag") for _ in range(3))
    return Cluster(topology.pcie_tree(2, 2, link), device).run(program, q, k, v, causal=True, layout="zigzag")


def step_seconds(run, step):
    """The longest kernel or message of one step, over all ranks: what the authors' profile shows as the step."""
    longest, count = 0.0, {}
    for e in sorted(run.trace, key=lambda e: e.posted):
        if e.kind == "send" or (e.kind == "compute" and e.name == "attention"):
            now = count[e.rank, e.name] = count.get((e.rank, e.name), 1 if e.name == "results" else -1) + 1
            if now == step:
                longest = max(longest, e.end - e.start)
    return longest


def gain(port=hardware.PCIE4.bandwidth, slowdown=0.0, rival=token_ring.attention):
    """How many times as fast as the ring."""
    return a10(ring_attention.attention, port, slowdown).makespan / a10(rival, port, slowdown).makespan


@claim(
    says="TokenRing's steps 0 and 1 hide the queries: they take as long as the kernel (which we calibrate on)",
    value=COMPUTE * 1e3,
    unit="ms",
    where="authors' README, 4×A10, 24 000 tokens",
    same_side_of=STEP_2 * 1e3,
    why="at the speed of one of the ring's flows, queries take a little longer than the kernel",
    paper="token_ring",
)
def first_steps():
    return 1e3 * max(step_seconds(a10(token_ring.attention), step) for step in (0, 1))


@claim(
    says="Step 2, with both directions busy, is longer",
    value=STEP_2 * 1e3,
    unit="ms",
    where="authors' README, 4×A10, 24 000 tokens",
    same_side_of=COMPUTE * 1e3,
    why="calibrated on the ring alone, two flows never fill a port; a port of 21.5 GB/s would give 4.6 ms",
    paper="token_ring",
)
def step_2():
    return 1e3 * step_seconds(a10(token_ring.attention), 2)


@claim(
    says="Ring attention takes about 27 ms (we calibrate on one of its rounds)",
    value=27.0,
    unit="ms",
    where="profile picture of authors' README, read off pixels to 10 %",
    paper="token_ring",
)
def ring_total():
    return 1e3 * a10(ring_attention.attention).makespan


@claim(
    says="TokenRing takes about 16.5 ms",
    value=16.5,
    unit="ms",
    where="profile picture of authors' README, read off pixels to 10 %",
    same_side_of=27.0,
    why="four kernels of 3.5 ms and a tail of 3.9 ms already make 17.9 ms; merging adds the rest",
    paper="token_ring",
)
def token_ring_total():
    return 1e3 * a10(token_ring.attention).makespan


@claim(
    says="TokenRing is about 1.6 times as fast as ring attention",
    value=1.6,
    unit="×",
    where="profile pictures of authors' README, read off pixels to 10 %",
    same_side_of=1.0,
    why="predicted from the ring alone: the tail is exposed, and merging partial results takes memory traffic",
    paper="token_ring",
)
def speed_up():
    return gain()


@claim(
    says="TokenRing is about 1.6 times as fast, with ports as narrow as step 2 tells",
    value=1.6,
    unit="×",
    where="profile pictures of authors' README, read off pixels to 10 %",
    same_side_of=1.0,
    why="ports that explain step 2 make later steps longer too: the published step and total do not fit together",
    paper="token_ring",
)
def speed_up_with_narrow_ports():
    return gain(port=ONE_PORT)


@claim(
    says="Communication kernels that pre-empt compute cost some of the gain",
    holds=lambda lost: lost > 0,
    direction="above 0",
    unit="of the speed-up, at 10 % less compute",
    where="secondary accounts; 4×A10",
    paper="token_ring",
)
def lost_to_preemption():
    return gain() - gain(slowdown=0.1)


# ---- the picture, in lanes -------------------------------------------------------------------------------------------


def lanes(run):
    """Steps in which rank 0 sends (queries, results); the tail counts as a step."""
    steps = sorted({e.posted for e in run.trace if e.kind == "send" and e.rank == 0})
    found = {"queries": set(), "results": set()}
    for e in run.trace:
        if e.kind == "send" and e.rank == 0:
            found[e.name].add(steps.index(e.posted))
    return found["queries"], found["results"]


@claim(
    says="On 4 GPUs both directions are busy in one step, step 2",
    value=1,
    unit="step",
    tolerance=0,
    where="figure in the authors' repository",
    paper="token_ring",
)
def steps_in_both_directions():
    queries, results = lanes(a10(token_ring.attention))
    return len(queries & results)


# ---- more devices, other machines ------------------------------------------------------------------------------------

FIXED = 32_768  # tokens, whatever the number of devices
LANE = hardware.Link(25e9, name="one 25 GB/s link")
A100 = hardware.replace(hardware.A100, compute_efficiency=A10.compute_efficiency)
MACHINES = {
    "full mesh": lambda n: topology.full_mesh(n, LANE),
    "switch": lambda n: topology.switch(n, LANE),
    "physical ring": lambda n: topology.ring(n, LANE),
    "PCIe tree": lambda n: topology.pcie_tree(2, n // 2, LANE),
}


@cache
def seconds_on(machine, ranks, program=token_ring.attention, group=1):
    """Step time of `FIXED` tokens without a mask. machine: a name of MACHINES; group: query heads a key head."""
    q, k, v = (
        shard(like((heads, FIXED, HEAD_DIM), "float16"), axis=1) for heads in (HEADS, HEADS // group, HEADS // group)
    )
    return Cluster(MACHINES[machine](ranks), A100).run(program, q, k, v).makespan


def gain_on(machine, ranks, program=token_ring.attention, group=1):
    """How many times as fast as the ring on the same machine."""
    ring = seconds_on(machine, ranks, ring_attention.attention, group)
    return ring / seconds_on(machine, ranks, program, group)


@claim(
    says="The advantage grows with the number of GPUs on a full mesh",
    holds=lambda growth: growth > 1,
    direction="above 1",
    unit="× from 4 to 32 GPUs",
    where="authors' README, stated without a measurement",
    paper="token_ring",
)
def growth_on_a_mesh():
    return gain_on("full mesh", 32) / gain_on("full mesh", 4)


@claim(
    says="The advantage over the ring grows with the number of GPUs; here on a switch",
    holds=lambda gain: gain > 1,
    direction="above 1",
    unit="× at 32 GPUs",
    where="authors' README, stated without a measurement",
    why="queries and results leave by one port: together the bytes of keys and values",
    paper="token_ring",
)
def gain_on_a_switch():
    return gain_on("switch", 32)


@claim(
    says="The advantage over the ring grows with the number of GPUs; here on a physical ring",
    holds=lambda gain: gain > 1,
    direction="above 1",
    unit="× at 32 GPUs",
    where="authors' README, stated without a measurement",
    why="a result from k ranks away crosses up to N/2 links; keys and values cross one",
    paper="token_ring",
)
def gain_on_a_physical_ring():
    return gain_on("physical ring", 32)


# ---- three cases, one result -----------------------------------------------------------------------------------------


@claim(
    says="One scheme serves unmasked, causal (zigzag) and multi-node attention, exactly",
    value=0.0,
    unit="(error)",
    tolerance=1e-10,
    where="three case studies, by secondary accounts",
    paper="token_ring",
)
def three_cases():
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((8, 256, 16)) for _ in range(3))
    flat, nodes = topology.full_mesh(4, LANE), topology.two_level(2, 4, LANE, LANE)
    error = 0.0
    for machine, program, causal, options in (
        (flat, token_ring.attention, False, {}),
        (flat, token_ring.attention, True, {"layout": "zigzag"}),
        (nodes, token_ring.hybrid_attention, False, {"nodes": 2}),
    ):
        layout = options.get("layout", "contiguous")
        run = Cluster(machine).run(program, *(shard(a, 1, layout) for a in (q, k, v)), causal=causal, **options)
        error = max(error, np.abs(run.gather(1, layout) - dense(q, k, v, causal)).max())
    return error
