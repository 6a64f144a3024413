"""Collectives: numpy's results, the textbook's bytes and times, exact adjoints.

Values are small integers held as floats, so a sum does not depend on its order and results can be compared exactly.
"""

from collections import Counter
from itertools import product
from math import ceil, log2

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from toolkit.runtime import Cluster, errors, hardware, like, per_rank, shard, topology
from toolkit.runtime.collectives import ADJOINT

LATENCY, BANDWIDTH = 2e-6, 1e9
LINK = hardware.Link(bandwidth=BANDWIDTH, latency=LATENCY)
ALGORITHMS = {
    "broadcast": ("tree", "ring"),
    "reduce": ("tree", "ring"),
    "gather": ("tree", "direct"),
    "scatter": ("tree", "direct"),
    "all_gather": ("ring", "recursive_doubling"),
    "reduce_scatter": ("ring", "recursive_halving"),
    "all_reduce": ("ring", "recursive_doubling", "hierarchical"),
    "all_to_all": ("direct", "pairwise"),
    "barrier": ("dissemination",),
}
EVERY = [(name, algorithm) for name, algorithms in ALGORITHMS.items() for algorithm in algorithms]
OPERATORS = {"sum": np.add, "max": np.maximum, "min": np.minimum, "prod": np.multiply}
lengths = st.lists(st.integers(0, 5), min_size=1, max_size=17)  # one a rank: the number of ranks is drawn with them
seeds = st.integers(0, 2**32 - 1)
quick = settings(max_examples=15, deadline=None)


def mesh(ranks, device=hardware.IDEAL):
    return Cluster(topology.full_mesh(ranks, LINK), device=device)


def algorithms_of(name):
    return pytest.mark.parametrize("algorithm", ALGORITHMS[name])


def integers(shape, seed, dtype=np.float64):
    return np.random.default_rng(seed).integers(-9, 10, shape).astype(dtype)


def pieces(rows, seed, width=3):
    """One array of `rows[r]` rows for each rank r."""
    return [integers((n, width), (seed, r)) for r, n in enumerate(rows)]


def sends(run):
    """Messages that each rank sent."""
    count = Counter(event.rank for event in run.trace if event.kind == "send")
    return [count[rank] for rank in range(run.cluster.size)]


def sent_bytes(run):
    return run.traffic.by_pair.sum(axis=1).tolist()


def rounds(ranks):
    return ceil(log2(ranks))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_this_file_tests_every_algorithm_there_is(name):
    with pytest.raises(ValueError, match="no algorithm") as caught:
        mesh(1).run(collective, np.zeros(1), name=name, algorithm="none such")
    assert str(caught.value).split("choose from ")[1].split(", ") == list(ALGORITHMS[name])


# ---- results: numpy's --------------------------------------------------------------------------------------------


@algorithms_of("broadcast")
@given(ranks=st.integers(1, 17), root=st.integers(0, 16), n=st.integers(0, 7))
@quick
def test_broadcast_puts_the_roots_array_everywhere(algorithm, ranks, root, n):
    root, x = root % ranks, integers((n, 2), n)
    run = mesh(ranks).run(lambda comm: comm.broadcast(x if comm.rank == root else None, root, algorithm=algorithm))
    for got in run.outputs:
        assert_array_equal(got, x, strict=True)


@pytest.mark.parametrize("op", OPERATORS)
@algorithms_of("reduce")
@given(ranks=st.integers(1, 17), root=st.integers(0, 16), n=st.integers(0, 7), seed=seeds)
@quick
def test_reduce_is_numpys_on_the_root_and_none_elsewhere(algorithm, op, ranks, root, n, seed):
    root, x = root % ranks, integers((ranks, n, 2), seed) / 4
    run = mesh(ranks).run(lambda comm, a: comm.reduce(a, root, op=op, algorithm=algorithm), per_rank(x))
    np.testing.assert_allclose(run.outputs.pop(root), OPERATORS[op].reduce(x), rtol=1e-14)
    assert run.outputs == [None] * (ranks - 1)


@algorithms_of("gather")
@given(rows=lengths, root=st.integers(0, 16), seed=seeds)
@quick
def test_gather_joins_uneven_parts_in_rank_order(algorithm, rows, root, seed):
    root, parts = root % len(rows), pieces(rows, seed)
    run = mesh(len(rows)).run(lambda comm, a: comm.gather(a, root, algorithm=algorithm), per_rank(parts))
    assert_array_equal(run.outputs.pop(root), np.concatenate(parts), strict=True)
    assert run.outputs == [None] * (len(rows) - 1)


@algorithms_of("scatter")
@given(rows=lengths, root=st.integers(0, 16), seed=seeds)
@quick
def test_scatter_hands_out_uneven_parts(algorithm, rows, root, seed):
    root, parts = root % len(rows), pieces(rows, seed)
    run = mesh(len(rows)).run(
        lambda comm: comm.scatter(parts if comm.rank == root else None, root, algorithm=algorithm)
    )
    for got, part in zip(run.outputs, parts, strict=True):
        assert_array_equal(got, part, strict=True)


@algorithms_of("scatter")
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_scatter_cuts_one_array_evenly(algorithm, ranks):
    x = integers((2 * ranks, 3), ranks)
    run = mesh(ranks).run(lambda comm: comm.scatter(x if comm.rank == 0 else None, algorithm=algorithm))
    assert_array_equal(run.gather(axis=0), x)


@algorithms_of("all_gather")
@given(rows=lengths, seed=seeds)
@quick
def test_all_gather_joins_uneven_parts_on_every_rank(algorithm, rows, seed):
    parts = pieces(rows, seed)
    run = mesh(len(rows)).run(lambda comm, a: comm.all_gather(a, algorithm=algorithm), per_rank(parts))
    for got in run.outputs:
        assert_array_equal(got, np.concatenate(parts), strict=True)


@algorithms_of("all_gather")
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_all_gather_joins_along_any_axis(algorithm, axis):
    x = integers((4, 8, 12), 4)
    run = mesh(4).run(lambda comm, a: comm.all_gather(a, axis=axis, algorithm=algorithm), shard(x, axis=axis))
    assert_array_equal(run.outputs[3], x)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_all_gather_of_shapes_joins_along_any_axis(axis):
    run = mesh(4).run(lambda comm, a: comm.all_gather(a, axis=axis), shard(like((4, 8, 12)), axis=axis))
    assert run.outputs[3].shape == (4, 8, 12)


@algorithms_of("reduce_scatter")
@given(rows=lengths, seed=seeds)
@quick
def test_reduce_scatter_gives_each_rank_its_part_of_the_sum(algorithm, rows, seed):
    ranks = len(rows)
    x = integers((ranks, sum(rows), 3), seed)
    run = mesh(ranks).run(
        lambda comm, a: comm.reduce_scatter(np.split(a, np.cumsum(rows[:-1])), algorithm=algorithm), per_rank(x)
    )
    assert [len(part) for part in run.outputs] == rows
    assert_array_equal(run.gather(axis=0), x.sum(axis=0))


@pytest.mark.parametrize("op", OPERATORS)
@algorithms_of("reduce_scatter")
@pytest.mark.parametrize("ranks", [1, 5, 8])
def test_reduce_scatter_takes_every_operator(ranks, algorithm, op):
    x = integers((ranks, 2 * ranks), ranks)
    run = mesh(ranks).run(lambda comm, a: comm.reduce_scatter(a, op=op, algorithm=algorithm), per_rank(x))
    np.testing.assert_allclose(run.gather(axis=0), OPERATORS[op].reduce(x), rtol=1e-14)


@pytest.mark.parametrize("op", OPERATORS)
@algorithms_of("all_reduce")
@given(ranks=st.integers(1, 17), shape=st.lists(st.integers(0, 5), max_size=3), seed=seeds)
@quick
def test_all_reduce_is_numpys_on_every_rank_for_any_shape(algorithm, op, ranks, shape, seed):
    x = integers((ranks, *shape), seed)
    run = mesh(ranks).run(lambda comm, a: comm.all_reduce(a, op=op, algorithm=algorithm), per_rank(map(np.asarray, x)))
    for got in run.outputs:
        assert got.shape == tuple(shape)
        np.testing.assert_allclose(got, OPERATORS[op].reduce(x), rtol=1e-14)


@algorithms_of("all_reduce")
@pytest.mark.parametrize("dtype", ["int32", "float32", "complex128"])
def test_all_reduce_keeps_the_dtype(algorithm, dtype):
    run = mesh(3).run(lambda comm, a: comm.all_reduce(a, algorithm=algorithm), np.ones(5, dtype))
    assert_array_equal(run.outputs[1], np.full(5, 3, dtype), strict=True)


@algorithms_of("all_reduce")
@given(ranks=st.integers(1, 17), n=st.integers(0, 40), seed=seeds)
@quick
def test_all_ranks_hold_the_same_bits_after_all_reduce(algorithm, ranks, n, seed):
    x = np.random.default_rng(seed).normal(size=(ranks, n)).astype(np.float32)
    run = mesh(ranks).run(lambda comm, a: comm.all_reduce(a, algorithm=algorithm), per_rank(x))
    assert len({got.tobytes() for got in run.outputs}) == 1


@pytest.mark.parametrize("op", ["max", "min"])
@algorithms_of("all_reduce")
@given(signs=st.lists(st.booleans(), min_size=2, max_size=17))
@quick
def test_all_ranks_agree_on_the_sign_of_zero(algorithm, op, signs):
    """max(0.0, -0.0) depends on the order of its arguments, so both partners of an exchange must use the same."""
    x = [np.full(3, -0.0 if minus else 0.0) for minus in signs]
    run = mesh(len(x)).run(lambda comm, a: comm.all_reduce(a, op=op, algorithm=algorithm), per_rank(x))
    assert len({got.tobytes() for got in run.outputs}) == 1


@algorithms_of("all_to_all")
@given(ranks=st.integers(1, 17), seed=seeds)
@quick
def test_all_to_all_transposes_a_table_of_uneven_parts(algorithm, ranks, seed):
    rows = np.random.default_rng(seed).integers(0, 4, (ranks, ranks))
    table = [[integers((rows[a, b], 2), (seed, a, b)) for b in range(ranks)] for a in range(ranks)]
    run = mesh(ranks).run(lambda comm: comm.all_to_all(table[comm.rank], algorithm=algorithm))
    for b, received in enumerate(run.outputs):
        assert len(received) == ranks
        for a, part in enumerate(received):
            assert_array_equal(part, table[a][b], strict=True)


@pytest.mark.parametrize("ranks", [1, 2, 7])
def test_all_to_all_of_one_array_is_a_block_transpose(ranks):
    x = integers((ranks, ranks, 2, 3), ranks)  # rank, block, row, column
    run = mesh(ranks).run(lambda comm, a: comm.all_to_all(a), per_rank(x.reshape(ranks, 2 * ranks, 3)))
    assert_array_equal(np.stack(run.outputs).reshape(x.shape), x.swapaxes(0, 1))


@pytest.mark.parametrize("ranks", [1, 2, 5, 16])
def test_nobody_leaves_a_barrier_before_all_have_entered(ranks):
    def program(comm):
        comm.sleep(comm.rank)
        entered = comm.now
        comm.barrier()
        return entered, comm.now

    run = mesh(ranks).run(program)
    assert min(left for _, left in run.outputs) >= max(entered for entered, _ in run.outputs)


# ---- proof that the tests above can fail -------------------------------------------------------------------------


def ring_all_gather(comm, x, steps, by=1):
    """Ring all-gather in the program's own words; right for steps = p-1, by = 1."""
    parts = {comm.rank: x}
    for step in range(steps):
        parts[(comm.rank - step - 1) % comm.size] = comm.ishift(parts[(comm.rank - step) % comm.size], by=by).wait()
    return np.concatenate([parts.get(r, np.zeros_like(x)) for r in range(comm.size)])


@pytest.mark.parametrize(
    "steps, by, right", [(4, 1, True), (3, 1, False), (4, -1, False)], ids=["right", "one step short", "wrong way"]
)
def test_a_wrong_ring_is_caught(steps, by, right):
    parts = [np.full(2, r + 1.0) for r in range(5)]
    run = mesh(5).run(ring_all_gather, per_rank(parts), steps=steps, by=by)
    assert all(np.array_equal(got, np.concatenate(parts)) for got in run.outputs) == right


@pytest.mark.parametrize("steps, right", [(4, True), (5, False)])
def test_a_ring_with_a_step_too_many_is_right_but_its_bytes_are_caught(steps, right):
    run = mesh(5).run(ring_all_gather, per_rank([np.full(2, r + 1.0) for r in range(5)]), steps=steps)
    assert_array_equal(run.outputs[0], np.repeat(np.arange(1.0, 6), 2))
    assert (sent_bytes(run) == [4 * 16] * 5) == right


# ---- messages and bytes: the textbook's --------------------------------------------------------------------------


@algorithms_of("broadcast")
@given(ranks=st.integers(1, 17), root=st.integers(0, 16), n=st.integers(0, 9))
@quick
def test_broadcast_sends_the_array_to_each_other_rank_once(algorithm, ranks, root, n):
    x = np.zeros(n)
    run = mesh(ranks).run(lambda comm: comm.broadcast(x, root % ranks, algorithm=algorithm))
    assert sum(sends(run)) == ranks - 1
    assert run.traffic.total == (ranks - 1) * x.nbytes
    assert max(sends(run)) == (rounds(ranks) if algorithm == "tree" else min(1, ranks - 1))


@algorithms_of("reduce")
@given(ranks=st.integers(1, 17), root=st.integers(0, 16), n=st.integers(0, 9))
@quick
def test_every_rank_but_the_root_sends_one_partial_sum(algorithm, ranks, root, n):
    x, root = np.zeros(n), root % ranks
    run = mesh(ranks).run(lambda comm: comm.reduce(x, root, algorithm=algorithm))
    assert sends(run) == [int(rank != root) for rank in range(ranks)]
    assert run.traffic.total == (ranks - 1) * x.nbytes


def blocks_below(place, ranks):
    """Blocks in the binomial subtree of the rank `place` after the root."""
    return min(place & -place, ranks - place)


@algorithms_of("gather")
@given(ranks=st.integers(1, 17), root=st.integers(0, 16), n=st.integers(0, 9))
@quick
def test_gather_sends_subtrees_up_the_tree_or_blocks_directly(algorithm, ranks, root, n):
    x, root = np.zeros(n), root % ranks
    run = mesh(ranks).run(lambda comm: comm.gather(x, root, algorithm=algorithm))
    blocks = [blocks_below(place, ranks) if algorithm == "tree" else 1 for place in range(1, ranks)]
    assert sends(run) == [int(rank != root) for rank in range(ranks)]
    assert [sent_bytes(run)[(root + place) % ranks] for place in range(1, ranks)] == [b * x.nbytes for b in blocks]


@algorithms_of("scatter")
@given(ranks=st.integers(1, 17), root=st.integers(0, 16), n=st.integers(0, 9))
@quick
def test_scatter_is_gather_with_every_message_turned_round(algorithm, ranks, root, n):
    x, root = np.zeros(n), root % ranks
    down = mesh(ranks).run(lambda comm: comm.scatter([x] * ranks, root, algorithm=algorithm))
    up = mesh(ranks).run(lambda comm: comm.gather(x, root, algorithm=algorithm))
    assert_array_equal(down.traffic.by_pair, up.traffic.by_pair.T)
    assert sum(sends(down)) == ranks - 1


@algorithms_of("all_gather")
@given(rows=lengths)
@quick
def test_all_gather_sends_all_blocks_but_one_from_every_rank(algorithm, rows):
    ranks, total = len(rows), 8 * sum(rows)
    run = mesh(ranks).run(lambda comm, a: comm.all_gather(a, algorithm=algorithm), per_rank(pieces(rows, 0, width=1)))
    received = run.traffic.by_pair.sum(axis=0).tolist()
    assert sends(run) == [ranks - 1 if algorithm == "ring" else rounds(ranks)] * ranks
    assert received == [total - 8 * n for n in rows]  # nobody receives its own block, or a block twice


@algorithms_of("reduce_scatter")
@given(rows=lengths)
@quick
def test_reduce_scatter_sends_all_slices_but_its_own(algorithm, rows):
    ranks, total = len(rows), 8 * sum(rows)
    x = [np.zeros(n) for n in rows]
    run = mesh(ranks).run(lambda comm: comm.reduce_scatter(x, algorithm=algorithm))
    assert sends(run) == [ranks - 1 if algorithm == "ring" else rounds(ranks)] * ranks
    assert sent_bytes(run) == [total - 8 * n for n in rows]


@given(ranks=st.integers(1, 17), n=st.integers(0, 50))
@quick
def test_ring_all_reduce_moves_two_times_p_minus_1_arrays_in_all(ranks, n):
    run = mesh(ranks).run(lambda comm: comm.all_reduce(np.zeros(n)))
    assert sends(run) == [2 * (ranks - 1)] * ranks
    assert run.traffic.total == 2 * (ranks - 1) * 8 * n


@given(ranks=st.integers(1, 17), n=st.integers(0, 5))
@quick
def test_ring_all_reduce_spreads_the_bytes_evenly_when_they_divide(ranks, n):
    run = mesh(ranks).run(lambda comm: comm.all_reduce(np.zeros(n * ranks)))
    assert sent_bytes(run) == [2 * (ranks - 1) * 8 * n] * ranks


@given(ranks=st.integers(1, 17), n=st.integers(0, 50))
@quick
def test_doubling_all_reduce_exchanges_whole_arrays_in_log2_rounds(ranks, n):
    core = 2 ** int(log2(ranks))
    run = mesh(ranks).run(lambda comm: comm.all_reduce(np.zeros(n), algorithm="recursive_doubling"))
    folded = ranks - core  # these hand their array to a partner first, and get the result last
    assert sends(run) == [int(log2(core)) + (r < folded) for r in range(core)] + [1] * folded
    assert run.traffic.total == sum(sends(run)) * 8 * n


@algorithms_of("all_to_all")
@given(ranks=st.integers(1, 17), n=st.integers(0, 9))
@quick
def test_all_to_all_sends_each_part_straight_to_its_owner(algorithm, ranks, n):
    run = mesh(ranks).run(lambda comm: comm.all_to_all(np.zeros(n * ranks), algorithm=algorithm))
    assert_array_equal(run.traffic.by_pair, 8 * n * (1 - np.eye(ranks, dtype=int)))
    assert sends(run) == [ranks - 1] * ranks


@pytest.mark.parametrize("ranks", range(1, 18))
def test_barrier_sends_log2_p_empty_messages_a_rank(ranks):
    run = mesh(ranks).run(lambda comm: comm.barrier())
    assert sends(run) == [rounds(ranks)] * ranks
    assert run.traffic.total == 0


@pytest.mark.parametrize("nodes, per_node", [(1, 4), (2, 4), (3, 2), (4, 1), (5, 3)])
def test_hierarchical_all_reduce_sends_two_times_nodes_minus_1_arrays_between_nodes(nodes, per_node):
    x = np.zeros(nodes * per_node)
    cluster = Cluster(topology.two_level(nodes, per_node, LINK, LINK), device=hardware.IDEAL)
    traffic = cluster.run(lambda comm: comm.all_reduce(x, algorithm="hierarchical")).traffic.by_pair
    node = np.arange(x.size) // per_node
    between = traffic[node[:, None] != node].sum()
    assert between == 2 * (nodes - 1) * x.nbytes
    assert traffic.sum() - between == nodes * 2 * (per_node - 1) * x.nbytes


@given(nodes=st.integers(1, 4), per_node=st.integers(1, 4), n=st.integers(0, 20), seed=seeds)
@quick
def test_hierarchical_all_reduce_on_nodes_equals_numpy(nodes, per_node, n, seed):
    x = integers((nodes * per_node, n), seed)
    cluster = Cluster(topology.two_level(nodes, per_node, LINK, LINK), device=hardware.IDEAL)
    run = cluster.run(lambda comm, a: comm.all_reduce(a, algorithm="hierarchical"), per_rank(x))
    for got in run.outputs:
        assert_array_equal(got, x.sum(axis=0))


def test_hierarchical_needs_nodes_of_one_size():
    def program(comm):
        if comm.rank < 3:
            comm.group([0, 1, 2]).all_reduce(np.zeros(4), algorithm="hierarchical")

    with pytest.raises(errors.ShapeError, match="same number of ranks on every node"):
        Cluster(topology.two_level(2, 2, LINK, LINK), device=hardware.IDEAL).run(program)


# ---- times: latency · messages + bytes / bandwidth ---------------------------------------------------------------


def steps(count, nbytes):
    """`count` messages one after the other that carry `nbytes` together."""
    return count * LATENCY + nbytes / BANDWIDTH


N = 240 * 1024  # float64 values: divides by 2, 3, 4, 5, 8 and 16
NB = 8 * N
TIMES = {  # what each takes on an uncontended full mesh of p ranks when the whole array has NB bytes
    ("broadcast", "tree"): lambda p: steps(rounds(p), rounds(p) * NB),
    ("broadcast", "ring"): lambda p: steps(p - 1, (p - 1) * NB),
    ("reduce", "tree"): lambda p: steps(rounds(p), rounds(p) * NB),
    ("reduce", "ring"): lambda p: steps(p - 1, (p - 1) * NB),
    ("gather", "direct"): lambda p: steps(1, NB / p),
    ("scatter", "direct"): lambda p: steps(1, NB / p),
    ("all_gather", "ring"): lambda p: steps(p - 1, NB * (p - 1) / p),
    ("all_gather", "recursive_doubling"): lambda p: steps(rounds(p), NB * (p - 1) / p),
    ("reduce_scatter", "ring"): lambda p: steps(p - 1, NB * (p - 1) / p),
    ("reduce_scatter", "recursive_halving"): lambda p: steps(rounds(p), NB * (p - 1) / p),
    ("all_reduce", "ring"): lambda p: steps(2 * (p - 1), NB * 2 * (p - 1) / p),
    ("all_reduce", "recursive_doubling"): lambda p: steps(
        int(log2(p)) + 2 * (p & (p - 1) != 0), NB * (int(log2(p)) + 2 * (p & (p - 1) != 0))
    ),
    ("all_to_all", "pairwise"): lambda p: steps(p - 1, NB * (p - 1) / p),
    ("all_to_all", "direct"): lambda p: steps(min(p - 1, 1), NB * min(p - 1, 1) / p),
    ("barrier", "dissemination"): lambda p: steps(rounds(p), 0),
}
POWERS_OF_TWO = {  # binomial trees of blocks: closed only when all subtrees are full
    ("gather", "tree"): lambda p: steps(rounds(p), NB * (p - 1) / p),
    ("scatter", "tree"): lambda p: steps(rounds(p), NB * (p - 1) / p),
}


def whole_or_block(name, comm, x):
    """What a rank passes to collective `name` when the whole array is x."""
    block = x[: len(x) // comm.size]
    return {"gather": block, "all_gather": block}.get(name, x)


def collective(comm, x, *, name, algorithm):
    if name == "barrier":
        return comm.barrier(algorithm=algorithm)
    return getattr(comm, name)(whole_or_block(name, comm, x), algorithm=algorithm)


@pytest.mark.parametrize("ranks", [2, 3, 5, 8, 16])
@pytest.mark.parametrize("which", TIMES, ids=" ".join)
def test_time_on_an_uncontended_mesh_is_the_closed_form(which, ranks):
    run = mesh(ranks).run(collective, like(N), name=which[0], algorithm=which[1])
    assert run.makespan == pytest.approx(TIMES[which](ranks), rel=1e-9)


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
@pytest.mark.parametrize("which", POWERS_OF_TWO, ids=" ".join)
def test_time_of_binomial_trees_of_blocks_is_the_closed_form(which, ranks):
    run = mesh(ranks).run(collective, like(N), name=which[0], algorithm=which[1])
    assert run.makespan == pytest.approx(POWERS_OF_TWO[which](ranks), rel=1e-9)


def test_a_ring_all_gather_takes_the_same_time_on_a_physical_ring():
    run = Cluster(topology.ring(8, LINK), device=hardware.IDEAL).run(
        collective, like(N), name="all_gather", algorithm="ring"
    )
    assert run.makespan == pytest.approx(TIMES["all_gather", "ring"](8), rel=1e-9)


@pytest.mark.parametrize("which", EVERY, ids=" ".join)
@given(ranks=st.integers(1, 17), n=st.integers(0, 3))
@settings(max_examples=8, deadline=None)
def test_numeric_and_shape_only_runs_agree_on_everything_but_values(which, ranks, n):
    name, algorithm = which
    cluster = mesh(ranks, hardware.A10)
    x = np.ones((n * ranks, 3), np.float32)
    numeric, shapes = (cluster.run(collective, a, name=name, algorithm=algorithm) for a in (x, like(x)))
    assert shapes.makespan == numeric.makespan
    assert shapes.peak_memory == numeric.peak_memory
    assert_array_equal(shapes.traffic.by_pair, numeric.traffic.by_pair)
    assert list(shapes.trace) == list(numeric.trace)


@algorithms_of("all_reduce")
@pytest.mark.parametrize("ranks", [3, 16, 17])
def test_shape_only_all_reduce_of_fewer_values_than_ranks_agrees(algorithm, ranks):
    cluster = mesh(ranks, hardware.A10)
    x = np.ones(5)
    numeric, shapes = (cluster.run(collective, a, name="all_reduce", algorithm=algorithm) for a in (x, like(x)))
    assert (shapes.makespan, shapes.peak_memory) == (numeric.makespan, numeric.peak_memory)
    assert list(shapes.trace) == list(numeric.trace)


# ---- adjoints: <A x, y> = <x, Aᵀ y> ------------------------------------------------------------------------------

ROOT = 1
LINEAR = {  # (comm, this rank's input, cuts of the joined array, algorithm) -> this rank's output
    "broadcast": lambda comm, x, cuts, a: comm.broadcast(x, ROOT, algorithm=a),
    "reduce": lambda comm, x, cuts, a: comm.reduce(x, ROOT, algorithm=a),
    "gather": lambda comm, x, cuts, a: comm.gather(x, ROOT, algorithm=a),
    "scatter": lambda comm, x, cuts, a: comm.scatter(x if x is None else np.split(x, cuts), ROOT, algorithm=a),
    "all_gather": lambda comm, x, cuts, a: comm.all_gather(x, algorithm=a),
    "reduce_scatter": lambda comm, x, cuts, a: comm.reduce_scatter(np.split(x, cuts), algorithm=a),
    "all_reduce": lambda comm, x, cuts, a: comm.all_reduce(x, algorithm=a),
    "all_to_all": lambda comm, x, cuts, a: comm.all_to_all(x, algorithm=a),
}
PAIRS = [
    (name, a, adjoint, b)
    for name, adjoint in ADJOINT.items()
    for a, b in product(ALGORITHMS[name], ALGORITHMS[adjoint])
]


def signal(kind, rank, rows, seed):
    """Rank's part of a random vector. kind: "whole" everywhere, "root" only there, "block" of own length."""
    rng = np.random.default_rng((seed, rank))
    if kind == "root" and rank != ROOT:
        return None
    return rng.integers(-9, 10, rows[rank] if kind == "block" else sum(rows)).astype(float)


DOMAIN = {"broadcast": "root", "gather": "block", "all_gather": "block", "scatter": "root"}
RANGE = {"reduce": "root", "gather": "root", "scatter": "block", "reduce_scatter": "block"}


def inner(a, b):
    return sum(float(np.dot(x, y)) for x, y in zip(a, b, strict=True) if x is not None)


@pytest.mark.parametrize("name, a, adjoint, b", [p for p in PAIRS if p[0] != "all_to_all"])
@given(rows=st.lists(st.integers(0, 5), min_size=2, max_size=17), seed=seeds)
@settings(max_examples=10, deadline=None)
def test_inner_products_agree_with_the_adjoint(name, a, adjoint, b, rows, seed):
    ranks, cuts = len(rows), np.cumsum(rows[:-1])
    x = [signal(DOMAIN.get(name, "whole"), r, rows, seed) for r in range(ranks)]
    y = [signal(RANGE.get(name, "whole"), r, rows, seed + 1) for r in range(ranks)]
    forward = mesh(ranks).run(LINEAR[name], per_rank(x), cuts=cuts, a=a).outputs
    backward = mesh(ranks).run(LINEAR[adjoint], per_rank(y), cuts=cuts, a=b).outputs
    assert inner(y, forward) == inner(x, backward)


@given(ranks=st.integers(1, 17), seed=seeds)
@quick
def test_inner_products_agree_for_uneven_all_to_all(ranks, seed):
    rng = np.random.default_rng(seed)
    n = rng.integers(0, 4, (ranks, ranks))
    x, y = ([[rng.integers(-9, 10, m).astype(float) for m in row] for row in table] for table in (n, n.T))
    forward, backward = (mesh(ranks).run(lambda comm, t=t: comm.all_to_all(t[comm.rank])).outputs for t in (x, y))
    assert sum(map(inner, y, forward)) == sum(map(inner, x, backward))


def test_a_wrong_adjoint_is_caught():
    x, y = (integers((3, 6), seed) for seed in (1, 2))
    forward = mesh(3).run(LINEAR["all_gather"], per_rank(x[:, :2]), cuts=[2, 4], a="ring").outputs
    backward = mesh(3).run(lambda comm, a: np.split(a, 3)[comm.rank], per_rank(y)).outputs  # forgets to add over ranks
    assert inner(y, forward) != inner(x[:, :2], backward)


# ---- non-blocking forms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", EVERY, ids=" ".join)
def test_the_non_blocking_form_gives_the_same_value(which):
    name, algorithm = which

    def program(comm, x, started):
        x = whole_or_block(name, comm, x)
        form = getattr(comm, f"i{name}" if started else name)
        result = form(algorithm=algorithm) if name == "barrier" else form(x, algorithm=algorithm)
        return result.wait() if started else result

    x = integers((6, 2), 3)
    blocking, started = (mesh(3).run(program, x, started=started) for started in (False, True))
    assert started.makespan == blocking.makespan
    for got, expected in zip(started.outputs, blocking.outputs, strict=True):
        assert_array_equal(got, expected)


def test_a_collective_under_way_leaves_the_program_free():
    def program(comm, x):
        request = comm.iall_reduce(x)
        comm.sleep(1.0)
        at = comm.now
        request.wait()
        return at, comm.now

    assert mesh(4).run(program, np.ones(1000)).outputs == [(1.0, 1.0)] * 4


def test_two_collectives_under_way_do_not_mix_whatever_is_waited_for_first():
    def program(comm):
        first, second = comm.iall_reduce(np.array([1.0])), comm.iall_reduce(np.array([10.0]))
        order = (second, first) if comm.rank % 2 else (first, second)
        for request in order:
            request.wait()
        return float(first.wait()[0]), float(second.wait()[0])

    assert mesh(4).run(program).outputs == [(4.0, 40.0)] * 4


# ---- sub-communicators -------------------------------------------------------------------------------------------


@given(colors=st.lists(st.integers(0, 3), min_size=1, max_size=17))
@quick
def test_split_gathers_the_ranks_of_each_color(colors):
    def program(comm):
        part = comm.split(colors[comm.rank])
        return part.all_gather(np.array([comm.rank])).tolist()

    expected = [[r for r, c in enumerate(colors) if c == mine] for mine in colors]
    assert mesh(len(colors)).run(program).outputs == expected


def test_split_orders_by_key_then_rank():
    def program(comm):
        part = comm.split(0, key=[2, 1, 1, 0][comm.rank])
        return part.rank, part.ranks

    assert mesh(4).run(program).outputs == [(3, (3, 1, 2, 0)), (1, (3, 1, 2, 0)), (2, (3, 1, 2, 0)), (0, (3, 1, 2, 0))]


def test_split_takes_no_time_but_waits_for_the_last_rank():
    def program(comm):
        comm.sleep(comm.rank)
        comm.split(0)
        after = comm.now
        comm.sleep(1.0)
        return after

    assert mesh(4).run(program).outputs == [3.0] * 4


def test_a_group_is_formed_without_a_word():
    def program(comm):
        if comm.rank in (1, 3, 4):
            part = comm.group([4, 1, 3])
            return part.rank, float(part.all_reduce(np.array([1.0 * comm.rank]))[0])

    run = mesh(5).run(program)
    assert run.outputs == [None, (1, 8.0), None, (2, 8.0), (0, 8.0)]
    assert run.traffic.by_pair[[0, 2]].sum() == run.traffic.by_pair[:, [0, 2]].sum() == 0


def test_a_mesh_of_rows_and_columns_adds_both_ways():
    def program(comm):
        row, column = comm.split(comm.rank // 3), comm.split(comm.rank % 3)
        return [int(part.all_reduce(np.array([comm.rank]))[0]) for part in (row, column)]

    table = np.arange(6).reshape(2, 3)
    expected = [[int(table[i].sum()), int(table[:, j].sum())] for i in range(2) for j in range(3)]
    assert mesh(6).run(program).outputs == expected


def test_messages_of_a_communicator_and_of_its_part_do_not_mix():
    def program(comm):
        part = comm.split(0)
        if comm.rank == 0:
            requests = [comm.isend(np.array([1]), dest=1), part.isend(np.array([2]), dest=1)]
            return [request.wait() for request in requests]
        return int(part.recv(source=0)[0]), int(comm.recv(source=0)[0])

    assert mesh(2).run(program).outputs[1] == (2, 1)


def test_parts_of_parts_work():
    def program(comm):
        half = comm.split(comm.rank // 4)
        quarter = half.split(half.rank // 2)
        return quarter.ranks, int(quarter.all_reduce(np.array([comm.rank]))[0])

    expected = [((r // 2 * 2, r // 2 * 2 + 1), r // 2 * 4 + 1) for r in range(8)]
    assert mesh(8).run(program).outputs == expected


@pytest.mark.parametrize("ranks", [[0, 0], [1, 2], [0, 9]], ids=["twice", "not oneself", "unknown"])
def test_a_group_must_name_its_own_rank_once_and_only_known_ones(ranks):
    def program(comm):
        if comm.rank == 0:
            comm.group(ranks)

    with pytest.raises(errors.UnknownRank):
        mesh(3).run(program)
