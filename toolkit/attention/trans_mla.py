"""TransMLA: rewrite grouped-query attention as latent attention, so that a token caches one short vector for all heads.

Exact part. Key heads that g query heads share are one low-rank matrix: replicate the weights instead of the
activations, factor them, cache the factor's input. Same cache, same function, and up-projections that may now differ
from head to head. No grouped layer of the same cache computes what they can, with two exceptions (ours, not the
paper's): a key head for every query head, and one key head without RoPE, where queries and outputs absorb everything.

Practical part. RoPE turns plane l of every key head by the same angle, so an orthogonal mixture of the heads, one
for each plane, commutes with it (RoRoPE). Principal components gather the energy in one virtual head. Only that one
keeps its RoPE, which is the lossy step; all other keys and the values are compressed together to `rank` numbers.

Words cached a token and layer: 2 · kv_heads · head_dim before, rank + rope_dims after. Weights are stored by head:
queries are x @ w_q, (heads, tokens, head_dim). Plane l of a head is its coordinates l and l + head_dim / 2, here also
written as one complex number. The authors damp their second moments by 1 % of the mean; that shifts all eigenvalues
alike and moves no eigenvector, so it is left out.
Source: Meng et al. 2025, arXiv 2502.07864, and the code it publishes. Chapter: attention/trans_mla.
"""

import numpy as np

from toolkit.runtime.errors import ShapeError

from ._trans_mla_layers import GQA, MLA, FactoredKV, group_size, side_by_side

# ---- the exact conversion --------------------------------------------------------------------------------------------


def replicate(w, heads):
    """Key or value weights repeated for each query head: (kv_heads, hidden, d) -> (heads, hidden, d).

    raises   ShapeError  kv_heads does not divide heads
    """
    return np.repeat(w, group_size(heads, w.shape[0]), axis=0)


def factored(w, heads, rank=None):
    """Down- and up-projection of replicated weights by their singular values, each with a square root of them.

    w        (kv_heads, hidden, head_dim)
    rank     kv_heads · head_dim by default, which is exact; less is the best approximation of its rank
    returns  (hidden, rank), (heads, rank, head_dim)
    raises   ShapeError  rank beyond kv_heads · head_dim, or kv_heads does not divide heads
    """
    wide = side_by_side(replicate(w, heads))
    most = w.shape[0] * w.shape[2]
    rank = most if rank is None else rank
    if not 0 < rank <= most:
        raise ShapeError(f"rank {rank} is not in 1 … {most}: {w.shape[0]} key heads of {w.shape[2]} have no more")
    u, s, vt = np.linalg.svd(wide, full_matrices=False)
    root = np.sqrt(s[:rank])
    return u[:, :rank] * root, _by_head(root[:, None] * vt[:rank], heads)


def exact(gqa, rank=None):
    """The same function with latents, by singular values: balanced factors, a good start for training.

    rank     numbers cached for keys, and as many for values; kv_heads · head_dim by default, which is exact
    returns  FactoredKV
    raises   ShapeError
    """
    heads = gqa.w_q.shape[0]
    return FactoredKV(gqa.w_q, *factored(gqa.w_k, heads, rank), *factored(gqa.w_v, heads, rank), gqa.w_o, gqa.theta)


def exact_by_replication(gqa):
    """The same function again: latents are the old keys and values, up-projections copy the head that is shared."""
    heads, (kv_heads, _, head_dim) = gqa.w_q.shape[0], gqa.w_k.shape
    copy = replicate(np.eye(kv_heads * head_dim).reshape(kv_heads, head_dim, -1), heads).swapaxes(1, 2)
    return FactoredKV(gqa.w_q, side_by_side(gqa.w_k), copy, side_by_side(gqa.w_v), copy, gqa.w_o, gqa.theta)


def _by_head(w, heads):
    """(rank, heads · d) -> (heads, rank, d)."""
    return w.reshape(w.shape[0], heads, -1).swapaxes(0, 1)


# ---- RoRoPE, FreqFold, partial RoPE ----------------------------------------------------------------------------------


def principal_mixture(gqa, x, fold=1):
    """RoRoPE: for each plane, the principal axes of what the key heads hold there. With fold, for each run of planes.

    x        (tokens, hidden)  calibration: inputs of the layer
    fold     f neighbouring planes are mixed as if they turned at one speed; 1 is exact
    returns  (planes / f, kv_heads · f, kv_heads · f)  orthogonal, columns by falling energy
    raises   ShapeError  fold does not divide the planes
    """
    z = _folded(x @ gqa.w_k, fold)
    moment = (z.conj().swapaxes(1, 2) @ z).real  # both coordinates of a plane, summed; not centred
    return np.linalg.eigh(moment)[1][:, :, ::-1]


def no_mixture(gqa, fold=1):
    """The heads as they are: what `principal_mixture` is compared with."""
    groups = gqa.theta.size // fold
    return np.broadcast_to(np.eye(gqa.w_k.shape[0] * fold), (groups,) + (gqa.w_k.shape[0] * fold,) * 2)


def energy(gqa, x, u):
    """Share of the keys' squared length in each virtual head, the components of a mixture in order: (kv_heads,)."""
    kv_heads = gqa.w_k.shape[0]
    z = _folded(x @ gqa.w_k, u.shape[1] // kv_heads) @ u
    per_head = np.sum(np.abs(z) ** 2, axis=(0, 1)).reshape(kv_heads, -1).sum(axis=1)
    return per_head / per_head.sum()


def mixed_heads(gqa, u):
    """All RoPE kept: the layer in the coordinates of `u`, as one query of kv_heads · head_dim numbers for each head.

    returns  GQA with one key head of kv_heads · head_dim numbers; values stay as they are. Computes the same function
             when u comes from fold=1
    """
    kv_heads, fold = gqa.w_k.shape[0], u.shape[1] // gqa.w_k.shape[0]
    keys, queries = _folded(gqa.w_k, fold) @ u, _folded_queries(gqa, u)
    theta = np.tile(gqa.theta.reshape(-1, 1, fold), (1, kv_heads, 1)).reshape(-1)
    w_k = _real(keys.swapaxes(0, 1).reshape(keys.shape[1], -1))
    return GQA(_real(queries.reshape(*queries.shape[:2], -1)), w_k[None], gqa.w_v, gqa.w_o, theta)


def partial_rope(gqa, u, rope_dims):
    """RoPE on the first rope_dims coordinates of the virtual heads; elsewhere it is dropped. Nothing is compressed.

    u        a mixture for fold f; of each run of f planes the f / collapse strongest components go on turning, at the
             speeds of every collapse-th plane, where collapse = head_dim / rope_dims
    returns  MLA of rank 2 · kv_heads · head_dim - rope_dims: keys without position, then values
    raises   ShapeError  rope_dims · collapse is not head_dim; fold is no multiple of collapse
    """
    kv_heads, hidden, head_dim = gqa.w_k.shape
    heads, fold = gqa.w_q.shape[0], u.shape[1] // kv_heads
    collapse = head_dim // rope_dims if rope_dims > 0 else 0
    if rope_dims * collapse != head_dim or rope_dims % 2:
        raise ShapeError(f"rope_dims {rope_dims}: it must be even and divide the head dimension, {head_dim}")
    if fold % collapse:
        raise ShapeError(
            f"fold {fold} is no multiple of {collapse} = {head_dim} / {rope_dims}: of each run of {fold} planes "
            f"1/{collapse} go on turning; fold at least {collapse}, or keep more rope_dims"
        )
    kept = fold // collapse
    keys, queries = _folded(gqa.w_k, fold) @ u, _folded_queries(gqa, u)
    w_k_rope = _real(keys[:, :, :kept].swapaxes(0, 1).reshape(hidden, -1))
    w_q_rope = _real(queries[..., :kept].reshape(heads, hidden, -1))
    w_k = _real(keys[:, :, kept:].swapaxes(0, 1).reshape(hidden, -1))
    up_k = _undo_mixture(u, kept, heads, kv_heads)
    up_v = exact_by_replication(gqa).up_v
    blocks = np.zeros((2, heads, w_k.shape[1] + up_v.shape[1], head_dim))
    blocks[0, :, : w_k.shape[1]], blocks[1, :, w_k.shape[1] :] = up_k, up_v
    theta = gqa.theta.reshape(-1, fold)[:, ::collapse].reshape(-1)
    down = np.concatenate([w_k, side_by_side(gqa.w_v)], axis=1)
    return MLA(gqa.w_q, w_q_rope, w_k_rope, down, *blocks, gqa.w_o, theta)


def _undo_mixture(u, kept, heads, kv_heads):
    """(heads, kv_heads · head_dim - rope_dims, head_dim): from the components that do not turn to each head's key."""
    groups, fold = u.shape[0], u.shape[1] // kv_heads
    back = u[:, :, kept:].reshape(groups, kv_heads, fold, -1)  # (group, key head, plane of the group, component)
    one = np.einsum("gjic,gG->jgcGi", back, np.eye(groups)).reshape(kv_heads, -1, groups * fold)
    return replicate(np.kron(np.eye(2), one), heads)  # the same for both coordinates of a plane


def _complex(a):
    re, im = np.split(a, 2, axis=-1)
    return re + 1j * im


def _real(z):
    return np.concatenate([z.real, z.imag], axis=-1)


def _folded(a, fold):
    """(kv_heads, rows, head_dim) -> complex (groups, rows, kv_heads · fold): what one mixture mixes."""
    z = _complex(a)
    kv_heads, rows, planes = z.shape
    if not 0 < fold <= planes or planes % fold:
        raise ShapeError(f"fold {fold} does not divide the {planes} planes of a head of {2 * planes}")
    return z.reshape(kv_heads, rows, planes // fold, fold).transpose(2, 1, 0, 3).reshape(-1, rows, kv_heads * fold)


def _folded_queries(gqa, u):
    """Query weights against the mixed keys: complex (heads, hidden, groups, kv_heads · fold)."""
    heads, kv_heads = gqa.w_q.shape[0], gqa.w_k.shape[0]
    z = _complex(gqa.w_q)
    z = z.reshape(*z.shape[:2], u.shape[0], -1)
    rows = replicate(u.reshape(u.shape[0], kv_heads, -1, u.shape[2]).swapaxes(0, 1), heads)
    return np.einsum("hDgi,hgic->hDgc", z, rows)


# ---- balanced joint PCA ----------------------------------------------------------------------------------------------


def compress(full, x, rank, balance=True):
    """Keys and values of `partial_rope` in `rank` numbers: the principal components of both together, on data.

    x        (tokens, hidden)  calibration: inputs of the layer
    balance  first divide the keys by the ratio of the mean norms, so that large keys do not push out the values
    returns  MLA
    raises   ShapeError  rank beyond that of `full`
    """
    most = full.down.shape[1]
    if not 0 < rank <= most:
        raise ShapeError(f"rank {rank} is not in 1 … {most}: keys and values without the rotating part have no more")
    ratio = np.ones(most)
    if balance:
        ratio[: _keys(full)] = key_to_value_ratio(full, x)
    latent = x @ full.down / ratio
    basis = np.linalg.eigh(latent.T @ latent)[1][:, ::-1][:, :rank]
    up = (basis.T * ratio) @ np.stack([full.up_k, full.up_v])
    return full._replace(down=full.down / ratio @ basis, up_k=up[0], up_v=up[1])


def key_to_value_ratio(full, x):
    """Mean norm of a column of keys without position, over that of a column of values."""
    norms, keys = np.linalg.norm(x @ full.down, axis=0), _keys(full)
    return norms[:keys].mean() / norms[keys:].mean()


def _keys(full):
    """How many of the columns of an uncompressed latent are keys; values have rope_dims more."""
    return (full.down.shape[1] - full.w_k_rope.shape[1]) // 2


def convert(gqa, x, rope_dims, rank, fold=1, balance=True):
    """The converter: RoRoPE with FreqFold, partial RoPE, balanced joint PCA.

    x        (tokens, hidden)  calibration: inputs of the layer
    returns  MLA that caches rank + rope_dims numbers a token
    raises   ShapeError
    """
    return compress(partial_rope(gqa, principal_mixture(gqa, x, fold), rope_dims), x, rank, balance)


def pooled(gqa, kv_heads):
    """A baseline: fewer key heads, each the mean of its group's. Caches 2 · kv_heads · head_dim numbers. ShapeError."""
    group = group_size(gqa.w_k.shape[0], kv_heads)
    w_k, w_v = (w.reshape(kv_heads, group, *w.shape[1:]).mean(axis=1) for w in (gqa.w_k, gqa.w_v))
    return gqa._replace(w_k=w_k, w_v=w_v)
