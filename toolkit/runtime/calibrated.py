"""A machine whose numbers were fitted to timings: what it predicts for each row of a file of measurements.

The model has one idea: a call takes the larger of what the machine needs and what launching it costs.

    kernel      max(floor, launch overhead + curve of its kind)                                         hardware.Curve
    message     max(floor, latency + bytes / rate); one flow has a rate of its own, and both directions of a port share
                another: the processors and buffers that move bytes out also move bytes in              hardware.Link
    collective  our own collective, run on the virtual machine with that link

Chapter: foundations/how_far_to_trust_the_clock.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from . import topology
from .arrays import like
from .cluster import Cluster
from .hardware import Curve, Device, Link

KERNEL_SETS = ("gemm_bf16", "copy", "flash_fwd", "flash_fwd_bwd", "linear_fwd")
MESSAGE_SETS = ("p2p_ring_shift", "p2p_one_way")
COLLECTIVE_SETS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
SHORT, SHORT_SETS = 2**20, COLLECTIVE_SETS[:3]  # bytes up to which these may use a protocol for short messages


@dataclass(frozen=True)
class Calibrated:
    """A fitted machine.

    floors      seconds that a call takes at least, by row set
    short_rate  bytes/s of one flow in the collectives of SHORT_SETS when a rank's input is at most SHORT bytes
    copying     how a collective copies; the same kernel of a program has the curve of its kind, as any other
    """

    device: Device
    link: Link | None = None
    short_rate: float = np.inf
    copying: Curve = field(default_factory=Curve)
    floors: dict = field(default_factory=dict)
    world: int = 2

    def predict(self, row):
        """Seconds that the model gives for a row."""
        hidden, on_top = self.parts(row)
        return max(self.floors.get(row.set, 0.0), hidden) + on_top

    def run(self, row):
        """The virtual run of a message or collective row, without its floor."""
        link = replace(self.link, latency=self.link.latency / 2)  # two hops
        if row.set in SHORT_SETS and row.nbytes <= SHORT:
            link = replace(link, flow_cap=min(link.flow_cap, self.short_rate))
        curves = {**self.device.curves, "concatenate": self.copying}
        device = replace(self.device, curves=curves, launch_overhead=0.0)  # the whole collective is one launch
        cluster = Cluster(topology.switch(self.world, link), device=device)
        return cluster.run(PROGRAMS[row.set], like((row.nbytes // 2,), np.float16))

    def kernels(self, row):
        """Seconds of a row's kernels, without a floor."""
        return sum(self.device.seconds(flops, nbytes, "bfloat16", kind) for kind, flops, nbytes in calls(row))

    def launch_bound(self, row):
        """Whether the floor, not the machine's work, decides the prediction."""
        return self.parts(row)[0] < self.floors.get(row.set, 0.0)

    def parts(self, row):
        """(seconds that a floor can hide, seconds on top): a call's kernels; or its messages, and its copies.

        However many messages a collective has, it is one call.
        """
        if row.set in KERNEL_SETS:
            return self.kernels(row), 0.0
        run = self.run(row)
        copies = sum(event.end - event.start for event in run.trace if event.kind == "compute" and event.rank == 0)
        return run.makespan - copies, copies


# ---- what was timed -------------------------------------------------------------------------------------------------


def calls(row):
    """The kernels of a row: (kind, flops, bytes) each. Same costs as toolkit.kernels declares."""
    size = row.size
    if row.set == "gemm_bf16":
        return [("compute", 2 * size["n"] ** 3, 6 * size["n"] ** 2)]
    if row.set == "copy":
        return [("memory", 0, 2 * size["bytes"])]
    heads, n, d = (size[column] for column in ("heads", "n", "d"))
    if row.set == "linear_fwd":  # queries, keys, values, the result in float32, and the states of the chunks
        chunk, state = size["chunk"], d * d
        flops = 2 * heads * (n * chunk * 2 * d + (n - chunk) * state)
        return [("inside", flops, heads * (10 * n * d + (n // chunk * 4 * state if n > chunk else 0)))]
    causal = size["causal"]
    product, array = 2 * heads * d * (n * (n + 1) // 2 if causal else n * n), 2 * heads * n * d
    prefix = "causal " if causal else ""
    forward = (f"{prefix}attention", 2 * product, 4 * array)
    return [forward] if row.set == "flash_fwd" else [forward, (f"{prefix}attention_backward", 5 * product, 8 * array)]


def _one_way(comm, x):
    if comm.rank == 0:
        comm.send(x, 1)
    elif comm.rank == 1:
        comm.recv(0)


def _all_reduce(comm, x):
    return comm.all_reduce(x, algorithm="recursive_doubling" if comm.size == 2 else "ring")


PROGRAMS = {
    "p2p_ring_shift": lambda comm, x: comm.ishift(x, by=1).wait(),
    "p2p_one_way": _one_way,
    "all_reduce": _all_reduce,
    "all_gather": lambda comm, x: comm.all_gather(x),
    "reduce_scatter": lambda comm, x: comm.reduce_scatter(x),
    "all_to_all": lambda comm, x: comm.all_to_all(x),
}
