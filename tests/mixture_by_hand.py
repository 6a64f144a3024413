"""A mixture of experts in PyTorch, token by token: what expert layers are judged by."""

import torch

functional = torch.nn.functional


def tensors(value, wanted=True):
    """Nested dicts of arrays as float64 tensors with gradients."""
    if isinstance(value, dict):
        return {name: tensors(part, wanted) for name, part in value.items()}
    return torch.tensor(value, requires_grad=wanted)


def scores(kind, w, x, noise=None):
    """(what is compared, what weighs), both (tokens, experts)."""
    if kind == "cosine":
        logits = functional.normalize(x @ w["project"], dim=1) @ functional.normalize(w["vectors"], dim=1).T
        logits = logits / w["temperature"]
        return logits, logits.softmax(dim=1)
    logits = x @ w["logits"]
    if noise is not None:
        logits = logits + noise * functional.softplus(x @ w["noise"])
    return logits, {"noisy top-k": logits, "sigmoid": logits.sigmoid(), "expert choice": logits.softmax(dim=1)}[kind]


def pairs(kind, compared, k, slots):
    """[(token, expert)] in token order, without those that overflow."""
    tokens, experts = compared.shape
    if kind == "expert choice":
        p, most = compared.softmax(dim=1), min(slots, tokens)
        return [(int(t), e) for e in range(experts) for t in p[:, e].topk(most).indices]
    load, found = [0] * experts, []
    for t in range(tokens):
        for e in compared[t].topk(k).indices.tolist():
            load[e] += 1
            if load[e] <= slots:
                found.append((t, e))
    return found


def mixture(kind, w, x, k=2, slots=None, noise=None, balance=0.0):
    """(experts' outputs (tokens, h), balancing loss)"""
    compared, weighs = scores(kind, w["router"], x, noise)
    slots = len(x) if slots is None else slots
    rows = [torch.zeros_like(x[0]) for _ in x]
    for t, e in pairs(kind, compared.detach(), k, slots):
        weight = weighs[t, e]
        if kind == "noisy top-k":
            weight = weighs[t].exp()[e] / weighs[t].exp()[compared[t].topk(k).indices].sum()
        hidden = functional.gelu(x[t] @ w["expert_up"][e], approximate="tanh")
        rows[t] = rows[t] + weight * (hidden @ w["expert_down"][e])
    first = functional.one_hot(compared.argmax(dim=1), compared.shape[1]).double().mean(dim=0)
    loss = balance * compared.shape[1] * (first * compared.softmax(dim=1).mean(dim=0)).sum()
    return torch.stack(rows), loss
