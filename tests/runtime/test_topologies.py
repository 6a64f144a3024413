"""Fabrics and named machines against closed formulas: links, hops, bisection, equal paths, finish times."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise, product
from math import comb, inf, prod

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.runtime import Cluster, errors, hardware, per_rank, topology
from toolkit.runtime.hardware import Link
from toolkit.runtime.network import simulate
from toolkit.runtime.topology import machines

MB = 1_000_000
LINK, WIDE = Link(1e9, 1e-6), Link(4e9, 1e-6)
M = 1e-3  # seconds of one MB on LINK

EVERY = {
    "torus": topology.torus((3, 4), LINK),
    "3-D torus": topology.torus((2, 3, 4), LINK),
    "leaf-spine": topology.leaf_spine(3, 4, 2, LINK),
    "fat tree": topology.fat_tree(4, LINK),
    "tapered fat tree": topology.fat_tree(4, LINK, oversubscription=3),
    "dragonfly": topology.dragonfly(5, 4, 2, LINK),
    "dragonfly, two cables": topology.dragonfly(4, 3, 2, LINK, cables=2),
    "rails, PXN": topology.rail_optimised(3, 4, WIDE, LINK),
    "rails and spines": topology.rail_optimised(3, 4, WIDE, LINK, spines=2, pxn=False),
    "Frontier": topology.frontier(2),
    "NVL72": topology.nvl72(),
    "racks": topology.nvl72(2),
    "memory": topology.with_memory(topology.two_level(2, 4, WIDE, LINK), LINK, LINK),
    "memory on a ring": topology.with_memory(topology.ring(8, LINK), LINK),
    "joined": topology.joined([topology.ring(5, LINK), topology.leaf_spine(2, 2, 2, LINK)], LINK),
}


def over(names):
    return pytest.mark.parametrize("machine", [EVERY[name] for name in names], ids=names)


each_machine = over(list(EVERY))


def nodes(machine, a, b):
    """The nodes of the default route, ends included."""
    return [a, *(v for _, v in machine.route(a, b))]


def cables(machine):
    assert all(machine.graph.has_edge(v, u) for u, v in machine.graph.edges)
    return machine.graph.number_of_edges() // 2


def hops(machine):
    return max(len(machine.route(a, b)) for a, b in product(machine.ranks, repeat=2))


def cut(machine, here):
    """Bytes/s from the devices `here` to all others: maximum flow, so no routing is assumed."""
    graph = nx.DiGraph()
    for u, v in machine.graph.edges:
        graph.add_edge(u, v, capacity=machine.link(u, v).bandwidth)
    for device in machine.ranks:
        graph.add_edge(*(("source", device) if device in here else (device, "sink")))
    return nx.maximum_flow_value(graph, "source", "sink")


def halves(machine):
    return cut(machine, set(machine.ranks[: len(machine.ranks) // 2]))


def loads(machine, pairs):
    """How many of the messages cross each link."""
    return Counter(edge for a, b in pairs for edge in machine.route(a, b))


def last(machine, pairs, nbytes=MB):
    """When the last of equal messages arrives that all start at 0."""
    return simulate(machine, [(a, b, nbytes, 0.0) for a, b in pairs]).max()


def everyone(n):
    return [(a, b) for a in range(n) for b in range(n) if a != b]


def shifted(n, by):
    return [(a, (a + by) % n) for a in range(n)]


def still(machine):
    """The same machine with no latency, so that times are bytes over bandwidth."""
    for u, v in machine.graph.edges:
        machine.graph.edges[u, v]["link"] = replace(machine.link(u, v), latency=0.0)
    return machine


# ---- every machine -----------------------------------------------------------------------------------------------


@each_machine
def test_devices_are_numbered_from_zero_and_everyone_can_reach_everyone(machine):
    assert machine.ranks == tuple(range(len(machine.ranks)))
    for a, b in product(machine.ranks, repeat=2):
        route = machine.route(a, b)
        assert all(machine.graph.has_edge(u, v) for u, v in route)
        assert len(set(nodes(machine, a, b))) == len(route) + 1
        assert nodes(machine, a, b)[-1] == b


@each_machine
def test_groups_hold_each_rank_once(machine):
    if machine.groups:
        assert sorted(rank for group in machine.groups for rank in group) == list(machine.ranks)
    else:
        assert "torus" in machine.name or "ring" in machine.name


@pytest.mark.parametrize(
    "machine", [m for m in EVERY.values() if m.paths], ids=[n for n, m in EVERY.items() if m.paths]
)
def test_equal_paths_are_different_chains_of_one_length_and_hold_the_default(machine):
    for a, b in product(machine.ranks, repeat=2):
        paths = machine.paths(a, b)
        assert nodes(machine, a, b) in paths
        assert len({tuple(path) for path in paths}) == len(paths)
        assert {(path[0], path[-1], len(path)) for path in paths} == {(a, b, len(paths[0]))}
        assert all(machine.graph.has_edge(u, v) for path in paths for u, v in pairwise(path))


@pytest.mark.parametrize("name", ["leaf-spine", "fat tree", "tapered fat tree"])
def test_the_closed_form_of_equal_paths_is_networkx_list_of_shortest_paths(name):
    machine = EVERY[name]
    for a, b in product(machine.ranks, repeat=2):
        assert sorted(machine.paths(a, b)) == sorted(nx.all_shortest_paths(machine.graph, a, b))


@pytest.mark.parametrize("name", ["torus", "3-D torus", "leaf-spine", "fat tree", "tapered fat tree", "NVL72"])
def test_the_default_route_has_the_fewest_hops(name):
    machine = EVERY[name]
    for a, b in product(machine.ranks, repeat=2):
        assert len(machine.route(a, b)) == nx.shortest_path_length(machine.graph, a, b)


@each_machine
def test_a_message_alone_takes_the_latencies_and_its_narrowest_link(machine):
    a, b = machine.ranks[0], machine.ranks[-1]
    links = [machine.link(*edge) for edge in machine.route(a, b)]
    expected = sum(link.latency for link in links) + MB / min(link.bandwidth for link in links)
    assert simulate(machine, [(a, b, MB, 0.0)])[0] == pytest.approx(expected, rel=1e-12)


# In the others two of a ring's messages meet.
ALONE = [name for name in EVERY if not name.startswith(("dragonfly", "rails and", "Frontier"))]


@over(ALONE)
def test_the_ring_of_ranks_shares_no_link_so_it_ends_when_its_slowest_message_would_alone(machine):
    pairs = shifted(len(machine.ranks), 1)
    assert max(loads(machine, pairs).values()) == 1
    assert last(machine, pairs) == pytest.approx(max(last(machine, [pair]) for pair in pairs), rel=1e-12)


@each_machine
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=5, deadline=None)
def test_no_pattern_is_faster_than_its_busiest_link(machine, seed):
    pairs = np.random.default_rng(seed).integers(0, len(machine.ranks), (20, 2)).tolist()
    bound = max((n * MB / machine.link(*edge).bandwidth for edge, n in loads(machine, pairs).items()), default=0.0)
    assert last(machine, pairs) >= bound * (1 - 1e-12)


@over([name for name in EVERY if name != "racks"])  # 144 ranks would add seconds and nothing else
@pytest.mark.parametrize("collective", ["all_reduce", "all_to_all"])
def test_collectives_give_the_right_numbers(machine, collective):
    n = len(machine.ranks)
    x = np.random.default_rng(n).normal(size=(n, n))
    program = {
        "all_reduce": lambda comm, x: comm.all_reduce(x),
        "all_to_all": lambda comm, x: comm.all_to_all(np.split(x, comm.size)),
    }
    run = Cluster(machine, hardware.IDEAL).run(program[collective], per_rank(list(x)))
    expected = [x.sum(axis=0)] * n if collective == "all_reduce" else x.T
    np.testing.assert_allclose([np.ravel(output) for output in run.outputs], expected, rtol=0, atol=1e-12)


def test_equal_paths_inside_a_node_do_not_leave_it():
    machine = topology.two_level(2, 4, WIDE, LINK, inside="switch")
    assert nx.shortest_path_length(machine.graph, 0, 1) == 2  # through the fabric it is two hops as well
    assert machine.alternatives(0, 1) == [[0, "switch0", 1]]


def test_a_backward_ring_has_no_second_way():
    assert topology.ring(6, LINK, backward=True).alternatives(0, 3) == [[0, 5, 4, 3]]
    assert len(topology.ring(6, LINK).alternatives(0, 3)) == 2


# ---- torus -------------------------------------------------------------------------------------------------------

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3)


@given(shapes)
@settings(max_examples=30, deadline=None)
def test_a_torus_has_a_cable_a_device_and_dimension_and_half_of_them_where_a_ring_has_two_devices(shape):
    machine, n = topology.torus(shape, LINK), prod(shape)
    assert cables(machine) == sum({1: 0, 2: n // 2}.get(length, n) for length in shape)


@given(shapes)
@settings(max_examples=30, deadline=None)
def test_a_torus_is_half_of_each_ring_across(shape):
    assert hops(topology.torus(shape, LINK)) == sum(length // 2 for length in shape)


@given(shapes)
@settings(max_examples=15, deadline=None)
def test_a_torus_corrects_one_dimension_after_the_other_and_never_returns_to_one(shape):
    machine = topology.torus(shape, LINK)
    places = np.array(np.unravel_index(range(prod(shape)), shape)).T
    for a, b in product(machine.ranks, repeat=2):
        axes = [int(np.flatnonzero(places[u] != places[v])[0]) for u, v in machine.route(a, b)]
        assert axes == sorted(axes)


def test_a_torus_of_one_dimension_is_the_ring():
    torus, ring = topology.torus((6,), LINK), topology.ring(6, LINK)
    assert {e: torus.route(*e) for e in everyone(6)} == {e: ring.route(*e) for e in everyone(6)}


@pytest.mark.parametrize("shape", [(4, 4), (8, 4), (4, 2, 2), (6, 5)], ids=str)
def test_bisection_of_a_torus_cuts_each_of_its_first_rings_twice(shape):
    assert halves(topology.torus(shape, LINK)) == 2 * prod(shape[1:]) * LINK.bandwidth


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (4, 3, 2)], ids=str)
def test_all_to_all_loads_each_link_of_a_torus_with_the_distances_round_its_ring(shape):
    n, machine = prod(shape), topology.torus(shape, LINK)
    places = np.array(np.unravel_index(range(n), shape)).T
    for (u, v), load in loads(machine, everyone(n)).items():
        axis = int(np.flatnonzero(places[u] != places[v])[0])
        length = shape[axis]
        forward = (places[v][axis] - places[u][axis]) % length == 1
        furthest = length // 2 if forward else (length - 1) // 2  # ties go forward
        assert load == n // length * comb(furthest + 1, 2)


@pytest.mark.parametrize("by", [1, 2, 3])
def test_a_shift_along_one_ring_of_a_torus_loads_its_links_with_the_distance(by):
    machine = still(topology.torus((4, 7), LINK))
    pairs = [(7 * row + c, 7 * row + (c + by) % 7) for row in range(4) for c in range(7)]
    assert last(machine, pairs) == pytest.approx(by * M, rel=1e-12)


def test_the_ring_of_ranks_passes_through_a_torus_without_sharing():
    machine = topology.torus((4, 4), LINK)
    assert max(loads(machine, shifted(16, 1)).values()) == 1
    assert last(machine, shifted(16, 1)) == pytest.approx(2e-6 + M, rel=1e-12)  # from row to row: down and round


# ---- leaf-spine --------------------------------------------------------------------------------------------------


def test_a_leaf_spine_has_a_port_a_device_and_a_link_from_every_leaf_to_every_spine():
    assert cables(topology.leaf_spine(5, 3, 4, LINK)) == 15 + 20


@pytest.mark.parametrize("ratio", [0.5, 1, 2, 7.5])
def test_oversubscription_is_what_a_leaf_takes_in_over_what_it_passes_up(ratio):
    machine = topology.leaf_spine(4, 6, 2, LINK, oversubscription=ratio)
    taken = sum(machine.link(a, "leaf0").bandwidth for a in range(6))
    passed = sum(machine.link("leaf0", f"spine{s}").bandwidth for s in range(2))
    assert taken / passed == pytest.approx(ratio, rel=1e-12)
    assert halves(machine) == pytest.approx(12 * LINK.bandwidth / max(1, ratio), rel=1e-9)


@pytest.mark.parametrize("ratio", [1, 1.1, 1.25, 2, 4])
def test_all_to_all_is_bound_by_ports_or_by_uplinks(ratio):
    leaves, per_leaf, n = 4, 4, 16
    machine = still(topology.leaf_spine(leaves, per_leaf, 4, LINK, oversubscription=ratio))
    expected = max(n - 1, ratio * (n - per_leaf)) * M
    assert last(machine, everyone(n)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("ratio", [1, 2, 3, 8])
def test_a_ring_sends_one_message_out_of_each_leaf_so_it_feels_only_the_width_of_one_uplink(ratio):
    machine = still(topology.leaf_spine(4, 4, 2, LINK, oversubscription=ratio))
    assert last(machine, shifted(16, 1)) == pytest.approx(max(1, ratio * 2 / 4) * M, rel=1e-12)


@pytest.mark.parametrize("senders", [1, 5, 11])
def test_incast_is_bound_by_the_receivers_port(senders):
    machine = still(topology.leaf_spine(3, 4, 4, LINK))
    assert last(machine, [(a, 0) for a in range(1, senders + 1)]) == pytest.approx(senders * M, rel=1e-12)


@pytest.mark.parametrize("by", range(1, 16))
@pytest.mark.parametrize("name", ["leaf-spine", "fat tree"])
def test_every_cyclic_shift_is_free_of_contention_without_oversubscription(name, by):
    machine = topology.leaf_spine(4, 4, 4, LINK) if name == "leaf-spine" else topology.fat_tree(4, LINK)
    assert max(loads(machine, shifted(16, by)).values()) == 1


def test_with_half_the_spines_some_shift_does_contend():
    machine = topology.leaf_spine(4, 4, 2, LINK)
    assert max(max(loads(machine, shifted(16, by)).values()) for by in range(1, 16)) == 2


# ---- fat tree ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 4, 6, 8])
def test_a_fat_tree_has_the_sizes_of_al_fares(k):
    machine = topology.fat_tree(k, LINK)
    kinds = Counter(str(node).rstrip("0123456789") for node in machine.graph)
    assert kinds == {"": k**3 // 4, "edge": k**2 // 2, "agg": k**2 // 2, "core": k**2 // 4}
    assert cables(machine) == 3 * k**3 // 4
    assert {d for node, d in machine.graph.out_degree if node not in machine.ranks} == {k}


@pytest.mark.parametrize(("k", "ratio"), [(4, 1), (4, 3), (6, 2), (8, 3), (8, 5 / 3)])
def test_every_switch_of_a_tapered_fat_tree_uses_all_its_ports_and_the_bisection_shrinks_by_the_ratio(k, ratio):
    machine = topology.fat_tree(k, LINK, oversubscription=ratio)
    assert {d for node, d in machine.graph.out_degree if node not in machine.ranks} == {k}
    assert halves(machine) == pytest.approx(len(machine.ranks) / 2 / ratio * LINK.bandwidth, rel=1e-9)


@pytest.mark.parametrize(("a", "b", "length", "count"), [(0, 1, 2, 1), (0, 2, 4, 2), (0, 4, 6, 4), (3, 15, 6, 4)])
def test_paths_of_a_fat_tree_climb_as_far_as_they_must(a, b, length, count):
    machine = topology.fat_tree(4, LINK)
    assert (len(machine.route(a, b)), len(machine.paths(a, b))) == (length, count)


@pytest.mark.parametrize("ratio", [1, 3])
def test_all_to_all_on_a_fat_tree_is_bound_by_ports_or_by_edge_uplinks(ratio):
    machine = still(topology.fat_tree(4, LINK, oversubscription=ratio))
    n, per_edge = len(machine.ranks), len(machine.groups[0])
    assert last(machine, everyone(n)) == pytest.approx(max(n - 1, ratio * (n - per_edge)) * M, rel=1e-9)


# ---- dragonfly ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("groups", "routers", "per", "count"), [(5, 4, 2, 1), (9, 4, 2, 1), (4, 3, 1, 2)])
def test_a_dragonfly_has_full_groups_and_its_cables_between_all_pairs_of_groups(groups, routers, per, count):
    machine = topology.dragonfly(groups, routers, per, LINK, cables=count)
    expected = groups * routers * per + groups * comb(routers, 2) + count * comb(groups, 2)
    assert cables(machine) == expected
    assert hops(machine) == 5


def test_the_balanced_dragonfly_of_kim_et_al_gives_each_router_as_many_cables_as_devices():
    h = 2  # a = 2p = 2h, g = a·h + 1
    machine = topology.dragonfly(2 * h * h + 1, 2 * h, h, LINK)
    degrees = {d for node, d in machine.graph.out_degree if node not in machine.ranks}
    assert len(machine.ranks) == 72 and degrees == {h + (2 * h - 1) + h}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_bisection_of_a_dragonfly_is_its_cables_between_the_halves(count):
    machine = topology.dragonfly(4, 3, 4, WIDE, WIDE, LINK, cables=count)
    assert halves(machine) == 4 * count * LINK.bandwidth


def test_a_whole_group_that_sends_to_the_next_shares_one_cable():
    machine = still(topology.dragonfly(4, 3, 2, LINK, WIDE, LINK))
    assert last(machine, shifted(24, 6)) == pytest.approx(6 * M, rel=1e-12)


@pytest.mark.parametrize("name", ["dragonfly", "dragonfly, two cables"])
def test_of_the_cables_between_two_groups_the_nearest_are_taken(name):
    machine = EVERY[name]
    group_of = {f"router{g}.{r}": g for g in range(5) for r in range(4)}
    for a, b in everyone(len(machine.ranks)):
        (first,), (last_,) = (machine.graph.successors(d) for d in (a, b))
        g, h = group_of[first], group_of[last_]
        across = [(u, v) for u, v in machine.graph.edges if (group_of.get(u), group_of.get(v)) == (g, h)]
        hops = [1 + (u != first) + (v != last_) for u, v in across] if g != h else [first != last_]
        assert len(machine.route(a, b)) == 2 + min(hops)
        if g != h:
            assert len(machine.alternatives(a, b)) == hops.count(min(hops))


def test_all_to_all_on_a_balanced_dragonfly_loads_ports_most():
    h, p, a = 2, 2, 4
    machine = topology.dragonfly(a * h + 1, a, p, LINK)
    group = {node: str(node).split(".")[0] for node in machine.graph}
    expected = {"port": 72 - 1, "local": p * p + 2 * p * h * a * p, "across": (a * p) ** 2}
    for (u, v), load in loads(machine, everyone(72)).items():
        port = u in machine.ranks or v in machine.ranks
        assert load == expected["port" if port else "local" if group[u] == group[v] else "across"]


def test_minimal_routing_crosses_one_cable_between_groups():
    machine = EVERY["dragonfly"]
    for a, b in everyone(40):
        groups = [node[6:].split(".")[0] for node in nodes(machine, a, b) if isinstance(node, str)]
        assert sum(u != v for u, v in pairwise(groups)) == (a // 8 != b // 8)


# ---- rails -------------------------------------------------------------------------------------------------------


def test_a_message_to_another_rail_leaves_through_the_gpu_of_that_rail():
    machine = topology.rail_optimised(2, 4, WIDE, LINK)
    assert nodes(machine, 1, 3) == [1, "nvswitch0", 3]
    assert nodes(machine, 1, 5) == [1, "rail1", 5]
    assert nodes(machine, 1, 6) == [1, "nvswitch0", 2, "rail2", 6]


def test_without_pxn_it_climbs_to_any_spine():
    machine = topology.rail_optimised(2, 4, WIDE, LINK, spines=3, pxn=False)
    assert machine.paths(1, 6) == [[1, "rail1", f"spine{s}", "rail2", 6] for s in range(3)]
    assert len(machine.paths(1, 5)) == len(machine.paths(1, 3)) == 1


@pytest.mark.parametrize(("nodes_", "gpus", "spines"), [(3, 4, 0), (4, 8, 4)])
def test_a_rail_machine_has_two_ports_a_gpu_and_its_spines(nodes_, gpus, spines):
    assert cables(topology.rail_optimised(nodes_, gpus, spines=spines)) == 2 * nodes_ * gpus + gpus * spines


@pytest.mark.parametrize("pxn", [True, False])
def test_all_to_all_over_rails_sends_through_each_nic_what_a_node_sends_to_that_rail(pxn):
    machine = still(topology.rail_optimised(3, 4, Link(100e9), LINK, spines=12, pxn=pxn))
    between = [(a, b) for a, b in everyone(12) if a // 4 != b // 4]
    assert last(machine, between) == pytest.approx(4 * 2 * M, rel=1e-9)


# ---- Frontier and NVL72 ------------------------------------------------------------------------------------------


def test_a_gcd_of_frontier_has_three_neighbours_and_reaches_all_others_in_two_hops():
    node = topology.frontier()
    assert {d for _, d in node.graph.out_degree} == {3}
    assert hops(node) == 2


@pytest.mark.parametrize(("a", "b", "gigabytes"), [(0, 1, 200), (2, 4, 100), (6, 0, 100), (0, 2, 50), (5, 7, 50)])
def test_links_inside_frontiers_node_are_as_published(a, b, gigabytes):
    assert topology.frontier().link(a, b).bandwidth == gigabytes * 1e9


def test_where_two_gcds_of_frontier_lie_between_two_others_both_ways_are_listed_and_equally_wide():
    node = topology.frontier()
    assert node.alternatives(0, 3) == [[0, 1, 3], [0, 2, 3]]
    for a, b in everyone(8):
        ways = node.alternatives(a, b)
        assert sorted(ways) == sorted(nx.all_shortest_paths(node.graph, a, b))
        assert len({min(node.link(*edge).bandwidth for edge in pairwise(way)) for way in ways}) == 1


def test_two_gcds_of_frontier_share_a_nic_and_a_node_sends_100_gigabytes_a_second():
    machine = still(topology.frontier(2))
    assert nodes(machine, 0, 9) == [0, 1, "nic0.0", "slingshot", "nic1.0", 9]
    assert last(machine, [(0, 8)]) == pytest.approx(MB / 25e9, rel=1e-12)
    assert last(machine, [(0, 8), (1, 9)]) == pytest.approx(2 * MB / 25e9, rel=1e-12)
    assert last(machine, shifted(16, 8)) == pytest.approx(8 * MB / 100e9, rel=1e-12)
    assert halves(machine) == pytest.approx(100e9, rel=1e-12)


def test_nvl72_is_130_terabytes_a_second_of_nvlink_both_ways():
    machine = topology.nvl72()
    total = sum(machine.link(a, "switch").bandwidth + machine.link("switch", a).bandwidth for a in machine.ranks)
    assert total == pytest.approx(130e12, rel=0.01)
    assert last(still(topology.nvl72()), everyone(72)) == pytest.approx(71 * MB / 900e9, rel=1e-9)


def test_racks_of_nvl72_meet_through_a_nic_for_each_gpu():
    machine = still(topology.nvl72(2))
    assert (len(machine.ranks), len(machine.groups)) == (144, 2)
    assert last(machine, shifted(144, 72)) == pytest.approx(MB / hardware.IB_NDR.bandwidth, rel=1e-12)


# ---- hosts and disks ---------------------------------------------------------------------------------------------


@over([name for name in EVERY if "memory" not in name])
def test_memory_leaves_all_routes_between_devices_as_they_were(machine):
    more = topology.with_memory(machine, Link(1e12), Link(1e12))
    some = [(a, b) for a, b in product(machine.ranks, repeat=2) if (a + b) % 7 == 0]
    assert [more.route(a, b) for a, b in some] == [machine.route(a, b) for a, b in some]


def test_equal_paths_do_not_take_the_way_through_the_host():
    ring = topology.ring(8, LINK)
    more = topology.with_memory(ring, LINK)
    assert nx.shortest_path_length(more.graph, 0, 4) == 2
    assert more.paths(0, 4) == [[0, 1, 2, 3, 4], [0, 7, 6, 5, 4]]


def test_each_device_has_its_own_link_to_its_host_and_all_share_the_disk():
    machine = topology.with_memory(topology.two_level(2, 4, WIDE, LINK), WIDE, Link(3e9), Link(1e9))
    assert nodes(machine, 5, "host1") == [5, "host1"]
    assert nodes(machine, "disk1", 5) == ["disk1", "host1", 5]
    machine = still(machine)
    assert last(machine, [(a, "host0") for a in range(4)]) == pytest.approx(MB / 4e9, rel=1e-12)
    assert last(machine, [("disk0", a) for a in range(4)]) == pytest.approx(4 * MB / 3e9, rel=1e-12)
    assert last(machine, [(a, "disk0") for a in range(4)]) == pytest.approx(4 * MB / 1e9, rel=1e-12)


def test_a_host_on_the_root_of_a_pcie_tree_is_shared_through_the_uplinks():
    machine = still(topology.with_memory(topology.pcie_tree(2, 2, LINK), LINK, at=[["root"]]))
    assert nodes(machine, 0, "host0") == [0, "pcie0", "root", "host0"]
    assert last(machine, [(0, "host0"), (1, "host0")]) == pytest.approx(2 * M, rel=1e-12)


# ---- several machines in one cluster -----------------------------------------------------------------------------


def test_joined_machines_number_their_devices_on_and_keep_their_own_routes():
    parts = [topology.ring(5, LINK), topology.switch(3, WIDE), topology.frontier()]
    machine = topology.joined(parts, LINK)
    assert machine.ranks == tuple(range(16))
    assert machine.groups == (tuple(range(5)), (5, 6, 7), tuple(range(8, 16)))
    assert nodes(machine, 0, 3) == [0, 4, 3]
    assert nodes(machine, 5, 7) == [5, "switch@1", 7]
    assert nodes(machine, 8, 15) == [8, 14, 15]
    assert nodes(machine, 2, 9) == [2, "gate0", "wan", "gate2", 9]


def test_devices_of_a_part_share_its_link_and_one_alone_fills_it():
    machine = still(topology.joined([topology.switch(4, WIDE)] * 3, LINK))
    assert last(machine, [(0, 4)]) == pytest.approx(M, rel=1e-12)
    assert last(machine, [(a, 4 + a) for a in range(4)]) == pytest.approx(4 * M, rel=1e-12)


def test_each_part_can_have_a_link_of_its_own_and_a_crossing_pays_both_latencies():
    links = [Link(2e9, 1e-3), Link(1e9, 5e-3)]
    machine = topology.joined([topology.switch(2, WIDE)] * 2, links)
    assert last(machine, [(0, 2)]) == pytest.approx(6e-3 + M, rel=1e-12)


def test_a_shared_medium_stays_shared_and_parts_do_not_share_with_one_another():
    bus = topology.pcie_tree(1, 2, Link(1e9, duplex=False))
    machine = topology.joined([bus, bus], WIDE)
    assert machine.medium(0, "pcie0@0") == machine.medium("pcie0@0", 0) != machine.medium(2, "pcie0@1")


def test_different_devices_in_one_cluster_add_up_the_same_numbers():
    machine = topology.joined([topology.switch(4, hardware.NVLINK4), topology.pcie_tree(2, 2, hardware.PCIE4)], LINK)
    cluster = Cluster(machine, [hardware.H100] * 4 + [hardware.A10] * 4)
    x = np.random.default_rng(0).normal(size=(8, 10))
    run = cluster.run(lambda comm, x: comm.all_reduce(x, algorithm="hierarchical"), per_rank(list(x)))
    np.testing.assert_allclose(run.outputs, [x.sum(axis=0)] * 8, rtol=0, atol=1e-12)


# ---- bad arguments -----------------------------------------------------------------------------------------------

BAD = {
    "no lengths": (lambda: topology.torus((), LINK), r"shape=\(\)"),
    "a number for a shape": (lambda: topology.torus(4, LINK), "shape=4"),
    "a length of zero": (lambda: topology.torus((4, 0), LINK), "shape=0.*at least 1 device"),
    "no spine": (lambda: topology.leaf_spine(2, 2, 0, LINK), "spines=0.*at least 1 spine"),
    "negative twice": (lambda: topology.pcie_tree(-2, -2, LINK), "switches=-2"),
    "half a leaf": (lambda: topology.leaf_spine(2.5, 2, 1, LINK), "leaves=2.5"),
    "True for a count": (lambda: topology.ring(True, LINK), "n=True"),
    "two ways to say it": (lambda: topology.leaf_spine(2, 2, 2, LINK, WIDE, oversubscription=2), "one of the two"),
    "a ratio of zero": (lambda: topology.leaf_spine(2, 2, 2, LINK, oversubscription=0), "oversubscription=0"),
    "odd ports": (lambda: topology.fat_tree(5, LINK), "k=5.*even"),
    "one port": (lambda: topology.fat_tree(1, LINK), "k=1.*at least 2 ports"),
    "a ratio that ports cannot make": (lambda: topology.fat_tree(8, LINK, oversubscription=2), "1, 1.66667, 3, 7"),
    "more cables than routers": (lambda: topology.dragonfly(3, 2, 1, LINK, cables=3), "cables=3.*2 routers"),
    "rails that nothing joins": (lambda: topology.rail_optimised(2, pxn=False), "spines=0 with pxn=False"),
    "no node of Frontier": (lambda: topology.frontier(0), "nodes=0"),
    "no rack": (lambda: topology.nvl72(0), "racks=0.*at least 1 rack"),
    "a number for a link": (lambda: topology.torus((2, 2), 1e9), "1000000000.0 between 0 and 2 is no link"),
    "memory twice": (lambda: topology.with_memory(EVERY["memory"], LINK), "'host0' already"),
    "a host on nothing": (lambda: topology.with_memory(topology.ring(3, LINK), LINK, at=[["root"]]), "no node 'root'"),
    "nothing to join": (lambda: topology.joined([], LINK), "at least one"),
    "links for other parts": (lambda: topology.joined([topology.ring(3, LINK)], [LINK, LINK]), "each of the 1 parts"),
}


@pytest.mark.parametrize(("build", "words"), BAD.values(), ids=BAD)
def test_a_machine_that_cannot_be_is_refused_by_the_value(build, words):
    with pytest.raises(errors.ShapeError, match=words):
        build()


def test_an_unknown_node_is_refused():
    with pytest.raises(errors.ShapeError, match="has no device 'host0'"):
        topology.ring(3, LINK).route(0, "host0")


def test_a_copy_with_another_path_forgets_the_old_routes():
    machine = topology.ring(5, LINK)
    assert len(machine.route(0, 4)) == 1
    other = replace(machine, path=lambda a, b: list(range(a, b + 1)))
    assert len(other.route(0, 4)) == 4


@pytest.mark.parametrize(
    "link", [machines.SLINGSHOT, machines.GCD_TO_HOST, machines.NVLINK_C2C, machines.FRONTIER_READ]
)
def test_links_of_the_named_machines_can_be_used(link):
    assert 0 < link.bandwidth < inf and 0 < link.latency < inf
