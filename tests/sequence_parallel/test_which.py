"""Which sequence parallelism: every method trains a stack as one device does, and wins where the formulas say."""

from functools import cache

import numpy as np
import pytest
from numpy.testing import assert_allclose

from toolkit.runtime import Cluster, hardware, per_rank, topology
from toolkit.sequence_parallel import _block as blocks
from toolkit.sequence_parallel import _megatron_sp as megatron
from toolkit.sequence_parallel._methods import methods

H, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, TOKENS = 32, 8, 4, 4, 40, 32

# ---- a stack of two blocks under each method -------------------------------------------------------------------------


def stack(kv_heads):
    """Weights of two blocks, their input and the gradient of their output."""
    random = np.random.default_rng(0)
    layers = [blocks.block_weights(random, H, HEADS, kv_heads, HEAD_DIM, HIDDEN) for _ in range(2)]
    for weights in layers:
        for name in ("norm_1", "norm_2"):
            weights[name] = weights[name] + 0.1 * random.standard_normal(H)
    return layers, *random.standard_normal((2, TOKENS, H))


def both_ways(comm, way, layers, x, grad, where, attention):
    """Output, dx and the gradients of every layer's weights: this rank's tokens and its share."""
    saved = []
    for weights in layers:
        x, kept = way.block(comm, weights, x, where, attention, HEAD_DIM)
        saved.append(kept)
    grads = []
    for weights in reversed(layers):
        grad, share = way.block_backward(comm, weights, saved.pop(), grad, attention, HEAD_DIM)
        grads.insert(0, share)
    return x, grad, grads


def summed(comm, *arguments):
    y, dx, grads = both_ways(comm, blocks, *arguments)
    return y, dx, blocks.sum_gradients(comm, grads)


def in_shards(comm, layers, x, grad, where, attention):
    shards = [megatron.shard_weights(weights, comm.rank, comm.size, HEAD_DIM) for weights in layers]
    y, dx, grads = both_ways(comm, megatron, shards, x, grad, np.arange(TOKENS), attention)
    return y, dx, [megatron.sum_norms(comm, share) for share in grads]


@cache
def on_one_device(causal, softmax=True):
    """(y, dx, gradients). Softmax that needs no messages, which tests of the block hold against PyTorch; or LASP-2."""
    attention = blocks.one_device(causal) if softmax else named(1, causal)["LASP-2"].attention
    one = Cluster(topology.switch(1, hardware.NVLINK4))
    return one.run(summed, *stack(KV_HEADS if softmax else HEADS), np.arange(TOKENS), attention).outputs[0]


def spread(method, ranks, nodes):
    """(y, dx, gradients of every rank) of the stack under a method, tokens back in their order."""
    layers, x, grad = stack(KV_HEADS if method.softmax else HEADS)
    where = [method.where(rank, ranks, TOKENS) for rank in range(ranks)]
    machine = topology.two_level(nodes, ranks // nodes, hardware.NVLINK4, hardware.IB_NDR, inside="switch")
    program = in_shards if method.in_shards else summed
    run = Cluster(machine).run(
        program, layers, *(per_rank([a[w] for w in where]) for a in (x, grad)), per_rank(where), method.attention
    )
    whole = np.empty((2, TOKENS, H))
    for place, output in zip(where, run.outputs, strict=True):
        whole[:, place] = output[:2]
    return *whole, [output[2] for output in run.outputs]


def named(nodes, causal):
    return {method.name: method for method in methods(nodes, causal)}


CASES = [
    pytest.param(name, ranks, nodes, causal, id=f"{name}, {nodes} × {ranks // nodes}, {'causal' if causal else 'full'}")
    for causal in (True, False)
    for ranks, nodes in ((1, 1), (4, 1), (4, 2), (4, 4))
    for name in named(nodes, causal)
]


@pytest.mark.parametrize("name, ranks, nodes, causal", CASES)
def test_two_blocks_give_the_output_and_gradients_of_one_device(name, ranks, nodes, causal):
    method = named(nodes, causal)[name]
    y, dx, shares = spread(method, ranks, nodes)
    want_y, want_dx, want = on_one_device(causal, method.softmax)
    assert_allclose(y, want_y, rtol=0, atol=1e-10)
    assert_allclose(dx, want_dx, rtol=0, atol=1e-10)
    for rank, grads in enumerate(shares):
        if method.in_shards:
            mine = [megatron.shard_weights(layer, rank, ranks, HEAD_DIM) for layer in want]
        else:
            mine = want
        for layer, wanted in zip(grads, mine, strict=True):
            for weight in wanted:
                assert_allclose(layer[weight], wanted[weight], rtol=0, atol=1e-10, err_msg=weight)
