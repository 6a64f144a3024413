"""Search of a space of knobs in which many points fail: a forest's mean and spread say what to try next.

An objective is a function knobs -> (value, seconds); value nan is a failure, found out after that time. Workers run
four trials at once in virtual time; a point that is still running counts as an average one (a constant liar), so that
not everybody tries the same corner. Failures count as the worst value seen: that repels, and stays on the scale of y.
The specification asks for that minimum from the start; with a single success it equals the maximum and repels nothing.
That exception, and how long trials last, were settled on seeds 0 to 19; the tests and the chapter judge by others.
Source: Egele et al. (DeepHyper), as used by Dash et al. 2023, arXiv 2312.12705.
Chapter: model_parallel/frontier_recipe.
"""

from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import product

import numpy as np

from ._recipe_forest import fit


class Space:
    """A grid of knobs. `levels` (n, k): every point, as numbers of values; `knobs(i)`: the i-th as a dict."""

    def __init__(self, **values):
        self.values = {name: tuple(of) for name, of in values.items()}
        self.levels = np.array(list(product(*(range(len(of)) for of in self.values.values()))))

    def __len__(self):
        return len(self.levels)

    def knobs(self, point):
        pairs = zip(self.values.items(), self.levels[point], strict=True)
        return {name: of[level] for (name, of), level in pairs}


@dataclass(frozen=True)
class Trials:
    """What was tried, in the order in which it was known.

    points (n,)  numbers in the space          values (n,)  nan: failed
    """

    space: Space
    points: np.ndarray
    values: np.ndarray

    @property
    def best_so_far(self):
        """(n,) nan until something succeeds."""
        return np.fmax.accumulate(self.values)

    @property
    def best(self):
        return self.space.knobs(self.points[np.nanargmax(self.values)])

    def regret(self, most, after=None):
        """Share of `most` that the best of the first `after` trials misses; 1 if all failed."""
        best = self.best_so_far[(after or len(self.values)) - 1]
        return 1.0 - (0.0 if np.isnan(best) else best / most)

    def failed(self, trials):
        """Share of failures among a slice of the trials."""
        return float(np.isnan(self.values[trials]).mean())

    def forest(self, seed=0, impute=None):
        """Forest of what is known."""
        y = (impute or worst)(self.values)
        return fit(self.space.levels[self.points[~np.isnan(y)]], y[~np.isnan(y)], np.random.default_rng(seed))


def worst(values):
    """Failures become the worst value seen. One success alone is no worse than itself, so before there are two, they
    become 0, what a run that fails attains."""
    seen = values[~np.isnan(values)]
    return np.where(np.isnan(values), seen.min() if len(seen) > 1 else 0.0, values)


def dropped(values):
    """Failures are forgotten: the forest never hears of them."""
    return values


def search(objective, space, budget=100, *, seed=0, q=4, first=10, kappa=1.96, candidates=2000, impute=worst):
    """Try `budget` points of the space, none twice, the first ones at random.

    q           trials that run at once           kappa    weight of the forest's spread
    candidates  unseen points that it rates       impute   values with nan -> what the forest learns; nan: left out
    returns     Trials
    """
    random, fresh = np.random.default_rng(seed), np.ones(len(space), dtype=bool)
    opening = list(random.permutation(len(space))[:first])
    running, done, values, now, asked = [], [], [], 0.0, 0
    budget = min(budget, len(space))
    while len(done) < budget:
        while len(running) < q and asked < budget:
            pending = [point for _, _, point, _ in running]
            point = opening[asked] if asked < len(opening) else None
            if point is None:
                known = space.levels[done + pending]
                point = _propose(space, known, _learnt(values, pending, impute), fresh, random, kappa, candidates)
            fresh[point] = False
            value, seconds = objective(**space.knobs(point))
            heappush(running, (now + seconds, asked, point, value))
            asked += 1
        now, _, point, value = heappop(running)
        done.append(point)
        values.append(value)
    return Trials(space, np.array(done), np.array(values))


def _learnt(values, pending, impute):
    """What the forest is told of done and of pending points."""
    told = impute(np.array(values))
    heard = told[~np.isnan(told)]
    return np.append(told, np.full(len(pending), heard.mean() if len(heard) else 0.0))


def _propose(space, known, told, fresh, random, kappa, candidates):
    """The unseen point with the highest mean + kappa · spread, among random candidates."""
    unseen = random.permutation(np.flatnonzero(fresh))[:candidates]
    heard = ~np.isnan(told)
    if not heard.any():
        return unseen[0]
    each = fit(known[heard], told[heard], random).each(space.levels[unseen])
    floor = 0.05 * told[heard].std()
    return unseen[np.argmax(each.mean(axis=0) + kappa * np.maximum(each.std(axis=0), floor))]


# ---- rivals ----------------------------------------------------------------------------------------------------------


def at_random(objective, space, budget, seed=0):
    """Trials of points drawn without a model."""
    points = np.random.default_rng(seed).permutation(len(space))[:budget]
    return Trials(space, points, np.array([objective(**space.knobs(point))[0] for point in points]))


def everything(objective, space):
    """Trials of the whole grid: the truth, where one can afford it."""
    points = np.arange(len(space))
    return Trials(space, points, np.array([objective(**space.knobs(point))[0] for point in points]))


def one_at_a_time(objective, space, start):
    """Coordinate descent by hand: all values of one knob, keep the best, next knob, until a round changes nothing.

    start  dict of knobs, the defaults
    """
    strides = [int(np.prod([len(of) for of in list(space.values.values())[i + 1 :]])) for i in range(len(space.values))]
    here = [of.index(start[name]) for name, of in space.values.items()]
    tried = {}

    def value(levels):
        point = int(np.dot(levels, strides))
        if point not in tried:
            tried[point] = objective(**space.knobs(point))[0]
        return -np.inf if np.isnan(tried[point]) else tried[point]

    before = None
    while before != here:
        before = list(here)
        for knob, of in enumerate(space.values.values()):
            turned = [[*here[:knob], level, *here[knob + 1 :]] for level in range(len(of))]
            here = max([here, *turned], key=value)
    return Trials(space, np.array(list(tried)), np.array(list(tried.values())))
