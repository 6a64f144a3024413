"""Blocks over ranks: a stack gives the outputs and gradients of one device, and those are PyTorch's."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from toolkit.runtime import Cluster, hardware, like, per_rank, positions, shard, topology
from toolkit.runtime.errors import ShapeError
from toolkit.sequence_parallel import _block as blocks
from toolkit.sequence_parallel import _megatron_sp as megatron
from toolkit.sequence_parallel import _two_level as two_level
from toolkit.sequence_parallel import ring_attention, token_ring, ulysses

torch = pytest.importorskip("torch")

H, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCABULARY, TOKENS = 24, 8, 4, 4, 40, 11, 32
SIZES = H, HEADS, KV_HEADS, HEAD_DIM, HIDDEN


def mesh(ranks, device=hardware.IDEAL):
    return Cluster(topology.full_mesh(ranks, hardware.NVLINK4), device)


def ways(causal=True):
    """name -> (layout, Attention)"""
    return {
        "ring": ("contiguous", blocks.exact(ring_attention, causal=causal)),
        "zigzag ring": ("zigzag", blocks.exact(ring_attention, causal=causal, layout="zigzag")),
        "striped ring": ("striped", blocks.exact(ring_attention, causal=causal, layout="striped")),
        "TokenRing": ("zigzag", blocks.exact(token_ring, causal=causal, layout="zigzag")),
        "Ulysses": ("contiguous", ulysses.pair(causal=causal)),
        "Ulysses, pipelined": ("contiguous", ulysses.pair(causal=causal, overlap="qkv_pipeline")),
    }


WAY = pytest.mark.parametrize("way", ways())
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def model(seed=0, dtype="float64"):
    """Weights of two blocks between an embedding and a head, tokens and the tokens that follow."""
    random = np.random.default_rng(seed)
    params = blocks.model_weights(random, VOCABULARY, 2, *SIZES, dtype)
    for weights in params["layers"]:
        weights["norm_1"] += 0.1 * random.standard_normal(H)
        weights["norm_2"] += 0.1 * random.standard_normal(H)
    text = random.integers(0, VOCABULARY, TOKENS + 1)
    return params, text[:-1], text[1:]


def step(comm, params, tokens, targets, layout, attention):
    """Losses of this rank's tokens and the gradients summed over all ranks."""
    where = positions(layout, comm.rank, comm.size, TOKENS)
    losses, grads = blocks.loss_and_gradients(comm, params, tokens, targets, where, attention, HEAD_DIM, TOKENS)
    return losses, blocks.sum_gradients(comm, grads)


def run_step(ranks, way, causal=True):
    params, *text = model()
    layout, attention = ways(causal)[way]
    run = mesh(ranks).run(step, params, *(shard(a, 0, layout) for a in text), layout, attention)
    losses = np.empty(TOKENS)
    for rank, output in enumerate(run.outputs):
        losses[positions(layout, rank, ranks, TOKENS)] = output[0]
    return losses, [output[1] for output in run.outputs]


# ---- an independent judge --------------------------------------------------------------------------------------------


def torch_step(params, tokens, targets, causal):
    """The same model in PyTorch, by autograd, on whole arrays."""
    params, functional = mapped(lambda a: torch.tensor(a, requires_grad=True), params), torch.nn.functional
    angle = torch.as_tensor(np.arange(TOKENS)[:, None] * 10_000.0 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2)))

    def norm(x, gain):
        return functional.rms_norm(x, (H,), gain, eps=1e-6)

    def heads(x, turned):
        x = x.reshape(TOKENS, -1, HEAD_DIM).transpose(0, 1)
        if not turned:
            return x
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), dim=-1)

    x = params["embedding"][torch.as_tensor(tokens)]
    for w in params["layers"]:
        normed = norm(x, w["norm_1"])
        q, k, v = (heads(normed @ w[name], name in "qk") for name in "qkv")
        k, v = (a.repeat_interleave(HEADS // KV_HEADS, dim=0) for a in (k, v))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        x = x + out.transpose(0, 1).reshape(TOKENS, -1) @ w["o"]
        x = x + functional.gelu(norm(x, w["norm_2"]) @ w["up"], approximate="tanh") @ w["down"]
    logits = norm(x, params["norm"]) @ params["head"]
    losses = functional.cross_entropy(logits, torch.as_tensor(targets), reduction="none")
    losses.mean().backward()
    return losses.detach().numpy(), mapped(lambda a: a.grad.numpy(), params)


def mapped(function, value):
    """`function` of every array in nested dicts and lists."""
    if isinstance(value, dict):
        return {name: mapped(function, part) for name, part in value.items()}
    return [mapped(function, part) for part in value] if isinstance(value, list) else function(value)


def assert_same(got, want, atol=1e-10):
    """Equal nested dicts and lists of arrays; says where they are not."""
    assert_allclose(*(np.concatenate([a.ravel() for _, a in leaves(side)]) for side in (got, want)), rtol=0, atol=atol)
    assert [name for name, _ in leaves(got)] == [name for name, _ in leaves(want)]


def leaves(value, name=""):
    if isinstance(value, np.ndarray):
        return [(name, value)]
    items = sorted(value.items()) if isinstance(value, dict) else enumerate(value)
    return [leaf for key, part in items for leaf in leaves(part, f"{name}/{key}")]


# ---- what must hold --------------------------------------------------------------------------------------------------


@CAUSAL
@WAY
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_two_blocks_give_pytorchs_losses_and_gradients(ranks, way, causal):
    losses, grads = run_step(ranks, way, causal)
    want_losses, want_grads = torch_step(*model(), causal)
    assert_allclose(losses, want_losses, rtol=0, atol=1e-10)
    assert_same(grads[0], want_grads)


@WAY
def test_every_rank_has_the_same_gradients_to_the_bit(way):
    _, grads = run_step(4, way)
    for other in grads[1:]:
        assert_same(other, grads[0], atol=0)


def test_positions_that_start_at_0_on_every_rank_are_caught():
    params, *text = model()

    def wrong(comm, tokens, targets):
        where = np.arange(len(tokens))
        return blocks.loss_and_gradients(
            comm, params, tokens, targets, where, ulysses.pair(causal=True), HEAD_DIM, TOKENS
        )[0]

    losses = mesh(4).run(wrong, *(shard(a) for a in text)).gather()
    assert np.abs(losses - torch_step(*model(), True)[0]).max() > 1e-3


def block_both_ways(comm, weights, x, grad, layout, attention):
    where = positions(layout, comm.rank, comm.size, x.shape[0] * comm.size)
    y, saved = blocks.block(comm, weights, x, where, attention, HEAD_DIM)
    dx, grads = blocks.block_backward(comm, weights, saved, grad, attention, HEAD_DIM)
    return y, dx, *(grads[name] for name in sorted(grads))


# ---- Megatron's sequence parallelism: the same block, its weights in shards ------------------------------------------


def megatron_both_ways(comm, weights, x, grad, causal):
    shards = megatron.shard_weights(weights, comm.rank, comm.size, HEAD_DIM)
    where, attention = np.arange(len(x) * comm.size), blocks.one_device(causal)
    y, saved = megatron.block(comm, shards, x, where, attention, HEAD_DIM)
    dx, grads = megatron.block_backward(comm, shards, saved, grad, attention, HEAD_DIM)
    return y, dx, megatron.sum_norms(comm, grads)


@CAUSAL
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_block_in_shards_gives_one_devices_output_and_gradients(ranks, causal):
    weights, random = model()[0]["layers"][0], np.random.default_rng(1)
    x, grad = random.standard_normal((2, TOKENS, H))
    run = mesh(ranks).run(megatron_both_ways, weights, shard(x), shard(grad), causal)
    y, dx, *wanted = mesh(1).run(block_both_ways, weights, x, grad, *ways(causal)["ring"]).outputs[0]
    assert_allclose(np.concatenate([output[0] for output in run.outputs]), y, rtol=0, atol=1e-10)
    assert_allclose(np.concatenate([output[1] for output in run.outputs]), dx, rtol=0, atol=1e-10)
    whole = dict(zip(sorted(weights), wanted, strict=True))
    for rank, (_, _, grads) in enumerate(run.outputs):
        assert_same(grads, megatron.shard_weights(whole, rank, ranks, HEAD_DIM))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_megatron_sends_4_and_6_gathered_hidden_states_and_two_norms(ranks):
    weights = blocks.block_weights(None, H, 8, 8, HEAD_DIM, HIDDEN, "float16")
    x = shard(like((TOKENS, H), "float16"))
    run = mesh(ranks).run(megatron_both_ways, weights, x, x, True)
    norms = sum(e.bytes for e in run.trace if e.kind == "send" and e.name == "all_reduce")
    hidden = TOKENS // ranks * H * 2
    assert run.traffic.total - norms == ranks * 10 * (ranks - 1) * hidden


def test_megatron_keeps_a_rank_s_part_of_the_weights_only():
    weights = model()[0]["layers"][0]
    shards = [megatron.shard_weights(weights, rank, 4, HEAD_DIM) for rank in range(4)]
    assert sum(s["up"].size for s in shards) == weights["up"].size
    assert [s["q"].shape for s in shards] == [(H, HEADS // 4 * HEAD_DIM)] * 4


def test_more_ranks_than_key_heads_are_refused():
    with pytest.raises(ShapeError, match="4 key heads do not divide among 8 ranks"):
        megatron.shard_weights(model()[0]["layers"][0], 0, 8, HEAD_DIM)


# ---- collectives on nodes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes, per_node", [(1, 4), (2, 3), (4, 2), (3, 1)])
def test_two_levels_gather_and_scatter_what_one_level_does_with_as_many_bytes(nodes, per_node):
    ranks = nodes * per_node
    machine = Cluster(topology.two_level(nodes, per_node, hardware.NVLINK4, hardware.IB_NDR))
    x = np.random.default_rng(0).standard_normal((ranks, ranks * 4, 3))
    gathered = machine.run(two_level.all_gather, shard(x[0]))
    scattered = machine.run(two_level.reduce_scatter, per_rank(x))
    for out in gathered.outputs:
        assert_allclose(out, x[0], rtol=0, atol=0)
    assert_allclose(scattered.gather(), x.sum(axis=0), rtol=0, atol=1e-12)
    part = x[0].nbytes // ranks
    assert (
        set(gathered.traffic.by_pair.sum(axis=1)) == set(scattered.traffic.by_pair.sum(axis=1)) == {(ranks - 1) * part}
    )


def test_what_enters_a_node_is_spread_over_all_its_nics():
    fast, slow = hardware.Link(1e12), hardware.Link(1e9)
    machine = Cluster(topology.two_level(4, 8, fast, slow, inside="switch"), hardware.IDEAL)
    x = shard(like((32 * 1000, 100), "float16"))
    one_ring, two_levels = machine.run(lambda comm, x: comm.all_gather(x), x), machine.run(two_level.all_gather, x)
    part = 1000 * 100 * 2
    assert two_levels.makespan == pytest.approx(3 * part / 1e9, rel=0.05)
    assert one_ring.makespan == pytest.approx(31 * part / 1e9, rel=0.05)


# ---- shape-only, dtypes ----------------------------------------------------------------------------------------------


@WAY
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_shape_only_blocks_send_and_take_what_real_ones_do(way, dtype):
    layout, attention = ways()[way]
    random = np.random.default_rng(0)
    weights = blocks.block_weights(random, *SIZES, dtype)
    x, grad = random.standard_normal((2, TOKENS, H)).astype(dtype)
    real, empty = (
        mesh(4, hardware.H100).run(block_both_ways, w, *(shard(a, 0, layout) for a in arrays), layout, attention)
        for w, arrays in ((weights, (x, grad)), (blocks.block_weights(None, *SIZES, dtype), (like(x), like(grad))))
    )
    assert (real.makespan, real.traffic.total) == (empty.makespan, empty.traffic.total)
    for a, b in zip(real.outputs[0], empty.outputs[0], strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


@WAY
def test_gradients_keep_the_dtype_of_the_weights(way):
    layout, attention = ways()[way]
    weights = blocks.block_weights(None, *SIZES, "float16")
    x = shard(like((TOKENS, H), "float16"), 0, layout)
    outputs = mesh(4).run(block_both_ways, weights, x, x, layout, attention).outputs[0]
    assert {str(a.dtype) for a in outputs} == {"float16"}
