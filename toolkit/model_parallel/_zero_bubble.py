"""Zero-bubble pipelines: a backward pass in two halves, of which other ranks wait for one.

B gives the gradient of the input, W that of the weights. W can wait, so it fills idle time; until then its rank keeps
the microbatch's activations. Two chunks of layers a rank, laid out as a V, let a schedule choose how many it keeps.

    schedule   microbatches kept    idle, if F, B and W take as long
    1F1B       p                    (p - 1)(F + B + W)
    ZB-H1      p                    (p - 1)(F + B - W)
    ZB-H2      2p - 1               (p - 1)(F + B - 2W), if ranks start and end apart: `longest_span`
    V-ZB       p                    (p - 1) F / 2: the way to the last rank
    V-Half     p / 2 + 1            about half of 1F1B's
    V-Min      (p + 4) / 3 at most  about two thirds of 1F1B's

    schedule = v_half(stages=8, microbatches=16)
    peaks(schedule)                    # 10 of 2 chunks of layers a rank, where 1F1B keeps 16

Sources: Qi et al. 2024, arXiv 2401.10241 (the split, ZB-H1, ZB-H2); Qi et al. 2024, arXiv 2405.15362 (building blocks).
The papers squeeze a repeated block by search; here passes keep the block's order, and W fills what stays idle.
Chapter: model_parallel/place_a_model.
"""

from collections import deque
from dataclasses import replace

from ._schedule import Pass, Schedule, ScheduleError, _in_turn, _whole, by_stage

ALIKE = {"F": 1.0, "B": 1.0, "W": 1.0}
LEGS = (("F", 0), ("F", 1), ("B", 1), ("B", 0))  # kind and chunk: down the V and up, forward and backward
SLOTS = 6  # of a block: F, B and W of two chunks


def split(schedule, limit, seconds=ALIKE):
    """The same schedule with a W for each B: in idle time, or when a rank must make room, or at the end.

    schedule  of F and B passes, whose order stays
    limit     chunk activations that a rank keeps at most, from F to W
    seconds   durations as for `times`, "W" too; W is put in where it delays nothing by these
    raises    ScheduleError  the order of passes needs more than `limit`
    """
    ranks, lasts = range(len(schedule.passes)), by_stage(seconds)
    todo, later, orders = [deque(order) for order in schedule.passes], [deque() for _ in ranks], [[] for _ in ranks]
    free, live, done = [0.0] * len(ranks), [0] * len(ranks), {}

    def place(rank, step, start):
        free[rank] = done[rank, step] = start + lasts(step.kind, schedule.where[rank][step.chunk])
        live[rank] += {"F": 1, "W": -1}.get(step.kind, 0)
        orders[rank].append(step)

    def weigh(rank):
        if not later[rank]:
            raise ScheduleError(f"{schedule.name}: rank {rank} must keep more than {limit} chunks' activations")
        place(rank, later[rank].popleft(), free[rank])

    def fits(rank, until):
        """Whether the next W ends by then."""
        return later[rank] and free[rank] + lasts("W", schedule.where[rank][later[rank][0].chunk]) <= until + 1e-9

    moved = True
    while moved:
        moved = False
        for rank in ranks:
            while todo[rank] and ((needs := schedule.needs(rank, todo[rank][0])) is None or needs in done):
                step, ready = todo[rank].popleft(), done.get(needs, 0.0)
                if step.kind == "F" and live[rank] == limit:
                    weigh(rank)
                while fits(rank, until=ready):
                    weigh(rank)
                place(rank, step, max(free[rank], ready))
                if step.kind == "B":
                    later[rank].append(step._replace(kind="W"))
                moved = True
    for rank in ranks:
        while later[rank]:
            weigh(rank)
    return replace(schedule, passes=tuple(map(tuple, orders)))


# ---- one chunk a rank ------------------------------------------------------------------------------------------------


def zb_h1(stages, microbatches, seconds=ALIKE):
    """1F1B's order and 1F1B's memory."""
    return _handmade("ZB-H1", stages, microbatches, 1, stages, seconds)


def zb_h2(stages, microbatches, seconds=ALIKE):
    """A warm-up twice as long, so that no rank waits for its first gradient: nearly twice the memory."""
    return _handmade("ZB-H2", stages, microbatches, 2, 2 * stages - 1, seconds)


def _handmade(name, p, m, warm_up, limit, seconds):
    _whole(stages=p, microbatches=m)
    forward, backward = ([Pass(kind, k) for k in range(m)] for kind in "FB")
    orders = (_in_turn(min(warm_up * (p - rank - 1), m), forward, backward) for rank in range(p))
    return split(Schedule(name, m, tuple(orders), tuple((rank,) for rank in range(p))), limit, seconds)


# ---- two chunks a rank, as a V ---------------------------------------------------------------------------------------


def v_min(stages, microbatches, seconds=ALIKE):
    """About a third of 1F1B's memory: each leg moves on at once."""
    return _v_shaped("V-Min", stages, microbatches, 1, 1, 2 * ((stages + 1) // 3) + 2, seconds)


def v_half(stages, microbatches, seconds=ALIKE):
    """About half of 1F1B's memory."""
    return _v_shaped("V-Half", stages, microbatches, 2, 1, stages + 2, seconds)


def v_zb(stages, microbatches, seconds=ALIKE):
    """1F1B's memory, and no rank idle between its passes if all take as long."""
    return _v_shaped("V-ZB", stages, microbatches, 4, 2, 2 * stages, seconds)


def _v_shaped(name, p, m, down, up, limit, seconds):
    """A block repeated every 6 slots. Rank r has stages r and 2p - 1 - r, so both ends of the model are on rank 0."""
    _whole(stages=p, microbatches=m)
    orders = []
    for slots in block(p, down, up):
        legs = zip(LEGS, slots, strict=True)
        at = sorted((slot + SLOTS * k, Pass(kind, k, chunk)) for (kind, chunk), slot in legs for k in range(m))
        orders.append(tuple(step for _, step in at))
    where = tuple((rank, 2 * p - 1 - rank) for rank in range(p))
    return split(Schedule(name, m, tuple(orders), where), limit, seconds)


def block(p, down, up):
    """[rank] -> slots of F and B of one microbatch: F0, F1, B1, B0. Other microbatches' come 6, 12, … slots later.

    down, up   slots from one rank to the next, along the legs 0 → p - 1 and back
    A leg starts right after the one before, plus the least delay that keeps its slots apart from theirs on every rank.
    """
    legs, start = [], 0
    for leg in range(len(LEGS)):
        for delay in range(SLOTS):
            slots = [start + delay + (up * (p - 1 - rank) if leg % 2 else down * rank) for rank in range(p)]
            if all((a - b) % SLOTS for other in legs for a, b in zip(slots, other, strict=True)):
                break
        else:
            raise ScheduleError(f"passes {down} and {up} slots apart meet on a rank, however legs are delayed")
        legs.append(slots)
        start = 1 + slots[0 if leg % 2 else -1]
    return list(zip(*legs, strict=True))
