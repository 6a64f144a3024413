"""Models and clusters by name, as papers and data sheets publish them.

    model("llama-70b")      a Model          cluster("h100x64")     a Cluster of eight nodes of eight
Chapter: sequence_parallel/which_sequence_parallelism.
"""

import re
from dataclasses import dataclass
from difflib import get_close_matches

from toolkit.runtime import Cluster, hardware, topology
from toolkit.runtime.hardware import Curve, Link, replace

# ---- models ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A decoder as published.

    heads, kv_heads   of queries and of keys; `head_dim` is h / heads
    mlp               channels between the MLP's matrices; `gated`: three matrices (SwiGLU), else two
    """

    name: str
    layers: int
    h: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    gated: bool = True
    tied: bool = False  # the head is the embedding

    @property
    def head_dim(self):
        return self.h // self.heads

    @property
    def hidden(self):
        """Channels of the two-matrix MLP of `_block` that has as many weights and flops."""
        return self.mlp * 3 // 2 if self.gated else self.mlp

    @property
    def block(self):
        """What `block_weights` takes: h, heads, key heads, head_dim, channels of the MLP."""
        return self.h, self.heads, self.kv_heads, self.head_dim, self.hidden

    @property
    def parameters(self):
        """Weights of all layers, the embedding and the head; biases and learned positions are left out."""
        attention = 2 * self.h * (self.heads + self.kv_heads) * self.head_dim
        per_layer = attention + 2 * self.h * self.hidden + 2 * self.h
        return self.layers * per_layer + self.vocabulary * self.h * (1 if self.tied else 2) + self.h


# name, layers, h, heads, key heads, mlp, vocabulary
MODELS = {
    one.name: one
    for one in (
        # Touvron et al. 2023, arXiv 2302.13971, table 2; MLP: 2/3 · 4h, rounded up to a multiple of 256 (section 2.2)
        Model("llama-7b", 32, 4096, 32, 32, 11_008, 32_000),
        Model("llama-13b", 40, 5120, 40, 40, 13_824, 32_000),
        Model("llama-33b", 60, 6656, 52, 52, 17_920, 32_000),
        Model("llama-65b", 80, 8192, 64, 64, 22_016, 32_000),
        # Llama 2: Touvron et al. 2023, arXiv 2307.09288, section 2.2; sizes from the configuration released with it
        Model("llama-70b", 80, 8192, 64, 8, 28_672, 32_000),
        # Llama team 2024, arXiv 2407.21783, table 3
        Model("llama3-8b", 32, 4096, 32, 8, 14_336, 128_256),
        Model("llama3-70b", 80, 8192, 64, 8, 28_672, 128_256),
        Model("llama3-405b", 126, 16_384, 128, 8, 53_248, 128_256),
        # Jiang et al. 2023, arXiv 2310.06825, table 1. Its window of 4 096 tokens is not modelled: attention is full
        Model("mistral-7b", 32, 4096, 32, 8, 14_336, 32_000),
        # Brown et al. 2020, arXiv 2005.14165, table 2.1; MLP 4h; heads of 6.7B and 175B from the same table
        Model("gpt-6.7b", 32, 4096, 32, 32, 16_384, 50_257, gated=False, tied=True),
        Model("gpt-175b", 96, 12_288, 96, 96, 49_152, 50_257, gated=False, tied=True),
    )
}


def model(name):
    """The Model of that name. Raises ValueError with the names that exist."""
    if name.lower() not in MODELS:
        raise ValueError(f"there is no model {name!r}{_closest(name, MODELS)}; choose from {', '.join(MODELS)}")
    return MODELS[name.lower()]


# ---- devices as kernels find them ------------------------------------------------------------------------------------

# Attention on an A100 attains 50 to 73 % of the peak (FlashAttention-2, arXiv 2307.08691, abstract); its backward pass
# and other products: assumed, and the same shares for A10 and MI250X, of which we have no measurements.
SHARES = {
    "compute": Curve(0.75), "memory": Curve(0.85),
    "attention": Curve(0.60), "causal attention": Curve(0.60),
    "attention_backward": Curve(0.55), "causal attention_backward": Curve(0.55),
}  # fmt: skip
# An H100 has an H200's processor. What we measured there (PyTorch's kernels, `hardware.H200`) is taken over.
DEVICES = {
    "a10": replace(hardware.A10, curves=SHARES),
    "a100": replace(hardware.A100, curves=SHARES),
    "h100": replace(hardware.H100, curves=hardware.H200.curves),
    "h200": hardware.H200,
    "mi250x": replace(hardware.MI250X, curves=SHARES),
}

# ---- clusters --------------------------------------------------------------------------------------------------------

# Four A10s on PCIe: one flow of the ring attains 12.9 GB/s (README of TokenRing's authors, see its claims).
# A node of eight has one NIC of 100 Gb/s for all (AWS g5.48xlarge, product page).
A10_PORT = replace(hardware.PCIE4, flow_cap=12.9e9)
ETHERNET = Link(12.5e9, 10e-6, name="100 Gb/s Ethernet")


def _nvlink(inner, nic):
    """DGX and HGX: eight GPUs on an NVSwitch, a NIC for each GPU, no bottleneck between NICs (data sheets)."""

    def build(count):
        nodes = _nodes(count)
        return topology.two_level(nodes, 8, inner, nic, inside="switch") if nodes else topology.switch(count, inner)

    return build


def _pcie(count):
    nodes = _nodes(count)
    if nodes:
        return topology.joined([topology.pcie_tree(4, 2, A10_PORT)] * nodes, ETHERNET, name=f"{nodes} PCIe nodes of 8")
    return topology.pcie_tree(count // 2, 2, A10_PORT) if count % 2 == 0 else topology.pcie_tree(count, 1, A10_PORT)


def _frontier(count):
    if count % 8:
        raise ValueError(f"a node of Frontier has 8 GCDs: give a multiple of 8, not {count}")
    return topology.frontier(count // 8)


def _nodes(count):
    """Nodes of eight, or 0 where fewer devices than two nodes of them are asked for."""
    if count <= 8:
        return 0
    if count % 8:
        raise ValueError(f"nodes have 8 devices: give up to 8, or a multiple of 8, not {count}")
    return count // 8


FABRICS = {
    "a10": _pcie,
    "a100": _nvlink(hardware.NVLINK3, hardware.IB_HDR),
    "h100": _nvlink(hardware.NVLINK4, hardware.IB_NDR),
    "h200": _nvlink(hardware.NVLINK4, hardware.IB_NDR),
    "mi250x": _frontier,
}


def cluster(text):
    """The Cluster that a text such as h100x64 names: device, "x", how many.

    Up to 8 devices are one node; more come in nodes of 8. mi250x counts GCDs, two a package; mi250x8 is short for
    mi250xx8.
    raises   ValueError  unknown device, or a number that makes no whole nodes
    """
    found = re.fullmatch(r"([a-z]+\d+x??)x(\d+)", text.strip().lower())
    if not found:
        raise ValueError(f"cluster {text!r}: write a device, x, and how many, as in h100x64")
    name, count = found[1], int(found[2])
    name = {"mi250": "mi250x"}.get(name, name)
    if name not in DEVICES:
        known = f"{_closest(name, DEVICES)}; choose from {', '.join(DEVICES)}"
        raise ValueError(f"cluster {text!r}: there is no device {name!r}{known}")
    if count < 1:
        raise ValueError(f"cluster {text!r}: give at least one device")
    try:
        return Cluster(FABRICS[name](count), DEVICES[name])
    except ValueError as error:
        raise ValueError(f"cluster {text!r}: {error}") from None


def tokens(text):
    """A number of tokens: 131072, 128k or 1M, where k is 1 024 and M is 1 024², as lengths of contexts are quoted."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmM]?)", text.strip().replace(",", "").replace("_", ""))
    count = float(found[1]) * {"": 1, "k": 2**10, "m": 2**20}[found[2].lower()] if found else 0
    if count < 1 or count != int(count):
        raise ValueError(f"tokens {text!r}: give a whole number above 0, such as 131072, 128k or 1M")
    return int(count)


def _closest(name, known):
    near = get_close_matches(name.lower(), known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
