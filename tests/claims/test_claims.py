"""Claims: what a paper says beside what we measure, and a verdict that hides nothing."""

import math
import sys
from dataclasses import replace

import pytest

from toolkit import claims
from toolkit.claims import claim, judge, run_claims
from toolkit.show import text
from toolkit.show.claims import ClaimsTable, claims_table, markdown, summary


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """Claims made in a test stay in it."""
    monkeypatch.setattr(claims, "_registry", {})
    return claims._registry


def verdict(ours, **what):
    """Verdict on a claim whose function returns `ours`."""
    claim(**{"says": "twice as fast", "where": "Table 1", "unit": "×", **what})(lambda: ours)
    return judge(list(claims._registry.values())[-1])


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        (1.5, "reproduced"),
        (1.7, "reproduced"),  # 13 % above
        (1.3, "reproduced"),  # 13 % below
        (1.8, "direction only"),  # 20 % above, faster as claimed
        (1.1, "direction only"),
        (1.0, "not reproduced"),  # neither faster nor slower
        (0.9, "not reproduced"),
    ],
)
def test_a_speed_up_is_judged_by_tolerance_and_then_by_side(ours, expected):
    assert verdict(ours, value=1.5, tolerance=0.15, same_side_of=1.0).verdict == expected


def test_the_tolerance_itself_still_reproduces():
    assert verdict(5.0, value=4.0, tolerance=0.25).verdict == "reproduced"


def test_without_a_side_there_is_no_direction():
    assert verdict(1.8, value=1.5).verdict == "not reproduced"


def test_a_negative_value_is_judged_by_its_size():
    assert verdict(-9.5, value=-10.0, tolerance=0.1).verdict == "reproduced"


@pytest.mark.parametrize(("ours", "expected"), [(0.01, "reproduced"), (0.2, "not reproduced")])
def test_a_claim_of_zero_takes_the_tolerance_as_it_is(ours, expected):
    assert verdict(ours, value=0.0, tolerance=0.1).verdict == expected


def test_a_claim_of_zero_has_no_ratio():
    assert verdict(0.01, value=0.0).ratio is None


@pytest.mark.parametrize(("ours", "expected"), [(1.2, "reproduced"), (0.8, "not reproduced")])
def test_a_claim_of_a_direction_is_reproduced_when_it_holds(ours, expected):
    assert verdict(ours, holds=lambda ours: ours > 1, direction="above 1").verdict == expected


def test_a_claim_of_a_direction_shows_it_in_place_of_the_number():
    assert verdict(1.2, holds=lambda ours: ours > 1, direction="above 1").paper_value == "above 1"


def test_a_number_may_have_a_direction_of_its_own():
    assert verdict(30.0, value=10.0, holds=lambda ours: ours > 5, direction="above 5").verdict == "direction only"


def test_the_ratio_is_ours_over_the_papers():
    assert verdict(3.0, value=2.0).ratio == 1.5


@pytest.mark.parametrize(("ours", "expected"), [(1.5, ""), (1.9, "no host traffic")])
def test_why_is_said_only_where_the_numbers_differ(ours, expected):
    assert verdict(ours, value=1.5, why="no host traffic", same_side_of=1.0).why == expected


def test_a_measurement_that_raises_is_shown_as_failed():
    @claim(says="fast", where="Table 1", value=1.5)
    def broken():
        raise KeyError("step time")

    found = judge(next(iter(claims._registry.values())))
    assert (found.verdict, found.ours, found.why) == ("failed", None, "KeyError: 'step time'")


@pytest.mark.parametrize("ours", [None, math.nan, math.inf, "fast"])
def test_a_measurement_without_a_finite_number_is_shown_as_failed(ours):
    assert verdict(ours, value=1.5).verdict == "failed"


def test_a_failed_direction_is_shown_as_failed():
    assert verdict(1.0, holds=lambda ours: ours.no_such_thing, direction="above 1").verdict == "failed"


def test_the_decorated_function_stays_the_function():
    @claim(says="fast", where="Table 1", value=1.5)
    def speed_up(tokens=2):
        return tokens

    assert speed_up(tokens=7) == 7


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"value": None}, "value=None needs holds=.* and direction="),
        ({"value": None, "holds": bool}, "value=None needs holds=.* and direction="),
        ({"tolerance": -0.1}, r"tolerance=-0.1 must be at least 0"),
        ({"tolerance": math.nan}, r"tolerance=nan must be at least 0"),
        ({"value": math.inf}, "value=inf is not finite"),
        ({"says": " "}, "says and where must not be empty"),
        ({"where": ""}, "says and where must not be empty"),
        ({"same_side_of": 1.5}, "same_side_of=1.5 needs a value that lies on one side"),
        ({"value": None, "holds": bool, "direction": "up", "same_side_of": 1.0}, "needs a value"),
        ({"same_side_of": 1.0, "holds": bool}, "both decide the direction"),
    ],
)
def test_a_claim_that_cannot_be_judged_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        claim(**{"says": "fast", "where": "Table 1", "value": 1.5, **wrong})


# ---- the tree of claims files ----

FILE = """
from toolkit.claims import claim

@claim(says="{name} is faster", value=2.0, unit="×", where="Table 1", same_side_of=1.0, why="ideal links")
def {name}():
    return {ours}
"""


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A tree of claims of its own: two parts, three systems."""
    for part, name, ours in (("networks", "ring", 2.1), ("networks", "torus", 0.5), ("kv_cache", "pages", 1.2)):
        (tmp_path / part).mkdir(exist_ok=True)
        (tmp_path / part / f"{name}.py").write_text(FILE.format(name=name, ours=ours))
    (tmp_path / "networks" / "_shared.py").write_text("raise RuntimeError('helpers are not claims')")
    monkeypatch.setattr(claims, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(claims, "__path__", [str(tmp_path)])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("toolkit.claims."):
            del sys.modules[name]


def test_every_file_in_the_tree_is_found(tree):
    assert claims.systems() == [("kv_cache", "pages"), ("networks", "ring"), ("networks", "torus")]


def test_all_claims_run_in_the_order_of_the_tree(tree):
    assert [(v.system, v.verdict) for v in run_claims(progress=False)] == [
        ("pages", "direction only"),
        ("ring", "reproduced"),
        ("torus", "not reproduced"),
    ]


def test_one_systems_claims_can_be_run_alone(tree):
    assert [(v.part, v.system) for v in run_claims("torus", progress=False)] == [("networks", "torus")]


def test_running_twice_gives_each_claim_once(tree):
    run_claims(progress=False)
    assert len(run_claims(progress=False)) == 3


def test_an_unknown_system_is_refused_with_those_that_exist(tree):
    with pytest.raises(ValueError, match="no claims for 'toruss'; there are claims for pages, ring, torus"):
        run_claims("toruss")


def test_a_claims_file_that_cannot_be_imported_is_not_passed_over(tree):
    (tree / "networks" / "broken.py").write_text("import no_such_module")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        run_claims(progress=False)


def test_progress_goes_to_standard_error(tree, capsys):
    run_claims()
    captured = capsys.readouterr()
    assert captured.out == "" and "3/3" in captured.err


# ---- tables ----


def test_the_chapters_table_says_each_verdict_in_words_and_by_a_sign(tree):
    html = claims_table()._repr_html_()
    assert all(word in html for word in ("✓&nbsp;reproduced", "≈&nbsp;direction only", "✗&nbsp;not reproduced"))


def test_the_chapters_table_has_paper_ours_and_ratio(tree):
    assert "<td>2 ×</td><td>2.1 ×</td><td>1.05</td>" in claims_table("ring")._repr_html_()


def test_the_tables_words_count_the_verdicts(tree):
    assert claims_table().words == "3 claims: 1 reproduced, 1 direction only, 1 not reproduced."


def test_the_terminals_table_by_hand(tree):
    verdicts = [replace(v, seconds=0.0) for v in run_claims("pages", progress=False)]
    assert text.claims(verdicts) == (
        "kv_cache/pages\n"
        "  ≈ direction only: pages is faster (Table 1)\n"
        "      paper 2 ×   ours 1.2 ×   ratio 0.60   (0.0 s to measure)\n"
        "      ideal links\n"
        "1 claim: 1 direction only."
    )


def test_the_markdown_table_is_the_same_each_time(tree):
    assert markdown(run_claims(progress=False)) == markdown(run_claims(progress=False))


def test_a_bar_in_a_reason_does_not_break_the_markdown_table():
    row = markdown([verdict(9.0, value=1.0, why="a|b\nc")]).splitlines()[2]
    assert row.endswith("| a\\|b c |")


def test_markup_in_a_claim_is_escaped():
    assert "<i>fast" not in ClaimsTable([verdict(1.0, value=1.0, says="<i>fast")])._repr_html_()


def test_a_failed_claim_is_counted():
    assert summary([verdict(None, value=1.0)]) == "1 claim: 1 failed."


def test_no_claims_make_an_empty_table():
    assert summary([]) == "0 claims."
