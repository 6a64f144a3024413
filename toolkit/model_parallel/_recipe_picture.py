"""What a configuration does with a step and with its memory, as two bars.

Chapter: model_parallel/frontier_recipe.
"""

from toolkit.show.ink import INK
from toolkit.show.picture import bar, drawn, label

from ._recipe_memory import CAPACITY, RESERVE

WIDTH, HEIGHT, LEFT, RIGHT = 640, 160, 70, 630  # px
TIMES = {
    "compute": (INK.blue, "compute"),
    "tensor": (INK.orange, "tensor sums"),
    "messages": (INK.sky, "messages"),
    "bubble": (INK.grey, "bubble"),
    "data": (INK.purple, "replicas, Adam"),
}
BYTES = {
    "states": (INK.green, "states"),
    "activations": (INK.sky, "activations"),
    "working": (INK.orange, "layer at work"),
}


def draw(config, found, longest, most):
    """Picture of a Step, or of a ShapeError.

    longest  seconds at the right end of the axis       most  bytes at its right end
    """
    if isinstance(found, Exception):
        why = str(found)
        words = f"t = {config.t}, p = {config.p}, b = {config.b}: cannot run. {why}."
        return drawn(WIDTH, HEIGHT, [label(4, 24, "cannot run", "b"), *_lines(why, 46)], "step and memory", words)
    body = [label(4, 24, "step", "b"), label(4, 116, "memory", "b")]
    if found.failure:
        body += [f'<path fill="{INK.grey}" opacity=".35" d="{bar(LEFT, 10, RIGHT - LEFT, 22)}"/>']
        body += [label(LEFT + 8, 25, "does not fit", "b"), *_lines(found.failure, 50)]
        said = f"does not fit, {found.failure}"
    else:
        times = {name: getattr(found, name) for name in TIMES}
        times["data"] += found.optimiser
        body += _stacked(
            times, TIMES, longest, 10, lambda seconds: f"{seconds:.0f} s" if seconds > 9.95 else f"{seconds:.1f} s"
        )
        rate = f"{found.rate / 1e12:.1f} TFLOP/s a GCD, {found.tokens_per_second / 1e3:.1f} k tokens/s"
        body.append(label(LEFT, 74, f"{found.seconds:.1f} s: {rate}", "b"))
        said = f"a step takes {found.seconds:.1f} s, " + ", ".join(
            f"{TIMES[name][1]} {seconds:.1f} s" for name, seconds in times.items()
        )
        said += f"; {rate}"
    held = {name: getattr(found.memory, name) for name in BYTES}
    body += _stacked(held, BYTES, most, 102, lambda nbytes: f"{nbytes / 1e9:.1f} GB")
    usable = f"{(CAPACITY - RESERVE) / 1e9:.0f} GB to use"
    at = LEFT + (RIGHT - LEFT) * (CAPACITY - RESERVE) / most
    body.append(f'<path class="k" d="M{at:.1f} 96v34"/>')
    body.append(label(at + 4, 98, usable, "m"))
    words = f"t = {config.t}, p = {config.p}, d = {config.d}, b = {config.b}, m = {config.m}: {said}. "
    words += ", ".join(f"{BYTES[name][1]} {nbytes / 1e9:.1f} GB" for name, nbytes in held.items())
    return drawn(WIDTH, HEIGHT, body, "step and memory", f"{words} of {usable}.")


def _stacked(parts, looks, longest, y, said):
    """A bar of parts, its legend below; what lies beyond the axis is cut off."""
    x, at = LEFT, LEFT
    for name, value in parts.items():
        width = min(max((RIGHT - LEFT) * value / longest, 0.0), RIGHT - x)
        if width > 0.2:
            yield f'<path fill="{looks[name][0]}" d="{bar(x, y, width, 22)}"/>'
        x += width
    for name, value in parts.items():
        colour, words = looks[name]
        text = f"{words} {said(value)}"
        yield f'<path fill="{colour}" d="{bar(at, y + 32, 10, 10)}"/>'
        yield label(at + 14, y + 41, text, "m")
        at += 22 + 6.2 * len(text)


def _lines(text, y, columns=84):
    """Text in lines."""
    line = ""
    for word in text.split():
        if len(line) + len(word) >= columns:
            yield label(LEFT, y, line, "m")
            line, y = "", y + 16
        line += word + " "
    yield label(LEFT, y, line, "m")
