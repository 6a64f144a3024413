"""Explorer: draw every state of a picture once; let the browser switch between them.

A published page has no kernel, so nothing can be computed when a reader drags a slider. `explore` therefore
calls the picture for every combination of its axes while the book is built, puts the results into nested
`ipywidgets.Stack`s and links each Stack's `selected_index` to a control in the browser itself. With a live
kernel the same call also draws values between the grid's. Chapter: all of them.
"""

import html
import json

import ipywidgets as widgets
import numpy as np

from .picture import from_figure

MAX_STATES = 60  # what one page should hold, so that it loads at once
MAX_BYTES = 2_000_000


class ExplorerTooLarge(ValueError):
    """The states of an explorer are too many, or together too heavy, for one page."""


class Explorer(widgets.VBox):
    """What `explore` returns: the controls above the states.

    controls  dict: axis name -> the widget whose `index` says which value is chosen
    labels    dict: axis name -> list of str, what the control shows
    """


def explore(render, *, play=None, start=None, linked_to=None, **axes):
    """Show `render` over a grid of values that a reader walks by mouse or keyboard, with or without a kernel.

        explore(picture, devices=[2, 4, 8], tokens=[4096, 16384], link={"NVLink": NVLINK4, "PCIe": PCIE5})

    render     called as render(devices=…, tokens=…, link=…), once per combination. Returns something with
               `.svg` (or `_repr_html_`) and `.words`, or a pair (picture, words); the picture of a pair may
               be SVG text or a matplotlib Figure. `words` is the text alternative, from the same numbers.
    axes       lists of values, or dicts label -> value; two values or more. Numbers make a slider, up to four
               words make radio buttons.
    play       name of one axis that gets a play button
    start      dict: axis name -> the value (of a dict axis: the label) shown first; without it, the first one
    linked_to  another explorer: axes of the same name and labels move together
    returns    Explorer
    raises     ExplorerTooLarge   over 60 states, or over 2 MB of pictures; says which axis to thin
               ValueError         an axis with fewer than two values, with equal labels, or unknown
               TypeError          render returned no picture, or a picture without words
    """
    start = start or {}
    axes = {name: _labelled(name, values) for name, values in axes.items()}
    _check(axes, play, start)
    labels = {name: list(values) for name, values in axes.items()}
    controls = {name: _control(name, labels[name], _first(name, labels[name], start)) for name in axes}
    if linked_to is not None:
        _link(controls, labels, linked_to)
    states = _draw(render, axes)

    panel = widgets.Box([_with_play(c) if name == play else c for name, c in controls.items()])
    panel.layout.flex_flow = "row wrap"
    shown = widgets.VBox([_stacked(states, list(controls.values()))])
    explorer = Explorer([panel, shown, *_between(render, axes, controls)])
    for box, name in ((panel, "explore-controls"), (shown, "explore-states"), (explorer, "explore")):
        box.add_class(name)  # the book's style sheet and its script for screen readers look for these
    explorer.controls, explorer.labels = controls, labels
    return explorer


def _labelled(name, values):
    """Turn an axis into a dict label -> value, refusing what a reader could not choose from."""
    labels = [str(label) for label in values] if isinstance(values, dict) else [_label(v) for v in values]
    values = list(values.values()) if isinstance(values, dict) else list(values)
    if len(values) < 2:
        raise ValueError(
            f"explore: axis {name!r} has {len(values)} value(s), so there is nothing to choose; "
            "give two or more, or fix the value inside render."
        )
    if len(set(labels)) < len(labels):
        raise ValueError(
            f"explore: axis {name!r} shows two values under one label: {', '.join(labels)}; "
            "give a dict label -> value with different labels."
        )
    return dict(zip(labels, values, strict=True))


def _label(value):
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, (float, np.floating)):
        return f"{value:g}"
    return str(getattr(value, "name", value))


def _check(axes, play, start):
    names = ", ".join(axes)
    if not axes:
        raise ValueError("explore: no axis given; pass at least one, such as devices=[2, 4, 8].")
    if play is not None and play not in axes:
        raise ValueError(f"explore: play={play!r} is not an axis; the axes are {names}.")
    if unknown := sorted(set(start) - set(axes)):
        raise ValueError(f"explore: start names {', '.join(unknown)}; the axes are {names}.")
    sizes = {name: len(values) for name, values in axes.items()}
    total = int(np.prod(list(sizes.values())))
    if total > MAX_STATES:
        longest = max(sizes, key=sizes.get)
        room = MAX_STATES // (total // sizes[longest])
        raise ExplorerTooLarge(
            f"explore: {' × '.join(f'{n} {name}' for name, n in sizes.items())} = {total} states; "
            f"a page holds {MAX_STATES}. The longest axis is {longest!r}: "
            + (f"keep {room} of its values." if room > 1 else "thin it, and another one too.")
        )


def _first(name, labels, start):
    """Index of the value that is shown first."""
    if name not in start:
        return 0
    if (wanted := _label(start[name])) not in labels:
        raise ValueError(f"explore: start {name}={start[name]!r} is not among {', '.join(labels)}.")
    return labels.index(wanted)


def _draw(render, axes):
    """Call render once per combination.

    returns  object array, one dimension per axis, of HTML widgets; equal states share one widget
    """
    cells = np.empty([len(values) for values in axes.values()], dtype=object)
    style = widgets.widget_string.HTMLStyle()
    shared = {"layout": widgets.Layout(width="100%"), "style": style}  # two models, not two a state
    drawn, size = {}, 0
    for place in np.ndindex(cells.shape):
        chosen = {name: list(axes[name].values())[i] for name, i in zip(axes, place, strict=True)}
        state = _state(render(**chosen), chosen)
        if state not in drawn:
            drawn[state] = widgets.HTML(state, **shared)
            size += len(json.dumps(state))
        if size > MAX_BYTES:
            longest, count = max(((name, len(values)) for name, values in axes.items()), key=lambda axis: axis[1])
            raise ExplorerTooLarge(
                f"explore: {len(drawn)} of {cells.size} states already take {size / 1e6:.1f} MB; a page holds "
                f"{MAX_BYTES / 1e6:.1f} MB. Keep fewer of the {count} values of {longest!r}, or draw fewer shapes: "
                f"a state takes {size / len(drawn) / 1e3:.0f} kB."
            )
        cells[place] = drawn[state]
    return cells


def _state(picture, chosen):
    """HTML of one state: the picture, and its words for a reader who does not see it."""
    call = f"render({', '.join(f'{name}={_label(value)}' for name, value in chosen.items())})"
    picture, words = picture if isinstance(picture, tuple) else (picture, getattr(picture, "words", None))
    if not isinstance(words, str) or not words.strip():
        raise TypeError(
            f"explore: {call} returned {type(picture).__name__} without words; return (picture, words), "
            "where words say what the picture shows, with the numbers."
        )
    if hasattr(picture, "savefig"):
        picture = from_figure(picture, words)
    if isinstance(picture, str) or hasattr(picture, "svg"):
        role, body = "img", getattr(picture, "svg", picture)
    elif hasattr(picture, "_repr_html_"):  # a table, say: no image, so that its cells can be read one by one
        role, body = "group", picture._repr_html_()
    else:
        raise TypeError(
            f"explore: {call} returned {type(picture).__name__}, which is no picture; return SVG text, "
            "something with .svg or _repr_html_, or a matplotlib Figure."
        )
    return f'<div class="explore-state" role="{role}" aria-label="{html.escape(words)}">{body}</div>'


def _control(name, labels, index):
    """Radio buttons for up to four words, a slider for numbers and for more."""
    words = len(labels) <= 4 and not any(label[:1].isdigit() or label[:1] in "+-−." for label in labels)
    common = {
        "options": labels,
        "index": index,
        "description": name.replace("_", " "),
        "style": {"description_width": "initial"},
        "layout": widgets.Layout(width="auto", flex="1 1 16rem", max_width="26rem"),
    }
    control = widgets.RadioButtons(orientation="horizontal", **common) if words else widgets.SelectionSlider(**common)
    control.add_class("widget-inline-hbox")  # name and choices on one line
    return control


def _with_play(control):
    """A play button in front of its slider; both live in the browser, so it plays without a kernel."""
    play = widgets.Play(min=0, max=len(control.options) - 1, value=control.index, interval=900)
    widgets.jslink((play, "value"), (control, "index"))
    return widgets.HBox([play, control], layout=widgets.Layout(flex="1 1 24rem", max_width="34rem"))


def _stacked(cells, controls):
    """Nest Stacks, first axis outermost, each following its control in the browser."""
    if not controls:
        return cells
    first, *rest = controls
    stack = widgets.Stack([_stacked(cell, rest) for cell in cells], selected_index=first.index)
    stack.layout.width = "100%"
    widgets.jslink((first, "index"), (stack, "selected_index"))
    return stack


def _link(controls, labels, other):
    """Make axes of the same name move together; what the other explorer shows stands."""
    shared = [name for name in controls if name in other.controls]
    if not shared:
        raise ValueError(
            f"explore: no axis in common to link: here {', '.join(controls)}, there {', '.join(other.controls)}."
        )
    for name in shared:
        if labels[name] != other.labels[name]:
            raise ValueError(
                f"explore: linked axis {name!r} needs equal values: here {', '.join(labels[name])}, "
                f"there {', '.join(other.labels[name])}."
            )
        controls[name].index = other.controls[name].index
        widgets.jslink((other.controls[name], "index"), (controls[name], "index"))


def _between(render, axes, controls):
    """Number fields that draw a state outside the grid. Without a kernel the book's style sheet hides them.

    returns  list: one box, or nothing where no axis is numeric
    """
    values = {name: list(axis.values()) for name, axis in axes.items()}
    fields = {name: _field(name, values[name], controls[name].index) for name in axes if _numeric(values[name])}
    if not fields:
        return []
    button, drawn = widgets.Button(description="Draw"), widgets.HTML()

    def draw(_):
        chosen = {name: values[name][controls[name].index] for name in axes}
        chosen |= {name: field.value for name, field in fields.items()}
        try:
            drawn.value = _state(render(**chosen), chosen)
        except Exception as error:  # whatever it is, the reader should see it
            drawn.value = f'<pre role="alert">{type(error).__name__}: {html.escape(str(error))}</pre>'

    button.on_click(draw)
    panel = widgets.Box([widgets.Label("Any other value:"), *fields.values(), button])
    panel.layout.flex_flow = "row wrap"
    box = widgets.VBox([panel, drawn])
    box.add_class("needs-kernel")
    return [box]


def _numeric(values):
    return all(isinstance(v, (int, float, np.number)) and not isinstance(v, bool) for v in values)


def _field(name, values, index):
    """A number field that holds values[index]; whole numbers only, if the axis has no others."""
    whole = all(isinstance(v, (int, np.integer)) for v in values)
    kind, number = (widgets.IntText, int) if whole else (widgets.FloatText, float)
    style, layout = {"description_width": "initial"}, widgets.Layout(width="12rem")
    return kind(value=number(values[index]), description=name.replace("_", " "), style=style, layout=layout)
