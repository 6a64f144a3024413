"""The real nbgrader, end to end: release a lesson, hand in seven answers, grade them, read scores and messages."""

from pathlib import Path

import nbformat
import pytest

pytest.importorskip("nbgrader", reason="grading tests need nbgrader: pip install nbgrader")
from nbgrader.api import Gradebook

import assignments

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")  # nbgrader's own
LESSON = Path(__file__).with_name("lesson.md")
COUNT, SHIFT = 0, 1  # the two exercises: 2 points, 3 points
RIGHT = {COUNT: "return (ranks - 1) * slice_bytes", SHIFT: "return comm.ishift(x, by=1).wait()"}
ANSWERS = {  # what stands in the two functions, the score, and what the messages have to say
    "perfect": (RIGHT, 5, []),
    "empty": ({}, 0, ["1. Count the bytes: not answered yet", "2. Shift by one: not answered yet"]),
    "wrong": (
        {COUNT: "return 8 * slice_bytes", SHIFT: "for _ in range(5): x = comm.ishift(x, by=1).wait()\n    return x"},
        0,
        ["1. Count the bytes: a slice is passed on 7 times, you returned 32768", "2. Shift by one: missed: time"],
    ),
    "crashing": (
        {COUNT: "return ranks / 0", SHIFT: RIGHT[SHIFT]},
        3,
        ["1. Count the bytes: ZeroDivisionError: division by zero"],
    ),
    "endless": (
        {COUNT: "while True:\n        try: ranks += 1\n        except Exception: pass", SHIFT: "while True: pass"},
        0,
        ["1. Count the bytes: still running after 2 s", "2. Shift by one: still running after 2 s"],
    ),
    "deadlocked": (
        {COUNT: RIGHT[COUNT], SHIFT: "return comm.recv(source=(comm.rank + 1) % comm.size)"},
        2,
        ["2. Shift by one: Deadlock"],
    ),
    "printing": (
        {COUNT: "print(7 * slice_bytes)", SHIFT: "comm.ishift(x, by=1).wait()"},
        0,
        ["1. Count the bytes: `bytes_sent` returned None. It printed its result: return it", "rank 0 returned None"],
    ),
}


def answered(released, bodies):
    """The student's notebook with the bodies of its functions filled in, by index of exercise."""
    notebook = nbformat.read(released, as_version=4)
    solutions = [cell for cell in notebook.cells if cell.metadata.get("nbgrader", {}).get("solution")]
    for index, body in bodies.items():
        head = solutions[index].source.splitlines()[0]
        solutions[index].source = f"{head}\n    {body}"
    return notebook


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course")
    (released,) = assignments.release([LESSON], folder)
    interface = assignments.course(folder)
    for student, (bodies, _, _) in ANSWERS.items():
        handed_in = folder / "submitted" / student / "lesson" / "lesson.ipynb"
        handed_in.parent.mkdir(parents=True)
        nbformat.write(answered(released, bodies), handed_in)
        result = interface.autograde("lesson", student)
        assert result["success"], result["log"]
    return folder


@pytest.mark.parametrize("student", ANSWERS)
def test_each_answer_gets_the_score_it_deserves(course, student):
    with Gradebook(f"sqlite:///{course}/gradebook.db") as gradebook:
        assert gradebook.find_submission("lesson", student).score == ANSWERS[student][1]


@pytest.mark.parametrize("student", ANSWERS)
def test_each_message_names_the_question_and_helps(course, student):
    graded = nbformat.read(course / "autograded" / student / "lesson" / "lesson.ipynb", as_version=4)
    outputs = [output for cell in graded.cells for output in cell.get("outputs", ())]
    said = "\n".join(output.evalue for output in outputs if output.output_type == "error")
    missing = [message for message in ANSWERS[student][2] if message not in said]
    assert not missing, said


def test_the_student_version_has_no_solution(course):
    text = (course / "release" / "lesson" / "lesson.ipynb").read_text()
    assert "BEGIN SOLUTION" not in text and RIGHT[COUNT] not in text and RIGHT[SHIFT] not in text


def test_the_student_version_is_not_paired(course):
    assert "jupytext" not in nbformat.read(course / "release" / "lesson" / "lesson.ipynb", as_version=4).metadata
