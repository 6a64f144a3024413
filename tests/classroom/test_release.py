"""Each chapter as the students get it: no solution left in it, and no check that passes without an answer."""

import re
import warnings
from copy import deepcopy
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytest.importorskip("nbgrader", reason="release tests need nbgrader: pip install nbgrader")
import assignments
from notebooks import role

CHAPTERS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*/*.md"))
SOLUTION = re.compile(r"### BEGIN SOLUTION\n(.*?)### END SOLUTION", re.DOTALL)


@pytest.fixture(scope="module", params=CHAPTERS, ids=lambda path: path.stem)
def chapter(request):
    return request.param


@pytest.fixture(scope="module")
def released(chapter, tmp_path_factory):
    (path,) = assignments.release([chapter], tmp_path_factory.mktemp("course"))
    return nbformat.read(path, as_version=4)


def test_no_line_of_a_solution_is_in_the_student_version(chapter, released):
    solutions = "\n".join(SOLUTION.findall(chapter.read_text(encoding="utf-8")))
    secret = {line.strip() for line in solutions.splitlines() if len(line.strip()) > 20}  # not `i += 1`
    shown = {line.strip() for cell in released.cells for line in cell.source.splitlines()}
    assert not secret & shown


def test_every_check_is_locked_and_has_points(released):
    checks = [cell.metadata.nbgrader for cell in released.cells if role(cell) == "grade"]
    assert checks and all(check.locked and check.points > 0 for check in checks)


def run(notebook):
    """The executed notebook. A kernel that dies or stops answering says nothing of its checks: it gets a second try."""
    for attempt in (1, 2):
        copy = deepcopy(notebook)
        try:
            NotebookClient(copy, timeout=120, kernel_name="python3", allow_errors=True).execute()
            return copy
        except (RuntimeError, TimeoutError) as error:
            if attempt == 2:
                raise
            warnings.warn(f"a kernel did not finish, once: {type(error).__name__}: {error}"[:300], stacklevel=2)


def test_no_check_passes_without_an_answer(released):
    executed = run(released)
    checks = [cell for cell in executed.cells if role(cell) == "grade"]
    passed = [c.metadata.nbgrader.grade_id for c in checks if all(o.output_type != "error" for o in c.outputs)]
    assert not passed
