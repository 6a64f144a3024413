"""Decoding one token at a time: the latent cache is read as it lies, by every head of every rank.

The up-projections are absorbed: keys' into the query, values' into the output. Nothing of the cache is expanded, so a
step reads rank + rope_dims words for each cached token, whatever the number of heads. Under tensor parallelism heads
are dealt out to the ranks; the latent serves all heads, so every rank keeps all of it. Key heads of a grouped layer
are dealt out, too, as long as there are enough.
"""

import numpy as np

from toolkit.attention._trans_mla_layers import GQA, MLA, rope
from toolkit.runtime import Cost, kernel, like, per_rank
from toolkit.runtime.errors import OutOfDeviceMemory, ShapeError

# ---- kernels; batch is the number of sequences, each with a cache of its own -----------------------------------------


def _product_sizes(spec, a, b):
    inputs, out = spec.split("->")
    sizes = {}
    for letters, array in zip(inputs.split(","), (a, b), strict=True):
        sizes |= dict(zip(letters, array.shape, strict=True))
    return sizes, tuple(sizes[letter] for letter in out)


def _product_cost(spec, a, b):
    sizes, out = _product_sizes(spec, a, b)
    return Cost(2 * np.prod(list(map(float, sizes.values()))), a.nbytes + b.nbytes + np.prod(out) * a.itemsize)


@kernel(cost=_product_cost, out=lambda spec, a, b: like(_product_sizes(spec, a, b)[1], a.dtype))
def product(spec, a, b):
    """np.einsum of two arrays, each index one of a matrix product's: 2 flops for each combination of indices."""
    return np.einsum(spec, a, b, optimize=True)


@kernel(cost=lambda x, theta, position: Cost(0, 2 * x.nbytes), out=lambda x, theta, position: like(x))
def turn(x, theta, position):
    """RoPE at one position; x (…, d)."""
    return rope(x[..., None, :], theta, position)[..., 0, :]


@kernel(cost=lambda cache, entry, position: Cost(0, 2 * entry.nbytes), out=lambda cache, entry, position: cache)
def remember(cache, entry, position):
    """Write one token's entry (…, d) into a cache (…, capacity, d), in place."""
    cache[..., position, :] = entry
    return cache


@kernel(cost=lambda gate, up: Cost(0, 3 * up.nbytes), out=lambda gate, up: like(up))
def gated(gate, up):
    """SwiGLU's middle: silu(gate) · up."""
    return gate / (1 + np.exp(-gate)) * up


def _latents_cost(q, turning_q, cache, head_dim):
    batch, heads, rank = q.shape
    _, tokens, words = cache.shape
    return Cost(2 * batch * heads * tokens * (words + rank), 2 * q.nbytes + turning_q.nbytes + cache.nbytes)


@kernel(cost=_latents_cost, out=lambda q, turning_q, cache, head_dim: like(q))
def attend_latents(q, turning_q, cache, head_dim):
    """One query a head against latents and rotating keys; the result is still a latent.

    q        (batch, heads, rank)   absorbed        turning_q   (batch, heads, rope_dims)
    cache    (batch, tokens, rank + rope_dims)      head_dim    whose root divides the scores
    returns  (batch, heads, rank)
    reads    every cached word once
    """
    scores = np.concatenate([q, turning_q], axis=-1) @ cache.swapaxes(1, 2) / np.sqrt(head_dim)
    return _softmax(scores) @ cache[..., : q.shape[2]]


def _groups_cost(q, k, v):
    batch, heads, head_dim = q.shape
    return Cost(4 * batch * heads * k.shape[2] * head_dim, 2 * q.nbytes + k.nbytes + v.nbytes)


@kernel(cost=_groups_cost, out=lambda q, k, v: like(q))
def attend_groups(q, k, v):
    """One query a head against cached keys and values; q (batch, heads, d), k, v (batch, kv_heads, tokens, d)."""
    grouped = q.reshape(len(q), k.shape[1], -1, q.shape[2])
    return (_softmax(grouped @ k.swapaxes(2, 3) / np.sqrt(q.shape[2])) @ v).reshape(q.shape)


def _softmax(scores):
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


# ---- one step of one layer, on every rank ----------------------------------------------------------------------------


def latent_step(comm, mla, x, cache, position):
    """The newest token's output, by this rank's heads and then summed over ranks.

    mla       this rank's share of the heads, of `shares`
    x         (batch, hidden)  the same on every rank
    cache     (batch, capacity, rank + rope_dims), changed in place: this rank's replica of all of it
    position  number of tokens before this one
    returns   (batch, hidden)
    sends     the all-reduce of the output
    """
    c = product("bi,ir->br", x, mla.down)
    turning_k = turn(product("bi,ir->br", x, mla.w_k_rope), mla.theta, position)
    rank = c.shape[1]
    remember(cache[..., :rank], c, position)
    remember(cache[..., rank:], turning_k, position)
    q = product("bhd,hrd->bhr", product("bi,hid->bhd", x, mla.w_q), mla.up_k)
    turning_q = turn(product("bi,hir->bhr", x, mla.w_q_rope), mla.theta, position)
    o = attend_latents(q, turning_q, cache[:, : position + 1], mla.w_q.shape[2])
    return comm.all_reduce(product("bhd,hdi->bi", product("bhr,hrd->bhd", o, mla.up_v), mla.w_o))


def grouped_step(comm, gqa, x, cache, position):
    """The same for a grouped layer; `cache` is keys and values, (batch, kv_heads, capacity, head_dim) each."""
    keys, values = cache
    remember(keys, turn(product("bi,hid->bhd", x, gqa.w_k), gqa.theta, position), position)
    remember(values, product("bi,hid->bhd", x, gqa.w_v), position)
    q = turn(product("bi,hid->bhd", x, gqa.w_q), gqa.theta, position)
    o = attend_groups(q, keys[:, :, : position + 1], values[:, :, : position + 1])
    return comm.all_reduce(product("bhd,hdi->bi", o, gqa.w_o))


def shares(layer, ranks):
    """Each rank's weights of a GQA or an MLA: heads dealt out, whatever serves all heads copied.

    returns  list of layers; a key head goes to several ranks when there are more ranks than key heads
    raises   ShapeError  heads, or key heads, do not deal out
    """
    heads = layer.w_q.shape[0]
    if heads % ranks:
        raise ShapeError(f"{heads} heads do not deal out to {ranks} ranks: take a number of ranks that divides {heads}")
    dealt = {"w_q", "w_q_rope", "up_k", "up_v", "w_o"}
    found = []
    for rank in range(ranks):
        mine = {name: _part(getattr(layer, name), rank, ranks) for name in dealt & set(layer._fields)}
        if isinstance(layer, GQA):
            mine |= {name: _part(getattr(layer, name), rank, ranks) for name in ("w_k", "w_v")}
        found.append(layer._replace(**mine))
    return found


def _part(w, rank, ranks):
    """Rank's heads along axis 0; where there are fewer heads than ranks, the one that it shares."""
    count = w.shape[0]
    if count % ranks and ranks % count:
        raise ShapeError(f"{count} key heads do not deal out to {ranks} ranks: one must divide the other")
    first = rank * count // ranks
    return w[first : first + max(1, count // ranks)]


def empty_cache(layer, batch, capacity, dtype=np.float64, make=np.zeros):
    """Room for `capacity` tokens; what `latent_step` or `grouped_step` of this (share of a) layer takes.

    make   `like` for a cache without data
    """
    if isinstance(layer, MLA):
        return make((batch, capacity, layer.down.shape[1] + layer.theta.size * 2), dtype)
    kv_heads, _, head_dim = layer.w_k.shape
    return tuple(make((batch, kv_heads, capacity, head_dim), dtype) for _ in "kv")


# ---- a whole model, by shapes ----------------------------------------------------------------------------------------


def llama_2_7b(rank=None, rope_dims=64, kv_heads=32):
    """Weights without data, float16: (layers, output matrix). 32 layers, hidden 4096, 32 heads of 128, MLP of 11008.

    rank   None: grouped attention with kv_heads (32 is the model as released); else MLA of that rank
    """

    def w(*shape):
        return like(shape, "float16")

    heads, hidden, d = 32, 4096, 128
    layers = []
    for _ in range(32):
        ends = w(heads, hidden, d), w(heads, d, hidden)
        if rank is None:
            mix = GQA(ends[0], w(kv_heads, hidden, d), w(kv_heads, hidden, d), ends[1], w(d // 2))
        else:
            turning = w(heads, hidden, rope_dims), w(hidden, rope_dims)
            up = w(heads, rank, d), w(heads, rank, d)
            mix = MLA(ends[0], *turning, w(hidden, rank), *up, ends[1], w(rope_dims // 2))
        layers.append((mix, (w(hidden, 11008), w(hidden, 11008), w(11008, hidden))))
    return tuple(layers), w(hidden, 32000)


def model_step(comm, model, x, caches, position):
    """One token through all layers. Norms and residual sums are left out: under 0.1 % of the bytes."""
    layers, unembedding = model
    for (mix, (gate, up, down)), cache in zip(layers, caches, strict=True):
        x = (latent_step if isinstance(mix, MLA) else grouped_step)(comm, mix, x, cache, position)
        inner = gated(product("bi,ij->bj", x, gate), product("bi,ij->bj", x, up))
        x = product("bi,ij->bj", inner, down)
    return product("bi,ij->bj", x, unembedding)


def decode_run(cluster, model, batch, context):
    """A shape-only run of one step on one device, for sequences of `context` tokens. OutOfDeviceMemory if too large."""
    caches = [empty_cache(mix, batch, context, "float16", like) for mix, _ in model[0]]
    return cluster.run(model_step, per_rank([model]), like((batch, 4096), "float16"), per_rank([caches]), context - 1)


def largest_batch(cluster, model, context):
    """(batch, run) of the most sequences that fit the device's memory together; (0, None) if none does."""

    def tried(batch):
        try:
            return decode_run(cluster, model, batch, context)
        except OutOfDeviceMemory:
            return None

    fits, best, beyond = 0, None, 1
    while run := tried(beyond):
        fits, best, beyond = beyond, run, 2 * beyond
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        if run := tried(middle):
            fits, best = middle, run
        else:
            beyond = middle
    return fits, best
