"""The reference page describes every module with what `make book` installs: optional packages must be named as such."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
MODULES = [path for path in sorted((ROOT / "toolkit").rglob("*.py")) if not path.name.startswith("_")]


def installed():
    """Names that a module may import at its top: of Python, our dependencies, and those that autodoc stands in for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = {re.match(r"[\w-]+", line)[0].lower() for line in project["dependencies"]}
    stand_ins = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["sphinx"]["config"]
    return sys.stdlib_module_names | needs | {"toolkit"} | set(stand_ins["autodoc_mock_imports"])


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_the_book_has(path):
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    assert found <= installed()
