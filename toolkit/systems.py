"""Which systems exist: found by looking at the modules, so that no list can go stale.

A system's docstring begins "Name: idea" and names its paper in a line "Source: …".
"""

import ast
import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

PARTS = (  # in reading order
    "attention",
    "sequence_parallel",
    "model_parallel",
    "gradient_compression",
    "decentralized",
    "networks",
    "serving",
    "kv_cache",
    "information_bottleneck",
    "concept_bottleneck",
    "transfer",
    "speech",
    "multilingual",
    "agents",
)


@dataclass(frozen=True)
class System:
    """One system of the book, as its module describes itself."""

    part: str
    name: str
    title: str
    idea: str
    source: str

    @property
    def chapter(self):
        return f"notebooks/{self.part}/{self.name}.md"

    def module(self):
        return import_module(f"toolkit.{self.part}.{self.name}")


def systems():
    """Every written system, in reading order. Reads the docstrings; imports nothing."""
    here = Path(__file__).parent
    files = [file for part in PARTS for file in sorted((here / part).glob("[!_]*.py"))]
    return [_describe(file) for file in files]


def find(name):
    """The system called `name`. Raises ValueError with the names that exist."""
    known = {system.name: system for system in systems()}
    if name not in known:
        raise ValueError(f"there is no system {name!r}; choose from {', '.join(known)}")
    return known[name]


def _describe(file):
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    title, _, idea = text.split("\n")[0].partition(": ")
    source = re.search(r"^Sources?: (.*?)(?:Chapter:|\Z)", text, re.MULTILINE | re.DOTALL)
    return System(file.parent.name, file.stem, title, idea, " ".join(source[1].split()) if source else "")
