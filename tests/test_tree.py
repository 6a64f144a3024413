"""One name, four places: whoever knows the name of a system knows its files, and no chapter is left out of the book."""

import re
from pathlib import Path

import pytest
import yaml

from toolkit.systems import PARTS, systems

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT / "notebooks").glob("*/*.md"))
CONCEPTS = ("foundations", *PARTS)  # where a chapter may lie that has no system of its own
SYSTEMS = [pytest.param(system, id=system.name) for system in systems()]
PLANNED = yaml.safe_load((ROOT / "book" / "systems.yml").read_text(encoding="utf-8"))
CONTENTS = set(re.findall(r"file: (\S+)", (ROOT / "book" / "_toc.yml").read_text(encoding="utf-8")))


@pytest.mark.parametrize("place", ["notebooks/{}/{}.md", "toolkit/claims/{}/{}.py", "tests/{}/test_{}.py"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_has_its_chapter_its_claims_and_its_tests(system, place):
    assert (ROOT / place.format(system.part, system.name)).exists()


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_says_its_name_its_idea_and_its_source(system):
    assert system.title and system.idea and system.source


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_is_in_the_list_of_systems(system):
    assert system.name in PLANNED[system.part]["systems"]


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_is_in_the_table_of_contents(chapter):
    assert chapter.relative_to(ROOT).with_suffix("").as_posix() in CONTENTS


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_lies_in_a_part_of_the_book(chapter):
    assert chapter.parent.name in CONCEPTS


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_is_not_paired_with_a_notebook(chapter):
    header = chapter.read_text(encoding="utf-8").split("---")[1]
    assert "formats:" not in header


@pytest.mark.parametrize("entry", sorted(CONTENTS))
def test_what_the_table_of_contents_names_exists(entry):
    assert (ROOT / f"{entry}.md").exists()


@pytest.mark.parametrize("claims", sorted((ROOT / "toolkit" / "claims").glob("*/[!_]*.py")), ids=lambda path: path.stem)
def test_claims_belong_to_a_system(claims):
    assert (ROOT / "toolkit" / claims.parent.name / claims.name).exists()


def test_the_parts_are_listed_in_reading_order():
    assert tuple(PLANNED) == PARTS


def test_each_listed_system_has_a_paper_in_the_bibliography():
    bibliography = (ROOT / "book" / "references.bib").read_text(encoding="utf-8")
    keys = set(re.findall(r"^@\w+\{(\w+),", bibliography, re.MULTILINE))
    assert {name for part in PLANNED.values() for name in part["systems"]} <= keys


def test_names_of_chapters_are_unique_because_assignments_have_no_folders():
    names = [chapter.stem for chapter in CHAPTERS]
    assert len(set(names)) == len(names)
