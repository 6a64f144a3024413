"""What ByteScale is compared with: a static mesh, a mesh that changes between steps, and a bound for all.

Chapter: sequence_parallel/byte_scale.
"""

from math import ceil, inf

import numpy as np

from ._byte_scale_plan import MicroBatch, Plan, pack_best_fit, padded


def plan_static(batch, C, R, cost, longest=None):
    """A mesh of data × context parallel ranks: sequences packed to the context length, every one cut over a whole row.

    Attention in a row is balanced: each rank has 1/CP of every sequence, an early and a late chunk.
    longest   context length that the mesh is made for; default: of this batch; CP is the least divisor of R for it
    returns   Plan
    raises    ValueError  a row of more than R ranks
    """
    row = ceil(max(longest or 0, *batch) / C)
    cp = next((n for n in range(row, R + 1) if R % n == 0), None)
    if cp is None:
        raise ValueError(f"a context of {row * C:,} tokens takes {row} ranks of {C:,} tokens; there are {R}")
    batch = [int(s) for s in batch]
    room = [min(padded(s, cp), cp * C) for s in batch]  # of memory: with padding
    packs, rows = pack_best_fit(room, cp * C), [tuple(range(first, first + cp)) for first in range(0, R, cp)]
    return Plan(
        [MicroBatch(rows[number % len(rows)], tuple((i, batch[i]) for i in pack)) for number, pack in enumerate(packs)],
        R,
        cost,
    )


def plan_power_of_two(batch, C, R, cost):
    """A mesh that changes from round to round: one context-parallel degree a round, the best power of two.

    Sequences are sorted by length and packed for each degree that holds the longest one left; the round takes the
    degree that does most work a second. What Megatron's hybrid context parallelism, a later work, comes to when all
    groups of a round have one size.
    returns   Plan
    raises    ValueError  R is not a power of two; a sequence needs more ranks
    """
    if R & (R - 1):
        raise ValueError(f"a mesh of powers of two does not divide {R} ranks")
    left, micro_batches = sorted(((int(s), i) for i, s in enumerate(batch)), reverse=True), []
    while left:
        best, chosen = -inf, None
        for cp in (1 << k for k in range(R.bit_length())):
            if cp * C < left[0][0]:
                continue
            packs = _round(left, C, cp, R // cp)
            slowest = max(sum(cost.micro_batch([s for s, _ in pack], cp)) for pack in packs)
            rate = sum(cost.work(s) for pack in packs for s, _ in pack) / slowest
            if rate > best:
                best, chosen = rate, (cp, packs)
        if chosen is None:
            raise ValueError(f"a sequence of {left[0][0]:,} tokens does not fit {R} ranks of {C:,} tokens")
        cp, packs = chosen
        for row, pack in enumerate(packs):
            micro_batches.append(MicroBatch(tuple(range(row * cp, (row + 1) * cp)), tuple((i, s) for s, i in pack)))
        taken = {i for pack in packs for _, i in pack}
        left = [pair for pair in left if pair[1] not in taken]
    return Plan(micro_batches, R, cost)


def _round(left, C, cp, rows):
    """One pack for each row: the longest sequences left, each where there is most room."""
    packs, room = [[] for _ in range(rows)], [cp * C] * rows
    for s, i in left:
        row = max(range(rows), key=room.__getitem__)
        size = min(padded(s, cp), cp * C)
        if room[row] < size:
            break
        packs[row].append((s, i))
        room[row] -= size
    return [pack for pack in packs if pack]


def lower_bound(batch, C, R, cost):
    """Seconds that no plan with at most ⌈s/C⌉ ranks a sequence beats: communication free, no rank ever idle."""
    s = np.asarray(batch, float)
    return max(total_work(batch, cost) / R, float(np.max(cost.work(s) / np.ceil(s / C))))


def total_work(batch, cost):
    """Seconds that one rank would take for the batch, without packing: all layers, forward and backward."""
    return float(np.sum(cost.work(np.asarray(batch, float))))
