"""The critical path: a chain without holes from the end of a run to its beginning."""

import pytest

from show.runs import computes, fake_run, message, waits
from toolkit.show import critical_path


def test_the_run_by_hand_is_explained_by_three_events(by_hand):
    assert [(e.kind, e.rank, e.name) for e in critical_path(by_hand)] == [
        ("compute", 0, "block"),
        ("recv", 1, "kv"),
        ("compute", 1, "block"),
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_durations_add_up_to_the_makespan(ranks, ring_run):
    run = ring_run(ranks)
    assert sum(e.end - e.start for e in critical_path(run)) == pytest.approx(run.makespan, rel=1e-12)


@pytest.mark.parametrize("ranks", [2, 8])
def test_each_event_starts_when_the_one_before_ends(ranks, ring_run):
    path = critical_path(ring_run(ranks))
    assert [e.start for e in path[1:]] == [e.end for e in path[:-1]]


def test_a_message_is_explained_by_the_side_that_posted_later():
    late = [computes(0, "quick", 0.0, 1.0), computes(1, "slow", 0.0, 3.0), waits(0, "kv", 1.0, 4.0)]
    run = fake_run(late + message(0, 1, "kv", 3.0, 4.0, 8, sent=1.0, received=3.0), 2, 4.0, 3.0)
    assert [(e.name, e.rank) for e in critical_path(run)] == [("slow", 1), ("kv", 0)]


def test_a_wait_for_a_message_outranks_a_kernel_of_another_stream_that_ends_at_the_same_time():
    events = [computes(1, "first", 0.0, 1.0), *message(1, 0, "kv", 1.0, 2.0, 8, 1.0, 0.0), waits(0, "kv", 0.0, 2.0)]
    events += [computes(0, "beside", 0.0, 2.0, stream="copy"), computes(0, "last", 2.0, 3.0)]
    assert [e.name for e in critical_path(fake_run(events, 2, 3.0, 2.0))] == ["first", "kv", "last"]


def test_after_a_timer_the_path_goes_on_from_what_ended_last():
    run = fake_run([computes(0, "before", 0.0, 1.0), computes(0, "after", 5.0, 6.0)], 1, 6.0, 0.0)
    assert [e.name for e in critical_path(run)] == ["before", "after"]


def test_kernels_without_duration_do_not_trap_the_walk():
    events = [computes(0, "free", 0.0, 0.0), *message(0, 1, "kv", 0.0, 1.0, 8, 0.0, 0.0), computes(1, "free", 1.0, 1.0)]
    assert [e.name for e in critical_path(fake_run(events, 2, 1.0, 1.0))] == ["kv"]


def test_a_run_without_events_has_no_path():
    assert critical_path(fake_run([], 1, 0.0, 0.0)) == []
