"""The fluid network against SimGrid 3.32, which shares no code with ours (Casanova et al. 2014).

Both simulate the same machines and flows, random graphs and the book's fabrics; finish times agree to 1e-6. SimGrid's
CM02 gives a flow bandwidth in inverse proportion to its latency, ours gives equal shares; so every flow gets an access
link that brings its latency to the same sum, and the two models are one. Skips where no Python on this machine has
SimGrid's bindings.
"""

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from math import inf
from pathlib import Path

import networkx as nx
import numpy as np
import pytest

from toolkit.runtime import Topology, topology
from toolkit.runtime.hardware import Link
from toolkit.runtime.network import simulate
from toolkit.runtime.topology.graph import join

SCRIPT = Path(__file__).with_name("simgrid_flows.py")
LATENCY = 1e-3  # of every route, access link included
RANDOM = 60  # seeds below build random graphs, seeds from here on the book's fabrics with random links
SEEDS = range(RANDOM + 40)
BUILD = {
    "torus": lambda link: topology.torus((3, 3), link),
    "leaf-spine": lambda link: topology.leaf_spine(3, 3, 2, link),
    "fat tree": lambda link: topology.fat_tree(4, link),
    "dragonfly": lambda link: topology.dragonfly(4, 3, 1, link, cables=2),
    "rails": lambda link: topology.rail_optimised(3, 3, link, link),
}
FABRICS = list(BUILD)


def python_with_simgrid():
    """The first Python that imports simgrid: this one, or the system's."""
    for python in (sys.executable, shutil.which("python3"), shutil.which("python3", path=os.defpath)):
        if python and not subprocess.run([python, "-c", "import simgrid"], capture_output=True).returncode:
            return python


def problem(seed):
    """A machine with random links and up to 30 flows on it. Every flow enters through an access link of its own."""
    rng = np.random.default_rng(seed)
    name = FABRICS[seed % len(FABRICS)] if seed >= RANDOM else "random"
    machine = random_graph(rng) if name == "random" else random_links(BUILD[name](Link(1e9)), rng)
    graph, ranks, flows, ways = machine.graph, machine.ranks, [], {}
    for i in range(int(rng.integers(1, 31))):
        a, b = map(int, rng.choice(len(ranks), 2, replace=False))
        ways[f"access {i}"] = machine.default(a, b)
        within = sum(graph.edges[edge]["link"].latency for edge in pairwise(ways[f"access {i}"]))
        graph.add_edge(f"access {i}", a, link=Link(1e13, LATENCY - within))
        flows.append((f"access {i}", b, int(rng.integers(1, 20e6)), float(rng.choice([0.0, rng.uniform(0, 0.05)]))))
    return Topology(name, graph, tuple(graph), lambda access, _: [access, *ways[access]]), flows


def random_graph(rng):
    """A tree of 2 to 8 devices and a few links more."""
    n = int(rng.integers(2, 9))
    graph = nx.DiGraph()
    graph.add_nodes_from(range(n))
    tree = [(int(rng.integers(b)), b) for b in range(1, n)]
    more = [tuple(sorted(map(int, rng.choice(n, 2, replace=False)))) for _ in range(n // 2)]
    for u, v in {*tree, *more}:
        join(graph, u, v, random_link(rng))
    return Topology("random", graph, tuple(range(n)))


def random_link(rng):
    cap = float(rng.choice([inf, 0.3e9]))
    return Link(float(rng.uniform(0.1e9, 2e9)), float(rng.uniform(0, 1e-4)), bool(rng.integers(2)), cap)


def random_links(machine, rng):
    """The machine with another link in place of each; some share a medium now."""
    for u, v in dict.fromkeys(tuple(sorted(edge, key=str)) for edge in machine.graph.edges):
        join(machine.graph, u, v, random_link(rng))
    return machine


def told(machine, flow, number):
    """One problem's links and one flow as the script takes them; names carry the problem's number.

    A flow's own cap becomes a link that nobody else uses.
    """
    edges = machine.route(*flow[:2])
    links = [machine.link(*edge) for edge in edges]
    names = [
        f"{number}: {edge if link.duplex else sorted(edge, key=str)}" for edge, link in zip(edges, links, strict=True)
    ]
    table = {name: [link.bandwidth, link.latency] for name, link in zip(names, links, strict=True)}
    cap = min(link.flow_cap for link in links)
    if cap < inf:
        names.append(f"{number}: cap of {flow[0]}")
        table[names[-1]] = [cap, 0.0]
    return table, [names, flow[2], flow[3]]


@pytest.fixture(scope="module")
def simgrid_times():
    """Finish times of all problems, from one SimGrid run: the machines do not touch."""
    python = python_with_simgrid()
    if python is None:
        pytest.skip("no Python here imports simgrid; install Debian's python3-simgrid to run this comparison")
    links, rows, owners = {}, [], []
    for seed in SEEDS:
        machine, flows = problem(seed)
        for flow in flows:
            table, row = told(machine, flow, seed)
            links |= table
            rows.append(row)
            owners.append(seed)
    done = subprocess.run(
        [python, SCRIPT], input=json.dumps({"links": links, "flows": rows}), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    times = np.array(json.loads(done.stdout))
    return {seed: times[np.array(owners) == seed] for seed in SEEDS}


@pytest.mark.parametrize("seed", SEEDS)
def test_finish_times_equal_simgrids(simgrid_times, seed):
    np.testing.assert_allclose(simulate(*problem(seed)), simgrid_times[seed], rtol=1e-6, atol=0)


def test_a_link_one_part_in_ten_thousand_faster_is_noticed(simgrid_times):
    machine, flows = problem(0)
    for u, v in machine.graph.edges:
        link = machine.link(u, v)
        machine.graph.edges[u, v]["link"] = Link(link.bandwidth * 1.0001, link.latency, link.duplex, link.flow_cap)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(simulate(machine, flows), simgrid_times[0], rtol=1e-6, atol=0)
