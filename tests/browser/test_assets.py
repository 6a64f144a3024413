"""What the lock file promises: exact versions, checksums, and no word on where to fetch from."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCK = json.loads((ROOT / "package-lock.json").read_text())["packages"]


def test_the_lock_file_names_no_registry():
    assert [name for name, package in LOCK.items() if "resolved" in package] == []


def test_every_package_has_a_checksum():
    assert [name for name, package in LOCK.items() if name and "integrity" not in package] == []


def test_direct_dependencies_are_pinned_to_one_version():
    wanted = json.loads((ROOT / "package.json").read_text())["dependencies"]
    assert {name: LOCK[f"node_modules/{name}"]["version"] for name in wanted} == wanted
