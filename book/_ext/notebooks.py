"""The three views of a chapter: the book's page, the reader's notebook, the class's source.

A chapter is written once, with its solutions between `### BEGIN SOLUTION` and `### END SOLUTION`. nbgrader's cell
metadata says which cell is which, so no view needs marks of its own.

    python book/_ext/notebooks.py [chapter …]     write notebooks/<part>/<chapter>.ipynb, the reader's view
"""

import re
import sys

import jupytext
import nbformat

from chapters import ROOT, named

TO_CHAPTER = re.compile(r"\]\(((?:\.\./\w+/)?\w+)\.md([)#])")
MARKER = re.compile(r"^[ \t]*### (BEGIN|END) SOLUTION[ \t]*\n?", re.MULTILINE)
PROMPTS = {"solution": "one solution", "grade": "the check"}


def role(cell):
    """'solution', 'grade' or None: what nbgrader's metadata says of a cell."""
    grading = cell.metadata.get("nbgrader", {})
    return next((name for name in PROMPTS if grading.get(name)), None)


def to_notebooks(text):
    """A chapter's Markdown, its links to other chapters leading to their notebooks; links to the book's pages stay.

    A chapter names another as `ring.md` or `../part/ring.md`, and a page of the book as `../../book/page.md`.
    """
    return TO_CHAPTER.sub(r"](\1.ipynb\2", text)


def for_the_book(notebook, module=None):
    """An executed chapter for the site: solutions and checks folded, and a last line that leads on."""
    for cell in notebook.cells:
        if name := role(cell):
            cell.source = MARKER.sub("", cell.source).rstrip()
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "hide-input"]
            cell.metadata["mystnb"] = {
                "code_prompt_show": f"Show {PROMPTS[name]}",
                "code_prompt_hide": f"Hide {PROMPTS[name]}",
            }
        if cell.cell_type == "markdown":
            cell.source = to_notebooks(cell.source)
        cell.metadata.pop("execution", None)  # wall-clock times would change the page at each build
    if module:
        notebook.cells.append(
            nbformat.v4.new_markdown_cell(
                f"Look up: {{py:mod}}`{module}` in the [reference](../../book/reference.md), its "
                "[claims](../../book/claims.md), [all systems](../../book/systems.md).",
                id="look-up",
            )
        )
    return notebook


def for_the_reader(notebook):
    """A chapter to play with: solutions are there, closed until clicked; links lead to notebooks."""
    notebook.metadata.pop("jupytext", None)  # never paired: a pair writes outputs and answers back
    for cell in notebook.cells:
        if role(cell):
            cell.source = MARKER.sub("", cell.source).rstrip()
            cell.metadata["jupyter"] = {"source_hidden": True}
            cell.metadata.pop("nbgrader")
        elif cell.cell_type == "markdown":
            cell.source = to_notebooks(cell.source)
    return notebook


def for_the_class(notebook):
    """A chapter as nbgrader's source: metadata and markers kept, nothing paired, nothing executed."""
    notebook.metadata.pop("jupytext", None)
    return notebook


def main(names):
    for chapter in named(names):
        target = chapter.with_suffix(".ipynb")
        nbformat.write(for_the_reader(jupytext.read(chapter)), target)
        print(target.relative_to(ROOT))


if __name__ == "__main__":
    main(sys.argv[1:])
