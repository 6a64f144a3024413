"""The roofline: for each kernel, whether the device's arithmetic or its memory is what bounds it.

Source: Williams, Waterman and Patterson 2009.
"""

from html import escape
from math import ceil, floor, isfinite, log10

from .ink import INK
from .picture import drawn, label, number

LEFT, RIGHT, TOP, BOTTOM = 76, 700, 52, 310  # px
_PREFIX = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))


def roofline(device, kernels, dtype="float16"):
    """Draw the device's roof and the kernels under it, both axes logarithmic.

    device   hardware.Device with finite flops and memory bandwidth
    kernels  a run, whose kernels are summed by name; or a list of (name, flops, bytes) or
             (name, flops, bytes, seconds). Without seconds a kernel sits on the roof.
    dtype    whose rate is the flat roof
    returns  Picture
    raises   ValueError  a device without limits; a kernel without flops or bytes, or none at all
    """
    peak, memory = device.rate(dtype), device.memory_bandwidth * device.memory_efficiency
    if not (isfinite(peak) and isfinite(memory)):
        raise ValueError(f"roofline: device {device.name!r} has no limits to draw; take one with finite rates.")
    points = [_point(row, peak, memory) for row in (_kernels_of(kernels) if hasattr(kernels, "trace") else kernels)]
    if not points:
        raise ValueError("roofline: no kernels to draw; give (name, flops, bytes) rows, or a run with some.")
    ridge = peak / memory
    x = _log_axis([ridge / 8, ridge * 8, *(p[1] for p in points)], LEFT, RIGHT)
    y = _log_axis([peak, x.low * memory, *(p[2] for p in points)], BOTTOM, TOP)
    roof = f"M{LEFT} {number(y(x.low * memory))}L{number(x(ridge))} {number(y(peak))}H{RIGHT}"
    body = [
        label(4, 16, f"{device.name}, {dtype}: {_si(ridge)}flop a byte fill both", "b"),
        *_grid(x, y),
        f'<path class="k" stroke-linejoin="round" d="{roof}"/>',
        label(x(ridge), y(peak) - 7, f"{_si(peak)}flop/s", "m"),
        label((LEFT + x(ridge)) / 2 - 12, y((x.low * ridge) ** 0.5 * memory) - 4, f"{_si(memory)}B/s", "m e"),
    ]
    for name, intensity, rate, bound in points:
        hint = f"<title>{escape(name)}: {_si(intensity)}flop a byte, {_si(rate)}flop/s, {bound}-bound</title>"
        sign = "M-5 4L0-5L5 4z" if bound == "memory" else "M-4-4h8v8h-8z"
        place = f'transform="translate({number(x(intensity))} {number(y(rate))})"'
        body.append(f'<path fill="{INK.blue}" stroke="currentColor" {place} d="{sign}">{hint}</path>')
        right = x(intensity) < (LEFT + RIGHT) / 2
        body.append(label(x(intensity) + (9 if right else -9), y(rate) + 16, name, "m" if right else "m e"))
    said = "; ".join(f"{name} {_si(i)}flop a byte, {_si(r)}flop/s, {bound}-bound" for name, i, r, bound in points)
    meet = f"{_si(peak)}flop/s and {_si(memory)}B/s meet at {_si(ridge)}flop a byte"
    words = f"Roofline of {device.name}, {dtype}: {meet}. {said}."
    return drawn(720, BOTTOM + 44, body, f"Roofline of {device.name}", words)


def _kernels_of(run):
    """(name, flops, bytes, seconds) of each kernel that computes, summed over all ranks, longest first."""
    total = {}
    for e in run.trace:
        if e.kind == "compute":
            flops, nbytes, time = total.get(e.name, (0, 0, 0))
            total[e.name] = flops + e.flops, nbytes + e.bytes, time + e.end - e.start
    rows = [(name, *row) for name, row in total.items() if row[0] and row[1]]
    return sorted(rows, key=lambda row: (-row[3], row[0]))


def _point(row, peak, memory):
    """(name, flops per byte, flops per second, what bounds it)."""
    name, flops, nbytes, *seconds = row
    if not (flops > 0 and nbytes > 0):
        raise ValueError(f"roofline: kernel {name!r} has {flops} flops and {nbytes} bytes; both must be above 0.")
    attainable = min(peak, flops / nbytes * memory)
    rate = flops / seconds[0] if seconds and seconds[0] > 0 else attainable
    return name, flops / nbytes, rate, "memory" if flops / nbytes < peak / memory else "compute"


class _log_axis:
    """Value to coordinate, whole decades around the values."""

    def __init__(self, values, start, end):
        self.first, self.last = floor(log10(min(values))), ceil(log10(max(values)))
        self.last = max(self.last, self.first + 1)
        self.low, self.start, self.end = 10.0**self.first, start, end

    def __call__(self, value):
        return self.start + (self.end - self.start) * (log10(value) - self.first) / (self.last - self.first)

    def decades(self):
        return [10.0**k for k in range(self.first, self.last + 1)]


def _grid(x, y):
    """Decade lines, their numbers, and the axes' names with units."""
    lines = "".join(f"M{number(x(v))} {TOP}V{BOTTOM}" for v in x.decades())
    lines += "".join(f"M{LEFT} {number(y(v))}H{RIGHT}" for v in y.decades())
    body = [f'<path class="g" d="{lines}"/>']
    body += [label(x(v), BOTTOM + 15, f"{v:g}", "m n") for v in x.decades()]
    body += [label(LEFT - 6, y(v) + 4, _si(v), "m e") for v in y.decades()]
    body.append(label((LEFT + RIGHT) / 2, BOTTOM + 34, "intensity (flop per byte)", "m n"))
    return [*body, label(LEFT, TOP - 12, "rate (flop/s)", "m e")]


def _si(value):
    """3.12e14 -> '312 T': three digits and a prefix, with the space before the unit."""
    scale, prefix = next(((s, p) for s, p in _PREFIX if value >= s), (1, ""))
    return f"{value / scale:.3g} {prefix}"
