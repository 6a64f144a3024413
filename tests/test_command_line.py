"""The command line as a person at a terminal meets it."""

import json

import pytest

from toolkit.__main__ import main

A10 = "run token_ring --devices 4 --tokens 24000 --heads 32 --head-dim 128 --dtype float16 --device A10 --topology pcie"


def test_systems_lists_every_system_with_its_paper_and_chapter(capsys):
    main(["systems"])
    out = capsys.readouterr().out
    assert "TokenRing" in out and "2412.20501" in out and "notebooks/sequence_parallel/token_ring.md" in out


def test_run_compares_two_systems_and_writes_a_trace(capsys, tmp_path):
    file = tmp_path / "out.json"
    main([*A10.split(), "--shape-only", "--compare", "ring_attention", "--perfetto", str(file)])
    out = capsys.readouterr().out
    for word in ("step time", "exposed communication", "busiest link", "peak memory", "keys and values 295 MB"):
        assert word in out
    assert json.loads(file.read_text())["traceEvents"]


@pytest.mark.parametrize(
    "asked",
    ["token_ring --causal --layout zigzag", "ring_attention --causal --layout striped", "ulysses", "light_seq --causal",
     "lasp2 --causal", "lasp2:softmax_attention"],
)  # fmt: skip
def test_a_numeric_run_says_how_far_it_is_from_one_device(capsys, asked):
    main(f"run {asked} --tokens 64 --heads 4 --head-dim 8 --dtype float64".split())
    line = next(s for s in capsys.readouterr().out.splitlines() if "difference" in s)
    assert float(line.rsplit(" ", 1)[1]) < 1e-12


def test_bidirectional_ring_is_reached_by_its_function_name(capsys):
    main("run ring_attention:bidirectional_attention --tokens 64 --heads 2 --head-dim 8 --topology ring".split())
    assert "keys and values down" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("run token_rong", "token_ring"),
        ("run token_ring --devices 0", "above 0"),
        ("run token_ring --device B17", "A100"),
        ("run token_ring --devices 3 --topology pcie", "even"),
        ("run token_ring --tokens 9 --layout zigzag --causal", "pad to 16"),
        ("run ring_attention:nothing", "nothing"),
        ("run token_ring:attention_backward", "attention_backward"),
        ("run flash_attention", "ranks"),
        ("run ulysses --layout zigzag", "--layout"),
        ("run token_ring --heads 8 --kv-heads 3", "3"),
        ("run token_ring --bandwidth -1", "bandwidth"),
        ("claims --system nobody", "token_ring"),
        ("fly", "systems"),
    ],
)
def test_bad_arguments_end_with_one_clear_line_and_code_2(capsys, arguments, words):
    with pytest.raises(SystemExit) as end:
        main(arguments.split())
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert err.count("\n") == 1 and words in err and not out
