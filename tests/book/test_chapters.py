"""Chapters are executed when they must be and only then; one that fails says where. Real kernels, on a small tree."""

import nbformat
import pytest

import chapters

HEADER = """---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# Lesson

"""


def cell(code):
    return f"```{{code-cell}} ipython3\n{code}\n```\n\n"


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A repository whose toolkit has two modules: one that the lesson prints, one that it does not import."""
    (tmp_path / "toolkit").mkdir()
    for name, text in {"__init__": "", "used": "number = 1\n", "unused": ""}.items():
        (tmp_path / "toolkit" / f"{name}.py").write_text(text)
    (tmp_path / "notebooks" / "part").mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # the kernel finds this toolkit before ours
    return tmp_path


def lesson(tree, *cells):
    chapter = tree / "notebooks" / "part" / "lesson.md"
    chapter.write_text(HEADER + "".join(map(cell, cells)))
    return chapter


def printed(tree, chapter):
    path = chapters.execute_all([chapter], tree)[chapter]
    outputs = [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", ())]
    return "".join(output.get("text", "") for output in outputs)


def test_a_changed_line_of_the_toolkit_changes_what_the_page_shows(tree):
    chapter = lesson(tree, "from toolkit.used import number\nprint(number)")
    before = printed(tree, chapter)
    (tree / "toolkit" / "used.py").write_text("number = 22\n")
    assert (before, printed(tree, chapter)) == ("1\n", "22\n")


def test_nothing_is_executed_when_only_other_modules_changed(tree, capsys):
    chapter = lesson(tree, "from toolkit.used import number\nimport time\nprint(time.perf_counter())")
    before = printed(tree, chapter)
    (tree / "toolkit" / "unused.py").write_text("number = 22\n")
    assert printed(tree, chapter) == before
    assert "0 of 1 to execute" in capsys.readouterr().out


def test_only_the_newest_execution_of_a_chapter_is_kept(tree):
    printed(tree, lesson(tree, "print(1)"))
    printed(tree, lesson(tree, "print(2)"))
    assert len(list((tree / "_build" / "chapters").iterdir())) == 1


def test_a_failing_chapter_is_reported_by_name_cell_and_error(tree):
    chapter = lesson(tree, "1 + 1", "1 / 0")
    with pytest.raises(chapters.ChapterFailed, match=r"(?s)part/lesson\.md: code cell 2 of 2.*ZeroDivisionError"):
        chapters.execute_all([chapter], tree)


def test_a_failing_chapter_does_not_keep_another_from_running(tree):
    bad = lesson(tree, "1 / 0").rename(tree / "notebooks" / "part" / "bad.md")
    good = lesson(tree, "print(1)")
    with pytest.raises(chapters.ChapterFailed):
        chapters.execute_all([bad, good], tree)
    assert chapters.cached(good, tree).exists()


def test_a_chapter_that_kills_its_kernel_fails(tree):
    chapter = lesson(tree, "import os\nos._exit(1)")
    with pytest.raises(chapters.ChapterFailed, match="lesson"):
        chapters.execute_all([chapter], tree)


def test_widgets_are_kept_with_their_state(tree):
    chapter = lesson(tree, "import ipywidgets\nipywidgets.IntSlider(value=7)")
    path = chapters.execute_all([chapter], tree)[chapter]
    kept = nbformat.read(path, as_version=4).metadata["widgets"]["application/vnd.jupyter.widget-state+json"]
    assert 7 in [model["state"].get("value") for model in kept["state"].values()]


def test_an_unknown_chapter_is_refused_with_the_names_that_exist(tree):
    lesson(tree, "1")
    with pytest.raises(SystemExit, match=r"no chapter 'lessen'.*lesson"):
        chapters.named(["lessen"], tree)
