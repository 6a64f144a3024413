"""When a mixture-of-experts layer is done, and into how many chunks it should be cut.

Two ways that must agree: `simulate_layer` follows every operation through its lane, in the order that the program
issues; `terms` are closed forms. They are equal when gather and scatter take equally long, and else the forms are a
lower bound.
Source: Pan et al. 2025, arXiv 2501.10714, and its tools/optim.py, which solves the same four cases one by one under
constraints; their maximum needs none. Chapter: model_parallel/fs_moe.
"""

import numpy as np
from scipy.optimize import minimize_scalar

from .fs_moe import LANES, pipeline

DEGREES = (1, 2, 4, 8)


def simulate_layer(t, r, gradient=0.0, streams="three"):
    """Each operation starts when its lane is free and what it needs is there.

    t          (t0, t1, t2, t3): seconds of one chunk's all-to-all, all-gather, experts, reduce-scatter
    gradient   seconds of the piece of gradients; 0: none
    returns    (finish, events): seconds; [(resource, name, chunk, start, end), …] in the order of issue
    """
    free, events = dict.fromkeys(LANES[streams].values(), 0.0), []

    def start(resource, function, *needs):
        name, chunk, seconds = function(*needs)
        lane = LANES[streams][resource]
        begin = max(free[lane], *needs) if needs else free[lane]
        free[lane] = begin + seconds
        events.append((resource, name, chunk, begin, free[lane]))
        return free[lane]

    names = zip(("D", "AG", "E", "RS", "C"), (*t, t[0]), strict=True)
    stages = [lambda i, _, name=name, seconds=seconds: (name, i, seconds) for name, seconds in names]
    pipeline(start, r, stages, (lambda: ("GAR", 0, gradient)) if gradient else None)
    return max(free.values()), events


TERMS = ("between nodes", "experts", "inside nodes", "gradients")


def terms(r, t, gradient=0.0):
    """Four lower bounds of a layer's time; the largest is the time if gather and scatter take equally long.

    t          (t0, t1, t2, t3): seconds of one chunk's all-to-all, all-gather, experts, reduce-scatter
    gradient   seconds of the piece of gradients
    returns    all dispatches and combines and one gather and scatter; all experts and the ends; all gathers and
               scatters and the ends; dispatches, gradients and combines without a gap. Arrays broadcast.
    """
    t0, t1, t2, t3 = t
    ends = 2 * t0 + t1 + t3
    return np.stack(
        np.broadcast_arrays(2 * (r - 1) * t0 + ends, ends + r * t2, ends + (r - 1) * (t1 + t3), 2 * r * t0 + gradient)
    )


def moe_time(r, costs, work, gradient=0.0, streams="three"):
    """Seconds of a layer in r chunks.

    costs      `_fs_moe_costs.Costs`             work   (x0, x1, x2, x3): `_fs_moe_costs.workload`
    gradient   numbers of dense gradient that are reduced meanwhile; an array gives an array
    raises     ValueError  no such streams
    """
    if streams not in LANES:
        raise ValueError(f"streams={streams!r} is none of {', '.join(LANES)}")
    t, gar = costs.chunk(work, r), costs.reduce(gradient)
    if streams == "three":
        return terms(r, t, gar).max(axis=0)
    t0, t1, t2, t3 = t
    network, ends = r * (2 * t0 + t1 + t3) + gar, 2 * t0 + t1 + t3
    return network + r * t2 if streams == "sequential" else np.maximum(network, ends + r * t2)


def best_degree(costs, work, gradient=0.0, streams="three", degrees=DEGREES):
    """(r, seconds): the degree with the shortest time; of equals the smallest."""
    times = [float(moe_time(r, costs, work, gradient, streams)) for r in degrees]
    best = int(np.argmin(times))
    return degrees[best], times[best]


def real_degree(costs, work, gradient=0.0):
    """The same for a real r from 1 to 8, as the authors solve it. Each term is convex in r, and so is their maximum."""
    found = minimize_scalar(lambda r: float(moe_time(r, costs, work, gradient)), bounds=DEGREES[:: len(DEGREES) - 1],
                            method="bounded", options={"xatol": 1e-9})  # fmt: skip
    return float(found.x), float(found.fun)
