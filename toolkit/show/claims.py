"""Claims as tables: for a chapter, for the terminal, and as Markdown for a page or a file in git."""

from collections import Counter
from dataclasses import dataclass
from html import escape

from ..claims import DIRECTION, FAILED, NOT_REPRODUCED, REPRODUCED, run_claims

SIGN = {REPRODUCED: "✓", DIRECTION: "≈", NOT_REPRODUCED: "✗", FAILED: "!"}
HEADERS = ("claim", "paper", "ours", "ratio", "verdict", "why it differs")


@dataclass(frozen=True, repr=False)
class ClaimsTable:
    """A table that a notebook shows by itself. `words` says the count of each verdict."""

    verdicts: list

    @property
    def words(self):
        return summary(self.verdicts)

    def _repr_html_(self):
        head = "".join(f'<th scope="col">{name}</th>' for name in HEADERS)
        rows = "".join(f"<tr>{_html_row(v)}</tr>" for v in self.verdicts)
        return (
            f'<table class="claims"><caption>{escape(self.words)}</caption>'
            f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        )

    def __repr__(self):
        return claims_text(self.verdicts)


def claims_table(system=None):
    """Measure the claims of a system, or of all, and show paper, ours, ratio, verdict and why.

    returns  ClaimsTable
    raises   ValueError  an unknown system
    """
    return ClaimsTable(run_claims(system, progress=False))


def summary(verdicts):
    """'3 claims: 1 reproduced, 2 direction only.' Verdicts that do not occur are left out."""
    count = Counter(v.verdict for v in verdicts)
    said = ", ".join(f"{count[name]} {name}" for name in SIGN if count[name])
    total = f"{len(verdicts)} claim{'s' * (len(verdicts) != 1)}"
    return f"{total}: {said}." if said else f"{total}."


def claims_text(verdicts):
    """For a terminal: three lines a claim, a heading a system, the count at the end."""
    lines, system = [], None
    for v in verdicts:
        if (v.part, v.system) != system:
            system = v.part, v.system
            lines.append(f"{v.part}/{v.system}")
        numbers = zip(("paper", "ours", "ratio"), in_words(v), strict=True)
        beside = "   ".join(f"{name} {text}" for name, text in numbers if text)
        lines.append(f"  {SIGN[v.verdict]} {v.verdict}: {v.says} ({v.where})")
        lines.append(f"      {beside}   ({v.seconds:.1f} s to measure)")
        if v.why:
            lines.append(f"      {v.why}")
    return "\n".join([*lines, summary(verdicts)])


def markdown(verdicts):
    """A Markdown table without the time it took, so that a file in git changes only when a result does."""
    lines = [f"| system | {' | '.join(HEADERS)} |", "|" + " --- |" * (len(HEADERS) + 1)]
    for v in verdicts:
        cells = (v.system, f"{v.says} ({v.where})", *in_words(v), f"{SIGN[v.verdict]} {v.verdict}", v.why)
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join([*lines, "", summary(verdicts), ""])


def in_words(v):
    """(paper, ours, ratio) as text; a unit is written after each number, a direction as it is."""
    paper = v.paper_value if isinstance(v.paper_value, str) else _with_unit(v.paper_value, v.unit)
    return paper, "" if v.ours is None else _with_unit(v.ours, v.unit), "" if v.ratio is None else f"{v.ratio:.2f}"


def _with_unit(value, unit):
    whole = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{whole} {unit}".strip()


def _html_row(v):
    what = f"{escape(v.says)} <small>({escape(v.where)})</small>"
    cells = "".join(f"<td>{escape(text)}</td>" for text in in_words(v))
    sign = f'<td data-verdict="{v.verdict.replace(" ", "-")}">{SIGN[v.verdict]}&nbsp;{v.verdict}</td>'
    return f'<th scope="row">{what}</th>{cells}{sign}<td>{escape(v.why)}</td>'
