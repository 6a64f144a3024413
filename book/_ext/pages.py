"""Generated parts of the book's pages, so that no table can go stale.

A page says where: `<!-- generated: systems -->`. What is known of a written system comes from its module and its
claims; book/systems.yml has the question of each part, and a line for each system that is still planned.
"""

import ast
import json
import re
from collections import Counter

import yaml

from chapters import LIMIT, ROOT
from measured import measured
from toolkit import systems
from toolkit.show.claims import SIGN, in_words, summary

PLACE = re.compile(r"^<!-- generated: (\w+) ?(\w*) -->$", re.MULTILINE)


def parts(root=ROOT):
    """book/systems.yml: {part: {title, question, systems: {system: {title, idea, bottleneck}}}}, in reading order."""
    return yaml.safe_load((root / "book" / "systems.yml").read_text(encoding="utf-8"))


def written():
    """The systems whose modules exist, {(part, name): System}."""
    return {(system.part, system.name): system for system in systems.systems()}


def module_of(chapter):
    """The module a chapter is about, dotted, or None for a chapter about an idea."""
    part, name = chapter.parent.name, chapter.stem
    return f"toolkit.{part}.{name}" if (part, name) in written() else None


def fill(text, executed):
    """A page's text with each marked place filled in. executed: {chapter: path of its executed notebook}."""
    makers = {
        "systems": lambda _: all_tables(),
        "part": part_table,
        "claims": lambda _: claims(),
        "reference": lambda _: reference(),
        "times": lambda _: times(executed),
    }
    return PLACE.sub(lambda place: makers[place[1]](place[2]), text)


def table(head, rows):
    """A Markdown table; a bar inside a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    cells = ([str(cell).replace("|", r"\|").replace("\n", " ") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def all_tables():
    """Every part with its systems, one table a part."""
    return "\n\n".join(
        f"## {facts['title']}\n\n{facts['question']}\n\n{part_table(part, '..')}" for part, facts in parts().items()
    )


def part_table(part, up="../.."):
    """The systems of one part. up: from the page's folder to the root."""
    rows = []
    for name, facts in parts()[part]["systems"].items():
        title, idea, claimed = facts["title"], facts["idea"], "planned"
        if system := written().get((part, name)):
            title, idea = f"[{system.title}]({up}/{system.chapter})", system.idea
            claimed = standing(measured().get((part, name), []))
        rows.append((f"{title} {{cite}}`{name}`", idea, facts["bottleneck"], claimed))
    return table(("system", "idea", "what is scarce", "claims"), rows)


def reference():
    """autodoc directives for every public module, in reading order."""
    groups = {"runtime": "Runtime", "runtime/topology": "Topologies", "kernels": "Kernels"}
    groups |= {"learn": "Models and data", "show": "Pictures"}
    groups |= {".": "Classroom and list of systems", "claims": "Claims"}
    groups |= {part: facts["title"] for part, facts in parts().items()}
    files = [file for file in (ROOT / "toolkit").rglob("*.py") if _public(file)]
    lines = []
    for group, title in groups.items():
        inside = sorted(file for file in files if file.parent == ROOT / "toolkit" / group)
        lines += [f"## {title}"] if inside else []
        for file in inside:
            dotted = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            package = dotted.removesuffix(".__init__")  # what it gathers from its modules is shown there
            members = "" if package != dotted else "\n   :members:"
            lines.append(f"### {package}\n\n```{{eval-rst}}\n.. automodule:: {package}{members}\n```")
    return "\n\n".join(lines)


def _public(file):
    """A module with a docstring, its name without a leading underscore; packages count, the whole toolkit does not."""
    hidden = file.name.startswith("_") and (file.name != "__init__.py" or file.parent.name == "toolkit")
    return not hidden and ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) is not None


def times(executed):
    """Seconds that each chapter took, slowest first, from its executed notebook."""
    rows = []
    for chapter, path in executed.items():
        seconds = json.loads(path.read_text(encoding="utf-8"))["metadata"]["seconds"]
        name = chapter.relative_to(ROOT / "notebooks").with_suffix("").as_posix()
        rows.append((seconds, f"[{name}](../notebooks/{name}.md)"))
    rows.sort(reverse=True)
    total = sum(seconds for seconds, _ in rows)
    body = [(link, f"{seconds:.1f}", "over the limit" if seconds > LIMIT else "") for seconds, link in rows]
    return table(("chapter", "seconds", f"limit: {LIMIT:g} s"), [*body, ("all", f"{total:.1f}", "")])


def standing(verdicts):
    """A system's claims in a few words."""
    count = Counter(verdict.verdict for verdict in verdicts)
    return ", ".join(f"{number} {name}" for name, number in count.most_common()) or "no claim yet"


def claims():
    """A table for each system that has claims; a reason for a difference stands under its claim."""
    sections = []
    for (part, name), system in written().items():
        verdicts = measured().get((part, name), [])
        rows = []
        for v in verdicts:
            why = f"<br>*{v.why}*" if v.why else ""
            paper, ours, _ = in_words(v)
            rows.append((f"{v.says} ({v.where}){why}", paper, ours, f"{SIGN[v.verdict]} {v.verdict}"))
        title = f"## [{system.title}](../{system.chapter})"
        sections += [title, summary(verdicts), table(("claim", "paper", "ours", "verdict"), rows)] if rows else []
    return "\n\n".join(sections)
