"""A small language model, a batch, and PyTorch's loss and gradients: what placed models are judged by."""

from functools import cache

import numpy as np
import torch

from toolkit.sequence_parallel import _block as blocks

H, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCABULARY, TOKENS, BATCH, LAYERS = 16, 4, 4, 4, 32, 16, 8, 16, 4


@cache
def model(tied, layers=LAYERS, kv_heads=KV_HEADS):
    random = np.random.default_rng(0)
    params = blocks.model_weights(random, VOCABULARY, layers, H, HEADS, kv_heads, HEAD_DIM, HIDDEN)
    for weights in params["layers"]:
        weights["norm_1"] += 0.1 * random.standard_normal(H)
        weights["norm_2"] += 0.1 * random.standard_normal(H)
    if tied:
        del params["head"]
    text = random.integers(0, VOCABULARY, (BATCH, TOKENS + 1))
    return params, text[:, :-1].copy(), text[:, 1:].copy()


@cache
def torch_step(tied, layers=LAYERS, kv_heads=KV_HEADS):
    """Loss and gradients of the same model in PyTorch, by autograd, on one device."""
    params, tokens, targets = model(tied, layers, kv_heads)
    params = mapped(lambda a: torch.tensor(a, requires_grad=True), params)
    functional = torch.nn.functional
    angle = torch.as_tensor(np.arange(TOKENS)[:, None] * 10_000.0 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2)))

    def norm(x, gain):
        return functional.rms_norm(x, (H,), gain, eps=1e-6)

    def heads(x, turned):
        x = x.reshape(BATCH, TOKENS, -1, HEAD_DIM).transpose(1, 2)
        if not turned:
            return x
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), dim=-1)

    x = params["embedding"][torch.as_tensor(tokens)]
    for w in params["layers"]:
        normed = norm(x, w["norm_1"])
        q, k, v = (heads(normed @ w[name], name in "qk") for name in "qkv")
        k, v = (a.repeat_interleave(HEADS // kv_heads, dim=1) for a in (k, v))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + out.transpose(1, 2).reshape(BATCH, TOKENS, -1) @ w["o"]
        x = x + functional.gelu(norm(x, w["norm_2"]) @ w["up"], approximate="tanh") @ w["down"]
    logits = norm(x, params["norm"]) @ (params["embedding"].T if tied else params["head"])
    loss = functional.cross_entropy(logits.reshape(-1, VOCABULARY), torch.as_tensor(targets).reshape(-1))
    loss.backward()
    return float(loss.detach()), mapped(lambda a: a.grad.numpy(), params)


def mapped(function, value):
    """`function` of every array of nested dicts and lists."""
    if isinstance(value, dict):
        return {name: mapped(function, part) for name, part in value.items()}
    return [mapped(function, part) for part in value] if isinstance(value, list) else function(value)


def leaves(value, name=""):
    """[(path, array), …] of nested dicts and lists, by name."""
    if isinstance(value, np.ndarray):
        return [(name, value)]
    items = sorted(value.items()) if isinstance(value, dict) else enumerate(value)
    return [leaf for key, part in items for leaf in leaves(part, f"{name}/{key}")]
