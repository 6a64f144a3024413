"""Where to put a model, from the command line."""

import pytest

from toolkit.__main__ import main
from toolkit.model_parallel._megatron_scale import Job
from toolkit.model_parallel._planner import EFFICIENCY, GPTS, search


def test_place_prints_the_ten_fastest_and_why(capsys):
    main("place --model gpt-22b --cluster a100x8 --batch 4".split())
    out = capsys.readouterr().out
    best = search(Job(*GPTS["gpt-22b"], 4), 8, EFFICIENCY).steps[0].job
    first = next(line for line in out.splitlines() if line.startswith(" 1"))
    assert f"{best.t} × {best.p} × {best.d}" in first
    assert "1 against 10: " in out and " refused, " in out
    assert "-  " in out.split("Refused:")[1]


def test_place_says_when_nothing_fits(capsys):
    main("place --model gpt-1t --cluster a100x8 --batch 8".split())
    out = capsys.readouterr().out
    assert "No placement fits." in out and "needs more memory" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--model gpt-9b --cluster a100x8", "choose from gpt-22b"),
        ("--model gpt-22b --cluster a100", "as in a100x1024"),
        ("--model gpt-22b --cluster b200x8", "write a100 or h100"),
        ("--model gpt-22b --cluster a100x8 --batch 0", "--batch 0: give a whole number above 0"),
    ],
)
def test_bad_arguments_end_with_one_clear_line(capsys, arguments, words):
    with pytest.raises(SystemExit) as end:
        main(["place", *arguments.split()])
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert words in err and err.count("\n") == 1 and not out
