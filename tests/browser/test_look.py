"""The walk can fail: each kind of bad page is caught, and a good page is not."""

import pytest

GOOD = """<!doctype html><html lang="en"><head><meta charset="utf-8"><link rel="icon" href="data:,"></head>
<body><main>{}</main></body></html>"""
EXPLORER = """<div class="explore"><div class="noUi-handle" tabindex="0" aria-label="devices">o</div>
<div class="explore-states"><div class="explore-state" aria-label="words">0</div></div></div>
<script>let n = 0; document.querySelector(".noUi-handle").onkeydown = () => { ACTION }</script>"""
LIVE = EXPLORER.replace("ACTION", 'document.querySelector(".explore-state").textContent = ++n')
DEAD = EXPLORER.replace("ACTION", "null")


@pytest.fixture
def look(tmp_path, serve, visit):
    """look(body) -> Visit of a page with this body, 390 px wide"""

    def look(body):
        (tmp_path / "page.html").write_text(GOOD.format(body))
        return visit(f"{serve(tmp_path)}/page.html", 390, 0.5)

    return look


@pytest.mark.parametrize("body", ["<p>Nothing but text.</p>", LIVE, "<code>$$x$$</code><img src='data:,' alt='words'>"])
def test_a_good_page_has_no_findings(look, body):
    assert [name for name, found in look(body)._asdict().items() if found] == []


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("foreign", "<script src='http://elsewhere.invalid/x.js'></script>"),
        ("foreign", "<style>p { background: url(https://elsewhere.invalid/x.png) }</style><p>text</p>"),
        ("foreign", "<script>fetch('https://elsewhere.invalid').catch(() => {})</script>"),
        ("missing", "<script src='gone.js'></script>"),
        ("missing", "<img src='gone.png' alt='words'>"),
        ("errors", "<script>undefined.x</script>"),
        ("errors", "<script>console.error('no')</script>"),
        ("errors", "<script>Promise.reject(new Error('no'))</script>"),
        ("formulas", "<span class='math'>\\(x\\)</span>"),
        ("formulas", "<p>$$ x^2 $$</p>"),
        ("formulas", "<span class='math'><mjx-container><mjx-merror>bad</mjx-merror></mjx-container></span>"),
        ("formulas", "<p>Half of it: $ <span class='math'><mjx-container>x</mjx-container></span> $</p>"),
        ("widgets", '<script type="application/vnd.jupyter.widget-view+json">{}</script>'),
        ("widgets", "<div class='explore'><div class='explore-states'></div></div>"),
        ("wordless", "<img src='data:,'>"),
        ("wordless", "<img src='data:,' alt='_images/0123.png'>"),
        ("wordless", "<div class='explore-state'>0</div>"),
        ("sideways", "<div style='width: 500px'>wide</div>"),
        ("dead", DEAD),
    ],
)
def test_a_bad_page_is_caught(look, kind, body):
    assert getattr(look(body), kind) != []
