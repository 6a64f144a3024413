"""Where does which method win? The forward pass of attention in closed form, ring against Ulysses, on one switch.

With P ranks of n tokens, H query heads that share Hkv key heads by g = H / Hkv, e bytes a number, flops F and memory
bandwidth M attained, and β bytes/s from each rank into the switch, a rank spends

    c = 4 H n² d / F              on the block of its queries and one rank's keys; half of it under a zigzag mask
    t = 2 Hkv n d e / β           on passing keys and values on
    m = H n d (2·4 + e) / M       on merging a block's result into a float32 accumulator
    x = (P-1)/P · (2H + 2Hkv) n d e / β      on four all-to-alls, and j = 2 (2H + 2Hkv) n d e / M on joining what came;
                                  with fewer key heads than ranks, each is sent to several: P for Hkv

Latency, launches, lse and the accumulator's beginning and end are left out.
Chapter: sequence_parallel/which_sequence_parallelism.
"""

from typing import NamedTuple


class Attention(NamedTuple):
    """One attention over P ranks."""

    ranks: int
    tokens: int  # of one rank
    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int = 2
    causal: bool = True  # zigzag: half of each block is visible


class Machine(NamedTuple):
    """What kernels attain, and one rank's port into the switch."""

    flops: float  # operations/s
    memory: float  # bytes/s
    port: float  # bytes/s, each way


def block_seconds(a, machine):
    """c: one rank's queries on one rank's keys."""
    return (2 if a.causal else 4) * a.heads * a.tokens**2 * a.head_dim / machine.flops


def shift_seconds(a, machine):
    """t: one rank's keys and values to its neighbour."""
    return 2 * a.kv_heads * a.tokens * a.head_dim * a.itemsize / machine.port


def merge_seconds(a, machine):
    """m: one block's result into the accumulator."""
    return a.heads * a.tokens * a.head_dim * (8 + a.itemsize) / machine.memory


def swap_seconds(a, machine):
    """x + j: heads for tokens and back, sent and joined."""
    swapped = 2 * (a.heads + max(a.kv_heads, a.ranks)) * a.tokens * a.head_dim * a.itemsize
    return (a.ranks - 1) / a.ranks * swapped / machine.port + 2 * swapped / machine.memory


def ring_seconds(a, machine):
    """A block at once, then P-1 steps that take what is longer, computing or passing on."""
    step = block_seconds(a, machine) + merge_seconds(a, machine)
    return step + (a.ranks - 1) * max(step, shift_seconds(a, machine))


def ulysses_seconds(a, machine):
    """The same products without a merge, after and before swaps that nothing hides."""
    return a.ranks * block_seconds(a, machine) + swap_seconds(a, machine)


def crossover(ranks, group):
    """c / t at which ring and Ulysses tie where links bound the ring and memory is free; below it Ulysses wins.

    From P c + x = c + (P-1) t with x = (P-1)/P · (1 + g) t, for at least as many key heads as ranks. Not above 0: the
    ring wins at every length.
    """
    return 1 - (1 + group) / ranks


def crossover_tokens(ranks, group, machine, itemsize=2, causal=True):
    """Tokens of a rank at which c / t is `crossover`: fewer, and Ulysses wins."""
    return crossover(ranks, group) * itemsize * machine.flops / ((1 if causal else 2) * group * machine.port)


def crossover_port(ranks, group, machine, itemsize=2):
    """Bytes/s of a port above which Ulysses wins however long the sequence: swapping is cheaper than merging.

    From x + j = P m, where computing hides the ring's messages; tokens and heads fall out. None: merging never costs
    as much as joining does.
    """
    swapped = 2 * (1 + 1 / group) * itemsize
    spare = ranks * (8 + itemsize) - 2 * swapped
    return (ranks - 1) / ranks * swapped * machine.memory / spare if spare > 0 else None
