"""The algorithms that are timed on real GPUs (`benchmarks/gpus.py`), and what the virtual machine predicts for them.

A row says what was timed: {"algorithm", "tokens", "heads", "kv_heads", "head_dim", "backward"}; a measured one adds
"median", "kernels" and "exposed" seconds, a predicted one "predicted" and "predicted exposed". Inputs are float16.
Chapter: sequence_parallel/on_real_machines.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from toolkit.runtime import Cluster, calibration, measurements, shard, topology
from toolkit.runtime.arrays import like

from . import lasp2, ring_attention, token_ring, ulysses

ZIGZAG = {"causal": True, "layout": "zigzag"}
ALGORITHMS = {  # name -> (system, forward program, options)
    "ring": (ring_attention, ring_attention.attention, {}),
    "bidirectional ring": (ring_attention, ring_attention.bidirectional_attention, {}),
    "zigzag ring": (ring_attention, ring_attention.attention, ZIGZAG),
    "TokenRing": (token_ring, token_ring.attention, {}),
    "TokenRing zigzag": (token_ring, token_ring.attention, ZIGZAG),
    "Ulysses": (ulysses, ulysses.attention, {}),
    "Ulysses causal": (ulysses, ulysses.attention, {"causal": True}),
    "LASP-2": (lasp2, lasp2.attention, {"causal": True}),
}
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"  # a checkout has them, an installed package has not
HEAD_DIM, CHUNK = 128, 512  # CHUNK: tokens of a chunk of LASP-2
FAR = np.log(1.15)  # a prediction that is more off than this asks for a reason
TRAINED = ("ring", "zigzag ring", "TokenRing", "TokenRing zigzag")  # timed forward with backward too
TASKS = [(name, False) for name in ALGORITHMS] + [(name, True) for name in TRAINED]  # (name, with backward)
ALL_REDUCE = [1024 * 4**k for k in range(10)]  # bytes: 1 KB … 256 MB, as ASTRA-sim validates against NCCL's ring


def row(name, tokens, kv_heads, backward=False, heads=32):
    return {
        "algorithm": name, "tokens": tokens, "heads": heads, "kv_heads": kv_heads, "head_dim": HEAD_DIM,
        "backward": backward,
    }  # fmt: skip


def rows(lengths):
    """What is timed: all lengths, 32 and 8 key heads; LASP-2 has as many as queries."""
    return [
        row(name, tokens, kv_heads, backward)
        for tokens in lengths for kv_heads in (32, 8) for name, backward in TASKS
        if kv_heads == 32 or name != "LASP-2"
    ]  # fmt: skip


def program(row, world):
    """(program, options, layout of its inputs) of a row on so many GPUs. With "backward" it also takes a gradient."""
    system, forward, options = ALGORITHMS[row["algorithm"]]
    if system is lasp2:
        options = {**options, "chunks_per_rank": max(1, row["tokens"] // world // CHUNK)}
    if row.get("backward"):
        forward = partial(forward_and_backward, system)
    return forward, options, options.get("layout", "contiguous")


def forward_and_backward(system, comm, q, k, v, grad_out, **options):
    """(dq, dk, dv)"""
    out, lse = system.attention(comm, q, k, v, return_lse=True, **options)
    return system.attention_backward(comm, q, k, v, out, lse, grad_out, **options)


def shapes(row):
    """Shapes of q, k, v and, with "backward", the gradient: (heads, tokens, head_dim)."""
    tokens, width = row["tokens"], row["head_dim"]
    heads = [row["heads"], row["kv_heads"], row["kv_heads"], *[row["heads"]] * bool(row.get("backward"))]
    return [(n, tokens, width) for n in heads]


def predicted(calibrated, row, world):
    """The virtual run of a row on `world` GPUs that are fitted by `calibration.fit`, joined by one switch."""
    link = replace(calibrated.link, latency=calibrated.link.latency / 2, floor=calibrated.floors["p2p_ring_shift"])
    forward, options, layout = program(row, world)
    inputs = [shard(like(shape, np.float16), 1, layout) for shape in shapes(row)]
    return Cluster(topology.switch(world, link), device=calibrated.device).run(forward, *inputs, **options)


def predict(calibrated, asked, world):
    """The rows with "predicted" and "predicted exposed" seconds."""
    found = []
    for row in asked:
        run = predicted(calibrated, row, world)
        found.append({**row, "predicted": run.makespan, "predicted exposed": run.exposed()})
    return found


def results(path):
    """(what benchmarks/gpus.py wrote, the machine fitted to its micro-benchmarks, its rows with their predictions)."""
    content, calibrated = json.loads(Path(path).read_text(encoding="utf-8")), calibration.fit(measurements.load(path))
    return content, calibrated, predict(calibrated, content["algorithms"], content["world"])


def off(row):
    """|log(predicted / measured)|"""
    return abs(np.log(row["predicted"] / row["median"]))


def save(content, path):
    """Write a file of `RESULTS`, a row a line."""
    text = json.dumps(content).replace("}, {", "},\n{").replace("[{", "[\n{")
    Path(path).write_text(text + "\n", encoding="utf-8")
