"""Ulysses: exact results whatever attention runs inside, the bytes and flops of the formulas, and every refusal."""

import math
from inspect import getsource

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from reference import dense_attention, dense_attention_backward, scores_and_values
from toolkit.claims.sequence_parallel import ulysses as claims
from toolkit.kernels.layers import linear, split_heads
from toolkit.kernels.linear_attention import chunked, chunked_backward
from toolkit.runtime import Cluster, hardware, like, per_rank, shard, topology
from toolkit.runtime.errors import ShapeError
from toolkit.sequence_parallel import _block as blocks
from toolkit.sequence_parallel import _megatron_sp as megatron
from toolkit.sequence_parallel import _zero3 as zero3
from toolkit.sequence_parallel import ring_attention as ring
from toolkit.sequence_parallel import ulysses

CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
RANKS = pytest.mark.parametrize("ranks", [1, 2, 4, 8])
GROUP = pytest.mark.parametrize("group", [1, 2, 8])
FLOPS, RATE = 1e12, 1e9  # of the device and the link below, whose times can be written down
COUNTER = hardware.Device("counts products only", flops=FLOPS, memory_bandwidth=math.inf)
LINK = hardware.Link(bandwidth=RATE)


def cluster(ranks, device=hardware.IDEAL, link=LINK):
    return Cluster(topology.switch(ranks, link), device)


def inputs(tokens, heads=8, group=1, head_dim=4, dtype=np.float64, seed=0):
    """Random q, k, v and gradient of the output."""
    normal = np.random.default_rng(seed).standard_normal
    q, grad_out = normal((2, heads, tokens, head_dim)).astype(dtype)
    k, v = normal((2, heads // group, tokens, head_dim)).astype(dtype)
    return q, k, v, grad_out


def shapes(tokens, heads=8, group=1, head_dim=4, dtype="float16"):
    q, k = (like((count, tokens, head_dim), dtype) for count in (heads, heads // group))
    return q, k, k, q


def both(comm, q, k, v, grad_out, attention):
    """Output and gradients by a pair of functions, as a block calls them."""
    given = [lambda x=x: x for x in (q, k, v)] if attention.lazy else (q, k, v)
    out, saved = attention.forward(comm, *given)
    return out, *attention.backward(comm, saved, grad_out)


def run_both(machine, arrays, attention, layout="contiguous"):
    return machine.run(both, *(shard(a, 1, layout) for a in arrays), attention)


def assert_dense(run, arrays, causal, *, atol=1e-10):
    """out, dq, dk, dv of a run are those of the dense reference."""
    q, k, v, grad_out = (a.astype(np.float64) for a in arrays)
    want = dense_attention(q, k, v, causal)[0], *dense_attention_backward(q, k, v, grad_out, causal)
    for got, wanted in zip(run.gather(1), want, strict=True):
        assert_allclose(got, wanted, rtol=0, atol=atol)


# ---- exact results ---------------------------------------------------------------------------------------------------


@CAUSAL
@GROUP
@pytest.mark.parametrize("overlap", ["none", "qkv_pipeline"])
@RANKS
def test_outputs_and_gradients_equal_dense_attention(ranks, overlap, group, causal):
    arrays = inputs(32, group=group, seed=ranks)
    attention = ulysses.pair(causal=causal, overlap=overlap, replicate_kv=True)
    assert_dense(run_both(cluster(ranks), arrays, attention), arrays, causal)


@CAUSAL
@pytest.mark.parametrize(
    "ranks, heads, group, tokens",
    [(4, 6, 1, 16), (3, 8, 1, 25), (4, 10, 2, 19), (5, 5, 1, 3), (2, 9, 3, 8)],
    ids=["6 heads on 4", "8 heads and 25 tokens on 3", "5 key heads on 4", "ranks without a token", "3 key heads on 2"],
)
def test_uneven_heads_and_tokens_are_exact(ranks, heads, group, tokens, causal):
    arrays = inputs(tokens, heads, group)
    assert_dense(run_both(cluster(ranks), arrays, ulysses.pair(causal=causal, uneven=True)), arrays, causal)


@CAUSAL
def test_float32_stays_within_1e_5(causal):
    arrays = inputs(64, group=2, head_dim=16, dtype=np.float32)
    assert_dense(run_both(cluster(4), arrays, ulysses.pair(causal=causal)), arrays, causal, atol=3e-5)


def test_float16_gives_float16_back():
    run = run_both(cluster(4), inputs(16, group=8, dtype=np.float16), ulysses.pair(replicate_kv=True))
    assert {a.dtype for a in run.outputs[0]} == {np.dtype(np.float16)}


MACHINES = {
    "mesh": topology.full_mesh(4, LINK),
    "ring": topology.ring(4, LINK),
    "PCIe tree": topology.pcie_tree(2, 2, LINK),
    "two nodes": topology.two_level(2, 2, LINK, hardware.Link(RATE / 8, 1e-6), inside="switch"),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_result_and_bytes_are_the_same_on_every_topology(machine):
    arrays = inputs(16)
    run = run_both(Cluster(MACHINES[machine], COUNTER), arrays, ulysses.pair(causal=True))
    assert_dense(run, arrays, True)
    assert run.traffic.total == 2 * 3 * sum(a.nbytes for a in arrays) // 4  # (P-1)/P of four arrays, twice


@CAUSAL
def test_the_siblings_signature_gives_out_lse_and_gradients(causal):
    q, k, v, grad_out = inputs(24, group=2)
    parts = [shard(a, 1) for a in (q, k, v)]
    ahead = cluster(4).run(ulysses.attention, *parts, causal=causal, return_lse=True)
    for got, want in zip(ahead.gather(1), dense_attention(q, k, v, causal), strict=True):
        assert_allclose(got, want, rtol=0, atol=1e-10)
    kept = ahead.output(0), ahead.output(1), shard(grad_out, 1)
    back = cluster(4).run(ulysses.attention_backward, *parts, *kept, causal=causal)
    for got, want in zip(back.gather(1), dense_attention_backward(q, k, v, grad_out, causal), strict=True):
        assert_allclose(got, want, rtol=0, atol=1e-10)


# ---- any attention inside --------------------------------------------------------------------------------------------


def windowed(width):
    """Causal attention to the last `width` keys, with its score matrix, by hand."""

    def weights(q, k, v):
        scores, _, _ = scores_and_values(q, k, v, True)
        scores[:, np.tri(q.shape[1], k=-width, dtype=bool)] = -np.inf
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return scores / scores.sum(axis=-1, keepdims=True)

    def forward(_comm, q, k, v):
        return weights(q, k, v) @ v, (q, k, v)

    def backward(_comm, saved, grad):
        q, k, v = saved
        p = weights(q, k, v)
        inner = grad @ v.swapaxes(1, 2)
        scores = p * (inner - (p * inner).sum(axis=-1, keepdims=True)) / np.sqrt(q.shape[2])
        return scores @ k, scores.swapaxes(1, 2) @ q, p.swapaxes(1, 2) @ grad

    return blocks.Attention(forward, backward)


def linear_attention():
    def forward(_comm, q, k, v):
        out, _ = chunked(q, k, v, chunk=8)
        return out, (q, k, v, out)

    return blocks.Attention(forward, lambda _comm, saved, grad: chunked_backward(*saved, grad, chunk=8)[:3])


INNER = {"dense": blocks.one_device(True), "windowed": windowed(5), "linear": linear_attention()}


@pytest.mark.parametrize("name", INNER)
@RANKS
def test_any_attention_runs_inside_and_gives_what_it_gives_on_one_device(ranks, name):
    arrays = inputs(32, seed=3)
    run = run_both(cluster(ranks), arrays, ulysses.pair(inner=INNER[name]))
    for got, want in zip(run.gather(1), both(None, *arrays, INNER[name]), strict=True):
        assert_allclose(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens, width", [(16, 4), (14, 4), (3, 4)])
def test_the_block_sparse_attention_of_the_claims_is_dense_attention_under_its_mask(tokens, width):
    q, k, v, grad = inputs(tokens)
    block = np.arange(tokens) // width
    seen = np.tri(tokens, dtype=bool) & (block[:, None] - block <= 1)
    scores, _, _ = scores_and_values(q, k, v, False)
    p = np.where(seen, np.exp(scores), 0)
    p /= p.sum(axis=-1, keepdims=True)
    inner = grad @ v.swapaxes(1, 2)
    d_scores = p * (inner - (p * inner).sum(axis=-1, keepdims=True)) / 2  # root of head_dim 4
    want = p @ v, d_scores @ k, d_scores.swapaxes(1, 2) @ q, p.swapaxes(1, 2) @ grad
    for got, wanted in zip(both(None, q, k, v, grad, claims.local_blocks(width)), want, strict=True):
        assert_allclose(got, wanted, rtol=0, atol=1e-12)


def test_the_three_inner_attentions_differ():
    outs = [both(None, *inputs(32), attention)[0] for attention in INNER.values()]
    assert min(np.abs(outs[a] - outs[b]).max() for a, b in ((0, 1), (0, 2), (1, 2))) > 1e-2


# ---- the swap --------------------------------------------------------------------------------------------------------


def swapped(ranks, x, **options):
    return cluster(ranks).run(ulysses.swap_heads, x, **options)


def test_the_worked_layout_of_two_ranks_four_tokens_four_heads():
    label = np.array([[[10 * token + head] for token in range(4)] for head in range(4)])
    first, second = swapped(2, shard(label, 1)).outputs
    assert first[..., 0].tolist() == [[0, 10, 20, 30], [1, 11, 21, 31]]
    assert second[..., 0].tolist() == [[2, 12, 22, 32], [3, 13, 23, 33]]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(0, 9), st.integers(0, 9), st.integers(1, 3))
def test_there_and_back_is_the_identity_bit_for_bit(ranks, heads, tokens, head_dim):
    x = np.random.default_rng(0).standard_normal((heads, tokens, head_dim))

    def there_and_back(comm, x):
        there = ulysses.swap_heads(comm, x, ulysses.head_slices(heads, comm.size))
        return ulysses.swap_heads(comm, there, ulysses.head_slices(tokens, comm.size), inverse=True)

    assert_array_equal(cluster(ranks).run(there_and_back, shard(x, 1)).gather(1), x)


@RANKS
def test_the_swap_is_a_permutation(ranks):
    x = np.random.default_rng(0).standard_normal((8, 16, 3))
    there = swapped(ranks, shard(x, 1)).gather(0)
    assert_array_equal(there, x)  # joined by heads now, as it was by tokens before


@RANKS
def test_the_inverse_is_the_adjoint(ranks):
    x, y = np.random.default_rng(0).standard_normal((2, 8, 16, 3))
    there = swapped(ranks, shard(x, 1)).outputs
    back = swapped(ranks, shard(y, 0), inverse=True).outputs
    left = sum(np.vdot(a, b) for a, b in zip(there, np.split(y, ranks, axis=0), strict=True))
    right = sum(np.vdot(a, b) for a, b in zip(np.split(x, ranks, axis=1), back, strict=True))
    assert left == pytest.approx(right, rel=1e-12)


@pytest.mark.parametrize("heads, size", [(8, 4), (6, 4), (3, 5), (0, 2), (57, 8)])
def test_head_slices_are_runs_that_cover_all_heads_and_differ_by_one_at_most(heads, size):
    cuts = ulysses.head_slices(heads, size)
    assert [head for start, stop in cuts for head in range(start, stop)] == list(range(heads))
    assert {stop - start for start, stop in cuts} <= {heads // size, heads // size + 1}


# ---- the tests above can fail ----------------------------------------------------------------------------------------


def mutant(name, old, new, **scope):
    """The module's functions, with one piece of `name`'s source replaced, which must be there."""
    module = dict(vars(ulysses))
    source = getsource(module[name])
    assert old in source
    exec(source.replace(old, new), module)
    for other in {"forward", "backward", "pair", "swap_heads", "start_swap", "going_home"} - {name}:
        exec(getsource(getattr(ulysses, other)), module)
    return module


def worst(module, arrays, **options):
    """Largest error of out, dq, dk, dv against the dense reference."""
    run = run_both(cluster(4), arrays, module["pair"](**options))
    want = dense_attention(*arrays[:3])[0], *dense_attention_backward(*arrays)
    return [np.abs(got - wanted).max() for got, wanted in zip(run.gather(1), want, strict=True)]


def test_heads_put_together_in_the_wrong_order_are_caught():
    wrong = mutant("start_swap", "coming.wait()", "(coming.wait()[::-1] if inverse else coming.wait())")
    assert worst(wrong, inputs(16))[0] > 0.1


def test_tokens_put_together_in_the_wrong_order_are_caught_by_a_causal_mask():
    wrong = mutant("start_swap", "coming.wait()", "(coming.wait() if inverse else coming.wait()[::-1])")
    run = run_both(cluster(4), inputs(16), wrong["pair"](causal=True))
    assert np.abs(run.gather(1)[0] - dense_attention(*inputs(16)[:3], True)[0]).max() > 0.1


def test_gradients_of_a_copied_key_head_that_are_not_summed_are_caught():
    wrong = mutant("going_home", "sum_copies(grad, heads)", "grad[:: len(grad) // heads]")
    out, dq, dk, dv = worst(wrong, inputs(16, group=4), replicate_kv=True)
    assert max(out, dq) < 1e-10 < 1e-2 < min(dk, dv)


# ---- bytes and messages ----------------------------------------------------------------------------------------------


def collectives(run, ranks):
    """All-to-alls that each rank took part in."""
    sends = [sum(e.kind == "send" and e.rank == r and e.name == "all_to_all" for e in run.trace) for r in range(ranks)]
    assert len(set(sends)) == 1 and sends[0] % (ranks - 1) == 0
    return sends[0] // (ranks - 1)


def rank_bytes(run):
    """Bytes that a rank sends, the same for all of them."""
    (sent,) = set(run.traffic.by_pair.sum(axis=1).tolist())
    return sent


def ahead(comm, q, k, v, **options):
    return ulysses.forward(comm, q, k, v, inner=blocks.one_device(), **options)[0]


@GROUP
@pytest.mark.parametrize("dtype, size", [("float16", 2), ("float32", 4), ("float64", 8)])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_forward_and_backward_send_the_formula_in_four_all_to_alls_each(ranks, dtype, size, group):
    arrays = shapes(64, group=group, dtype=dtype)
    there = cluster(ranks).run(ahead, *(shard(a, 1) for a in arrays[:3]), replicate_kv=True)
    whole = run_both(cluster(ranks), arrays, ulysses.pair(replicate_kv=True))
    copied = max(8 // group, ranks)  # key heads, each copy counted
    formula = 64 * 4 * size * (2 * 8 + 2 * copied) * (ranks - 1) // ranks**2
    assert (rank_bytes(there), rank_bytes(whole)) == (formula, 2 * formula)
    assert (collectives(there, ranks), collectives(whole, ranks)) == (4, 8)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_bytes_fall_as_the_ranks_grow(ranks):
    run = cluster(ranks).run(ahead, *(shard(a, 1) for a in shapes(64)[:3]))
    assert rank_bytes(run) == 4 * 64 * 8 * 4 * 2 * (ranks - 1) / ranks**2


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_doubling_tokens_and_ranks_multiplies_bytes_by_2p_minus_1_over_2p_minus_2(ranks):
    before, after = (
        rank_bytes(cluster(p).run(ahead, *(shard(a, 1) for a in shapes(32 * p, heads=16)[:3])))
        for p in (ranks, 2 * ranks)
    )
    assert after / before == (2 * ranks - 1) / (2 * ranks - 2)


def test_the_siblings_backward_sends_twice_as_much_and_lse_once():
    arrays = shapes(64)
    parts = [shard(a, 1) for a in arrays[:3]]
    there = cluster(4).run(ulysses.attention, *parts, return_lse=True)
    kept = there.output(0), there.output(1), shard(arrays[3], 1)
    back = cluster(4).run(ulysses.attention_backward, *parts, *kept)
    lse = 64 // 4 * 8 * 4 * 3 // 4
    once = ulysses.predict_bytes(64, 8, 8, 4, 2, 4)["backward"]
    assert (rank_bytes(there), rank_bytes(back)) == (once + lse, 2 * once + lse)


SCHEMES = {"ulysses": ulysses.pair(), "ring": blocks.exact(ring)}


@pytest.mark.parametrize("dtype, size", [("float16", 2), ("float32", 4), ("float64", 8)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_predicted_bytes_are_those_that_are_sent(scheme, dtype, size):
    run = run_both(cluster(4), shapes(64, group=2, dtype=dtype), SCHEMES[scheme])
    assert rank_bytes(run) == sum(ulysses.predict_bytes(64, 8, 4, 4, size, 4, scheme).values())


def block_ahead(comm, weights, x, where, attention, module):
    return module.block(comm, weights, x, where, attention, 4)[0]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_megatron_sends_exactly_p_times_as_much(ranks):
    weights = blocks.block_weights(None, 32, 8, 8, 4, 64, "float16")
    shards = per_rank([megatron.shard_weights(weights, r, ranks, 4) for r in range(ranks)])
    x, where = shard(like((64, 32), "float16")), np.arange(64)
    ours = cluster(ranks).run(block_ahead, weights, x, shard(where), ulysses.pair(), blocks)
    theirs = cluster(ranks).run(block_ahead, shards, x, where, blocks.one_device(), megatron)
    assert rank_bytes(theirs) == ranks * rank_bytes(ours)
    assert rank_bytes(theirs) == ulysses.predict_bytes(64, 8, 8, 4, 2, ranks, "megatron")["forward"]


@pytest.mark.parametrize("nodes", [2, 3])
def test_a_nic_carries_gathered_tokens_once_a_node_and_swapped_heads_almost_whole(nodes):
    hidden = 64 * 2048 * 2  # bytes of the hidden state of 64 tokens on a GPU
    theirs, ours = (
        claims.nic_bytes(claims.forward_run(scheme, 8 * nodes, 64 * 8 * nodes, claims.GPT(1, 24 * 8, 32)))
        for scheme in ("megatron", "ulysses")
    )
    assert theirs == 4 * (nodes - 1) * 3 * hidden
    assert ours == 4 * 3 * hidden * (nodes - 1) // nodes
    assert theirs == nodes * ours


# ---- work and memory -------------------------------------------------------------------------------------------------


@CAUSAL
@GROUP
@RANKS
def test_every_rank_computes_exactly_its_share_of_the_flops(ranks, group, causal):
    run = run_both(cluster(ranks, COUNTER), shapes(64, group=group), ulysses.pair(causal=causal, replicate_kv=True))
    area = 64 * 65 // 2 if causal else 64 * 64
    flops = [sum(e.flops for e in run.trace if e.rank == r) for r in range(ranks)]
    assert flops == [14 * 8 * area * 4 / ranks] * ranks


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_memory_does_not_grow_with_ranks_while_tokens_of_each_stay(ranks):
    one, lse = 16 * 8 * 4 * 2, 16 * 8 * 4  # bytes of one array of a rank, and of its lse
    run = cluster(ranks).run(ahead, *(shard(a, 1) for a in shapes(16 * ranks)[:3]))
    at_the_end = (
        3 * one + 3 * one + one + lse + (ranks - 1) * one // ranks + one
    )  # handed, swapped, result, arriving, out
    assert run.peak_memory == [at_the_end] * ranks


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_three_swapped_arrays_are_as_large_as_the_three_local_ones(ranks):
    def program(comm, q, k, v):
        _, saved = ulysses.forward(comm, q, k, v, inner=blocks.one_device())
        return np.array([sum(a.nbytes for a in saved.kept[:3]), q.nbytes + k.nbytes + v.nbytes])

    for swapped, local in cluster(ranks).run(program, *(shard(a, 1) for a in shapes(16 * ranks)[:3])).outputs:
        assert swapped == local


def test_shape_only_runs_take_the_time_and_bytes_of_real_ones():
    machine = cluster(4, hardware.H100)
    real, empty = (
        run_both(machine, arrays, ulysses.pair(causal=True, replicate_kv=True))
        for arrays in (inputs(16, group=8), shapes(16, group=8, dtype="float64"))
    )
    assert (real.makespan, real.traffic.total) == (empty.makespan, empty.traffic.total)


# ---- overlap ---------------------------------------------------------------------------------------------------------

WIDTH = 1024  # channels: a projection of 32 channels for 16 tokens on a rank


def projected(comm, x, w, overlap):
    """Ulysses that makes q, k and v itself."""
    makers = [lambda: split_heads(linear(x, w), 4) for _ in range(3)]
    return ulysses.forward(comm, *makers, inner=blocks.one_device(), overlap=overlap)[0]


@pytest.mark.parametrize("flops_over_bytes", [0.2, 1, 5], ids=["slow link", "even", "fast link"])
def test_the_pipeline_hides_all_exchanges_of_k_and_q_that_projections_cover(flops_over_bytes):
    project = 2 * 16 * WIDTH * 32 / FLOPS
    swap = project / flops_over_bytes
    link = hardware.Link(16 * 32 * 2 * 3 / 4 / swap)
    x, w = shard(like((64, WIDTH), "float16")), like((WIDTH, 32), "float16")
    plain, piped = (cluster(4, COUNTER, link).run(projected, x, w, overlap) for overlap in ("none", "qkv_pipeline"))
    attend = 4 * 2 * 64 * 64 * 4 / FLOPS
    assert plain.makespan == pytest.approx(3 * project + 3 * swap + attend + swap, rel=1e-6)
    exposed = max(swap, 3 * swap - 2 * project)  # what is left when v has been made
    assert piped.makespan == pytest.approx(3 * project + exposed + attend + swap, rel=1e-6)


@pytest.mark.parametrize("flops_over_bytes", [0.2, 1, 5], ids=["slow link", "even", "fast link"])
def test_backward_hides_the_first_exchange_behind_a_weight_gradient_and_the_last_two_behind_products(flops_over_bytes):
    product = 2 * 16 * WIDTH * 32 / FLOPS  # of one weight's or one input's gradient
    swap = product / flops_over_bytes
    weights = blocks.block_weights(None, WIDTH, 8, 8, 4, 4, "float16")
    x = shard(like((64, WIDTH), "float16"))

    def step(comm, x, grad, attention):
        _, saved = blocks.attend(comm, weights, x, np.arange(16), attention, 4)
        comm.barrier()
        start = comm.now
        blocks.attend_backward(comm, weights, saved, grad, attention, 4)
        return np.array(comm.now - start)

    link = hardware.Link(16 * 32 * 2 * 3 / 4 / swap)
    plain, piped = (
        float(cluster(4, COUNTER, link).run(step, x, x, ulysses.pair(overlap=overlap)).outputs[0])
        for overlap in ("none", "qkv_pipeline")
    )
    attend = 10 * 2 * 64 * 64 * 4 / FLOPS
    assert plain == pytest.approx(8 * product + 4 * swap + attend, rel=1e-6)
    first, others = max(product, swap), 2 * max(2 * product, swap)
    assert piped == pytest.approx(product + first + attend + swap + others + 2 * product, rel=1e-6)


# ---- a ring across nodes ---------------------------------------------------------------------------------------------

LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "zigzag"])


def mesh_parts(x, layout, nodes, ranks):
    where = [ulysses.hybrid_positions(layout, r, nodes, ranks, x.shape[1]) for r in range(ranks)]
    return per_rank([x[:, w] for w in where]), np.argsort(np.concatenate(where))


@CAUSAL
@LAYOUTS
@pytest.mark.parametrize("nodes, ranks", [(1, 4), (2, 4), (4, 4), (2, 8), (4, 8)])
def test_the_mesh_of_swaps_and_rings_is_exact_forward_and_backward(nodes, ranks, layout, causal):
    arrays = inputs(32, heads=8, group=2)
    parts = [mesh_parts(a, layout, nodes, ranks)[0] for a in arrays]
    order = mesh_parts(arrays[0], layout, nodes, ranks)[1]
    run = cluster(ranks).run(both, *parts, ulysses.hybrid_pair(nodes=nodes, causal=causal, layout=layout))
    want = dense_attention(*arrays[:3], causal)[0], *dense_attention_backward(*arrays, causal)
    for got, wanted in zip(run.gather(1), want, strict=True):
        assert_allclose(got[:, order], wanted, rtol=0, atol=1e-10)


@CAUSAL
def test_the_mesh_has_the_signature_of_its_siblings(causal):
    q, k, v, _ = inputs(32)
    run = cluster(4).run(
        ulysses.hybrid_attention, *(shard(a, 1) for a in (q, k, v)), nodes=2, causal=causal, return_lse=True
    )
    for got, want in zip(run.gather(1), dense_attention(q, k, v, causal), strict=True):
        assert_allclose(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_between_nodes_only_keys_and_values_travel(nodes):
    q, k, v, _ = shapes(64, heads=8, group=2)
    run = cluster(8).run(
        ulysses.hybrid_attention, *(shard(a, 1) for a in (q, k, v)), nodes=nodes, replicate_kv=nodes == 1
    )
    node = np.arange(8) // (8 // nodes)
    across = run.traffic.by_pair * (node[:, None] != node)
    inside = run.traffic.by_pair * (node[:, None] == node)
    assert set(across.sum(axis=1).tolist()) == {(nodes - 1) * 2 * 4 * 8 * 4 * 2}
    if nodes > 1:
        want = ulysses.predict_hybrid_bytes(64, 8, 4, 4, 2, 8, nodes)
        assert (set(inside.sum(axis=1)), set(across.sum(axis=1))) == ({want["inside"]}, {want["across"]})


# ---- ZeRO-3 over the same ranks --------------------------------------------------------------------------------------

SIZES, HEAD_DIM = (32, 8, 8, 4, 64), 4  # h, heads, key heads, head_dim, MLP


def zero_step(comm, mine, x, grad):
    """Two blocks, forward and backward, whose weights are spread over the ranks that the tokens are spread over."""
    attention, where = ulysses.pair(causal=True), np.arange(comm.rank * len(x), (comm.rank + 1) * len(x))
    shapes = blocks.shapes(*SIZES)
    y, saved = zero3.forward(
        comm, mine, shapes, x, lambda weights, x: blocks.block(comm, weights, x, where, attention, HEAD_DIM)
    )
    dx, grads = zero3.backward(
        comm, mine, shapes, saved, grad,
        lambda weights, kept, g: blocks.block_backward(comm, weights, kept, g, attention, HEAD_DIM),
    )  # fmt: skip
    return y, dx, *grads


def whole_step(comm, layers, x, grad):
    attention, where, saved, grads = blocks.one_device(True), np.arange(len(x)), [], []
    for weights in layers:
        x, kept = blocks.block(comm, weights, x, where, attention, HEAD_DIM)
        saved.append(kept)
    for weights in reversed(layers):
        grad, g = blocks.block_backward(comm, weights, saved.pop(), grad, attention, HEAD_DIM)
        grads.insert(0, g)
    return x, grad, *(zero3.vector(g) for g in grads)


@pytest.mark.parametrize("ranks", [1, 4])
def test_sharded_weights_give_one_devices_output_and_gradients(ranks):
    random = np.random.default_rng(0)
    layers = [blocks.block_weights(random, *SIZES) for _ in range(2)]
    x, grad = random.standard_normal((2, 16, 32))
    mine = per_rank(zip(*(zero3.pieces(weights, ranks) for weights in layers), strict=True))
    got = cluster(ranks).run(zero_step, mine, shard(x), shard(grad)).gather(0)
    for a, b in zip(got, cluster(1).run(whole_step, layers, x, grad).outputs[0], strict=True):
        assert_allclose(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("nodes", [2, 4])
def test_sharded_weights_do_so_on_several_nodes_too(nodes):
    random = np.random.default_rng(1)
    layers = [blocks.block_weights(random, *SIZES) for _ in range(3)]
    x, grad = random.standard_normal((2, 16, 32))
    mine = per_rank(zip(*(zero3.pieces(weights, 4) for weights in layers), strict=True))
    machine = Cluster(topology.two_level(nodes, 4 // nodes, LINK, hardware.Link(RATE / 8)), COUNTER)
    got = machine.run(zero_step, mine, shard(x), shard(grad)).gather(0)
    for a, b in zip(got, cluster(1).run(whole_step, layers, x, grad).outputs[0], strict=True):
        assert_allclose(a[: len(b)], b, rtol=0, atol=1e-10)


def test_weights_are_gathered_twice_and_gradients_scattered_once_whatever_the_tokens():
    layers = [blocks.block_weights(None, *SIZES, "float16") for _ in range(2)]
    mine = per_rank(zip(*(zero3.pieces(weights, 4) for weights in layers), strict=True))
    count = sum(math.prod(shape) for shape in blocks.shapes(*SIZES).values())
    for tokens in (16, 64):
        x = shard(like((tokens, 32), "float16"))
        run = cluster(4).run(zero_step, mine, x, x)
        sent = {name: sum(e.bytes for e in run.trace if e.kind == "send" and e.name == name)
                for name in ("all_gather", "reduce_scatter", "all_to_all")}  # fmt: skip
        assert sent == {
            "all_gather": 2 * 2 * 3 * count * 2,
            "reduce_scatter": 2 * 3 * count * 2,
            "all_to_all": 2 * 4 * sum(ulysses.predict_bytes(tokens, 8, 8, 4, 2, 4).values()),
        }


# ---- training --------------------------------------------------------------------------------------------------------


def train(comm, params, tokens, targets, attention, steps, rate=0.5):
    """Losses of plain gradient descent, on this rank's tokens."""
    where, losses = np.arange(comm.rank * len(tokens), (comm.rank + 1) * len(tokens)), []
    for _ in range(steps):
        found, grads = blocks.loss_and_gradients(
            comm, params, tokens, targets, where, attention, HEAD_DIM, len(tokens) * comm.size
        )
        params = stepped(params, blocks.sum_gradients(comm, grads), rate)
        losses.append(found)
    return np.array(losses)


def stepped(value, grad, rate):
    if isinstance(value, np.ndarray):
        return value - rate * grad
    if isinstance(value, dict):
        return {name: stepped(value[name], grad[name], rate) for name in value}
    return [stepped(a, b, rate) for a, b in zip(value, grad, strict=True)]


def test_30_steps_of_training_give_one_devices_losses():
    random = np.random.default_rng(0)
    params = blocks.model_weights(random, 9, 2, *SIZES)
    text = random.integers(0, 9, 33)
    one = cluster(1).run(train, params, text[:-1], text[1:], blocks.one_device(True), 30).outputs[0]
    many = cluster(4).run(train, params, shard(text[:-1]), shard(text[1:]), ulysses.pair(causal=True), 30).gather(1)
    assert one[-1].mean() < 0.5 * one[0].mean()
    assert_allclose(many, one, rtol=0, atol=1e-10)


# ---- errors say what to do -------------------------------------------------------------------------------------------


def refused(arrays, message, error=ShapeError, ranks=4, program=ulysses.attention, **options):
    """Each rank is given `arrays` as they are."""
    assert issubclass(error, ValueError)
    with pytest.raises(error, match=message):
        cluster(ranks).run(program, *(per_rank([a] * ranks) for a in arrays), **options)


def test_heads_that_ranks_do_not_divide_are_refused():
    refused(inputs(4, heads=6)[:3], r"6 key heads do not divide among 4 ranks: pad, or allow uneven runs \(uneven=True")


def test_more_ranks_than_key_heads_are_refused_without_copies():
    refused(inputs(4, group=4)[:3], "2 key heads are too few for 4 ranks.*replicate_kv=True")


def test_ranks_that_are_no_multiple_of_the_key_heads_are_refused():
    refused(inputs(4, heads=12, group=4)[:3], "4 ranks cannot share 3 key heads evenly", replicate_kv=True)


def test_more_ranks_than_query_heads_are_refused_even_with_copies():
    refused(inputs(4, heads=2)[:3], "2 query heads do not divide among 4 ranks", replicate_kv=True)


def test_query_heads_that_key_heads_do_not_divide_are_refused():
    q, (k, v) = inputs(4, heads=6)[0], inputs(4, heads=4)[1:3]
    refused((q, k, v), "6 query heads cannot share 4 key heads")


def test_25_tokens_on_4_ranks_are_refused():
    q, k, v, _ = inputs(25)
    with pytest.raises(ShapeError, match="25 tokens do not divide among 4 ranks"):
        cluster(4).run(ulysses.attention, *(shard(a, 1) for a in (q, k, v)))


def test_runs_that_are_not_contiguous_shares_are_refused():
    arrays = [per_rank([x[:, :n] for n in (5, 3, 4, 4)]) for x in inputs(8)[:3]]
    with pytest.raises(ShapeError, match=r"rank \d of 4 holds \d of 16 tokens, and contiguous runs give it 4"):
        cluster(4).run(ulysses.attention, *arrays)


@pytest.mark.parametrize("inverse, what", [(False, "6 heads"), (True, "6 tokens")])
def test_a_swap_along_the_wrong_axis_is_refused(inverse, what):
    refused([np.ones((6, 6, 2))], f"{what} do not divide among 4 ranks", program=ulysses.swap_heads, inverse=inverse)


def test_a_swap_of_a_matrix_is_refused():
    refused([np.ones((8, 8))], r"\(8, 8\): it must be \(heads, tokens, head_dim\)", program=ulysses.swap_heads)


def test_an_unknown_overlap_is_refused():
    refused(inputs(4)[:3], "'all' is neither 'none' nor 'qkv_pipeline'", ValueError, overlap="all")


def test_nodes_that_do_not_divide_the_ranks_are_refused():
    refused(inputs(4)[:3], "4 ranks do not divide into 3 nodes", program=ulysses.hybrid_attention, nodes=3)


def test_an_unknown_scheme_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="ulysses, megatron, ring"):
        ulysses.predict_bytes(64, 8, 8, 4, 2, 4, "spiral")
