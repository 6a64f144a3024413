"""Is latent attention more than grouped attention? Distances from a layer to the nearest grouped layer.

A head's scores between tokens t and s are x_t M xᵀ_s with a matrix M that depends on t - s alone. All heads of a group
read the same keys, so their M, one above the other, have rank head_dim at most. What a layer has beyond that rank is
a distance in closed form (Eckart and Young). With RoPE a fit by alternating least squares finds more.
"""

import numpy as np

from toolkit.attention._trans_mla_layers import GQA, rope
from toolkit.attention.trans_mla import replicate


def score_maps(layer, offsets=(0,)):
    """M of each head at each distance t - s, for a GQA or a FactoredKV: (heads, offsets, hidden, hidden)."""
    w_k = replicate(layer.w_k, len(layer.w_q)) if isinstance(layer, GQA) else layer.down_k @ layer.up_k
    return (layer.w_q[:, None] @ turns(layer.theta, offsets)) @ w_k.swapaxes(1, 2)[:, None]


def turns(theta, offsets):
    """RoPE as matrices to multiply from the right: (offsets, head_dim, head_dim)."""
    return np.stack([rope(np.eye(2 * theta.size)[:, None], theta, offset)[:, 0] for offset in offsets])


def distance_of_keys(keys, kv_heads):
    """From each head's own key weights to keys that groups share: the closed form, root of summed squares.

    keys     (heads, hidden, head_dim)
    returns  float; for two heads that share, |K_1 - K_2| / √2
    """
    groups = keys.reshape(kv_heads, -1, *keys.shape[1:])
    return float(np.linalg.norm(groups - groups.mean(axis=1, keepdims=True)))


def distance_of_scores(maps, kv_heads, head_dim):
    """Lower bound of the distance from `score_maps` to those of any grouped layer; attained without RoPE.

    maps     (heads, offsets, hidden, hidden)
    returns  float: what singular values beyond head_dim hold, of the maps of a group one above the other
    """
    stacked = maps.reshape(kv_heads, -1, maps.shape[-1])
    return float(np.linalg.norm(np.linalg.svd(stacked, compute_uv=False)[:, head_dim:]))


def fit_grouped(maps, theta, offsets, kv_heads, seed=0, sweeps=100):
    """The nearest grouped layer to be found from a random start, by alternating least squares.

    maps     (heads, offsets, hidden, hidden)
    returns  (residual, w_q, w_k): Frobenius norm over all maps, and the layer's weights
    """
    heads, _, hidden, _ = maps.shape
    turn, group = turns(theta, offsets), heads // kv_heads
    w_k = np.random.default_rng(seed).standard_normal((kv_heads, hidden, 2 * theta.size))
    targets = maps.reshape(kv_heads, group, len(offsets), hidden, hidden)
    beside = targets.swapaxes(2, 3).reshape(kv_heads, group, hidden, -1)  # all offsets of a head side by side
    for _ in range(sweeps):
        right = (turn @ w_k.swapaxes(1, 2)[:, None]).swapaxes(1, 2).reshape(kv_heads, 2 * theta.size, -1)
        w_q = beside @ np.linalg.pinv(right)[:, None]
        left = (w_q[:, :, None] @ turn).reshape(kv_heads, -1, 2 * theta.size)
        w_k = (np.linalg.pinv(left) @ targets.reshape(kv_heads, -1, hidden)).swapaxes(1, 2)
    residual = targets - (w_q[:, :, None] @ turn) @ w_k.swapaxes(1, 2)[:, None, None]
    return float(np.linalg.norm(residual)), w_q.reshape(heads, hidden, -1), w_k
