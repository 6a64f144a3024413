"""A top-1 mixture of experts as one rank runs it: attention over a cache of many sequences, a gate, grouped experts.

Tokens are rows (n, h); beside them stand integer arrays that say which sequence each row belongs to, where it stands,
and which expert it wants. Those are known in a shape-only run too, where routes are given instead of computed.
Chapter: model_parallel/ex_flow.
"""

from dataclasses import dataclass

import numpy as np

from toolkit.kernels.layers import linear, rms_norm
from toolkit.runtime.arrays import like
from toolkit.runtime.kernel import Cost, kernel


@dataclass(frozen=True)
class Shape:
    """Sizes of a model with one mixture a layer. width h, hidden f of an expert."""

    vocabulary: int
    layers: int
    width: int
    heads: int
    hidden: int
    experts: int


def weights(random, shape, dtype="float64"):
    """Parameters of the whole model; shape-only if `random` is None.

    returns   {"embedding" (V, h), "layers": [{"norm_1", "norm_2" (h,), "q", "k", "v", "o" (h, h), "router" (h, E),
              "expert_up" (E, h, f), "expert_down" (E, f, h)}, …], "norm" (h,), "head" (h, V)}
    """
    h, f, e = shape.width, shape.hidden, shape.experts

    def drawn(*size):
        if random is None:
            return like(size, dtype)
        return (random.standard_normal(size) / size[-2] ** 0.5).astype(dtype)

    def gain():
        return like((h,), dtype) if random is None else np.ones(h, dtype)

    def layer():
        square = {name: drawn(h, h) for name in "qkvo"}
        experts = {"router": drawn(h, e), "expert_up": drawn(e, h, f), "expert_down": drawn(e, f, h)}
        return {"norm_1": gain(), "norm_2": gain(), **square, **experts}

    layers = [layer() for _ in range(shape.layers)]
    table, head = drawn(shape.vocabulary, h), drawn(h, shape.vocabulary)
    return {"embedding": table, "layers": layers, "norm": gain(), "head": head}


# ---- attention over a cache ------------------------------------------------------------------------------------------


def project(layer, x, where, heads):
    """(q (n, h), keys and values (n, 2h)) of tokens at positions `where` (n,); rotary."""
    normed = rms_norm(x, layer["norm_1"])
    q, k, v = (linear(normed, layer[name]) for name in "qkv")
    return turned(q, where, heads), beside(turned(k, where, heads), v)


@kernel(cost=lambda x, where, heads: Cost(0, 2 * x.nbytes), out=lambda x, where, heads: like(x))
def turned(x, where, heads):
    """Rotary positions for rows (n, heads · head_dim): plane l of a head is its channels (l, l + head_dim/2)."""
    half = x.shape[1] // heads // 2
    a, b = np.moveaxis(x.reshape(len(x), heads, 2, half), 2, 0)
    angle = where[:, None, None] * 10_000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack((a * cos - b * sin, a * sin + b * cos), axis=2).reshape(x.shape).astype(x.dtype, copy=False)


@kernel(cost=lambda k, v: Cost(0, 4 * k.nbytes), out=lambda k, v: like((len(k), 2 * k.shape[1]), k.dtype))
def beside(k, v):
    return np.concatenate((k, v), axis=1)


@kernel(cost=lambda cache, pairs, sequence, where: Cost(0, 2 * pairs.nbytes), out=lambda cache, *_: cache)
def store(cache, pairs, sequence, where):
    """Write keys and values (n, 2h) into a cache (sequences, positions, 2h), in place."""
    cache[sequence, where] = pairs
    return cache


def _attend_cost(q, cache, sequence, where, heads):
    seen = int(where.sum()) + len(where)  # pairs of a query and a key
    return Cost(4 * seen * q.shape[1], 2 * q.nbytes + seen * cache.shape[2] * cache.dtype.itemsize, kind="attention")


@kernel(cost=_attend_cost, out=lambda q, *_: like(q))
def attend(q, cache, sequence, where, heads):
    """Softmax attention of each row (n, h) over its own sequence, up to and with its own position."""
    out = np.empty_like(q)
    for row, (s, last) in enumerate(zip(sequence, where, strict=True)):
        k, v = np.split(cache[s, : last + 1].reshape(last + 1, 2 * heads, -1), 2, axis=1)
        scores = np.einsum("hd,nhd->hn", q[row].reshape(heads, -1), k) * (q.shape[1] // heads) ** -0.5
        share = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[row] = np.einsum("hn,nhd->hd", share / share.sum(axis=1, keepdims=True), v).ravel()
    return out


# ---- gate and experts ------------------------------------------------------------------------------------------------


def _gate_out(normed, router, forced=None):
    if forced is None:
        raise ValueError("a shape-only run has no gate to ask: give the routes")
    return forced, like((len(normed),), normed.dtype)


@kernel(
    cost=lambda normed, router, forced=None: Cost(
        2 * len(normed) * router.size, normed.nbytes + router.nbytes, kind="matmul"
    ),
    out=_gate_out,
)
def gate(normed, router, forced=None):
    """(expert (n,), its probability (n,)): the likeliest, or the one that `forced` (n,) names."""
    scores = normed @ router
    share = np.exp(scores - scores.max(axis=1, keepdims=True))
    share /= share.sum(axis=1, keepdims=True)
    expert = share.argmax(axis=1) if forced is None else forced
    return expert, share[np.arange(len(normed)), expert]


def _experts_cost(x, local, up, down):
    """Each expert that has a token is read once."""
    _, h, f = up.shape
    return Cost(4 * len(x) * h * f, 2 * x.nbytes + 2 * len(np.unique(local)) * h * f * up.dtype.itemsize, kind="matmul")


@kernel(cost=_experts_cost, out=lambda x, *_: like(x))
def experts(x, local, up, down):
    """Each row through its expert: down(gelu(up(x))). local (n,): which of this rank's experts, up (E/G, h, f)."""
    out = np.empty_like(x)
    for e in np.unique(local):
        raised = x[local == e] @ up[e]
        active = 0.5 * raised * (1 + np.tanh((2 / np.pi) ** 0.5 * (raised + 0.044715 * raised**3)))
        out[local == e] = active @ down[e]
    return out


# ---- rows ------------------------------------------------------------------------------------------------------------


@kernel(
    cost=lambda x, rows: Cost(0, 2 * len(rows) * x.shape[1] * x.dtype.itemsize),
    out=lambda x, rows: like((len(rows), x.shape[1]), x.dtype),
)
def take(x, rows):
    """Some rows of (n, h)."""
    return x[rows]


@kernel(cost=lambda x, rows, n: Cost(0, 2 * x.nbytes), out=lambda x, rows, n: like((n, x.shape[1]), x.dtype))
def spread(x, rows, n):
    """The adjoint of `take`: (n, h) with these rows, zero elsewhere."""
    out = np.zeros((n, x.shape[1]), x.dtype)
    out[rows] = x
    return out


@kernel(cost=lambda x, y, weight: Cost(0, 3 * x.nbytes), out=lambda x, y, weight: like(x))
def add_weighted(x, y, weight):
    """x + weight · y: an expert's output joins the stream. weight (n,)."""
    return x + weight[:, None] * y
