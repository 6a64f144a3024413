"""The timeline draws every event where its time is, says it in words, and stays small."""

import re
from xml.etree import ElementTree

import pytest

from show.runs import computes, fake_run, message
from toolkit.show.timeline import LEFT, RIGHT, timeline

MS = (RIGHT - LEFT) / 7  # px a millisecond in the run written by hand


def test_a_kernel_is_drawn_at_its_time(by_hand, bars_of):
    last = max((b for b in bars_of(timeline(by_hand)) if b.kind == "compute"), key=lambda b: b.x)
    assert (last.x, last.width) == (pytest.approx(LEFT + 4 * MS, abs=0.06), pytest.approx(3 * MS, abs=0.06))


def test_each_event_is_one_bar(by_hand, bars_of):
    kinds = [b.kind for b in bars_of(timeline(by_hand))]
    assert {kind: kinds.count(kind) for kind in kinds} == {"compute": 4, "wait": 1, "send": 1, "recv": 1}


def test_the_sender_is_drawn_above_the_middle_of_its_row_and_the_receiver_below(ring_run, bars_of):
    bars = bars_of(timeline(ring_run(2)))
    send = min(b.y for b in bars if b.kind == "send")
    recv = min(b.y for b in bars if b.kind == "recv")
    assert recv - send == 6


def test_hovering_a_message_shows_peer_start_duration_and_bytes(by_hand, bars_of):
    notes = [b.note for b in bars_of(timeline(by_hand)) if b.kind in ("send", "recv")]
    assert notes == ["kv → rank 1 at 2 ms for 2 ms, 1 kB", "kv ← rank 0 at 2 ms for 2 ms, 1 kB"]


def test_hovering_a_wait_says_what_for(by_hand, bars_of):
    assert "waits: kv at 1 ms for 3 ms" in [b.note for b in bars_of(timeline(by_hand))]


def test_the_words_give_the_numbers(by_hand):
    assert timeline(by_hand).words == "Timeline. 2 ranks: 7 ms, 3 ms exposed communication."


def test_the_words_are_the_pictures_accessible_name(by_hand):
    picture = timeline(by_hand, titles=["ring"])
    svg = ElementTree.fromstring(picture.svg)
    assert (svg.get("role"), svg.get("aria-label"), svg.find("desc").text) == ("img", picture.words, picture.words)


def test_the_makespan_stands_in_the_title_of_its_run(by_hand, texts_of):
    assert "ring: 7 ms" in texts_of(timeline(by_hand, titles=["ring"]))


@pytest.mark.parametrize(("scale", "unit"), [(1e3, "s"), (1, "ms"), (1e-3, "µs"), (1e-6, "ns")])
def test_the_axis_takes_the_unit_that_fits(scale, unit, texts_of):
    run = fake_run([computes(0, "block", 0.0, 7e-3 * scale)], 1, 7e-3 * scale, 0.0)
    assert {f"time ({unit})", "0", "1", "7"} <= set(texts_of(timeline(run)))


def test_two_runs_share_one_axis(by_hand, bars_of):
    short = fake_run([computes(0, "block", 0.0, 3.5e-3), computes(1, "block", 0.0, 3.5e-3)], 2, 3.5e-3, 0.0)
    widths = [b.width for b in bars_of(timeline(by_hand, short, titles=["a", "b"])) if b.kind == "compute"]
    assert pytest.approx(3.5 * MS, abs=0.06) in widths


def test_two_runs_are_compared_in_words(by_hand):
    short = fake_run([computes(0, "block", 0.0, 3.5e-3)], 2, 3.5e-3, 0.0)
    assert timeline(by_hand, short, titles=["a", "b"]).words.endswith("b ends first, 2.00 times as fast as a.")


def test_equal_runs_have_no_winner(by_hand):
    assert timeline(by_hand, by_hand).words.endswith("They end together.")


def critical_shapes(picture):
    outlines = [p for p in ElementTree.fromstring(picture.svg).iter("path") if p.get("class") == "k"]
    return re.findall(r"M(\S+) \S+?h(\S+?)v", next(p.get("d") for p in outlines if p.get("d").count("z") > 1))


def test_the_critical_path_is_outlined_on_both_sides_of_its_message(by_hand):
    shapes = critical_shapes(timeline(by_hand))
    spans = {(round((float(x) - LEFT) / MS), round(float(width) / MS)) for x, width in shapes}
    assert spans == {(0, 2), (2, 2), (4, 3)}  # block on rank 0, the message, the last block: start and length in ms


def test_the_calls_of_the_longest_kernel_are_numbered_on_each_rank(by_hand, texts_of):
    numbers = texts_of(timeline(by_hand))[-3:]
    assert numbers == ["0", "0", "1"]


def test_numbers_can_be_left_out(by_hand):
    assert 'class="v"' not in timeline(by_hand, steps=False).svg


def test_an_unknown_step_kernel_is_refused_by_name(by_hand):
    with pytest.raises(ValueError, match="steps='blok' is no kernel of this run; it has block, merge"):
        timeline(by_hand, steps="blok")


def test_kernels_thinner_than_a_pixel_become_one_bar(bars_of):
    events = [computes(0, "tiny", i * 1e-6, (i + 1) * 1e-6) for i in range(10_000)]
    bars = bars_of(timeline(fake_run(events, 1, 10e-3, 0.0), steps=False))
    assert [(b.note, round(b.width)) for b in bars] == [("10000 × tiny at 0 s for 10 ms", RIGHT - LEFT)]


def test_thin_kernels_far_apart_stay_apart(bars_of):
    events = [computes(0, "tiny", i * 1e-3, i * 1e-3 + 1e-7) for i in range(5)]
    assert len(bars_of(timeline(fake_run(events, 1, 5e-3, 0.0)))) == 5


def test_messages_at_the_same_time_lie_in_lanes_of_one_row(bars_of):
    events = message(0, 1, "kv", 0.0, 1.0, 8, 0.0, 0.0) + message(0, 1, "kv", 0.0, 1.0, 8, 0.0, 0.0, lane=" 2")
    bars = bars_of(timeline(fake_run(events, 2, 1.0, 0.0)))
    assert len({b.y for b in bars if b.kind == "send"}) == 2


def test_a_named_compute_stream_has_a_row_of_its_own(by_hand, texts_of):
    by_hand.trace.append(computes(0, "pack", 3e-3, 4e-3, stream="copy"))
    assert texts_of(timeline(by_hand)).count("copy") == 2  # on both ranks, so that rows can be compared


def test_a_long_stream_name_moves_the_first_instant_to_the_right(bars_of):
    run = fake_run(message(0, 1, "keys and values", 0.0, 1.0, 8, 0.0, 0.0), 2, 1.0, 0.0)
    assert min(b.x for b in bars_of(timeline(run))) > 14 + 6 * len("keys and values") > LEFT


def test_a_very_long_stream_name_is_cut(texts_of):
    run = fake_run(message(0, 1, "gradients of keys and values", 0.0, 1.0, 8, 0.0, 0.0), 2, 1.0, 0.0)
    assert texts_of(timeline(run)).count("gradients of keys and…") == 2


def test_a_large_run_says_how_many_ranks_it_hides(ring_run):
    assert "56 more ranks not drawn" in timeline(ring_run(64), ranks=8).words


def test_a_rank_that_does_not_exist_is_refused(by_hand):
    with pytest.raises(ValueError, match="names rank 2, but the run has ranks 0 to 1"):
        timeline(by_hand, ranks=[0, 2])


def test_titles_must_match_the_runs(by_hand):
    with pytest.raises(ValueError, match="1 runs but 2 titles"):
        timeline(by_hand, titles=["a", "b"])


def test_no_run_is_refused():
    with pytest.raises(ValueError, match="at least one run"):
        timeline()


def test_eight_ranks_by_eight_steps_take_less_than_32_kilobytes(ring_run):
    assert len(timeline(ring_run(8)).svg.encode()) < 32_000


def test_a_ring_of_64_ranks_stays_below_100_kilobytes(ring_run):
    assert len(timeline(ring_run(64)).svg.encode()) < 100_000


def test_names_with_markup_are_escaped():
    run = fake_run([computes(0, "<b>&", 0.0, 1.0)], 1, 1.0, 0.0)
    assert "<b>& at 0 s for 1 s" in "".join(ElementTree.fromstring(timeline(run).svg).itertext())


def test_two_pictures_on_a_page_share_no_id(by_hand):
    assert " id=" not in timeline(by_hand).svg


def test_letters_take_the_pages_colour_and_no_ground_is_painted(by_hand):
    svg = timeline(by_hand).svg
    assert ".tk{font:12px system-ui,sans-serif;fill:currentColor}" in svg and "<rect" not in svg


def test_a_run_without_events_is_drawn(texts_of):
    assert "rank 0" in texts_of(timeline(fake_run([], 1, 0.0, 0.0)))


def test_the_same_run_gives_the_same_picture(ring_run):
    assert timeline(ring_run(4)).svg == timeline(ring_run(4)).svg


def test_a_saved_file_is_a_picture_of_its_own(by_hand, tmp_path):
    timeline(by_hand).save(tmp_path / "a.svg")
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_the_runs_own_method_draws_it(ring_run):
    run = ring_run(2)
    assert run.timeline(titles=["ring"]).svg == timeline(run, titles=["ring"]).svg
