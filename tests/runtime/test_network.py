"""The fluid network against a slow reference in plain Python, and against what max-min fairness promises.

The reference fixes one flow or one link at a time and goes from event to event; it shares no code with the runtime.
"""

from itertools import pairwise
from math import inf

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.runtime import Cluster, Topology, errors, hardware, topology, wait_all
from toolkit.runtime.hardware import Link
from toolkit.runtime.network import simulate

MB = 1_000_000
GB_S = 1e9  # bytes per second
many = settings(max_examples=60, deadline=None)


# ---- the reference -----------------------------------------------------------------------------------------------


def fair_rates(capacity, uses, cap):
    """Max-min fair rates: the scarcest link (or the flow with the smallest cap) is settled first, and so on.

    capacity  {medium: bytes/s}     uses  {flow: set of media}     cap  {flow: bytes/s}
    returns   {flow: bytes/s}
    """
    rates, room = {}, dict(capacity)
    while len(rates) < len(uses):
        open_flows = [f for f in uses if f not in rates]
        users = {m: [f for f in open_flows if m in uses[f]] for m in room}
        offers = [(room[m] / len(who), who) for m, who in users.items() if who]
        offers += [(cap[f], [f]) for f in open_flows]
        level, settled = min(offers, key=lambda offer: offer[0])
        for flow in settled:
            rates[flow] = level
            for medium in uses[flow]:
                room[medium] = max(0.0, room[medium] - level)
    return rates


def reference(machine, flows):
    """Finish times, and the history: a list of (from, to, {flow: rate})."""
    uses, cap, capacity, entry, left = {}, {}, {}, {}, {}
    for i, (a, b, nbytes, start) in enumerate(flows):
        edges = machine.route(a, b)
        links = [machine.link(*edge) for edge in edges]
        uses[i] = {machine.medium(*edge) for edge in edges}
        capacity |= {machine.medium(*edge): link.bandwidth for edge, link in zip(edges, links, strict=True)}
        cap[i] = min((link.flow_cap for link in links), default=inf)
        entry[i] = start + sum(link.latency for link in links)
        left[i] = float(nbytes)
    finish = [entry[i] if not uses[i] or not left[i] else None for i in uses]
    active, history = set(), []
    waiting = {i for i in uses if finish[i] is None}
    now = 0.0
    while waiting or active:
        rates = fair_rates(capacity, {i: uses[i] for i in sorted(active)}, cap)
        ends = {i: now + left[i] / rates[i] for i in active}
        then = min([*ends.values(), *(entry[i] for i in waiting)])
        history.append((now, then, rates))
        for i in sorted(active):
            left[i] -= rates[i] * (then - now)
            if ends[i] <= then * (1 + 1e-14):
                finish[i], left[i] = then, 0.0
                active.discard(i)
        now = then
        active |= {i for i in waiting if entry[i] <= now}
        waiting -= active
    return finish, history


# ---- random machines and flows -----------------------------------------------------------------------------------

links = st.builds(
    Link,
    bandwidth=st.sampled_from([1.0, 2.0, 3.0, 7.0]).map(GB_S.__mul__) | st.floats(0.1 * GB_S, 10 * GB_S),
    latency=st.sampled_from([0.0, 1e-6, 5e-6, 1e-3]),
    duplex=st.booleans(),
    flow_cap=st.sampled_from([inf, inf, 0.5 * GB_S]),
)


@st.composite
def machines(draw):
    """A random connected machine of 2 to 7 devices: a tree and a few links more."""
    n = draw(st.integers(2, 7))
    tree = [(draw(st.integers(0, b - 1)), b) for b in range(1, n)]
    device = st.integers(0, n - 1)
    more = draw(st.lists(st.tuples(device, device).filter(lambda pair: pair[0] != pair[1]), max_size=4))
    graph = nx.DiGraph()
    graph.add_nodes_from(range(n))
    for u, v in {tuple(sorted(edge)) for edge in tree + more}:
        link = draw(links)
        shared = {} if link.duplex else {"medium": frozenset((u, v))}
        graph.add_edge(u, v, link=link, **shared)
        graph.add_edge(v, u, link=link, **shared)
    return Topology("random", graph, tuple(range(n)))


@st.composite
def problems(draw):
    """(machine, flows): flows between any two devices, some at the same instant, some empty."""
    machine = draw(machines())
    device = st.integers(0, len(machine.ranks) - 1)
    nbytes = st.sampled_from([0, 1, MB, 2 * MB]) | st.integers(0, 5 * MB)
    start = st.sampled_from([0.0, 0.0, 1e-3]) | st.floats(0, 5e-3)
    return machine, draw(st.lists(st.tuples(device, device, nbytes, start), min_size=1, max_size=12))


@given(problems())
@settings(max_examples=150, deadline=None)
def test_finish_times_equal_the_reference(problem):
    expected, _ = reference(*problem)
    np.testing.assert_allclose(simulate(*problem), expected, rtol=1e-9, atol=0)


STANDARD = {
    "mesh": topology.full_mesh(8, Link(GB_S, 1e-6)),
    "ring": topology.ring(8, Link(GB_S, 1e-6)),
    "switch": topology.switch(8, Link(GB_S, 1e-6)),
    "pcie": topology.pcie_tree(2, 4, Link(GB_S, 1e-6, flow_cap=0.7 * GB_S)),
    "half-duplex pcie": topology.pcie_tree(2, 4, Link(GB_S, 1e-6, duplex=False), Link(3 * GB_S, 1e-6)),
    "two level": topology.two_level(2, 4, Link(5 * GB_S, 1e-6), Link(GB_S, 3e-6)),
    "two level, switched": topology.two_level(2, 4, Link(5 * GB_S, 1e-6), Link(GB_S, 3e-6), inside="switch"),
}


@pytest.mark.parametrize("machine", STANDARD.values(), ids=STANDARD)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=8, deadline=None)
def test_forty_flows_on_the_topologies_of_the_book_equal_the_reference(machine, seed):
    rng = np.random.default_rng(seed)
    flows = [
        (int(a), int(b), int(n), float(t))
        for a, b, n, t in zip(
            *rng.integers(0, 8, (2, 40)), rng.integers(0, 5 * MB, 40), rng.choice([0.0, 1e-3, 2.5e-3], 40), strict=True
        )
    ]
    expected, _ = reference(machine, flows)
    np.testing.assert_allclose(simulate(machine, flows), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("pattern", ["all pairs", "one receiver", "shift"])
def test_64_ranks_at_one_instant_equal_the_reference(pattern):
    machine = topology.switch(64, Link(GB_S, 1e-6))
    pairs = {
        "all pairs": [(a, b) for a in range(0, 64, 4) for b in range(0, 64, 4) if a != b],
        "one receiver": [(a, 0) for a in range(1, 64)],
        "shift": [(a, (a + 1) % 64) for a in range(64)],
    }[pattern]
    flows = [(a, b, MB + 1000 * a, 0.0) for a, b in pairs]
    np.testing.assert_allclose(simulate(machine, flows), reference(machine, flows)[0], rtol=1e-9, atol=0)


# ---- what max-min fairness promises: the certificate, on the rates behind these finish times ---------------------


@given(problems())
@many
def test_no_link_is_ever_over_its_capacity(problem):
    machine, flows = problem
    for _, _, rates in reference(*problem)[1]:
        load = {}
        for i, rate in rates.items():
            for medium in {machine.medium(*edge): edge for edge in machine.route(*flows[i][:2])}:
                load[medium] = load.get(medium, 0.0) + rate
        for u, v in machine.graph.edges:
            assert load.get(machine.medium(u, v), 0.0) <= machine.link(u, v).bandwidth * (1 + 1e-9)


@given(problems())
@many
def test_every_flow_is_held_back_by_a_full_link_where_nobody_is_faster_or_by_its_cap(problem):
    machine, flows = problem
    for _, _, rates in reference(*problem)[1]:
        on = {}
        for i in rates:
            for edge in machine.route(*flows[i][:2]):
                on.setdefault(machine.medium(*edge), set()).add(i)
        for i, rate in rates.items():
            route = machine.route(*flows[i][:2])
            capped = rate >= min(machine.link(*edge).flow_cap for edge in route) * (1 - 1e-9)
            bottleneck = any(
                sum(rates[j] for j in on[machine.medium(*edge)]) >= machine.link(*edge).bandwidth * (1 - 1e-9)
                and rate >= max(rates[j] for j in on[machine.medium(*edge)]) * (1 - 1e-9)
                for edge in route
            )
            assert capped or bottleneck


@given(problems())
@many
def test_every_byte_is_moved_by_the_time_a_flow_ends(problem):
    machine, flows = problem
    moved = [0.0] * len(flows)
    finish = simulate(*problem)
    for since, until, rates in reference(*problem)[1]:
        for i, rate in rates.items():
            moved[i] += rate * max(0.0, min(until, finish[i]) - since)
    expected = [n if machine.route(a, b) else 0 for a, b, n, _ in flows]
    np.testing.assert_allclose(moved, expected, rtol=1e-8, atol=1e-3)


def test_a_network_that_splits_every_link_evenly_is_caught():
    """Even shares leave capacity unused; max-min gives it to whoever can use it. Proof that the tests can fail."""
    machine = topology.ring(3, Link(GB_S))
    two_hops = Topology("line", machine.graph, machine.ranks, lambda a, b: list(range(a, b + 1)))
    flows = [(0, 2, MB, 0.0), (1, 2, MB, 0.0), (1, 2, MB, 0.0), (0, 1, MB, 0.0)]
    evenly = [MB / (GB_S / 3)] * 3 + [MB / (GB_S / 2)]
    assert simulate(two_hops, flows) == pytest.approx(reference(two_hops, flows)[0], rel=1e-9)
    assert simulate(two_hops, flows) != pytest.approx(evenly, rel=1e-3)


# ---- small cases by hand -----------------------------------------------------------------------------------------

PIPE = topology.full_mesh(2, Link(GB_S, 1e-6))


@pytest.mark.parametrize("n", [1, 2, 5, 100])
def test_n_equal_flows_take_n_times_as_long(n):
    assert simulate(PIPE, [(0, 1, MB, 0.0)] * n) == pytest.approx([1e-6 + n * 1e-3] * n, rel=1e-12)


def test_a_late_flow_takes_half_from_when_it_enters():
    # the first has moved 500 kB when the second enters; both then run at half speed until the first ends
    pipe = topology.full_mesh(2, Link(GB_S))
    assert simulate(pipe, [(0, 1, MB, 0.0), (0, 1, MB, 0.5e-3)]) == pytest.approx([1.5e-3, 2.0e-3], rel=1e-12)


def test_latency_adds_up_along_the_route_and_takes_no_bandwidth():
    line = topology.ring(6, Link(GB_S, 1e-4))
    assert simulate(line, [(0, 3, MB, 0.0)]) == pytest.approx([3e-4 + 1e-3], rel=1e-12)
    flows = [(0, 1, 100_000, 0.0), (0, 3, MB, 0.0)]  # the first is done when the second's latency is over
    assert simulate(line, flows) == pytest.approx([2e-4, 1.3e-3], rel=1e-12)


@given(problems())
@many
def test_a_flow_of_no_bytes_ends_after_its_latency_and_disturbs_nobody(problem):
    machine, flows = problem
    a, b = machine.ranks[0], machine.ranks[-1]
    finish = simulate(machine, [*flows, (a, b, 0, 1e-3)])
    latency = sum(machine.link(*edge).latency for edge in machine.route(a, b))
    assert finish[-1] == pytest.approx(1e-3 + latency, rel=1e-12)
    assert finish[:-1] == pytest.approx(simulate(machine, flows), rel=1e-12)


@pytest.mark.parametrize("duplex, expected", [(True, 1e-3), (False, 2e-3)])
def test_both_directions_share_a_half_duplex_link(duplex, expected):
    pipe = topology.full_mesh(2, Link(GB_S, duplex=duplex))
    assert simulate(pipe, [(0, 1, MB, 0.0), (1, 0, MB, 0.0)]) == pytest.approx([expected] * 2, rel=1e-12)


@pytest.mark.parametrize("flows, rate", [(1, 0.4), (2, 0.4), (4, 0.25)])
def test_a_flow_cap_holds_one_flow_back_and_leaves_the_rest_to_others(flows, rate):
    pipe = topology.full_mesh(2, Link(GB_S, flow_cap=0.4 * GB_S))
    assert simulate(pipe, [(0, 1, MB, 0.0)] * flows) == pytest.approx([MB / (rate * GB_S)] * flows, rel=1e-12)


def test_what_a_capped_flow_leaves_goes_to_the_others():
    graph = topology.switch(3, Link(GB_S)).graph.copy()
    graph.edges[0, "switch"]["link"] = Link(GB_S, flow_cap=0.2 * GB_S)
    machine = Topology("one slow port", graph, (0, 1, 2), lambda a, b: [a, "switch", b])
    finish = simulate(machine, [(0, 2, MB, 0.0), (1, 2, 4 * MB, 0.0)])
    assert finish == pytest.approx([5e-3, 5e-3], rel=1e-12)  # 0.2 and 0.8 of the port of device 2


@pytest.mark.parametrize("difference", [1e-3, 1e-5, 1e-8])
def test_two_links_of_almost_one_speed_keep_their_own(difference):
    graph = topology.full_mesh(3, Link(GB_S)).graph.copy()
    graph.edges[0, 2]["link"] = Link(GB_S * (1 + difference))
    machine = Topology("almost even", graph, (0, 1, 2), lambda a, b: [a, b])
    expected = [1e-3, 1e-3 / (1 + difference)]
    assert simulate(machine, [(0, 1, MB, 0.0), (0, 2, MB, 0.0)]) == pytest.approx(expected, rel=1e-9)


def test_a_link_without_limit_costs_latency_only():
    assert simulate(topology.full_mesh(2, Link(inf, 1e-6)), [(0, 1, MB, 0.0)] * 3).tolist() == [1e-6] * 3


def test_a_flow_to_oneself_takes_no_time():
    assert simulate(PIPE, [(0, 0, MB, 0.25)]).tolist() == [0.25]


def test_no_flows_is_no_times():
    assert simulate(PIPE, []).tolist() == []


# ---- laws --------------------------------------------------------------------------------------------------------

on_one_link = st.lists(
    st.tuples(st.just(0), st.just(1), st.integers(1, 5 * MB), st.floats(0, 5e-3)), min_size=1, max_size=10
)


@given(on_one_link)
@many
def test_a_shared_link_works_without_pause_until_all_bytes_are_through(flows):
    busy_until = 0.0  # the order of service does not matter for when the last byte leaves
    for _, _, nbytes, start in sorted(flows, key=lambda flow: flow[3]):
        busy_until = max(busy_until, start) + nbytes / GB_S
    assert simulate(topology.full_mesh(2, Link(GB_S)), flows).max() == pytest.approx(busy_until, rel=1e-9)


@given(on_one_link, st.integers(0, 5 * MB), st.floats(0, 5e-3))
@many
def test_a_flow_more_on_one_link_never_speeds_another_up(flows, nbytes, start):
    before = simulate(PIPE, flows)
    after = simulate(PIPE, [*flows, (0, 1, nbytes, start)])[:-1]
    assert (after >= before * (1 - 1e-9)).all()


@given(problems(), st.randoms(use_true_random=False))
@many
def test_permuting_the_flows_permutes_the_finish_times(problem, random):
    machine, flows = problem
    order = random.sample(range(len(flows)), len(flows))
    assert simulate(machine, [flows[i] for i in order]) == pytest.approx(simulate(machine, flows)[order], rel=1e-9)


@given(problems(), st.randoms(use_true_random=False))
@many
def test_new_names_for_the_devices_change_nothing(problem, random):
    machine, flows = problem
    names = dict(zip(machine.ranks, random.sample(machine.ranks, len(machine.ranks)), strict=True))
    graph = nx.relabel_nodes(machine.graph, names, copy=True)
    for u, v in graph.edges:  # a shared medium is named after its ends
        if "medium" in graph.edges[u, v]:
            graph.edges[u, v]["medium"] = frozenset((u, v))
    back = {new: old for old, new in names.items()}
    renamed = Topology(
        "renamed",
        graph,
        machine.ranks,
        lambda a, b: [names[node] for node in path_of(machine, back[a], back[b])],
    )
    finish = simulate(renamed, [(names[a], names[b], nbytes, start) for a, b, nbytes, start in flows])
    assert finish == pytest.approx(simulate(machine, flows), rel=1e-9)


def path_of(machine, a, b):
    """The nodes of a route."""
    return [a] + [v for _, v in machine.route(a, b)]


def test_permuting_the_ranks_of_a_program_permutes_its_trace():
    order = [2, 0, 3, 1]  # rank r plays the part of order[r]
    mesh = Cluster(topology.full_mesh(4, Link(GB_S, 1e-6)), device=hardware.IDEAL)

    def program(comm, parts):
        part = parts[comm.rank]
        if part == 0:
            wait_all([comm.irecv(source=parts.index(p)) for p in (1, 2, 3)])
        else:
            comm.sleep(1e-3 * part)
            comm.send(np.zeros(1000 * part), dest=parts.index(0))

    def told(run, parts):
        return sorted(
            (parts[e.rank], e.kind, e.start, e.end, e.bytes, -1 if e.peer < 0 else parts[e.peer]) for e in run.trace
        )

    plain = [0, 1, 2, 3]
    assert told(mesh.run(program, order), order) == told(mesh.run(program, plain), plain)


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes, start", [(-1, 0.0), (inf, 0.0), (float("nan"), 0.0), (1, -1.0), (1, inf)])
def test_impossible_flows_are_refused(nbytes, start):
    with pytest.raises(ValueError, match="bytes and start must be finite and at least 0"):
        simulate(PIPE, [(0, 1, nbytes, start)])


@pytest.mark.parametrize("machine", STANDARD.values(), ids=STANDARD)
@pytest.mark.parametrize("pair", [(0, 8), (99, 0), (99, 99), ("0", 1)], ids=str)
def test_an_unknown_device_is_refused_by_name(machine, pair):
    with pytest.raises(errors.ShapeError, match=f"{machine.name}.*no device"):
        simulate(machine, [(*pair, 1, 0.0)])


def test_a_missing_road_is_refused():
    graph = nx.DiGraph()
    graph.add_nodes_from([0, 1])
    with pytest.raises(errors.ShapeError, match="no route from 0 to 1"):
        simulate(Topology("islands", graph, (0, 1)), [(0, 1, 1, 0.0)])


@given(machines())
@many
def test_routes_are_chains_of_existing_links(machine):
    for a in machine.ranks:
        for b in machine.ranks:
            route = machine.route(a, b)
            assert all(machine.graph.has_edge(u, v) for u, v in route)
            assert all(first[1] == second[0] for first, second in pairwise(route))
            assert (route[0][0], route[-1][1]) == (a, b) if a != b else route == []
