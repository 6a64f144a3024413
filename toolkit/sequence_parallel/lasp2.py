"""LASP-2: linear attention needs one all-gather of a small state, whatever the length of the sequence.

Without softmax, what a rank's queries need of all earlier tokens is one matrix a head, the state Σ kᵀ v. Every rank
computes its own at once; one all-gather brings them together while each rank attends to its own tokens. The backward
pass does the same with the gradients of the states. LASP-1, before it, handed a running sum from rank to rank: fewer
bytes, but N-1 messages that wait for each other. The two differ in one function, the `exchange`.
In hybrid models, softmax layers gather keys and values instead (LASP-2H).

Bytes a rank sends, S = bytes of a state, heads · d_k · d_v numbers: (N-1)·S forward and as much backward; LASP-1 S.
Each rank holds one run of the tokens; with linear attention alone, the runs may differ in length.
Ours: several chunks a rank, linked by its own states before anything travels; the normaliser; the direct all-gather.
Sources: Sun et al. 2025, arXiv 2502.07563; LASP-1: Sun et al. 2024, arXiv 2404.02882. Chapter: sequence_parallel/lasp2.
"""

import numpy as np

from toolkit.kernels.attention import attention as softmax
from toolkit.kernels.attention import attention_backward as softmax_backward
from toolkit.kernels.attention import empty_accumulator
from toolkit.runtime.algorithms import combine, concatenate
from toolkit.runtime.communicator import Communicator
from toolkit.runtime.errors import ShapeError
from toolkit.runtime.layout import LAYOUTS

from ._lasp2_kernels import (
    FEATURES,
    add_through,
    chunk_states,
    features,
    features_backward,
    finish,
    finish_backward,
    inside,
    inside_backward,
    ones,
    sum_of,
    through,
    total,
)
from ._lasp2_time import predict_time as predict_time

# ---- the exchange: what arrives of the other ranks' states ----------------------------------------------------------


def gathered(comm, state, want, gather=Communicator.all_gather):
    """LASP-2: all states come to every rank, in one all-gather; it adds up those that it wants.

    state     (heads, d_k, d_v)   this rank's
    want      "before", "after" or "all": the states of which ranks
    gather    (comm, x) -> x of all ranks along axis 0. For nodes of several ranks: `_two_level.all_gather`
    returns   (heads, d_k, d_v), their sum; zeros for none
    """
    wanted = {"before": (0, comm.rank), "after": (comm.rank + 1, comm.size), "all": (0, comm.size)}
    return sum_of(gather(comm, state[None]), *wanted[want])


def handed_on(comm, state, want):
    """LASP-1: the sum so far arrives, this rank's state is added, the new sum goes on to the next rank.

    Without a mask a sum goes each way, both at the same time. Arguments and result as `gathered`.
    """
    if want == "all":
        after = comm.spawn(handed_on, comm, state, "after")
        return combine(combine(handed_on(comm, state, "before"), state), after.wait())
    by = 1 if want == "before" else -1
    source, dest, ranks = comm.rank - by, comm.rank + by, range(comm.size)
    found = comm.recv(source, tag="state") if source in ranks else None
    if dest in ranks:
        comm.isend(state if found is None else combine(found, state), dest, tag="state")
    return sum_of(state[None], 0, 0) if found is None else found


def direct_all_gather(comm, x):
    """An all-gather in one step: everybody sends to everybody, and no message waits for another."""
    others = [rank for rank in range(comm.size) if rank != comm.rank]
    sending = [comm.isend(x, rank, tag="all_gather") for rank in others]
    coming = {rank: comm.irecv(rank, tag="all_gather") for rank in others}
    parts = tuple(coming[rank].wait() if rank in coming else x for rank in range(comm.size))
    for sent in sending:
        sent.wait()
    return concatenate(parts)


# ---- linear attention ------------------------------------------------------------------------------------------------


def attention(comm, q, k, v, *, causal=True, layout="contiguous", feature_map="identity", normalise=False,
              chunks_per_rank=1, exchange=gathered, return_saved=False):  # fmt: skip
    """Linear attention over the tokens of all ranks: o_i = Σ_j φ(q_i)·φ(k_j) v_j, over j <= i if causal.

    q, k             (heads, tokens, d_k)   this rank's tokens
    v                (heads, tokens, d_v)   the same heads, tokens and dtype
    layout           which tokens those are: contiguous under the mask, anything without it
    feature_map      φ: "identity", "elu" (1 + elu) or "relu"
    normalise        divide by Σ_j φ(q_i)·φ(k_j). Needs "elu", whose features are positive
    chunks_per_rank  more of them, less work inside them; divides the tokens. Same result and bytes
    exchange         (comm, state, want) -> sum of states, such as `gathered`
    returns          (heads, tokens, d_v) in v's dtype; with return_saved also what `attention_backward` needs
    sends            states: heads·d_k·d_v numbers, one more column with normalise; float64 for float64 and else float32
    raises           ShapeError
    """
    _check(q, k, v, causal, layout, feature_map, normalise, chunks_per_rank)
    fq, fk, fv = features(q, feature_map), features(k, feature_map), with_ones(v, normalise)
    states = chunk_states(fk, fv, chunks_per_rank)
    coming = comm.spawn(exchange, comm, total(states), "before" if causal else "all")
    if causal:
        sums = inside(fq, fk, fv, states)  # while states travel
        past = coming.wait()
        add_through(sums, fq, past)
    else:
        past = coming.wait()
        sums = through(fq, past)
    out = finish(sums, v, normalise)
    return (out, (past, sums if normalise else None)) if return_saved else out


def attention_backward(comm, q, k, v, saved, grad_out, *, causal=True, layout="contiguous", feature_map="identity",
                       normalise=False, chunks_per_rank=1, exchange=gathered):  # fmt: skip
    """Gradients of `attention`: those of the states travel, and later ranks' matter now.

    saved      what `attention(…, return_saved=True)` gave      grad_out   shape of the result
    returns    (dq, dk, dv), in float64 for float64 input and else float32
    sends      as `attention`
    raises     ShapeError
    """
    _check(q, k, v, causal, layout, feature_map, normalise, chunks_per_rank)
    past, sums = saved
    grad = concatenate(finish_backward(grad_out, sums), axis=2) if normalise else grad_out
    fq, fk, fv = features(q, feature_map), features(k, feature_map), with_ones(v, normalise)
    grad_states = chunk_states(fq, grad, chunks_per_rank)
    coming = comm.spawn(exchange, comm, total(grad_states), "after" if causal else "all")
    if causal:
        states = chunk_states(fk, fv, chunks_per_rank) if chunks_per_rank > 1 else None
        dq, dk, dv = inside_backward(fq, fk, fv, states, grad_states, grad)
        add_through(dq, grad, past.swapaxes(1, 2))
        future = coming.wait()
        add_through(dk, fv, future.swapaxes(1, 2))
        add_through(dv, fk, future)
    else:
        dq = through(grad, past.swapaxes(1, 2))
        future = coming.wait()
        dk, dv = through(fv, future.swapaxes(1, 2)), through(fk, future)
    return (
        features_backward(q, dq, feature_map),
        features_backward(k, dk, feature_map),
        dv[:, :, :-1] if normalise else dv,
    )


def lasp1_attention(comm, q, k, v, **options):
    """LASP-1: `attention`, its states handed on from rank to rank. Sends one state, two without a mask."""
    return attention(comm, q, k, v, exchange=handed_on, **options)


def lasp1_attention_backward(comm, q, k, v, saved, grad_out, **options):
    """Gradients of `lasp1_attention`: sums of the states' gradients travel from the last rank down."""
    return attention_backward(comm, q, k, v, saved, grad_out, exchange=handed_on, **options)


def recurrent_oracle(q, k, v, feature_map="identity", normalise=False):
    """The same on one device, token by token: s_n = s_{n-1} + φ(k_n)ᵀ v_n, o_n = φ(q_n) s_n. Causal."""
    q, k, v = features(q, feature_map), features(k, feature_map), with_ones(v, normalise)
    state, out = np.zeros((k.shape[0], k.shape[2], v.shape[2]), v.dtype), np.empty(v.shape, v.dtype)
    for n in range(k.shape[1]):
        state += k[:, n, :, None] * v[:, n, None, :]
        out[:, n] = (q[:, n, None, :] @ state)[:, 0]
    return out[:, :, :-1] / out[:, :, -1:] if normalise else out


# ---- LASP-2H: the softmax layers of a hybrid model -------------------------------------------------------------------


def softmax_attention(comm, q, k, v, *, causal=True, layout="contiguous", return_lse=False):
    """Exact softmax attention: gather all keys and values, attend to those of ranks up to one's own if causal.

    q, k, v   as for `ring_attention.attention`, in the contiguous layout; the same number of tokens on every rank
    sends     (N-1) times the bytes of k and v, in two all-gathers
    work      under the mask, rank r attends to r + 1 runs: the last rank works longest
    raises    ShapeError, DtypeError
    """
    k, v = _everybodys(comm, k, v)
    seen = _seen(comm, q, k, causal, layout)
    return softmax(q, k[:, :seen], v[:, :seen], causal, return_lse)


def softmax_attention_backward(comm, q, k, v, out, lse, grad_out, *, causal=True, layout="contiguous"):
    """Gradients (dq, dk, dv) of `softmax_attention`; those of all keys and values are reduce-scattered.

    out, lse   what `softmax_attention(…, return_lse=True)` gave
    sends      (N-1) times the bytes of k and v, and of their float32 (or float64) gradients
    """
    k, v = _everybodys(comm, k, v)
    seen, n = _seen(comm, q, k, causal, layout), q.shape[1]
    dq, *grads = softmax_backward(q, k[:, :seen], v[:, :seen], out, lse, grad_out, causal)
    nothing = empty_accumulator(k[:, :n])[0] if seen < comm.size * n else None  # what later ranks' keys get
    runs = ([x[:, i : i + n] if i < seen else nothing for i in range(0, comm.size * n, n)] for x in grads)
    return dq, *(comm.reduce_scatter(parts) for parts in runs)


def _everybodys(comm, k, v):
    coming = [comm.iall_gather(x, axis=1) for x in (k, v)]
    return [x.wait() for x in coming]


def _seen(comm, q, k, causal, layout):
    """How many of all keys this rank's queries see, the first ones."""
    _check_layout(causal, layout)
    if k.shape[1] != comm.size * q.shape[1]:
        raise ShapeError(f"{k.shape[1]} tokens on {comm.size} ranks, {q.shape[1]} here: give each rank the same number")
    return (comm.rank + 1 if causal else comm.size) * q.shape[1]


# ---- the pieces ------------------------------------------------------------------------------------------------------


def with_ones(v, normalise):
    """[v | 1] when the sum of the weights is wanted too: it travels in the same state."""
    return concatenate((v, ones(v)), axis=2) if normalise else v


def _check_layout(causal, layout):
    if layout not in LAYOUTS or (causal and layout != "contiguous"):
        raise ShapeError(f"layout {layout!r}: under the mask a rank must hold a run of tokens, layout='contiguous'")


def _check(q, k, v, causal, layout, feature_map, normalise, chunks):
    """Refuse what the kernels cannot take, and say what was given."""
    if not isinstance(causal, (bool, np.bool_)):
        raise ShapeError(
            f"causal is a {type(causal).__name__}, not True or False: a mask of linear attention multiplies, and there "
            "is no softmax that would turn an added -inf into 0"
        )
    _check_layout(causal, layout)
    if not q.ndim == k.ndim == v.ndim == 3 or q.shape != k.shape or k.shape[:2] != v.shape[:2]:
        raise ShapeError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be (heads, tokens, d): the same heads "
            "and tokens, and q as wide as k"
        )
    if feature_map not in FEATURES:
        raise ShapeError(f"feature_map {feature_map!r} is not one of {', '.join(FEATURES)}")
    if normalise and feature_map != "elu":
        raise ShapeError(f"features {feature_map!r} may sum to 0: normalise=True needs feature_map='elu'")
    if not isinstance(chunks, int) or chunks < 1 or k.shape[1] % chunks:
        raise ShapeError(f"{k.shape[1]} tokens of a rank do not divide into {chunks} chunks")
