"""House colours and style: safe for colour-blind readers, legible on light and on dark pages.

Colours are those of Okabe and Ito 2008. In a picture colour is never the only sign: see the marker cycle of
`house.mplstyle`, the heights of a timeline's bars, the numbers in a grid's cells. Letters and axes take the page's own
colour (`currentColor`), and every fill may be changed by the page through a CSS variable, `--ink-compute` for example.
"""

from pathlib import Path
from types import SimpleNamespace

INK = SimpleNamespace(
    blue="#0072B2",
    orange="#E69F00",
    sky="#56B4E9",
    green="#009E73",
    vermillion="#D55E00",
    purple="#CC79A7",
    grey="#888888",
)
INK.compute, INK.send, INK.recv, INK.idle, INK.critical = INK.blue, INK.orange, INK.sky, INK.grey, INK.vermillion

# One constant text for all pictures: several on a page repeat the same rules, so none can change another.
CSS = (
    ".tk{font:12px system-ui,sans-serif;fill:currentColor}"
    ".tk .c,.tk .s,.tk .r,.tk .w,.tk .o{fill:none;stroke-width:6}"
    f".tk .c{{stroke:var(--ink-compute,{INK.compute})}}"
    f".tk .s{{stroke:var(--ink-send,{INK.send})}}"
    f".tk .r{{stroke:var(--ink-recv,{INK.recv})}}"
    ".tk .w{stroke:currentColor;stroke-opacity:.6;stroke-dasharray:1 2}"
    ".tk .o{stroke:currentColor;stroke-opacity:.55}"
    f".tk .k{{fill:none;stroke:var(--ink-critical,{INK.critical});stroke-width:1.8}}"
    f".tk .l{{fill:none;stroke:var(--ink-load,{INK.critical})}}"
    ".tk .g{fill:none;stroke:currentColor;stroke-opacity:.18}"
    ".tk .a{fill:none;stroke:currentColor;stroke-opacity:.6}"
    ".tk .b{font-weight:600}"
    ".tk .m{font-size:11px;opacity:.8}"
    ".tk .e{text-anchor:end}.tk .n{text-anchor:middle}"
    ".tk .v{fill:#fff;text-anchor:middle;font-size:10px;pointer-events:none}"
)

_CIVIDIS = ("#00224E", "#2A3F6D", "#575D6D", "#7D7C78", "#A59C74", "#D2C060", "#FEE838")  # Nuñez et al. 2018, 7 points


def ramp(fraction):
    """Colour of a value between 0 (dark) and 1 (light): equal steps look equal, also to colour-blind readers.

    fraction  float, clipped to 0 … 1
    returns   str "#rrggbb"
    """
    place = min(max(fraction, 0.0), 1.0) * (len(_CIVIDIS) - 1)
    low = min(int(place), len(_CIVIDIS) - 2)
    pair = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in _CIVIDIS[low : low + 2]]
    return "#" + "".join(f"{round(a + (b - a) * (place - low)):02X}" for a, b in zip(*pair, strict=True))


def readable_on(colour):
    """Black or white, whichever contrasts more with "#rrggbb" (relative luminance of WCAG 2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return "#000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "#fff"


def use():
    """Give matplotlib the house style, for this process."""
    import matplotlib.style

    matplotlib.style.use(Path(__file__).with_name("house.mplstyle"))
