"""The four collectives of a layer, as a GPU's library runs them: on a lane of their own, beside what is computed.

Parts go to all ranks at once, arrive in place, and are added where they arrive: no kernel of the compute engine, for
which experts would have to wait (`Device.overlap_slowdown` says what it takes from them).
Bytes a rank sends, of p: all-to-all and reduce-scatter (p-1)/p of what goes in, all-gather (p-1) times what goes in.
Chapter: model_parallel/fs_moe.
"""

import numpy as np

from toolkit.runtime.arrays import is_shape_only, like

from ._experts import experts_each
from ._in_turn import exchange


def dispatch(ep, buffer):
    """(E, C, h) of this rank's tokens -> (E/p, p·C, h) of this rank's experts, ranks one after the other."""
    n = experts_each(ep, len(buffer))
    return joined(exchange(ep, [buffer[j * n : (j + 1) * n] for j in range(ep.size)], "all_to_all"), 1)


def combine(ep, buffer):
    """The way back, (E/p, p·C, h) -> (E, C, h)."""
    return joined(exchange(ep, sliced(ep, buffer), "all_to_all"), 0)


def gather(esp, x):
    """(n, slots, h) -> (n, q·slots, h): the slots of all devices of the node."""
    return joined(exchange(esp, [x] * esp.size, "all_gather"), 1)


def scatter(esp, y):
    """(n, q·slots, h) -> (n, slots, h): the sum of all devices' outputs for this one's slots. Adjoint of `gather`."""
    parts = exchange(esp, sliced(esp, y), "reduce_scatter")
    return parts[0] if is_shape_only(y) else sum(parts[1:], parts[0])


def reduce(comm, flat):
    """The sum of flat arrays, on every rank, to the same bits."""
    parts = exchange(comm, np.array_split(flat, comm.size), "all_reduce")
    mine = parts[0] if is_shape_only(flat) else sum(parts[1:], parts[0])
    return joined(exchange(comm, [mine] * comm.size, "all_reduce"), 0)


def sliced(comm, buffer):
    """As many equal parts of the slots as there are ranks."""
    c = buffer.shape[1] // comm.size
    return [buffer[:, j * c : (j + 1) * c] for j in range(comm.size)]


def joined(parts, axis):
    """The parts one after the other."""
    if len(parts) == 1:
        return parts[0]
    if not is_shape_only(parts[0]):
        return np.concatenate(parts, axis)
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    return like(tuple(shape), parts[0].dtype)
