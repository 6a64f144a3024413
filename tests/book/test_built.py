"""The built book, as files. How its pages behave in a browser is tested in tests/browser."""

import re

import pytest
import yaml


@pytest.fixture(scope="module")
def html(root):
    if not (root / "_build" / "html" / "index.html").exists():
        pytest.skip("the book is not built: make book")
    return root / "_build" / "html"


def test_every_entry_of_the_table_of_contents_has_a_page(html, root):
    contents = yaml.safe_load((root / "book" / "_toc.yml").read_text(encoding="utf-8"))
    entries = [contents["root"], *(chapter["file"] for part in contents["parts"] for chapter in part["chapters"])]
    assert not [entry for entry in entries if not (html / f"{entry}.html").exists()]


def test_no_page_shows_nbgraders_marks(html):
    assert not [page.name for page in html.rglob("*.html") if "BEGIN SOLUTION" in page.read_text(encoding="utf-8")]


def test_no_page_has_a_place_that_was_not_filled(html):
    assert not [page.name for page in html.rglob("*.html") if "generated: " in page.read_text(encoding="utf-8")]


def test_no_page_shows_a_formula_as_it_was_typed(html):
    """MathJax renders what stands in the sources; a sentence that a cell prints must do without."""
    elsewhere = re.compile(r"<(script|pre|code)\b.*?</\1>|<(span|div) class=\"[^\"]*math.*?</\2>|<[^>]+>", re.DOTALL)
    raw = re.compile(r"\$[^$\n]{1,60}\$")
    pages = html.glob("*/**/*.html")
    found = {page.name: raw.findall(elsewhere.sub("", page.read_text(encoding="utf-8"))) for page in pages}
    assert not {name: formulas for name, formulas in found.items() if formulas}


def test_solutions_are_folded(html, root):
    chapters = (root / "notebooks").glob("*/*.md")
    with_exercises = [path for path in chapters if "BEGIN SOLUTION" in path.read_text(encoding="utf-8")]
    pages = [html / path.relative_to(root).with_suffix(".html") for path in with_exercises]
    assert not [page.name for page in pages if "Show one solution" not in page.read_text(encoding="utf-8")]


def test_a_chapter_is_at_most_two_megabytes(html):
    assert not [page.name for page in html.glob("notebooks/*/*.html") if page.stat().st_size > 2e6]


def test_a_chapter_offers_binder_and_its_own_source(html):
    page = (html / "notebooks/sequence_parallel/token_ring.html").read_text(encoding="utf-8")
    assert "urlpath=lab/tree/notebooks/sequence_parallel/token_ring.ipynb" in page
    assert "blob/main/notebooks/sequence_parallel/token_ring.md" in page


def test_the_search_index_knows_words_of_the_chapters(html):
    index = (html / "searchindex.js").read_text(encoding="utf-8").lower()
    assert "notebooks/sequence_parallel/token_ring" in index and "deadlock" in index
