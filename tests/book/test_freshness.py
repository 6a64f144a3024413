"""What a chapter's outputs depend on, on small trees made here."""

import pytest

import chapters
import freshness

TREE = {
    "toolkit/__init__.py": "",
    "toolkit/near.py": "from .deep.well import water\n",
    "toolkit/deep/__init__.py": "from . import spring\n",
    "toolkit/deep/well.py": "def water():\n    from ..rain import drops\n    return drops\n",
    "toolkit/deep/spring.py": "",
    "toolkit/rain.py": "import numpy\ndrops = 1\n",
    "toolkit/far.py": "import toolkit.near\n",
    "toolkit/house.mplstyle": "lines.linewidth: 2\n",
    "toolkit/claims/__init__.py": "",
    "toolkit/claims/part/__init__.py": "",
    "toolkit/claims/part/lesson.py": "value = 1\n",
    "toolkit/claims/part/other.py": "value = 1\n",
    "notebooks/part/lesson.md": "# Lesson\n\n```{code-cell} ipython3\n%time\nimport toolkit.near as near\n```\n",
}


@pytest.fixture
def tree(tmp_path):
    for name, text in TREE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    header = "---\njupytext:\n  text_representation:\n    extension: .md\n    format_name: myst\n---\n\n"
    lesson = tmp_path / "notebooks/part/lesson.md"
    lesson.write_text(header + lesson.read_text())
    return tmp_path


def key(tree):
    return chapters.key(tree / "notebooks/part/lesson.md", tree)


IMPORTED = ["near", "deep/__init__", "deep/well", "deep/spring", "rain", "claims/part/lesson", "claims/part/__init__"]


@pytest.mark.parametrize("module", IMPORTED)
def test_a_changed_line_in_an_imported_module_changes_the_key(tree, module):
    before = key(tree)
    with open(tree / f"toolkit/{module}.py", "a") as file:
        file.write("# changed\n")
    assert key(tree) != before


@pytest.mark.parametrize("module", ["far", "claims/part/other"])
def test_a_change_in_a_module_that_the_chapter_does_not_import_keeps_the_key(tree, module):
    before = key(tree)
    (tree / f"toolkit/{module}.py").write_text("value = 2\n")
    assert key(tree) == before


def test_a_changed_sentence_in_the_chapter_changes_the_key(tree):
    before = key(tree)
    with open(tree / "notebooks/part/lesson.md", "a") as file:
        file.write("\nOne more sentence.\n")
    assert key(tree) != before


def test_a_changed_style_file_changes_the_key(tree):
    before = key(tree)
    (tree / "toolkit/house.mplstyle").write_text("lines.linewidth: 3\n")
    assert key(tree) != before


def test_a_new_version_of_a_library_changes_the_key(tree, monkeypatch):
    before = key(tree)
    monkeypatch.setattr(freshness.metadata, "version", lambda name: "999")
    assert key(tree) != before


def test_code_and_chapter_in_another_folder_have_the_same_key(tree, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "copy"
    tree.rename(tree.parent / "moved")
    (tree.parent / "moved").rename(elsewhere)
    moved = key(elsewhere)
    elsewhere.rename(tree)
    assert key(tree) == moved
