"""Time axes: one scale for every run of a picture, in the unit a person would choose."""

from math import floor, log10

from .picture import label, number

_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


def unit(longest):
    """(seconds a unit, its name) for an axis that ends at `longest` seconds: the largest unit not above it."""
    return next(((scale, name) for scale, name in _UNITS if longest >= scale), (1e-9, "ns"))


def ticks(end, about=8):
    """Round numbers 0, 1·s, 2·s, … up to `end`, with s from 1, 2, 5 × 10ⁿ and about `about` of them."""
    if end <= 0:
        return [0.0]
    rough = end / about
    power = 10.0 ** floor(log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    return [i * step for i in range(floor(end / step * (1 + 1e-9)) + 1)]


class TimeAxis:
    """Seconds to x coordinates, linear from 0 at `left` to `longest` at `right`."""

    def __init__(self, longest, left, right):
        self.longest, self.left, self.right = longest, left, right
        self.scale, self.name = unit(longest)

    def x(self, seconds):
        """Where an instant lies."""
        return self.left + (self.right - self.left) * seconds / (self.longest or 1.0)

    def lines(self, top, bottom):
        """Grid lines from top to bottom, numbers and the unit below (takes 32 px). A list of SVG elements."""
        marks = [(self.x(value * self.scale), value) for value in ticks(self.longest / self.scale)]
        body = [f'<path class="g" d="{"".join(f"M{number(x)} {number(top)}V{number(bottom)}" for x, _ in marks)}"/>']
        body += [label(x, bottom + 13, f"{value:.10g}", "m n") for x, value in marks]
        return [*body, label((self.left + self.right) / 2, bottom + 28, f"time ({self.name})", "m n")]
