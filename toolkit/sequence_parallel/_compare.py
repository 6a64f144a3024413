"""Every sequence parallelism on one model, one length, one cluster: a layer of each, shape-only, as plain numbers.

One layer in the middle of many runs under each method (`_methods.layer`). Numbers in 16 bits, a causal mask, one
sequence over all devices. Training: only layers' inputs are kept, so a layer runs forward, forward again and backward.
Weights, gradients and Adam's state lie in equal parts on all devices: 16 bytes a weight (ZeRO, Rajbhandari et al. 2020,
arXiv 1910.02054, section 3.1). Embedding, head and loss are not run.
Chapter: sequence_parallel/which_sequence_parallelism.
"""

import math
from dataclasses import dataclass

import numpy as np

from toolkit.runtime import Cluster, hardware, like, per_rank
from toolkit.runtime.errors import OutOfDeviceMemory, ShapeError
from toolkit.runtime.units import size

from . import _block as blocks
from ._megatron_sp import shard_weights
from ._methods import layer, methods

DTYPE = "float16"
STATES = {True: 16, False: 2}  # bytes a weight, training or not


@dataclass(frozen=True)
class Busiest:
    """The link, or the medium that several links share, that its bytes keep busy for longest."""

    name: str
    bytes: float
    seconds: float  # bytes over bandwidth


@dataclass(frozen=True)
class Result:
    """One method on one cluster. Times are virtual seconds of one layer; work + imbalance + waiting is all of it."""

    method: str
    seconds: float
    computed: tuple  # seconds of kernels on each rank
    sent: int  # bytes that leave the rank that sends most
    busiest: Busiest
    memory: float  # bytes that the fullest rank needs: what stays between layers, and the peak of the layer
    softmax: bool = True  # False: it computes another function

    @property
    def work(self):
        """What the average rank computes."""
        return math.fsum(self.computed) / len(self.computed)

    @property
    def imbalance(self):
        """What the busiest rank computes beyond the average."""
        return _picoseconds(max(self.computed) - self.work)

    @property
    def waiting(self):
        """What the busiest rank does not compute: exposed communication."""
        return _picoseconds(self.seconds - max(self.computed))


def _picoseconds(time):
    """Without what rounding leaves of a difference of sums."""
    return round(time, 12)


@dataclass(frozen=True)
class Refusal:
    """A method that cannot run here."""

    method: str
    why: str


def compare(model, tokens, cluster, *, training=True, only=None):
    """Every method on one cluster.

    model     catalogue.Model          tokens   of the one sequence that all devices share
    only      names of methods; None: all
    returns   (results, refusals): [Result, …], fastest first; [Refusal, …]
    """
    wanted = [method for method in methods(nodes_of(cluster)) if only is None or method.name in only]
    return ranked(attempt(method, model, tokens, cluster, training) for method in wanted)


def ranked(found):
    """(results, refusals) of what `attempt` gave, results by time."""
    found = list(found)
    results = [one for one in found if isinstance(one, Result)]
    return sorted(results, key=lambda one: one.seconds), [one for one in found if isinstance(one, Refusal)]


def attempt(method, model, tokens, cluster, training=True):
    """Result of one method, or the Refusal."""
    try:
        run, resident = run_layer(method, model, tokens, cluster, training)
    except (ShapeError, OutOfDeviceMemory) as error:
        first = str(error).split("\n")[0].removesuffix(". Largest live arrays:")
        return Refusal(method.name, "does not fit: " * isinstance(error, OutOfDeviceMemory) + first)
    return measured(method, run, resident)


def run_layer(method, model, tokens, cluster, training=True):
    """One layer under one method: (Run, bytes that stay on the fullest rank between layers).

    raises   ShapeError  heads, key heads or tokens do not divide as the method needs; OutOfDeviceMemory
    """
    held = [len(method.where(rank, cluster.size, tokens)) for rank in range(cluster.size)]
    weights = blocks.block_weights(None, *model.block, DTYPE)
    if method.in_shards:
        weights = shard_weights(weights, 0, cluster.size, model.head_dim)
    shapes = {name: array.shape for name, array in weights.items()}
    count = sum(math.prod(shape) for shape in shapes.values())
    piece = None if method.in_shards or cluster.size == 1 else like(-(-count // cluster.size), DTYPE)
    resident = kept_bytes(model, max(held), cluster.size, training)
    where = [tokens] * cluster.size if method.in_shards else held
    run = _with_room(cluster, resident).run(
        layer, method, like(count, DTYPE), shapes, piece, per_rank([like((n, model.h), DTYPE) for n in held]),
        per_rank([like(n, "int64") for n in where]), model.head_dim, training,
    )  # fmt: skip
    return run, resident


def nodes_of(cluster):
    return len(cluster.topology.groups or (cluster.topology.ranks,))


def kept_bytes(model, tokens, ranks, training=True):
    """Bytes that stay on a rank of so many tokens: its part of the model's state, and its tokens of every layer.

    Of each layer, training keeps the input; a forward pass alone keeps keys and values, to generate with.
    """
    channels = model.h if training else 2 * model.kv_heads * model.head_dim
    return STATES[training] * model.parameters / ranks + model.layers * tokens * channels * np.dtype(DTYPE).itemsize


def _with_room(cluster, resident):
    """The cluster with as much memory as `resident` leaves."""
    device = cluster.device
    room = device.memory_capacity - resident
    if room <= 0:
        raise OutOfDeviceMemory(
            f"state of the model and what its layers keep take {size(resident)}; {device.name} has "
            f"{size(device.memory_capacity)}"
        )
    name = f"beside {size(resident)} that stay, {device.name}"
    return Cluster(cluster.topology, hardware.replace(device, name=name, memory_capacity=room))


def measured(method, run, resident):
    """The Result of a run."""
    table = run.trace.kernels
    computed = np.bincount(table[:, 0].astype(int), table[:, 4] - table[:, 3], minlength=run.cluster.size)
    sent = int(run.traffic.by_pair.sum(axis=1).max())
    memory = resident + max(run.peak_memory)
    return Result(method.name, run.makespan, tuple(computed.tolist()), sent, busiest(run), memory, method.softmax)


def busiest(run):
    """The Busiest of a run's links."""
    machine, loads = run.cluster.topology, {}
    for edge, nbytes in run.traffic.by_link.items():
        carried, _ = loads.get(machine.medium(*edge), (0, None))
        loads[machine.medium(*edge)] = carried + nbytes, edge
    found = [Busiest(_words(machine, *edge), n, n / machine.link(*edge).bandwidth) for n, edge in loads.values()]
    return max(found, key=lambda one: one.seconds, default=Busiest("no link", 0, 0.0))


def _words(machine, u, v):
    name = machine.link(u, v).name or "the link"
    if u in machine.ranks:
        return f"{name} out of rank {u}"
    return f"{name} into rank {v}" if v in machine.ranks else f"{name} from {u} to {v}"
