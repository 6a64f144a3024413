"""ByteScale: give each sequence as many ranks as it needs, and let all ranks finish together.

A batch mixes many short sequences with a few huge ones. A static mesh cuts all of them over as many ranks as the
longest needs, so the keys of short ones travel round a long ring for nothing. Hybrid data parallelism (HDP) packs short
sequences on one rank each and forms a ring of D(s) ranks, any number, for a long one of s tokens. Every token's loss
is scaled by 1 / (tokens of the whole batch) and gradients are summed: exact, whatever the assignment.

D(s) falls with r, the share of activations that waits in host memory (Eq. 3). First-in-last-out: a layer's share leaves
while the next layer computes. We read the 2 of Eq. 3 as the layer that computes and the one whose share is on its way;
the last layer stays. Were the first to stay as well, the peak would exceed Eq. 3 by r·Act(s).
A further lower bound on r, in the copy at hand, points the wrong way: we leave it out.

Ours, beside the paper: D(s) is the *fewest* ranks; where a sequence would then outlast the average rank, `needs` gives
it more, up to ⌈s/C⌉, and `plan_balanced` keeps the best of a few such choices. Algorithm 2 at its start has no rank
that lags behind: then all ranks are served.
Source: Ge et al. 2025, arXiv 2502.21231, Eq. 3 and Algorithms 1 and 2. Chapter: sequence_parallel/byte_scale.
"""

from math import ceil

import numpy as np

from ._byte_scale_baselines import lower_bound, plan_power_of_two, plan_static, total_work
from ._byte_scale_cost import Cost, fit, llama_7b
from ._byte_scale_execute import execute
from ._byte_scale_lengths import length_sampler
from ._byte_scale_plan import MicroBatch, Plan, pack_best_fit, through
from ._byte_scale_simulate import simulate

__all__ = [
    "Cost", "MicroBatch", "Plan", "best_offload_ratio", "execute", "fit", "length_sampler", "llama_7b", "lower_bound",
    "needs", "pack_best_fit", "plan_balanced", "plan_naive", "plan_power_of_two", "plan_static", "ranks_needed",
    "simulate", "total_work",
]  # fmt: skip


PATIENCE = (1, 1 / 2, 1 / 4, 1 / 8, 0)  # what `plan_balanced` tries


# ---- how many ranks --------------------------------------------------------------------------------------------------


def ranks_needed(s, C, layers, r, act):
    """D(s) of Eq. 3: ranks whose memory holds the activations of a sequence.

    s         tokens of the sequence          C     tokens a rank holds in all `layers` without offloading
    r         share of the activations of layers that is offloaded, 0 … 1
    act       Act: tokens -> bytes that one layer keeps
    raises    ValueError  s < 1, r outside 0 … 1
    """
    if s < 1 or not 0 <= r <= 1:
        raise ValueError(f"a sequence of {s} tokens with r = {r}: it takes s ≥ 1 and 0 ≤ r ≤ 1")
    kept = 2 + (1 - r) * (layers - 2)
    return max(1, ceil(kept * act(s) / (layers * act(C)) - 1e-9))


def best_offload_ratio(s, C, cost):
    """(r, D): the fewest ranks that hidden offloading allows, and the least traffic to the host that reaches it.

    A layer's copy must hide behind a layer's forward pass: T(s) ≥ r·Act(s) / B. Both sides shrink alike on D ranks.
    raises    ValueError  s < 1
    """
    if s <= C or cost.layers <= 2:  # too few layers for one to leave
        return 0.0, ranks_needed(s, C, cost.layers, 0.0, cost.act)
    most = min(1.0, cost.seconds(s) * cost.host / cost.act(s))
    ranks = ranks_needed(s, C, cost.layers, most, cost.act)
    return least_ratio(s, C, ranks, cost), ranks


def least_ratio(s, C, ranks, cost):
    """The smallest r with which `ranks` ranks hold a sequence: Eq. 3 solved for r."""
    fits = (ranks * cost.layers * cost.act(C) / cost.act(s) - 2) / (cost.layers - 2)
    return min(1.0, max(0.0, 1.0 - fits))


def needs(batch, C, R, cost, offload=True, stages=1, patience=1.0):
    """(r, D) of every sequence.

    offload   False: r = 0 and D = ⌈Act(s)/Act(C)⌉ throughout
    patience  a sequence gets more ranks than Eq. 3's fewest while it takes longer than this share of the average rank's
              work (in a pipeline, of a stage's), but never more than without offloading; 0: as many as without
    raises    ValueError  a sequence needs more than the R ranks, or has no token
    """
    limit, found = patience * total_work(batch, cost) / R / stages, []
    for i, s in enumerate(map(int, batch)):
        if 0 < s <= C:
            found.append((0.0, 1))
            continue
        most = ranks_needed(s, C, cost.layers, 0.0, cost.act)
        fewest = best_offload_ratio(s, C, cost)[1] if offload else most
        if fewest > R:
            raise ValueError(f"sequence {i} of {s:,} tokens needs {fewest} ranks of {C:,} tokens; there are {R}")
        ranks = min(max(fewest, ceil(cost.work(s) / limit)), most, R) if limit else most
        found.append((least_ratio(s, C, ranks, cost) if ranks < most else 0.0, ranks))
    return found


# ---- which ranks -----------------------------------------------------------------------------------------------------


def plan_naive(batch, C, R, cost, offload=True, stages=1, patience=1 / 16):
    """Algorithm 1: long sequences in order of arrival, then packs of short ones, round by round over the ranks.

    batch     tokens of each sequence         C     tokens a rank takes at a time         R     ranks, or pipelines
    offload, stages, patience   as in `needs`; nobody balances here, so no sequence may take long
    returns   Plan
    raises    ValueError  as `needs`
    """
    found = needs(batch, C, R, cost, offload, stages, patience)
    long = [(((i, int(s)),), r, ranks) for i, (s, (r, ranks)) in enumerate(zip(batch, found, strict=True)) if s >= C]
    short = [(i, int(s)) for i, s in enumerate(batch) if s < C]
    packs = [([short[i] for i in pack], 0.0, 1) for pack in pack_best_fit([s for _, s in short], C)]
    micro_batches, first = [], 0
    for sequences, r, ranks in [*long, *packs]:
        if first + ranks > R:
            first = 0
        micro_batches.append(MicroBatch(tuple(range(first, first + ranks)), tuple(sequences), r))
        first = (first + ranks) % R
    return Plan(micro_batches, R, cost)


def plan_balanced(batch, C, R, cost, delta=None, strategy="dp", offload=True, stages=1, buckets=8):
    """Algorithm 2: sequences sorted by length, given to the ranks that lag behind by the cost model.

    delta      seconds; "pp": a rank that lags less than this behind the busiest takes nothing while others lag more.
               Default: what a full pack takes. "dp" serves the least busy ranks, so it needs no threshold
    strategy   "dp": all ranks take from the longest bucket that is left: one length level at a time
               "pp": each rank stays with a bucket of its own as long as it can, so that the micro-batches that follow
               each other in its pipeline take equally long
    offload    False: r = 0 throughout
    stages     each of the R ranks is a pipeline of so many stages
    buckets    how many, of about equal total work
    returns    Plan: of a few values of `patience`, the first that ends within 2 % of the bound, or else the best
    raises     ValueError  as `needs`; an unknown strategy
    """
    if strategy not in ("dp", "pp"):
        raise ValueError(f"strategy={strategy!r} is neither 'dp' nor 'pp'")
    delta = 3 * cost.layers * cost.seconds(C) if delta is None else delta
    plans = []
    for patience in PATIENCE if offload else (0.0,):
        found = needs(batch, C, R, cost, offload, stages, patience)
        waiting = _buckets(batch, C, found, cost, buckets)
        plans.append(assign(waiting, R, cost, delta, strategy, stages))
        if plans[-1][0] <= 1.02 * lower_bound(batch, C, R, cost) / stages:
            break
    return min(plans, key=lambda plan: plan[0])[1]


def assign(waiting, R, cost, delta, strategy, stages):
    """Empty the buckets onto ranks. Returns (seconds until the last rank is done, Plan)."""
    free, level, micro_batches = np.zeros((R, stages)), np.full(R, -1), []
    busy = free[:, -1]
    while any(waiting):
        if strategy == "dp":
            bucket = next(b for b, left in enumerate(waiting) if left)
        else:
            bucket = _level_of(level[np.argmin(busy)], level, waiting)
        sequences, r, ranks = waiting[bucket].pop()
        load = busy
        if strategy == "pp":  # first who lags, and of those first who is at this level, or at none yet
            lags = busy.max() - busy > delta
            load = busy + (busy.sum() + 1) * (2 * ~lags + ((level != bucket) & (level >= 0)))
        chosen = _least(load, ranks)
        level[chosen] = bucket
        micro_batches.append(MicroBatch(tuple(chosen.tolist()), tuple(sequences), r))
        through(free, chosen, sum(cost.micro_batch(micro_batches[-1].padded, ranks, r)))
    return busy.max(initial=0.0), Plan(micro_batches, R, cost)


def _buckets(batch, C, found, cost, count):
    """Buckets of (sequences, r, D), the longest first, each a stack whose top is its longest."""
    order = np.argsort(-np.asarray(batch), kind="stable")
    work = np.cumsum(cost.work(np.asarray(batch, float)[order]))
    number = np.minimum((count * (work - work[0] / 2) / work[-1]).astype(int), count - 1)
    stacks = []
    for b in range(count):
        mine = [(int(i), int(batch[i])) for i in order[number == b]]
        long = [((pair,), *found[pair[0]]) for pair in mine if pair[1] >= C]
        short = [pair for pair in mine if pair[1] < C]
        packs = [(tuple(short[i] for i in pack), 0.0, 1) for pack in pack_best_fit([s for _, s in short], C)]
        stacks.append([*long, *packs][::-1])
    return stacks


def _level_of(mine, level, waiting):
    """The bucket for a rank at level `mine`: its own while that lasts, else the one with the fewest ranks."""
    if mine >= 0 and waiting[mine]:
        return mine
    return min((b for b in range(len(waiting)) if waiting[b]), key=lambda b: np.count_nonzero(level == b))


def _least(load, count):
    """The `count` ranks with the smallest load, in rank order; of equals the first."""
    return np.array([np.argmin(load)]) if count == 1 else np.sort(np.argsort(load, kind="stable")[:count])
