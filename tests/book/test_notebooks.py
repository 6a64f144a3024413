"""The three views of a chapter."""

import nbformat
import pytest

import notebooks

SOLUTION = "def f(x):\n    ### BEGIN SOLUTION\n    return x + 1\n    ### END SOLUTION"


@pytest.fixture
def chapter():
    solution = nbformat.v4.new_code_cell(SOLUTION, metadata={"nbgrader": {"solution": True, "grade_id": "f"}})
    check = nbformat.v4.new_code_cell("assert f(1) == 2", metadata={"nbgrader": {"grade": True, "grade_id": "f-check"}})
    text = nbformat.v4.new_markdown_cell(
        "[a](ring.md), [b](../part/ring.md#top), [c](../../book/notation.md), [d](https://x.org/a.md)"
    )
    notebook = nbformat.v4.new_notebook(cells=[text, solution, check])
    notebook.metadata["jupytext"] = {"formats": "ipynb,md"}
    return notebook


def test_the_book_folds_the_solution_and_says_what_it_is(chapter):
    cell = notebooks.for_the_book(chapter).cells[1]
    assert "hide-input" in cell.metadata["tags"]
    assert cell.metadata["mystnb"]["code_prompt_show"] == "Show one solution"


def test_the_book_shows_the_solution_without_nbgraders_marks(chapter):
    assert notebooks.for_the_book(chapter).cells[1].source == "def f(x):\n    return x + 1"


def test_the_book_leads_from_a_system_to_its_reference(chapter):
    last = notebooks.for_the_book(chapter, "toolkit.part.ring").cells[-1]
    assert "{py:mod}`toolkit.part.ring`" in last.source


def test_a_chapter_about_an_idea_gets_no_such_line(chapter):
    assert len(notebooks.for_the_book(chapter).cells) == 3


@pytest.mark.parametrize("view", [notebooks.for_the_book, notebooks.for_the_reader])
def test_links_lead_to_notebooks_and_other_links_stay(chapter, view):
    source = view(chapter).cells[0].source
    assert source == "[a](ring.ipynb), [b](../part/ring.ipynb#top), [c](../../book/notation.md), [d](https://x.org/a.md)"


def test_the_reader_finds_solutions_closed(chapter):
    assert notebooks.for_the_reader(chapter).cells[1].metadata["jupyter"] == {"source_hidden": True}


@pytest.mark.parametrize("view", [notebooks.for_the_reader, notebooks.for_the_class])
def test_no_notebook_is_paired(chapter, view):
    assert "jupytext" not in view(chapter).metadata


def test_the_class_keeps_the_marks_that_nbgrader_needs(chapter):
    assert notebooks.for_the_class(chapter).cells[1].source == SOLUTION
