"""How many bytes and seconds an iteration takes: routers of tunable affinity, the ledger, and a machine at paper scale.

The model has the shape of a 350M GPT with a mixture in every layer (24 layers, h = 1024, experts of 4096, float16) and
the machine nodes of four A100, as in the paper's cluster; both from memory, so say "such as". Two numbers for the
latency of a message: `WIRE`, that of the hardware, and `LIBRARY`, what NCCL under PyTorch was measured to need at
least for one call (`hardware.H200_NVLINK`).
Chapter: model_parallel/ex_flow.
"""

from functools import cache

import numpy as np

from toolkit.runtime import Cluster, hardware, like, topology
from toolkit.runtime.hardware import Link, replace

from . import ex_flow
from ._ex_flow_model import Shape, weights
from ._ex_flow_placement import contiguous, solve_placement, transition_counts

GPT = Shape(vocabulary=50_257, layers=24, width=1024, heads=16, hidden=4096, experts=64)
WIRE, LIBRARY = 0.0, hardware.H200_NVLINK.floor
CONTEXT, BATCH = 128, 8  # tokens of a prompt, sequences a GPU
ID, RECORD = 4, 8  # bytes beside a hidden vector: an expert's number; a sequence's and an expert's

# ---- routers ---------------------------------------------------------------------------------------------------------


def markov(random, tokens, layers, experts, strength):
    """Routes (tokens, layers): with probability `strength` expert e is followed by its own partner, else by anyone.

    strength   0: every layer independent and uniform; 1: the first expert decides all
    """
    routes = np.empty((tokens, layers), int)
    routes[:, 0] = random.integers(0, experts, tokens)
    for j in range(1, layers):
        followed = random.permutation(experts)[routes[:, j - 1]]
        routes[:, j] = np.where(random.random(tokens) < strength, followed, random.integers(0, experts, tokens))
    return routes


# ---- bytes -----------------------------------------------------------------------------------------------------------


def crossings(routes, placement, gpus, scheme):
    """(L,) how many tokens an iteration change their GPU on the way to the expert of each layer; mean over iterations.

    routes   (iterations, T, L); the first iteration starts at home, where a sequence's index says, s // (T/G)
    """
    there = placement[np.arange(placement.shape[0]), routes]
    before = np.broadcast_to(np.arange(routes.shape[1])[:, None] // (routes.shape[1] // gpus), there.shape)
    if scheme == "coherent":
        last = np.concatenate((before[:1, :, -1], there[:-1, :, -1]))
        before = np.concatenate((last[..., None], there[..., :-1]), axis=-1)
    return (there != before).sum(axis=(0, 1)) / len(routes)


def ledger(crossed, tokens, gpus, width, itemsize, scheme, coherence="kv"):
    """Bytes that leave GPUs in one iteration, by purpose: what `ex_flow.decode` is counted to send.

    crossed   (L,) from `crossings`             tokens   T, one a sequence
    """
    layers, hidden = len(crossed), width * itemsize
    if scheme == "home":
        return {"dispatch": crossed.sum() * (hidden + ID), "combine": crossed.sum() * hidden, "tokens": 0, "K/V": 0}
    told = tokens * (gpus - 1)
    whole = coherence in ("kv", "early")
    return {
        "dispatch": crossed.sum() * (hidden + itemsize + RECORD),
        "combine": 0,
        "tokens": told * 12,
        "K/V": told * layers * (2 * hidden + 12) if whole else 0,
    }


# ---- seconds ---------------------------------------------------------------------------------------------------------


def machine(gpus, floor=WIRE):
    """Nodes of four A100 that share two 200 Gb/s NICs."""
    inner = replace(hardware.NVLINK3, floor=floor)
    if gpus <= 4:
        return topology.switch(gpus, inner)
    return topology.two_level(gpus // 4, 4, inner, Link(12.5e9, 3e-6, floor=floor), inside="switch")


def iteration(gpus, scheme, coherence="kv", layers=GPT.layers, **setting):
    """Seconds of one decoding iteration. Layers are alike, so 2 and 6 of them are simulated."""
    few, more = (simulated(gpus, scheme, coherence, count, **setting) for count in (2, 6))
    return few + (layers - 2) / 4 * (more - few)


@cache
def simulated(gpus, scheme, coherence, layers, placed=True, strength=0.75, floor=WIRE, way="direct",
              experts=GPT.experts, batch=BATCH):  # fmt: skip
    """Seconds of an iteration, shape-only: the second one if tokens stay, because the first starts with all at home.

    placed     experts by affinity, profiled on 5 000 other tokens of the same router; False: contiguous
    batch      sequences a GPU
    """
    shape = replace(GPT, layers=layers, experts=experts)
    tokens, iterations, random = batch * gpus, 1 if scheme == "home" else 2, np.random.default_rng(24)
    routes = markov(random, tokens * 2 + 5_000, layers, experts, strength)
    placement = contiguous(layers, experts, gpus)
    if placed:
        counts = transition_counts(routes[tokens * 2 :], experts)
        placement = solve_placement(counts, gpus, max(1, gpus // 4), "nodes first" if gpus > 4 else "hungarian")
    given = np.zeros((tokens, CONTEXT + 2, layers), int)
    given[:, CONTEXT : CONTEXT + iterations] = routes[: tokens * 2].reshape(tokens, 2, layers)[:, -iterations:]
    cluster = Cluster(machine(gpus, floor), hardware.A100)
    model, prompts = weights(None, shape, "float16"), like((tokens, CONTEXT), "int32")
    found = ex_flow.decode(cluster, model, prompts, iterations, placement, heads=shape.heads, scheme=scheme,
                           coherence=coherence, routes=given, way=way, prefill=False)  # fmt: skip
    return float(found.seconds[-1])
