"""A picture: SVG text, and the same in words for a reader who does not see it."""

import io
import re
import zlib
from dataclasses import dataclass
from html import escape
from pathlib import Path

from .ink import CSS

READABLE = 520  # px: a narrower page scrolls sideways rather than shrinking the letters


@dataclass(frozen=True, repr=False)
class Picture:
    """What every drawing function returns; notebooks show it by themselves, `explore` takes it as it is.

    svg    one <svg> element, inline-safe: no ids that two pictures could share, no background, no font file
    words  what it shows, with the numbers
    """

    svg: str
    words: str

    def _repr_html_(self):
        return f'<div style="overflow-x:auto">{self.svg}</div>'

    def _repr_svg_(self):
        return self.svg

    def __repr__(self):
        return self.words

    def save(self, path):
        """Write a file of its own; shown as an image, it follows the reader's light or dark mode."""
        dark = "<style>@media (prefers-color-scheme:dark){svg{color:#ddd}}</style>"
        opening, rest = self.svg.split(">", 1)
        Path(path).write_text(f'{opening} xmlns="http://www.w3.org/2000/svg">{dark}{rest}\n', encoding="utf-8")


def drawn(width, height, body, title, words):
    """Picture from the inside of an <svg>.

    width, height  size in px, also the coordinates of `body`
    body           list of str
    """
    size = f'viewBox="0 0 {number(width)} {number(height)}" width="{number(width)}" height="{number(height)}"'
    look = f"max-width:100%;min-width:{min(number(width), READABLE)}px;height:auto"
    svg = (
        f'<svg class="tk" {size} style="{look}" role="img" aria-label="{escape(words)}"><title>{escape(title)}</title>'
        f"<desc>{escape(words)}</desc><style>{CSS}</style>{''.join(body)}</svg>"
    )
    return Picture(svg, words)


def from_figure(figure, words):
    """Picture of a matplotlib figure: letters stay text, black becomes the page's ink. Closes the figure.

    words  what the figure shows, with the numbers
    """
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "house"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", buffer.getvalue(), flags=re.S)
    text = re.sub(r"(\d\.\d\d)\d+", r"\1", text[text.index("<svg") :])  # a hundredth of a point is enough
    text = re.sub(r"\s*\n\s*", " ", text).replace("> <", "><").replace("#000000", "currentColor").strip()
    mark = f"f{zlib.crc32(text.encode()):x}-"  # equal pictures, equal ids: harmless twice
    for name in set(re.findall(r'\bid="([^"]+)"', text)):
        text = re.sub(rf'(id="|href="#|url\(#){re.escape(name)}(?=["\)])', rf"\g<1>{mark}{name}", text)
    look = f'style="max-width:100%;height:auto" role="img" aria-label="{escape(words)}" fill="currentColor"'
    text = re.sub(r' xmlns="[^"]*"', "", text, count=1)
    return Picture(text.replace("<svg ", f"<svg {look} ", 1), words)


def number(value):
    """Coordinate as short text: one decimal, none where it is whole."""
    rounded = round(value, 1)
    return int(rounded) if rounded == int(rounded) else rounded


def bar(x, y, width, height):
    """Path of a rectangle, the shortest way to write one."""
    x, y, width, height = map(number, (x, y, width, height))
    return f"M{x} {y}h{width}v{height}h{number(-width)}z"


def label(x, y, words, kind=""):
    """<text> at a point; `kind` takes the classes of `ink.CSS`: b bold, m muted, e right-aligned, n centred."""
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{number(x)}" y="{number(y)}"{style}>{escape(words)}</text>'
