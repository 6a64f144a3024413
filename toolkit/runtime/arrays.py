"""Arrays as the runtime sees them: shape-only arrays, nested messages, and who owns which memory.

A shape-only array is an ordinary numpy array whose strides are all zero over one element: it has shape and dtype
but no data, and slicing, transposing and reshaping work. Anything that would materialise one must be a kernel.
"""

import numpy as np

from .errors import DtypeError


class _NoData(np.ndarray):
    """The one-element owner behind every shape-only array of a dtype; its type is the mark."""


_owners = {}


def like(template, dtype=None):
    """A shape-only array with the shape and dtype of `template` (an array, a shape, or a nested tuple of arrays).

    dtype    overrides the template's; float64 when `template` is a bare shape
    returns  numpy array of that shape, all strides zero, one element of memory
    """
    if isinstance(template, np.ndarray):
        return shape_only(template.shape, template.dtype if dtype is None else np.dtype(dtype))
    if isinstance(template, (int, np.integer)):
        template = (template,)
    if all(isinstance(n, (int, np.integer)) for n in template):
        return shape_only(tuple(template), np.dtype(np.float64 if dtype is None else dtype))
    return tuple(like(part, dtype) for part in template)


def shape_only(shape, dtype):
    """What `like` makes, from a tuple of int and a np.dtype."""
    owner = _owners.get(dtype)
    if owner is None:
        owner = _owners[dtype] = _NoData(1, dtype)
        owner.fill(0)  # whoever looks sees zeros: an index that is always there
    return np.ndarray(shape, dtype, owner, 0, (0,) * len(shape))


def is_shape_only(array):
    """True when `array`, or the array it is a view of, was made by `like`."""
    base = array.base
    if base is None:
        return False
    return type(base) is _NoData or type(base.base if type(base) is np.ndarray else None) is _NoData


def owner(array):
    """The array that holds the memory `array` looks at: itself unless it is a view."""
    while type(array.base) is np.ndarray:
        array = array.base
    return array


def with_parts(value, parts):
    """A tuple of the kind of `value`, named or not, with other parts."""
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


def first_array(value):
    """The first array in a nested tuple or list, or None."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, (tuple, list)):
        for part in value:
            if (found := first_array(part)) is not None:
                return found
    return None


def leaves(value):
    """All arrays of a nested tuple, in order."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from leaves(part)


def map_arrays(function, value, *others):
    """Apply `function` to each array of a nested tuple (and to those in the same place of `others`)."""
    if not isinstance(value, (tuple, list)):
        return function(value, *others)
    return tuple(map_arrays(function, *parts) for parts in zip(value, *others, strict=True))


def copy_of(value):
    """What a receiver gets, for an array or a nested tuple: contiguous memory of its own, or shape-only arrays."""
    if isinstance(value, np.ndarray):
        return shape_only(value.shape, value.dtype) if is_shape_only(value) else np.array(value, order="C")
    if isinstance(value, (tuple, list)):
        return tuple([copy_of(part) for part in value])
    raise DtypeError(
        f"a message holds arrays or nested tuples of arrays, not {type(value).__name__}: wrap it with np.array(…)"
    )


def same_bits(a, b):
    """Equality of contents byte for byte (NaN equals itself)."""
    if a.flags.c_contiguous and b.flags.c_contiguous and a.nbytes % 8 == 0:  # eight bytes at a time
        return np.array_equal(a.reshape(-1).view("u8"), b.reshape(-1).view("u8"))
    if a.dtype.itemsize in (1, 2, 4, 8):
        kind = f"u{a.dtype.itemsize}"
        return np.array_equal(a.view(kind), b.view(kind))
    return a.tobytes() == b.tobytes()


def round_to(dtype, value):
    """Round the arrays of `value` in place to what `dtype` (or a nested tuple of dtypes and None) can hold."""
    if isinstance(value, np.ndarray):
        if dtype is not None and not is_shape_only(value):
            value[...] = value.astype(dtype)
        return
    for kind, part in zip(dtype if isinstance(dtype, (tuple, list)) else [dtype] * len(value), value, strict=True):
        round_to(kind, part)
