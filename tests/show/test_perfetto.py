"""The Perfetto file is valid Chrome trace JSON and says what the trace says."""

import json
import subprocess
import sys
from collections import Counter

import jsonschema
import pytest

from toolkit.show import perfetto

# From "Trace Event Format" (Google, 2016): the event types that we write, and the fields each must have.
NUMBER, TEXT, WHOLE = {"type": "number"}, {"type": "string"}, {"type": "integer", "minimum": 0}
PLACE = {"name": TEXT, "pid": WHOLE, "tid": WHOLE}


def record(phase, **fields):
    fields = {"ph": {"const": phase}, **PLACE, **fields}
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


SCHEMA = {
    "type": "object",
    "required": ["traceEvents"],
    "properties": {
        "displayTimeUnit": {"enum": ["ms", "ns"]},
        "traceEvents": {
            "type": "array",
            "items": {
                "oneOf": [
                    record("X", cat=TEXT, ts=NUMBER, dur={"type": "number", "minimum": 0}, args={"type": "object"}),
                    record("M", args={"type": "object", "minProperties": 1}),
                    record("s", cat=TEXT, ts=NUMBER, id=WHOLE),
                    record("f", cat=TEXT, ts=NUMBER, id=WHOLE, bp={"const": "e"}),
                ]
            },
        },
    },
}


def events(run, phase):
    return [e for e in json.loads(perfetto.trace_json(run))["traceEvents"] if e["ph"] == phase]


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_the_file_satisfies_the_schema_of_the_format(ranks, ring_run):
    jsonschema.validate(json.loads(perfetto.trace_json(ring_run(ranks))), SCHEMA)


def test_the_schema_refuses_an_event_without_duration():
    broken = {"traceEvents": [{"ph": "X", "name": "a", "pid": 0, "tid": 0, "cat": "compute", "ts": 0, "args": {}}]}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, SCHEMA)


def test_there_is_one_track_a_rank_and_stream(ring_run):
    run = ring_run(4)
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events(run, "M") if e["name"] == "thread_name"}
    assert sorted((pid, name) for (pid, _), name in names.items()) == sorted({(e.rank, e.stream) for e in run.trace})


def test_every_event_lies_on_a_named_track(ring_run):
    run = ring_run(4)
    named = {(e["pid"], e["tid"]) for e in events(run, "M") if e["name"] == "thread_name"}
    assert {(e["pid"], e["tid"]) for e in events(run, "X")} == named


def test_a_rank_is_a_process_with_its_name(by_hand):
    names = {e["pid"]: e["args"]["name"] for e in events(by_hand, "M") if e["name"] == "process_name"}
    assert names == {0: "rank 0", 1: "rank 1"}


def test_times_are_microseconds(by_hand):
    last = events(by_hand, "X")[-1]
    assert (last["name"], last["ts"], last["dur"]) == ("block", 4000.0, 3000.0)


def test_a_message_shows_bytes_and_peer(by_hand):
    sent = next(e for e in events(by_hand, "X") if e["cat"] == "send")
    assert sent["args"] == {"bytes": 1000, "peer": 1, "posted_us": 2000.0}


def test_a_kernel_shows_bytes_and_flops(by_hand):
    assert events(by_hand, "X")[0]["args"] == {"bytes": 4000, "flops": 8000.0}


def test_every_event_of_the_trace_is_written_once(ring_run):
    run = ring_run(8)
    written = Counter((e["pid"], e["cat"], e["name"]) for e in events(run, "X"))
    assert written == Counter((e.rank, e.kind, e.name) for e in run.trace)


def test_an_arrow_leads_from_each_send_to_its_receive(ring_run):
    run = ring_run(4)
    starts, ends = ({e["id"]: e["pid"] for e in events(run, phase)} for phase in "sf")
    assert Counter((starts[i], ends[i]) for i in starts) == {(r, (r + 1) % 4): 3 for r in range(4)}


def test_events_of_one_track_never_overlap(ring_run):
    ends = {}
    for e in sorted(events(ring_run(8), "X"), key=lambda e: e["ts"]):
        assert e["ts"] >= ends.get((e["pid"], e["tid"]), 0.0) - 1e-5
        ends[e["pid"], e["tid"]] = e["ts"] + e["dur"]


def test_the_same_program_gives_the_same_bytes(ring_run, tmp_path):
    for name in "ab":
        ring_run(4).save_perfetto(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_picture_of_a_run_needs_no_matplotlib_and_no_widgets():
    code = "import sys, toolkit, toolkit.show.timeline, toolkit.show.text, toolkit.show.perfetto; "
    code += "sys.exit([m for m in ('matplotlib', 'ipywidgets') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True).stderr.strip() in ("", "[]")
