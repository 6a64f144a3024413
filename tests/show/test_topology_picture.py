"""The picture of a machine: every link in both directions, thick by its load."""

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from toolkit.runtime import hardware, topology
from toolkit.show.topology import picture

LINK = hardware.Link(25e9, 2e-6)
MACHINES = [
    topology.full_mesh(4, LINK),
    topology.ring(5, LINK),
    topology.switch(4, LINK),
    topology.pcie_tree(2, 2, LINK),
    topology.two_level(2, 2, LINK, LINK),
    topology.two_level(2, 2, LINK, LINK, inside="switch"),
    topology.torus((3, 4), LINK),
    topology.torus((2, 3, 4), LINK),
    topology.leaf_spine(3, 3, 2, LINK),
    topology.fat_tree(4, LINK),
    topology.dragonfly(5, 4, 2, LINK),
    topology.rail_optimised(4, 4, spines=2),
    topology.frontier(2),
    topology.nvl72(),
    topology.with_memory(topology.ring(6, LINK), LINK, LINK),
    topology.joined([topology.switch(3, LINK), topology.pcie_tree(2, 2, LINK)], LINK),
]


def hints(drawing):
    """Hover text of each link."""
    paths = ElementTree.fromstring(drawing.svg).iter("path")
    return [p.find("title").text for p in paths if p.find("title") is not None]


def width_of(drawing, name):
    return float(re.search(rf'stroke-width="([\d.]+)"[^<]*><title>{name}:', drawing.svg)[1])


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_each_direction_of_each_link_is_drawn_once(machine):
    drawn = sorted(hint.split(":")[0] for hint in hints(picture(machine)))
    assert drawn == sorted(f"{u} → {v}" for u, v in machine.graph.edges)


def nodes(drawing):
    """{name: (x, y, half of the width)} of every disc and box: the name is the text after it or, on hovering, in it."""
    found, shape = {}, None
    for element in ElementTree.fromstring(drawing.svg):
        title = element.find("title")
        if element.tag == "circle":
            shape = float(element.get("cx")), float(element.get("cy")), float(element.get("r"))
        elif element.tag == "rect":
            half = float(element.get("width")) / 2
            shape = float(element.get("x")) + half, float(element.get("y")) + 12, half
        elif not (element.tag == "text" and element.get("class") == "v" and shape):
            continue
        if title is not None:
            found[title.text], shape = shape, None
        elif element.tag == "text":
            found[element.text], shape = shape, None
    return found


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_each_node_is_drawn_inside_the_picture(machine):
    svg = ElementTree.fromstring(picture(machine).svg)
    width, height = float(svg.get("width")), float(svg.get("height"))
    found = nodes(picture(machine))
    assert set(found) >= {str(node) for node in machine.graph}
    assert all(half <= x <= width - half and 10 < y < height - 10 for x, y, half in found.values())


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_no_two_nodes_of_a_row_overlap(machine):
    rows = {}
    for x, y, half in nodes(picture(machine)).values():
        rows.setdefault(y, []).append((x, half))
    for row in map(sorted, rows.values()):
        assert all(right - left >= a + b - 0.2 for (left, a), (right, b) in pairwise(row))


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_every_arrow_stays_inside_the_picture(machine):
    svg = ElementTree.fromstring(picture(machine).svg)
    ends = [p.get("d") for p in svg.iter("path") if p.get("d").startswith("M") and "Q" in p.get("d")]
    middles = []
    for d in ends:
        x0, y0, cx, cy, x1, y1 = map(float, re.findall(r"-?[\d.]+", d))
        middles.append(((x0 + 2 * cx + x1) / 4, (y0 + 2 * cy + y1) / 4))
    assert all(0 < x < float(svg.get("width")) and 20 < y < float(svg.get("height")) for x, y in middles)


def test_a_torus_is_a_grid():
    found = nodes(picture(topology.torus((3, 4), LINK)))
    assert len({found[str(d)][1] for d in range(4)}) == len({found[str(d)][0] for d in (1, 5, 9)}) == 1
    assert found["0"][0] < found["1"][0] and found["0"][1] < found["4"][1]


def test_hosts_and_disks_lie_under_the_devices_and_switches_above():
    machine = topology.with_memory(topology.two_level(2, 2, LINK, LINK, inside="switch"), LINK, LINK)
    y = {name: place[1] for name, place in nodes(picture(machine)).items()}
    assert y["fabric"] < y["switch0"] < y["0"] == y["3"] < y["host0"] == y["host1"] < y["disk0"]


def test_where_devices_are_crowded_their_names_show_on_hovering():
    svg = picture(topology.nvl72()).svg
    assert "<title>71</title>" in svg and ">71</text>" not in svg
    assert ">39</text>" in picture(topology.dragonfly(5, 4, 2, LINK)).svg


def test_a_crowded_row_of_switches_is_named_by_numbers_and_on_hovering_in_full():
    svg = picture(topology.dragonfly(5, 4, 2, LINK)).svg
    assert "<title>router4.3</title>" in svg and ">4.3</text>" in svg


def test_without_loads_the_faster_link_is_thicker():
    drawing = picture(topology.frontier())
    assert width_of(drawing, "0 → 1") > width_of(drawing, "0 → 6") > width_of(drawing, "0 → 2")


def test_a_tree_has_its_root_on_top_and_devices_below():
    texts = ElementTree.fromstring(picture(MACHINES[3]).svg).iter("text")
    y = {t.text: float(t.get("y")) for t in texts if t.get("class") == "v"}
    assert y["root"] < y["pcie0"] == y["pcie1"] < y["0"] == y["3"]


def test_the_heavier_link_is_thicker():
    drawing = picture(MACHINES[0], {(0, 1): 1000, (1, 2): 500})
    assert width_of(drawing, "0 → 1") > width_of(drawing, "1 → 2")


def test_the_two_directions_of_a_link_have_loads_of_their_own():
    assert {"0 → 1: 1 kB over 25 GB/s", "1 → 0: 0 B over 25 GB/s"} <= set(hints(picture(MACHINES[0], {(0, 1): 1000})))


def test_a_link_without_bytes_is_dashed():
    assert re.search(r'stroke-dasharray="2 3"[^<]*><title>1 → 0:', picture(MACHINES[0], {(0, 1): 1000}).svg)


def test_the_words_name_the_busiest_link():
    words = picture(MACHINES[0], {(0, 1): 1000, (1, 2): 500}).words
    assert words == (
        "full mesh of 4: 4 devices, 12 directed links; 2 carry bytes, the busiest 1 kB (0 → 1), the lightest 500 B."
    )


def test_without_loads_the_words_give_the_speed():
    assert picture(MACHINES[0]).words == "full mesh of 4: 4 devices, 12 directed links of 25 GB/s."


def test_a_run_without_messages_is_drawn():
    assert picture(MACHINES[0], {}).words.endswith("none carries bytes.")


def test_a_shared_medium_is_said():
    shared = topology.pcie_tree(1, 2, hardware.Link(16e9, duplex=False))
    assert "0 → pcie0: 16 GB/s, shared by both directions" in hints(picture(shared))


def test_loads_of_another_machine_are_refused():
    with pytest.raises(ValueError, match=r"ring of 5 has no link \(0, 2\)"):
        picture(MACHINES[1], {(0, 2): 8})


def test_what_a_run_moved_is_what_is_drawn(ring_run):
    run = ring_run(4)
    loaded = [hint for hint in hints(picture(run.cluster.topology, run.traffic.by_link)) if ": 0 B" not in hint]
    assert sorted(hint.split(":")[0] for hint in loaded) == ["0 → 1", "1 → 2", "2 → 3", "3 → 0"]


def test_switches_over_the_same_devices_stand_side_by_side():
    machine = topology.switch(4, LINK)
    for device in range(4):
        machine.graph.add_edge(device, "second", link=LINK)
        machine.graph.add_edge("second", device, link=LINK)
    texts = ElementTree.fromstring(picture(machine).svg).iter("text")
    places = {t.text: (t.get("x"), t.get("y")) for t in texts if t.get("class") == "v"}
    assert places["second"][1] == places["switch"][1] and places["second"][0] != places["switch"][0]
