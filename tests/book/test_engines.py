"""The page about engines names what a communicator really asks of a machine, no more and no less."""

import re
from pathlib import Path

import pytest

from toolkit.runtime.machine import Machine
from toolkit.runtime.processor import Processor

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "book" / "engines.md").read_text(encoding="utf-8")
ASKERS = ("communicator", "requests", "collectives")


def rows(owner):
    """What the table of this owner lists in its first column."""
    table = PAGE.split(f"| asked of the {owner} |")[1].split("\n\n")[0]
    return set(re.findall(r"^\| `(\w+)", table, re.MULTILINE))


@pytest.mark.parametrize(("owner", "kind"), [("machine", Machine), ("processor", Processor)])
def test_every_row_is_there(owner, kind):
    assert rows(owner) and all(hasattr(kind, name) for name in rows(owner))


def test_what_communicators_and_requests_call_is_listed():
    source = "".join((ROOT / "toolkit" / "runtime" / f"{name}.py").read_text(encoding="utf-8") for name in ASKERS)
    called = set(re.findall(r"machine\.(\w+)\b", source)) & {name for name in vars(Machine) | vars(Machine.__base__)}
    assert called == rows("machine")
