"""The picture of a machine: every link in both directions, thick by its load."""

import re
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


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_each_node_is_drawn_inside_the_picture(machine):
    svg = ElementTree.fromstring(picture(machine).svg)
    width, height = float(svg.get("width")), float(svg.get("height"))
    names = {t.text: (float(t.get("x")), float(t.get("y"))) for t in svg.iter("text") if t.get("class") == "v"}
    assert set(names) == {str(node) for node in machine.graph}
    assert all(10 < x < width - 10 and 10 < y < height - 10 for x, y in names.values())


def test_no_two_nodes_lie_on_the_same_place():
    texts = ElementTree.fromstring(picture(MACHINES[5]).svg).iter("text")
    places = [(t.get("x"), t.get("y")) for t in texts if t.get("class") == "v"]
    assert len(set(places)) == len(places) == 7


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
