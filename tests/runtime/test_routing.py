"""Routing policies: which links a message uses, when it arrives, and what the max-min rates of sprayed flows are.

Rates are judged by a linear program: the lexicographic maximum of the sorted rates under the capacities.
"""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from toolkit.runtime import Cluster, errors, faults, hardware, like, network, routing, topology
from toolkit.runtime.hardware import Link
from toolkit.runtime.network import simulate

MB = 1_000_000
PORT = Link(10e9, 1e-6)  # 1 MB takes 100 µs
FABRIC = topology.leaf_spine(4, 4, 4, PORT)
NEXT_RACK = [(a, (a + 4) % 16, MB, 0.0) for a in range(16)]
POLICIES = {
    "shortest": routing.shortest,
    "ecmp": routing.ecmp,
    "spray": routing.spray,
    "split": lambda machine: routing.split(machine, 4),
    "explicit": lambda machine: routing.explicit(machine, {(0, 4): [0, "leaf0", "spine3", "leaf1", 4]}),
}


def paths_of(machine, a, b):
    """The flows of a message as lists of lists of nodes."""
    return [[[a, *(v for _, v in edges)] for edges in paths] for paths in machine.flows(a, b)]


# ---- which links ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("pair", [(0, 1), (0, 4), (5, 15), (3, 3)])
def test_a_policy_uses_paths_of_equal_cost_only(policy, pair):
    allowed = FABRIC.alternatives(*pair)
    assert all(path in allowed for paths in paths_of(policy(FABRIC), *pair) for path in paths)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_shares_of_a_message_are_conserved_at_every_node(policy):
    balance = {0: -1, 4: 1}
    for (u, v), share in policy(FABRIC).carried(0, 4).items():
        balance[u] = balance.get(u, 0) + share
        balance[v] = balance.get(v, 0) - share
    assert set(balance.values()) == {0}


def test_shortest_sends_a_whole_rack_over_one_spine():
    machine = routing.shortest(FABRIC)
    assert {path[2] for a in range(4) for (path,) in paths_of(machine, a, a + 4)} == {"spine0"}


def test_ecmp_depends_on_the_seed_and_on_nothing_else():
    def picks(seed):
        return [paths_of(routing.ecmp(FABRIC, seed), a, b) for a, b, _, _ in NEXT_RACK]

    assert picks(1) == picks(1)
    assert picks(1) != picks(2)


def test_ecmp_spreads_many_pairs_evenly():
    machine = routing.ecmp(topology.leaf_spine(2, 100, 4, PORT))
    used = [paths_of(machine, a, b)[0][0][2] for a in range(100) for b in range(100, 200)]
    counts = np.unique(used, return_counts=True)[1]
    assert abs(counts / 2500 - 1).max() < 0.1  # five standard deviations of a fair draw are 0.09


def test_the_parts_of_a_split_message_are_hashed_one_by_one():
    flows = paths_of(routing.split(FABRIC, 64), 0, 4)
    assert len(flows) == 64 and len({paths[0][2] for paths in flows}) == 4


def test_explicit_leaves_other_pairs_as_they_were():
    machine = POLICIES["explicit"](FABRIC)
    assert paths_of(machine, 0, 4)[0][0][2] == "spine3"
    assert paths_of(machine, 1, 5) == paths_of(FABRIC, 1, 5)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ([0, "leaf0", "spine1", "leaf1", 5], "must begin and end"),
        ([], "must begin and end"),
        ([0, "leaf0", "leaf1", 4], "'leaf0' → 'leaf1'"),
    ],
)
def test_an_impossible_path_is_refused_by_name(path, words):
    with pytest.raises(errors.ShapeError, match=words):
        routing.explicit(FABRIC, {(0, 4): path})


def test_a_message_cannot_be_split_into_nothing():
    with pytest.raises(errors.ShapeError, match="0 flows"):
        routing.split(FABRIC, 0)


# ---- when it arrives -----------------------------------------------------------------------------------------------


def test_one_path_for_a_rack_takes_as_long_as_its_devices_one_after_the_other():
    assert simulate(routing.shortest(FABRIC), NEXT_RACK) == pytest.approx(np.full(16, 4e-6 + 4 * 100e-6))


def test_spraying_over_a_full_fabric_takes_as_long_as_one_device_alone():
    assert simulate(routing.spray(FABRIC), NEXT_RACK) == pytest.approx(np.full(16, 4e-6 + 100e-6))


@pytest.mark.parametrize("oversubscription", [2, 4, 8])
def test_spraying_over_an_oversubscribed_fabric_takes_the_ratio_of_it(oversubscription):
    machine = routing.spray(topology.leaf_spine(4, 4, 3, PORT, oversubscription=oversubscription))
    assert simulate(machine, NEXT_RACK) == pytest.approx(np.full(16, 4e-6 + oversubscription * 100e-6))


def test_a_hash_arrives_when_its_busiest_link_lets_it():
    machine = routing.ecmp(FABRIC)
    load = {}
    for a, b, _, _ in NEXT_RACK:
        for edge in machine.route(a, b):
            load[edge] = load.get(edge, 0) + 1
    assert simulate(machine, NEXT_RACK).max() == pytest.approx(4e-6 + max(load.values()) * 100e-6)


def test_a_split_message_arrives_with_its_last_part():
    machine = routing.split(FABRIC, 3, seed=5)
    parts = [routing.explicit(FABRIC, {(0, 4): flow[0]}) for flow in paths_of(machine, 0, 4)]
    crowd = [(1, 5, MB, 0.0), (2, 6, 3 * MB, 20e-6)]
    whole = simulate(machine, [(0, 4, 3 * MB, 0.0)])[0]
    tally = {}
    for part in parts:
        for edge in part.route(0, 4):
            tally[edge] = tally.get(edge, 0) + 1
    assert whole == pytest.approx(4e-6 + max(tally.values()) * 100e-6)
    assert simulate(machine, [(0, 4, 3 * MB, 0.0), *crowd])[0] >= whole


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_message_of_no_bytes_takes_its_latency(policy):
    assert simulate(policy(FABRIC), [(0, 4, 0, 0.0)]) == pytest.approx([4e-6])


def test_the_cap_of_a_link_bounds_the_part_of_a_flow_that_crosses_it():
    capped = topology.leaf_spine(2, 1, 2, Link(10e9), Link(10e9, flow_cap=2e9))
    assert simulate(capped, [(0, 1, MB, 0.0)]) == pytest.approx([500e-6])
    assert simulate(routing.spray(capped), [(0, 1, MB, 0.0)]) == pytest.approx([250e-6])


# ---- sprayed flows are max-min fair --------------------------------------------------------------------------------


def fair_rates(machine, pairs):
    """Lexicographic max-min rates by linear programs: raise all, settle who cannot rise further, go on."""
    capacity, uses = {}, []
    for a, b in pairs:
        uses.append({})
        for edge, share in machine.carried(a, b).items():
            medium = machine.medium(*edge)
            uses[-1][medium] = uses[-1].get(medium, 0) + float(share)
            capacity[medium] = machine.link(*edge).bandwidth / 1e9
    media, n = list(capacity), len(pairs)
    load = np.array([[use.get(m, 0.0) for use in uses] for m in media])
    room = np.array([capacity[m] for m in media])
    rates, settled = np.zeros(n), np.zeros(n, bool)

    def best(gain, floor):
        """Largest gain·rates with each rate at least its floor; settled ones stay."""
        bounds = [(rates[i], rates[i]) if settled[i] else (floor, None) for i in range(n)]
        return linprog(-gain, A_ub=load, b_ub=room, bounds=bounds, method="highs")

    while not settled.all():
        rising = ~settled
        below = np.r_[np.zeros(len(media)), np.ones(rising.sum())]  # the level lies below every rate that still rises
        rows = np.hstack([np.vstack([load, -np.eye(n)[rising]]), below[:, None]])
        bounds = [(rates[i], rates[i]) if settled[i] else (0, None) for i in range(n)] + [(0, None)]
        level = -linprog(np.r_[np.zeros(n), -1], rows, np.r_[room, np.zeros(rising.sum())], bounds=bounds).fun
        stuck = [i for i in np.flatnonzero(rising) if -best(np.eye(n)[i], level * (1 - 1e-9)).fun < level * (1 + 1e-6)]
        rates[stuck], settled[stuck] = level, True
    return rates * 1e9


@st.composite
def fabrics_and_pairs(draw):
    gb = st.sampled_from([1e9, 3e9, 10e9])
    leaves, per_leaf, spines = draw(st.integers(2, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    duplex = draw(st.booleans())
    port, uplink = (Link(draw(gb), duplex=duplex) for _ in range(2))
    machine = topology.leaf_spine(leaves, per_leaf, spines, port, uplink)
    device = st.integers(0, leaves * per_leaf - 1)
    pairs = draw(st.lists(st.tuples(device, device).filter(lambda p: p[0] != p[1]), min_size=1, max_size=6))
    return routing.spray(machine), pairs


@given(fabrics_and_pairs())
@settings(max_examples=60, deadline=None)
def test_rates_of_sprayed_flows_equal_the_linear_program(case):
    machine, pairs = case
    rates = fair_rates(machine, pairs)
    sizes = rates * 1e-3  # so that all end together after 1 ms, if the rates are right
    finish = simulate(machine, [(a, b, size, 0.0) for (a, b), size in zip(pairs, sizes, strict=True)])
    assert finish == pytest.approx(np.full(len(pairs), 1e-3), rel=1e-6)


# ---- programs ------------------------------------------------------------------------------------------------------


def to_the_next_rack(comm, x):
    return comm.ishift(x, by=4).wait()


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_program_gives_the_same_results_under_every_policy(policy):
    x = np.arange(16.0)
    run = Cluster(policy(FABRIC)).run(lambda comm: to_the_next_rack(comm, x[comm.rank : comm.rank + 1].copy()))
    assert np.array_equal(run.gather(), np.roll(x, 4))


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_the_bytes_of_the_uplinks_add_up_to_what_leaves_the_racks(policy):
    run = Cluster(policy(FABRIC)).run(to_the_next_rack, like(1000, "uint8"))
    up = sum(n for (u, v), n in run.traffic.by_link.items() if str(v).startswith("spine"))
    assert up == 16 * 1000


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_program_takes_as_long_as_its_raw_flows(policy):
    machine = policy(FABRIC)
    run = Cluster(machine, hardware.IDEAL).run(to_the_next_rack, like(MB, "uint8"))
    assert run.makespan == pytest.approx(simulate(machine, NEXT_RACK).max(), rel=1e-12)


def test_a_dead_link_under_one_part_of_a_split_message_is_named():
    machine = routing.split(FABRIC, 16)
    cluster = Cluster(machine, faults=[faults.DeadLink("leaf0", "spine2")])
    with pytest.raises(errors.LinkDown, match=r"leaf0 → spine2"):
        cluster.run(to_the_next_rack, like(MB, "uint8"))


def test_jitter_delays_each_part_of_a_split_message():
    cluster = Cluster(routing.split(FABRIC, 4), hardware.IDEAL, faults=[faults.Jitter(1, 0.5, messages=True)])
    still = Cluster(routing.split(FABRIC, 4), hardware.IDEAL)
    jittery, calm = (c.run(to_the_next_rack, like(MB, "uint8")).makespan for c in (cluster, still))
    assert jittery != calm


def test_a_routed_machine_is_a_new_one():
    before = paths_of(FABRIC, 0, 7)
    routing.spray(FABRIC)
    assert paths_of(FABRIC, 0, 7) == before
    assert all(FABRIC.graph.has_edge(*edge) for path in before[0] for edge in pairwise(path))


@given(fabrics_and_pairs())
@settings(max_examples=30, deadline=None)
def test_rates_say_what_the_linear_program_says(case):
    machine, pairs = case
    assert network.rates(machine, pairs) == pytest.approx(fair_rates(machine, pairs), rel=1e-6)


def test_the_rate_of_a_split_message_is_the_sum_of_its_flows():
    narrow = topology.leaf_spine(2, 1, 4, Link(10e9), Link(1e9))
    paths = {path[0][2] for path in paths_of(routing.split(narrow, 16), 0, 1)}
    assert network.rates(routing.split(narrow, 16), [(0, 1)]) == pytest.approx([len(paths) * 1e9])
