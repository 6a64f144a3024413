"""Explorer: every state is drawn once, and the browser alone can reach each of them."""

import itertools
import json

import ipywidgets as widgets
import matplotlib.pyplot as plt
import pytest

from toolkit.show import ExplorerTooLarge, explore

AXES = {"devices": [2, 4, 8], "tokens": [4096, 16384], "link": {"NVLink": 450e9, "PCIe": 64e9}}


def picture(**state):
    return f"<svg><text>{sorted(state.items())}</text></svg>", f"The state {sorted(state.items())}"


def models():
    """What a page stores: dict "IPY_MODEL_<id>" -> {model_name, state} of every widget alive."""
    state = widgets.Widget.get_manager_state()["state"]
    return {f"IPY_MODEL_{key}": model for key, model in state.items()}


def links():
    """[(source, target)] of every link that lives in the browser; both are [model, trait]."""
    stored = [model["state"] for model in models().values() if model["model_name"] == "LinkModel"]
    return [(state["source"], state["target"]) for state in stored]


def name(widget):
    return f"IPY_MODEL_{widget.model_id}"


def shown(explorer, **moves):
    """HTML that a browser shows after the controls were moved: follow the stored links, no Python of ours."""
    for axis, index in moves.items():
        explorer.controls[axis].index = index
    page, wires = models(), links()
    place = name(explorer.children[1].children[0])
    while page[place]["model_name"] == "StackModel":
        ((control, trait),) = (source for source, target in wires if target == [place, "selected_index"])
        place = page[place]["state"]["children"][page[control]["state"][trait]]
    return page[place]["state"]["value"]


@pytest.fixture
def only_new_widgets():
    """Forget the widgets of earlier tests, so that `models` has those of this one."""
    widgets.Widget.close_all()


@pytest.mark.usefixtures("only_new_widgets")
@pytest.mark.parametrize("place", list(itertools.product(range(3), range(2), range(2))))
def test_moving_the_controls_shows_the_state_of_their_values(place):
    explorer = explore(picture, **AXES)
    devices, tokens, link = (list(a.values()) if isinstance(a, dict) else a for a in AXES.values())
    state = picture(devices=devices[place[0]], tokens=tokens[place[1]], link=link[place[2]])[0]
    assert state in shown(explorer, devices=place[0], tokens=place[1], link=place[2])


def test_every_combination_is_rendered_exactly_once():
    calls = []
    explore(lambda **state: calls.append(state) or picture(**state), **AXES)
    assert [tuple(c.values()) for c in calls] == list(itertools.product([2, 4, 8], [4096, 16384], [450e9, 64e9]))


def test_equal_states_share_one_widget():
    stack = explore(lambda devices: ("<svg></svg>", "Always the same"), devices=[2, 4, 8]).children[1].children[0]
    assert len(set(stack.children)) == 1


def test_words_become_the_text_alternative_with_quotes_escaped():
    explorer = explore(lambda n: ("<svg></svg>", f'the "{n}" < 3'), n=[1, 2])
    assert 'role="img" aria-label="the &quot;1&quot; &lt; 3"' in shown(explorer)


def test_a_matplotlib_figure_becomes_svg_and_is_closed():
    def plot(n):
        figure, ax = plt.subplots()
        ax.plot([0, n])
        return figure, f"A line up to {n}"

    explorer = explore(plot, n=[1, 2])
    assert ("<svg" in shown(explorer), plt.get_fignums()) == (True, [])


def test_a_table_stays_readable_cell_by_cell():
    class Table:
        words = "Two numbers"

        def _repr_html_(self):
            return "<table></table>"

    assert 'role="group"' in shown(explore(lambda n: Table(), n=[1, 2]))


def test_start_takes_a_value_of_a_list_and_a_label_of_a_dict():
    explorer = explore(picture, start={"devices": 8, "link": "PCIe"}, **AXES)
    assert picture(devices=8, tokens=4096, link=64e9)[0] in shown(explorer)


def test_numbers_get_a_slider_and_words_radio_buttons():
    controls = explore(picture, **AXES).controls
    assert [type(c) for c in controls.values()] == [widgets.SelectionSlider] * 2 + [widgets.RadioButtons]


def test_a_control_is_named_after_its_axis():
    assert explore(picture, link_speed=[1, 2]).controls["link_speed"].description == "link speed"


@pytest.mark.usefixtures("only_new_widgets")
def test_play_moves_its_axis_in_the_browser():
    explorer = explore(picture, play="step", step=range(5))
    step = [name(explorer.controls["step"]), "index"]
    ((play, trait),) = (source for source, target in links() if target == step)
    play = models()[play]
    assert (play["model_name"], trait, play["state"]["max"]) == ("PlayModel", "value", 4)


@pytest.mark.usefixtures("only_new_widgets")
def test_linked_explorers_share_their_common_axis_only():
    first = explore(picture, devices=[2, 4, 8], tokens=[1, 2])
    second = explore(picture, linked_to=first, devices=[2, 4, 8], step=[0, 1])
    mine, theirs = ([name(control) for control in e.controls.values()] for e in (first, second))
    between = [(s, t) for s, t in links() if s[0] in mine and t[0] in theirs]
    assert between == [([mine[0], "index"], [theirs[0], "index"])]


def test_a_linked_explorer_starts_where_the_other_one_is():
    first = explore(picture, start={"devices": 4}, devices=[2, 4, 8])
    second = explore(picture, linked_to=first, devices=[2, 4, 8])
    assert picture(devices=4)[0] in shown(second)


def draw_between(explorer, **values):
    """Fill the number fields, press the button; returns the HTML of the answer."""
    panel, answer = explorer.children[2].children
    *fields, button = panel.children[1:]
    for field in fields:
        field.value = values[field.description]
    button.click()
    return answer.value


def test_a_kernel_draws_a_value_between():
    explorer = explore(picture, start={"link": "PCIe"}, devices=[2, 4], link={"NVLink": "n", "PCIe": "p"})
    assert picture(devices=3, link="p")[0] in draw_between(explorer, devices=3)


def test_an_error_between_is_shown_to_the_reader():
    def picky(devices):
        if devices % 2:
            raise ValueError(f"{devices} devices are odd")
        return picture(devices=devices)

    assert "ValueError: 3 devices are odd" in draw_between(explore(picky, devices=[2, 4]), devices=3)


def test_61_states_are_refused_before_anything_is_drawn():
    def never(**_):
        raise AssertionError("rendered")

    with pytest.raises(ExplorerTooLarge, match=r"31 tokens = 62 states.*holds 60.*'tokens': keep 30"):
        explore(never, devices=[2, 4], tokens=range(31))


def test_more_than_2_megabytes_are_refused_with_the_size_of_a_state():
    with pytest.raises(ExplorerTooLarge, match=r"3 of 4 states already take 2\.7 MB.*'n'.*a state takes 900 kB"):
        explore(lambda n: (f"<svg>{n}{'.' * 900_000}</svg>", "dots"), n=range(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no axis given"),
        ({"n": [1]}, "axis 'n' has 1 value"),
        ({"n": [1.00000001, 1.00000002]}, "axis 'n' shows two values under one label: 1, 1"),
        ({"n": [1, 2], "play": "m"}, "play='m' is not an axis; the axes are n"),
        ({"n": [1, 2], "start": {"m": 1}}, "start names m; the axes are n"),
        ({"n": [1, 2], "start": {"n": 3}}, "start n=3 is not among 1, 2"),
    ],
)
def test_a_wrong_axis_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        explore(picture, **options)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"m": [1, 2]}, "no axis in common to link: here m, there n"),
        ({"n": [1, 3]}, "'n' needs equal values"),
    ],
)
def test_explorers_that_cannot_be_linked_say_why(axes, message):
    other = explore(picture, n=[1, 2])
    with pytest.raises(ValueError, match=message):
        explore(picture, linked_to=other, **axes)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (("<svg></svg>", ""), r"render\(n=1\) returned str without words"),
        (object(), r"render\(n=1\) returned object without words"),
        ((7, "seven"), r"render\(n=1\) returned int, which is no picture"),
    ],
)
def test_a_render_that_draws_nothing_readable_is_refused(returned, message):
    with pytest.raises(TypeError, match=message):
        explore(lambda n: returned, n=[1, 2])


@pytest.mark.usefixtures("only_new_widgets")
def test_60_states_cost_less_than_2_kilobytes_each_beyond_their_pictures():
    explore(picture, a=range(10), b=range(6))
    page = models()
    pictures = [m["state"]["value"] for m in page.values() if "explore-state" in str(m["state"].get("value"))]
    assert len(pictures) == 60
    assert len(json.dumps(page)) - len(json.dumps(pictures)) < 120_000
