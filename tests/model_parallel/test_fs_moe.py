"""FSMoE: no schedule changes a result, each takes the time that its formula says, and the formulas choose well."""

from functools import cache, partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from toolkit.model_parallel import _experts, _gates, fs_moe
from toolkit.model_parallel._mesh import Grid
from toolkit.runtime import Cluster, hardware, per_rank, topology
from toolkit.runtime.errors import ShapeError

torch = pytest.importorskip("torch")
import mixture_by_hand as by_hand  # noqa: E402

NODES, PER_NODE, E, H, HIDDEN, TOKENS = 2, 2, 4, 16, 32, 16  # 4 ranks of 16 tokens
FACTOR, BALANCE = 2.4, 0.1
GATES = {
    "noisy top-k": _gates.noisy_top_k(2, seed=5, balance=BALANCE),
    "sigmoid": _gates.sigmoid(2),
    "cosine": _gates.cosine(2),
    "expert choice": _gates.expert_choice(2),
}
any_gate = pytest.mark.parametrize("kind", GATES)


@cache
def inputs(kind):
    """(whole weights, tokens of each rank, gradient of each rank's output)"""
    random = np.random.default_rng(3)
    weights = _experts.expert_weights(random, GATES[kind], H, HIDDEN, E)
    return weights, *random.standard_normal((2, NODES * PER_NODE, TOKENS, H))


@cache
def wanted(kind, slots):
    """Outputs, gradients of the tokens and of the weights, by PyTorch on one device: each rank's tokens with its slots."""
    weights, x, grad = inputs(kind)
    w, x = by_hand.tensors(weights), by_hand.tensors(x)
    noise = torch.tensor(np.random.default_rng(5).standard_normal((TOKENS, E))) if kind == "noisy top-k" else None
    balance = BALANCE if kind == "noisy top-k" else 0.0
    made = [by_hand.mixture(kind, w, part, 2, slots, noise, balance) for part in x]
    sum((y * torch.tensor(g)).sum() + loss for (y, loss), g in zip(made, grad, strict=True)).backward()
    grads = {"expert_up": w["expert_up"].grad.numpy(), "expert_down": w["expert_down"].grad.numpy()}
    grads["router"] = {name: a.grad.numpy() for name, a in w["router"].items()}
    return np.stack([y.detach().numpy() for y, _ in made]), x.grad.numpy(), grads


def both_ways(comm, layer, whole, x, grad, gradients=(None, None)):
    """(y, dx, this rank's gradients, those it should have as a function, reduced pieces)"""
    grid = Grid(comm, tp=PER_NODE, ep=NODES)
    mine = _experts.cut_experts(whole, grid.ep, grid.tp)
    y, saved, one = fs_moe.forward(layer, grid, mine, x, gradients[0])
    dx, grads, two = fs_moe.backward(layer, grid, mine, saved, grad, gradients[1])
    grads["router"] = {name: comm.all_reduce(g) for name, g in grads["router"].items()}
    return y, dx, grads, (one, two)


def machine(device=hardware.IDEAL, inside=hardware.NVLINK3, between=hardware.IB_HDR):
    return Cluster(topology.two_level(NODES, PER_NODE, inside, between, inside="switch"), device)


def run(layer, kind, **options):
    whole, x, grad = inputs(kind)
    return machine().run(both_ways, layer, whole, per_rank(list(x)), per_rank(list(grad)), **options)


def error(result, kind, slots):
    """The largest difference from PyTorch of outputs and of all gradients."""
    y, dx, grads = wanted(kind, slots)
    found = []
    for rank, (got_y, got_dx, got, _) in enumerate(result.outputs):
        node, place = divmod(rank, PER_NODE)
        experts, channels = slice(node * 2, node * 2 + 2), slice(place * 16, place * 16 + 16)
        found += [got_y - y[rank], got_dx - dx[rank]]
        found += [got["expert_up"] - grads["expert_up"][experts, :, channels]]
        found += [got["expert_down"] - grads["expert_down"][experts, channels]]
        found += [got["router"][name] - a for name, a in grads["router"].items()]
    return max(np.abs(part).max() for part in found)


@pytest.mark.parametrize("r_fwd, r_bwd", [(1, 1), (2, 2), (4, 4), (2, 4), (4, 1)])
@any_gate
def test_any_degree_gives_pytorchs_outputs_and_gradients(kind, r_fwd, r_bwd):
    layer = fs_moe.FSMoELayer(GATES[kind], FACTOR, r_fwd, r_bwd)
    slots = by_hand.slots_of(TOKENS, E, FACTOR, np.lcm(r_fwd, r_bwd))
    assert error(run(layer, kind), kind, slots) < 1e-12
