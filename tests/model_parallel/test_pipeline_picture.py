"""The picture of a schedule: every pass is drawn, and the numbers are in words, too."""

import re

import pytest

from toolkit.model_parallel._pipeline_picture import draw
from toolkit.model_parallel._schedule import gpipe, interleaved, one_f_one_b

SCHEDULES = [gpipe(4, 8), one_f_one_b(4, 8), interleaved(4, 8, 2)]


def drawn(schedule, **options):
    v = len(schedule.where[0])
    return draw(schedule, {"F": 1 / v, "B": 2 / v}, **options)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_every_pass_is_a_bar(schedule):
    paths = re.findall(r'<path stroke="#\w+"[^>]* d="([^"]*)"', drawn(schedule).svg)
    assert sum(path.count("M") for path in paths) == sum(map(len, schedule.passes))


def test_the_words_tell_time_idle_share_and_memory():
    assert drawn(SCHEDULES[1]).words == (
        "1F1B, 4 ranks, 8 microbatches: 33 s, of which rank 0 works 24 s; idle over work 0.375. "
        "Rank 0 keeps 4 microbatches' activations, rank 3 keeps 1."
    )


def test_rows_are_as_long_as_their_passes():
    """Pixels of all bars of a kind stand in the ratio of their seconds."""
    svg = drawn(one_f_one_b(2, 4)).svg
    lengths = [
        sum(float(n) + 0.6 for n in re.findall(r"h([\d.]+)", path))
        for path in re.findall(r'<path stroke="#\w+"[^>]* d="([^"]*)"', svg)
    ]
    assert max(lengths) / min(lengths) == pytest.approx(2, rel=0.01)


def test_memory_bars_of_two_pictures_can_share_a_scale():
    widths = [
        float(re.search(r'fill-opacity=".5" d="M98 \d+h([\d.]+)', drawn(s, full=8).svg)[1]) for s in SCHEDULES[:2]
    ]
    assert widths == [44, 22]
