"""Kernels of linear attention over one rank's tokens: states, the masked part inside chunks, and their gradients.

A state is Σ kᵀ v, (heads, d_k, d_v). A rank's tokens may be cut into chunks of C: pairs inside a chunk are multiplied
out under the mask Ψ (ones on and below the diagonal), pairs of different chunks go through the states.

float16 is multiplied in 16 bits and summed in float32, as matrix units do; sums over tokens and states are float32 (or
float64 for float64). Costs: products are charged in full, the masked half of a chunk's square included; scores stay in
fast memory. The functions use what numpy's arrays and torch's tensors share, so they run on both.
Source: Sun et al. 2025, arXiv 2502.07563, algorithms 1 to 4. Chapter: sequence_parallel/lasp2.
"""

from math import e

import numpy as np

from toolkit.runtime.arrays import like
from toolkit.runtime.kernel import Cost, kernel

FEATURES = ("identity", "elu", "relu")

# ---- feature maps ----------------------------------------------------------------------------------------------------


def features(x, name):
    """φ(x), element by element: x itself, 1 + elu(x) or relu(x)."""
    return x if name == "identity" else feature_map(x, name)


@kernel(cost=lambda x, name: Cost(0, 2 * x.nbytes), out=lambda x, name: like(x))
def feature_map(x, name):
    """φ(x) for "elu" and "relu"."""
    positive = x.clip(0, None)
    return positive if name == "relu" else positive + e ** x.clip(None, 0)


def features_backward(x, grad, name):
    """Gradient of x, from that of φ(x). relu has slope 0 at 0."""
    return grad if name == "identity" else feature_map_backward(x, grad, name)


@kernel(cost=lambda x, grad, name: Cost(0, x.nbytes + 2 * grad.nbytes), out=lambda x, grad, name: like(grad))
def feature_map_backward(x, grad, name):
    """Gradient of x for "elu" and "relu"."""
    return grad * (x > 0) if name == "relu" else grad * e ** wide(x).clip(None, 0)


# ---- states ----------------------------------------------------------------------------------------------------------


def _states_shape(k, v, chunks=1):
    return k.shape[0], chunks, k.shape[2], v.shape[2]


def _states_cost(k, v, chunks=1):
    heads, _, dk, dv = _states_shape(k, v, chunks)
    return Cost(2 * k.size * dv, k.nbytes + v.nbytes + heads * chunks * dk * dv * width(v))


@kernel(cost=_states_cost, out=lambda k, v, chunks=1: like(_states_shape(k, v, chunks), accumulation(v)))
def chunk_states(k, v, chunks=1):
    """Kᵀ V of each chunk: (heads, chunks, d_k, d_v)."""
    return product(cut(k, chunks).swapaxes(2, 3), cut(v, chunks))


def total(states):
    """The state of all chunks together, (heads, d_k, d_v); of one chunk, a view."""
    return states[:, 0] if states.shape[1] == 1 else sum_of_chunks(states)


@kernel(cost=lambda states: Cost(0, states.nbytes + states[:, 0].nbytes), out=lambda states: like(states[:, 0]))
def sum_of_chunks(states):
    """(heads, chunks, d_k, d_v) -> (heads, d_k, d_v)."""
    return states.sum(1)


@kernel(
    cost=lambda states, start, stop: Cost(0, (stop - start + 1) * states[0].nbytes),
    out=lambda states, start, stop: like(states[0]),
)
def sum_of(states, start, stop):
    """Sum of the states of ranks start … stop - 1: (ranks, heads, d_k, d_v) -> (heads, d_k, d_v). Zeros for none."""
    return states[start:stop].sum(0)


# ---- attention to one's own tokens -----------------------------------------------------------------------------------


def _inside_cost(q, k, v, states=None):
    (heads, n, dk), dv, chunks = q.shape, v.shape[2], 1 if states is None else states.shape[1]
    within, between = n * (n // chunks) * (dk + dv), (n - n // chunks) * dk * dv
    moved = q.nbytes + k.nbytes + v.nbytes + v.size * width(v) + (states.nbytes if chunks > 1 else 0)
    return Cost(2 * heads * (within + between), moved)


@kernel(cost=_inside_cost, out=lambda q, k, v, states=None: like(v, accumulation(v)))
def inside(q, k, v, states=None):
    """Causal linear attention of a rank's queries to its own keys; it needs no message.

    states   what `chunk_states(k, v, chunks)` gave. None: one chunk, ((Q Kᵀ) ⊙ Ψ) V as the paper has it
    costs    2·n·C·(d_k + d_v) flops a head for chunks of C tokens, and 2·(n - C)·d_k·d_v through the states
    """
    chunks = 1 if states is None else states.shape[1]
    if fused := triton_kernels(q, v, chunks):
        return fused.inside(q, k, v, states)
    q, k, v = (cut(x, chunks) for x in (q, k, v))
    out = product(lower(product(q, k.swapaxes(2, 3))), v)
    if chunks > 1:
        out[:, 1:] += product(q[:, 1:], states.cumsum(1)[:, :-1])
    return joined(out)


def _inside_backward_cost(q, k, v, states, grad_states, grad):
    (heads, n, dk), dv, chunks = q.shape, v.shape[2], grad_states.shape[1]
    within, between = n * (n // chunks) * (3 * dk + 2 * dv), 3 * (n - n // chunks) * dk * dv
    moved = sum(x.nbytes for x in (q, k, v, grad)) + (2 * q.size + v.size) * width(v)
    return Cost(2 * heads * (within + between), moved + (2 * grad_states.nbytes if chunks > 1 else 0))


@kernel(
    cost=_inside_backward_cost,
    out=lambda q, k, v, states, grad_states, grad: tuple(like(x, accumulation(v)) for x in (q, k, v)),
)
def inside_backward(q, k, v, states, grad_states, grad):
    """(dq, dk, dv) of `inside`.

    states        what `inside` had; None will do for one chunk
    grad_states   `chunk_states(q, grad, chunks)`: the gradients that each chunk sends to the states before it
    """
    chunks = grad_states.shape[1]
    q, k, v, grad = (cut(x, chunks) for x in (q, k, v, grad))
    dv = product(lower(product(q, k.swapaxes(2, 3))).swapaxes(2, 3), grad)
    grad_scores = lower(product(grad, v.swapaxes(2, 3)))
    dq, dk = product(grad_scores, k), product(grad_scores.swapaxes(2, 3), q)
    if chunks > 1:
        past = states.cumsum(1)[:, :-1]
        future = (grad_states.sum(1)[:, None] - grad_states.cumsum(1))[:, :-1]
        dq[:, 1:] += product(grad[:, 1:], past.swapaxes(2, 3))
        dk[:, :-1] += product(v[:, :-1], future.swapaxes(2, 3))
        dv[:, :-1] += product(k[:, :-1], future)
    return joined(dq), joined(dk), joined(dv)


# ---- attention to another rank's tokens: what a ring computes -------------------------------------------------------


def _pairs_cost(q, k, v):
    pairs, dk, dv = q.shape[0] * q.shape[1] * k.shape[1], k.shape[2], v.shape[2]
    out = q.shape[0] * q.shape[1] * dv * width(v)
    return Cost(2 * pairs * (dk + dv), q.nbytes + k.nbytes + v.nbytes + out)


@kernel(cost=_pairs_cost, out=lambda q, k, v: like((*q.shape[:2], v.shape[2]), accumulation(v)))
def pairs(q, k, v):
    """(Q Kᵀ) V, the left product first: all pairs, no mask."""
    return product(product(q, k.swapaxes(1, 2)), v)


def _pairs_backward_cost(q, k, v, grad):
    pairs, dk, dv = q.shape[0] * q.shape[1] * k.shape[1], k.shape[2], v.shape[2]
    moved = sum(x.nbytes for x in (q, k, v, grad)) + (q.size + k.size + v.size) * width(v)
    return Cost(2 * pairs * (3 * dk + 2 * dv), moved)


@kernel(cost=_pairs_backward_cost, out=lambda q, k, v, grad: tuple(like(x, accumulation(v)) for x in (q, k, v)))
def pairs_backward(q, k, v, grad):
    """(dq, dk, dv) of `pairs`."""
    grad_scores = product(grad, v.swapaxes(1, 2))
    dv = product(product(k, q.swapaxes(1, 2)), grad)
    return product(grad_scores, k), product(grad_scores.swapaxes(1, 2), q), dv


# ---- attention through a state ---------------------------------------------------------------------------------------


def _through_cost(x, state):
    return Cost(2 * x.size * state.shape[2], x.nbytes + state.nbytes + _through_size(x, state) * width(x))


def _through_size(x, state):
    return x.shape[0] * x.shape[1] * state.shape[2]


@kernel(cost=_through_cost, out=lambda x, state: like((*x.shape[:2], state.shape[2]), accumulation(x)))
def through(x, state):
    """x @ state: what queries read from a state."""
    return product(x, state)


@kernel(
    cost=lambda out, x, state: Cost(2 * x.size * state.shape[2], x.nbytes + state.nbytes + 2 * out.nbytes, x.dtype),
    out=lambda out, x, state: out,
)
def add_through(out, x, state):
    """out += x @ state, in place."""
    if fused := triton_kernels(x, out):
        return fused.add_through(out, x, state)
    out += product(x, state)
    return out


# ---- the normaliser --------------------------------------------------------------------------------------------------


@kernel(cost=lambda v: Cost(0, 2 * v[:, :, :1].nbytes), out=lambda v: like(v[:, :, :1]))
def ones(v):
    """(heads, tokens, 1): the extra value whose weighted sum is the normaliser."""
    return v[:, :, :1] * 0 + 1


def finish(sums, v, normalise):
    """The result in the dtype of v: the sums, or the sums over their last column."""
    return sums if sums.dtype == v.dtype and not normalise else rounded(sums, v, normalise)


def _rounded_out(sums, v, normalise):
    return like((*sums.shape[:2], sums.shape[2] - normalise), v.dtype)


@kernel(cost=lambda sums, v, normalise: Cost(0, sums.nbytes + sums.size * v.dtype.itemsize), out=_rounded_out)
def rounded(sums, v, normalise):
    """`finish` where there is something to do."""
    return narrow(sums[:, :, :-1] / sums[:, :, -1:] if normalise else sums, v)


@kernel(
    cost=lambda grad, sums: Cost(0, grad.nbytes + 2 * sums.nbytes),
    out=lambda grad, sums: (like((*sums.shape[:2], sums.shape[2] - 1), sums.dtype), like(sums[:, :, :1])),
)
def finish_backward(grad, sums):
    """Gradients of the numerators and of the normaliser."""
    scaled = wide(grad) / sums[:, :, -1:]
    return scaled, -(scaled * sums[:, :, :-1] / sums[:, :, -1:]).sum(2)[:, :, None]


# ---- numpy's arrays and torch's tensors ------------------------------------------------------------------------------


def accumulation(x):
    """The dtype that sums are kept in: float64 for float64 and else float32."""
    return np.dtype("float64" if x.dtype.itemsize == 8 else "float32")


def width(x):
    """Bytes of a number of that dtype."""
    return accumulation(x).itemsize


def wide(x):
    """float16 as float32; anything else as it is."""
    if x.itemsize > 2:
        return x
    return x.astype("float32") if hasattr(x, "astype") else x.float()


def narrow(x, template):
    """x in the dtype of the template."""
    return x.astype(template.dtype, copy=False) if hasattr(x, "astype") else x.to(template.dtype)


def product(a, b):
    """a @ b, summed in float32 or more. A GPU multiplies 16 bits by 16 and sums so by itself; numpy does not."""
    if hasattr(a, "astype"):
        return wide(a) @ wide(b)
    narrower = b if b.itemsize < a.itemsize else a
    return wide(narrow(a, narrower) @ narrow(b, narrower))


def triton_kernels(q, v, chunks=1):
    """The module of fused kernels, where such tensors lie on a GPU and fit them; else None."""
    if not getattr(q, "is_cuda", False):
        return None
    from toolkit.kernels import _gpu_linear

    return _gpu_linear if _gpu_linear.fits(q, v, chunks) else None


def lower(scores):
    """Times Ψ: entries above the diagonal become 0. Not -∞, which is for scores that go into an exponential."""
    return scores.tril() if hasattr(scores, "tril") else np.tril(scores)


def cut(x, chunks):
    """(heads, tokens, d) -> (heads, chunks, C, d)."""
    return x.reshape(x.shape[0], chunks, x.shape[1] // chunks, x.shape[2])


def joined(x):
    """The inverse of `cut`."""
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], x.shape[3])
