"""Zero-bubble schedules: the papers' bubbles and memory, the same numbers on the machine, and exact gradients."""

from dataclasses import replace
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from toolkit.model_parallel import _pipeline
from toolkit.model_parallel import _zero_bubble as zb
from toolkit.model_parallel._pipeline_picture import draw
from toolkit.model_parallel._schedule import (
    Pass,
    ScheduleError,
    bubble,
    check,
    interleaved,
    longest_span,
    makespan,
    one_f_one_b,
    peaks,
)
from toolkit.runtime import Cluster, hardware, like, topology

ALIKE = {"F": 1.0, "B": 1.0, "W": 1.0}
HALVES = {"F": 0.5, "B": 0.5, "W": 0.5}  # of two chunks a rank
KINDS = [zb.zb_h1, zb.zb_h2, zb.v_min, zb.v_half, zb.v_zb]
SHAPES = [(1, 1), (1, 3), (2, 1), (2, 4), (3, 3), (4, 8), (5, 4), (6, 7), (8, 16)]  # stages, microbatches
each_schedule = pytest.mark.parametrize(
    "schedule",
    [build(*shape) for build in KINDS for shape in SHAPES],
    ids=lambda s: f"{s.name}-{len(s.passes)}-{s.microbatches}",
)
stages = pytest.mark.parametrize("p", [2, 3, 4, 5, 6, 8, 9, 12])


def idle(schedule, seconds, total=makespan):
    """Seconds beyond the work of a rank."""
    chunks = len(schedule.where[0])
    return total(schedule, seconds) - schedule.microbatches * chunks * sum(seconds.values())


# ---- the papers' closed forms ----------------------------------------------------------------------------------------


@stages
@pytest.mark.parametrize("f, b, w", [(1, 1, 1), (1, 1.2, 0.7), (1, 2, 1), (1.5, 1.25, 0)])
def test_zb_h1_idles_p_minus_1_times_f_plus_b_minus_w(p, f, b, w):
    seconds = {"F": f, "B": b, "W": w}
    assert idle(zb.zb_h1(p, 3 * p, seconds), seconds) == pytest.approx((p - 1) * (f + b - w))


@stages
@pytest.mark.parametrize("f, b, w", [(1, 1, 1), (1, 1.2, 0.7), (1, 2, 1)])
def test_zb_h2_idles_p_minus_1_times_f_plus_b_minus_2w_where_ranks_start_apart(p, f, b, w):
    seconds = {"F": f, "B": b, "W": w}
    assert idle(zb.zb_h2(p, 3 * p, seconds), seconds, longest_span) == pytest.approx((p - 1) * (f + b - 2 * w))


@stages
def test_zb_h2_still_pays_the_way_to_the_last_rank_if_all_start_together(p):
    assert idle(zb.zb_h2(p, 3 * p), ALIKE) == pytest.approx(p - 1)


@stages
def test_zb_h1_has_a_third_of_the_bubble_of_1f1b(p):
    assert bubble(zb.zb_h1(p, 2 * p)) * 3 == pytest.approx(bubble(one_f_one_b(p, 2 * p)))


@stages
def test_zb_h1_keeps_p_microbatches_on_every_rank(p):
    assert peaks(zb.zb_h1(p, 2 * p)) == [p] * p


@stages
def test_zb_h2_keeps_2p_minus_1_on_every_rank(p):
    assert peaks(zb.zb_h2(p, 3 * p)) == [2 * p - 1] * p


@stages
def test_v_half_keeps_half_of_1f1b_and_one_microbatch_on_every_rank(p):
    kept = {n / 2 for n in peaks(zb.v_half(p, 3 * p))}
    assert kept == {max(peaks(one_f_one_b(p, 3 * p))) / 2 + 1}


@stages
def test_v_half_has_less_than_half_of_the_bubble_of_1f1b(p):
    assert idle(zb.v_half(p, 3 * p), HALVES) <= 0.5 * idle(one_f_one_b(p, 3 * p), {"F": 1, "B": 2})


@stages
def test_v_min_keeps_at_most_a_third_and_four_thirds_of_a_microbatch(p):
    assert max(peaks(zb.v_min(p, 3 * p))) / 2 <= (p + 4) / 3


@pytest.mark.parametrize("p", [48, 64])
def test_memory_tends_to_a_third_a_half_and_all_of_1f1b(p):
    third, half, whole = (max(peaks(build(p, 2 * p))) / 2 / p for build in (zb.v_min, zb.v_half, zb.v_zb))
    assert (third, half, whole) == (pytest.approx(1 / 3, abs=0.035), pytest.approx(1 / 2, abs=0.035), 1)


@stages
def test_v_zb_idles_on_the_way_to_the_last_rank_only(p):
    assert idle(zb.v_zb(p, 3 * p), HALVES) == pytest.approx((p - 1) * 0.5)


@pytest.mark.parametrize("build", KINDS)
@stages
def test_a_microbatch_more_costs_its_work_only(p, build):
    few, many = (makespan(s := build(p, m), HALVES if len(s.where[0]) == 2 else ALIKE) for m in (3 * p, 3 * p + 1))
    assert many - few == pytest.approx(3)


def test_w_right_after_b_is_1f1b():
    """Proof that the tests of bubbles can fail: the split alone, without waiting, wins nothing on the way back."""
    orders = [
        tuple(step for one in order for step in ([one, one._replace(kind="W")] if one.kind == "B" else [one]))
        for order in one_f_one_b(4, 8).passes
    ]
    eager = replace(one_f_one_b(4, 8), passes=tuple(orders))
    assert idle(eager, ALIKE) > idle(zb.zb_h1(4, 8), ALIKE) + 2


# ---- the block -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 24), st.sampled_from([(1, 1), (2, 1), (1, 2), (4, 2), (3, 3)]))
def test_passes_of_a_rank_never_meet_however_often_the_block_repeats(p, steps):
    for slots in zb.block(p, *steps):
        assert len({slot % 6 for slot in slots}) == 4


@given(st.integers(1, 24), st.sampled_from([(1, 1), (2, 1), (4, 2)]))
def test_the_block_follows_the_model(p, steps):
    slots = zb.block(p, *steps)
    ahead = [slots[r][leg] for leg in range(4) for r in (range(p) if leg % 2 == 0 else reversed(range(p)))]
    assert ahead == sorted(set(ahead))


def test_steps_that_collide_are_refused():
    with pytest.raises(ScheduleError, match="5 and 2 slots apart meet on a rank"):
        zb.block(8, 5, 2)


# ---- a schedule in the abstract and on the machine -------------------------------------------------------------------


def replayed(schedule):
    cluster = Cluster(topology.full_mesh(len(schedule.passes), hardware.Link(inf)), _pipeline.CLOCK)
    return cluster.run(_pipeline.replay, schedule, ALIKE, like((10,), "uint8"))


@each_schedule
def test_the_scheduler_takes_the_time_and_the_memory_that_the_data_says(schedule):
    run = replayed(schedule)
    assert run.makespan == pytest.approx(makespan(schedule, ALIKE), rel=1e-12)
    assert run.outputs == peaks(schedule)


@each_schedule
def test_messages_are_used_in_order(schedule):
    assert _pipeline.check_order(schedule) is schedule


@each_schedule
def test_memory_is_bounded_by_what_a_rank_is_given(schedule):
    p = len(schedule.passes)
    limit = {"ZB-H1": p, "ZB-H2": 2 * p - 1, "V-Min": 2 * ((p + 1) // 3) + 2, "V-Half": p + 2, "V-ZB": 2 * p}
    assert max(peaks(schedule)) <= limit[schedule.name]


def test_messages_of_a_v_turn_inside_the_last_rank_and_end_on_the_first():
    assert replayed(zb.v_half(4, 6)).traffic.total == 2 * 6 * 2 * 3 * 10  # both ways, 6 microbatches, 3 + 3 hops


@settings(max_examples=60)
@given(
    st.sampled_from(KINDS), st.integers(1, 6), st.integers(1, 14),
    st.floats(0.1, 3), st.floats(0.1, 3), st.floats(0.1, 3), st.floats(0, 1),
)  # fmt: skip
def test_no_schedule_beats_its_work_or_its_longest_chain(build, p, m, f, b, w, hop):
    seconds = {"F": f, "B": b, "W": w}
    schedule = check(build(p, m, seconds))
    chunks = len(schedule.where[0])
    chain = chunks * p * (f + b) + w + 2 * chunks * (p - 1) * hop
    assert makespan(schedule, seconds, hop) >= max(m * chunks * (f + b + w), chain) * (1 - 1e-12)


# ---- training --------------------------------------------------------------------------------------------------------


def gradients(comm, schedule, weights, batches):
    """Of the sum of all outputs of a stack of layers x -> tanh(x A), cut into stages, summed over microbatches."""
    stages, later = schedule.where[comm.rank], {}
    found = [np.zeros_like(weights[stage]) for stage in stages]

    def forward(chunk, k, x):
        x = batches[k] if x is None else x
        return np.tanh(x @ weights[stages[chunk]]), (x, np.tanh(x @ weights[stages[chunk]]))

    def backward(chunk, k, saved, grad):
        x, y = saved
        inside = (np.ones_like(y) if grad is None else grad) * (1 - y * y)
        later[chunk, k] = x, inside
        return inside @ weights[stages[chunk]].T

    def weigh(chunk, k):
        x, inside = later.pop((chunk, k))
        found[chunk] += x.T @ inside

    _pipeline.run(comm, schedule, forward, backward, others={"W": weigh})
    assert not later
    return dict(zip(stages, found, strict=True))


@pytest.mark.parametrize("build", KINDS)
def test_gradients_are_those_of_finite_differences(build):
    random, schedule = np.random.default_rng(0), build(3, 5)
    weights, batches = random.standard_normal((schedule.stages, 4, 4)) / 2, random.standard_normal((5, 2, 4))
    run = Cluster(topology.full_mesh(3, hardware.NVLINK3)).run(gradients, schedule, weights, batches)
    got = {stage: grad for out in run.outputs for stage, grad in out.items()}
    along = random.standard_normal(weights.shape)

    def total(shift):
        x = batches
        for a in weights + shift * along:
            x = np.tanh(x @ a)
        return x.sum()

    slope = (total(1e-6) - total(-1e-6)) / 2e-6
    assert_allclose(sum(np.vdot(got[s], along[s]) for s in range(schedule.stages)), slope, rtol=1e-7)


# ---- mistakes, and the picture ---------------------------------------------------------------------------------------


def test_too_little_room_for_the_order_is_named():
    with pytest.raises(ScheduleError, match="1F1B: rank 0 must keep more than 3 chunks' activations"):
        zb.split(one_f_one_b(4, 8), 3)


def test_w_before_its_b_is_named():
    schedule = zb.zb_h1(2, 2)
    f, g, b, w = Pass("F", 0), Pass("F", 1), Pass("B", 0), Pass("W", 0)
    orders = (schedule.passes[0], (f, w, b, g, Pass("B", 1), Pass("W", 1)))
    with pytest.raises(ScheduleError, match=r"rank 1 waits at W\(microbatch 0, chunk 0\) for B\(microbatch 0"):
        check(replace(schedule, passes=orders))


def test_a_w_that_is_forgotten_is_named():
    schedule = zb.zb_h1(2, 2)
    with pytest.raises(ScheduleError, match=r"rank 1 has W\(microbatch 1, chunk 0\) 0 times"):
        check(replace(schedule, passes=(schedule.passes[0], schedule.passes[1][:-1])))


def test_any_schedule_can_be_split():
    apart = zb.split(interleaved(4, 8, 2), limit=max(peaks(interleaved(4, 8, 2))), seconds=HALVES)
    assert bubble(check(apart)) < bubble(interleaved(4, 8, 2))


def test_the_picture_names_the_third_kind_of_pass():
    picture = draw(zb.v_half(4, 8), HALVES)
    assert "weights" in picture.svg
    assert picture.words.startswith("V-Half, 4 ranks, 8 microbatches: 28 s, of which rank 0 works 24 s")
