"""Generated tables say what the files say."""

import pytest

import pages
from toolkit.claims import Verdict
from toolkit.systems import systems

WRITTEN = [pytest.param(system, id=system.name) for system in systems()]


def verdict(word):
    return Verdict("s", "p", "says", "where", 1.0, 1.0, "", 1.0, word, "", 0.0)


@pytest.fixture
def no_claims(monkeypatch):
    monkeypatch.setattr(pages, "measured", dict)


def row(table, word):
    return next(line for line in table.splitlines() if word in line)


@pytest.mark.parametrize("system", WRITTEN)
def test_a_written_system_has_its_idea_and_a_link_to_its_chapter(system, no_claims):
    line = row(pages.part_table(system.part), f"{{cite}}`{system.name}`")
    assert system.idea in line and f"({system.chapter})".replace("(", "(../../") in line


def test_a_system_without_a_module_is_planned_and_has_no_link(no_claims, monkeypatch):
    monkeypatch.setattr(pages, "written", dict)
    line = row(pages.part_table("sequence_parallel"), "`ulysses`")
    assert "planned" in line and "](" not in line


def test_claims_are_counted_by_verdict():
    verdicts = [verdict("reproduced"), verdict("direction only"), verdict("reproduced")]
    assert pages.standing(verdicts) == "2 reproduced, 1 direction only"


def test_the_page_of_systems_has_a_row_for_each_and_a_heading_for_each_part(no_claims):
    page = pages.all_tables()
    assert page.count("{cite}") == sum(len(part["systems"]) for part in pages.parts().values())
    assert page.count("\n## ") + page.startswith("## ") == len(pages.parts())


def test_the_claims_page_has_the_paper_the_measurement_and_the_verdict(monkeypatch):
    monkeypatch.setattr(pages, "measured", lambda: {("sequence_parallel", "token_ring"): [verdict("not reproduced")]})
    assert "not reproduced" in row(pages.claims(), "says")


def test_build_times_are_sorted_and_those_over_the_limit_marked(tmp_path):
    executed = {}
    for name, seconds in (("quick", 1.5), ("slow", pages.LIMIT + 1)):
        path = tmp_path / f"{name}.ipynb"
        path.write_text(f'{{"metadata": {{"seconds": {seconds}}}}}')
        executed[pages.ROOT / "notebooks" / "part" / f"{name}.md"] = path
    _, _, slow, quick, total = pages.times(executed).splitlines()
    assert "part/slow" in slow and "over the limit" in slow
    assert "over the limit" not in quick and f"{pages.LIMIT + 2.5:.1f}" in total


def test_the_reference_has_every_public_module():
    reference = pages.reference()
    modules = [f for f in (pages.ROOT / "toolkit").glob("runtime/[!_]*.py")]
    missing = [f.stem for f in modules if f".. automodule:: toolkit.runtime.{f.stem}\n" not in reference]
    assert not missing


def test_private_modules_are_left_out_of_the_reference():
    assert "._" not in pages.reference()


def test_a_bar_in_a_cell_does_not_break_the_table():
    assert pages.table(["head"], [["a | b"]]).splitlines()[-1] == r"| a \| b |"


def test_a_place_that_nobody_fills_is_an_error():
    with pytest.raises(KeyError, match="nowhere"):
        pages.fill("<!-- generated: nowhere -->", {})
