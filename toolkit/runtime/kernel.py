"""Kernels: functions that declare what they cost. Calling one on a rank advances that rank's clock.

    @kernel(cost=lambda x, y: Cost(x.size, 3 * x.nbytes), out=lambda x, y: like(x))
    def add(x, y):
        return x + y

Outside a cluster a kernel is just the function. In a cluster it takes
launch overhead + max(flops / attained rate, bytes / attained memory bandwidth) of the rank's compute engine.
Given shape-only arrays it skips its numerics and returns `out(…)`: arrays made by `like`, or the arguments that it
would have written in place.
"""

from collections.abc import Callable
from functools import wraps
from typing import NamedTuple

import numpy as np
from greenlet import getcurrent

from .arrays import first_array, is_shape_only, like
from .engine import Task
from .errors import RuntimeFault


class Cost(NamedTuple):
    """What one call costs: operations, bytes to and from memory, whose rate applies (default: first array's), and
    which of the device's curves (default: the one of the kernel's name)."""

    flops: float = 0.0
    bytes: float = 0.0
    dtype: np.dtype | str | None = None
    kind: str | None = None


def kernel(*, cost: Callable, out: Callable | None = None):
    """Declare a kernel. `cost` and `out` take the same arguments as the function and look at shapes and dtypes only.

    cost     returns Cost, or a tuple (flops, bytes)
    out      returns arrays made by `like`, a shape (dtype of the first array), or arguments changed in place
    raises   RuntimeFault  a shape-only call of a kernel without `out`
    """

    def declare(function):
        name = function.__name__

        @wraps(function)
        def call(*args, **options):
            task = getcurrent()
            if type(task) is not Task or task.in_kernel:
                return _outside(function, out, args, options)
            if task.owner.launch is not None:
                return task.owner.launch(call, args, options)
            declared = cost(*args, **options)
            array = args[0] if args and type(args[0]) is np.ndarray else first_array(args)
            if array is not None and is_shape_only(array):
                result = _shape_of(function, out, array, args, options)
            else:
                task.in_kernel = True
                try:
                    result = task.owner.call(function, args, options)
                finally:
                    task.in_kernel = False
            dtype = declared[2] if len(declared) > 2 and declared[2] is not None else getattr(array, "dtype", "float64")
            kind = declared[3] if len(declared) > 3 else None
            task.owner.compute(name, declared[0], declared[1], dtype, result, kind)
            return result

        call.cost, call.out = cost, out
        call.shapes = lambda *args, **options: _outside(function, out, args, options)
        return call

    return declare


def _outside(function, out, args, options):
    array = first_array(args)
    if array is not None and is_shape_only(array):
        return _shape_of(function, out, array, args, options)
    return function(*args, **options)


def _shape_of(function, out, array, args, options):
    if out is None:
        raise RuntimeFault(
            f"kernel {function.__name__} was called with shape-only arrays but does not say what it returns: "
            "give @kernel an out=…, for example out=lambda x: like(x)"
        )
    result = out(*args, **options)
    if isinstance(result, tuple) and result and all(isinstance(n, int) for n in result):
        return like(result, array.dtype)
    return result
