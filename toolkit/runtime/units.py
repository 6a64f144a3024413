"""Seconds and bytes as people read them. Inside the toolkit: seconds, bytes, bytes per second, always."""


def seconds(value):
    """`4.12e-05` -> `'41.2 µs'`: three significant digits, the unit chosen by size."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(value) >= scale * 0.9995:
            return f"{value / scale:.3g} {unit}" if abs(value / scale) < 999.5 else f"{value / scale:,.0f} {unit}"
    return "0 s" if value == 0 else f"{value / 1e-9:.3g} ns"


def size(value):
    """`98304000` -> `'98.3 MB'`: decimal units, as link speeds are quoted."""
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= scale * 0.9995:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"
