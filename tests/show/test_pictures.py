"""Memory, roofline and attention blocks; the house style; the package's door."""

import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from toolkit import show
from toolkit.runtime import hardware
from toolkit.show import blocks, ink, memory
from toolkit.show.picture import from_figure

RING = [(s, r, r, (r - s) % 4, 1.0) for s in range(4) for r in range(4)]  # step, rank, query owner, key owner, area


def well_formed(picture):
    svg = ElementTree.fromstring(picture.svg)
    return svg.get("role") == "img" and svg.find("desc").text == picture.words


# ---- memory ----


def test_the_peak_of_each_rank_is_written_beside_its_strip(by_hand, texts_of):
    assert {"rank 0", "1 MB", "rank 1", "2 MB"} <= set(texts_of(memory.picture(by_hand)))


def test_memory_steps_down_where_the_bytes_do(by_hand):
    strip = re.findall(r'd="(M84 [^"]*)"><title>rank 1', memory.picture(by_hand).svg)[0]
    assert strip == "M84 102V68H362V93.5H640V102z"  # 2 MB up to the middle of the run, then 0.5 MB


def test_memory_in_words(by_hand):
    words = memory.picture(by_hand).words
    assert words == "Live memory over 7 ms, 2 of 2 ranks. Rank 1 needs most, 2 MB; rank 0 least, 1 MB."


def test_memory_of_a_real_run_names_its_peak(ring_run, texts_of):
    run = ring_run(4)
    assert f"{max(run.peak_memory) / 1e6:.0f} MB" in texts_of(memory.picture(run))


def test_memory_refuses_a_rank_that_is_not_there(by_hand):
    with pytest.raises(ValueError, match="names rank 5"):
        memory.picture(by_hand, ranks=[5])


# ---- roofline ----

DEVICE = hardware.Device("box", 1e12, 1e10)  # 1 Tflop/s and 10 GB/s meet at 100 flop a byte


def test_the_roofline_says_what_bounds_each_kernel():
    words = show.roofline(DEVICE, [("add", 1e6, 1e7), ("gemm", 1e12, 1e9)]).words
    assert "add 0.1 flop a byte, 1 Gflop/s, memory-bound; gemm 1 kflop a byte, 1 Tflop/s, compute-bound." in words


def test_the_roof_bends_where_arithmetic_and_memory_balance():
    assert "1 Tflop/s and 10 GB/s meet at 100 flop a byte" in show.roofline(DEVICE, [("add", 1, 1)]).words


def test_a_measured_kernel_lies_below_the_roof():
    svg = show.roofline(DEVICE, [("ideal", 1e12, 1e9), ("slow", 1e12, 1e9, 10.0)]).svg
    heights = [float(y) for y in re.findall(r'transform="translate\(\S+ (\S+)\)"', svg)]
    assert heights[1] > heights[0]  # y points down


def test_the_roofline_of_a_run_draws_its_kernels(ring_run, texts_of):
    assert {"block", "merge"} <= set(texts_of(show.roofline(hardware.A100, ring_run(2))))


def test_both_axes_of_the_roofline_have_units(texts_of):
    assert {"intensity (flop per byte)", "rate (flop/s)"} <= set(texts_of(show.roofline(DEVICE, [("add", 1, 1)])))


@pytest.mark.parametrize(
    ("device", "kernels", "message"),
    [
        (hardware.IDEAL, [("add", 1, 1)], "device 'ideal' has no limits"),
        (DEVICE, [("copy", 0, 8)], "kernel 'copy' has 0 flops and 8 bytes"),
        (DEVICE, [], "no kernels to draw"),
    ],
)
def test_a_roofline_without_sense_is_refused(device, kernels, message):
    with pytest.raises(ValueError, match=message):
        show.roofline(device, kernels)


# ---- attention blocks ----


def test_every_block_is_a_cell_with_its_owner_and_step():
    svg = blocks.ownership(RING).svg
    assert all(f"step {s}, rank {r}: queries {q} × keys {k}, 100% visible" in svg for s, r, q, k, _ in RING)


def test_blocks_after_the_chosen_step_are_not_drawn():
    assert blocks.ownership(RING, step=1).svg.count("% visible") == 8


def test_the_list_says_who_holds_what_in_a_step(texts_of):
    assert "rank 0: Q of 0, K and V of 3" in texts_of(blocks.ownership(RING, step=1))


def test_a_half_visible_block_is_half_the_area():
    widths = [float(w) for w in re.findall(r"h([\d.]+)v[^>]*><title>step", blocks.ownership([(0, 0, 0, 0, 0.5)]).svg)]
    assert widths == [pytest.approx(45 * 0.5**0.5, abs=0.05)]


def test_a_thousand_blocks_stay_light():
    many = [(s, r, r, (r - s) % 32, 1.0) for s in range(32) for r in range(32)]
    assert len(blocks.ownership(many).svg) < 40_000


def test_equal_work_is_said_in_words():
    assert blocks.ownership(RING).words == (
        "16 attention blocks of 4 ranks in 4 steps. A rank computes 4 to 4 blocks' area."
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "no blocks"),
        ([(0, 0, 0, 0, 1.5)], "area in 0 … 1"),
        ([(0, -1, 0, 0, 1.0)], "numbers from 0"),
        ([(0, 0, 0, 0, 1.0), (1, 1, 0, 0, 1.0)], "queries of rank 0 on keys of rank 0 are computed more than once"),
    ],
)
def test_a_wrong_schedule_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        blocks.ownership(wrong)


# ---- every picture ----


def test_every_picture_is_well_formed_and_carries_its_words(by_hand, ring_run):
    run = ring_run(2)
    pictures = [show.timeline(by_hand), memory.picture(run), show.topology.picture(run.cluster.topology)]
    pictures += [show.roofline(DEVICE, [("add", 1, 1)]), blocks.ownership(RING), blocks.ownership(RING, step=2)]
    assert [well_formed(p) for p in pictures] == [True] * 6


def test_a_picture_is_taken_by_the_explorer(by_hand):
    explorer = show.explore(lambda ranks: show.timeline(by_hand, ranks=ranks), ranks=[1, 2])
    assert list(explorer.labels) == ["ranks"]


# ---- house style ----


@pytest.fixture
def pyplot():
    import matplotlib as mpl

    mpl.use("agg")
    with mpl.rc_context():
        ink.use()
        import matplotlib.pyplot as plt

        yield plt
        plt.close("all")


def test_the_house_style_changes_marker_and_colour_together(pyplot):
    lines = [pyplot.plot([0, 1])[0] for _ in range(6)]
    assert len({line.get_marker() for line in lines}) == len({line.get_color() for line in lines}) == 6


def test_the_house_style_paints_no_ground(pyplot):
    assert pyplot.figure().get_facecolor()[3] == 0.0


def test_a_figure_becomes_a_picture_with_the_pages_ink_and_its_own_ids(pyplot):
    figure, ax = pyplot.subplots()
    ax.plot([0, 1])
    picture = from_figure(figure, "A line from 0 to 1.")
    assert "#000000" not in picture.svg and "currentColor" in picture.svg and ' id="figure_1"' not in picture.svg


def test_a_figure_with_a_picture_is_well_formed(pyplot):
    figure, ax = pyplot.subplots()
    ax.plot([0, 1])
    assert ElementTree.fromstring(from_figure(figure, "A <line> & more.").svg.replace("xlink:", "")) is not None


@pytest.mark.parametrize("fraction", [-1.0, 0.0, 0.3, 0.5, 1.0, 2.0])
def test_letters_on_a_ramp_colour_have_a_contrast_of_at_least_4_5(fraction):
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    ground = luminance(ink.ramp(fraction))
    letters = {"#000": 0.0, "#fff": 1.0}[ink.readable_on(ink.ramp(fraction))]
    assert (max(ground, letters) + 0.05) / (min(ground, letters) + 0.05) >= 4.5


# ---- the door ----


@pytest.mark.parametrize("first", ["import toolkit.show.explore", "from toolkit.show.timeline import timeline", "pass"])
def test_a_name_of_the_package_is_the_function_whatever_was_imported_first(first):
    code = f"{first}; from toolkit import show; assert callable(show.explore) and callable(show.timeline)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""


def test_an_unknown_name_is_refused_with_those_that_exist():
    with pytest.raises(AttributeError, match=r"no attribute 'timelin'; it has .*timeline"):
        show.timelin  # noqa: B018
