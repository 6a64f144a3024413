"""Which sequence parallelism: every method trains a stack as one device does, and wins where the formulas say."""

import math
from functools import cache

import numpy as np
import pytest
from numpy.testing import assert_allclose

from reference import dense_attention, dense_attention_backward
from toolkit.catalogue import Model
from toolkit.runtime import Cluster, hardware, like, per_rank, shard, topology
from toolkit.runtime.errors import ShapeError
from toolkit.sequence_parallel import _block as blocks
from toolkit.sequence_parallel import _boundaries as boundaries
from toolkit.sequence_parallel import _gathered, _methods, ring_attention, token_ring, ulysses
from toolkit.sequence_parallel import _megatron_sp as megatron
from toolkit.sequence_parallel._compare import compare
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


# ---- where each wins: closed forms against the runtime, on one switch ------------------------------------------------

FLOPS, MEMORY, HEADS_32, WIDE = 1e14, 1e12, 32, 128


def times(a, port, memory=math.inf):
    """Seconds of (ring, Ulysses) forward on a switch without latency, by the runtime."""
    q, k = (like((heads, a.ranks * a.tokens, a.head_dim), "float16") for heads in (a.heads, a.kv_heads))
    layout = "zigzag" if a.causal else "contiguous"
    machine = Cluster(topology.switch(a.ranks, hardware.Link(port)), hardware.Device("d", FLOPS, memory))
    ring, swapped = (
        machine.run(program, *(shard(x, 1, where) for x in (q, k, k)), causal=a.causal, **options).makespan
        for program, where, options in (
            (ring_attention.attention, layout, {"layout": layout}),
            (ulysses.attention, "contiguous", {"replicate_kv": True}),
        )
    )
    return ring, swapped


def port_of(a, ratio):
    """The port at which a block of queries and keys takes `ratio` times as long as passing keys and values on."""
    slow = boundaries.Machine(FLOPS, math.inf, 1.0)
    return ratio * boundaries.shift_seconds(a, slow) / boundaries.block_seconds(a, slow)


CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


@CAUSAL
@pytest.mark.parametrize("ratio", [0.1, 0.9, 1.1, 10])
@pytest.mark.parametrize("ranks, group", [(2, 1), (4, 1), (8, 1), (8, 4), (16, 2), (16, 4)])
def test_times_are_the_closed_forms_where_memory_is_free(ranks, group, ratio, causal):
    a = boundaries.Attention(ranks, 4096, HEADS_32, HEADS_32 // group, WIDE, causal=causal)
    port = port_of(a, ratio)
    machine = boundaries.Machine(FLOPS, math.inf, port)
    expected = boundaries.ring_seconds(a, machine), boundaries.ulysses_seconds(a, machine)
    assert times(a, port) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("tokens", [1024, 8192])
@pytest.mark.parametrize("group", [1, 4])
def test_times_are_the_closed_forms_within_4_percent_where_merging_costs(group, tokens):
    a = boundaries.Attention(8, tokens, HEADS_32, HEADS_32 // group, WIDE, causal=False)
    machine = boundaries.Machine(FLOPS, MEMORY, 1e11)
    expected = boundaries.ring_seconds(a, machine), boundaries.ulysses_seconds(a, machine)
    assert times(a, 1e11, MEMORY) == pytest.approx(expected, rel=0.04)


@CAUSAL
@pytest.mark.parametrize("ranks, group", [(4, 1), (8, 1), (8, 2), (8, 4), (16, 1), (16, 2)])
def test_ulysses_wins_just_below_the_crossover_and_the_ring_just_above(ranks, group, causal):
    a = boundaries.Attention(ranks, 4096, HEADS_32, HEADS_32 // group, WIDE, causal=causal)
    tie = boundaries.crossover(ranks, group)
    (ring, swapped), (ring_above, swapped_above) = (times(a, port_of(a, near * tie)) for near in (0.97, 1.03))
    assert swapped < ring and ring_above < swapped_above


@pytest.mark.parametrize("ratio", [0.01, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("ranks, group", [(2, 1), (4, 4), (8, 8)])
def test_the_ring_wins_at_every_length_where_the_crossover_is_not_above_0(ranks, group, ratio):
    assert boundaries.crossover(ranks, group) <= 0
    a = boundaries.Attention(ranks, 4096, HEADS_32, HEADS_32 // group, WIDE, causal=False)
    ring, swapped = times(a, port_of(a, ratio))
    assert ring <= swapped * (1 + 1e-3)


@CAUSAL
@pytest.mark.parametrize("ranks, group", [(4, 1), (8, 1), (8, 4)])
def test_tokens_of_the_crossover_are_those_of_its_ratio(ranks, group, causal):
    machine = boundaries.Machine(FLOPS, math.inf, 3e10)
    tokens = boundaries.crossover_tokens(ranks, group, machine, causal=causal)
    a = boundaries.Attention(ranks, tokens, HEADS_32, HEADS_32 // group, WIDE, causal=causal)
    ratio = boundaries.block_seconds(a, machine) / boundaries.shift_seconds(a, machine)
    assert ratio == pytest.approx(boundaries.crossover(ranks, group), rel=1e-12)


@pytest.mark.parametrize("tokens", [2**13, 2**15])
@pytest.mark.parametrize("ranks, group", [(8, 1), (8, 4), (16, 1)])
def test_above_a_port_ulysses_wins_at_any_length_because_merging_costs_more_than_swapping(ranks, group, tokens):
    a = boundaries.Attention(ranks, tokens, HEADS_32, HEADS_32 // group, WIDE, causal=False)
    tie = boundaries.crossover_port(ranks, group, boundaries.Machine(FLOPS, MEMORY, 0.0))
    (ring, swapped), (ring_below, swapped_below) = (times(a, near * tie, MEMORY) for near in (1.3, 0.77))
    assert swapped < ring and ring_below < swapped_below


def test_one_rank_has_no_such_port():
    assert boundaries.crossover_port(1, 1, boundaries.Machine(FLOPS, MEMORY, 0.0)) is None


def test_megatron_sends_as_many_bytes_as_the_others_weights_take_at_w_over_4h_tokens():
    model = Model("m", 1, h=64, heads=8, kv_heads=8, mlp=128, vocabulary=0, gated=False)
    weights = sum(math.prod(shape) for shape in blocks.shapes(*model.block).values())
    tokens = 128
    assert weights / (4 * 64) == pytest.approx(tokens, rel=0.01)
    (alone,), _ = compare(
        model, tokens, Cluster(topology.switch(4, hardware.NVLINK4)), training=False, only=["Megatron"]
    )
    gathered = 3 * weights / 4 * 2
    assert alone.sent == pytest.approx(gathered, rel=0.01)


# ---- hybrids on nodes ------------------------------------------------------------------------------------------------


def on_nodes(program, count, per_node, **options):
    q = shard(like((HEADS_32, count * per_node * 1024, WIDE), "float16"), 1)
    machine = topology.two_level(count, per_node, hardware.Link(1e12), hardware.Link(1e9, name="NIC"), inside="switch")
    return Cluster(machine, hardware.IDEAL).run(program, q, q, q, **options)


@pytest.mark.parametrize("nodes, per_node", [(2, 2), (2, 4), (4, 4)])
def test_through_a_nic_a_hybrid_sends_nodes_minus_1_shards_where_the_flat_ring_sends_ranks_minus_1(nodes, per_node):
    shards = 2 * HEADS_32 * 1024 * WIDE * 2
    flat = on_nodes(ring_attention.attention, nodes, per_node)
    hybrid = on_nodes(ulysses.hybrid_attention, nodes, per_node, nodes=nodes)
    assert max(v for (u, w), v in flat.traffic.by_link.items() if w == "fabric") == (nodes * per_node - 1) * shards
    assert max(v for (u, w), v in hybrid.traffic.by_link.items() if w == "fabric") == (nodes - 1) * shards


@pytest.mark.parametrize("program", [ulysses.hybrid_attention, token_ring.hybrid_attention])
def test_where_nics_bind_a_hybrid_is_faster_than_the_flat_ring_by_ranks_minus_1_over_nodes_minus_1(program):
    flat, hybrid = on_nodes(ring_attention.attention, 2, 8), on_nodes(program, 2, 8, nodes=2)
    assert flat.makespan / hybrid.makespan == pytest.approx(15, rel=0.1)


def test_an_all_gather_through_all_nics_takes_one_nth_of_the_flat_ring_where_nics_bind():
    flat, gathered = on_nodes(ring_attention.attention, 2, 8), on_nodes(_gathered.attention, 2, 8)
    assert flat.makespan / gathered.makespan == pytest.approx(15, rel=0.1)


@CAUSAL
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_all_gather_attention_equals_dense_attention(ranks, layout, causal):
    q, k, v, grad = np.random.default_rng(ranks).standard_normal((4, 4, 16, 8))
    k, v = k[:2], v[:2]
    machine, options = Cluster(topology.switch(ranks, hardware.NVLINK4)), {"causal": causal, "layout": layout}
    parts = [shard(x, 1, layout) for x in (q, k, v)]
    ahead = machine.run(_gathered.attention, *parts, return_lse=True, **options)
    kept = ahead.output(0), ahead.output(1), shard(grad, 1, layout)
    back = machine.run(_gathered.attention_backward, *parts, *kept, **options)
    want = (*dense_attention(q, k, v, causal), *dense_attention_backward(q, k, v, grad, causal))
    for got, wanted in zip((*ahead.gather(1, layout), *back.gather(1, layout)), want, strict=True):
        assert_allclose(got, wanted, rtol=0, atol=1e-10)


def test_all_gather_attention_refuses_stripes():
    x = shard(like((2, 16, 8)), 1, "striped")
    with pytest.raises(ShapeError, match="takes contiguous and zigzag runs"):
        Cluster(topology.switch(2, hardware.NVLINK4)).run(_gathered.attention, x, x, x, causal=True, layout="striped")


def test_token_ring_on_nodes_refuses_stripes_backward():
    x = like((2, 8, 8))
    with pytest.raises(ShapeError, match="contiguous and zigzag"):
        on = {"nodes": 1, "causal": True, "layout": "striped"}
        _methods.token_ring_on_nodes_backward(None, x, x, x, x, x[:, :, 0], x, **on)
