"""A check always ends, and what it raises starts with the question."""

import time
from types import SimpleNamespace

import numpy as np
import pytest

from toolkit.classroom import NotYet, check, on_targets
from toolkit.runtime import Cluster, hardware, topology


def asked(function, seconds=5.0):
    """The message of a check that asks `function` for 3."""
    with pytest.raises(NotYet) as caught, check("4. Three", seconds=seconds) as answer:
        assert answer(function) == 3, "three is one more than two"
    assert str(caught.value).startswith("4. Three: ")
    return str(caught.value)


def endless():
    while True:
        pass


def stubborn():
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            pass


def unanswered():
    raise NotImplementedError()


def test_a_right_answer_is_confirmed(capsys):
    with check("4. Three") as answer:
        assert answer(lambda: 3) == 3
    assert capsys.readouterr().out == "4. Three: correct.\n"


def test_a_wrong_answer_gets_the_sentence_of_its_check():
    assert asked(lambda: 4).startswith("4. Three: three is one more than two")


@pytest.mark.parametrize("function", [endless, stubborn])
def test_an_endless_loop_ends(function):
    began = time.monotonic()
    assert "still running after 0.2 s" in asked(function, seconds=0.2)
    assert time.monotonic() - began < 2


def test_none_is_refused_with_advice():
    assert "returned None. End your function with a `return`" in asked(lambda: None)


def test_a_print_in_place_of_a_return_is_recognised():
    assert "It printed its result: return it instead" in asked(lambda: print(3))


def test_a_crash_names_the_error_and_the_line():
    assert "ZeroDivisionError: division by zero (at line" in asked(lambda: 1 / 0)


def test_the_line_of_a_crash_is_the_students_not_ours():
    def wrong_rank():
        return Cluster(topology.ring(2, hardware.NVLINK4)).run(lambda comm: comm.recv(source=7))

    assert "recv(source=7)" in asked(wrong_rank)


def test_a_blank_answer_is_called_unanswered():
    assert "not answered yet" in asked(unanswered)


def test_a_blank_answer_inside_another_error_is_called_unanswered():
    def wrapped():
        try:
            unanswered()
        except NotImplementedError as error:
            raise RuntimeError("rank 2 failed") from error

    assert "not answered yet" in asked(wrapped)


def test_a_missing_function_is_explained():
    with pytest.raises(NotYet, match="Run the cell that defines it"), check("4. Three") as answer:
        answer(my_answer)  # noqa: F821


def test_an_assertion_without_words_shows_its_line():
    with pytest.raises(NotYet, match=r"this did not hold: line .*: raise AssertionError"), check("4. Three"):
        raise AssertionError  # what a bare assert raises; pytest would add words to that


def test_the_timer_is_off_afterwards():
    with check("4. Three", seconds=0.05):
        pass
    time.sleep(0.1)  # a timer left behind would end the test run here


def test_interrupting_by_hand_still_works():
    with pytest.raises(KeyboardInterrupt), check("4. Three"):
        raise KeyboardInterrupt


def finished(output, makespan=1e-3, sent=((0, 100), (300, 0))):
    """What `on_targets` looks at of a run: two ranks, milliseconds, bytes."""
    traffic = SimpleNamespace(by_pair=np.array(sent))
    return SimpleNamespace(outputs=[1, 2], makespan=makespan, traffic=traffic, gather=lambda axis, layout: output)


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({"output": np.ones(3)}, "result"),
        ({"output": np.full(2, np.nan)}, "result"),
        ({"makespan": 1.1e-3}, "time"),
        ({"sent": ((0, 301), (0, 0))}, "bytes"),
        ({"makespan": 1.1e-3, "sent": ((0, 301), (0, 0))}, "time, bytes"),
    ],
)
def test_a_missed_target_is_named(changes, missed):
    run = finished(**{"output": np.zeros(2), **changes})
    with pytest.raises(NotYet, match=f"missed: {missed}\\."):
        on_targets(run, equals=np.zeros(2), seconds=1e-3, bytes=300)


def test_targets_that_are_met_are_listed():
    assert on_targets(finished(np.zeros(2)), equals=np.zeros(2), seconds=1e-3, bytes=300).count("met") == 3


def test_time_and_bytes_come_from_the_run_at_scale():
    small, large = finished(np.zeros(2)), finished(None, makespan=2.0)
    with pytest.raises(NotYet, match="missed: time"):
        on_targets(small, equals=np.zeros(2), seconds=1.0, at_scale=large)


def test_a_rank_that_returns_none_is_named():
    run = finished(np.zeros(2))
    run.outputs = [np.zeros(2), None]
    with pytest.raises(NotYet, match="rank 1 returned None"):
        on_targets(run, equals=np.zeros(2))


def test_outputs_can_be_compared_rank_by_rank():
    with pytest.raises(NotYet, match="missed: result"):
        on_targets(finished(None), equals=[1, 3])
