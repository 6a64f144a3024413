"""A plan: which ranks process which sequences, in one order that all ranks follow; and what the plan will take.

Every rank meets its micro-batches in the plan's order. Two groups that share ranks then never wait for each other in a
circle. Chapter: sequence_parallel/byte_scale.
"""

from bisect import bisect_left, insort
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ._byte_scale_cost import Cost


class MicroBatch(NamedTuple):
    """Sequences that a group of ranks processes together, each spread over all of the group.

    ranks       their numbers, in ring order
    sequences   (index in the batch, tokens) of each
    r           share of activations that is offloaded
    """

    ranks: tuple
    sequences: tuple
    r: float = 0.0

    @property
    def lengths(self):
        return [s for _, s in self.sequences]

    @property
    def padded(self):
        """Tokens of each sequence with its padding: the zigzag of D ranks cuts it into 2·D equal chunks."""
        return [padded(s, len(self.ranks)) for s in self.lengths]


def padded(s, ranks):
    """Tokens of a sequence on a ring: the next multiple of 2·ranks, and of 1 where there is no ring."""
    return s if ranks == 1 else -(-s // (2 * ranks)) * 2 * ranks


def through(free, members, seconds):
    """Take a micro-batch through the stages of its members' pipelines, and change `free` (ranks, stages) accordingly.

    returns   (start in the first stage, end in the last)
    """
    stages = free.shape[1]
    end = start = free[members, 0].max()  # a group waits until all its members are free: fragments of idle time
    for stage in range(stages):
        end = max(end, free[members, stage].max()) + seconds / stages
        free[members, stage] = end
    return start, end


@dataclass(frozen=True)
class Plan:
    """Micro-batches in the order in which every rank meets them.

    micro_batches   list of MicroBatch
    ranks           how many there are
    cost            Cost that the predictions follow
    """

    micro_batches: list
    ranks: int
    cost: Cost
    _flows: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def of(self, rank):
        """The micro-batches of one rank, in order."""
        return [batch for batch in self.micro_batches if rank in batch.ranks]

    @cached_property
    def seconds(self):
        """(compute, exposed) of each micro-batch, on each of its ranks: array (micro-batches, 2)."""
        return np.array([self.cost.micro_batch(b.padded, len(b.ranks), b.r) for b in self.micro_batches]).reshape(-1, 2)

    def flow(self, stages=1):
        """Run the plan through pipelines: rank i is a pipeline of `stages` equal stages. A flow shop.

        returns   (starts, ends, free): start in the first and end in the last stage of each micro-batch, seconds;
                  when each rank's last stage is done
        """
        if stages not in self._flows:
            free, times = np.zeros((self.ranks, stages)), np.empty((2, len(self.micro_batches)))
            for i, (batch, seconds) in enumerate(zip(self.micro_batches, self.seconds.sum(axis=1), strict=True)):
                times[:, i] = through(free, list(batch.ranks), seconds)
            self._flows[stages] = *times, free[:, -1]
        return self._flows[stages]

    def makespan(self, stages=1):
        """Seconds until the last rank is done. The reduction of gradients, the same for every plan, is left out."""
        return float(self.flow(stages)[2].max(initial=0.0))

    @cached_property
    def shares(self):
        """Rank-seconds of the step as shares of it: {"compute", "communication" (exposed), "waiting"}."""
        size = np.array([len(b.ranks) for b in self.micro_batches])
        compute, exposed = size @ self.seconds / (self.ranks * self.makespan())
        return {"compute": compute, "communication": exposed, "waiting": max(0.0, 1 - compute - exposed)}

    @property
    def token_hops(self):
        """Keys' journeys, forward: a token's keys and values make D - 1 hops round a ring of D ranks."""
        return sum((len(b.ranks) - 1) * sum(b.lengths) for b in self.micro_batches)

    @property
    def padding(self):
        """Tokens that only fill chunks up."""
        return sum(sum(b.padded) - sum(b.lengths) for b in self.micro_batches)

    def check(self, batch, capacity):
        """Raise ValueError where the plan breaks a promise.

        Every sequence whole and once; every rank exists, once a micro-batch; no rank's activations exceed those of
        `capacity` tokens in all layers (without offloading: no rank holds more tokens than that).
        """
        seen = Counter(pair for b in self.micro_batches for pair in b.sequences)
        if seen != Counter(enumerate(int(s) for s in batch)):
            raise ValueError(f"the plan has {sum(seen.values())} sequences for {len(batch)}: each goes in once, whole")
        most = self.cost.layers * self.cost.act(capacity)
        for number, b in enumerate(self.micro_batches):
            if len(set(b.ranks)) < len(b.ranks) or not 0 <= min(b.ranks) <= max(b.ranks) < self.ranks:
                raise ValueError(f"micro-batch {number} names ranks {b.ranks} of {self.ranks}")
            tokens = sum(b.lengths) / len(b.ranks)
            if self.cost.resident(tokens, b.r) > most * (1 + 1e-9):
                raise ValueError(
                    f"micro-batch {number} puts {tokens:,.0f} tokens on each of {len(b.ranks)} ranks and offloads "
                    f"{b.r:.0%}: more than {capacity:,} tokens' activations; use more ranks"
                )


def pack_best_fit(lengths, capacity):
    """Put every sequence into the fullest bin that still has room for it, in order of arrival.

    lengths   tokens of each
    returns   list of bins, each a list of indices into `lengths`
    raises    ValueError  a length below 1 or above the capacity
    """
    bins, room = [], []  # room: sorted (what is left, bin)
    for i, s in enumerate(lengths):
        if not 0 < s <= capacity:
            raise ValueError(f"sequence {i} has {s} tokens; a bin of {capacity} takes 1 … {capacity}")
        place = bisect_left(room, (s, -1))
        left, number = room.pop(place) if place < len(room) else (capacity, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(i)
        insort(room, (left - s, number))
    return bins
