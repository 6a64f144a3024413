"""A plan on the runtime, shape-only: rings on the network, activations that leave for host memory and come back.

Kernels take the seconds of the cost model; messages, copies, waits and memory are the machine's own. A rank that
offloads has a host beside it, a rank of its own behind a PCIe link: copies load that link and not the network, and no
compute. First in, last out: a layer's share leaves while the next layer computes forward, and comes back while the
layer after it computes backward. Chapter: sequence_parallel/byte_scale.
"""

from toolkit.runtime import Cluster, Cost, hardware, kernel, like, topology, wait_all
from toolkit.runtime.topology import Topology

NOTHING = like((1,), "uint8")  # a kernel's first array, so that it knows it is shape-only


@kernel(cost=lambda x, seconds: Cost(seconds), out=lambda x, seconds: None)
def attend(x, seconds):
    """Attention to one block of keys."""


@kernel(
    cost=lambda x, seconds, *sizes: Cost(seconds),
    out=lambda x, seconds, *sizes: [like((int(n),), "uint8") for n in sizes],
)
def layer(x, seconds, *sizes):
    """All of a layer but attention. Returns arrays of so many bytes: the activations it keeps."""


def simulate(plan, layers=None, network=None):
    """Run a plan on a virtual cluster.

    layers    fewer than the model's, to save time; default: all
    network   Topology of the ranks; default: one switch, a port of `cost.network` a rank
    returns   Run: `.makespan`, `.trace`, `.traffic.by_link`, `.peak_memory` (activations; hosts come after the ranks)
    """
    machine = network or topology.switch(plan.ranks, hardware.Link(plan.cost.network))
    if any(batch.r for batch in plan.micro_batches):
        machine = with_hosts(machine, hardware.Link(plan.cost.host))
    clock = hardware.Device("kernels that say how long they take", flops=1.0, memory_bandwidth=float("inf"))
    return Cluster(machine, clock).run(_program, plan, layers or plan.cost.layers)


def with_hosts(machine, link):
    """`machine` with a host for each rank, and the hosts as ranks after the others."""
    tiers = topology.with_memory(machine, link, at=[[rank] for rank in machine.ranks])
    hosts = tuple(f"host{number}" for number in range(len(machine.ranks)))
    path = lambda a, b: [a, b] if {a, b} & {*hosts} else machine.default(a, b)  # noqa: E731
    return Topology(tiers.name, tiers.graph, (*machine.ranks, *hosts), path)


def _program(comm, plan, layers):
    """A rank takes its micro-batches one after the other; a host serves those of its rank that offload."""
    device = comm.rank % plan.ranks
    for batch in plan.of(device):
        if comm.rank < plan.ranks:
            _micro_batch(comm, batch, plan.cost, layers)
        elif batch.r:
            stack = [comm.recv(device, tag="offload") for _ in range(layers - 1)]
            while stack:
                comm.send(stack.pop(), device, tag="fetch")


def _micro_batch(comm, batch, cost, layers):
    group, size = comm.group(batch.ranks), len(batch.ranks)
    tokens, block = sum(batch.padded) / size, cost.square * sum(s * s for s in batch.padded) / size**2
    rest, keys, host = cost.linear * tokens + cost.fixed, round(tokens * cost.kv_token), comm.rank + comm.size // 2
    act = cost.act(sum(batch.lengths)) / size
    sizes = [(1 - batch.r) * act] + [batch.r * act] * (batch.r > 0)
    kept, leaving = [], []

    for number in range(layers):  # forward
        if number > 1 and leaving:
            leaving[number - 2].wait()  # two layers whole, no more
        stays, *moves = layer(NOTHING, rest, *sizes)
        _ring(group, block, keys)
        kept.append((stays, moves if number == layers - 1 else []))
        if moves and number < layers - 1:
            leaving.append(comm.isend(moves, host, tag="offload"))
        moves = None

    while kept:  # backward
        coming = comm.irecv(host, tag="fetch") if batch.r and len(kept) > 1 else None
        layer(NOTHING, 2 * rest)
        _ring(group, 2 * block, 2 * keys)
        if size > 1:
            wait_all(_hop(group, keys, "gradients"))  # those of one's own keys, home
        kept.pop()
        if coming:
            kept[-1] = kept[-1][0], coming.wait()


def _ring(group, block, keys):
    """Attend to every block of keys, while the next one travels."""
    for hop in range(group.size):
        passing = _hop(group, keys, "keys and values") if hop < group.size - 1 else None
        attend(NOTHING, block)
        if passing:
            wait_all(passing)


def _hop(group, nbytes, tag):
    """Start to send so many bytes to the next rank and to receive as many. Without arrays: only activations count."""
    after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    return group.isend((), after, tag, nbytes=nbytes), group.irecv(before, tag)
