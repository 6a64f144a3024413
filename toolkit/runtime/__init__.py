"""The virtual multi-device runtime: write an SPMD function once, run it on a machine made of numbers.

    cluster = Cluster(topology.full_mesh(8, hardware.NVLINK4), device=hardware.H100)
    run = cluster.run(program, shard(q, axis=1), causal=True)       # program(comm, q, *, causal)
    run.outputs, run.makespan, run.trace, run.traffic, run.peak_memory

A program runs numerically (numpy arrays, exact results) or shape-only (arrays from `like`, no data); times, bytes
and memory are the same.
"""

from . import errors, faults, hardware, topology
from .arrays import is_shape_only, like
from .cluster import Cluster, Run
from .communicator import ANY, Communicator
from .kernel import Cost, kernel
from .layout import per_rank, positions, shard
from .requests import wait_all, wait_any
from .topology import Topology
from .trace import Event

__all__ = [
    "ANY",
    "Cluster",
    "Communicator",
    "Cost",
    "Event",
    "Run",
    "Topology",
    "errors",
    "faults",
    "hardware",
    "is_shape_only",
    "kernel",
    "like",
    "per_rank",
    "positions",
    "shard",
    "topology",
    "wait_all",
    "wait_any",
]
