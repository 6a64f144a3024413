"""Gates of a mixture of experts: which expert gets which token, and with what weight. Forward stands over backward.

    noisy_top_k      softmax over the chosen; noise that is learned, and a loss that balances (Shazeer et al. 2017,
                     arXiv 1701.06538; the loss as in GShard, arXiv 2006.16668)
    sigmoid          the logistic function of each chosen logit (BASE layers, arXiv 2103.16716, with any k)
    cosine           direction only: projected, unit length, times a learned temperature (X-MoE, arXiv 2204.09179)
    expert_choice    experts choose tokens, so all are equally busy (arXiv 2202.09368)

A gate gives two arrays over (tokens, experts): `chosen`, and `mix`, the weight of an expert's output in its token's,
zero where not chosen. Choosing has no gradient; `mix` has. Weights are a dict, gradients one of the same names.
Chapter: model_parallel/fs_moe.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from toolkit.kernels.layers import add, linear, linear_backward
from toolkit.runtime.arrays import is_shape_only, like
from toolkit.runtime.errors import ShapeError
from toolkit.runtime.kernel import Cost, kernel


@dataclass(frozen=True)
class Gate:
    """A gate as a layer calls it.

    init       (random, h, experts) -> weights
    forward    (weights, x (tokens, h), capacity) -> (chosen bool, mix, saved): (tokens, experts) both
    backward   (weights, saved, d_mix) -> (dx, gradients of weights)
    per_token  experts that a token gets, on average
    """

    init: Callable
    forward: Callable
    backward: Callable
    per_token: float


def noisy_top_k(k=2, seed=None, balance=0.0):
    """The k largest logits; mix is their softmax.

    seed      of normal noise times softplus(x · noise), added to the logits; the same seed, the same noise. None: none
    balance   weight of `balance_loss`, whose gradient joins that of the rest
    """

    def forward(w, x, _capacity):
        logits, drawn, raw = linear(x, w["logits"]), None, None
        if seed is not None:
            raw = linear(x, w["noise"])
            if not is_shape_only(x):
                drawn = np.random.default_rng(seed).standard_normal(logits.shape).astype(x.dtype)
                logits = logits + drawn * np.logaddexp(0, raw)
        chosen = largest(logits, k)
        mix = softmax(logits, chosen)
        return chosen, mix, (x, logits, drawn, raw, mix)

    def backward(w, saved, d_mix):
        x, logits, drawn, raw, mix = saved
        d_logits = softmax_backward(mix, d_mix)
        if balance:
            p, first = softmax(logits, None), largest(logits, 1)
            d_logits = add(d_logits, softmax_backward(p, balanced(first, balance)))
        dx, d_w = linear_backward(x, w["logits"], d_logits)
        if seed is None:
            return dx, {"logits": d_w}
        d_raw = d_logits if drawn is None else d_logits * drawn / (1 + np.exp(-raw))
        more, d_noise = linear_backward(x, w["noise"], d_raw)
        return add(dx, more), {"logits": d_w, "noise": d_noise}

    names = ("logits",) if seed is None else ("logits", "noise")
    return Gate(_matrices(names), forward, backward, k)


def balance_loss(logits, balance):
    """balance · E · sum over experts of (share of tokens whose first choice it is) · (its mean probability)."""
    share = largest(logits, 1).mean(axis=0)
    return balance * logits.shape[1] * float(share @ softmax(logits, None).mean(axis=0))


def sigmoid(k=2):
    """The k largest logits; mix is the logistic function of each."""

    def forward(w, x, _capacity):
        logits = linear(x, w["logits"])
        chosen = largest(logits, k)
        mix = logistic(logits, chosen)
        return chosen, mix, (x, mix)

    def backward(w, saved, d_mix):
        x, mix = saved
        dx, d_w = linear_backward(x, w["logits"], logistic_backward(mix, d_mix))
        return dx, {"logits": d_w}

    return Gate(_matrices(("logits",)), forward, backward, k)


def cosine(k=2, low=8):
    """The k experts whose vectors point most nearly as the token's does, in `low` channels; mix: their probability."""

    def init(random, h, experts):
        return {
            "project": random.standard_normal((h, low)) / h**0.5,
            "vectors": random.standard_normal((experts, low)),
            "temperature": np.array([0.3]),
        }

    def forward(w, x, _capacity):
        z = linear(x, w["project"])
        u, v = unit(z), unit(w["vectors"])
        logits = divided(linear(u, v.T), w["temperature"])
        chosen, p = largest(logits, k), softmax(logits, None)
        return chosen, masked(p, chosen), (x, z, u, v, logits, p)

    def backward(w, saved, d_mix):
        x, z, u, v, logits, p = saved
        d_logits = softmax_backward(p, d_mix)
        d_cosine, d_temperature = divided_backward(logits, w["temperature"], d_logits)
        d_u, d_v = linear_backward(u, v.T, d_cosine)
        dx, d_project = linear_backward(x, w["project"], unit_backward(z, d_u))
        d_vectors = unit_backward(w["vectors"], d_v.T)
        return dx, {"project": d_project, "vectors": d_vectors, "temperature": d_temperature}

    return Gate(init, forward, backward, k)


def expert_choice(per_token=2):
    """Each expert takes the `capacity` tokens that give it the highest probability; mix is that probability.

    A token may get any number of experts. Its choice depends on the other tokens, later ones too.
    raises   ShapeError  without a capacity
    """

    def forward(w, x, capacity):
        if capacity is None:
            raise ShapeError("experts that choose tokens need a capacity: give one, or another gate")
        p = softmax(linear(x, w["logits"]), None)
        chosen = largest(p.T, min(capacity, len(x))).T
        return chosen, masked(p, chosen), (x, p)

    def backward(w, saved, d_mix):
        x, p = saved
        dx, d_w = linear_backward(x, w["logits"], softmax_backward(p, d_mix))
        return dx, {"logits": d_w}

    return Gate(_matrices(("logits",)), forward, backward, per_token)


GATES = {"noisy top-k": noisy_top_k, "sigmoid": sigmoid, "cosine": cosine, "expert choice": expert_choice}


def _matrices(names):
    return lambda random, h, experts: {name: random.standard_normal((h, experts)) / h**0.5 for name in names}


# ---- pieces, memory-bound --------------------------------------------------------------------------------------------


def _moves(*arrays):
    return Cost(0, sum(a.nbytes for a in arrays if a is not None))


@kernel(cost=lambda scores, k: _moves(scores), out=lambda scores, k: like(scores.shape, "bool"))
def largest(scores, k):
    """True at the k largest of each row; of equals, the first. Raises ShapeError if there are fewer than k."""
    if not 1 <= k <= scores.shape[1]:
        raise ShapeError(f"a gate cannot choose k={k} of {scores.shape[1]} experts")
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, np.argsort(-scores, axis=1, kind="stable")[:, :k], True, axis=1)
    return chosen


@kernel(cost=lambda logits, chosen: _moves(logits, logits, chosen), out=lambda logits, chosen: like(logits))
def softmax(logits, chosen):
    """Over the chosen of each row, zero elsewhere; chosen None: over all."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    if chosen is not None:
        shifted = shifted * chosen
    return shifted / shifted.sum(axis=1, keepdims=True)


@kernel(cost=lambda p, grad: _moves(p, p, grad), out=lambda p, grad: like(p))
def softmax_backward(p, grad):
    return p * (grad - (p * grad).sum(axis=1, keepdims=True))


@kernel(cost=lambda logits, chosen: _moves(logits, logits, chosen), out=lambda logits, chosen: like(logits))
def logistic(logits, chosen):
    return np.where(chosen, 0.5 * (1 + np.tanh(0.5 * logits)), 0.0)


@kernel(cost=lambda mix, grad: _moves(mix, mix, grad), out=lambda mix, grad: like(mix))
def logistic_backward(mix, grad):
    return grad * mix * (1 - mix)


@kernel(cost=lambda p, chosen: _moves(p, p, chosen), out=lambda p, chosen: like(p))
def masked(p, chosen):
    return np.where(chosen, p, 0.0)


@kernel(cost=lambda first, balance: _moves(first), out=lambda first, balance: like(first.shape))
def balanced(first, balance):
    """Gradient of the balancing loss with respect to each probability."""
    tokens, experts = first.shape
    return np.broadcast_to(balance * experts / tokens * first.mean(axis=0), first.shape)


@kernel(cost=lambda x, t: _moves(x, x), out=lambda x, t: like(x))
def divided(x, t):
    return x / t


@kernel(cost=lambda y, t, grad: _moves(y, grad, grad), out=lambda y, t, grad: (like(y), like(t)))
def divided_backward(y, t, grad):
    return grad / t, -np.sum(grad * y).reshape(1) / t


@kernel(cost=lambda z: _moves(z, z), out=lambda z: like(z))
def unit(z):
    """Each row at length 1."""
    return z / np.linalg.norm(z, axis=1, keepdims=True)


@kernel(cost=lambda z, grad: _moves(z, z, grad), out=lambda z, grad: like(z))
def unit_backward(z, grad):
    length = np.linalg.norm(z, axis=1, keepdims=True)
    u = z / length
    return (grad - u * (u * grad).sum(axis=1, keepdims=True)) / length
