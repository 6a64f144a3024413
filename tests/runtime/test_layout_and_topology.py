"""Who holds which tokens, which links a message crosses, what a shape-only array is, what hardware may be."""

from collections import Counter
from itertools import pairwise
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from toolkit.runtime import Cluster, errors, hardware, is_shape_only, like, per_rank, positions, shard, topology
from toolkit.runtime.hardware import Device, Link

LAYOUTS = ("contiguous", "zigzag", "striped")
FAST, SLOW = Link(4e9, 1e-6), Link(1e9, 3e-6)


def mesh(ranks):
    return Cluster(topology.full_mesh(ranks, FAST), device=hardware.IDEAL)


def identity(comm, x):
    return x


# ---- layouts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout, ranks, n, expected",
    [
        ("contiguous", 3, 7, [[0, 1, 2], [3, 4], [5, 6]]),
        ("contiguous", 4, 2, [[0], [1], [], []]),
        ("zigzag", 2, 8, [[0, 1, 6, 7], [2, 3, 4, 5]]),
        ("zigzag", 3, 6, [[0, 5], [1, 4], [2, 3]]),
        ("striped", 3, 6, [[0, 3], [1, 4], [2, 5]]),
    ],
)
def test_positions_by_hand(layout, ranks, n, expected):
    assert [positions(layout, r, ranks, n).tolist() for r in range(ranks)] == expected


@pytest.mark.parametrize("layout", LAYOUTS)
@given(ranks=st.integers(1, 17), chunk=st.integers(0, 4))
@settings(max_examples=25, deadline=None)
def test_every_token_is_held_once(layout, ranks, chunk):
    n = 2 * ranks * chunk
    assert sorted(np.concatenate([positions(layout, r, ranks, n) for r in range(ranks)])) == list(range(n))


@given(ranks=st.integers(1, 17), n=st.integers(0, 60))
@settings(max_examples=50, deadline=None)
def test_contiguous_parts_differ_by_one_token_at_most_and_the_first_are_longer(ranks, n):
    counts = [len(positions("contiguous", r, ranks, n)) for r in range(ranks)]
    assert counts == sorted(counts, reverse=True)
    assert sum(counts) == n and max(counts) - min(counts) <= 1


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_zigzag_gives_every_rank_the_same_causal_work(ranks):
    n = 2 * ranks * 3
    work = [int((positions("zigzag", r, ranks, n) + 1).sum()) for r in range(ranks)]  # query i sees i + 1 keys
    assert len(set(work)) == 1


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("layout", LAYOUTS)
@given(ranks=st.integers(1, 9), chunk=st.integers(1, 3))
@settings(max_examples=10, deadline=None)
def test_gather_is_the_inverse_of_shard(layout, axis, ranks, chunk):
    shape = [2, 3, 2]
    shape[axis] = 2 * ranks * chunk
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    run = mesh(ranks).run(identity, shard(x, axis=axis, layout=layout))
    assert_array_equal(run.gather(axis=axis, layout=layout), x, strict=True)
    for r, mine in enumerate(run.outputs):
        assert_array_equal(mine, x.take(positions(layout, r, ranks, shape[axis]), axis))


@given(ranks=st.integers(1, 9), n=st.integers(0, 30))
@settings(max_examples=25, deadline=None)
def test_uneven_contiguous_parts_come_back_whole(ranks, n):
    x = np.arange(2.0 * n).reshape(n, 2)
    assert_array_equal(mesh(ranks).run(identity, shard(x)).gather(), x, strict=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", [1, -2])
def test_shards_of_a_shape_are_shapes(layout, axis):
    run = mesh(3).run(identity, shard(like((2, 12, 5), np.float16), axis=axis, layout=layout))
    whole = run.gather(axis=axis, layout=layout)
    assert [(a.shape, a.dtype, is_shape_only(a)) for a in run.outputs] == [((2, 4, 5), np.float16, True)] * 3
    assert (whole.shape, whole.dtype, is_shape_only(whole)) == ((2, 12, 5), np.float16, True)


def test_a_tuple_is_cut_and_joined_part_by_part():
    k, v = np.arange(6.0), np.arange(12.0).reshape(6, 2)
    run = mesh(3).run(identity, shard((k, v)))
    got_k, got_v = run.gather()
    assert_array_equal(got_k, k)
    assert_array_equal(got_v, v)
    assert_array_equal(run.output(0).values[1], [2, 3])


def test_shards_are_given_as_options_too():
    run = mesh(2).run(lambda comm, *, x: x, x=shard(np.arange(4)))
    assert_array_equal(run.outputs[1], [2, 3])


@pytest.mark.parametrize(
    "layout, ranks, n, words",
    [
        ("zigzag", 4, 25, ["25 tokens", "8 zigzag chunks", "4 ranks", "pad to 32", "contiguous"]),
        ("zigzag", 4, 4, ["4 tokens", "8 zigzag chunks", "pad to 8"]),
        ("striped", 4, 25, ["25 tokens", "4 striped", "pad to 28"]),
        ("spiral", 4, 24, ["'spiral'", "contiguous, zigzag, striped"]),
    ],
)
def test_a_count_that_does_not_divide_is_refused_by_name(layout, ranks, n, words):
    with pytest.raises(errors.ShapeError) as caught:
        mesh(ranks).run(identity, shard(np.zeros(n), layout=layout))
    assert [word for word in words if word not in str(caught.value)] == []


def test_an_axis_that_does_not_exist_is_refused_at_once():
    with pytest.raises(errors.ShapeError, match=r"axis 2 .*\(3, 4\)"):
        shard(np.zeros((3, 4)), axis=2)


def test_an_axis_that_does_not_exist_in_one_of_a_tuple_is_refused_at_once():
    with pytest.raises(errors.ShapeError, match=r"axis 1 .*\(3,\)"):
        shard((np.zeros((3, 4)), np.zeros(3)), axis=1)


def test_per_rank_needs_a_value_for_each_rank():
    with pytest.raises(errors.ShapeError, match=r"2 values .* 3 ranks"):
        mesh(3).run(identity, per_rank([1, 2]))


# ---- shape-only arrays -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template, dtype, shape, expected",
    [
        ((2, 3), None, (2, 3), np.float64),
        ((2, 3), "float16", (2, 3), np.float16),
        (5, np.int8, (5,), np.int8),
        (np.int64(5), None, (5,), np.float64),
        ((), np.float32, (), np.float32),
        (np.zeros((4, 0), np.complex64), None, (4, 0), np.complex64),
        (np.zeros(3, np.float32), np.float16, (3,), np.float16),
        ((2**20, 2**20, 128), np.float16, (2**20, 2**20, 128), np.float16),
    ],
    ids=["shape", "dtype by name", "length", "numpy length", "no axes", "of an array", "other dtype", "281 TB"],
)
def test_like_has_shape_and_dtype_and_no_strides(template, dtype, shape, expected):
    a = like(template, dtype)
    assert (a.shape, a.dtype, a.strides) == (shape, expected, (0,) * len(shape))
    assert is_shape_only(a)
    assert type(a) is np.ndarray


def test_like_of_a_nested_tuple_is_a_nested_tuple():
    a, (b, c) = like((np.zeros(2), (np.zeros((3, 4), np.float32), np.zeros(5))))
    assert [x.shape for x in (a, b, c)] == [(2,), (3, 4), (5,)]
    assert b.dtype == np.float32


VIEWS = {
    "slice": lambda a: a[1:3, ::2],
    "last element": lambda a: a[..., -1],
    "new axis": lambda a: a[:, None],
    "transpose": lambda a: a.T,
    "reshape": lambda a: a.reshape(-1, 2),
    "flat": lambda a: a.reshape(-1),
    "swapped": lambda a: a.swapaxes(0, 2),
    "split": lambda a: np.split(a, 2)[1],
    "empty slice": lambda a: a[:0],
    "broadcast": lambda a: np.broadcast_to(a, (7, 4, 6, 2)),
    "view of a view of a view": lambda a: a[1:].T[1:].reshape(-1)[2:],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_of_a_shape_are_shapes(view):
    real = view(np.zeros((4, 6, 2), np.float32))
    got = view(like((4, 6, 2), np.float32))
    assert (got.shape, got.dtype) == (real.shape, real.dtype)
    assert is_shape_only(got)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(3),
        np.zeros((3, 4))[1:],
        np.broadcast_to(np.zeros(1), (5,)),
        np.array(1.0),
        np.zeros(0),
        like(3) + 1,
        like(3).copy(),
    ],
    ids=["array", "view", "strides of zero", "no axes", "empty", "sum", "copy"],
)
def test_arrays_with_data_are_not_shape_only(array):
    assert not is_shape_only(array)


# ---- routes ------------------------------------------------------------------------------------------------------


def nodes(machine, a, b):
    """The nodes that a message from a to b passes, a and b included."""
    return [a] + [v for _, v in machine.route(a, b)]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_full_mesh_has_a_link_for_every_ordered_pair(n):
    machine = topology.full_mesh(n, FAST)
    assert machine.graph.number_of_edges() == n * (n - 1)
    assert all(machine.route(a, b) == ([(a, b)] if a != b else []) for a in range(n) for b in range(n))


@pytest.mark.parametrize(
    "n, a, b, expected",
    [
        (5, 0, 2, [0, 1, 2]),
        (5, 0, 3, [0, 4, 3]),
        (6, 0, 3, [0, 1, 2, 3]),
        (6, 5, 2, [5, 0, 1, 2]),
        (6, 2, 5, [2, 3, 4, 5]),
        (2, 0, 1, [0, 1]),
        (2, 1, 0, [1, 0]),
        (4, 3, 3, [3]),
        (1, 0, 0, [0]),
    ],
)
def test_a_ring_takes_the_shorter_way_and_ties_go_forward(n, a, b, expected):
    assert nodes(topology.ring(n, FAST), a, b) == expected


@pytest.mark.parametrize(
    "n, a, b, expected",
    [(5, 0, 1, [0, 1]), (5, 1, 0, [1, 0]), (6, 0, 3, [0, 5, 4, 3]), (5, 0, 2, [0, 4, 3, 2]), (4, 2, 2, [2])],
)
def test_a_backward_ring_goes_up_to_the_next_neighbour_only(n, a, b, expected):
    assert nodes(topology.ring(n, FAST, backward=True), a, b) == expected


@pytest.mark.parametrize("n, edges", [(1, 0), (2, 2), (3, 6), (8, 16)])
def test_a_ring_has_two_directed_links_a_neighbour_pair(n, edges):
    assert topology.ring(n, FAST).graph.number_of_edges() == edges


def test_a_switch_is_two_hops_from_anyone_to_anyone():
    machine = topology.switch(4, FAST)
    assert nodes(machine, 0, 3) == [0, "switch", 3]
    assert machine.graph.number_of_edges() == 8


def test_pcie_is_two_hops_under_one_switch_and_four_across():
    machine = topology.pcie_tree(2, 2, FAST, SLOW)
    assert nodes(machine, 0, 1) == [0, "pcie0", 1]  # PIX
    assert nodes(machine, 1, 2) == [1, "pcie0", "root", "pcie1", 2]  # PXB
    assert [machine.link(*edge) for edge in machine.route(1, 2)] == [FAST, SLOW, SLOW, FAST]
    assert machine.groups == ((0, 1), (2, 3))


def test_a_pcie_uplink_is_like_its_ports_unless_it_is_given():
    machine = topology.pcie_tree(2, 2, FAST)
    assert [machine.link(*edge) for edge in machine.route(0, 3)] == [FAST] * 4


@pytest.mark.parametrize("inside, within", [("mesh", [4, 5]), ("switch", [4, "switch1", 5])])
def test_two_levels_stay_inside_a_node_or_cross_two_nics(inside, within):
    machine = topology.two_level(3, 4, FAST, SLOW, inside=inside)
    assert nodes(machine, 4, 5) == within
    assert nodes(machine, 3, 4) == [3, "fabric", 4]
    assert [machine.link(*edge) for edge in machine.route(3, 4)] == [SLOW, SLOW]
    assert all(machine.link(*edge) == FAST for edge in machine.route(4, 5))
    assert machine.groups == ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11))


EVERY = {
    "mesh": topology.full_mesh(6, FAST),
    "ring": topology.ring(6, FAST),
    "backward ring": topology.ring(6, FAST, backward=True),
    "switch": topology.switch(6, FAST),
    "pcie": topology.pcie_tree(2, 3, FAST),
    "two level": topology.two_level(2, 3, FAST, SLOW),
    "two level, switched": topology.two_level(2, 3, FAST, SLOW, inside="switch"),
}


@pytest.mark.parametrize("machine", EVERY.values(), ids=EVERY)
def test_every_route_is_a_chain_of_links_without_detours(machine):
    for a in machine.ranks:
        for b in machine.ranks:
            route = machine.route(a, b)
            assert all(machine.graph.has_edge(u, v) for u, v in route)
            assert all(before[1] == after[0] for before, after in pairwise(route))
            assert max(Counter(nodes(machine, a, b)).values()) == 1
            assert nodes(machine, a, b)[-1] == b


@pytest.mark.parametrize("machine", EVERY.values(), ids=EVERY)
def test_devices_are_numbered_from_zero_and_marked(machine):
    assert machine.ranks == tuple(range(6))
    assert [n for n, kind in machine.graph.nodes(data="kind") if kind == "device"] == list(range(6))


@pytest.mark.parametrize("machine", EVERY.values(), ids=EVERY)
def test_full_duplex_directions_are_media_of_their_own(machine):
    media = [machine.medium(u, v) for u, v in machine.graph.edges]
    assert len(set(media)) == len(media)


def test_half_duplex_directions_are_one_medium():
    machine = topology.ring(4, Link(1e9, duplex=False))
    assert machine.medium(0, 1) == machine.medium(1, 0) != machine.medium(1, 2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: topology.full_mesh(0, FAST),
        lambda: topology.ring(-1, FAST),
        lambda: topology.switch(2.5, FAST),
        lambda: topology.pcie_tree(0, 4, FAST),
        lambda: topology.two_level(2, 0, FAST, SLOW),
    ],
    ids=["no device", "below zero", "half a device", "no switch", "empty nodes"],
)
def test_a_machine_needs_a_whole_number_of_devices(make):
    with pytest.raises(errors.ShapeError, match="at least 1 device"):
        make()


def test_a_node_is_a_mesh_or_a_switch():
    with pytest.raises(errors.ShapeError, match="'torus' is neither 'mesh' nor 'switch'"):
        topology.two_level(2, 2, FAST, SLOW, inside="torus")


# ---- hardware ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"bandwidth": 0}, "bandwidth"),
        ({"bandwidth": -1e9}, "bandwidth"),
        ({"bandwidth": float("nan")}, "bandwidth"),
        ({"bandwidth": 1e9, "flow_cap": 0}, "flow_cap"),
        ({"bandwidth": 1e9, "latency": -1e-6}, "latency"),
        ({"bandwidth": 1e9, "latency": inf}, "latency"),
    ],
    ids=str,
)
def test_an_impossible_link_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Link(**options)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"flops": 0}, "flops"),
        ({"flops": {}}, "flops"),
        ({"flops": {"float16": 1e12, "float32": -1}}, "flops"),
        ({"memory_bandwidth": 0}, "memory_bandwidth"),
        ({"compute_efficiency": 1.2}, "efficiencies"),
        ({"memory_efficiency": 0}, "efficiencies"),
        ({"overlap_slowdown": 1.0}, "overlap_slowdown"),
        ({"overlap_slowdown": -0.1}, "overlap_slowdown"),
        ({"launch_overhead": -1e-6}, "launch_overhead"),
        ({"memory_capacity": 0}, "memory_capacity"),
    ],
    ids=str,
)
def test_an_impossible_device_is_refused_by_name(options, words):
    with pytest.raises(ValueError, match=f"'broken'.*{words}"):
        Device(name="broken", **{"flops": 1e12, "memory_bandwidth": 1e11, **options})


@pytest.mark.parametrize("device", hardware.devices().values(), ids=hardware.devices())
def test_a_named_device_is_faster_at_lower_precision_and_has_a_finite_or_no_limit(device):
    assert device.rate("float16") >= device.rate("float32") >= device.rate("float64") > 0
    assert device.memory_capacity > 1e9


@pytest.mark.parametrize(
    "older, newer",
    [
        ("NVLINK2", "NVLINK3"),
        ("NVLINK3", "NVLINK4"),
        ("NVLINK4", "NVLINK5"),
        ("PCIE3", "PCIE4"),
        ("PCIE4", "PCIE5"),
        ("IB_HDR", "IB_NDR"),
    ],
)
def test_link_generations_get_faster(older, newer):
    assert hardware.links()[newer].bandwidth > 1.4 * hardware.links()[older].bandwidth


def test_a_device_can_be_changed_in_one_number():
    slower = hardware.replace(hardware.A100, compute_efficiency=0.5)
    assert slower.rate("float16") == hardware.A100.rate("float16") / 2
    assert hardware.A100.compute_efficiency == 1.0
