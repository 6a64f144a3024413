"""Collectives, written in messages. Each is a few lines of send and receive, and costs what the textbook says.

Ring algorithms move the least bytes; logarithmic ones take the fewest steps (Thakur, Rabenseifner and Gropp 2005,
"Optimization of Collective Communication Operations in MPICH"). With p ranks and n bytes in a rank's full array:

    collective       algorithm            messages a rank     bytes a rank
    broadcast        tree                 ≤ ⌈log2 p⌉          n each; (p-1)·n in all
                     ring                 ≤ 1                 n each; (p-1)·n in all
    all_gather       ring                 p-1                 (p-1)/p · n
                     recursive_doubling   ⌈log2 p⌉            (p-1)/p · n
    reduce_scatter   ring                 p-1                 (p-1)/p · n
                     recursive_halving    ⌈log2 p⌉            (p-1)/p · n
    all_reduce       ring                 2(p-1)              2(p-1)/p · n
                     recursive_doubling   log2 p (+2 if p is no power of two)   n each
                     hierarchical         rings inside nodes, rings across
    all_to_all       pairwise             p-1                 all parts but one's own
    barrier          dissemination        ⌈log2 p⌉            0

The adjoint of each (what its backward pass must do to gradients) is in `ADJOINT`.
"""

from itertools import pairwise

import numpy as np
from greenlet import getcurrent

from .arrays import like
from .errors import CollectiveMismatch, DtypeError, ShapeError
from .kernel import Cost, kernel
from .requests import call_site, site_text

ADJOINT = {
    "all_gather": "reduce_scatter",
    "reduce_scatter": "all_gather",
    "broadcast": "reduce",
    "reduce": "broadcast",
    "gather": "scatter",
    "scatter": "gather",
    "all_reduce": "all_reduce",
    "all_to_all": "all_to_all",
}

OPERATORS = {"sum": np.add, "max": np.maximum, "min": np.minimum, "prod": np.multiply}


@kernel(cost=lambda x, y, op="sum": Cost(0, 3 * x.nbytes), out=lambda x, y, op="sum": like(x))
def combine(x, y, op="sum"):
    """x op y, element by element: bound by memory, so no flops are charged."""
    return np.asarray(OPERATORS[op](x, y))  # numpy makes a scalar of two arrays without axes


def _joined(parts, axis=0):
    first, axis = parts[0], axis % parts[0].ndim
    return (*first.shape[:axis], sum(part.shape[axis] for part in parts), *first.shape[axis + 1 :])


@kernel(
    cost=lambda parts, axis=0: Cost(0, 2 * sum(part.nbytes for part in parts)),
    out=lambda parts, axis=0: like(_joined(parts, axis), parts[0].dtype),
)
def concatenate(parts, axis=0):
    """np.concatenate as a kernel: reads and writes every byte once."""
    return np.concatenate(parts, axis)


class Collectives:
    """The collective half of a communicator. `i…` forms return a Request."""

    _site = None  # where the program called the `i…` form that this communicator serves

    def broadcast(self, x, root=0, *, algorithm="tree"):
        """`x` of `root`, on every rank. The others pass anything (None will do)."""
        return self._collective(
            "broadcast", {"tree": _tree_broadcast, "ring": _ring_broadcast}, algorithm, x, root=root
        )

    def reduce(self, x, root=0, *, op="sum", algorithm="tree"):
        """The sum (or op) of all ranks' `x`, on `root`; None elsewhere."""
        return self._collective(
            "reduce",
            {"tree": _tree_reduce, "ring": _ring_reduce},
            algorithm,
            _array("reduce", x),
            _form(x),
            root=root,
            op=op,
        )

    def gather(self, x, root=0, *, axis=0, algorithm="tree"):
        """All ranks' arrays joined along `axis`, in rank order, on `root`; None elsewhere. Lengths may differ."""
        x = _at_least_1d("gather", x)
        parts = self._collective(
            "gather", {"tree": _tree_gather, "direct": _direct_gather}, algorithm, x, _form(x, axis), root=root
        )
        return None if parts is None else concatenate(tuple(parts), axis)

    def scatter(self, x, root=0, *, algorithm="tree"):
        """Part `rank` of root's `x`: a sequence of p arrays (sizes may differ) or one array cut evenly along axis 0."""
        parts = _parts("scatter", x, self.size) if self.rank == root else None
        return self._collective(
            "scatter", {"tree": _tree_scatter, "direct": _direct_scatter}, algorithm, parts, root=root
        )

    def all_gather(self, x, *, axis=0, algorithm="ring"):
        """All ranks' arrays joined along `axis`, in rank order, on every rank. Lengths along `axis` may differ."""
        x = _at_least_1d("all_gather", x)
        parts = self._collective(
            "all_gather",
            {"ring": _ring_all_gather, "recursive_doubling": _bruck_all_gather},
            algorithm,
            x,
            _form(x, axis),
        )
        return concatenate(tuple(parts), axis)

    def reduce_scatter(self, x, *, op="sum", algorithm="ring"):
        """Part `rank` of the sum over ranks. `x`: an array, cut evenly along axis 0, or p arrays of any sizes."""
        parts = _parts("reduce_scatter", x, self.size)
        return self._collective(
            "reduce_scatter",
            {"ring": _ring_reduce_scatter, "recursive_halving": _bruck_reduce_scatter},
            algorithm,
            parts,
            {"shape": [part.shape for part in parts], "dtype": str(parts[0].dtype)},
            op=op,
        )

    def all_reduce(self, x, *, op="sum", algorithm="ring"):
        """The sum (or max, min, prod) over ranks, on every rank: the same bits everywhere."""
        algorithms = {
            "ring": _ring_all_reduce,
            "recursive_doubling": _doubling_all_reduce,
            "hierarchical": _hierarchical_all_reduce,
        }
        return self._collective("all_reduce", algorithms, algorithm, _array("all_reduce", x), _form(x), op=op)

    def all_to_all(self, x, *, algorithm="pairwise"):
        """Part j of `x` goes to rank j. p arrays in, p arrays out; or one array, cut and joined along axis 0."""
        parts = _parts("all_to_all", x, self.size)
        received = self._collective("all_to_all", {"pairwise": _pairwise_all_to_all}, algorithm, parts)
        return concatenate(tuple(received)) if isinstance(x, np.ndarray) else tuple(received)

    def barrier(self, *, algorithm="dissemination"):
        """Return when every rank has entered."""
        self._collective("barrier", {"dissemination": _dissemination_barrier}, algorithm, ())

    def _collective(self, name, algorithms, algorithm, x, form=None, **options):
        """Check that all ranks agree on what they do, then run it with messages of its own."""
        if algorithm not in algorithms:
            raise ValueError(f"{name} has no algorithm {algorithm!r}; choose from {', '.join(algorithms)}")
        if options.get("op", "sum") not in OPERATORS:
            raise ValueError(f"{name}: op={options['op']!r} is not one of {', '.join(OPERATORS)}")
        if "root" in options:
            options["root"] = self._checked(options["root"], "root")
        self._agree(name, {"algorithm": algorithm, **options, **(form or {})})
        channel = self._with(self.ranks, (name, self._entered), label=name)
        return algorithms[algorithm](channel, x, **options)

    def _agree(self, name, signature):
        """Compare with the first rank that entered this collective; all ranks must do the same thing."""
        self._entered += 1
        key, started = (self._context, self._entered), self._machine.collectives
        mine = (name, signature, self.rank, site_text(self._site or call_site()))
        first = started.setdefault(key, [mine, self.size])
        first[1] -= 1
        if not first[1]:
            del started[key]
        theirs = first[0]
        if (theirs[0], theirs[1]) != (name, signature):
            differs = [k for k in signature if theirs[1].get(k) != signature[k]] if theirs[0] == name else []
            rows = "\n".join(
                f"  rank {rank}   {what}({', '.join(f'{k}={sig[k]!r}' for k in (differs or ()))})   {site}"
                for what, sig, rank, site in (theirs, mine)
            )
            raise CollectiveMismatch(
                f"collective number {self._entered} of this communicator is not the same on all ranks:\n{rows}\n"
                "Every rank must enter the same collectives, in the same order, with the same "
                f"{' and '.join(differs) or 'operation'}."
            )

    def _meet(self, name, signature, value):
        """Exchange small values outside the network: how communicators are set up. Returns {rank: value}."""
        self._agree(name, dict(signature))
        key, engine = ("meeting", self._context, self._entered), self._machine.engine
        meeting, waiting = self._machine.contexts.setdefault(key, ({}, []))
        meeting[self.rank] = value
        if len(meeting) < self.size:
            waiting.append(getcurrent())
            engine.park(f"{name}: not all of its {self.size} ranks have called it")
        else:
            for task in waiting:
                engine.wake(task)
        return meeting


def _non_blocking(name):
    blocking = getattr(Collectives, name)

    def start(self, *args, **options):
        self._agree(f"i{name}", {})
        # A communicator of its own keeps the order of entry, whatever the sub-task does when.
        twin = self._with(self.ranks, (f"i{name}", self._entered))
        twin._site = call_site()
        return self.spawn(lambda: blocking(twin, *args, **options), name=f"i{name}")

    start.__name__ = f"i{name}"
    start.__doc__ = f"Start {name} beside the program. Returns a Request; `wait()` gives what {name} returns."
    return start


for _name in (*ADJOINT, "barrier"):
    setattr(Collectives, f"i{_name}", _non_blocking(_name))


def _array(name, x):
    if not isinstance(x, np.ndarray):
        raise DtypeError(f"{name} takes an array, not {type(x).__name__}: wrap it with np.array(…)")
    return x


def _form(x, free_axis=None):
    """What all ranks must agree on: dtype and shape. The length of `free_axis` may differ; it is None in the shape."""
    shape = list(x.shape)
    if free_axis is not None:
        if not -x.ndim <= free_axis < x.ndim:
            raise ShapeError(f"axis {free_axis} does not exist in an array of shape {x.shape}")
        shape[free_axis] = None
    return {"shape": tuple(shape), "dtype": str(x.dtype)}


def _at_least_1d(name, x):
    return _array(name, x).reshape(1) if np.ndim(x) == 0 else _array(name, x)


def _parts(name, x, size):
    """p arrays: the given ones, or views of one array cut evenly along axis 0."""
    if isinstance(x, (tuple, list)):
        if len(x) != size:
            raise ShapeError(f"{name}: {len(x)} parts were given for {size} ranks")
        return tuple(_array(name, part) for part in x)
    if _array(name, x).ndim == 0 or x.shape[0] % size:
        raise ShapeError(
            f"{name}: axis 0 of shape {x.shape} does not divide into {size} equal parts: pad it, or pass {size} arrays"
        )
    n = x.shape[0] // size
    return tuple(x[i * n : (i + 1) * n] for i in range(size))


# ---- rings: the fewest bytes --------------------------------------------------------------------------------------


def _ring_all_gather(comm, x):
    parts = {comm.rank: x}
    for step in range(comm.size - 1):
        parts[(comm.rank - step - 1) % comm.size] = comm.ishift(parts[(comm.rank - step) % comm.size], by=1).wait()
    return [parts[r] for r in range(comm.size)]


def _ring_reduce_scatter(comm, parts, op):
    partial = parts[comm.rank - 1]
    for step in range(1, comm.size):
        passing = comm.ishift(partial, by=1).wait()
        partial = combine(passing, parts[(comm.rank - 1 - step) % comm.size], op)
    return partial


def _ring_all_reduce(comm, x, op):
    flat = x.reshape(-1)
    mine = _ring_reduce_scatter(comm, _cut(flat, comm.size), op)
    return concatenate(tuple(_ring_all_gather(comm, mine))).reshape(x.shape)


def _cut(flat, parts):
    """Views of nearly equal length: nothing is padded."""
    cuts = [flat.size * i // parts for i in range(parts + 1)]
    return [flat[a:b] for a, b in pairwise(cuts)]


def _ring_broadcast(comm, x, root):
    place = (comm.rank - root) % comm.size
    if place > 0:
        x = comm.recv((comm.rank - 1) % comm.size)
    if place < comm.size - 1:
        comm.send(x, (comm.rank + 1) % comm.size)
    return x


def _ring_reduce(comm, x, root, op):
    place = (root - comm.rank) % comm.size  # hops to go
    if place < comm.size - 1:
        x = combine(comm.recv((comm.rank - 1) % comm.size), x, op)
    if place > 0:
        comm.send(x, (comm.rank + 1) % comm.size)
    return x if place == 0 else None


# ---- trees and doubling: the fewest steps --------------------------------------------------------------------------


def _tree_broadcast(comm, x, root):
    """Binomial tree: in each round every rank that has the array passes it `reach` places on."""
    place = (comm.rank - root) % comm.size
    reach = 1
    while reach < comm.size:
        if place < reach and place + reach < comm.size:
            comm.send(x, (comm.rank + reach) % comm.size)
        elif reach <= place < 2 * reach:
            x = comm.recv((comm.rank - reach) % comm.size)
        reach *= 2
    return x


def _tree_reduce(comm, x, root, op):
    """The broadcast tree run backwards."""
    place = (comm.rank - root) % comm.size
    for reach in reversed(_powers(comm.size)):
        if place < reach and place + reach < comm.size:
            x = combine(x, comm.recv((comm.rank + reach) % comm.size), op)
        elif reach <= place < 2 * reach:
            comm.send(x, (comm.rank - reach) % comm.size)
    return x if place == 0 else None


def _tree_gather(comm, x, root):
    """Binomial: a rank `reach` places on hands over everything it has gathered."""
    place, have = (comm.rank - root) % comm.size, (x,)
    for reach in _powers(comm.size):
        if place % (2 * reach) == reach:
            comm.send(have, (comm.rank - reach) % comm.size)
        elif place % (2 * reach) == 0 and place + reach < comm.size:
            have += comm.recv((comm.rank + reach) % comm.size)
    return [have[(r - root) % comm.size] for r in range(comm.size)] if place == 0 else None


def _tree_scatter(comm, parts, root):
    """The gather tree run backwards."""
    place = (comm.rank - root) % comm.size
    have = tuple(parts[(r + root) % comm.size] for r in range(comm.size)) if place == 0 else ()
    for reach in reversed(_powers(comm.size)):
        if place % (2 * reach) == reach:
            have = comm.recv((comm.rank - reach) % comm.size)
        elif place % (2 * reach) == 0 and place + reach < comm.size:
            comm.send(have[reach:], (comm.rank + reach) % comm.size)
            have = have[:reach]
    return have[0]


def _direct_gather(comm, x, root):
    if comm.rank != root:
        comm.send(x, root)
        return None
    incoming = {r: comm.irecv(r) for r in range(comm.size) if r != root}
    return [x if r == root else incoming[r].wait() for r in range(comm.size)]


def _direct_scatter(comm, parts, root):
    if comm.rank != root:
        return comm.recv(root)
    for sent in [comm.isend(parts[r], r) for r in range(comm.size) if r != root]:
        sent.wait()
    return parts[root]


def _bruck_all_gather(comm, x):
    """Recursive doubling for any p (Bruck et al. 1997): the run of blocks one holds doubles every step."""
    have = (x,)
    for reach in _powers(comm.size):
        have += comm.ishift(have[: comm.size - reach], by=-reach).wait()
    return [have[(r - comm.rank) % comm.size] for r in range(comm.size)]


def _bruck_reduce_scatter(comm, parts, op):
    """Recursive halving for any p: the all-gather above, run backwards, adding where it copied."""
    have = [parts[(comm.rank + r) % comm.size] for r in range(comm.size)]
    for reach in reversed(_powers(comm.size)):
        have, handed = have[:reach], tuple(have[reach:])
        for i, part in enumerate(comm.ishift(handed, by=reach).wait()):
            have[i] = combine(part, have[i], op)
    return have[0]


def _doubling_all_reduce(comm, x, op):
    """Exchange with the rank whose number differs in one bit. Ranks beyond the largest power of two fold in first."""
    core = 1 << (comm.size.bit_length() - 1)
    if comm.rank >= core:
        comm.send(x, comm.rank - core)
        return comm.recv(comm.rank - core)
    if comm.rank + core < comm.size:
        x = combine(x, comm.recv(comm.rank + core), op)
    for reach in _powers(core):
        peer = comm.rank ^ reach
        other = comm.sendrecv(x, peer, peer)
        x = combine(x, other, op) if comm.rank < peer else combine(other, x, op)  # same order, same bits, on both sides
    if comm.rank + core < comm.size:
        comm.send(x, comm.rank + core)
    return x


def _hierarchical_all_reduce(comm, x, op):
    """Reduce-scatter inside each node, all-reduce across, all-gather inside: slow links carry 1/P of the bytes."""
    inner, outer = _grid(comm)
    flat = x.reshape(-1)
    mine = _ring_reduce_scatter(inner, _cut(flat, inner.size), op)
    mine = _ring_all_reduce(outer, mine, op)
    return concatenate(tuple(_ring_all_gather(inner, mine))).reshape(x.shape)


def _grid(comm):
    """(ranks of my node, ranks in my place of every node), from the topology's groups."""
    where = {rank: g for g, group in enumerate(comm.topology.groups or (comm.ranks,)) for rank in group}
    nodes = {}
    for r, world in enumerate(comm.ranks):
        nodes.setdefault(where[world], []).append(r)
    if len({len(members) for members in nodes.values()}) != 1:
        raise ShapeError("hierarchical collectives need the same number of ranks on every node; use algorithm='ring'")
    node = next(members for members in nodes.values() if comm.rank in members)
    column = [members[node.index(comm.rank)] for members in nodes.values()]
    inner, outer = comm.group(node), comm.group(column)
    inner._label = outer._label = comm._label
    return inner, outer


def _pairwise_all_to_all(comm, parts):
    received = {comm.rank: parts[comm.rank]}
    for step in range(1, comm.size):
        to, source = (comm.rank + step) % comm.size, (comm.rank - step) % comm.size
        received[source] = comm.sendrecv(parts[to], to, source)
    return [received[r] for r in range(comm.size)]


def _dissemination_barrier(comm, _):
    for reach in _powers(comm.size):
        comm.ishift((), by=reach).wait()


def _powers(size):
    """1, 2, 4, … below `size`."""
    return [1 << i for i in range((size - 1).bit_length())]
