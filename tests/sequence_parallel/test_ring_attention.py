"""Ring attention and its baselines: exact results, and the bytes, times and memory that the formulas say."""

import ast
import math
from inspect import getsource

import numpy as np
import pytest
from numpy.testing import assert_allclose

from reference import dense_attention, dense_attention_backward
from toolkit.claims.sequence_parallel import ring_attention as claims
from toolkit.runtime import Cluster, hardware, like, per_rank, positions, shard, topology
from toolkit.runtime.errors import DtypeError, OutOfDeviceMemory, ShapeError
from toolkit.sequence_parallel import ring_attention as ring

LAYOUTS = ["contiguous", "zigzag", "striped"]
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
FLOPS, RATE = 1e12, 1e9  # of the device and the link below, whose times can be written down
COUNTER = hardware.Device("counts products only", flops=FLOPS, memory_bandwidth=math.inf)
INSTANT = hardware.Link(bandwidth=math.inf)
LINK = hardware.Link(bandwidth=RATE)


def mesh(ranks, link=INSTANT, device=hardware.IDEAL):
    return Cluster(topology.full_mesh(ranks, link), device=device)


def inputs(tokens, heads=2, group=1, head_dim=8, dtype=np.float64, seed=0):
    """Random q, k, v and gradient of the output."""
    normal = np.random.default_rng(seed).standard_normal
    q, grad_out = normal((2, heads, tokens, head_dim)).astype(dtype)
    k, v = normal((2, heads // group, tokens, head_dim)).astype(dtype)
    return q, k, v, grad_out


def shapes(ranks, local, heads=8, group=1, head_dim=16, dtype="float32"):
    """The same without data: `local` tokens a rank."""
    q, k = (like((count, ranks * local, head_dim), dtype) for count in (heads, heads // group))
    return q, k, k, q


def forward(cluster, q, k, v, *, program=ring.attention, layout="contiguous", **options):
    return cluster.run(program, *(shard(a, 1, layout) for a in (q, k, v)), layout=layout, **options)


def both_ways(cluster, q, k, v, grad_out, *, layout="contiguous", causal=False):
    """The finished forward and backward runs."""
    ahead = forward(cluster, q, k, v, layout=layout, causal=causal, return_lse=True)
    kept = (*(shard(a, 1, layout) for a in (q, k, v)), ahead.output(0), ahead.output(1), shard(grad_out, 1, layout))
    return ahead, cluster.run(ring.attention_backward, *kept, layout=layout, causal=causal)


def wide(*arrays):
    return (a.astype(np.float64) for a in arrays)


# ---- exact results ---------------------------------------------------------------------------------------------------


@CAUSAL
@LAYOUT
@pytest.mark.parametrize("group", [1, 2, 8])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_forward_equals_dense_attention(ranks, group, layout, causal):
    q, k, v, _ = inputs(48, heads=8, group=group, seed=ranks)
    out, lse = forward(mesh(ranks), q, k, v, layout=layout, causal=causal, return_lse=True).gather(1, layout)
    want_out, want_lse = dense_attention(q, k, v, causal)
    assert_allclose(out, want_out, rtol=0, atol=1e-10)
    assert_allclose(lse, want_lse, rtol=0, atol=1e-10)


@CAUSAL
@LAYOUT
@pytest.mark.parametrize("group", [1, 2, 8])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_backward_equals_dense_gradients(ranks, group, layout, causal):
    q, k, v, grad_out = inputs(48, heads=8, group=group, seed=ranks)
    _, run = both_ways(mesh(ranks), q, k, v, grad_out, layout=layout, causal=causal)
    for got, want in zip(run.gather(1, layout), dense_attention_backward(q, k, v, grad_out, causal), strict=True):
        assert_allclose(got, want, rtol=0, atol=1e-10)


@CAUSAL
@pytest.mark.parametrize("ranks", range(1, 10))
def test_25_tokens_on_any_number_of_ranks_are_exact(ranks, causal):
    q, k, v, grad_out = inputs(25, seed=ranks)
    ahead, back = both_ways(mesh(ranks), q, k, v, grad_out, causal=causal)
    assert_allclose(ahead.gather(1)[0], dense_attention(q, k, v, causal)[0], rtol=0, atol=1e-10)
    for got, want in zip(back.gather(1), dense_attention_backward(q, k, v, grad_out, causal), strict=True):
        assert_allclose(got, want, rtol=0, atol=1e-10)


@CAUSAL
def test_ranks_without_a_token_do_no_harm(causal):
    q, k, v, grad_out = inputs(3)
    ahead, back = both_ways(mesh(5), q, k, v, grad_out, causal=causal)
    assert_allclose(ahead.gather(1)[0], dense_attention(q, k, v, causal)[0], rtol=0, atol=1e-10)
    assert_allclose(back.gather(1)[0], dense_attention_backward(q, k, v, grad_out, causal)[0], rtol=0, atol=1e-10)


@CAUSAL
@LAYOUT
def test_float32_stays_within_5e_6_forward_and_5e_5_backward(layout, causal):
    arrays = inputs(96, heads=4, group=2, head_dim=16, dtype=np.float32)
    ahead, back = both_ways(mesh(8), *arrays, layout=layout, causal=causal)
    q, k, v, grad_out = wide(*arrays)
    assert_allclose(ahead.gather(1, layout)[0], dense_attention(q, k, v, causal)[0], rtol=0, atol=5e-6)
    for got, want in zip(back.gather(1, layout), dense_attention_backward(q, k, v, grad_out, causal), strict=True):
        assert got.dtype == np.float32
        assert_allclose(got, want, rtol=0, atol=5e-5)


def test_float16_is_accumulated_in_float32():
    arrays = inputs(64, dtype=np.float16)
    ahead, back = both_ways(mesh(8), *arrays)
    q, k, v, _ = wide(*arrays)
    out, lse = ahead.gather(1)
    assert (out.dtype, lse.dtype, back.outputs[0][1].dtype) == (np.float16, np.float32, np.float32)
    assert_allclose(out, dense_attention(q, k, v)[0], rtol=0, atol=1e-3)  # one rounding to 11 bits, of values below 2


MACHINES = {
    "full mesh": topology.full_mesh(8, LINK),
    "ring": topology.ring(8, LINK),
    "switch": topology.switch(8, LINK),
    "PCIe tree": topology.pcie_tree(2, 4, LINK),
    "half-duplex PCIe tree": topology.pcie_tree(4, 2, hardware.Link(bandwidth=RATE, duplex=False)),
    "two levels": topology.two_level(2, 4, LINK, hardware.Link(bandwidth=RATE / 10, latency=1e-6)),
}


@LAYOUT
@pytest.mark.parametrize("machine", MACHINES)
def test_result_and_bytes_are_the_same_on_every_topology(machine, layout):
    q, k, v, _ = inputs(32)
    run = forward(Cluster(MACHINES[machine], device=COUNTER), q, k, v, layout=layout, causal=True)
    assert_allclose(run.gather(1, layout), dense_attention(q, k, v, True)[0], rtol=0, atol=1e-10)
    assert run.traffic.total == 7 * (k.nbytes + v.nbytes)


def rotated(x, where):
    """Rotary embedding of tokens at global positions `where`."""
    half = x.shape[-1] // 2
    angle = where[:, None] / 100 ** (np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate((a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)), axis=-1)


@LAYOUT
def test_embeddings_by_global_position_give_one_result_for_all_layouts(layout):
    q, k, v, _ = inputs(24)

    def program(comm, q, k, v):
        where = positions(layout, comm.rank, comm.size, 24)
        return ring.attention(comm, rotated(q, where), rotated(k, where), v, causal=True, layout=layout)

    run = mesh(4).run(program, *(shard(a, 1, layout) for a in (q, k, v)))
    tokens = np.arange(24)
    want = dense_attention(rotated(q, tokens), rotated(k, tokens), v, True)[0]
    assert_allclose(run.gather(1, layout), want, rtol=0, atol=1e-10)


# ---- the tests above can fail ----------------------------------------------------------------------------------------


def mutant(function, old, new):
    """`function` with one piece of its source replaced, which must be there."""
    source = getsource(function)
    assert old in source
    scope = dict(vars(ring))
    exec(source.replace(old, new), scope)
    return scope[function.__name__]


def test_a_ring_that_stops_one_step_early_is_caught():
    q, k, v, _ = inputs(32)
    short = mutant(ring.attention, "range(comm.size)", "range(comm.size - 1)")
    got = forward(mesh(4), q, k, v, program=short).gather(1)
    assert np.max(np.abs(got - dense_attention(q, k, v)[0])) > 1e-2


def test_gradients_that_stop_one_hop_before_home_are_caught():
    q, k, v, grad_out = inputs(32)
    ahead = forward(mesh(4), q, k, v, return_lse=True)
    lost = mutant(ring.attention_backward, "travelling.wait() if travelling else grads", "travelling.wait() and grads")
    kept = (*(shard(a, 1) for a in (q, k, v)), ahead.output(0), ahead.output(1), shard(grad_out, 1))
    grad_k = mesh(4).run(lost, *kept).gather(1)[1]
    want = dense_attention_backward(q, k, v, grad_out)[1]
    assert np.max(np.abs(grad_k - want)) > 1e-2
    assert_allclose(np.roll(grad_k, 8, axis=1), want, rtol=0, atol=1e-10)  # complete, but one rank away


def test_the_plain_forward_reads_in_ten_lines():
    (function,) = ast.parse(getsource(ring.attention)).body
    _docstring, first, *_, last = function.body
    assert last.end_lineno - first.lineno + 1 <= 10


# ---- work ------------------------------------------------------------------------------------------------------------


def areas(run, heads=8, head_dim=16):
    """Scores each rank computed, from the flops of its kernels."""
    total = np.zeros(run.cluster.size)
    for event in run.trace:
        if event.kind == "compute" and event.name == "attention":
            total[event.rank] += event.flops
    return total / (4 * heads * head_dim)


N, C = 8, 32  # ranks, tokens of each, where a formula is in these letters
AREA = {
    "contiguous": [C * (C + 1) / 2 + r * C**2 for r in range(N)],
    "striped": [(r + 1) * C * (C + 1) / 2 + (N - 1 - r) * C * (C - 1) / 2 for r in range(N)],
    "zigzag": [N * C * (N * C + 1) / (2 * N)] * N,
}
LOCK_STEP = {
    "contiguous": C * (C + 1) / 2 + (N - 1) * C**2,
    "striped": N * C * (C + 1) / 2,
    "zigzag": N * C * (N * C + 1) / (2 * N),
}


@LAYOUT
def test_causal_score_area_of_each_rank_is_the_closed_formula(layout):
    q, k, v, _ = shapes(N, C)
    run = forward(mesh(N, device=COUNTER), q, k, v, layout=layout, causal=True)
    assert areas(run).tolist() == AREA[layout]


@LAYOUT
def test_without_a_mask_every_layout_computes_every_score(layout):
    q, k, v, _ = shapes(N, C)
    assert areas(forward(mesh(N, device=COUNTER), q, k, v, layout=layout)).tolist() == [N * C**2] * N


@LAYOUT
def test_causal_makespan_without_transfers_is_the_sum_of_the_steps_maxima(layout):
    q, k, v, _ = shapes(N, C)
    run = forward(mesh(N, device=COUNTER), q, k, v, layout=layout, causal=True)
    assert run.makespan == pytest.approx(4 * 8 * 16 * LOCK_STEP[layout] / FLOPS, rel=1e-9)


def test_contiguous_takes_almost_2_minus_1_over_n_times_the_ideal():
    q, k, v, _ = shapes(N, 4096)
    slow, ideal = (forward(mesh(N, device=COUNTER), q, k, v, layout=layout, causal=True) for layout in LAYOUTS[:2])
    assert slow.makespan / ideal.makespan == pytest.approx(2 - 1 / N, rel=1e-4)


@CAUSAL
@LAYOUT
def test_block_plan_is_what_the_ring_computes(layout, causal):
    q, k, v, _ = shapes(N, C)
    planned = np.zeros(N)
    for _step, rank, _query, _key, share in ring.block_plan(N, C, causal, layout):
        planned[rank] += share * C**2
    run = forward(mesh(N, device=COUNTER), q, k, v, layout=layout, causal=causal)
    assert_allclose(planned, areas(run), rtol=1e-12)


@LAYOUT
def test_backward_costs_two_and_a_half_times_the_forward_products(layout):
    ahead, back = both_ways(mesh(N, device=COUNTER), *shapes(N, C), layout=layout, causal=True)
    assert back.makespan == pytest.approx(2.5 * ahead.makespan, rel=1e-9)


# ---- bytes and messages ----------------------------------------------------------------------------------------------


def sent(run):
    """Messages that each rank sent."""
    count = [0] * run.cluster.size
    for event in run.trace:
        count[event.rank] += event.kind == "send"
    return count


WIRE = pytest.mark.parametrize("dtype, size", [("float16", 2), ("float32", 4), ("float64", 8)])
GROUP = pytest.mark.parametrize("group", [1, 2, 8])


@WIRE
@GROUP
@LAYOUT
def test_forward_sends_n_minus_1_blocks_to_the_next_rank(layout, group, dtype, size):
    q, k, v, _ = shapes(N, C, group=group, dtype=dtype)
    run = forward(mesh(N), q, k, v, layout=layout, causal=True)
    block = 2 * (8 // group) * C * 16 * size
    assert (run.traffic.by_pair == (N - 1) * block * np.roll(np.eye(N, dtype=int), 1, axis=1)).all()
    assert sent(run) == [N - 1] * N


@WIRE
@GROUP
@LAYOUT
def test_backward_sends_n_minus_1_blocks_and_n_gradients_in_float32_or_wider(layout, group, dtype, size):
    _, run = both_ways(mesh(N), *shapes(N, C, group=group, dtype=dtype), layout=layout, causal=True)
    values = 2 * (8 // group) * C * 16
    each = (N - 1) * values * size + N * values * max(size, 4)
    assert (run.traffic.by_pair == each * np.roll(np.eye(N, dtype=int), 1, axis=1)).all()
    assert sent(run) == [2 * N - 1] * N


def test_one_rank_sends_nothing_forward_or_backward():
    ahead, back = both_ways(mesh(1), *shapes(1, C))
    assert (ahead.traffic.total, back.traffic.total, sent(ahead), sent(back)) == (0, 0, [0], [0])


# ---- time ------------------------------------------------------------------------------------------------------------

# 32 tokens: transfers take longer than a step computes; 2048: shorter. κ and the step are equal at 250 tokens.
LOCAL = pytest.mark.parametrize("local", [32, 250, 2048])


def step_and_transfer(local, group=1):
    """Seconds that a full block computes, and that k and v of `local` tokens travel."""
    return 4 * 8 * local**2 * 16 / FLOPS, 2 * (8 // group) * local * 16 * 4 / RATE / 8


FAST = hardware.Link(bandwidth=8 * RATE)


@LOCAL
@GROUP
@pytest.mark.parametrize("ranks", [1, 2, 5, 8])
def test_forward_takes_the_longer_of_compute_and_transfer_in_every_step(ranks, group, local):
    q, k, v, _ = shapes(ranks, local, group=group)
    run = forward(mesh(ranks, FAST, COUNTER), q, k, v)
    compute, transfer = step_and_transfer(local, group)
    assert run.makespan == pytest.approx((ranks - 1) * max(compute, transfer) + compute, rel=1e-9)


@LOCAL
def test_latency_is_hidden_together_with_the_transfer(local):
    q, k, v, _ = shapes(N, local)
    run = forward(mesh(N, hardware.Link(8 * RATE, latency=1e-6), COUNTER), q, k, v)
    compute, transfer = step_and_transfer(local)
    assert run.makespan == pytest.approx((N - 1) * max(compute, transfer + 1e-6) + compute, rel=1e-9)


@LOCAL
def test_without_overlap_compute_and_transfer_add_up(local):
    q, k, v, _ = shapes(N, local)
    run = forward(mesh(N, FAST, COUNTER), q, k, v, program=ring.blocking_ring_attention)
    compute, transfer = step_and_transfer(local)
    assert run.makespan == pytest.approx((N - 1) * (compute + transfer) + compute, rel=1e-9)


@LOCAL
def test_gathering_first_exposes_every_transfer(local):
    q, k, v, _ = shapes(N, local)
    run = forward(mesh(N, FAST, COUNTER), q, k, v, program=ring.all_gather_attention)
    compute, transfer = step_and_transfer(local)
    assert run.makespan == pytest.approx((N - 1) * transfer + N * compute, rel=1e-9)


@LOCAL
def test_two_directions_halve_the_transfer(local):
    q, k, v, _ = shapes(N, local)
    run = forward(mesh(N, FAST, COUNTER), q, k, v, program=ring.bidirectional_attention)
    compute, transfer = step_and_transfer(local)
    assert run.makespan == pytest.approx((N - 1) * max(compute, transfer / 2) + compute, rel=1e-9)


@CAUSAL
@LAYOUT
def test_numeric_and_shape_only_runs_have_the_same_times_bytes_and_memory(layout, causal):
    arrays = inputs(N * 8, dtype=np.float32)
    cluster = mesh(N, hardware.NVLINK3, hardware.A100)
    real, shape_only = (both_ways(cluster, *a, layout=layout, causal=causal) for a in (arrays, like(arrays)))
    for ours, theirs in zip(real, shape_only, strict=True):
        assert list(ours.trace) == list(theirs.trace)
        assert (ours.makespan, ours.peak_memory) == (theirs.makespan, theirs.peak_memory)
        assert (ours.traffic.by_pair == theirs.traffic.by_pair).all()


# ---- memory ----------------------------------------------------------------------------------------------------------


@CAUSAL
@GROUP
@pytest.mark.parametrize("ranks", [2, 3, 8, 33])
def test_peak_memory_is_q_two_pairs_of_k_and_v_and_two_results_for_any_number_of_ranks(ranks, group, causal):
    q, k, v, _ = shapes(ranks, C, group=group)
    run = forward(mesh(ranks, FAST, COUNTER), q, k, v, causal=causal)
    query, pair, result = 8 * C * 16 * 4, 2 * (8 // group) * C * 16 * 4, 8 * C * (16 + 1) * 4
    assert run.peak_memory == [query + 2 * pair + 2 * result] * ranks


def test_one_rank_needs_no_second_pair_of_k_and_v():
    q, k, v, _ = shapes(1, C)
    query, pair, result = 8 * C * 16 * 4, 2 * 8 * C * 16 * 4, 8 * C * (16 + 1) * 4
    assert forward(mesh(1, FAST, COUNTER), q, k, v).peak_memory == [query + pair + 2 * result]


def test_gathering_holds_the_keys_and_values_of_all_ranks():
    q, k, v, _ = shapes(N, C)
    run = forward(mesh(N, FAST, COUNTER), q, k, v, program=ring.all_gather_attention)
    assert min(run.peak_memory) >= N * 2 * 8 * C * 16 * 4


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_the_longest_context_fits_and_one_token_more_on_each_device_does_not(devices):
    cluster = Cluster(topology.switch(devices, hardware.NVLINK3), device=hardware.A100)
    longest = claims.tokens_that_fit(devices) // devices
    assert max(claims.forward(cluster, longest).peak_memory) <= hardware.A100.memory_capacity
    with pytest.raises(OutOfDeviceMemory):
        claims.forward(cluster, longest + 1)


@pytest.mark.parametrize("devices", [3, 8, 32])
def test_context_is_proportional_to_the_devices_from_two_on(devices):
    assert claims.tokens_that_fit(devices) * 2 == claims.tokens_that_fit(2) * devices


# ---- when communication is free: F/β tokens --------------------------------------------------------------------------

RULE = claims.bandwidth_only(hardware.NVLINK3), claims.products_only(hardware.A100)  # F/β = 1040


@pytest.mark.parametrize("kv_heads, tokens", [(32, 1040), (16, 520), (4, 132)])  # 130, in steps of 4 tokens
def test_groups_of_g_queries_hide_transfers_from_blocks_of_f_over_beta_g_on(kv_heads, tokens):
    assert claims.knee(*RULE, kv_heads=kv_heads) == tokens


def test_causal_zigzag_needs_blocks_twice_as_long():
    assert claims.knee(*RULE, causal=True, layout="zigzag") == 2080


# ---- baselines -------------------------------------------------------------------------------------------------------

BASELINES = [ring.blocking_ring_attention, ring.all_gather_attention, ring.bidirectional_attention]
BASELINE = pytest.mark.parametrize("program", BASELINES, ids=lambda f: f.__name__)


@BASELINE
@CAUSAL
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_baselines_equal_dense_attention(ranks, layout, causal, program):
    q, k, v, _ = inputs(96, heads=4, group=2)
    run = forward(mesh(ranks), q, k, v, program=program, layout=layout, causal=causal, return_lse=True)
    for got, want in zip(run.gather(1, layout), dense_attention(q, k, v, causal), strict=True):
        assert_allclose(got, want, rtol=0, atol=1e-10)


@BASELINE
@CAUSAL
@pytest.mark.parametrize("tokens", [3, 9, 25])
def test_baselines_take_uneven_token_counts(tokens, causal, program):
    q, k, v, _ = inputs(tokens)
    run = forward(mesh(8), q, k, v, program=program, causal=causal)
    assert_allclose(run.gather(1), dense_attention(q, k, v, causal)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("program", BASELINES[:2], ids=lambda f: f.__name__)
def test_baselines_take_stripes(program):
    q, k, v, _ = inputs(24)
    run = forward(mesh(4), q, k, v, program=program, layout="striped", causal=True)
    assert_allclose(run.gather(1, "striped"), dense_attention(q, k, v, True)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("program", BASELINES[:2], ids=lambda f: f.__name__)
def test_baselines_send_the_bytes_of_the_ring(program):
    q, k, v, _ = shapes(N, C)
    run = forward(mesh(N), q, k, v, program=program)
    assert (run.traffic.by_pair == forward(mesh(N), q, k, v).traffic.by_pair).all()


def test_two_directions_carry_half_of_the_bytes_each():
    q, k, v, _ = shapes(N, C)
    run = forward(mesh(N), q, k, v, program=ring.bidirectional_attention)
    each = (N - 1) * 8 * C * 16 * 4
    ahead = np.roll(np.eye(N, dtype=int), 1, axis=1)
    assert (run.traffic.by_pair == each * (ahead + ahead.T)).all()


# ---- errors say what to do -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout, message",
    [
        ("zigzag", r"25 tokens do not divide into 16 zigzag chunks for 8 ranks: pad to 32 or use layout='contiguous'"),
        ("striped", r"25 tokens do not divide into 8 striped chunks for 8 ranks: pad to 32 or use layout='contiguous'"),
    ],
)
def test_25_tokens_on_8_ranks_are_refused_by_name(layout, message):
    q, k, v, _ = inputs(25)
    with pytest.raises(ShapeError, match=message):
        forward(mesh(8), q, k, v, layout=layout, causal=True)


def refused(arrays, message, *, program=ring.attention, error=ShapeError, **options):
    """Each of 4 ranks is given `arrays` as they are."""
    assert issubclass(error, ValueError)
    with pytest.raises(error, match=message):
        mesh(4).run(program, *(per_rank([a] * 4) for a in arrays), **options)


def test_zigzag_ranks_with_an_odd_number_of_tokens_are_refused():
    refused(inputs(3)[:3], "zigzag needs an even number of tokens a rank, got 3", causal=True, layout="zigzag")


def test_an_unknown_layout_is_answered_with_the_known_ones():
    refused(inputs(4)[:3], "'spiral' is not one of contiguous, zigzag, striped", layout="spiral")


def test_heads_that_key_heads_do_not_divide_are_refused():
    (q, *_), (_, k, v, _) = inputs(4, heads=6), inputs(4, heads=4)
    refused((q, k, v), "6 query heads cannot share 4 key heads")


def test_keys_without_as_many_values_are_refused():
    q, k, v, _ = inputs(4)
    refused((q, k, v[:, :3]), "must have the same shape")


def test_mixed_dtypes_are_refused():
    q, k, v, _ = inputs(4)
    refused((q, k.astype(np.float32), v), "k float32", error=DtypeError)


def test_integers_are_refused():
    refused([a.astype(int) for a in inputs(4)[:3]], "int64", error=DtypeError)


def test_half_a_stripe_is_refused_by_the_bidirectional_ring():
    program = ring.bidirectional_attention
    refused(inputs(4)[:3], "contiguous and zigzag", program=program, causal=True, layout="striped")


def test_zigzag_chunks_that_cannot_be_halved_are_refused_by_the_bidirectional_ring():
    program = ring.bidirectional_attention
    refused(inputs(6)[:3], "in multiples of 4, got 6", program=program, causal=True, layout="zigzag")
