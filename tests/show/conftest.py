"""Fixtures for pictures: runs to draw, and readers of what was drawn."""

import re
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

from show.runs import computes, fake_run, message, ring, waits
from toolkit.runtime import Cluster, hardware, like, shard, topology


@pytest.fixture
def by_hand():
    """Rank 0 computes 0–2 ms and sends 1 kB; rank 1 computes 0–1, waits for it from 1 to 4, computes 4–7 ms."""
    events = [computes(0, "block", 0.0, 2e-3), computes(1, "block", 0.0, 1e-3), computes(1, "block", 4e-3, 7e-3)]
    events += message(0, 1, "kv", 2e-3, 4e-3, 1000, sent=2e-3, received=1e-3)
    events += [computes(0, "merge", 2e-3, 2.5e-3), waits(1, "kv", 1e-3, 4e-3)]
    return fake_run(events, 2, 7e-3, 3e-3)


@pytest.fixture(scope="session")
def ring_run():
    """ring_run(ranks): a shape-only ring attention of 24 000 tokens on a full mesh, communication-bound."""

    def make(ranks=8, program=ring):
        cluster = Cluster(topology.full_mesh(ranks, hardware.Link(25e9, 2e-6)), device=hardware.A100)
        q = like((32, 24000, 128), "float16")
        return cluster.run(program, shard(q, axis=1), shard(q, axis=1))

    return make


class Bar(NamedTuple):
    kind: str
    x: float
    y: float
    width: float
    note: str


@pytest.fixture(scope="session")
def bars_of():
    """bars_of(picture): the bars of a timeline's SVG, as drawn."""

    def read(picture):
        kinds = {"c": "compute", "w": "wait", "s": "send", "r": "recv"}
        found = []
        for group in ElementTree.fromstring(picture.svg).iter("g"):
            for path in group.iter("path") if group.get("class") in kinds else ():
                x, y, width = map(float, re.fullmatch(r"M(\S+) (\S+)h(\S+)", path.get("d")).groups())
                found.append(Bar(kinds[group.get("class")], x, y, width, path.find("title").text))
        return found

    return read


@pytest.fixture(scope="session")
def texts_of():
    """texts_of(picture): the words inside a picture, in drawing order."""
    return lambda picture: ["".join(t.itertext()) for t in ElementTree.fromstring(picture.svg).iter("text")]
