"""What the virtual runtime costs: TokenRing on 8 ranks against the same attention in one kernel call, paired.

    python benchmarks/overhead.py
"""

import time
from statistics import median

import numpy as np

from toolkit.kernels.attention import attention
from toolkit.runtime import Cluster, hardware, shard, topology
from toolkit.sequence_parallel import ring_attention, token_ring

RANKS, REPETITIONS = 8, 7


def seconds(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def race(cluster, arrays):
    """Medians: seconds of one kernel call, and what ring attention and TokenRing take as multiples of it."""
    shards = [shard(a, axis=1) for a in arrays]
    programs = [ring_attention.attention, token_ring.attention]
    for program in programs:  # compile, and touch all memory once
        cluster.run(program, *shards)
    turns = []
    for _ in range(REPETITIONS):
        alone = seconds(attention, *arrays)
        turns.append([alone, *(seconds(cluster.run, program, *shards) / alone for program in programs)])
    return [median(column) for column in zip(*turns, strict=True)]


def main():
    rng = np.random.default_rng(0)
    cluster = Cluster(topology.full_mesh(RANKS, hardware.NVLINK4), device=hardware.H100)
    print("tokens   one kernel   ring   token ring   (ratios to one kernel: median of paired runs)")
    for tokens in (2048, 4096, 8192, 16384):
        arrays = [rng.standard_normal((8, tokens, 64)).astype(np.float32) for _ in range(3)]
        alone, ring, token = race(cluster, arrays)
        print(f"{tokens:6}   {alone * 1e3:7.1f} ms   {ring:.3f}   {token:.3f}")


if __name__ == "__main__":
    main()
