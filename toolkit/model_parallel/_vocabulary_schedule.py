"""Orders of passes for a pipeline whose vocabulary layers are cut over all its ranks.

Every rank has passes S and T (output layer), IF and IB (embedding) for each microbatch beside its own F and B. A
barrier is a pass that waits for a pass of all ranks. Each one lengthens a microbatch's life by one round of passes:

    schedule       barriers    microbatches that rank r keeps
    1F1B           0           p - r
    Vocab-2        1           p - r + 1
    Vocab-1        2           p - r + 2
    interlaced     2, all ranks stopped      3 p / 2 on rank 0

A rank repeats one round of passes, as in the paper; when they run, `_schedule.times` tells.
Source: Yeung et al. 2024, arXiv 2411.05288, section 5. Chapter: model_parallel/vocabulary_parallel.
"""

from dataclasses import dataclass
from math import ceil

from toolkit.runtime.errors import ShapeError

from ._schedule import Pass, Schedule, _whole, one_f_one_b

METHODS = ("baseline", "redis", "interlaced", "vocab-1", "vocab-2")
SPLIT = METHODS[2:]  # those that cut the vocabulary
BEHIND = {  # method -> {kind: the kind that all ranks must have done before}; B: on the last rank only
    "vocab-1": {"T": "S", "B": "T"},
    "interlaced": {"T": "S", "B": "T"},
    "vocab-2": {"T": "S", "B": "S"},
}
EXTRA = {"vocab-1": 2, "vocab-2": 1}  # microbatches kept beyond 1F1B's
TINY = 1e-9


@dataclass(frozen=True)
class Barriered(Schedule):
    """A Schedule with passes that wait for all ranks."""

    method: str

    def awaits(self, rank, step):
        kind, k, ranks = step.kind, step.microbatch, range(len(self.passes))
        first, last = 0, len(ranks) - 1
        if kind == "S":
            return ((last, Pass("F", k)),)
        if kind == "IB":
            return ((first, Pass("B", k)),)
        found = super().awaits(rank, step)
        if kind == "F" and rank == first:
            return (*found, *((r, Pass("IF", k)) for r in ranks))
        behind = BEHIND[self.method].get(kind)
        if behind and (kind != "B" or rank == last):
            return (*found, *((r, Pass(behind, k)) for r in ranks))
        return found


def build_schedule(method, stages, microbatches, forward=0.3):
    """The Schedule of one of METHODS.

    forward   share of a round that a microbatch needs from rank to rank on its way down. It decides after how many
              rounds a rank does S. A little under F / (F + B), which is 1/3, leaves every exchange some time
    raises    ShapeError  no such method, or no whole numbers
    """
    _whole(stages=stages, microbatches=microbatches)
    if method not in METHODS:
        raise ShapeError(f"method={method!r}: choose from {', '.join(METHODS)}")
    if method not in SPLIT:
        return one_f_one_b(stages, microbatches)
    if method == "interlaced":
        orders = _in_windows(stages, microbatches)
    else:
        orders = _in_rounds(method, stages, microbatches, forward)
    passes = tuple(map(tuple, orders))
    return Barriered(method, microbatches, passes, tuple((rank,) for rank in range(stages)), method)


def redistribute_layers(layers, stages, ends=(0.0, 0.0)):
    """Layers a stage, so that the slowest stage is as fast as whole layers allow: what "redis" does.

    ends      what the first and the last stage have beside layers, in layers
    returns   list of stages integers. Each layer goes to the stage with the least work, which is optimal as layers
              are equal; of equals to the latest, which keeps the fewest microbatches
    """
    _whole(layers=layers, stages=stages)
    counts, work = [0] * stages, [0.0] * stages
    work[0] += ends[0]
    work[-1] += ends[1]
    for _ in range(layers):
        stage = min(range(stages), key=lambda i: (work[i], -i))
        counts[stage] += 1
        work[stage] += 1
    return counts


def output_in_layers(vocabulary, h, sequence):
    """Operations of the output layer over those of a transformer layer: section 2 of the paper."""
    return 6 * vocabulary / (72 * h + 12 * sequence)


def output_parameters_in_layers(vocabulary, h):
    """Parameters of the output layer over those of a transformer layer."""
    return vocabulary / (12 * h)


# ---- Vocab-1 and Vocab-2 ---------------------------------------------------------------------------------------------


def _in_rounds(method, p, m, forward):
    """One round of a rank: embed ahead, F, T and S together, B, gradient of the embedding; then the same, one
    microbatch later. What is to be said is how many microbatches behind F each other pass of the round is.

    A microbatch goes down and up one rank in a round, `forward` of which it spends on the way down.
    """

    def order(rank):
        away, extra = p - 1 - rank, EXTRA[method]
        soft = ceil(away * forward - TINY)  # the last rank's F has ended when S starts, and S ends within a round
        back = away + extra
        ahead = 1 + ceil(rank * forward - TINY)  # all ranks have embedded a round before rank 0 needs it
        after = ceil(p - 1 + extra - rank * forward - TINY)  # rank 0's B has ended
        behind = {"IF": -ahead, "F": 0, "T": soft + 1, "S": soft, "B": back, "IB": after}
        rounds = range(-ahead, m + max(back, after, soft + 1))
        steps = [Pass(kind, j - late) for j in rounds for kind, late in behind.items()]
        return [step for step in steps if 0 <= step.microbatch < m]

    return map(order, range(p))


# ---- interlaced ------------------------------------------------------------------------------------------------------


def _in_windows(p, m):
    """All ranks do S and T of a microbatch at the same time; between two of those a rank has one F and one B.

    In a window a rank hands on what it finished first in time for its neighbour to do it second: a forward pass
    crosses two ranks a window, the longer backward pass one. Hence p / 2 + p windows from first F to last B.
    """
    ahead = (p - 1) // 2  # windows from F on rank 0 to the last rank's

    def order(rank):
        away = p - 1 - rank
        found = [Pass("IF", k) for k in range(ahead + 1)] + [Pass("F", k) for k in range(away // 2)]
        for j in range(m + p + 1):
            both = [Pass("F", j + away // 2), Pass("B", j - 1 - away)]
            found += both if away % 2 else reversed(both)
            found += [Pass("S", j), Pass("T", j), Pass("IF", j + ahead + 1), Pass("IB", j - p)]
        return [step for step in found if 0 <= step.microbatch < m]

    return map(order, range(p))
