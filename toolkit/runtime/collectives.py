"""Collectives: what a communicator offers, and the check that all ranks agree on what they do.

The algorithms are in `algorithms`; `algorithm=None` takes the machine's default, the first of its list. The adjoint of
each collective (what its backward pass must do to gradients) is in `ADJOINT`.
"""

from .agreement import Entry
from .algorithms import OPERATORS, concatenate
from .errors import DtypeError, ShapeError
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


class Collectives:
    """The collective half of a communicator. `i…` forms return a Request."""

    _site = None  # where the program called the `i…` form that this communicator serves

    def broadcast(self, x, root=0, *, algorithm=None):
        """`x` of `root`, on every rank. The others pass anything (None will do)."""
        return self._collective("broadcast", algorithm, x, root=root)

    def reduce(self, x, root=0, *, op="sum", algorithm=None):
        """The sum (or op) of all ranks' `x`, on `root`; None elsewhere."""
        return self._collective(
            "reduce",
            algorithm,
            _array("reduce", x),
            _form(x),
            root=root,
            op=op,
        )

    def gather(self, x, root=0, *, axis=0, algorithm=None):
        """All ranks' arrays joined along `axis`, in rank order, on `root`; None elsewhere. Lengths may differ."""
        x = _at_least_1d("gather", x)
        parts = self._collective("gather", algorithm, x, _form(x, axis), root=root)
        return None if parts is None else concatenate(tuple(parts), axis)

    def scatter(self, x, root=0, *, algorithm=None):
        """Part `rank` of root's `x`: a sequence of p arrays (sizes may differ) or one array cut evenly along axis 0."""
        parts = _parts("scatter", x, self.size) if self.rank == root else None
        return self._collective("scatter", algorithm, parts, root=root)

    def all_gather(self, x, *, axis=0, algorithm=None):
        """All ranks' arrays joined along `axis`, in rank order, on every rank. Lengths along `axis` may differ."""
        x = _at_least_1d("all_gather", x)
        parts = self._collective(
            "all_gather",
            algorithm,
            x,
            _form(x, axis),
        )
        return concatenate(tuple(parts), axis)

    def reduce_scatter(self, x, *, op="sum", algorithm=None):
        """Part `rank` of the sum over ranks. `x`: an array, cut evenly along axis 0, or p arrays of any sizes."""
        parts = _parts("reduce_scatter", x, self.size)
        return self._collective(
            "reduce_scatter",
            algorithm,
            parts,
            {"shape": [part.shape for part in parts], "dtype": str(parts[0].dtype)},
            op=op,
        )

    def all_reduce(self, x, *, op="sum", algorithm=None):
        """The sum (or max, min, prod) over ranks, on every rank: the same bits everywhere."""
        return self._collective("all_reduce", algorithm, _array("all_reduce", x), _form(x), op=op)

    def all_to_all(self, x, *, algorithm=None):
        """Part j of `x` goes to rank j. p arrays in, p arrays out; or one array, cut and joined along axis 0."""
        parts = _parts("all_to_all", x, self.size)
        received = self._collective("all_to_all", algorithm, parts)
        return tuple(received) if isinstance(x, (tuple, list)) else concatenate(tuple(received))

    def barrier(self, *, algorithm=None):
        """Return when every rank has entered."""
        self._collective("barrier", algorithm, ())

    def _collective(self, name, algorithm, x, form=None, **options):
        """Check that all ranks agree on what they do, then run it with messages of its own."""
        choices = self._machine.algorithms[name]
        algorithm = algorithm or next(iter(choices))
        if algorithm not in choices:
            raise ValueError(f"{name} has no algorithm {algorithm!r}; choose from {', '.join(choices)}")
        if options.get("op", "sum") not in OPERATORS:
            raise ValueError(f"{name}: op={options['op']!r} is not one of {', '.join(OPERATORS)}")
        if "root" in options:
            options["root"] = self._checked(options["root"], "root")
        self._agree(name, {"algorithm": algorithm, **options, **(form or {})})
        channel = self._with(self.ranks, (name, self._entered), label=name)
        return choices[algorithm](channel, x, **options)

    def _agree(self, name, signature):
        """All ranks of this communicator must enter the same collective, in the same order, with the same signature."""
        self._entered += 1
        self._machine.agree(self, Entry(name, signature, self.rank, site_text(self._site or call_site())))

    def _meet(self, name, signature, value):
        """Exchange small values: how communicators are set up. Returns {rank: value}."""
        self._agree(name, dict(signature))
        return self._machine.meet(self, name, value)


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
    if not hasattr(x, "dtype"):  # arrays of numpy, tensors of torch
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
    return x.reshape(1) if _array(name, x).ndim == 0 else x


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
