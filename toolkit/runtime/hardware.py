"""Links and devices, described by numbers. Rates are peaks from data sheets; efficiencies say what is attained.

A link's bandwidth is in bytes per second and *per direction*: vendors quote both directions together.
Build your own: `Link(bandwidth=50e9, latency=2e-6)`, `replace(A100, compute_efficiency=0.6)`.
H200 and the links named H200_… are fitted to measurements: `toolkit/runtime/calibration.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache

__all__ = ["Curve", "Device", "Link", "devices", "links", "replace"]


@dataclass(frozen=True)
class Link:
    """One cable. `flow_cap` bounds a single flow (one copy engine may not fill a PCIe port).

    A message alone takes max(floor, latency + bytes / min(bandwidth, flow_cap)). The floor is what the library and the
    driver need to issue one; it fills no bandwidth and hides behind the bytes of a long message. Raw flows
    (`network.simulate`) have no floor. On a route of several links the largest floor counts.
    """

    bandwidth: float  # bytes/s in each direction
    latency: float = 0.0  # seconds
    duplex: bool = True  # False: both directions share `bandwidth`
    flow_cap: float = math.inf  # bytes/s one flow can reach
    name: str = ""
    floor: float = 0.0  # seconds that a message takes at least

    def __post_init__(self):
        if not self.bandwidth > 0 or not self.flow_cap > 0:
            raise ValueError(
                f"a link needs bandwidth and flow_cap above 0 B/s, got {self.bandwidth} and {self.flow_cap}"
            )
        if not 0 <= self.latency < math.inf:
            raise ValueError(f"a link needs a finite latency of at least 0 s, got {self.latency}")
        if not 0 <= self.floor < math.inf:
            raise ValueError(f"a link needs a finite floor of at least 0 s, got {self.floor}")


@dataclass(frozen=True)
class Curve:
    """How near one kind of kernel comes to the roofline: efficiency = share · t^power / (t^power + half^power).

    t = seconds on the roofline / share, so the kernel takes t + half^power · t^(1-power).

    share   of the peak that very long kernels attain, in (0, 1]
    half    seconds: at t = half a kernel attains half of its share. 0: all of it at every size
    power   1: a start-up time is added (pipeline fill, first tiles). 1/2: what is added grows with the square root of
            the work, as the longest row of a causal mask does
    """

    share: float = 1.0
    half: float = 0.0
    power: float = 1.0

    def __post_init__(self):
        if not (0 < self.share <= 1 and 0 <= self.half < math.inf and 0 < self.power <= 1):
            raise ValueError(
                f"a curve needs share and power in (0, 1] and a finite half of at least 0 s, got {self.share}, "
                f"{self.power} and {self.half}"
            )

    def seconds(self, ideal):
        """Time of a kernel that takes `ideal` seconds at the peak; numbers or numpy arrays."""
        work = ideal / self.share
        return work + self.half**self.power * work ** (1 - self.power) if self.half else work


@dataclass(frozen=True)
class Device:
    """A processor with memory: what one rank computes on.

    flops              peak operations per second by dtype name, or one number for all. A dtype that is not listed
                       runs at the slowest listed rate.
    memory_bandwidth   bytes/s        memory_capacity  bytes        launch_overhead  seconds per kernel
    compute_efficiency, memory_efficiency   share of the peak that kernels attain, in (0, 1]
    overlap_slowdown   share of compute lost while messages enter or leave the device, in [0, 1)
    curves             Curve by kind of kernel: its name, or the `kind` of its Cost. Others use the curve "compute" or
                       "memory", whichever bounds them. Without a curve a kernel runs on the roofline
    """

    name: str
    flops: Mapping[str, float] | float
    memory_bandwidth: float
    memory_capacity: float = math.inf
    launch_overhead: float = 0.0
    compute_efficiency: float = 1.0
    memory_efficiency: float = 1.0
    overlap_slowdown: float = 0.0
    curves: Mapping[str, Curve] = field(default_factory=dict)

    def __post_init__(self):
        rates = self.flops.values() if isinstance(self.flops, Mapping) else [self.flops]
        if not rates or not all(rate > 0 for rate in rates) or not self.memory_bandwidth > 0:
            raise ValueError(f"device {self.name!r} needs flops and memory_bandwidth above 0")
        if not (0 < self.compute_efficiency <= 1 and 0 < self.memory_efficiency <= 1):
            raise ValueError(f"device {self.name!r}: efficiencies lie in (0, 1]")
        if not 0 <= self.overlap_slowdown < 1:
            raise ValueError(f"device {self.name!r}: overlap_slowdown lies in [0, 1)")
        if not (0 <= self.launch_overhead < math.inf and self.memory_capacity > 0):
            raise ValueError(f"device {self.name!r}: launch_overhead is at least 0 s, memory_capacity above 0 B")

    def rate(self, dtype):
        """Attained operations per second for a numpy dtype or its name."""
        if not isinstance(self.flops, Mapping):
            return self.flops * self.compute_efficiency
        known = self.flops.get(_name(dtype))
        return (min(self.flops.values()) if known is None else known) * self.compute_efficiency

    def seconds(self, flops, nbytes, dtype, kind=None):
        """The roofline: launch overhead + the larger of compute time and memory time, along the curve of `kind`."""
        compute, memory = flops / self.rate(dtype), nbytes / (self.memory_bandwidth * self.memory_efficiency)
        ideal = max(compute, memory)
        if not self.curves:
            return self.launch_overhead + ideal
        curve = self.curves.get(kind) or self.curves.get("compute" if compute >= memory else "memory")
        return self.launch_overhead + (curve.seconds(ideal) if curve else ideal)


@cache
def _name(dtype):
    return str(dtype)  # numpy takes 5 µs for it


def _matrix(half, single, double):
    return {"float16": half, "bfloat16": half, "float32": single, "float64": double}


# Dense matrix peaks, FP16/BF16 tensor or matrix cores with FP32 accumulation; FP32 and FP64 as given in the same sheet.
# Launch overhead: 5 µs, the order of magnitude of a CUDA kernel launch; not from a data sheet.
IDEAL = Device("ideal", math.inf, math.inf)  # computes in no time: what remains is communication
A10 = Device("A10", _matrix(125e12, 31.2e12, 0.976e12), 600e9, 24e9, 5e-6)  # NVIDIA A10 datasheet, 2021
A100 = Device("A100", _matrix(312e12, 19.5e12, 19.5e12), 2.039e12, 80e9, 5e-6)  # A100 80 GB SXM datasheet, 2021
H100 = Device("H100", _matrix(989.4e12, 66.9e12, 66.9e12), 3.35e12, 80e9, 5e-6)  # H100 SXM5 datasheet, 2022
H200 = Device(  # peaks: H200 SXM datasheet, 2023
    "H200",
    _matrix(989.4e12, 66.9e12, 66.9e12),
    4.8e12,
    141e9,
    5e-6,
    curves={  # fitted to the kernel rows of all files in measured/: bfloat16, 32 heads of 128, PyTorch 2.11
        "compute": Curve(0.796),
        "memory": Curve(0.894),
        "attention": Curve(0.351, 3.2e-6),
        "causal attention": Curve(0.379, 53e-6, 0.5),
        "attention_backward": Curve(0.313, 100e-6),
        "causal attention_backward": Curve(0.337, 148e-6, 0.5),
    },
)
MI250X = Device(
    "MI250X", _matrix(191.5e12, 47.9e12, 47.9e12), 1.638e12, 64e9, 5e-6
)  # one GCD: half the datasheet, 2021

# Per GPU and per direction. NVLink: number of links × 25 GB/s (generation 2 on). PCIe: ×16, after 128b/130b encoding.
NVLINK2 = Link(150e9, 2e-6, name="NVLink 2")  # V100 whitepaper: 6 links
NVLINK3 = Link(300e9, 2e-6, name="NVLink 3")  # A100 whitepaper: 12 links
NVLINK4 = Link(450e9, 2e-6, name="NVLink 4")  # H100 whitepaper: 18 links
NVLINK5 = Link(900e9, 2e-6, name="NVLink 5")  # Blackwell brief: 18 links × 50 GB/s
INFINITY_FABRIC = Link(50e9, 2e-6, name="Infinity Fabric")  # MI250X: one GCD-to-GCD link, 50 GB/s each way
PCIE3 = Link(15.75e9, 2e-6, name="PCIe 3 x16")  # 8 GT/s × 16 × 128/130
PCIE4 = Link(31.5e9, 2e-6, name="PCIe 4 x16")  # 16 GT/s × 16 × 128/130
PCIE5 = Link(63.0e9, 2e-6, name="PCIe 5 x16")  # 32 GT/s × 16 × 128/130
IB_HDR = Link(25e9, 3e-6, name="InfiniBand HDR")  # 200 Gb/s
IB_NDR = Link(50e9, 3e-6, name="InfiniBand NDR")  # 400 Gb/s
# Latencies above are orders of magnitude for a GPU-to-GPU message, not data-sheet figures.

# Fitted to the messages of measured/: two H200 in one host, NCCL 2.28.9 from PyTorch, what one port attains. Not
# duplex: both directions together move `bandwidth`, one flow at most `flow_cap`. Floor: a shift issued on its own.
# That is about twice what a whole short collective takes; for those, `replace(link, floor=…)`.
H200_NVLINK = Link(623e9, 16.7e-6, False, 367e9, "NVLink, measured", floor=146e-6)
H200_HOST_MEMORY = Link(48.4e9, 13.0e-6, False, 37.0e9, "host memory, measured", floor=131e-6)
H200_ONE_CHANNEL = Link(41.9e9, 4.5e-6, False, 34.3e9, "NVLink by one NCCL channel, measured", floor=126e-6)


def devices():
    """Named devices of this module, by name."""
    return {value.name: value for value in globals().values() if isinstance(value, Device)}


def links():
    """Named links of this module, by constant name (`'NVLINK4'`)."""
    return {name: value for name, value in globals().items() if isinstance(value, Link)}
