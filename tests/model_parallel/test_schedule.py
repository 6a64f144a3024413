"""Pipeline schedules: complete, without circles, and with the times, bubbles and memory of the closed forms."""

from dataclasses import replace
from itertools import pairwise
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.model_parallel import _pipeline
from toolkit.model_parallel._schedule import (
    Pass,
    Schedule,
    ScheduleError,
    bubble,
    check,
    gpipe,
    interleaved,
    makespan,
    one_f_one_b,
    peaks,
    times,
)
from toolkit.runtime import Cluster, hardware, like, topology
from toolkit.runtime.errors import ShapeError

FORWARD, BACKWARD = 1.0, 2.0  # seconds of a rank's whole share of layers
SHAPES = [(1, 1), (1, 4), (2, 2), (2, 5), (3, 2), (4, 8), (5, 3), (8, 16)]  # stages, microbatches
RINGS = [(1, 3, 2), (2, 2, 2), (2, 4, 3), (3, 3, 2), (4, 8, 2), (4, 16, 3), (8, 16, 4)]  # stages, microbatches, chunks
SCHEDULES = [
    *(gpipe(*shape) for shape in SHAPES),
    *(one_f_one_b(*shape) for shape in SHAPES),
    *(interleaved(*ring) for ring in RINGS),
]
EACH = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.name}-{len(s.passes)}-{s.microbatches}")


def seconds(schedule):
    """Of a pass of one chunk."""
    chunks = len(schedule.where[0])
    return {"F": FORWARD / chunks, "B": BACKWARD / chunks}


FREE = hardware.Link(inf)


def replayed(schedule, link=FREE, message=8):
    cluster = Cluster(topology.full_mesh(len(schedule.passes), link), _pipeline.CLOCK)
    return cluster.run(_pipeline.replay, schedule, seconds(schedule), like((message,), "uint8"))


# ---- the closed forms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [gpipe, one_f_one_b])
@pytest.mark.parametrize("p, m", SHAPES)
def test_gpipe_and_1f1b_take_m_plus_p_minus_1_passes_each_way(p, m, build):
    assert makespan(build(p, m), {"F": FORWARD, "B": BACKWARD}) == (m + p - 1) * (FORWARD + BACKWARD)


@pytest.mark.parametrize("p, m, v", RINGS)
def test_interleaving_divides_fill_and_drain_by_the_number_of_chunks(p, m, v):
    schedule = interleaved(p, m, v)
    assert makespan(schedule, seconds(schedule)) == pytest.approx((m + (p - 1) / v) * (FORWARD + BACKWARD), rel=1e-12)


def test_four_stages_eight_microbatches_two_chunks_take_28_and_a_half_instead_of_33():
    assert makespan(interleaved(4, 8, 2), {"F": 0.5, "B": 1.0}) == 28.5
    assert makespan(one_f_one_b(4, 8), {"F": 1.0, "B": 2.0}) == 33.0


@pytest.mark.parametrize("p, m, v", [(4, 8, 1), *RINGS])
def test_the_bubble_is_idle_over_ideal_time(p, m, v):
    assert bubble(interleaved(p, m, v)) == pytest.approx((p - 1) / (v * m), abs=1e-12)


@pytest.mark.parametrize("p, m", SHAPES)
def test_gpipe_keeps_all_microbatches(p, m):
    assert peaks(gpipe(p, m)) == [m] * p


@pytest.mark.parametrize("p, m", SHAPES)
def test_1f1b_keeps_as_many_microbatches_as_stages_follow(p, m):
    assert peaks(one_f_one_b(p, m)) == [min(p - r, m) for r in range(p)]


@pytest.mark.parametrize("p, m, v", [ring for ring in RINGS if ring[1] > ring[0]])
def test_interleaving_keeps_the_warm_up_and_one_more_chunk(p, m, v):
    assert peaks(interleaved(p, m, v)) == [min(2 * (p - r - 1) + (v - 1) * p + 1, m * v) for r in range(p)]


@pytest.mark.parametrize("p, m, v", [ring for ring in RINGS if ring[1] > ring[0]])
def test_interleaving_costs_rank_0_up_to_one_part_in_v_of_memory(p, m, v):
    kept = peaks(interleaved(p, m, v))[0] / v
    assert kept <= p + (p - 1) / v
    assert kept == pytest.approx(p * (1 + (p - 1) / (p * v))) or m * v < 2 * (p - 1) + (v - 1) * p + 1


# ---- a schedule in the abstract and on the machine -------------------------------------------------------------------


@EACH
def test_the_scheduler_takes_the_time_of_the_closed_form_when_messages_are_free(schedule):
    assert replayed(schedule).makespan == pytest.approx(makespan(schedule, seconds(schedule)), rel=1e-12)


@EACH
def test_the_scheduler_keeps_as_many_activations_as_the_data_says(schedule):
    assert replayed(schedule).outputs == peaks(schedule)


@EACH
def test_passes_of_a_rank_run_in_their_order_and_never_together(schedule):
    found = times(schedule, seconds(schedule))
    for rank, order in enumerate(schedule.passes):
        spans = [found[rank, step] for step in order]
        assert all(a[1] <= b[0] for a, b in pairwise(spans))


@EACH
def test_each_boundary_is_crossed_once_each_way_by_each_microbatch(schedule):
    crossed = sum(1 for s in range(schedule.stages - 1) if schedule.owner[s][0] != schedule.owner[s + 1][0])
    run = replayed(schedule, message=1000)
    assert run.traffic.total == 2 * crossed * schedule.microbatches * 1000


@pytest.mark.parametrize("p", range(2, 7))
@pytest.mark.parametrize("m", range(1, 17))
def test_latency_costs_1f1b_more_than_gpipe_and_strictly_where_m_exceeds_p(p, m):
    rigid, turns = (makespan(build(p, m), {"F": 1.0, "B": 2.0}, hop=0.3) for build in (gpipe, one_f_one_b))
    assert rigid == pytest.approx((m + p - 1) * 3 + 2 * (p - 1) * 0.3)
    assert turns > rigid + 1e-9 if m > p else turns >= rigid - 1e-9


@pytest.mark.parametrize("build", [gpipe, one_f_one_b])
def test_latency_on_the_machine_is_the_hop_of_the_abstract(build):
    schedule = build(4, 8)
    run = replayed(schedule, hardware.Link(inf, latency=0.3))
    assert run.makespan == pytest.approx(makespan(schedule, seconds(schedule), hop=0.3), rel=1e-9)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.floats(0.1, 3), st.floats(0.1, 3), st.floats(0, 1))
def test_no_schedule_beats_its_work_or_its_longest_chain(p, groups, v, forward, backward, hop):
    schedule = interleaved(p, groups * p, v)
    total = makespan(schedule, {"F": forward / v, "B": backward / v}, hop)
    chain = p * (forward + backward) + 2 * (p * v - 1) * hop * (p > 1)
    assert total >= max(groups * p * (forward + backward), chain) * (1 - 1e-12)


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_interleaving_refuses_microbatches_that_are_no_multiple_of_the_stages():
    with pytest.raises(ShapeError, match="6 microbatches are no multiple of 4 stages"):
        interleaved(4, 6, 2)


def test_zero_microbatches_are_refused():
    with pytest.raises(ShapeError, match="microbatches=0: give a whole number from 1 on"):
        gpipe(4, 0)


def changed(schedule, rank, order):
    return replace(schedule, passes=(*schedule.passes[:rank], tuple(order), *schedule.passes[rank + 1 :]))


def test_a_pass_that_is_forgotten_is_named():
    schedule = gpipe(2, 2)
    with pytest.raises(ScheduleError, match=r"rank 1 has B\(microbatch 1, chunk 0\) 0 times"):
        check(changed(schedule, 1, schedule.passes[1][:-1]))


def test_passes_that_wait_for_each_other_are_named():
    schedule = one_f_one_b(2, 2)
    f, b = Pass("F", 0), Pass("B", 0)
    with pytest.raises(ScheduleError, match=r"rank 1 waits at B\(microbatch 0, chunk 0\) for F"):
        check(changed(schedule, 1, [b, f, Pass("F", 1), Pass("B", 1)]))


def test_messages_used_out_of_order_are_named():
    schedule = gpipe(2, 2)
    order = [schedule.passes[1][i] for i in (1, 0, 2, 3)]
    with pytest.raises(ScheduleError, match="does not use the activations of rank 0 in the order"):
        _pipeline.check_order(changed(schedule, 1, order))


@EACH
def test_messages_of_each_schedule_are_used_in_order(schedule):
    assert _pipeline.check_order(schedule) is schedule


def test_a_finer_cut_of_layers_is_not_interleaving():
    """Twice as many stages on twice as many ranks: the fill does not shrink."""
    finer = one_f_one_b(8, 8)
    assert makespan(finer, {"F": 0.5, "B": 1.0}) / (8 * 1.5) - 1 == pytest.approx(7 / 8)
    assert bubble(interleaved(4, 8, 2)) == pytest.approx(3 / 16)


def test_a_schedule_for_other_ranks_is_refused():
    with pytest.raises(ScheduleError, match="GPipe has 4 ranks, the communicator 2"):
        Cluster(topology.full_mesh(2, hardware.NVLINK3)).run(
            _pipeline.replay, gpipe(4, 4), {"F": 1, "B": 2}, like((1,))
        )


def test_passes_of_other_kinds_run_in_their_place():
    seen = []
    order = (Pass("F", 0), Pass("W", 0), Pass("B", 0), Pass("W", 1))
    schedule = Schedule("with extra passes", 1, (order,), ((0,),))

    def note(kind, *results):
        seen.append(kind)
        return results

    def program(comm):
        return _pipeline.run(
            comm,
            schedule,
            lambda c, k, x: note("F", None, None),
            lambda c, k, s, g: note("B"),
            others={"W": lambda c, k: note(k)},
        )

    Cluster(topology.full_mesh(1, hardware.NVLINK3)).run(program)
    assert seen == ["F", 0, "B", 1]
