"""T3: the fused sum is the sum, tiles fire once, times are the recurrence's, memory traffic is the table's."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from toolkit.model_parallel import _t3_picture as picture
from toolkit.model_parallel import _t3_queue as memory
from toolkit.model_parallel import _t3_scale as scale
from toolkit.model_parallel import _t3_ticks as ticks
from toolkit.model_parallel import t3
from toolkit.model_parallel._t3_tracker import SOURCES, Trigger
from toolkit.runtime import Cluster, hardware, like, per_rank, topology
from toolkit.runtime.errors import DtypeError, RuntimeFault, ShapeError

K, H, ROWS = 12, 10, 8  # inner and outer width, rows of a chunk
STAGE = 1e-5  # seconds
any_size = pytest.mark.parametrize("n", [2, 3, 4, 8])
any_ratio = pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0, 1.5, 2.0, 4.0])


@cache
def parts(n):
    """a (n, M, K), b (n, K, H)."""
    random = np.random.default_rng(n)
    return random.standard_normal((n, n * ROWS, K)), random.standard_normal((n, K, H))


def machine(n, ratio=1.0, latency=0.0, device=None):
    """A ring on which a chunk takes ratio · STAGE, and a device that computes one in STAGE, memory being free."""
    rate = ROWS * H * 8 / (ratio * STAGE)
    device = device or hardware.Device("counting", 2 * n * ROWS * K * H / (n * STAGE), np.inf)
    return Cluster(topology.ring(n, hardware.Link(rate, latency)), device)


def fused(n, ratio=1.0, latency=0.0, device=None, **options):
    return t3.fused_gemm_reduce_scatter(machine(n, ratio, latency, device), *parts(n), **options)


def one_after_the_other(n, ratio=1.0, latency=0.0):
    return machine(n, ratio, latency).run(t3.sequential, *map(per_rank, parts(n)))


def dense(n):
    return sum(a @ b for a, b in zip(*parts(n), strict=True))


# ---- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"stagger": False}, {"nmc": False}, {"tiles": 4}, {"tiles": 8, "capacity": 1}])
@any_size
def test_chunks_of_all_ranks_are_the_sum_of_products(n, options):
    assert_allclose(fused(n, **options).run.gather(0), dense(n), rtol=0, atol=1e-12)


@any_size
def test_each_rank_ends_with_its_own_chunk(n):
    for rank, chunk in enumerate(fused(n).run.outputs):
        assert_allclose(chunk, dense(n)[rank * ROWS : (rank + 1) * ROWS], rtol=0, atol=1e-12)


def test_an_all_gather_then_gives_everybody_the_full_product():
    chunks = fused(4).run.outputs
    for whole in machine(4).run(lambda comm, x: comm.all_gather(x), per_rank(chunks)).outputs:
        assert_allclose(whole, dense(4), rtol=0, atol=1e-12)


@any_size
def test_the_baseline_computes_the_same(n):
    assert_allclose(one_after_the_other(n).gather(0), dense(n), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tiles", [1, 4])
@any_size
def test_sums_are_made_in_ring_order_to_the_bit(n, tiles):
    a, b = parts(n)
    for chunk, found in enumerate(fused(n, tiles=tiles).run.outputs):
        for rows, part in zip(np.split(np.arange(ROWS) + chunk * ROWS, tiles), np.split(found, tiles), strict=True):
            total = a[chunk - 1][rows] @ b[chunk - 1]
            for hop in range(2, n + 1):
                total = total + a[(chunk - hop) % n][rows] @ b[(chunk - hop) % n]
            assert_array_equal(part, total)


@pytest.mark.parametrize(
    "how",
    [
        {"ratio": 0.1},
        {"ratio": 5.0, "latency": 1e-4},
        {"stagger": False},
        {"nmc": False, "ratio": 3.0},
        {"capacity": 1},
    ],
    ids=str,
)
def test_bits_depend_on_the_order_of_the_ring_and_not_on_who_came_first(how):
    assert_array_equal(fused(4, tiles=2, **how).run.gather(0), fused(4, tiles=2).run.gather(0))


def test_another_order_of_the_ring_would_give_other_bits():
    a, b = parts(4)
    products = [x @ y for x, y in zip(a, b, strict=True)]
    assert ((products[0] + products[1]) + products[2] != products[0] + (products[1] + products[2])).any()


def test_a_slow_gpu_changes_times_and_no_bits():
    quick = machine(4).device
    slow = hardware.replace(quick, flops=quick.flops / 5)
    late = t3.fused_gemm_reduce_scatter(Cluster(machine(4).topology, [quick, quick, slow, quick]), *parts(4))
    assert_array_equal(late.run.gather(0), fused(4).run.gather(0))
    assert late.run.makespan > 4 * fused(4).run.makespan


@pytest.mark.parametrize("options", [{}, {"stagger": False, "tiles": 2}, {"nmc": False}], ids=str)
def test_without_data_times_and_bytes_are_the_same(options):
    real = fused(4, **options)
    empty = t3.fused_gemm_reduce_scatter(machine(4), *map(like, parts(4)), **options)
    assert (list(real.run.trace), real.dram) == (list(empty.run.trace), empty.dram)


# ---- who computes what -----------------------------------------------------------------------------------------------


def test_four_ranks_stagger_as_in_the_worked_trace():
    assert [t3.chunk_order(r, 4) for r in range(4)] == [[1, 2, 3, 0], [2, 3, 0, 1], [3, 0, 1, 2], [0, 1, 2, 3]]


@given(st.integers(2, 40))
def test_at_every_stage_each_chunk_is_computed_by_one_rank(n):
    for stage in zip(*(t3.chunk_order(r, n) for r in range(n)), strict=True):
        assert sorted(stage) == list(range(n))


def test_the_first_chunk_is_stored_remotely_and_the_last_one_stays():
    assert [t3.chunk_role(k, 5) for k in range(5)] == ["remote", "dma", "dma", "dma", "local"]


def test_rank_0_of_four_sends_what_the_worked_trace_says():
    sent = [(e.name, e.peer) for e in fused(4).run.trace if e.kind == "send" and e.rank == 0]
    assert sent == [("remote stores", 3), ("DMA", 3), ("DMA", 3)]


def test_rank_0_of_four_completes_tiles_in_the_order_of_its_trace():
    assert [tile[0] for _, tile in fused(4).gpus[0].triggers] == [2, 3, 0]


# ---- track and trigger -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("local", "incoming"), ("incoming", "local")])
def test_a_tile_fires_with_its_second_update_whichever_comes_first(order):
    tracker = t3.Tracker()
    assert [tracker.update("tile", source) for source in order] == [(), (Trigger("tile"),)]


@st.composite
def updates(draw):
    tiles = draw(st.integers(1, 12))
    events = [(tile, source) for tile in range(tiles) for source in SOURCES]
    return draw(st.permutations(events)), draw(st.integers(1, 6))


@settings(max_examples=200, deadline=None)
@given(updates())
def test_in_any_order_each_tile_fires_once_and_never_before_both_updates(case):
    events, capacity = case
    tracker, arrived, fired = t3.Tracker(capacity), set(), []
    for tile, source in events:
        arrived.add((tile, source))
        for trigger in tracker.update(tile, source):
            assert {(trigger.tile, "local"), (trigger.tile, "incoming")} <= arrived
            fired.append(trigger.tile)
    assert sorted(fired) == sorted({tile for tile, _ in events})
    assert tracker.peak <= capacity


@settings(max_examples=100, deadline=None)
@given(updates())
def test_a_table_that_is_large_enough_fires_at_once(case):
    events, _ = case
    tracker, seen = t3.Tracker(), set()
    for tile, source in events:
        expected = (Trigger(tile),) if tile in seen else ()
        seen.add(tile)
        assert tracker.update(tile, source) == expected
    assert tracker.stalls == 0


def test_a_full_table_makes_updates_wait_and_loses_none():
    tracker = t3.Tracker(1)
    assert [tracker.update(*u) for u in (("A", "local"), ("B", "incoming"), ("B", "local"))] == [(), (), ()]
    assert tracker.update("A", "incoming") == (Trigger("A"), Trigger("B"))
    assert tracker.stalls == 2


@pytest.mark.parametrize("capacity", [1, 2, 256])
@pytest.mark.parametrize("stagger", [True, False])
def test_in_a_run_each_tracked_tile_fires_once(stagger, capacity):
    for gpu in fused(4, stagger=stagger, tiles=4, capacity=capacity, ratio=2.0).gpus:
        tracked = [(chunk, part) for chunk in range(4) if gpu.role(chunk) != "remote" for part in range(4)]
        assert sorted(tile for _, tile in gpu.triggers) == tracked


def test_in_a_run_no_tile_fires_before_both_updates():
    found = fused(4, ratio=2.0, latency=1e-6)
    for gpu in found.gpus:
        produced = {e.name: e.end for e in found.run.trace if e.kind == "compute" and e.rank == gpu.rank}
        arrived = [e.end for e in found.run.trace if e.kind == "recv" and e.rank == gpu.rank]
        for (time, (chunk, _)), came in zip(gpu.triggers, arrived, strict=True):
            assert time == max(produced[f"chunk {chunk}"], came)


def test_the_same_update_twice_is_refused():
    tracker = t3.Tracker()
    tracker.update(7, "local")
    with pytest.raises(ValueError, match="tile 7 has had its local update"):
        tracker.update(7, "local")


# ---- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiles", [1, 2, 8])
@pytest.mark.parametrize("latency", [0.0, 0.3 * STAGE])
@any_ratio
@any_size
def test_the_fused_time_is_the_recurrences(n, ratio, latency, tiles):
    wanted = t3.timeline(n, STAGE, ratio * STAGE, latency, "t3", tiles)
    assert fused(n, ratio, latency, tiles=tiles).run.makespan == pytest.approx(wanted, rel=1e-9)


def by_hand(n, g, tau, latency):
    """The recurrence of whole chunks, as the event table of the description says it."""
    free = max(g, tau)
    arrived = free + latency
    for k in range(2, n):
        free = max(k * g, arrived, free) + tau
        arrived = free + latency
    return max(n * g, arrived)


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 40), st.floats(0.01, 10), st.floats(0, 1))
def test_one_tile_a_chunk_is_the_recurrence_of_chunks(n, ratio, latency):
    assert t3.timeline(n, 1.0, ratio, latency) == pytest.approx(by_hand(n, 1.0, ratio, latency), rel=1e-12)


@pytest.mark.parametrize("latency", [0.0, 0.3 * STAGE])
@any_ratio
@any_size
def test_the_virtual_machine_takes_as_long_as_the_sequential_formula(n, ratio, latency):
    wanted = t3.timeline(n, STAGE, ratio * STAGE, latency, "sequential")
    assert one_after_the_other(n, ratio, latency).makespan == pytest.approx(wanted, rel=1e-9)


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 40), st.floats(0.01, 10), st.floats(0, 1), st.sampled_from([1, 2, 8, 64]))
def test_fused_lies_between_sequential_and_ideal(n, ratio, latency, tiles):
    sequential, found, ideal = (
        t3.timeline(n, 1.0, ratio, latency, s, tiles=tiles) for s in ("sequential", "t3", "ideal")
    )
    assert sequential * (1 + 1e-12) >= found >= ideal * (1 - 1e-12)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 40), st.floats(0.0, 1.0), st.sampled_from([1, 4]))
def test_a_link_that_keeps_up_hides_the_sum_entirely(n, ratio, tiles):
    assert t3.timeline(n, 1.0, ratio, 0.0, tiles=tiles) == pytest.approx(n, rel=1e-12)


@pytest.mark.parametrize("ratio", [1.25, 1.5, 1.75])
def test_finer_tiles_come_nearer_to_the_ideal(ratio):
    times = [t3.timeline(8, 1.0, ratio, 0.1, tiles=tiles) for tiles in (1, 2, 4, 8, 16)]
    assert times == sorted(times, reverse=True)
    assert times[-1] < times[0] - 0.2


@any_ratio
@pytest.mark.parametrize("n", [4, 8, 16])
def test_without_stagger_whole_chunks_hide_one_transfer_at_most(n, ratio):
    """The last chunk is computed last everywhere, and then has its whole way round before it."""
    found = fused(n, ratio, stagger=False).run.makespan
    assert found >= (t3.timeline(n, 1, ratio, scheme="sequential") - ratio) * STAGE * (1 - 1e-9)


def cost_of_no_stagger(tiles):
    staggered, plain = (fused(8, 1.0, tiles=tiles, stagger=s).run.makespan for s in (True, False))
    return plain / staggered


def test_small_tiles_do_most_of_what_stagger_does():
    assert cost_of_no_stagger(tiles=1) > 1.7
    assert 1 < cost_of_no_stagger(tiles=8) < 1.15


def test_stagger_needs_a_tracker_that_holds_a_chunk_of_tiles():
    """Partial sums arrive a stage before their partner is computed."""
    assert max(gpu.tracker.peak for gpu in fused(8, 0.9, tiles=8).gpus) == pytest.approx(8, abs=1)


def test_without_stagger_the_tracker_needs_less():
    assert max(gpu.tracker.peak for gpu in fused(8, 0.9, tiles=8, stagger=False).gpus) < 7


@any_ratio
def test_the_first_chunk_arrives_when_it_is_made_and_carried(ratio):
    arrived = min(e.end for e in fused(4, ratio, 2e-6).run.trace if e.kind == "recv")
    assert arrived == pytest.approx(max(1, ratio) * STAGE + 2e-6, rel=1e-9)


def test_a_lane_sends_one_tile_after_the_other():
    sent = [e for e in fused(4, 2.0, tiles=4).run.trace if e.kind == "send" and e.rank == 0]
    assert [e.end - e.start for e in sent] == pytest.approx([2 * STAGE / 4] * 12)


@pytest.mark.parametrize("policy", memory.POLICIES)
def test_no_chunk_leaves_the_queue_before_both_updates(policy):
    found = memory.hbm_queue(8, memory.Stage(16, 30, 32), policy=policy, link=4.0)
    assert (found.sends[1:, 0] >= np.maximum(found.arrivals[:-1, 1], found.stage_ends[1:-1])).all()


@pytest.mark.parametrize("network", [topology.full_mesh, topology.switch])
def test_a_mesh_or_a_switch_serves_as_a_ring(network):
    ring = machine(4, 1.5)
    link = ring.topology.link(1, 0)
    elsewhere = t3.fused_gemm_reduce_scatter(Cluster(network(4, link), ring.device), *parts(4))
    assert elsewhere.run.makespan == pytest.approx(fused(4, 1.5).run.makespan, rel=1e-9)


@any_ratio
def test_without_stagger_it_is_never_faster(ratio):
    assert fused(8, ratio, stagger=False).run.makespan > fused(8, ratio).run.makespan * 1.05


def test_without_near_memory_adders_compute_units_add():
    device = hardware.replace(machine(4).device, memory_bandwidth=3 * ROWS * H * 8 / (0.1 * STAGE), flops=np.inf)
    with_nmc, without = (fused(4, 0.01, device=device, nmc=nmc) for nmc in (True, False))
    added = [e.end - e.start for e in without.run.trace if e.name == "add" and e.rank == 0]
    assert added == pytest.approx([0.1 * STAGE] * 3)
    assert without.run.makespan > with_nmc.run.makespan + 0.1 * STAGE


# ---- bytes -----------------------------------------------------------------------------------------------------------


@any_size
def test_both_send_the_same_bytes_over_links(n):
    chunk = ROWS * H * 8
    for run in (fused(n).run, one_after_the_other(n)):
        sent = run.traffic.by_pair
        assert_array_equal(sent, chunk * (n - 1) * np.roll(np.eye(n, dtype=int), -1, axis=1))


@pytest.mark.parametrize("nmc", [True, False])
@pytest.mark.parametrize("stagger", [True, False])
@pytest.mark.parametrize("n", [2, 3, 4, 8, 16, 32])
def test_memory_counters_of_the_run_are_the_tables(n, stagger, nmc):
    a, b = like((n, n, 4)), like((n, 4, 6))
    found = t3.fused_gemm_reduce_scatter(machine(n), a, b, stagger=stagger, nmc=nmc)
    wanted = (n - 1, n - 2, n - 1) if nmc else (n - 1, 2 * n - 3, n - 1)
    for d in found.dram:
        assert (d.gemm_writes, d.reads, d.writes) == tuple(6 * 8 * count for count in wanted)


SCHEMES = {"sequential": memory.SEQUENTIAL, "t3": memory.T3, "t3 without nmc": memory.T3_WITHOUT_NMC}


@pytest.mark.parametrize("policy", memory.POLICIES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("n", [2, 3, 4, 8, 16, 32])
def test_requests_that_the_memory_serves_are_the_tables(n, scheme, policy):
    found = memory.hbm_queue(n, memory.Stage(5, 40, 16, 2), SCHEMES[scheme], policy)
    assert found.dram == tuple(16 * count for count in t3.dram_traffic(n, scheme))


def test_two_gpus_read_nothing_for_the_sum():
    assert t3.dram_traffic(2)[1] == 0


# ---- the memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("n", [2, 4, 16])
def test_a_memory_with_little_to_do_gives_the_recurrence(n, ratio):
    stage = memory.Stage(4, 4000, 64)
    found = memory.hbm_queue(n, stage, link=ratio * stage.alone / 64)
    wanted = t3.timeline(n, stage.alone, ratio * stage.alone)
    assert found.ticks == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("ratio", [0.25, 1.0, 2.0])
def test_sequential_in_the_queue_is_the_sequential_formula(ratio):
    stage = memory.Stage(4, 2000, 16)
    found = memory.hbm_queue(8, stage, memory.SEQUENTIAL, "fcfs", link=ratio * stage.alone / 16)
    assert found.ticks == pytest.approx(t3.timeline(8, 1, ratio, scheme="sequential") * stage.alone, rel=0.02)


@pytest.mark.parametrize("policy", memory.POLICIES)
def test_a_gemm_alone_takes_its_stages(policy):
    """Nothing else is there until the GEMM ends, in the sequential scheme."""
    stage = memory.Stage(20, 50, 32)
    found = memory.hbm_queue(4, stage, memory.SEQUENTIAL, policy)
    assert_array_equal(found.stage_ends, stage.alone * np.arange(1, 5))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 9),
    st.builds(memory.Stage, st.integers(0, 60), st.integers(0, 90), st.integers(6, 24), st.integers(1, 6)),
    st.sampled_from(sorted(SCHEMES)),
    st.sampled_from(memory.POLICIES),
    st.floats(0.1, 30),
    st.integers(0, 8),
)
def test_whatever_the_policy_everything_is_served_once(n, stage, scheme, policy, link, threshold):
    found = memory.hbm_queue(n, stage, SCHEMES[scheme], policy, link=link, threshold=threshold, room=8)
    assert found.dram == tuple(stage.requests * count for count in t3.dram_traffic(n, scheme))
    assert (found.served == ticks.GEMM_READ).sum() == n * stage.reads


TURNS, FIRST_COME, PRIORITY = (0, 9, 9), (1, 9, 9), (2, 4, 10)  # number of the policy, threshold, starvation


@pytest.mark.parametrize(
    "policy, compute, came, waiting, rested, held, turn, who",
    [
        (TURNS, True, 5, 5, 0, 0, True, "communication"),
        (TURNS, True, 5, 5, 0, 0, False, "compute"),
        (TURNS, False, 5, 5, 0, 9, False, "communication"),
        (FIRST_COME, True, 5, 4, 0, 0, False, "communication"),
        (FIRST_COME, True, 5, 5, 0, 0, True, "compute"),
        (PRIORITY, True, 19, 15, 0, 0, True, "compute"),
        (PRIORITY, False, 0, 15, 0, 3, True, "communication"),
        (PRIORITY, False, 0, 15, 0, 4, True, "nobody"),
        (PRIORITY, True, 19, 9, 0, 7, False, "communication"),  # it has starved
        (PRIORITY, True, 19, 9, 15, 7, False, "compute"),  # but another one has just been let in
        (PRIORITY, True, 19, -1, 0, 0, True, "compute"),
        (PRIORITY, False, 0, -1, 0, 0, True, "nobody"),
    ],
)
def test_the_controller_decides_by_the_rule(policy, compute, came, waiting, rested, held, turn, who):
    choice = ticks.enters(policy, 20, compute, came, waiting, rested, held, turn)
    assert choice == {"compute": 0, "communication": 1, "nobody": -1}[who]


ROOM_FOR_BOTH = [  # the memory could serve all, and the link is not what the time depends on
    (n, memory.Stage(reads, compute, 32, waves), ratio)
    for n in (4, 8, 16)
    for reads in (8, 64, 128)
    for compute in (64, 128, 256)
    for waves in (1, 4)
    for ratio in (0.25, 0.5)
]


@pytest.mark.parametrize("n, stage, ratio", ROOM_FOR_BOTH, ids=str)
def test_priority_is_never_slower_than_turns_where_there_is_room_for_both(n, stage, ratio):
    link = ratio * stage.alone / stage.requests
    turns, priority = (memory.hbm_queue(n, stage, policy=p, link=link).ticks for p in ("rr", "mca"))
    assert priority <= turns


def test_priority_gains_a_tenth_beside_a_gemm_that_reads_much():
    stage = memory.Stage(64, 64, 32)
    turns, priority = (memory.hbm_queue(8, stage, policy=p, link=1.25).ticks for p in ("rr", "mca"))
    assert turns > 1.1 * priority


def test_priority_loses_when_the_sum_decides_and_the_memory_is_full():
    stage = memory.Stage(64, 0, 32)
    turns, priority = (memory.hbm_queue(8, stage, policy=p, link=2 * 96 / 32).ticks for p in ("rr", "mca"))
    assert priority > 1.05 * turns


@pytest.mark.parametrize("starvation", [1, 8, 64])
def test_communication_gets_through_a_gemm_that_never_pauses(starvation):
    found = memory.hbm_queue(8, memory.Stage(96, 0, 32), threshold=0, starvation=starvation, link=2.0)
    assert found.dram == tuple(32 * count for count in t3.dram_traffic(8))


def test_a_threshold_of_zero_lets_communication_in_by_starvation_alone():
    slow, slower = (memory.hbm_queue(4, memory.Stage(8, 64, 16), threshold=0, starvation=s) for s in (8, 32))
    assert slow.ticks < slower.ticks
    assert 8 < slow.waited


@pytest.mark.parametrize("threshold", [1, 4, 32])
@pytest.mark.parametrize("reads, compute, waves", [(64, 64, 1), (64, 64, 4), (16, 200, 2)])
def test_a_stage_waits_for_no_more_than_what_is_in_the_queue_at_each_burst(reads, compute, waves, threshold):
    stage = memory.Stage(reads, compute, 32, waves)
    found = memory.hbm_queue(8, stage, threshold=threshold, starvation=100_000, link=2.0)
    stages = np.diff(found.stage_ends, prepend=0)
    assert stages.max() <= stage.alone + 2 * waves * threshold


def test_turns_make_a_stage_wait_longer_than_that():
    stage = memory.Stage(64, 64, 32, 4)
    turns, priority = (
        np.diff(memory.hbm_queue(8, stage, policy=p, threshold=1, link=2.0, starvation=100_000).stage_ends).max()
        for p in ("rr", "mca")
    )
    assert turns > stage.alone + 8 >= priority


def test_the_memory_serves_one_request_a_tick_at_most_and_all_of_them():
    stage = memory.Stage(10, 20, 16)
    found = memory.hbm_queue(4, stage)
    assert (found.served > 0).sum() == 4 * 10 + 16 * sum(t3.dram_traffic(4))


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_a_kernel_on_shared_units_slows_the_gemm_by_the_units_it_takes(ratio):
    stage = memory.Stage(0, 1600, 16)
    found = memory.hbm_queue(4, stage, memory.shared(16), link=ratio * stage.alone / 16)
    assert np.diff(found.stage_ends).min() >= 1600 * 80 / 64


def test_launches_are_paid_once_a_stage():
    stage = memory.Stage(0, 400, 16)
    ends = [memory.hbm_queue(4, stage, memory.shared(16), link=1.0, launch=n).stage_ends[-1] for n in (0, 50)]
    assert ends[1] - ends[0] == pytest.approx(200, abs=20)


def test_without_near_memory_adders_the_queue_is_slower():
    stage = memory.Stage(16, 96, 32)
    without, with_nmc = (memory.hbm_queue(8, stage, m, link=2.0).ticks for m in (memory.T3_WITHOUT_NMC, memory.T3))
    assert without > 1.1 * with_nmc


def test_the_controller_lets_less_in_beside_a_gemm_that_lives_on_memory():
    hungry, lean = (memory.measured_threshold(memory.Stage(r, x, 32)) for r, x in ((96, 8), (8, 600)))
    assert hungry < lean <= 32


# ---- the paper's size ------------------------------------------------------------------------------------------------


def test_a_layer_reads_what_its_matrices_hold():
    layer = scale.Sublayer("small", "OP", 1024, 512, 512, 8)  # fits in the cache
    assert layer.gemm_reads * layer.chunk == 2 * (1024 * 64 + 64 * 512)


@pytest.mark.parametrize("layer", scale.sublayers(), ids=lambda x: f"{x.model}-{x.part}-{x.tp}")
def test_at_the_papers_size_t3_lies_between_sequential_and_ideal(layer):
    ideal, t3_gain = (scale.gain(layer, s) for s in ("ideal + NMC", "T3-MCA"))
    assert 1.0 < t3_gain <= ideal * 1.02  # the first chunk of T3 is never written, so a stage can be shorter


def test_no_overlap_of_a_sublayer_gains_more_than_a_half():
    """GEMM, reduce-scatter and all-gather: of three, the shorter of the first two can vanish."""
    best = max(scale.gain(layer, "ideal", efficiency) for layer in scale.sublayers() for efficiency in (0.3, 0.55, 0.9))
    assert 1.4 < best < 1.53


def test_ratios_do_not_depend_on_the_number_of_tokens():
    once, twice = (scale.geomean(scale.gain(x, "T3-MCA") for x in scale.sublayers(times=t)) for t in (1, 2))
    assert once == pytest.approx(twice, rel=0.01)


def test_mechanisms_stand_in_the_papers_order():
    means = [
        scale.geomean(scale.gain(layer, s) for layer in scale.sublayers())
        for s in (8, "decomposed", 16, "T3 without NMC", "T3", "T3-MCA", "ideal + NMC")
    ]
    assert means == sorted(means)


@pytest.mark.parametrize("training", [True, False])
def test_a_whole_layer_gains_less_than_its_sublayers(training):
    gains = [scale.gain(layer, "T3-MCA") for layer in scale.sublayers(("T-NLG",), (8,))]
    assert 1 < scale.end_to_end("T-NLG", 8, training) < max(gains)


def test_end_to_end_is_amdahls_law():
    layers = [layer for layer in scale.sublayers(("T-NLG",), (8,)) if layer.part in ("OP", "FC-2")]
    old, new = (sum(scale.seconds(x, s) + scale.gather_seconds(x) for x in layers) for s in ("sequential", "T3-MCA"))
    products = (3 + 4) * 4256 + 2 * 1024  # query, key, value; up; scores and what they weigh
    whole = old + 2 * 8192 * 4256 * products / 8 / (scale.PEAK * scale.EFFICIENCY)
    fraction = old / whole
    assert scale.end_to_end("T-NLG", 8, False) == pytest.approx(1 / (1 - fraction + fraction * new / old), rel=1e-9)


# ---- the picture -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", picture.SCHEMES)
def test_the_picture_says_in_words_what_the_memory_did(scheme):
    stage = memory.Stage(16, 87, 16, 2)
    shown = picture.draw(8, stage, 7.4, scheme, 1e-7, 1600)
    written, read, updated = t3.dram_traffic(8, "t3" if scheme.startswith("T3") else "sequential")
    assert f"the GEMM writes {written}, the sum reads {read} and writes {updated}." in shown.words


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_rows_that_do_not_divide_are_refused_by_number():
    with pytest.raises(ShapeError, match="10 output rows do not divide into 4 chunks of 1 tiles"):
        t3.fused_gemm_reduce_scatter(machine(4), np.ones((4, 10, 2)), np.ones((4, 2, 3)))


def test_parts_for_another_number_of_ranks_are_refused():
    with pytest.raises(ShapeError, match="a part for each of 4 ranks"):
        t3.fused_gemm_reduce_scatter(machine(4), *parts(3))


def test_whole_numbers_are_refused():
    with pytest.raises(DtypeError, match="int64"):
        t3.fused_gemm_reduce_scatter(machine(2), np.ones((2, 4, 2), int), np.ones((2, 2, 3), int))


def test_a_tracker_without_entries_is_refused():
    with pytest.raises(ValueError, match="0 entries can follow no tile"):
        t3.Tracker(0)


@pytest.mark.parametrize("threshold", [-1, 33])
def test_a_threshold_outside_the_queue_is_refused(threshold):
    with pytest.raises(ValueError, match=f"threshold={threshold}"):
        memory.hbm_queue(4, memory.Stage(8, 8, 8), threshold=threshold)


@pytest.mark.parametrize(
    "options, match",
    [({"policy": "fifo"}, "choose from rr, fcfs, mca"), ({"starvation": 0}, "at least 1 tick")],
)
def test_a_controller_that_does_not_exist_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        memory.hbm_queue(4, memory.Stage(8, 8, 8), **options)


def test_a_stage_with_more_waves_than_requests_is_refused():
    with pytest.raises(ShapeError, match="a request for every wave"):
        memory.hbm_queue(4, memory.Stage(8, 8, 8, 9))


@pytest.mark.parametrize("units", [0, 80])
def test_all_or_none_of_the_units_cannot_be_shared(units):
    with pytest.raises(ValueError, match=f"units={units}"):
        memory.shared(units)


def test_a_simulation_that_would_not_end_says_so():
    with pytest.raises(RuntimeFault, match="not done after 200,000 ticks"):
        memory.hbm_queue(4, memory.Stage(8, 100_000, 8))


def test_an_unknown_scheme_is_refused_by_name():
    with pytest.raises(ValueError, match="choose sequential, ideal or t3"):
        t3.timeline(4, 1.0, 1.0, scheme="magic")


def test_a_place_outside_the_order_is_refused():
    with pytest.raises(ValueError, match="places 0 to 3"):
        t3.chunk_role(4, 4)


def test_an_unknown_source_is_refused():
    with pytest.raises(ValueError, match="an update is local or incoming"):
        t3.Tracker().update(0, "remote")
