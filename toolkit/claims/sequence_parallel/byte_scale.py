"""ByteScale's claims: plans of 128 ranks of eight GPUs, batches of 32M tokens with the published skew of lengths.

The paper names no hardware. Times of a layer are the paper's, fitted; NICs and PCIe are ours (`llama_7b`). No claim is
calibrated on a speed-up. Chapter: sequence_parallel/byte_scale.
"""

from functools import cache

from toolkit.claims import claim
from toolkit.sequence_parallel import byte_scale as bs

K, M = 1024, 1024**2
RANKS, CAPACITY, TOKENS = 128, 16 * K, 32 * M  # 1 024 GPUs; the longest sequence, 2M, just fits
LONGEST = (256 * K, 512 * K, M, 2 * M)
COST = bs.llama_7b()
SEEDS = range(6)
BY_BATCH = (
    "a mean over batches: what one gains depends on how many 2M sequences it holds, and on NIC speeds, which are ours"
)


@cache
def batch(kind, longest, seed, tokens=TOKENS):
    return bs.length_sampler(kind, longest, seed, tokens)


@cache
def plan(scheme, kind="github", longest=2 * M, seed=0, stages=1):
    """A plan by name: "static", "power of two", "naive", "balanced", "pp"; "… on device": without offloading."""
    lengths = batch(kind, longest, seed)
    name, offload = scheme.removesuffix(" on device"), not scheme.endswith(" on device")
    common = (lengths, CAPACITY, RANKS, COST)
    if name == "static":
        return bs.plan_static(*common, longest)
    if name == "power of two":
        return bs.plan_power_of_two(*common)
    if name == "naive":
        return bs.plan_naive(*common, offload=offload, stages=stages)
    return bs.plan_balanced(*common, strategy="pp" if name == "pp" else "dp", offload=offload, stages=stages)


@cache
def step(scheme, kind="github", longest=2 * M, stages=1, seeds=1):
    """Seconds of a step, mean over the first so many seeds."""
    return sum(plan(scheme, kind, longest, seed, stages).makespan(stages) for seed in SEEDS[:seeds]) / seeds


def gain(scheme, kind="github", stages=1):
    """Times as fast as the static mesh, by mean times over all seeds: fewer move verdicts by luck."""
    seeds = len(SEEDS)
    return step("static", kind, stages=stages, seeds=seeds) / step(scheme, kind, stages=stages, seeds=seeds)


def doubling(scheme):
    """What doubling the context costs: factor on the time of a step, mean from 256K to 2M."""
    return (step(scheme, longest=LONGEST[-1]) / step(scheme, longest=LONGEST[0])) ** (1 / 3)


@claim(
    says="Balanced HDP is up to 7.89 times as fast as static training (GitHub, 2M context)",
    value=7.89,
    unit="×",
    where="abstract; LLaMA-7B on over 1 000 GPUs",
    same_side_of=1.0,
    why=BY_BATCH,
    paper="byte_scale",
)
def speed_up_github():
    return gain("balanced")


@claim(
    says="On Byted's own data it is up to 4.26 times as fast (2M context)",
    value=4.26,
    unit="×",
    where="evaluation, more than 1 000 GPUs",
    same_side_of=1.0,
    why=BY_BATCH,
    paper="byte_scale",
)
def speed_up_byted():
    return gain("balanced", "byted")


@claim(
    says="A step takes 8 min 40 s static and 2 min 37 s balanced: 3.31 times as fast (Byted, 2M)",
    value=520 / 157,
    unit="×",
    where="evaluation, LLaMA-7B",
    same_side_of=1.0,
    why="the same measurement as the claim above, which the paper gives as 4.26",
    paper="byte_scale",
)
def one_step_byted():
    return gain("balanced", "byted")


@claim(
    says="With pipelines, PP-Balance is up to 4.28 times as fast as static (GitHub, 2M)",
    value=4.28,
    unit="×",
    where="evaluation, more than 1 000 GPUs; ours: flow shop of 4 stages",
    same_side_of=1.0,
    why=BY_BATCH + "; our flow shop is not 1F1B",
    paper="byte_scale",
)
def speed_up_in_pipelines():
    return gain("pp", stages=4)


@claim(
    says="Pipelines gain less than data parallelism alone: DP-Balance 7.89×, PP-Balance 4.28×, a factor of 1.84",
    value=7.89 / 4.28,
    unit="×",
    where="evaluation, GitHub, 2M",
    same_side_of=1.0,
    why=BY_BATCH,
    paper="byte_scale",
)
def pipelines_gain_less():
    return gain("balanced") / gain("pp", stages=4)


@claim(
    says="Doubling the context doubles the static mesh's time",
    value=2.0,
    unit="×",
    where="evaluation, 256K to 2M, 32M tokens",
    same_side_of=1.0,
    why="at 256K compute is a larger part of the time, and it does not double",
    paper="byte_scale",
)
def doubling_static():
    return doubling("static")


@claim(
    says="Doubling the context costs naive HDP a factor of 1.23",
    value=1.23,
    unit="×",
    where="evaluation, 256K to 2M, 32M tokens",
    same_side_of=1.0,
    why=BY_BATCH,
    paper="byte_scale",
)
def doubling_naive():
    return doubling("naive")


@claim(
    says="Doubling the context costs balanced HDP a factor of 1.08",
    value=1.08,
    unit="×",
    where="evaluation, 256K to 2M, 32M tokens",
    same_side_of=1.0,
    why="the batch's work itself grows by 1.14 a doubling with our lengths",
    paper="byte_scale",
)
def doubling_balanced():
    return doubling("balanced")


@claim(
    says="Dynamic communication alone gives 1.59×",
    value=1.59,
    unit="×",
    where="ablation, as a second-hand summary gives it",
    same_side_of=1.0,
    why=BY_BATCH,
    paper="byte_scale",
)
def ablation_communication():
    return gain("naive on device", "byted")


@claim(
    says="With selective offloading 2.01×",
    value=2.01,
    unit="×",
    where="ablation, as a second-hand summary gives it",
    same_side_of=1.0,
    why=BY_BATCH,
    paper="byte_scale",
)
def ablation_offload():
    return gain("naive", "byted")


@claim(
    says="With the balance scheduler 3.69×",
    value=3.69,
    unit="×",
    where="ablation, as a second-hand summary gives it",
    same_side_of=1.0,
    why=BY_BATCH,
    paper="byte_scale",
)
def ablation_balance():
    return gain("balanced", "byted")


@claim(
    says="Balance contributes most: a factor of 1.84, against 1.59 of dynamic communication",
    value=1.84 / 1.59,
    unit="×",
    where="ablation, as a second-hand summary gives it",
    same_side_of=1.0,
    why="a batch with several 2M sequences leaves less to balance: its work alone keeps all ranks busy",
    paper="byte_scale",
)
def balance_contributes_most():
    return gain("balanced", "byted") / gain("naive", "byted") / gain("naive on device", "byted")


@cache
def twelve_thousand(scheme, ranks=12_288, tokens=512 * M):
    """Seconds of a step on 12 288 ranks, GitHub, 2M."""
    lengths = batch("github", 2 * M, 0, tokens)
    make = {"static": bs.plan_static, "balanced": bs.plan_balanced}[scheme]
    return make(lengths, CAPACITY, ranks, COST).makespan()


@claim(
    says="It serves a cluster of more than 12 000 GPUs",
    where="abstract; ours: times as fast as static on 12 288 ranks, 512M tokens, 2M context",
    unit="×",
    holds=lambda ours: ours > 1,
    direction="above 1",
    why="static ends first",
    paper="byte_scale",
)
def more_than_twelve_thousand():
    return twelve_thousand("static") / twelve_thousand("balanced")
