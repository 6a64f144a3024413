"""TokenRing: exact, with exactly the messages, bytes and seconds of its formulas; faster only where it should be."""

from dataclasses import replace
from math import inf

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from reference import dense_attention, dense_attention_backward
from toolkit.claims.sequence_parallel import token_ring as claims
from toolkit.runtime import Cluster, hardware, like, shard, topology
from toolkit.runtime.errors import ShapeError
from toolkit.sequence_parallel import ring_attention as ring
from toolkit.sequence_parallel import token_ring

LINK = hardware.Link(1e9)  # 1 GB/s each way, no latency
COUNTING = hardware.Device("finite arithmetic, free memory", flops=1e12, memory_bandwidth=inf)
HEAD_DIM = 128  # of shape-only runs: lse is 1/64 of the bytes of a result
MASKS = [(False, "contiguous"), (True, "contiguous"), (True, "zigzag"), (True, "striped")]


def normal(tokens, heads=4, kv_heads=4, head_dim=8, seed=0, dtype=np.float64):
    """q, k, v, grad_out."""
    random = np.random.default_rng(seed)
    return [random.standard_normal((h, tokens, head_dim)).astype(dtype) for h in (heads, kv_heads, kv_heads, heads)]


def mesh(ranks, device=hardware.IDEAL):
    return Cluster(topology.full_mesh(ranks, LINK), device)


def sharded(arrays, layout):
    return [shard(a, axis=1, layout=layout) for a in arrays]


def worst(run, expected, layout):
    got = run.gather(axis=1, layout=layout)
    return max(np.abs(a - b).max() for a, b in zip(got, expected, strict=True))


# ---- exact -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal, layout", MASKS)
@pytest.mark.parametrize("ranks", range(1, 10))
def test_equals_dense_attention_on_any_number_of_ranks(ranks, causal, layout):
    q, k, v, _ = normal(12 * ranks, seed=ranks)
    run = mesh(ranks).run(
        token_ring.attention, *sharded((q, k, v), layout), causal=causal, layout=layout, return_lse=True
    )
    assert worst(run, dense_attention(q, k, v, causal), layout) < 1e-12


@pytest.mark.parametrize("causal, layout", MASKS)
@pytest.mark.parametrize("group", [1, 2, 4])
def test_equals_dense_attention_with_grouped_heads(group, causal, layout):
    q, k, v, _ = normal(48, heads=8, kv_heads=8 // group, seed=group)
    run = mesh(4).run(token_ring.attention, *sharded((q, k, v), layout), causal=causal, layout=layout, return_lse=True)
    assert worst(run, dense_attention(q, k, v, causal), layout) < 1e-12


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [31, 9, 8])
def test_uneven_shards_are_exact_too(tokens, causal):
    q, k, v, _ = normal(tokens)
    run = mesh(8).run(token_ring.attention, *sharded((q, k, v), "contiguous"), causal=causal, return_lse=True)
    assert worst(run, dense_attention(q, k, v, causal), "contiguous") < 1e-12


@pytest.mark.parametrize("causal, layout", MASKS)
def test_float32_stays_within_two_millionths(causal, layout):
    q, k, v, _ = normal(512, heads=8, kv_heads=8, head_dim=16)
    run = mesh(8).run(
        token_ring.attention,
        *sharded([a.astype(np.float32) for a in (q, k, v)], layout),
        causal=causal,
        layout=layout,
        return_lse=True,
    )
    exact = dense_attention(*(a.astype(np.float32).astype(np.float64) for a in (q, k, v)), causal)
    assert worst(run, exact, layout) < 2e-6


def test_sixteen_bits_on_the_wire_cost_accuracy_but_less_than_five_thousandths():
    q, k, v, _ = normal(256, dtype=np.float32)
    exact = dense_attention(*(a.astype(np.float64) for a in (q, k, v)))
    error = {
        wire: worst(
            mesh(8).run(token_ring.attention, *sharded((q, k, v), "contiguous"), return_lse=True, wire_dtype=wire),
            exact,
            "contiguous",
        )
        for wire in (None, np.float16)
    }
    assert error[None] < error[np.float16] < 5e-3


@pytest.mark.parametrize("causal, layout", [(False, "contiguous"), (True, "contiguous"), (True, "zigzag")])
@pytest.mark.parametrize("nodes, per_node", [(1, 3), (2, 2), (2, 4), (3, 2), (4, 1)])
def test_hybrid_equals_dense_attention(nodes, per_node, causal, layout):
    q, k, v, _ = normal(48, kv_heads=2)
    machine = topology.two_level(nodes, per_node, LINK, LINK)
    run = Cluster(machine, hardware.IDEAL).run(
        token_ring.hybrid_attention,
        *sharded((q, k, v), layout),
        nodes=nodes,
        causal=causal,
        layout=layout,
        return_lse=True,
    )
    assert worst(run, dense_attention(q, k, v, causal), layout) < 1e-12


def gradients(arrays, ranks, causal, layout, cluster=None):
    """Forward, then backward: the run of the backward pass."""
    cluster = cluster or mesh(ranks)
    q, k, v, grad_out = sharded(arrays, layout)
    forward = cluster.run(token_ring.attention, q, k, v, causal=causal, layout=layout, return_lse=True)
    kept = forward.output(0), forward.output(1)
    return cluster.run(token_ring.attention_backward, q, k, v, *kept, grad_out, causal=causal, layout=layout)


@pytest.mark.parametrize("causal, layout", MASKS)
@pytest.mark.parametrize("ranks", range(1, 10))
def test_gradients_equal_the_dense_ones(ranks, causal, layout):
    q, k, v, grad_out = arrays = normal(12 * ranks, kv_heads=2, seed=ranks)
    run = gradients(arrays, ranks, causal, layout)
    assert worst(run, dense_attention_backward(q, k, v, grad_out, causal), layout) < 1e-10


@pytest.mark.parametrize("changed", [0, 1, 2], ids=["dq", "dk", "dv"])
def test_gradients_agree_with_finite_differences(changed):
    arrays = normal(128, kv_heads=2)
    along = np.random.default_rng(1).standard_normal(arrays[changed].shape)

    def loss(step):
        moved = [a + step * along if i == changed else a for i, a in enumerate(arrays[:3])]
        run = mesh(4).run(token_ring.attention, *sharded(moved, "zigzag"), causal=True, layout="zigzag")
        return np.vdot(run.gather(axis=1, layout="zigzag"), arrays[3])

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    gradient = gradients(arrays, 4, True, "zigzag").gather(axis=1, layout="zigzag")[changed]
    assert np.vdot(gradient, along) == pytest.approx(slope, rel=1e-6)


def test_a_merge_that_forgets_the_lse_is_caught(monkeypatch):
    """Proof that the tests above can fail: blocks averaged as if each had the same weight."""

    def average(acc, part, seen=None):
        acc[0][...] = (acc[0] + part[0]) / 2

    q, k, v, _ = normal(48)
    monkeypatch.setattr(token_ring, "merge", average)
    run = mesh(4).run(token_ring.attention, *sharded((q, k, v), "contiguous"))
    assert np.abs(run.gather(axis=1) - dense_attention(q, k, v, False)[0]).max() > 0.01


def test_a_ring_that_skips_the_tail_is_caught(monkeypatch):
    q, k, v, _ = normal(48)
    taken = []
    honest = token_ring.take
    monkeypatch.setattr(
        token_ring,
        "take",
        lambda acc, block, part: (taken.append(1), len(taken) > 12 or honest(acc, block, part)),
    )
    run = mesh(4).run(token_ring.attention, *sharded((q, k, v), "contiguous"))
    assert len(taken) == 16  # 4 ranks take 4 blocks each; the last of each never arrived
    assert np.abs(run.gather(axis=1) - dense_attention(q, k, v, False)[0]).max() > 0.01


# ---- messages --------------------------------------------------------------------------------------------------------


def shapes(tokens=576, heads=8, group=1, head_dim=HEAD_DIM, dtype="float16"):
    """q, k, v, grad_out without data."""
    return [like((h, tokens, head_dim), dtype) for h in (heads, heads // group, heads // group, heads)]


def sent(run, tag):
    """Bytes that each rank sends on one channel."""
    total = np.zeros(run.cluster.size, int)
    for event in run.trace:
        if event.kind == "send" and event.name == tag:
            total[event.rank] += event.bytes
    return total


def sizes(ranks, tokens=576, heads=8, group=1, head_dim=HEAD_DIM):
    """(B_Q, B_KV, B_O, B_L) of the card: bytes of one rank's float16 q, k and v, results, float32 lse."""
    q = tokens // ranks * heads * head_dim * 2
    return q, 2 * q // group, q, tokens // ranks * heads * 4


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 9])
def test_forward_bytes_of_each_rank_and_direction_are_the_formula(ranks, group):
    b_q, b_kv, b_o, b_l = sizes(ranks, group=group)
    arrays = sharded(shapes(group=group)[:3], "contiguous")
    run = mesh(ranks).run(token_ring.attention, *arrays)
    assert_array_equal(sent(run, "queries"), (ranks - 1) * b_q)
    assert_array_equal(sent(run, "results"), (ranks - 1) * (b_o + b_l))
    assert run.traffic.total == ranks * (ranks - 1) * (b_q + b_o + b_l)
    assert_array_equal(sent(mesh(ranks).run(ring.attention, *arrays), "keys and values"), (ranks - 1) * b_kv)


@pytest.mark.parametrize("wire, size_of_dq", [(None, 4), ("float16", 2)])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_backward_bytes_are_the_formula_and_no_gradient_of_k_or_v_travels(ranks, group, wire, size_of_dq):
    b_q, b_kv, _, b_l = sizes(ranks, group=group)
    q, k, v, grad_out = sharded(shapes(group=group), "contiguous")
    forward = mesh(ranks).run(token_ring.attention, q, k, v, return_lse=True)
    inputs = q, k, v, forward.output(0), forward.output(1), grad_out
    run = mesh(ranks).run(token_ring.attention_backward, *inputs, wire_dtype=wire)
    assert_array_equal(sent(run, "queries"), (ranks - 1) * (2 * b_q + 2 * b_l))
    assert_array_equal(sent(run, "results"), (ranks - 1) * b_q * size_of_dq // 2)
    assert run.traffic.total == (sent(run, "queries") + sent(run, "results")).sum()  # nothing else moves
    rival = mesh(ranks).run(ring.attention_backward, *inputs)
    travels = (ranks - 1) * b_kv + (ranks * 2 * b_kv if ranks > 1 else 0)
    assert_array_equal(sent(rival, "keys and values") + sent(rival, "gradients"), travels)


@pytest.mark.parametrize("ranks", [2, 3, 4, 9])
def test_each_rank_sends_one_message_fewer_than_ranks_on_each_channel(ranks):
    run = mesh(ranks).run(token_ring.attention, *sharded(shapes()[:3], "contiguous"))
    count = {(r, tag): 0 for r in range(ranks) for tag in ("queries", "results")}
    for event in run.trace:
        if event.kind == "send":
            count[event.rank, event.name] += 1
    assert set(count.values()) == {ranks - 1}


def messages(run, whole):
    """What a run sent, as `message_plan` writes it. `whole`: bytes of a whole block on each channel."""
    found, posted = [], {}
    for event in sorted((e for e in run.trace if e.kind == "send"), key=lambda e: e.posted):
        step = posted[event.rank, event.name] = posted.get((event.rank, event.name), -1) + 1
        first = 2 if event.name == "results" else 0  # step 0 computes one's own block; step 1's leaves in step 2
        found.append((first + step, event.name, event.rank, event.peer, event.bytes / whole[event.name]))
    return sorted(found)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("ranks", range(1, 10))
def test_the_program_sends_exactly_the_messages_of_the_plan(ranks, causal):
    layout = "zigzag" if causal else "contiguous"
    arrays = sharded(shapes(tokens=144 * 35)[:3], layout)  # 144 * 35: divides by 2N for 1 to 9 ranks
    run = mesh(ranks).run(token_ring.attention, *arrays, causal=causal, layout=layout)
    b_q, _, b_o, b_l = sizes(ranks, tokens=144 * 35)
    assert messages(run, {"queries": b_q, "results": b_o + b_l}) == token_ring.message_plan(ranks, causal)


@pytest.mark.parametrize("ranks", range(1, 10))
def test_the_plan_brings_every_query_chunk_to_every_key_chunk_once(ranks):
    held = {r: r for r in range(ranks)}  # rank -> whose queries it holds
    computed, returned = [], []
    for step in range(ranks + 1):
        now = [m for m in token_ring.message_plan(ranks) if m[0] == step]
        if step < ranks:
            computed += [(owner, r) for r, owner in held.items()]
        for _, channel, source, dest, _ in now:
            if channel == "results":
                returned.append((dest, source))  # queries of `dest`, keys of `source`
        held = {dest: held[source] for _, channel, source, dest, _ in now if channel == "queries"}
    everything = [(a, b) for a in range(ranks) for b in range(ranks)]
    assert sorted(computed) == everything
    assert sorted(returned) == [(a, b) for a, b in everything if a != b]


@pytest.mark.parametrize("ranks", range(1, 10))
def test_the_zigzag_plan_computes_every_visible_chunk_pair_once_and_carries_no_useless_row(ranks):
    """A tracer that knows only which chunks a rank owns and what causal means."""
    own = {r: {r, 2 * ranks - 1 - r} for r in range(ranks)}
    held, owner, computed, returned = dict(own), {r: r for r in own}, [], []
    plan = token_ring.message_plan(ranks, causal=True)
    for step in range(ranks):
        used = {r: {a for a in held[r] if min(own[r]) <= a} for r in held}
        assert used == held  # every row that arrived attends to something here
        areas = {r: sum(b <= a for a in held[r] for b in own[r]) for r in held}
        assert set(areas.values()) == {3 if step == 0 else 2}  # in chunks², step 0's two diagonals whole
        computed += [(a, b) for r in held for a in held[r] for b in own[r] if b <= a]
        if step:
            results = {m[2]: m[3:] for m in plan if m[:2] == (step + 1, "results")}
            assert results == {r: (owner[r], len(held[r]) / 2) for r in held}
            returned += [(a, r) for r in held for a in held[r]]
        moves = {m[2]: m[3:] for m in plan if m[:2] == (step, "queries")}
        arrived = {d: (owner[s], {max(held[s])} if share == 0.5 else held[s]) for s, (d, share) in moves.items()}
        held, owner = {d: rows for d, (_, rows) in arrived.items()}, {d: o for d, (o, _) in arrived.items()}
    pairs = [(a, b) for a in range(2 * ranks) for b in range(a + 1)]
    assert sorted(computed) == pairs
    assert len(set(returned)) == len(returned)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_zigzag_sends_three_quarters_of_the_bytes(ranks):
    arrays = sharded(shapes()[:3], "zigzag")
    run = mesh(ranks).run(token_ring.attention, *arrays, causal=True, layout="zigzag")
    b_q, _, b_o, b_l = sizes(ranks)
    assert sent(run, "queries").sum() == 0.75 * ranks * (ranks - 1) * b_q
    assert sent(run, "results").sum() == 0.75 * ranks * (ranks - 1) * (b_o + b_l)


@pytest.mark.parametrize("ranks", [1, 2, 5, 8])
def test_zigzag_gives_every_rank_the_same_area(ranks):
    arrays = sharded(shapes(tokens=80 * ranks)[:3], "zigzag")
    run = mesh(ranks, COUNTING).run(token_ring.attention, *arrays, causal=True, layout="zigzag")
    flops = [sum(e.flops for e in run.trace if e.kind == "compute" and e.rank == r) for r in range(ranks)]
    tokens = 80 * ranks
    assert flops == [4 * 8 * HEAD_DIM * tokens * (tokens + 1) / 2 / ranks] * ranks


@pytest.mark.parametrize("nodes, per_node", [(2, 4), (3, 2), (2, 1)])
def test_hybrid_bytes_inside_and_between_nodes_are_the_formula(nodes, per_node):
    ranks = nodes * per_node
    machine = topology.two_level(nodes, per_node, LINK, LINK)
    run = Cluster(machine, hardware.IDEAL).run(
        token_ring.hybrid_attention, *sharded(shapes(group=2)[:3], "contiguous"), nodes=nodes
    )
    b_q, b_kv, b_o, b_l = sizes(ranks, group=2)
    node = np.arange(ranks) // per_node
    across = node[:, None] != node
    assert_array_equal((run.traffic.by_pair * across).sum(1), (nodes - 1) * b_kv)
    assert_array_equal((run.traffic.by_pair * ~across).sum(1), nodes * (per_node - 1) * (b_q + b_o + b_l))


@pytest.mark.parametrize("ranks", [3, 4, 8])
def test_peak_memory_is_ten_blocks_of_queries_and_eight_for_the_ring(ranks):
    """Own q, 2 q in flight, k and v, float32 out as 2, 3 results; the ring: q, 4 halves of k and v, out, 1 result."""
    arrays = sharded(shapes()[:3], "contiguous")
    b_q, _, _, b_l = sizes(ranks)
    assert mesh(ranks, COUNTING).run(token_ring.attention, *arrays).peak_memory == [10 * b_q + 4 * b_l] * ranks
    assert mesh(ranks, COUNTING).run(ring.attention, *arrays).peak_memory == [8 * b_q + 2 * b_l] * ranks


# ---- time ------------------------------------------------------------------------------------------------------------


def timed(program, ranks, ratio, machine=None, group=1, causal=False, **options):
    """Seconds of a run whose step computes `ratio` times as long as its queries travel on one link; and C, q, o, κ."""
    layout = "zigzag" if causal else "contiguous"
    b_q, b_kv, b_o, b_l = sizes(ranks, group=group)
    per_step = 4 * 8 * HEAD_DIM * (576 // ranks) ** 2 / (2 if causal else 1)
    device = replace(COUNTING, flops=per_step / (ratio * b_q / LINK.bandwidth))
    cluster = Cluster(machine or topology.full_mesh(ranks, LINK), device)
    arrays = sharded(shapes(group=group)[:3], layout)
    run = cluster.run(program, *arrays, causal=causal, layout=layout, **options)
    q = b_q / LINK.bandwidth
    return run.makespan, ratio * q, q, (b_o + b_l) / LINK.bandwidth, b_kv / LINK.bandwidth


RATIOS = [0.25, 0.5, 1, 1.005, 2, 4]  # 1.005: between q and o, which is longer by the lse


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 16])
def test_mesh_time_is_the_closed_form(ranks, ratio):
    took, compute, query, result, _ = timed(token_ring.attention, ranks, ratio)
    assert took == pytest.approx(token_ring.predict_time(ranks, compute, query, result), rel=1e-9)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("ranks", [3, 4, 8, 16])  # of 2 ranks, both neighbours are the same
def test_both_rings_of_keys_and_values_take_their_closed_forms(ranks, group, ratio):
    took, compute, _, _, kv = timed(ring.attention, ranks, ratio, group=group)
    assert took == pytest.approx((ranks - 1) * max(compute, kv) + compute, rel=1e-9)
    took, compute, _, _, kv = timed(ring.bidirectional_attention, ranks, ratio, group=group)
    assert took == pytest.approx((ranks - 1) * max(compute, kv / 2) + compute, rel=1e-9)


def three(ranks, ratio, machine=None, **options):
    """Seconds of (ring, TokenRing, bidirectional ring), and C, q, o, κ."""
    programs = ring.attention, token_ring.attention, ring.bidirectional_attention
    found = [timed(p, ranks, ratio, machine, **options) for p in programs]
    return [f[0] for f in found], found[0][1:]


@pytest.mark.parametrize("ranks", [4, 8, 16])
def test_on_a_mesh_without_compute_token_ring_nears_twice_the_ring(ranks):
    (ring_time, token_time, both_ways), _ = three(ranks, 0.01)
    assert ring_time / token_time == pytest.approx(2 * (ranks - 1) / (ranks + 1), rel=0.02)  # lse: 1/64
    assert both_ways < token_time < ring_time


@pytest.mark.parametrize("ranks", [4, 8, 16])
def test_on_a_mesh_full_of_compute_token_ring_loses_by_its_tail(ranks):
    (ring_time, token_time, both_ways), (_, _, result, _) = three(ranks, 4)
    assert token_time == pytest.approx(ring_time + result, rel=1e-9)
    assert both_ways == pytest.approx(ring_time, rel=1e-9)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9, 1.1, 1.5, 1.9, 2.5, 4])
@pytest.mark.parametrize("ranks", [4, 8, 16])
def test_the_bidirectional_ring_is_never_slower_than_token_ring(ranks, ratio):
    (_, token_time, both_ways), _ = three(ranks, ratio)
    assert both_ways < token_time


@pytest.mark.parametrize("ranks", [4, 8, 16])
def test_on_a_switch_token_ring_gains_only_the_last_step(ranks):
    """Queries and results leave by one port: together the bytes of the ring's keys and values, and the lse."""
    (ring_time, token_time, both_ways), (compute, query, result, _) = three(ranks, 0.5, topology.switch(ranks, LINK))
    lse = (ranks - 1) * (result - query)
    assert token_time == pytest.approx(ring_time - compute + lse, rel=1e-9)
    assert both_ways == pytest.approx(ring_time, rel=1e-9)


@pytest.mark.parametrize("ranks", [8, 16])
def test_on_a_physical_ring_token_ring_loses(ranks):
    (ring_time, token_time, both_ways), _ = three(ranks, 0.1, topology.ring(ranks, LINK))
    assert both_ways < ring_time < token_time


@pytest.mark.parametrize("ranks", [4, 8])
def test_results_that_all_go_backward_on_a_physical_ring_load_every_link_once_a_hop(ranks):
    """Step k + 1 returns blocks over k links, so every link carries k; the last result is one hop ahead."""

    def path(a, b):
        return [a, b] if (b - a) % ranks == 1 else [(a - k) % ranks for k in range((a - b) % ranks + 1)]

    machine = replace(topology.ring(ranks, LINK), path=path)
    took, _, query, result, _ = timed(token_ring.attention, ranks, 0.1, machine)
    assert took == pytest.approx(2 * query + ((ranks - 2) * (ranks - 1) / 2 + 1) * result, rel=1e-9)


@pytest.mark.parametrize("group, wins", [(1, True), (2, False), (4, False), (8, False)])
def test_grouped_heads_take_the_gain_away(group, wins):
    """At 2 query heads a key head both send as much each way; TokenRing has the lse and the tail on top."""
    (ring_time, token_time, both_ways), _ = three(8, 0.01, group=group)
    assert (token_time < ring_time) == wins
    assert both_ways < min(ring_time, token_time)


@pytest.mark.parametrize("ratio", [0.5, 3])
@pytest.mark.parametrize("ranks", [4, 8])
def test_trimming_saves_bytes_but_no_time_on_a_mesh(ranks, ratio):
    plain, compute, query, _, _ = timed(token_ring.attention, ranks, ratio)
    trimmed, *_ = timed(token_ring.attention, ranks, ratio, causal=True)
    diagonal = compute / (576 // ranks)  # step 0 has the diagonal on top: h(2h + 1) instead of 2h²
    extra = max(0, compute + diagonal - max(compute, query)) if ratio > 1 else 0
    assert trimmed == pytest.approx(plain + extra, rel=1e-9)


@pytest.mark.parametrize("share, hidden", [(0.9, True), (1.0, True), (1.5, False)])
def test_the_transfer_between_nodes_is_hidden_while_it_is_shorter_than_the_inner_pass(share, hidden):
    """share: seconds that keys and values travel between nodes, over the seconds of TokenRing inside one."""
    b_q, b_kv, b_o, b_l = sizes(8)
    device = replace(COUNTING, flops=4 * 8 * HEAD_DIM * 72**2 / (b_q / LINK.bandwidth))
    inner = token_ring.predict_time(4, *(b / LINK.bandwidth for b in (b_q, b_q, b_o + b_l)))
    machine = topology.two_level(2, 4, LINK, hardware.Link(b_kv / (share * inner)))
    run = Cluster(machine, device).run(token_ring.hybrid_attention, *sharded(shapes()[:3], "contiguous"), nodes=2)
    assert run.makespan == pytest.approx((1 if hidden else share) * inner + inner, rel=1e-9)


def test_hybrid_beats_both_flat_rings_when_nodes_are_far_apart():
    machine = topology.two_level(2, 4, LINK, hardware.Link(LINK.bandwidth / 8))
    hybrid, *_ = timed(token_ring.hybrid_attention, 8, 0.5, machine, nodes=2)
    (flat_ring, flat_token_ring, _), _ = three(8, 0.5, machine)
    assert hybrid < min(flat_ring, flat_token_ring)


@pytest.mark.parametrize("causal, layout", MASKS)
def test_without_data_time_bytes_and_memory_are_the_same(causal, layout):
    arrays = normal(48, kv_heads=2)
    empty = [like(a.shape, a.dtype) for a in arrays]
    cluster = Cluster(topology.switch(4, hardware.NVLINK4), hardware.H100)
    real, shape_only = (gradients(a, 4, causal, layout, cluster) for a in (arrays, empty))
    assert (real.makespan, real.peak_memory, list(real.trace)) == (
        shape_only.makespan,
        shape_only.peak_memory,
        list(shape_only.trace),
    )


# ---- four A10s, as the claims calibrate them -------------------------------------------------------------------------


def test_the_messages_of_the_a10_case_have_the_sizes_of_its_model():
    assert (claims.QUERIES, claims.RESULT - claims.QUERIES) == (49_152_000, 768_000)


def test_calibration_gives_back_the_three_times_it_was_made_of():
    narrow = claims.a10(token_ring.attention, claims.ONE_PORT)
    assert claims.step_seconds(claims.a10(ring.attention), 1) == pytest.approx(claims.ROUND, rel=1e-3)
    kernels = [e.end - e.start for e in narrow.trace if e.kind == "compute" and e.name == "attention"]
    assert kernels == pytest.approx([claims.COMPUTE] * 16, rel=2e-3)  # launching takes 5 µs, the diagonal 1 µs
    assert claims.step_seconds(narrow, 2) == pytest.approx(claims.STEP_2, rel=0.01)


def test_with_free_merges_the_a10_case_is_three_rounds_and_a_kernel():
    """TokenRing lies between 19 and 21 ms, whatever its ports."""
    took = claims.a10(ring.attention, memory=inf).makespan
    assert took == pytest.approx(3 * claims.ROUND + claims.COMPUTE, rel=1e-3)
    wide, narrow = (claims.a10(token_ring.attention, p, memory=inf).makespan for p in (inf, claims.ONE_PORT))
    assert 0.019 < wide < narrow < 0.021


# ---- bad input -------------------------------------------------------------------------------------------------------


def refused(match, arrays, program=token_ring.attention, layout="contiguous", **options):
    with pytest.raises(ValueError, match=match):
        mesh(4).run(program, *sharded(arrays, layout), layout=layout, **options)


def test_tokens_that_do_not_fill_two_chunks_a_rank_are_refused_by_number():
    refused("28 tokens do not divide into 8 zigzag chunks", normal(28)[:3], layout="zigzag", causal=True)


def test_heads_that_do_not_share_out_are_refused_by_number():
    refused("4 query heads cannot share 3 key heads", normal(16, kv_heads=3)[:3])


def test_a_head_dimension_that_differs_is_refused_by_number():
    q, k, v, _ = normal(16)
    refused("head_dim is 8 in q .* and 4 in k", (q, k[..., :4], v[..., :4]))


def test_an_unknown_layout_is_refused_by_name():
    with pytest.raises(ShapeError, match="'spiral' is not one of contiguous, zigzag, striped"):
        mesh(4).run(token_ring.attention, *sharded(normal(16)[:3], "contiguous"), layout="spiral")


def test_nodes_that_do_not_divide_the_ranks_are_refused_by_number():
    refused("4 ranks do not divide into 3 nodes", normal(16)[:3], token_ring.hybrid_attention, nodes=3)


def test_hybrid_zigzag_needs_two_chunks_for_every_rank_of_all_nodes():
    refused(
        "20 tokens do not divide into 8",
        normal(20)[:3],
        token_ring.hybrid_attention,
        layout="zigzag",
        nodes=2,
        causal=True,
    )
