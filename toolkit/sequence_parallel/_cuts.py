"""Which rank gets which heads and tokens: lists of (start, stop), one for each rank.

Query heads go where the key head that they read goes. Chapter: sequence_parallel/ulysses.
"""

from itertools import pairwise

from toolkit.runtime.errors import ShapeError


def head_slices(heads, size):
    """(start, stop) of each rank's run of heads; when they do not divide, the first ranks get one more."""
    ends = [rank * (heads // size) + min(rank, heads % size) for rank in range(size + 1)]
    return list(pairwise(ends))


def even_slices(count, size, what):
    """`head_slices` where a remainder is a mistake."""
    if count % size:
        raise ShapeError(
            f"{count} {what} do not divide among {size} ranks: "
            "pad, or allow uneven runs (uneven=True, or cuts of your own)"
        )
    return head_slices(count, size)


def kv_slices(kv_heads, size, replicate=False, uneven=False):
    """The key heads of each rank.

    raises   ShapeError  fewer than ranks without `replicate`, or not a divisor of them; a remainder without `uneven`
    """
    if kv_heads >= size:
        return head_slices(kv_heads, size) if uneven else even_slices(kv_heads, size, "key heads")
    if not replicate:
        raise ShapeError(
            f"{kv_heads} key heads are too few for {size} ranks: use at most {kv_heads}, combine with ring attention "
            "(hybrid_attention), or pass replicate_kv=True, which sends each key head to several ranks"
        )
    if size % kv_heads:
        raise ShapeError(f"{size} ranks cannot share {kv_heads} key heads evenly: use a multiple of {kv_heads} ranks")
    return [(rank * kv_heads // size, rank * kv_heads // size + 1) for rank in range(size)]


def query_slices(heads, kv_heads, size, kv_cuts, uneven=False):
    """The query heads of each rank: those that read its key heads, or its part of those that read its one key head."""
    if heads % kv_heads:
        raise ShapeError(f"{heads} query heads cannot share {kv_heads} key heads: the second must divide the first")
    if kv_heads < size or not uneven:
        return even_slices(heads, size, "query heads")
    group = heads // kv_heads
    return [(start * group, stop * group) for start, stop in kv_cuts]


def token_slices(tokens, local, comm, uneven=False):
    """The tokens of each rank, as `positions("contiguous", …)` numbers them; this rank must hold `local` of them."""
    cuts = head_slices(tokens, comm.size) if uneven else even_slices(tokens, comm.size, "tokens")
    start, stop = cuts[comm.rank]
    if stop - start != local:
        raise ShapeError(
            f"rank {comm.rank} of {comm.size} holds {local} of {tokens} tokens, and contiguous runs give it "
            f"{stop - start}: shard them with layout='contiguous'"
        )
    return cuts
