"""GNNPipe: exact where nothing is historical, the exact gradient where something is, and the bytes of its formulas."""

from itertools import product
from math import inf

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy import sparse

from toolkit.model_parallel import _gnn_pipe_graph as graphs
from toolkit.model_parallel import _schedule, gnn_pipe
from toolkit.model_parallel._gnn_pipe_layers import ALPHA, first_weights, layers_of
from toolkit.model_parallel._gnn_pipe_layers import MODELS as NETWORKS
from toolkit.runtime import Cluster, hardware, topology

LINK = hardware.Link(1e9)
DEPTH, HIDDEN, CLASSES, WIDTH = 4, 6, 3, 5
COUNTING = hardware.Device("one row a microsecond", flops=inf, memory_bandwidth=1e9)


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
    return float(loss), x.detach().numpy(), [w.grad.numpy() for w in parameters]


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
        i: judge(graph, layers[:i], weights[:i])[1]
        for i, layer in enumerate(layers)
        if i > 0 and layer.kind != "dense"
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


def test_zeros_as_bits_change_no_result():
    plain, packed = (gnn_pipe.trained(train(small_graph(), "gcnii", 4, chunks=5, compress=c)) for c in (False, True))
    assert_array_equal(plain[1], packed[1])


def test_zeros_as_bits_save_bytes():
    plain, packed = (sent(train(small_graph(), "gcn", 4, chunks=5, compress=c), "activations") for c in (False, True))
    assert packed < 0.8 * plain


# ---- time and memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages, chunks", product([1, 2, 4, 12], [1, 4, 48]))
def test_makespan_with_equal_times_is_the_formula(stages, chunks):
    plan = _schedule.check(gnn_pipe.schedule(stages, chunks))
    assert _schedule.makespan(plan, {"F": 1.0, "B": 2.5}) == pytest.approx((chunks + stages - 1) * 3.5)
    assert _schedule.bubble(plan, 1.0, 2.5) == pytest.approx((stages - 1) / chunks)
