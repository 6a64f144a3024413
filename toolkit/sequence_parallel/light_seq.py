"""LightSeq (DistFlashAttn): early ranks help late ones under a causal mask; checkpoints keep what attention gave.

Tokens lie in contiguous runs, so rank r has r + 1 blocks to compute and rank 0 only one. In step t a rank fetches the
keys of the rank t before it. A rank that has no such rank fetches instead the *queries* of the one that it would wrap
to, computes their block on its own keys, and sends the result home one step later. After the diagonal come T = P/2
steps, rounded down, not P - 1: the forward pass takes T + 1/2 blocks. Every array goes straight to its user.

Bytes, Q = those of one rank's q: keys and values of a block are 2·Q/g, a query and its result 2·Q and lse. Without
grouped heads helping is free on the wire: (P-1)·Q a rank, as without help. Backward 4·Q a block, either way.
Checkpoints keep a layer's input and attention's (out, lse). The rest of the layer is computed again; attention and its
messages are not.

Not in the paper's code: odd P. There every rank works in step T, and the last results come home in an exposed tail.
As in that code, helpers of the backward pass fetch out; delta instead would spare them a quarter of the bytes.
Source: Li, Shao et al. 2023, arXiv 2310.03294, and the code it publishes. Chapter: sequence_parallel/light_seq.
"""

from toolkit.kernels.attention import attention as attention_block
from toolkit.kernels.attention import attention_backward as backward_block
from toolkit.kernels.attention import delta, empty_accumulator, finish, merge
from toolkit.kernels.elementwise import accumulate
from toolkit.runtime.errors import ShapeError

from ._block import Attention
from ._light_seq_layers import layer, layer_backward
from ._light_seq_plan import HELP, OWN, Job, check_plan, schedule, used, users

__all__ = ["Job", "attention", "attention_backward", "messages", "pair", "run_layers", "schedule"]

FETCHED = {OWN: "keys and values", HELP: "queries"}  # what a job needs from another rank
RETURNED = {OWN: "key gradients", HELP: "results"}  # what goes back there
MODES = ("overlap", "sync", "nocomm")


def attention(comm, q, k, v, *, causal=True, return_lse=False, balanced=True, mode="overlap", plan=None):
    """Exact causal attention over the tokens of all ranks, for the queries of this one.

    q         (heads, tokens, head_dim)      this rank's run of the tokens, as many on every rank
    k, v      (kv_heads, tokens, head_dim)   same dtype; kv_heads divides heads
    balanced  False: own work only, the baseline
    mode      "overlap": what the next step needs travels while this one computes. "sync": first travel, then compute.
              "nocomm": nothing travels and own arrays stand in; it times the compute, and its numbers are wrong
    plan      another schedule than `schedule(P, balanced)`: see `_light_seq_plan`
    returns   out, shape and dtype of q; with return_lse also lse (heads, tokens), float32 or float64
    sends     the messages of `messages(P)`
    raises    ShapeError, DtypeError; ValueError for another mode, for a plan that leaves out a block or has it twice,
              and without a causal mask: helping assumes one
    """
    plan = checked(comm, causal, mode, plan) or schedule(comm.size, balanced)
    acc, here, returning = empty_accumulator(q), (k, v), nothing
    for step, jobs in enumerate(plan):
        fetching = fetch(comm, plan, step + 1, {OWN: (k, v), HELP: (q,)}, mode)
        (kind, *_), result = jobs[comm.rank], acc
        if kind == OWN:
            merge(acc, attention_block(q, *here, step == 0, return_lse=True))
        if kind == HELP:
            result = attention_block(*here, k, v, return_lse=True)
        take_in(acc, returning())  # computed for this rank one step ago
        here = fetching()
        returning = bring_home(comm, plan, step, {HELP: result}, mode)
    take_in(acc, returning())  # the tail, where P is odd
    return finish(acc, q) if return_lse else finish(acc, q)[0]


def attention_backward(
    comm, q, k, v, out, lse, grad_out, *, causal=True, balanced=True, mode="overlap", plan=None, wire_dtype=None
):
    """Gradients of `attention`, by the same schedule: what is fetched goes back, one step later, as its gradient.

    out, lse     what `attention(…, return_lse=True)` gave          grad_out   shape of out
    wire_dtype   dtype that gradients are rounded to on the way home
    returns      (dq, dk, dv), in float64 for float64 input and else float32
    sends        own work: (k, v) one way, (dk, dv) back. Helping: (q, out, lse, grad_out) one way, dq back
    raises       as `attention`
    """
    plan = checked(comm, causal, mode, plan) or schedule(comm.size, balanced)
    d, mail = delta(grad_out, out), {OWN: (k, v), HELP: (q, out, lse, grad_out)}
    here, returning = (k, v), nothing
    for step, jobs in enumerate(plan):
        fetching = fetch(comm, plan, step + 1, mail, mode)
        kind, *_ = jobs[comm.rank]
        if step == 0:
            dq, *dkv = backward_block(q, k, v, None, lse, grad_out, True, delta=d)
            totals = {OWN: dkv, HELP: [dq]}  # what others send home is added here
        leaving = dict(totals)
        if kind == OWN and step > 0:
            mine, *leaving[OWN] = backward_block(q, *here, None, lse, grad_out, delta=d)
            add(totals[HELP], [mine])
        if kind == HELP:
            theirs, *mine = backward_block(here[0], k, v, *here[1:])
            leaving[HELP] = [theirs]
            add(totals[OWN], mine)
        add_all(totals, returning())
        here = fetching()
        returning = bring_home(comm, plan, step, leaving, mode, wire_dtype)
    add_all(totals, returning())  # the tail: for the gradients of the last step's keys there always is one
    return *totals[HELP], *totals[OWN]


def take_in(acc, arrived):
    for _, result in arrived:
        merge(acc, result)


def add_all(totals, arrived):
    for kind, shares in arrived:
        add(totals[kind], shares)


def add(totals, shares):
    for total, share in zip(totals, shares, strict=True):
        accumulate(total, share)


# ---- messages: each goes straight from its owner to its user ---------------------------------------------------------


def fetch(comm, plan, step, mail, mode):
    """Start what `step` computes with.

    mail      kind of job -> arrays of this rank that such a job needs
    returns   a function that waits, and gives this rank's job of that step what it needs from another rank, or None
    """
    if step == len(plan):
        return lambda: None
    arriving = exchange(comm, users(plan[step], comm.rank), used(plan[step], comm.rank), mail, FETCHED, mode)

    def wait():
        arrived = arriving()
        return same_tokens(comm, mail[OWN][0], arrived[0][1]) if arrived else None

    return wait


def bring_home(comm, plan, step, mail, mode, wire=None):
    """Start what `step` gives back: `fetch` with the two sides exchanged. Returns a function: [(kind, arrays), …]."""
    return exchange(comm, used(plan[step], comm.rank), users(plan[step], comm.rank), mail, RETURNED, mode, wire)


def exchange(comm, dests, sources, mail, names, mode, wire=None):
    """Start messages to and from (rank, kind of job), of kinds with mail. Returns a function: [(kind, arrays), …]."""
    dests, sources = ([(rank, kind) for rank, kind in side if kind in mail] for side in (dests, sources))
    if mode == "nocomm":
        return lambda: [(kind, mail[kind]) for _, kind in sources]
    sending = [comm.isend(tuple(mail[kind]), rank, names[kind], wire=wire) for rank, kind in dests]
    receiving = [(kind, comm.irecv(rank, names[kind])) for rank, kind in sources]

    def wait():
        arrived = [(kind, message.wait()) for kind, message in receiving]
        for message in sending:
            message.wait()
        return arrived

    if mode == "sync":
        arrived = wait()
        return lambda: arrived
    return wait


def nothing():
    """Waits for no message."""
    return []


def messages(size, balanced=True):
    """Every message of `attention`, without data.

    returns   list of (step in which it is posted, source, dest, what): FETCHED and RETURNED have the names; results of
              step T, where P is odd, leave in a step T + 1 that computes nothing
    """
    found = []
    for step, jobs in enumerate(schedule(size, balanced)):
        for rank in range(size):
            for owner, kind in used(jobs, rank):
                found.append((step - 1, owner, rank, FETCHED[kind]))
                if kind == HELP:
                    found.append((step + 1, rank, owner, RETURNED[kind]))
    return sorted(found)


# ---- what is refused -------------------------------------------------------------------------------------------------


def checked(comm, causal, mode, plan):
    if not causal:
        raise ValueError(
            "light_seq: causal=False: without a mask no rank is idle, so none can help; use ring_attention"
        )
    if mode not in MODES:
        raise ValueError(f"light_seq: mode={mode!r} is not one of {', '.join(MODES)}")
    if plan is not None:
        check_plan(plan, comm.size)
    return plan


def same_tokens(comm, mine, arrived):
    if arrived[0].shape[1] != mine.shape[1]:
        raise ShapeError(
            f"light_seq: rank {comm.rank} holds {mine.shape[1]} tokens and fetched {arrived[0].shape[1]}: "
            f"pad the sequence to a multiple of {comm.size} tokens"
        )
    return arrived


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def pair(*, wire_dtype=None, **options):
    """LightSeq as the Attention of a block. Options: see `attention` and `attention_backward`."""

    def forward(comm, q, k, v):
        out, lse = attention(comm, q, k, v, return_lse=True, **options)
        return out, (q, k, v, out, lse)

    def backward(comm, saved, grad_out):
        return attention_backward(comm, *saved, grad_out, wire_dtype=wire_dtype, **options)

    return Attention(forward, backward)


def run_layers(comm, x, layers, loss, *, where, head_dim, checkpoint="remat_aware", attention=None):
    """A stack of transformer blocks, forward and backward.

    x            (tokens, h)   this rank's tokens           layers   weights of each block, see `_block`
    loss         y -> (losses, grad of y)                   where    (tokens,) global positions of this rank's tokens
    checkpoint   "none", "layer" or "remat_aware": see `layer`
    attention    an Attention; None: LightSeq. With "remat_aware" one that saves (q, k, v, out, lse)
    returns      (losses, dx, [gradients of a block's weights, …]), the last as this rank's share of the sum
    keeps        a layer: "layer" x; "remat_aware" x, out and lse
    raises       ShapeError, DtypeError; ValueError for another checkpoint, or an attention that it does not fit
    """
    if checkpoint not in ("none", "layer", "remat_aware"):
        raise ValueError(f"checkpoint={checkpoint!r} is not one of none, layer, remat_aware")
    how = pair() if attention is None else attention
    kept = []
    for weights in layers:
        x, its = layer(comm, weights, x, where, how, head_dim, checkpoint)
        kept.append(its)
    losses, grad = loss(x)
    grads = []
    for weights in reversed(layers):
        grad, share = layer_backward(comm, weights, kept.pop(), where, grad, how, head_dim, checkpoint)
        grads.insert(0, share)
    return losses, grad, grads
