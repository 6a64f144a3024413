"""Timelines and tables for a terminal."""

import pytest

from show.runs import computes, fake_run, message
from toolkit.show import text


def test_the_timeline_by_hand_letter_by_letter(by_hand):
    assert text.timeline(by_hand, width=35).splitlines() == [
        "7 ms, 3 ms exposed communication",
        "rank 0 ██████████··················",
        "  kv   ········▀▀▀▀▀▀▀▀············",
        "rank 1 ████░░░░░░░░░░░░████████████",
        "  kv   ········▄▄▄▄▄▄▄▄············",
        "       ┴───────┴───────┴───────┴───",
        "       0 ms    2 ms    4 ms    6 ms",
    ]


def test_both_directions_at_once_have_a_letter_of_their_own():
    events = message(0, 1, "kv", 0.0, 1.0, 8, 0.0, 0.0) + message(1, 0, "kv", 0.0, 1.0, 8, 0.0, 0.0)
    assert text.timeline(fake_run(events, 2, 1.0, 0.0), width=40).count(text.BOTH) == 2 * 33


@pytest.mark.parametrize("width", [40, 78, 120])
def test_no_line_is_longer_than_the_width(width, ring_run):
    assert max(map(len, text.timeline(ring_run(8), width=width).splitlines())) <= width


def test_what_each_letter_means_is_said_where_it_fits(by_hand):
    assert text.timeline(by_hand, width=78).splitlines()[-1] == text.LEGEND


def test_hidden_ranks_are_counted(ring_run):
    assert "5 more ranks not drawn" in text.timeline(ring_run(8), ranks=3)


def test_a_width_without_room_for_time_is_refused(by_hand):
    with pytest.raises(ValueError, match="20 columns leave 13 for time, needs 20; use width=27 or more"):
        text.timeline(by_hand, width=20)


def test_a_run_of_no_time_is_drawn_idle():
    assert "rank 0 " + "·" * 33 in text.timeline(fake_run([], 1, 0.0, 0.0), width=40)


def test_an_instant_kernel_takes_no_letter():
    run = fake_run([computes(0, "free", 0.5, 0.5), computes(0, "end", 0.9, 1.0)], 1, 1.0, 0.0)
    assert text.timeline(run, width=47).splitlines()[1] == "rank 0 " + "·" * 36 + "█" * 4


def test_a_table_aligns_numbers_right_and_words_left():
    assert text.table([("ring", "14.3 ms"), ("token ring", "9.15 ms")], ("system", "step")).splitlines() == [
        "system         step",
        "----------  -------",
        "ring        14.3 ms",
        "token ring  9.15 ms",
    ]


def test_a_table_without_rows_is_its_headers():
    assert text.table([], ("a", "bc")) == "a  bc\n-  --"


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="has 1 cells for 2 headers"):
        text.table([("ring",)], ("system", "step"))
