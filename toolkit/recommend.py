"""Which sequence parallelism for this model, this length, this cluster: run them all, rank them, say why.

One layer in the middle of many runs shape-only under each method (`toolkit.sequence_parallel._methods.layer`). Numbers
in 16 bits, a causal mask, one sequence over all devices. Training: only layers' inputs are kept, so a layer runs
forward, forward again and backward. Weights, gradients and Adam's state lie in equal parts on all devices: 16 bytes a
weight (ZeRO, Rajbhandari et al. 2020, arXiv 1910.02054, section 3.1). Embedding, head and loss are not run.

    python -m toolkit recommend --model llama-7b --tokens 1M --cluster h100x64

Chapter: sequence_parallel/which_sequence_parallelism.
"""

import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from tqdm import tqdm

from toolkit import catalogue
from toolkit.runtime import Cluster, hardware, like, per_rank
from toolkit.runtime.errors import OutOfDeviceMemory, ShapeError
from toolkit.runtime.units import seconds, size
from toolkit.sequence_parallel import _block as blocks
from toolkit.sequence_parallel._megatron_sp import shard_weights
from toolkit.sequence_parallel._methods import layer, methods

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
    return measured(method.name, run, resident)


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


def measured(name, run, resident):
    """The Result of a run."""
    table = run.trace.kernels
    computed = np.bincount(table[:, 0].astype(int), table[:, 4] - table[:, 3], minlength=run.cluster.size)
    sent = int(run.traffic.by_pair.sum(axis=1).max())
    memory = resident + max(run.peak_memory)
    return Result(name, run.makespan, tuple(computed.tolist()), sent, busiest(run), memory)


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


# ---- reasons ---------------------------------------------------------------------------------------------------------


def reason(result, least_work=None):
    """One sentence: where the time of a layer goes.

    least_work   seconds that the average rank computes under the most frugal method; None: not compared
    """
    lost, total = max(result.imbalance, result.waiting), result.seconds
    if lost < 0.05 * total:
        return _of_compute(result, least_work)
    if result.imbalance >= result.waiting:
        rank = result.computed.index(max(result.computed))
        return (
            f"unbalanced: rank {rank} computes {seconds(result.computed[rank])}, the average {seconds(result.work)}, "
            "because its tokens come later and see more keys"
        )
    link = result.busiest
    carries = f"{link.name} carries {size(link.bytes)}"
    if link.seconds > 0.8 * total:
        return f"bound by one link: {carries} and is busy {link.seconds / total:.0%} of the time"
    waits = f"waits {seconds(result.waiting)}, {result.waiting / total:.0%} of the time"
    if link.seconds > 0.5 * result.waiting:
        hides = "computation hides in part" if link.seconds > 1.25 * result.waiting else "nothing hides"
        return f"{waits}, for messages that {hides}: {carries}, {seconds(link.seconds)} at its speed"
    return f"{waits}, for messages that depend on each other: {carries}, only {seconds(link.seconds)} at its speed"


def _of_compute(result, least_work):
    link, share = result.busiest, result.work / result.seconds
    if least_work and result.work > 1.05 * least_work:
        return (
            f"computes {share:.0%} of the time, {seconds(result.work - least_work)} more than need be: more kernels, "
            "and partial results to merge"
        )
    if not link.bytes:
        return f"computes {share:.0%} of the time and sends nothing"
    busy = f"busy {link.seconds / result.seconds:.0%} of it"
    return f"computes {share:.0%} of the time; {link.name} carries {size(link.bytes)} meanwhile, {busy}"


# ---- the command line ------------------------------------------------------------------------------------------------


def add_command(commands):
    """`recommend` among the subcommands of argparse."""
    parser = commands.add_parser("recommend", help="which sequence parallelism for a model, a length and a cluster")
    parser.add_argument("--model", required=True, help=", ".join(catalogue.MODELS))
    parser.add_argument("--tokens", required=True, help="of one sequence: 131072, 128k, 1M (k = 1 024, M = 1 024²)")
    parser.add_argument("--cluster", required=True, help=f"device x count, as h100x64: {', '.join(catalogue.DEVICES)}")
    parser.add_argument("--forward", action="store_true", help="a forward pass only, as for a prompt; else training")
    parser.set_defaults(go=run_recommend)


def run_recommend(options):
    """Print the ranked table, a reason for each row, and what is refused. Methods run on as many cores as there are."""
    model, tokens = catalogue.model(options.model), catalogue.tokens(options.tokens)
    cluster, training = catalogue.cluster(options.cluster), not options.forward
    names = [method.name for method in methods(nodes_of(cluster))]
    work = partial(_attempt, model=model, tokens=tokens, cluster=options.cluster, training=training)
    with ProcessPoolExecutor() as pool:
        found = tqdm(pool.map(work, names), total=len(names), desc="methods", leave=False, disable=None)
        results, refusals = ranked(found)
    print(report(model, tokens, cluster, results, refusals, training))


def _attempt(name, model, tokens, cluster, training):
    """`attempt` in another process, which builds the cluster from its name."""
    cluster = catalogue.cluster(cluster)
    method = next(method for method in methods(nodes_of(cluster)) if method.name == name)
    return attempt(method, model, tokens, cluster, training)


HEADERS = ("", "method", "a layer", "× best", "work", "imbalance", "waits", "sent by a rank", "busiest link", "memory")


def report(model, tokens, cluster, results, refusals, training=True):
    """What `run_recommend` prints, as text."""
    from toolkit.show import text

    device, capacity = cluster.device, size(cluster.device.memory_capacity)
    head = (
        f"{model.name} ({model.parameters / 1e9:.1f} billion weights), {tokens:,} tokens on {cluster.size} × "
        f"{device.name} ({cluster.topology.name}), {'training' if training else 'forward only'}, float16, causal"
    )
    lines = [head, ""]
    if results:
        best, least = results[0], min(result.work for result in results)
        lines.append(text.table([_row(place, result, best) for place, result in enumerate(results, 1)], HEADERS))
        lines += ["", *(f"{i}  {r.method}: {reason(r, least)}." for i, r in enumerate(results, 1))]
        step = model.layers * best.seconds
        lines += ["", f"Best: {best.method}, {seconds(step)} for {model.layers} layers, {tokens / step:,.0f} tokens/s; "
                      f"{size(best.memory)} of {capacity} a device."]  # fmt: skip
    else:
        lines.append("No method can run this.")
    if refusals:
        together = {}
        for refusal in refusals:
            together.setdefault(refusal.why, []).append(refusal.method)
        lines += ["", "Refused:", *(f"-  {'; '.join(names)}: {why}." for why, names in together.items())]
    return "\n".join(lines)


def _row(place, result, best):
    link = result.busiest
    return (
        place, result.method, seconds(result.seconds), f"{result.seconds / best.seconds:.2f}", seconds(result.work),
        seconds(result.imbalance), seconds(result.waiting), size(result.sent),
        f"{size(link.bytes)}, busy {link.seconds / result.seconds:.0%}", size(result.memory),
    )  # fmt: skip
