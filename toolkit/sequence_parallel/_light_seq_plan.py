"""Who computes which block of a causal mask, step by step: the schedule of LightSeq, and the rules for any other.

A plan is a sequence of steps, a step a sequence of one Job a rank. Step 0 is the diagonal. Every other visible block
is done once, by the rank that owns its queries or by the one that owns its keys.
Source: Li, Shao et al. 2023, arXiv 2310.03294, section 3.2. Chapter: sequence_parallel/light_seq.
"""

from functools import cache
from typing import NamedTuple

OWN, HELP, IDLE = "own", "help", "idle"


class Job(NamedTuple):
    """What one rank does in one step: the block (queries of one rank) × (keys of one rank), or nothing."""

    kind: str  # OWN: own queries, fetched keys. HELP: fetched queries, own keys. IDLE
    queries: int | None = None
    keys: int | None = None


@cache
def schedule(size, balanced=True):
    """Who computes which block: a tuple of steps, each a tuple of one Job a rank. Step 0 is the diagonal.

    balanced   False: nobody helps; the late ranks take P - 1 steps
    """
    last = size // 2 if balanced else size - 1

    def job(rank, step):
        if rank >= step:
            return Job(OWN, rank, rank - step)
        if balanced and (size % 2 or step < last):  # step P/2 of an even number is complete without help
            return Job(HELP, rank - step + size, rank)
        return Job(IDLE)

    return tuple(tuple(job(rank, step) for rank in range(size)) for step in range(last + 1))


def used(jobs, rank):
    """[(the rank whose arrays this one's job needs, kind of job)], or []."""
    kind, queries, keys = jobs[rank]
    owner = {OWN: keys, HELP: queries, IDLE: rank}[kind]
    return [] if owner == rank else [(owner, kind)]


def users(jobs, rank):
    """[(a rank whose job needs arrays of this one, kind of that job), …]."""
    return [(user, kind) for user in range(len(jobs)) for owner, kind in used(jobs, user) if owner == rank]


def check_plan(plan, size):
    """raises ValueError unless ranks do the diagonal, then every other visible block once, on a side that they own."""
    if not plan or [tuple(job) for job in plan[0]] != [(OWN, rank, rank) for rank in range(size)]:
        raise ValueError("light_seq: step 0 of a plan is the diagonal: Job('own', rank, rank) for every rank")
    missing = {(queries, keys) for queries in range(size) for keys in range(queries + 1)}
    for step, jobs in enumerate(plan):
        if len(jobs) != size:
            raise ValueError(f"light_seq: step {step} of the plan has {len(jobs)} jobs for {size} ranks")
        for rank, (kind, queries, keys) in enumerate(jobs):
            if kind == IDLE:
                continue
            if {OWN: queries, HELP: keys}.get(kind) != rank:
                raise ValueError(
                    f"light_seq: step {step}: rank {rank} cannot do {(kind, queries, keys)}: 'own' needs its own "
                    "queries, 'help' its own keys"
                )
            if (queries, keys) not in missing:
                raise ValueError(
                    f"light_seq: step {step}: queries {queries} × keys {keys} are done already, or not visible"
                )
            missing.remove((queries, keys))
    if missing:
        raise ValueError(f"light_seq: nobody does queries × keys {sorted(missing)}")
