"""Ring attention: how long a context grows, when its communication is free, and what balance is worth.

Everything is measured with shape-only runs at the size of the source. Numbers of papers are quoted where `where` says.
"""

from dataclasses import replace
from functools import cache
from math import inf

from toolkit.claims import claim
from toolkit.kernels.attention import attention as one_device
from toolkit.kernels.attention import attention_backward as one_device_backward
from toolkit.runtime import Cluster, hardware, like, shard, topology
from toolkit.sequence_parallel import ring_attention as ring

HEADS, HEAD_DIM = 32, 128  # of a model with 7 billion parameters
A100, H800 = hardware.A100, replace(hardware.H100, name="H800")
NVLINK_A100, NVLINK_H800 = hardware.NVLINK3, hardware.Link(200e9, 2e-6, name="NVLink of an H800")  # each way
INFINIBAND = hardware.Link(12.5e9, 3e-6, name="InfiniBand, 100 Gb/s")
TPU_V4 = hardware.Device("TPU v4", 275e12, 1.228e12, 32e9, 5e-6)  # Jouppi et al. 2023; launch time as for a GPU
ICI = hardware.Link(50e9, 2e-6, name="TPU v4 interconnect")


def forward(cluster, tokens, kv_heads=HEADS, **options):
    """Shape-only run of the forward pass in float16; `tokens` of each rank."""
    q, k = (like((heads, cluster.size * tokens, HEAD_DIM), "float16") for heads in (HEADS, kv_heads))
    layout = options.get("layout", "contiguous")
    return cluster.run(ring.attention, *(shard(a, 1, layout) for a in (q, k, k)), **options)


# ---- memory ----------------------------------------------------------------------------------------------------------


@cache
def tokens_that_fit(devices, device=A100, link=NVLINK_A100):
    """Longest sequence whose forward pass fits into the memory of `devices` devices.

    Peak memory is proportional to the tokens of a rank, so one run at 1 024 tokens each tells what a token takes.
    """
    run = forward(Cluster(topology.switch(devices, link), device=device), 1024)
    return devices * int(device.memory_capacity * 1024 // max(run.peak_memory))


@claim(
    says="64 devices hold 64 times the context of one",
    value=64,
    unit="×",
    where="abstract, quoted from memory; here attention alone on A100",
    same_side_of=1,
    why="one device alone needs no second pair of key and value buffers; from two on the line is straight",
    paper="ring_attention",
)
def context_growth():
    return tokens_that_fit(64) / tokens_that_fit(1)


# ---- time ------------------------------------------------------------------------------------------------------------


def exposed_share(tokens, link, device=A100, kv_heads=HEADS, **options):
    """Share of the forward pass of 4 ranks in which the slowest waits for keys and values; `tokens` of each rank."""
    run = forward(Cluster(topology.switch(4, link), device=device), tokens, kv_heads, **options)
    return run.exposed() / run.makespan


def knee(link, device=A100, kv_heads=HEADS, **options):
    """Smallest number of tokens a rank, a multiple of 4, from which on no communication is exposed."""
    low, high = 0, 1 << 17  # exposed at low, hidden at high
    while high - low > 4:
        middle = (low + high) // 8 * 4
        hidden = exposed_share(middle, link, device, kv_heads, **options) < 1e-6
        low, high = (low, middle) if hidden else (middle, high)
    return high


def products_only(device):
    """The device of the papers' rule: matrix products take time, everything else none."""
    return replace(device, memory_bandwidth=inf, launch_overhead=0.0)


def bandwidth_only(link):
    """The link of the papers' rule: no latency."""
    return replace(link, latency=0.0)


@claim(
    says="free communication from blocks of F/β = 1,040 tokens",
    value=1040,
    unit="tokens",
    where="A100, NVLink at 300 GB/s; only products and bytes timed",
    tolerance=0.01,
    paper="ring_attention",
)
def knee_of_the_rule_on_nvlink():
    return knee(bandwidth_only(NVLINK_A100), products_only(A100))


@claim(
    says="free communication from blocks of F/β = 24,960 tokens",
    value=24_960,
    unit="tokens",
    where="A100, InfiniBand at 12.5 GB/s; only products and bytes timed",
    tolerance=0.01,
    paper="ring_attention",
)
def knee_of_the_rule_on_infiniband():
    return knee(bandwidth_only(INFINIBAND), products_only(A100))


@claim(
    says="free communication from blocks of F/β = 1,040 tokens",
    value=1040,
    unit="tokens",
    where="the same, with launches, memory traffic and latency",
    why="the rule counts products only; launching kernels and merging results take longer than this link needs",
    paper="ring_attention",
)
def knee_on_nvlink():
    return knee(NVLINK_A100)


@claim(
    says="free communication from blocks of F/β = 24,960 tokens",
    value=24_960,
    unit="tokens",
    where="the same, with launches, memory traffic and latency",
    paper="ring_attention",
)
def knee_on_infiniband():
    return knee(INFINIBAND)


def balance(devices, device, link, tokens):
    """Time of the contiguous ring over that of the striped one, causal forward pass; `tokens` of the whole sequence."""
    cluster = Cluster(topology.ring(devices, link), device=device)
    slow, fast = (
        forward(cluster, tokens // devices, causal=True, layout=layout).makespan for layout in ("contiguous", "striped")
    )
    return slow / fast


BALANCE = "the paper times a whole model, we attention alone, which p devices can speed up by 2 - 1/p"


@claim(
    says="striped is 1.45 times as fast as contiguous",
    value=1.45,
    unit="×",
    where="abstract, quoted from memory: 8 A100, 256k tokens, causal",
    same_side_of=1,
    why=BALANCE,
    paper="striped_attention",
)
def striped_speed_up_on_a100():
    return balance(8, A100, NVLINK_A100, 262_144)


@claim(
    says="striped is 1.65 times as fast as contiguous",
    value=1.65,
    unit="×",
    where="abstract, quoted from memory: 16 TPU v4, 786k tokens, causal",
    same_side_of=1,
    why=BALANCE,
    paper="striped_attention",
)
def striped_speed_up_on_tpu_v4():
    return balance(16, TPU_V4, ICI, 786_432)


# ---- the benchmark of ring-flash-attention: 8 GPUs, 8,192 tokens each, 32 and 8 heads of 128 ------------------------


def share_of_ideal(layout, device, link, backward=False):
    """Per cent: what one device would need for the whole causal sequence, divided by 8, over what 8 devices need."""
    ideal, measured = (_benchmark(devices, layout, device, link, backward) for devices in (1, 8))
    return 100 * ideal / 8 / measured


def _benchmark(devices, layout, device, link, backward):
    cluster = Cluster(topology.switch(devices, link), device=device)
    q, k = (like((heads, 8 * 8192, HEAD_DIM), "float16") for heads in (HEADS, 8))
    inputs = [shard(a, 1, layout) for a in (q, k, k)]
    if devices == 1:
        ahead = cluster.run(_one_device, *inputs)
    else:
        ahead = cluster.run(ring.attention, *inputs, causal=True, layout=layout, return_lse=True)
    if not backward:
        return ahead.makespan
    inputs += [ahead.output(0), ahead.output(1), shard(q, 1, layout)]
    if devices == 1:
        return ahead.makespan + cluster.run(_one_device_backward, *inputs).makespan
    return ahead.makespan + cluster.run(ring.attention_backward, *inputs, causal=True, layout=layout).makespan


def _one_device(comm, q, k, v):
    return one_device(q, k, v, True, return_lse=True)


def _one_device_backward(comm, *saved):
    return one_device_backward(*saved, True)


def published(says, value, why=""):
    """One cell of the benchmark's table."""
    where = "README, 8 GPUs, 8,192 tokens each"
    return claim(
        says=f"{says}: share of the ideal", value=value, unit="%", where=where, why=why, paper="ring_flash_attention"
    )


TILES = "kernels work in tiles, half empty on each triangle's diagonal; ours cost what their visible scores cost"


@published("H800, forward, contiguous", 52.1)
def contiguous_on_h800():
    return share_of_ideal("contiguous", H800, NVLINK_H800)


@published("H800, forward, zigzag", 85.2)
def zigzag_on_h800():
    return share_of_ideal("zigzag", H800, NVLINK_H800)


@published("H800, forward, striped", 74.4, TILES)
def striped_on_h800():
    return share_of_ideal("striped", H800, NVLINK_H800)


@published("A100, forward, contiguous", 51.4)
def contiguous_on_a100():
    return share_of_ideal("contiguous", A100, NVLINK_A100)


@published("A100, forward, zigzag", 81.7)
def zigzag_on_a100():
    return share_of_ideal("zigzag", A100, NVLINK_A100)


@published("A100, forward, striped", 69.6, TILES)
def striped_on_a100():
    return share_of_ideal("striped", A100, NVLINK_A100)


@published("H800, forward and backward, contiguous", 53.9)
def contiguous_on_h800_both_ways():
    return share_of_ideal("contiguous", H800, NVLINK_H800, backward=True)


@published("H800, forward and backward, zigzag", 90.2)
def zigzag_on_h800_both_ways():
    return share_of_ideal("zigzag", H800, NVLINK_H800, backward=True)


@published("H800, forward and backward, striped", 82.9, TILES)
def striped_on_h800_both_ways():
    return share_of_ideal("striped", H800, NVLINK_H800, backward=True)
