"""GNNPipe: exact where nothing is historical, the exact gradient where something is, and the bytes of its formulas."""

import os
import shutil
import subprocess
import sys
from itertools import pairwise, product
from math import inf
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy import sparse

from toolkit.claims.model_parallel import gnn_pipe as claims
from toolkit.model_parallel import _gnn_pipe_graph as graphs
from toolkit.model_parallel import _gnn_pipe_picture as picture
from toolkit.model_parallel import _gnn_pipe_share as owned
from toolkit.model_parallel import _pipeline, _schedule, gnn_pipe
from toolkit.model_parallel._gnn_pipe_layers import ALPHA, first_weights, layers_of
from toolkit.model_parallel._gnn_pipe_layers import MODELS as NETWORKS
from toolkit.runtime import Cluster, hardware, like, topology
from toolkit.runtime.errors import OutOfDeviceMemory, ShapeError

LINK = hardware.Link(1e9)
DEPTH, HIDDEN, CLASSES, WIDTH = 4, 6, 3, 5
SLOW = hardware.Device("1 GB/s of memory", flops=inf, memory_bandwidth=1e9)


def small_graph(vertices=48, seed=0, directed=False):
    """A sparse random graph, with one vertex that has no neighbour."""
    random = np.random.default_rng(seed)
    links = sparse.csr_array(random.random((vertices, vertices)) < 4 / vertices)
    if not directed:
        links = sparse.csr_array(links + links.T)
    links = links.tolil()
    links[0, :], links[:, 0] = False, False
    how = "mean" if directed else "symmetric"
    return graphs.Graph(
        graphs.normalised(sparse.csr_array(links), how),
        random.standard_normal((vertices, WIDTH)),
        random.integers(0, CLASSES, vertices),
        random.random(vertices) < 0.6,
    )


def network(model, depth=DEPTH, seed=1):
    layers = layers_of(model, depth, WIDTH, HIDDEN, CLASSES)
    return layers, first_weights(layers, seed)


def mesh(ranks, device=hardware.IDEAL):
    return Cluster(topology.full_mesh(ranks, LINK), device)


def train(graph, model="gcn", stages=1, group=1, chunks=1, device=hardware.IDEAL, method="greedy", **options):
    """A run of `gnn_pipe.train`, three epochs unless told otherwise."""
    layers, weights = network(model)
    chunk, part = gnn_pipe.cut(graph.adjacency, chunks, group, method)
    share = gnn_pipe.placed(gnn_pipe.shares(graph, chunk, part), stages)
    options = {"epochs": 3, "period": 2, "rate": 0.1} | options
    return mesh(stages * group, device).run(gnn_pipe.train, share, weights, layers=layers, group=group, **options)


def judge(graph, layers, weights, history=None, chunk=None, order=None):
    """Loss, logits and gradients by dense float64 torch: nothing of ours but the layers' numbers.

    With `history` ({layer: (n, width)}), a vertex takes from a chunk later in `order` the historical row instead.
    """
    a = torch.tensor(graph.adjacency.toarray())
    fresh = torch.ones_like(a)
    if history is not None:
        place = np.argsort(order)[chunk]
        fresh = torch.tensor((place[None, :] <= place[:, None]).astype(float))
    x = torch.tensor(graph.features)
    x0, parameters = None, [torch.tensor(w, requires_grad=True) for w in weights]
    for i, (layer, w) in enumerate(zip(layers, parameters, strict=True)):
        if layer.kind == "dense":
            z = x @ w
        else:
            old = x if history is None or i not in history else torch.tensor(history[i])
            around = (a * fresh) @ x + (a * (1 - fresh)) @ old
            if layer.kind == "gcn":
                z = around @ w
            elif layer.kind == "sage":
                z = torch.cat((x, around), 1) @ w
            else:
                m = (1 - ALPHA) * around + ALPHA * x0
                z = (1 - layer.beta) * m + layer.beta * m @ w
        x = torch.relu(z) if layer.relu else z
        x0 = x if x0 is None else x0
    each = torch.nn.functional.cross_entropy(x, torch.tensor(graph.labels), reduction="none")
    loss = each[torch.tensor(graph.train)].sum() / graph.train.sum()
    loss.backward()
    return loss.item(), x.detach().numpy(), [w.grad.numpy() for w in parameters]


def one_pass(comm, share, layers, weights, order, history=None, reverse=True, exact=None):
    """One epoch of one stage that starts from given historical rows: (loss, gradients, tables)."""
    stage = gnn_pipe.GNNPipeStage(share, layers, weights, comm.rank, comm.size)
    for i in stage.inner:
        if history is not None:
            stage.tables[i][0][...] = history[i]
    plan = gnn_pipe.schedule(comm.size, len(share.chunks), reverse)
    gnn_pipe.one_epoch(comm, stage, plan, order)
    return float(stage.loss[0, 0]), stage.grads, {i: stage.tables[i][0].copy() for i in stage.inner}


def chunked(graph, layers, weights, chunk, order, history=None, stages=1, reverse=True):
    """`one_pass` on a pipeline: history in the graph's order of vertices; tables come back in it."""
    share = gnn_pipe.shares(graph, chunk)[0]
    local = None if history is None else {i: rows[share.vertices] for i, rows in history.items()}
    run = mesh(stages).run(one_pass, share, layers, weights, order, local, reverse)
    grads, tables = {}, {}
    for _, own, table in run.outputs:
        grads |= own
        tables |= {i: rows[np.argsort(share.vertices)] for i, rows in table.items()}
    return sum(loss for loss, _, _ in run.outputs), [grads[i] for i in range(len(layers))], tables


def some_history(layers, vertices, seed=5):
    random = np.random.default_rng(seed)
    inner = [i for i, layer in enumerate(layers) if layer.kind != "dense" and i > 0]
    return {i: random.standard_normal((vertices, layers[i].fan_in)) for i in inner}


def exact_inputs(graph, layers, weights):
    """{layer: its exact input (n, width)}, from the judge's network cut short."""
    return {
        i: judge(graph, layers[:i], weights[:i])[1] for i, layer in enumerate(layers) if i > 0 and layer.kind != "dense"
    }


# ---- one chunk: exact ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("model", NETWORKS)
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_one_chunk_gives_the_gradients_of_the_full_graph(model, stages, directed):
    graph, (layers, weights) = small_graph(directed=directed), network(model)
    loss, grads, _ = chunked(graph, layers, weights, np.zeros(48, int), [0], stages=stages)
    wanted, _, wanted_grads = judge(graph, layers, weights)
    assert_allclose(loss, wanted, rtol=0, atol=1e-12)
    for mine, theirs in zip(grads, wanted_grads, strict=True):
        assert_allclose(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("model", NETWORKS)
def test_prediction_is_the_full_graphs_output(model, directed):
    graph, (layers, weights) = small_graph(directed=directed), network(model)
    assert_allclose(gnn_pipe.predict(graph, layers, weights), judge(graph, layers, weights)[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("model", NETWORKS)
@pytest.mark.parametrize("group", [2, 3, 5])
def test_graph_parallelism_trains_as_one_device_does(model, group, directed):
    graph = small_graph(directed=directed)
    alone, shared = (gnn_pipe.trained(train(graph, model, group=n)) for n in (1, group))
    assert_allclose(shared[1], alone[1], rtol=0, atol=1e-12)
    for i, w in alone[0].items():
        assert_allclose(shared[0][i], w, rtol=0, atol=1e-9)  # Adam divides by the root of small numbers


# ---- several chunks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", NETWORKS)
@pytest.mark.parametrize("stages, group", [(2, 1), (4, 1), (1, 2), (2, 2), (4, 3)])
def test_more_devices_change_nothing_when_the_chunks_stay(model, stages, group):
    """Chunks that do not depend on the parts: the historical values are then the same, too."""
    graph, (layers, weights) = small_graph(), network(model)
    chunk = gnn_pipe.partition_vertices(graph.adjacency, 5)
    part = gnn_pipe.partition_vertices(graph.adjacency, group, "random", seed=3)
    options = {"layers": layers, "epochs": 5, "period": 2, "rate": 0.1}
    alone = mesh(1).run(gnn_pipe.train, gnn_pipe.placed(gnn_pipe.shares(graph, chunk), 1), weights, **options)
    share = gnn_pipe.placed(gnn_pipe.shares(graph, chunk, part), stages)
    run = mesh(stages * group).run(gnn_pipe.train, share, weights, group=group, **options)
    assert_allclose(gnn_pipe.trained(run)[1], gnn_pipe.trained(alone)[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("model", NETWORKS)
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]])
def test_exact_history_gives_the_full_graph_in_any_order(model, order):
    graph, (layers, weights) = small_graph(), network(model)
    chunk = gnn_pipe.partition_vertices(graph.adjacency, 4, "random")
    history = exact_inputs(graph, layers, weights)
    loss, _, _ = chunked(graph, layers, weights, chunk, order, history)
    assert_allclose(loss, judge(graph, layers, weights)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("model", NETWORKS)
@pytest.mark.parametrize("stages", [1, 4])
def test_gradients_are_those_of_what_was_computed_with_history_constant(model, stages, directed):
    graph, (layers, weights) = small_graph(directed=directed), network(model)
    chunk, order = gnn_pipe.partition_vertices(graph.adjacency, 4, "random"), [2, 0, 3, 1]
    history = some_history(layers, 48)
    loss, grads, _ = chunked(graph, layers, weights, chunk, order, history, stages)
    wanted, _, wanted_grads = judge(graph, layers, weights, history, chunk, order)
    assert_allclose(loss, wanted, rtol=0, atol=1e-12)
    for mine, theirs in zip(grads, wanted_grads, strict=True):
        assert_allclose(mine, theirs, rtol=0, atol=1e-11)


def slopes(graph, layers, weights, chunk, order, history, layer, step=1e-6):
    """Central finite differences of our own loss, for every entry of one matrix."""
    found = np.empty_like(weights[layer])
    for at in np.ndindex(found.shape):
        ends = []
        for sign in (1, -1):
            moved = [w.copy() for w in weights]
            moved[layer][at] += sign * step
            ends.append(chunked(graph, layers, tuple(moved), chunk, order, history)[0])
        found[at] = (ends[0] - ends[1]) / (2 * step)
    return found


def error_of_backward(reverse, layer=1):
    graph, (layers, weights) = small_graph(32), network("gcn")
    chunk, order = gnn_pipe.partition_vertices(graph.adjacency, 4, "random"), [2, 0, 3, 1]
    history = some_history(layers, 32)
    wanted = slopes(graph, layers, weights, chunk, order, history, layer)
    _, grads, _ = chunked(graph, layers, weights, chunk, order, history, reverse=reverse)
    return np.abs(grads[layer] - wanted).max() / np.abs(wanted).max()


def test_gradients_are_finite_differences_of_the_loss_with_history_constant():
    assert error_of_backward(reverse=True) < 1e-6


def test_a_backward_pass_in_the_forward_order_is_wrong():
    assert error_of_backward(reverse=False) > 0.1


# ---- how staleness dies out ------------------------------------------------------------------------------------------


def passes(graph, layers, weights, chunk, orders):
    """Tables after each pass, every pass starting from what the one before left: history refreshed every time."""
    tables = some_history(layers, len(graph.labels))
    for order in orders:
        _, _, tables = chunked(graph, layers, weights, chunk, order, tables)
        yield tables


@pytest.mark.parametrize("model", ["gcn", "gcnii"])
def test_with_frozen_weights_each_pass_makes_one_more_layer_exact(model):
    graph, (layers, weights) = small_graph(), network(model)
    chunk = gnn_pipe.partition_vertices(graph.adjacency, 6, "random")
    exact, random = exact_inputs(graph, layers, weights), np.random.default_rng(0)
    orders = [random.permutation(6).tolist() for _ in range(DEPTH)]
    for q, tables in enumerate(passes(graph, layers, weights, chunk, orders)):
        for i in [i for i in tables if i <= q + 1]:
            assert_allclose(tables[i], exact[i], rtol=0, atol=1e-12, err_msg=f"pass {q}, layer {i}")


@given(seed=st.integers(0, 10_000), chunks=st.integers(2, 6))
@settings(max_examples=15, deadline=None)
def test_after_as_many_passes_as_layers_everything_is_exact(seed, chunks):
    graph, (layers, weights) = small_graph(24, seed), network("gcn")
    chunk, random = gnn_pipe.partition_vertices(graph.adjacency, chunks, "random", seed), np.random.default_rng(seed)
    orders = [random.permutation(chunks).tolist() for _ in range(DEPTH)]
    *_, last = passes(graph, layers, weights, chunk, orders)
    for i, rows in exact_inputs(graph, layers, weights).items():
        assert_allclose(last[i], rows, rtol=0, atol=1e-12)


def test_as_many_passes_as_chunks_are_not_enough():
    """min(depth, chunks) is no bound: with two chunks in alternating order, two passes leave some layer inexact."""
    graph, (layers, weights) = small_graph(), network("gcn", depth=6)
    chunk = gnn_pipe.partition_vertices(graph.adjacency, 2, "random")
    *_, tables = passes(graph, layers, weights, chunk, [[0, 1], [1, 0]])
    exact = exact_inputs(graph, layers, weights)
    assert max(np.abs(tables[i] - exact[i]).max() for i in exact) > 1e-6


def test_inside_a_period_every_epoch_reads_the_same_history():
    """With weights frozen and the order fixed, the loss changes after a refresh and at no other time."""
    _, losses = gnn_pipe.trained(train(small_graph(), chunks=4, epochs=9, period=3, rate=0.0, shuffle=False))
    assert np.flatnonzero(np.abs(np.diff(losses)) > 1e-9).tolist() == [2, 5]


def test_with_period_one_frozen_training_becomes_exact():
    graph, (layers, weights) = small_graph(), network("gcn")
    _, losses = gnn_pipe.trained(train(graph, chunks=6, epochs=DEPTH, period=1, rate=0.0))
    assert losses[-1] == pytest.approx(judge(graph, layers, weights)[0], abs=1e-12)


def test_within_the_first_period_frozen_training_is_not_exact():
    graph, (layers, weights) = small_graph(), network("gcn")
    _, losses = gnn_pipe.trained(train(graph, chunks=6, epochs=DEPTH, period=20, rate=0.0))
    assert abs(losses[-1] - judge(graph, layers, weights)[0]) > 1e-4


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
def test_stale_pairs_are_those_whose_historical_row_changes_the_result(order):
    graph, (layers, weights) = small_graph(), network("gcn", depth=2)
    chunk = gnn_pipe.partition_vertices(graph.adjacency, 4, "random")
    share = gnn_pipe.shares(graph, chunk)[0]

    def rows_after(history):
        stage = gnn_pipe.GNNPipeStage(share, layers, weights)
        stage.tables[1][0][...] = history
        return [stage.forward(c, None)[1][1][0] for c in order]  # what met the second matrix, in the epoch's order

    clean, seen = rows_after(np.zeros((48, HIDDEN))), set()
    for source in range(4):
        marked = np.zeros((48, HIDDEN))
        marked[share.chunks[source]] = 1.0
        for target, before, after in zip(order, clean, rows_after(marked), strict=True):
            if not np.array_equal(before, after):
                seen.add((source, target))
    assert seen == gnn_pipe.stale_pairs(order, gnn_pipe.chunk_adjacency(graph.adjacency, chunk))


# ---- bytes -----------------------------------------------------------------------------------------------------------


def sent(run, *names):
    return sum(e.bytes for e in run.trace if e.kind == "send" and e.name in names)


def halo_bytes(run, features=0):
    return sum(e.bytes for e in run.trace if e.kind == "send" and "all_to_all" in e.name) - features


def replicas(graph, part):
    """Σ over vertices of other parts with a neighbour, the slow way."""
    dense = graph.adjacency.toarray() != 0
    return sum(len(set(part[dense[:, v]].tolist()) - {part[v]}) for v in range(len(part)))


@pytest.mark.parametrize("model", NETWORKS)
@pytest.mark.parametrize("stages, chunks", [(2, 1), (2, 5), (4, 7)])
def test_bytes_between_stages_are_the_formula(model, stages, chunks):
    run = train(small_graph(), model, stages, chunks=chunks)
    wanted = 3 * gnn_pipe.volume_pipe(48, HIDDEN, stages, model == "gcnii", itemsize=8)
    assert sent(run, "activations", "gradients") == wanted == run.traffic.total


@pytest.mark.parametrize("method", graphs.METHODS)
def test_bytes_between_stages_depend_on_no_edge(method):
    run = train(small_graph(), stages=4, chunks=6, method=method)
    assert run.traffic.total == 3 * 2 * 3 * 48 * HIDDEN * 8


@pytest.mark.parametrize("model", NETWORKS)
@pytest.mark.parametrize("method", ["random", "greedy"])
@pytest.mark.parametrize("group", [2, 4])
def test_bytes_inside_a_group_are_the_formula(model, method, group):
    graph = small_graph()
    _, part = gnn_pipe.cut(graph.adjacency, 1, group, method)
    rho = replicas(graph, part)
    first = 0 if model == "gcnii" else WIDTH * rho * 8
    wanted = (2 * DEPTH if model == "gcnii" else 2 * (DEPTH - 1)) * HIDDEN * rho * 8
    run = train(graph, model, group=group, method=method)
    assert halo_bytes(run, first) == 3 * wanted
    assert gnn_pipe.volume_graph(graph.adjacency, part, DEPTH, HIDDEN, gcnii=model == "gcnii", itemsize=8) == wanted


def test_features_sent_in_every_epoch_would_add_their_rows():
    graph = small_graph()
    _, part = gnn_pipe.cut(graph.adjacency, 1, 3)
    volumes = [gnn_pipe.volume_graph(graph.adjacency, part, DEPTH, HIDDEN, width) for width in (WIDTH, None)]
    assert volumes[0] - volumes[1] == WIDTH * replicas(graph, part) * 4


def test_a_directed_graph_sends_different_rows_forward_and_back():
    graph = small_graph(directed=True)
    _, part = gnn_pipe.cut(graph.adjacency, 1, 3)
    back = graphs.Graph(sparse.csr_array(graph.adjacency.T), graph.features, graph.labels, graph.train)
    run = train(graph, group=3)
    rows = replicas(graph, part) + replicas(back, part)
    assert halo_bytes(run, WIDTH * replicas(graph, part) * 8) == 3 * (DEPTH - 1) * HIDDEN * rows * 8


def test_a_hybrid_sends_both():
    graph = small_graph()
    _chunk, part = gnn_pipe.cut(graph.adjacency, 4, 2)
    run = train(graph, "gcnii", stages=2, group=2, chunks=4)
    inside = gnn_pipe.volume_graph(graph.adjacency, part, DEPTH, HIDDEN, gcnii=True, itemsize=8)
    assert halo_bytes(run) == 3 * inside
    assert sent(run, "activations", "gradients") == 3 * gnn_pipe.volume_pipe(48, HIDDEN, 2, True, 8)


def test_the_formula_gives_the_numbers_of_a_known_example():
    """n = 100 000, h = 128, p = 4, float32."""
    assert gnn_pipe.volume_pipe(100_000, 128, 4) == 0.3072e9


def test_zeros_as_bits_change_no_result():
    plain, packed = (gnn_pipe.trained(train(small_graph(), "gcnii", 4, chunks=5, compress=c)) for c in (False, True))
    assert_array_equal(plain[1], packed[1])


def test_zeros_as_bits_save_bytes():
    plain, packed = (sent(train(small_graph(), "gcn", 4, chunks=5, compress=c), "activations") for c in (False, True))
    assert packed < 0.8 * plain


# ---- time and memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages, chunks", list(product([1, 2, 4, 12], [1, 4, 48])))
def test_makespan_with_equal_times_is_the_formula(stages, chunks):
    plan = _schedule.check(gnn_pipe.schedule(stages, chunks))
    assert _schedule.makespan(plan, {"F": 1.0, "B": 2.5}) == pytest.approx((chunks + stages - 1) * 3.5)
    assert _schedule.bubble(plan, 1.0, 2.5) == pytest.approx((stages - 1) / chunks)


@pytest.mark.parametrize("stages, chunks", [(1, 4), (4, 4), (3, 12)])
def test_the_machine_needs_that_time_when_messages_take_none(stages, chunks):
    plan = gnn_pipe.schedule(stages, chunks)
    cluster = Cluster(topology.full_mesh(stages, hardware.Link(1e30)), _pipeline.CLOCK)
    run = cluster.run(_pipeline.replay, plan, {"F": 1.0, "B": 2.5}, np.zeros(1))
    assert run.makespan == pytest.approx((chunks + stages - 1) * 3.5)


def whole_tables(chunks, stages=2, depth=8, hidden=32, vertices=960):
    """Peak bytes of the busiest rank over those of one whole-graph table, shape-only."""
    layers = layers_of("gcn", depth, hidden, hidden, hidden)
    share = owned.expected_share(vertices, 8 * vertices, hidden, chunks)
    weights = first_weights(layers, None, "float32")
    run = mesh(stages, SLOW).run(gnn_pipe.train, share, weights, layers=layers, epochs=1)
    return max(run.peak_memory) / (vertices * hidden * 4)


def test_memory_holds_tables_of_the_whole_graph_for_every_layer_of_a_stage():
    assert whole_tables(8) > 3 * 8 / 2  # inputs, history and gradients of sums for half of eight layers


def test_memory_does_not_shrink_with_more_chunks():
    few, many = whole_tables(4), whole_tables(32)
    assert many > 0.85 * few


def test_one_chunk_needs_no_history():
    assert whole_tables(1) < whole_tables(2) - 4


def test_a_graph_that_does_not_fit_is_refused_by_the_device():
    tiny = hardware.replace(SLOW, memory_capacity=1e6)
    with pytest.raises(OutOfDeviceMemory, match="new_table"):
        train(small_graph(4000), device=tiny, chunks=2)


# ---- the same everywhere ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages, chunks", [(1, 1), (4, 6)])
@pytest.mark.parametrize("model", NETWORKS)
def test_a_shape_only_run_takes_the_same_time_and_bytes(model, stages, chunks):
    graph = small_graph()
    layers, weights = network(model)
    share = gnn_pipe.shares(graph, gnn_pipe.partition_vertices(graph.adjacency, chunks))[0]
    hollow = owned.Share(
        share.vertices,
        share.chunks,
        *(owned.Side(tuple(owned.Pattern(a.shape, a.nnz) for a in side.own), (), side.gives, side.takes, 0)
          for side in (share.forward, share.backward)),
        *map(like, (share.features, share.labels, share.weight)),
    )  # fmt: skip
    options = {"layers": layers, "epochs": 2, "seed": 3}
    real, shapes = (
        mesh(stages, SLOW).run(gnn_pipe.train, part, w, **options)
        for part, w in ((share, weights), (hollow, tuple(map(like, weights))))
    )
    assert (real.makespan, real.traffic.total) == (shapes.makespan, shapes.traffic.total)


def test_every_epoch_has_an_order_of_its_own():
    orders = {tuple(gnn_pipe.permutation(0, epoch, 8)) for epoch in range(20)}
    assert len(orders) == 20
    assert all(sorted(order) == list(range(8)) for order in orders)


def test_a_seed_means_one_order():
    assert gnn_pipe.permutation(7, 3, 16) == gnn_pipe.permutation(7, 3, 16) != gnn_pipe.permutation(8, 3, 16)


MPI_PROGRAM = """
import numpy as np
from toolkit.model_parallel import gnn_pipe
from toolkit.model_parallel._gnn_pipe_graph import community_graph
from toolkit.model_parallel._gnn_pipe_layers import first_weights, layers_of
def answer(cluster):
    graph, layers = community_graph(60), layers_of("gcnii", 4, 16, 8, 4)
    share = gnn_pipe.placed(gnn_pipe.shares(graph, gnn_pipe.partition_vertices(graph.adjacency, 5)), 2)
    return cluster.run(gnn_pipe.train, share, first_weights(layers), layers=layers, epochs=4, period=2)
"""


def test_real_processes_train_with_the_same_orders():
    pytest.importorskip("mpi4py", reason="real processes need pip install '.[mpi]'")
    mpiexec = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if mpiexec is None:
        pytest.skip("no mpiexec here")
    program = MPI_PROGRAM + (
        "from toolkit.runtime import mpi\nrun = answer(mpi.Cluster())\n"
        "print(*map(float.hex, gnn_pipe.trained(run)[1].tolist())) if run else None\n"
    )
    command = [mpiexec, "-n", "2", sys.executable, "-c", program]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    virtual = {}
    exec(MPI_PROGRAM, virtual)
    losses = gnn_pipe.trained(virtual["answer"](mesh(2)))[1]
    assert_allclose([float.fromhex(word) for word in said.split()], losses, rtol=1e-12)


# ---- cutting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", graphs.METHODS)
@given(vertices=st.integers(1, 60), parts=st.integers(1, 60), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_no_part_is_empty_and_sizes_are_near(method, vertices, parts, seed):
    links = sparse.random_array((vertices, vertices), density=0.1, rng=np.random.default_rng(seed), format="csr")
    parts = min(vertices, parts)
    sizes = np.bincount(gnn_pipe.partition_vertices(links, parts, method, seed), minlength=parts)
    assert len(sizes) == parts and sizes.min() >= 1
    assert sizes.max() <= np.ceil(1.05 * vertices / parts)


def test_greedy_finds_planted_groups_and_a_random_cut_does_not():
    links, group = graphs.planted(1000, 20, 20, 0.1)
    entries = links.tocoo()

    def crossing(part):
        return np.mean(part[entries.row] != part[entries.col])

    cuts = [crossing(gnn_pipe.partition_vertices(links, 4, method)) for method in ("greedy", "breadth_first", "random")]
    assert crossing(group // 5) <= cuts[0] < 1.5 * crossing(group // 5)
    assert cuts[0] < cuts[1] < cuts[2]


def test_every_row_that_another_rank_needs_is_given_once():
    graph = small_graph()
    chunk, part = gnn_pipe.cut(graph.adjacency, 3, 4)
    parts = gnn_pipe.shares(graph, chunk, part)
    given = sum(len(rows) for share in parts for gives in share.forward.gives for rows in gives)
    assert given == replicas(graph, part) == sum(share.forward.halo_rows for share in parts)


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_more_chunks_than_vertices_are_refused():
    with pytest.raises(ShapeError, match="48 vertices do not make 49 parts"):
        gnn_pipe.partition_vertices(small_graph().adjacency, 49)


def test_an_unknown_cut_is_refused():
    with pytest.raises(ShapeError, match="'metis' is not one of random"):
        gnn_pipe.partition_vertices(small_graph().adjacency, 2, "metis")


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ShapeError, match="4 layers do not fill 5 stages"):
        train(small_graph(), stages=5, chunks=2)


def test_ranks_that_do_not_divide_into_groups_are_refused():
    layers, weights = network("gcn")
    share = gnn_pipe.shares(small_graph(), np.zeros(48, int))[0]
    with pytest.raises(ShapeError, match="3 ranks do not divide into groups of 2"):
        mesh(3).run(gnn_pipe.train, share, weights, layers=layers, epochs=1, group=2)


def test_an_unknown_model_is_refused():
    with pytest.raises(ShapeError, match="'gat' is not one of gcn, sage, gcnii"):
        layers_of("gat", 2, 4, 4, 2)


# ---- claims and picture ----------------------------------------------------------------------------------------------


def test_the_ratio_of_volumes_is_depth_times_replication_over_borders():
    rho, _ = claims.cut_cost("like products")
    graph, pipe = claims.volumes("like products", "gcnii", 24)
    assert graph / pipe == pytest.approx(24 * rho / (2 * 11))


def test_the_volume_of_a_shape_only_run_is_that_of_its_statistics():
    layers = layers_of("gcnii", 4, 8, 8, 4)
    share = owned.expected_share(960, 9600, 8, chunks=1, parts=4, replicas=1.5, crossing=0.3)
    weights = first_weights(layers, None, "float32")
    run = mesh(4, SLOW).run(gnn_pipe.train, share, weights, layers=layers, epochs=1, group=4)
    assert halo_bytes(run) == 2 * 4 * 1.5 * 960 * 8 * 4


def test_the_win_grows_with_depth():
    gains = [a / b for a, b in (claims.times("like products", "gcnii", depth) for depth in (12, 24))]
    assert gains[0] < gains[1]


def test_a_dense_graph_on_a_fast_network_is_better_cut_by_vertices():
    graph, pipe = claims.times("like Reddit", "gcn", 12, "NVLink, one NIC a GPU")
    assert graph < pipe


def test_the_picture_says_its_numbers_in_words():
    run = train(small_graph(), stages=2, chunks=4, device=SLOW, epochs=1)
    old = np.triu(np.ones((4, 4), bool), 1)
    drawn = picture.draw(run, "pipe", {"pipe": 1e6, "graph": 3e6}, np.ones((4, 4)), old)
    assert "graph 3 MB" in drawn.words and "38 % of links read historical values" in drawn.words


def test_spans_of_the_picture_cover_all_kernels():
    run = train(small_graph(), stages=2, chunks=4, device=SLOW, epochs=1)
    spans = picture.computing(run, 1)
    assert all(a[1] < b[0] for a, b in pairwise(spans))
    assert spans[-1, 1] == max(k[4] for k in run.trace.kernels if k[0] == 1)
