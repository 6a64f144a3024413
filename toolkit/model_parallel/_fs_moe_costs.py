"""What a mixture-of-experts layer costs: five straight lines t = α + β·x, fitted to timings.

    0 all_to_all    1 all_gather    2 experts    3 reduce_scatter    4 all_reduce of gradients

x counts numbers in the array (for experts: multiply-adds): of the all-to-all what a rank puts in, of the gather what
comes out, of the scatter what goes in.
Chapter: model_parallel/fs_moe.
"""

from dataclasses import dataclass

import numpy as np

from toolkit.kernels.layers import matmul
from toolkit.runtime import Cluster, like

from . import _fs_moe_wire as wire
from ._mesh import Grid

NAMES = ("all_to_all", "all_gather", "experts", "reduce_scatter", "all_reduce")


@dataclass(frozen=True)
class Costs:
    """alpha, beta: five numbers each, in the order of NAMES. Seconds, and seconds a number."""

    alpha: tuple
    beta: tuple

    def seconds(self, kind, x):
        """Seconds of one operation; kind is its number."""
        return self.alpha[kind] + self.beta[kind] * x

    def chunk(self, work, r):
        """(t0, t1, t2, t3) of one of r chunks."""
        return tuple(self.seconds(kind, x / r) for kind, x in enumerate(work))

    def reduce(self, numbers):
        """Seconds to all-reduce so many numbers; nothing for none."""
        return np.where(np.asarray(numbers) > 0, self.seconds(4, numbers), 0.0)

    def numbers(self, seconds):
        """How many numbers can be reduced in that time."""
        return np.maximum(0.0, (np.asarray(seconds) - self.alpha[4]) / self.beta[4])

    def backward(self):
        """The same with experts that take twice as long."""
        double = (1, 1, 2, 1, 1)
        return Costs(*(tuple(a * d for a, d in zip(line, double, strict=True)) for line in (self.alpha, self.beta)))

    def scaled(self, **factors):
        """The same with seconds a number multiplied: scaled(all_to_all=2) is a network half as fast."""
        return Costs(self.alpha, tuple(b * factors.get(name, 1.0) for name, b in zip(NAMES, self.beta, strict=True)))


# The authors' example, their file tools/optim.py: milliseconds there. Which of their clusters it is, it does not say.
PUBLISHED = Costs(
    (0.2351535e-3, 0.0549e-3, 0.59194353e-3, 0.0688e-3, 0.34099276e-3),
    (1.8543323833e-9, 6.72388e-10, 5.6847387697e-14, 6.70433e-10, 3.4950701465e-9),
)
PUBLISHED_LAYER = {"tokens": 4 * 1024, "h": 4096, "hidden": 14336, "factor": 2.4, "esp": 8, "products": 3}


def workload(tokens, h, hidden, factor, esp, products=2):
    """(x0, x1, x2, x3) of a layer.

    tokens     of the `esp` devices of a node together       factor     experts a token, times slack
    products   matrix products of an expert: 2, or 3 if it is gated
    """
    buffer = factor * tokens * h
    return buffer / esp, buffer, buffer * hidden / esp * products, buffer


def fit(samples):
    """Least squares of t = α + β·x for each kind of operation.

    samples   {name of NAMES: (sizes, seconds)}; eight sizes or more
    returns   (Costs, {name: r²})
    raises    ValueError  too few sizes to tell
    """
    alpha, beta, quality = [], [], {}
    for name in NAMES:
        x, t = (np.asarray(values, float) for values in samples[name])
        if len(x) < 8:
            raise ValueError(f"{name}: {len(x)} sizes were timed; eight or more tell α from β")
        slope, start = np.polyfit(x / x.max(), t, 1)
        alpha.append(float(start))
        beta.append(float(slope / x.max()))
        rest = t - start - slope * x / x.max()
        quality[name] = 1 - (rest @ rest) / ((t - t.mean()) @ (t - t.mean()))
    return Costs(tuple(alpha), tuple(beta)), quality


def profile(topology, device, nodes, dtype="float16", sizes=tuple(2**n for n in range(14, 24))):
    """Time each operation on a virtual machine, all ranks at once: samples for `fit`.

    nodes   of equally many ranks each, numbered node by node
    sizes   numbers in the arrays, multiples of 64; experts multiply so many by 1 024 channels
    """
    run = Cluster(topology, device).run(_timed, nodes, dtype, sizes)
    return {name: ([x for x, _ in rows], [t for _, t in rows]) for name, rows in run.outputs[0].items()}


def _timed(comm, nodes, dtype, sizes):
    grid = Grid(comm, tp=comm.size // nodes, ep=nodes)
    rows = {name: [] for name in NAMES}
    operations = {
        "all_to_all": lambda n: wire.combine(grid.ep, like((1, n // 64, 64), dtype)),
        "all_gather": lambda n: wire.gather(grid.tp, like((1, n // 64 // grid.tp.size, 64), dtype)),
        "experts": lambda n: matmul(like((1, n // 64, 64), dtype), like((1, 64, 1024), dtype)),
        "reduce_scatter": lambda n: wire.scatter(grid.tp, like((1, n // 64, 64), dtype)),
        "all_reduce": lambda n: wire.reduce(grid.ep, like((n,), dtype)),
    }
    for n in sizes:
        for name, operation in operations.items():
            comm.barrier()
            start = comm.now
            operation(n)
            rows[name].append((n * 1024 if name == "experts" else n, comm.now - start))
    return rows
