"""Every page of the built book, as a reader meets it: wide, and on a telephone.

Set BOOK_HTML to walk a book built elsewhere than in _build/html.
"""

import os
import re
from pathlib import Path

import pytest

BOOK = Path(os.environ.get("BOOK_HTML", Path(__file__).resolve().parents[2] / "_build" / "html"))
PAGES = [
    str(page.relative_to(BOOK))
    for page in sorted(BOOK.rglob("*.html"))
    if "_static" not in page.parts and 'http-equiv="refresh"' not in page.read_text().lower()
]
if not PAGES:
    pytest.skip("browser tests need the built book in _build/html: run `make book`", allow_module_level=True)


@pytest.fixture(scope="session")
def address(serve):
    return serve(BOOK)


@pytest.fixture(params=[1280, 390])
def width(request):
    return request.param


@pytest.fixture(params=PAGES)
def seen(request, visit, address, width):
    return visit(f"{address}/{request.param}", width, 10)


def test_no_request_leaves_the_book(seen):
    assert seen.foreign == []


def test_nothing_is_missing(seen):
    assert seen.missing == []


def test_the_console_shows_no_error(seen):
    assert seen.errors == []


def test_every_formula_is_drawn(seen):
    assert seen.formulas == []


def test_every_widget_is_drawn(seen):
    assert seen.widgets == []


def test_every_control_changes_its_picture_by_keyboard(seen):
    assert seen.dead == []


def test_every_picture_and_control_has_words(seen):
    assert seen.wordless == []


def test_the_page_does_not_scroll_sideways(seen):
    assert seen.sideways == []


@pytest.mark.parametrize("page", PAGES)
def test_the_page_weighs_less_than_2_megabytes(page):
    assert (BOOK / page).stat().st_size < 2_000_000


def test_search_finds_a_page_by_its_title(browser, address):
    page = next(page for page in PAGES if Path(page).stem not in ("index", "genindex", "search"))
    title = re.search(r"<h1>([^<]+)", (BOOK / page).read_text())[1]
    browser.get(f"{address}/search.html?q={max(re.findall('[A-Za-z]+', title), key=len)}")
    browser.implicitly_wait(5)
    links = [link.get_attribute("href") for link in browser.find_elements("css selector", "#search-results li a")]
    browser.implicitly_wait(0)
    assert any(page in link for link in links), f"{title!r} finds only {links}"
