"""The artifact's runs, shape-only: 8 A100 joined by NVLink, 32 layers of 3072, 128 microbatches of one sequence.

The program is `vocabulary_parallel.step`; a transformer layer is one kernel forward and one backward, by the paper's
count of operations. One number is fitted: the share of the peak that products attain, from the artifact's time of four
layers without a vocabulary. Kernels over logits are bound by memory and fused; the artifact's are not.

Memory that a rank needs: 18 bytes a parameter (16-bit weights, 32-bit gradients, three 32-bit numbers of Adam's; the
gradient of a table counts as an array of the run), 34 bytes a token, channel and layer (Korthikanti et al. 2022,
arXiv 2205.05198, without the scores that flash attention does not keep), and what the passes make.
Chapter: model_parallel/vocabulary_parallel.
"""

from dataclasses import dataclass, replace
from functools import cache

from toolkit.runtime import Cluster, Cost, hardware, kernel, like, topology
from toolkit.runtime.hardware import Curve, Link

from . import vocabulary_parallel as vocabulary
from ._model import Layer
from ._vocabulary_schedule import output_in_layers, redistribute_layers

GIB = 2**30
PEAK = hardware.A100.flops["float16"]  # operations/s
PARAMETER_BYTES, KEPT_BYTES = 18, 34
FOUR_LAYERS = 10.475e-3  # s: artifact/test_one_host.csv, forward, median of stages 0 to 6; sequences of 2048
LINKS = {
    "NVLink": hardware.NVLINK3,
    "InfiniBand": hardware.IB_HDR,
    "Ethernet": Link(3e9, 10e-6, name="Ethernet 25 Gb/s"),
}


@dataclass(frozen=True)
class Job:
    """One training step; `link` joins each rank to a switch that is no bottleneck.

    start_up   seconds that a matrix product takes longer than its operations: what thin shards are punished by
    """

    vocabulary: int = 256_000
    sequence: int = 4096
    microbatches: int = 128
    stages: int = 8
    layers: int = 32
    h: int = 3072
    link: Link = hardware.NVLINK3
    start_up: float = 0.0

    @property
    def layer_flops(self):
        """Forward pass of a layer for one microbatch; the full square of attention, as the paper counts."""
        return 24 * self.sequence * self.h**2 + 4 * self.sequence**2 * self.h

    @property
    def output_flops(self):
        return 2 * self.sequence * self.h * self.vocabulary

    @property
    def flops(self):
        """Of the step: backward passes cost twice a forward pass."""
        return 3 * self.microbatches * (self.layers * self.layer_flops + self.output_flops)


EFFICIENCY = 4 * Job(sequence=2048).layer_flops / FOUR_LAYERS / PEAK


@dataclass(frozen=True)
class Step:
    """seconds; peak bytes of each rank; mfu: operations of the model over those of the devices at their peak."""

    job: Job
    method: str
    run: object

    @property
    def layers(self):
        """Layers of each rank."""
        return layers_of(self.job, self.method)

    @property
    def seconds(self):
        return self.run.makespan

    @property
    def peak(self):
        return self.run.peak_memory

    @property
    def mfu(self):
        return self.job.flops / (self.seconds * self.job.stages * PEAK)

    @property
    def kept(self):
        """Microbatches whose activations each rank kept at once."""
        return self.run.outputs


@cache
def step(job, method):
    """One Step, run shape-only."""
    return Step(job, method, Cluster(topology.switch(job.stages, job.link), device(job)).run(program, job, method))


def layers_of(job, method):
    """Layers of each rank."""
    extra = output_in_layers(job.vocabulary, job.h, job.sequence) if method == "redis" else 0.0
    return redistribute_layers(job.layers, job.stages, (0.0, extra))


def device(job):
    """An A100 whose products attain what the artifact's do."""
    curves = {"matmul": Curve(half=job.start_up)} if job.start_up else {}
    return replace(hardware.A100, compute_efficiency=EFFICIENCY, curves=curves)


def program(comm, job, method):
    """The most microbatches that one rank keeps."""
    shape, table = (job.microbatches, job.sequence), like((job.vocabulary, job.h), "float16")
    params = {"embedding": table, "layers": [{}] * job.layers, "norm": like((job.h,), "float16"), "head": table.T}
    text = like(shape, "int64")
    state = allocated(like((state_bytes(comm, job, method, params),), "uint8"))
    *_, kept = vocabulary.step(
        comm, params, text, text, method=method, microbatches=job.microbatches, head_dim=job.h, layer=one_kernel(job)
    )
    del state
    return kept


def state_bytes(comm, job, method, params):
    """Bytes that stay for the whole step, but for the gradients of tables."""
    chunk = vocabulary.cut(params, comm, method, job.sequence)
    tables = sum(chunk[name].size for name in ("embedding", "head") if name in chunk)
    return PARAMETER_BYTES * len(chunk["layers"]) * 12 * job.h**2 + (PARAMETER_BYTES - 2) * tables


@kernel(cost=lambda x: Cost(), out=lambda x: like(x))
def allocated(x):
    return x


def one_kernel(job):
    """The Layer whose passes are one kernel each."""
    kept = KEPT_BYTES * job.sequence * job.h

    def forward(_setting, _weights, x):
        return layer_forward(x, job.layer_flops, kept)

    def backward(_setting, _weights, saved, grad):
        return layer_backward(grad, saved, 2 * job.layer_flops), {}

    return Layer(forward, backward)


@kernel(cost=lambda x, flops, kept: Cost(flops), out=lambda x, flops, kept: (like(x), like((kept,), "uint8")))
def layer_forward(x, flops, kept):
    raise NotImplementedError("a layer of given cost computes nothing: run it shape-only")


@kernel(cost=lambda grad, saved, flops: Cost(flops), out=lambda grad, saved, flops: like(grad))
def layer_backward(grad, saved, flops):
    raise NotImplementedError("a layer of given cost computes nothing: run it shape-only")
