"""Pipeline schedules as data: for each rank the order of its passes. Nothing else about a schedule needs saying.

    schedule = one_f_one_b(stages=4, microbatches=8)
    schedule.passes[0][:3]             # Pass("F", 0, 0), Pass("F", 1, 0), Pass("F", 2, 0)
    peaks(schedule)                    # [4, 3, 2, 1] microbatches that a rank keeps at once
    bubble(schedule)                   # 0.375: idle over ideal time, (p - 1) / m
    `_pipeline.run` runs it over a communicator, `_pipeline_picture.draw` draws it.

A rank has one or more chunks of layers; `where` says which stage of the model each is. A forward pass needs the output
of the stage before, a backward pass the gradient of the stage after and its own forward pass. A schedule may split its
backward passes: B then gives the gradient of the input, and W, any time after it on the same rank, that of the weights
(`_zero_bubble`). Other kinds of passes need what precedes them on their rank.
Sources: Huang et al. 2019 (GPipe); Narayanan et al. 2021, arXiv 2104.04473, section 2.2.
Chapter: model_parallel/megatron.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from toolkit.runtime.errors import ShapeError

BEFORE = {"B": "F", "W": "B"}  # kind -> kind of the pass of the same microbatch and chunk that comes first


class Pass(NamedTuple):
    """One unit of a rank's work."""

    kind: str  # "F", "B", "W", or another that a system adds
    microbatch: int
    chunk: int = 0


class ScheduleError(ValueError):
    """The passes of a schedule can never all run, or one is missing or there twice."""


@dataclass(frozen=True)
class Schedule:
    """passes[rank]: a tuple of Pass, in order. where[rank][chunk]: the stage of the model, counted from 0."""

    name: str
    microbatches: int
    passes: tuple
    where: tuple

    @cached_property
    def owner(self):
        """{stage: (rank, chunk)}"""
        return {stage: (rank, c) for rank, chunks in enumerate(self.where) for c, stage in enumerate(chunks)}

    @property
    def stages(self):
        return len(self.owner)

    @cached_property
    def split(self):
        """Whether weights have passes of their own."""
        return any(step.kind == "W" for step in self.passes[0])

    def needs(self, rank, step):
        """(rank, Pass) whose result `step` waits for, or None."""
        move = {"F": -1, "B": 1}.get(step.kind, 0)
        return self._at(rank, step, move) if move else None

    def awaits(self, rank, step):
        """All (rank, Pass) that `step` waits for: `needs`, and what a kind of schedule adds, such as barriers."""
        needs = self.needs(rank, step)
        return () if needs is None else (needs,)

    def feeds(self, rank, step):
        """(rank, Pass) that waits for the result of `step`, or None."""
        move = {"F": 1, "B": -1}.get(step.kind, 0)
        return self._at(rank, step, move) if move else None

    def _at(self, rank, step, move):
        other = self.owner.get(self.where[rank][step.chunk] + move)
        return other and (other[0], Pass(step.kind, step.microbatch, other[1]))


# ---- three schedules -------------------------------------------------------------------------------------------------


def gpipe(stages, microbatches):
    """All forward passes, then all backward passes: a rank keeps all microbatches."""
    _whole(stages=stages, microbatches=microbatches)
    order = [Pass(kind, k) for kind in "FB" for k in range(microbatches)]
    return Schedule("GPipe", microbatches, (tuple(order),) * stages, _loop(stages, 1))


def one_f_one_b(stages, microbatches):
    """Warm up until the pipeline is full, then one forward and one backward pass in turn, then cool down."""
    _whole(stages=stages, microbatches=microbatches)

    def order(rank):
        return _in_turn(
            warm_up=min(stages - rank - 1, microbatches),
            forward=[Pass("F", k) for k in range(microbatches)],
            backward=[Pass("B", k) for k in range(microbatches)],
        )

    return Schedule("1F1B", microbatches, tuple(map(order, range(stages))), _loop(stages, 1))


def interleaved(stages, microbatches, chunks):
    """1F1B with several chunks of layers a rank: rank r has stages r, r + p, r + 2p, … of the model.

    The order is Megatron-LM's: p microbatches through the first chunk, the same p through the second, and so on.
    raises   ShapeError  microbatches is no multiple of stages
    """
    _whole(stages=stages, microbatches=microbatches, chunks=chunks)
    if microbatches % stages and chunks > 1:
        raise ShapeError(f"{microbatches} microbatches are no multiple of {stages} stages, and interleaving needs that")
    if chunks == 1:
        return one_f_one_b(stages, microbatches)
    total, group = microbatches * chunks, stages * chunks
    turns = [(k // group * stages + k % stages, k % group // stages) for k in range(total)]
    forward = [Pass("F", k, chunk) for k, chunk in turns]
    backward = [Pass("B", k, chunks - 1 - chunk) for k, chunk in turns]

    def order(rank):
        everything = microbatches == stages
        warm_up = total if everything else min(2 * (stages - rank - 1) + (chunks - 1) * stages, total)
        return _in_turn(warm_up, forward, backward)

    name = f"interleaved 1F1B, {chunks} chunks"
    return Schedule(name, microbatches, tuple(map(order, range(stages))), _loop(stages, chunks))


def _in_turn(warm_up, forward, backward):
    """Forward passes; one forward and one backward in turn; backward passes."""
    steady = [step for pair in zip(forward[warm_up:], backward, strict=False) for step in pair]
    return (*forward[:warm_up], *steady, *backward[len(forward) - warm_up :])


def _loop(stages, chunks):
    return tuple(tuple(range(rank, stages * chunks, stages)) for rank in range(stages))


def _whole(**numbers):
    for name, n in numbers.items():
        if n != int(n) or n < 1:
            raise ShapeError(f"{name}={n!r}: give a whole number from 1 on")


# ---- when each pass runs ---------------------------------------------------------------------------------------------


def times(schedule, seconds, hop=0.0):
    """Start and end of every pass, each as early as its rank and what it needs allow: {(rank, Pass): (start, end)}.

    seconds   duration of a pass of one chunk, by kind, {"F": 1.0, "B": 2.0}, of B alone where W is apart;
              or a function (kind, stage) -> duration
    hop       seconds from one rank to another; sends cost the sender nothing. Or a function of two (rank, Pass),
              who gives and who waits
    raises    ScheduleError  passes wait for each other in a circle, or for one that never comes
    """
    ranks, done, lasts = range(len(schedule.passes)), {}, by_stage(seconds)
    gap = hop if callable(hop) else lambda source, dest: hop * (source[0] != dest[0])
    free, place = [0.0] * len(ranks), [0] * len(ranks)
    moved = True
    while moved:
        moved = False
        for rank in ranks:
            while (step := _next(schedule, rank, place)) is not None:
                awaited = schedule.awaits(rank, step)
                if _missing(awaited, rank, step, done):
                    break
                start = max([free[rank], *(done[one][1] + gap(one, (rank, step)) for one in awaited)])
                free[rank] = start + lasts(step.kind, schedule.where[rank][step.chunk])
                done[rank, step] = start, free[rank]
                place[rank], moved = place[rank] + 1, True
    waiting = {rank: step for rank in ranks if (step := _next(schedule, rank, place)) is not None}
    if waiting:
        raise ScheduleError(f"{schedule.name} cannot go on: {_blocked(schedule, waiting, done)}")
    return done


def by_stage(seconds):
    """A function (kind, stage) -> seconds, of what `times` takes."""
    return seconds if callable(seconds) else lambda kind, _: seconds[kind]


def _next(schedule, rank, place):
    order = schedule.passes[rank]
    return order[place[rank]] if place[rank] < len(order) else None


def _missing(awaited, rank, step, done):
    """(rank, Pass) that `step` waits for and that is not done, or None."""
    for one in awaited:
        if one not in done:
            return one
    own = rank, step._replace(kind=BEFORE.get(step.kind))
    return own if step.kind in BEFORE and own not in done else None


def _blocked(schedule, waiting, done):
    said = []
    for rank, step in waiting.items():
        other, missing = _missing(schedule.awaits(rank, step), rank, step, done)
        said.append(f"rank {rank} waits at {_name(step)} for {_name(missing)} of rank {other}")
    return "; ".join(said)


def _name(step):
    return f"{step.kind}(microbatch {step.microbatch}, chunk {step.chunk})"


def check(schedule):
    """The schedule itself, if it runs: each chunk takes each microbatch forward and backward once, and nobody waits
    for ever.

    raises   ScheduleError
    """
    for rank, order in enumerate(schedule.passes):
        found, chunks = Counter(order), range(len(schedule.where[rank]))
        kinds = "FBW" if schedule.split else "FB"
        wanted = [Pass(kind, k, c) for kind in kinds for k in range(schedule.microbatches) for c in chunks]
        for step in wanted:
            if found[step] != 1:
                raise ScheduleError(f"{schedule.name}: rank {rank} has {_name(step)} {found[step]} times, not once")
    times(schedule, dict.fromkeys({step.kind for order in schedule.passes for step in order}, 1.0))
    return schedule


def makespan(schedule, seconds, hop=0.0):
    """Seconds until the last pass has ended."""
    return max(end for _, end in times(schedule, seconds, hop).values())


def longest_span(schedule, seconds, hop=0.0):
    """Seconds from the first start to the last end of the rank that takes longest.

    That is a step if ranks need not start and end together: Qi et al. check the norm of the gradients after the update.
    """
    found = times(schedule, seconds, hop)
    ends = [(found[rank, order[0]][0], found[rank, order[-1]][1]) for rank, order in enumerate(schedule.passes)]
    return max(end - start for start, end in ends)


def bubble(schedule, forward=1.0, backward=2.0, weights=1.0, together=True):
    """Idle time over ideal time, m (forward + backward), without messages. Not over total time: that would be
    (p - 1) / (m + p - 1) where this is (p - 1) / m.

    forward, backward   of all chunks of a rank
    weights             the part of `backward` that W passes do, if there are any
    together            False: idle in `longest_span`, where ranks may start and end apart
    """
    chunks = len(schedule.where[0])
    apart = {"B": backward - weights, "W": weights} if schedule.split else {"B": backward}
    seconds = {kind: whole / chunks for kind, whole in {"F": forward, **apart}.items()}
    total = (makespan if together else longest_span)(schedule, seconds)
    return total / (schedule.microbatches * (forward + backward)) - 1


def peaks(schedule, left=1):
    """The most chunk activations that each rank keeps at once: forward passes whose last backward pass is to come.

    left   what stays from B to W, as a share of a chunk's activations
    """
    change = {"F": 1, "B": left - 1, "W": -left} if schedule.split else {"F": 1, "B": -1}
    return [max(accumulate((change.get(step.kind, 0) for step in order), initial=0)) for order in schedule.passes]
