"""Two rivals of the ladder: leave all-reduces out (desync residual), or hide them behind another micro-batch.

Desync: every rank goes on with a stream of its own. Where a module reduces, outputs are summed and streams averaged,
so that all ranks agree again; elsewhere a rank adds its own share only.
Interleaved: the batch in two halves. Exact, but every product has half the tokens, and weights are read twice.
Source: Zhang et al. 2025 and its code (desync). Chapter: model_parallel/ladder_residual.
"""

from toolkit.kernels.layers import add

from ._ladder_modules import add_share, fused_sum, isum

PATTERNS = {  # does module k of n reduce? Odd modules are MLPs; the last one always does
    "all": lambda k, n: True,
    "2x": lambda k, n: k % 2 == 1,
    "4x": lambda k, n: k % 4 == 3 or k == n - 1,
    "none": lambda k, n: False,  # the bound in speed: nothing is said, and what comes out is wrong
}


def reducing(name, count):
    """Modules, of `count`, that all-reduce under a pattern. ValueError: no such pattern."""
    if name not in PATTERNS:
        raise ValueError(f"desync_pattern={name!r}: choose from {', '.join(PATTERNS)}")
    return {k for k in range(count) if PATTERNS[name](k, count)}


def drift(comm, program, reduces, run, x):
    """The desync residual. Arguments and results as for `ladder_residual.climb`."""
    saved = []
    for k, module in enumerate(program):
        partial, kept = run(module, x)
        saved.append((kept, k))
        x = fused_sum(comm, add_share(partial, x, comm.size)) if k in reduces else add(x, partial)
    return x, saved


def drift_backward(comm, program, reduces, saved, run, g):
    """Gradient of the embedding's output: as many all-reduces as forward.

    Where ranks agreed, what each made of it afterwards adds up; after the last module, all made the same.
    """
    for k in reversed(range(len(program))):
        if k in reduces:
            total = g if k == len(program) - 1 else fused_sum(comm, g)
            g = add_share(run(program[k], saved[k][0], total), total, comm.size)
        else:
            g = add(g, run(program[k], saved[k][0], g))
    return fused_sum(comm, g)


def interleave(comm, program, run, halves):
    """The standard rule for two halves of a batch: one half's sum is on its way while the other half computes.

    halves   their embeddings; the rest as for `climb`
    returns  both streams; nothing is saved
    """
    streams, waiting, last = list(halves), [None, None], None
    for module in program:
        for i in range(2):
            if waiting[i] is not None:
                streams[i] = add(streams[i], waiting[i].wait())
            partial, _ = run(module, streams[i])
            waiting[i] = last = isum(comm, partial, after=last)
    return [add(x, sum_.wait()) for x, sum_ in zip(streams, waiting, strict=True)]


def timeline_interleaved(c_half, a_half):
    """The recurrence of `interleave`: finish, in seconds, from times of half a batch."""
    free, line, arrived = 0.0, 0.0, [0.0, 0.0]
    for c, a in zip(c_half, a_half, strict=True):
        for i in range(2):
            free = max(free, arrived[i]) + c
            line = arrived[i] = max(free, line) + a
    return line
