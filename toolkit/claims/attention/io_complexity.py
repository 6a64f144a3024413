"""Claims on the I/O complexity of attention. The paper states orders, no constants: we count words and take slopes and
ratios. Its lower bound for fast matrix multiplication is a proof; no run can show it, only fail to contradict it.

Chapter: attention/io_complexity.
"""

from functools import cache

import numpy as np

from toolkit.attention import io_complexity as io
from toolkit.attention._io_complexity_rivals import small_cache_strassen
from toolkit.attention._io_complexity_traces import reproduce, transcripts
from toolkit.claims import claim

SHARED_MEMORY = {"A100": 164 * 1024, "H100": 228 * 1024}  # bytes of one SM: CUDA C++ Programming Guide, table of limits


@cache
def words(algorithm, tokens, head_dim, capacity):
    """Words that the machine counts."""
    return io.count(algorithm, tokens, head_dim, capacity).io


def slope(sizes, counts):
    """Exponent of a power law through the points."""
    return np.polyfit(np.log(sizes), np.log(counts), 1)[0]


@claim(
    says="From M = d² on, FlashAttention's I/O falls as 1/M: it is N²d²/M",
    value=-1.0,
    unit="(exponent of M)",
    where="abstract; ours: N = 2048, d = 64, M from d² to Nd/8",
    tolerance=0.1,
    paper="io_complexity",
)
def flash_exponent():
    sizes = [4096, 8192, 16384]
    return slope(sizes, [words(io.flash, 2048, 64, M) for M in sizes])


@claim(
    says="For every M ≥ d² that is the fewest words possible, up to a constant (ours: the largest ratio to the bound)",
    unit="× the bound",
    where="abstract; ours: N = 2048, d = 64, M from d² to Nd/4",
    holds=lambda ratio: ratio <= 12,
    direction="a constant",
    paper="io_complexity",
)
def flash_over_bound():
    sizes = [4096, 8192, 16384, 32768]
    return max(words(io.flash, 2048, 64, M) / io.lower_bound(2048, 64, M) for M in sizes)


@claim(
    says="For M < d² another algorithm needs N²d/√M only",
    value=-0.5,
    unit="(exponent of M)",
    where="abstract; ours: N = 256, d = 64, M from 64 to d²",
    tolerance=0.12,
    paper="io_complexity",
)
def small_cache_exponent():
    sizes = [64, 128, 256, 512, 1024, 2048, 4096]
    return slope(sizes, [words(io.small_cache, 256, 64, M) for M in sizes])


@claim(
    says="For M < d² it moves fewer words than FlashAttention (ours: how many times fewer)",
    unit="×",
    where="abstract; ours: N = 1024, d = 128, M = d²/8",
    holds=lambda ratio: ratio > 1,
    direction="above 1",
    paper="io_complexity",
)
def small_cache_gain():
    return words(io.flash, 1024, 128, 2048) / words(io.small_cache, 1024, 128, 2048)


@claim(
    says="And that is optimal, too (ours: the largest ratio to the bound, for standard multiplication)",
    unit="× the bound",
    where="abstract; ours: N = 256, d = 64, M from 64 to d²",
    holds=lambda ratio: ratio <= 20,
    direction="a constant",
    paper="io_complexity",
)
def small_cache_over_bound():
    sizes = [64, 128, 256, 512, 1024, 2048, 4095]
    return max(words(io.small_cache, 256, 64, M) / io.lower_bound(256, 64, M) for M in sizes)


@claim(
    says="The regimes meet at M = Θ(d²)",
    value=2.0,
    unit="(exponent of d)",
    where="abstract; ours: N = 1024, d from 64 to 256",
    tolerance=0.1,
    why="the smaller d, the more the words of one key (2d) and of the scores (2N²) weigh",
    paper="io_complexity",
)
def crossover_exponent():
    dims = [64, 128, 256]
    return slope(dims, [io.crossover(1024, d) for d in dims])


@claim(
    says="Fast matrix multiplication does not help when M ≥ d² (ours: words with a level of Strassen, over the bound)",
    unit="× the bound",
    where="abstract; ours: N = 256, d = 32, M = d²",
    holds=lambda ratio: ratio >= 1,
    direction="at least 1",
    paper="io_complexity",
)
def strassen_over_bound():
    return words(small_cache_strassen, 256, 32, 1024) / io.lower_bound(256, 32, 1024)


@claim(
    says="The words that cross in an epoch determine the scores it completes (ours: share reproduced bit for bit)",
    value=1.0,
    where="the idea of the communication argument; ours: N = 32, d = 8, M = 64",
    tolerance=0.0,
    paper="io_complexity",
)
def replayed():
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 32, 8))
    (fast,) = io.run(io.flash, q, k, v, 64).machines
    pairs = [p for epoch in transcripts(fast) for p in zip(reproduce(epoch), epoch.tiles, strict=True)]
    return sum(int((ours == theirs).sum()) for ours, theirs in pairs) / 32**2


@claim(
    says="For usual d (64 to 128) d² is many times smaller than fast memory (ours: float16 words in an A100's shared "
    "memory, over the M from which FlashAttention wins, d = 128)",
    unit="×",
    where="FlashAttention, section 3.2",
    holds=lambda ratio: ratio > 2,
    direction="many times",
    paper="flash_attention_1",
)
def gpu_over_crossover():
    return SHARED_MEMORY["A100"] / 2 / io.crossover(1024, 128)
