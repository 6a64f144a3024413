"""FSMoE: no schedule changes a result, each takes the time that its formula says, and the formulas choose well."""

from functools import cache, partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy import optimize, stats

from toolkit.claims.model_parallel import fs_moe as claims
from toolkit.model_parallel import _experts, _gates, fs_moe
from toolkit.model_parallel import _fs_moe_costs as costs
from toolkit.model_parallel import _fs_moe_gradients as gradients
from toolkit.model_parallel import _fs_moe_picture as picture
from toolkit.model_parallel import _fs_moe_times as times
from toolkit.model_parallel._mesh import Grid
from toolkit.runtime import Cluster, hardware, like, per_rank, topology
from toolkit.runtime.errors import ShapeError

torch = pytest.importorskip("torch")
import mixture_by_hand as by_hand  # noqa: E402

NODES, PER_NODE, E, H, HIDDEN, TOKENS = 2, 2, 4, 16, 32, 16  # 4 ranks of 16 tokens
FACTOR, BALANCE, SLOTS = 2.4, 0.1, 10  # 2.4 · 16 / 4, rounded up
GATES = {
    "noisy top-k": _gates.noisy_top_k(2, seed=5, balance=BALANCE),
    "sigmoid": _gates.sigmoid(2),
    "cosine": _gates.cosine(2),
    "expert choice": _gates.expert_choice(2),
}
any_gate = pytest.mark.parametrize("kind", GATES)


@cache
def inputs(kind):
    """(whole weights, tokens of each rank, gradient of each rank's output)"""
    random = np.random.default_rng(3)
    weights = _experts.expert_weights(random, GATES[kind], H, HIDDEN, E)
    return weights, *random.standard_normal((2, NODES * PER_NODE, TOKENS, H))


@cache
def wanted(kind, slots):
    """Outputs, gradients of tokens and of weights, by PyTorch on one device: each rank's tokens with its slots."""
    weights, x, grad = inputs(kind)
    w, x = by_hand.tensors(weights), by_hand.tensors(x)
    noise = torch.tensor(np.random.default_rng(5).standard_normal((TOKENS, E))) if kind == "noisy top-k" else None
    balance = BALANCE if kind == "noisy top-k" else 0.0
    made = [by_hand.mixture(kind, w, part, 2, slots, noise, balance) for part in x]
    sum((y * torch.tensor(g)).sum() + loss for (y, loss), g in zip(made, grad, strict=True)).backward()
    grads = {"expert_up": w["expert_up"].grad.numpy(), "expert_down": w["expert_down"].grad.numpy()}
    grads["router"] = {name: a.grad.numpy() for name, a in w["router"].items()}
    return np.stack([y.detach().numpy() for y, _ in made]), x.grad.numpy(), grads


def both_ways(comm, layer, whole, x, grad, gradients=(None, None)):
    """(y, dx, this rank's gradients, the reduced pieces)"""
    grid = Grid(comm, tp=PER_NODE, ep=NODES)
    mine = _experts.cut_experts(whole, grid.ep, grid.tp)
    y, saved, one = fs_moe.forward(layer, grid, mine, x, gradients[0])
    dx, grads, two = fs_moe.backward(layer, grid, mine, saved, grad, gradients[1])
    grads["router"] = {name: comm.all_reduce(g) for name, g in grads["router"].items()}
    return y, dx, grads, (one, two)


def machine(device=hardware.IDEAL, inside=hardware.NVLINK3, between=hardware.IB_HDR):
    return Cluster(topology.two_level(NODES, PER_NODE, inside, between, inside="switch"), device)


def run(layer, kind, **options):
    whole, x, grad = inputs(kind)
    return machine().run(both_ways, layer, whole, per_rank(list(x)), per_rank(list(grad)), **options)


def error(result, kind, slots=SLOTS):
    """The largest difference from PyTorch of outputs and of all gradients."""
    y, dx, grads = wanted(kind, slots)
    found = []
    for rank, (got_y, got_dx, got, _) in enumerate(result.outputs):
        node, place = divmod(rank, PER_NODE)
        experts, channels = slice(node * 2, node * 2 + 2), slice(place * 16, place * 16 + 16)
        found += [got_y - y[rank], got_dx - dx[rank]]
        found += [got["expert_up"] - grads["expert_up"][experts, :, channels]]
        found += [got["expert_down"] - grads["expert_down"][experts, channels]]
        found += [got["router"][name] - a for name, a in grads["router"].items()]
    return max(np.abs(part).max() for part in found)


@pytest.mark.parametrize("r_fwd, r_bwd", [(1, 1), (2, 2), (4, 4), (2, 4), (4, 1), (3, 2)])
@any_gate
def test_any_degree_gives_pytorchs_outputs_and_gradients(kind, r_fwd, r_bwd):
    assert error(run(fs_moe.FSMoELayer(GATES[kind], FACTOR, r_fwd, r_bwd), kind), kind) < 1e-12


@pytest.mark.parametrize("streams", fs_moe.LANES)
@any_gate
def test_lanes_change_nothing_to_the_bit(kind, streams):
    ours, plain = (run(fs_moe.FSMoELayer(GATES[kind], FACTOR, 2, 2, s), kind) for s in (streams, "sequential"))
    for got, want in zip(ours.outputs, plain.outputs, strict=True):
        assert got[0].tobytes() == want[0].tobytes()
        assert got[1].tobytes() == want[1].tobytes()
        assert all(got[2][name].tobytes() == want[2][name].tobytes() for name in _experts.EXPERTS)


def test_a_capacity_that_drops_tokens_equals_pytorch_too():
    layer = fs_moe.FSMoELayer(GATES["sigmoid"], 1.0, 2, 4)
    assert error(run(layer, "sigmoid"), "sigmoid", 4) < 1e-12
    assert error(run(layer, "sigmoid"), "sigmoid", 10) > 1e-3


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_gradients_reduced_in_pieces_are_the_sum_and_change_nothing_else(share):
    dense = np.random.default_rng(1).standard_normal((4, 1000))
    cut = int(share * 1000)
    pieces = per_rank([(part[:cut] if cut else None, part[cut:] if cut < 1000 else None) for part in dense])
    result = run(fs_moe.FSMoELayer(GATES["sigmoid"], FACTOR, 2, 4), "sigmoid", gradients=pieces)
    assert error(result, "sigmoid") < 1e-12
    for rank, output in enumerate(result.outputs):
        whole = np.concatenate([piece for piece in output[3] if piece is not None])
        assert_allclose(whole, dense[rank] + dense[(rank + 2) % 4], rtol=0, atol=1e-12)  # nodes are 2 ranks apart


def test_a_chunk_lost_on_the_way_is_caught():
    lost = {"after_combine": (lambda chunk: 0 * chunk, lambda grad: grad)}
    assert error(run(fs_moe.FSMoELayer(GATES["sigmoid"], FACTOR, 2, 2, hooks=lost), "sigmoid"), "sigmoid") > 0.1


def test_hooks_and_their_adjoints_stand_at_both_ends_of_dispatch_and_combine():
    """Linear hooks: scaling what experts get by 2, and what they give by 3 · 0.5, is scaling the weights."""
    factors = {"before_dispatch": 4.0, "after_dispatch": 0.5, "before_combine": 3.0, "after_combine": 0.5}
    hooks = {place: (partial(np.multiply, factor),) * 2 for place, factor in factors.items()}
    whole, x, grad = inputs("sigmoid")
    scaled = whole | {"expert_up": 2 * whole["expert_up"], "expert_down": 1.5 * whole["expert_down"]}
    ranks = per_rank(list(x)), per_rank(list(grad))
    hooked = fs_moe.FSMoELayer(GATES["sigmoid"], FACTOR, 2, 4, hooks=hooks)
    ours = machine().run(both_ways, hooked, whole, *ranks)
    plain = machine().run(both_ways, fs_moe.FSMoELayer(GATES["sigmoid"], FACTOR), scaled, *ranks)
    for got, want in zip(ours.outputs, plain.outputs, strict=True):
        assert_allclose(got[0], want[0], rtol=0, atol=1e-12)
        assert_allclose(got[1], want[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", [0, 1], ids=["tokens", "gradients"])
def test_slots_that_only_make_chunks_equal_travel_as_zeros(way):
    """10 slots in 4 chunks are 12: the last two are empty in both directions."""
    seen = {"before_dispatch": [], "after_combine": []}
    hooks = {
        "before_dispatch": (lambda c: seen["before_dispatch"].append(c) or c, lambda c: c),
        "after_combine": (lambda c: c, lambda c: seen["after_combine"].append(c) or c),
    }
    run(fs_moe.FSMoELayer(_gates.sigmoid(E), FACTOR, 4, 4, hooks=hooks), "sigmoid")
    chunks = seen["before_dispatch" if way == 0 else "after_combine"]
    assert [chunk.shape[1] for chunk in chunks] == [3] * 16
    empty = [chunk[:, 1:] for chunk in chunks if not chunk[:, 1:].any()]
    assert len(empty) == 4  # the last chunk of each rank has one slot of ten
    assert all(chunk[:, 0].any() for chunk in chunks)


# ---- lanes on the machine --------------------------------------------------------------------------------------------

FAR = hardware.Link(1e9, 5e-6)
MACHINES = {  # products/s, bytes/s inside a node; nothing else takes time
    "experts": (1e8, 2e9),
    "between nodes": (1e11, 4e9),
    "inside nodes": (1e11, 5e7),
}
any_machine = pytest.mark.parametrize("binds", MACHINES)


def forward_only(comm, layer, whole, x, gradients=None):
    grid = Grid(comm, tp=PER_NODE, ep=NODES)
    return fs_moe.forward(layer, grid, _experts.cut_experts(whole, grid.ep, grid.tp), x, gradients)[0]


def timed(r, streams="three", gradients=None, binds="inside nodes", kind="sigmoid"):
    whole, x, _ = inputs(kind)
    layer = fs_moe.FSMoELayer(GATES[kind], 2.5, r, r, streams)  # 10 slots
    cluster = timed_machine(binds)
    return cluster.run(forward_only, layer, whole, per_rank(list(x)), gradients=gradients)


def timed_machine(binds):
    rate, inside = MACHINES[binds]
    return machine(hardware.Device("clock", rate, np.inf), hardware.Link(inside, 3e-6), FAR)


def by_formula(r, binds):
    """Seconds of a chunk's operations, by latencies and bytes, and of the gate before."""
    rate, near = MACHINES[binds]
    chunk = E * (10 / r) * H * 8  # bytes of a rank's slots
    between = 2 * 5e-6 + chunk / 2 / 1e9
    inside = 2 * 3e-6 + chunk / near
    products = 2 * 2 * (E / 2) * (PER_NODE * NODES * 10 / r) * H * (HIDDEN / 2) / rate
    return (between, inside, products, inside), 2 * TOKENS * H * E / rate


@any_machine
@pytest.mark.parametrize("numbers", [0, 4000])
@pytest.mark.parametrize("r", [1, 2, 5, 10])
def test_the_program_takes_as_long_as_the_closed_form(r, numbers, binds):
    t, gate = by_formula(r, binds)
    reducing = 2 * (2 * 5e-6 + numbers * 8 / 2 / 1e9) if numbers else 0.0  # halves to their adders, sums to everybody
    result = timed(r, gradients=like((numbers,)) if numbers else None, binds=binds)
    assert_allclose(result.makespan - gate, times.terms(r, t, reducing).max(), rtol=1e-9)


@any_machine
@pytest.mark.parametrize("streams", ["one network", "sequential"])
@pytest.mark.parametrize("r", [1, 2, 5])
def test_rivals_programs_take_as_long_as_their_simulation(streams, r, binds):
    t, gate = by_formula(r, binds)
    result = timed(r, streams, binds=binds)
    assert_allclose(result.makespan - gate, times.simulate_layer(t, r, streams=streams)[0], rtol=1e-9)


@any_machine
@pytest.mark.parametrize("r_fwd, r_bwd", [(1, 5), (5, 1), (2, 2)])
def test_backward_takes_the_closed_form_with_experts_twice_as_long(r_fwd, r_bwd, binds):
    def program(comm, layer, whole, x):
        grid = Grid(comm, tp=PER_NODE, ep=NODES)
        mine = _experts.cut_experts(whole, grid.ep, grid.tp)
        y, saved, _ = fs_moe.forward(layer, grid, mine, x)
        start = comm.now
        fs_moe.backward(layer, grid, mine, saved, y)
        return comm.now - start

    whole, x, _ = inputs("sigmoid")
    layer = fs_moe.FSMoELayer(GATES["sigmoid"], 2.5, r_fwd, r_bwd)
    seconds = timed_machine(binds).run(program, layer, whole, per_rank(list(x))).outputs[0]
    (t0, t1, t2, t3), gate = by_formula(r_bwd, binds)
    assert_allclose(seconds - 2 * gate, times.terms(r_bwd, (t0, t1, 2 * t2, t3)).max(), rtol=1e-9)


@any_machine
def test_each_machine_has_its_bound_so_that_these_tests_compare_more_than_one(binds):
    bounds = times.terms(5, by_formula(5, binds)[0])
    assert times.TERMS[int(bounds.argmax())] == binds


def test_a_shape_only_run_takes_the_same_time_and_sends_the_same_bytes():
    whole, x, _ = inputs("sigmoid")
    shaped = {name: like(w) for name, w in whole.items() if name != "router"} | {"router": {"logits": like((H, E))}}
    layer = fs_moe.FSMoELayer(GATES["sigmoid"], 2.5, 5, 5)
    shape_only = timed_machine("inside nodes").run(forward_only, layer, shaped, like(x[0]))
    assert shape_only.makespan == timed(5).makespan
    assert shape_only.traffic.total == timed(5).traffic.total


def test_bytes_do_not_depend_on_the_degree():
    assert timed(1).traffic.total == timed(5).traffic.total


def sends(result, rank=0):
    """(name, start, end) of a rank's messages in order."""
    found = [(e.name, e.start, e.end) for e in result.trace if e.kind == "send" and e.rank == rank]
    return sorted(found, key=lambda event: event[1])


def test_gradients_leave_between_the_last_dispatch_and_the_first_combine():
    names = [name for name, *_ in sends(timed(5, gradients=like((4000,)))) if name in ("all_to_all", "all_reduce")]
    assert names == ["all_to_all"] * 5 + ["all_reduce"] * 2 + ["all_to_all"] * 5


@pytest.mark.parametrize("streams, together", [("three", True), ("one network", False), ("sequential", False)])
def test_both_networks_are_busy_at_once_only_with_three_lanes(streams, together):
    messages = sends(timed(5, streams))
    far = [(a, b) for name, a, b in messages if name == "all_to_all"]
    near = [(a, b) for name, a, b in messages if name in ("all_gather", "reduce_scatter")]
    assert any(a < d - 1e-12 and c < b - 1e-12 for a, b in far for c, d in near) == together


# ---- closed forms ----------------------------------------------------------------------------------------------------

seconds = st.floats(0.01, 10)
degree = st.sampled_from([1, 2, 3, 4, 8])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(seconds, seconds, seconds, st.one_of(st.just(0.0), st.floats(0.01, 40)), degree)
def test_the_simulation_equals_the_form_when_gather_and_scatter_take_equally_long(t0, t1, t2, g, r):
    t = t0, t1, t2, t1
    assert_allclose(times.simulate_layer(t, r, g)[0], times.terms(r, t, g).max(), rtol=1e-12)
    one = max(r * (2 * t0 + 2 * t1) + g, 2 * t0 + 2 * t1 + r * t2)
    assert_allclose(times.simulate_layer(t, r, g, "one network")[0], one, rtol=1e-12)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(seconds, seconds, seconds, seconds, st.one_of(st.just(0.0), st.floats(0.01, 40)), degree)
def test_the_form_is_never_above_the_simulation(t0, t1, t2, t3, g, r):
    assert times.simulate_layer((t0, t1, t2, t3), r, g)[0] >= times.terms(r, (t0, t1, t2, t3), g).max() - 1e-12


def test_the_form_can_be_below_the_simulation():
    assert times.simulate_layer((1, 2, 0, 0), 8)[0] > 1.3 * times.terms(8, (1, 2, 0, 0)).max()


@pytest.mark.parametrize(
    "t, r, g, bounds",
    [
        ((2, 1, 3, 1), 2, 0, [10, 12, 8, 8]),
        ((2, 1, 3, 1), 2, 9, [10, 12, 8, 17]),
        ((2, 1, 3, 1), 4, 0, [18, 18, 12, 16]),
    ],
)
def test_the_cases_worked_by_hand(t, r, g, bounds):
    assert times.terms(r, t, g).tolist() == bounds
    assert times.simulate_layer(t, r, g)[0] == max(bounds)


line = st.tuples(*[st.floats(1e-5, 1e-2)] * 5)
works = st.tuples(*[st.floats(1e3, 1e7)] * 4)
lines = st.builds(lambda a, b: costs.Costs(a, tuple(x * 1e-6 for x in b)), line, line)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(lines, works, st.floats(0, 1e6), st.floats(1, 2), st.integers(0, 4), st.sampled_from(times.DEGREES))
def test_more_gradient_or_a_slower_operation_never_makes_a_layer_faster(c, work, g, factor, kind, r):
    slower = costs.Costs(*(tuple(x * (factor if i == kind else 1) for i, x in enumerate(v)) for v in (c.alpha, c.beta)))
    before = times.moe_time(r, c, work, g)
    assert times.moe_time(r, slower, work, g) >= before
    assert times.moe_time(r, c, work, factor * g) >= before


@settings(max_examples=100, deadline=None, derandomize=True)
@given(lines, works, st.sampled_from(times.DEGREES))
def test_one_chunk_is_the_sum_and_no_resource_can_be_overcommitted(c, work, r):
    t0, t1, t2, t3 = c.chunk(work, 1)
    assert_allclose(times.moe_time(1, c, work), 2 * t0 + t1 + t2 + t3, rtol=1e-12)
    t0, t1, t2, t3 = c.chunk(work, r)
    assert times.moe_time(r, c, work) >= max(2 * r * t0, r * t2, r * (t1 + t3)) - 1e-12


@settings(max_examples=100, deadline=None, derandomize=True)
@given(lines, works, st.floats(0, 1e6))
def test_three_lanes_are_never_slower_than_one_network_nor_that_than_none(c, work, g):
    three, one = (times.best_degree(c, work, g, streams)[1] for streams in ("three", "one network"))
    assert three <= one * (1 + 1e-12)
    assert one <= float(times.moe_time(1, c, work, g, "sequential")) * (1 + 1e-12)


def random_layers(count):
    random = np.random.default_rng(0)
    for _ in range(count):
        alpha, beta = 10 ** random.uniform(-5, -3, 5), 10 ** random.uniform(-11, -9, 5)
        alpha[3], beta[3] = alpha[1], beta[1]
        x0, x1, x2 = 10 ** random.uniform(5, 8, 3)
        yield costs.Costs(tuple(alpha), tuple(beta)), (x0, x1, x2, x1)


def test_the_degree_is_the_best_of_four_simulations_for_a_thousand_layers():
    for c, work in random_layers(1000):
        finish = [times.simulate_layer(c.chunk(work, r), r)[0] for r in times.DEGREES]
        r, took = times.best_degree(c, work)
        assert_allclose(took, min(finish), rtol=1e-12)
        assert_allclose(finish[times.DEGREES.index(r)], min(finish), rtol=1e-12)


def test_the_best_whole_degree_is_a_neighbour_of_the_best_real_one():
    for c, work in random_layers(100):
        real, bound = times.real_degree(c, work)
        below = max(r for r in times.DEGREES if r <= real + 1e-6)
        above = min(r for r in times.DEGREES if r >= real - 1e-6)
        took = times.best_degree(c, work)[1]
        assert took >= bound * (1 - 1e-6)
        assert_allclose(took, min(float(times.moe_time(r, c, work)) for r in (below, above)), rtol=1e-6)


def test_the_authors_example_takes_58_86_and_74_ms():
    """By hand from their constants, in ms: 8 chunks of gather and scatter bound it; one chunk is the sum."""
    work = costs.workload(**costs.PUBLISHED_LAYER)
    x = 2.4 * 4096 * 4096
    t0, inside = 0.2351535 + 1.8543323833e-6 * x / 64, 0.0549 + 0.0688 + (6.72388e-7 + 6.70433e-7) * x / 8
    r, took = times.best_degree(costs.PUBLISHED, work)
    assert r == 8
    assert_allclose(took * 1e3, 2 * t0 + 8 * inside, rtol=1e-6)
    assert round(took * 1e3, 1) == 57.9
    assert round(float(times.moe_time(1, costs.PUBLISHED, work)) * 1e3, 1) == 86.2
    r, took = times.best_degree(costs.PUBLISHED, work, 0.0, "one network")
    assert (r, round(took * 1e3, 1)) == (2, 73.9)


# ---- fitting ---------------------------------------------------------------------------------------------------------


def test_fitted_lines_are_the_machines_latencies_and_bandwidths():
    machine_ = topology.two_level(3, 4, hardware.Link(8e9, 2e-6), hardware.Link(1e9, 7e-6), inside="switch")
    found, quality = costs.fit(costs.profile(machine_, hardware.Device("clock", 2e12, np.inf), 3, "float16"))
    far, near = 2 * 7e-6, 2 * 2e-6  # latencies of two links
    alpha = far, near, 0.0, near, 2 * far
    beta = 2 / 3 * 2 / 1e9, 3 / 4 * 2 / 8e9, 2 / 2e12, 3 / 4 * 2 / 8e9, 4 / 3 * 2 / 1e9
    assert_allclose(found.alpha, alpha, rtol=0.01, atol=1e-9)
    assert_allclose(found.beta, beta, rtol=0.01)
    assert min(quality.values()) > 0.9999


def test_the_fit_is_that_of_scipy_on_noisy_samples():
    random = np.random.default_rng(0)
    samples = {name: (x := random.uniform(1, 9, 20), 2 + 3 * x + random.standard_normal(20)) for name in costs.NAMES}
    found, quality = costs.fit(samples)
    for kind, (x, t) in enumerate(samples.values()):
        want = stats.linregress(x, t)
        assert_allclose((found.alpha[kind], found.beta[kind]), (want.intercept, want.slope), rtol=1e-9)
        assert_allclose(quality[costs.NAMES[kind]], want.rvalue**2, rtol=1e-9)


def test_too_few_sizes_are_refused():
    with pytest.raises(ValueError, match="all_to_all: 3 sizes were timed"):
        costs.fit({name: ([1, 2, 3], [1, 2, 3]) for name in costs.NAMES})


# ---- gradients -------------------------------------------------------------------------------------------------------


@st.composite
def stacks(draw):
    scale = draw(st.sampled_from([1, 3, 10]))
    one = st.tuples(st.floats(1e-4, 4e-2), st.floats(1e5, 3e7), st.floats(0.2, 2))
    layers = draw(st.lists(one, min_size=1, max_size=5))
    work = costs.workload(**costs.PUBLISHED_LAYER)
    return [
        gradients.Layer(tuple(x * size for x in work), dense, g) for dense, g, size in layers
    ], costs.PUBLISHED.scaled(all_to_all=scale, all_reduce=scale)


every_method = pytest.mark.parametrize("method", gradients.METHODS)


@every_method
@settings(max_examples=25, deadline=None, derandomize=True)
@given(stacks())
def test_pieces_add_up_and_none_is_sent_before_it_exists(method, stack):
    layers, c = stack
    plan = gradients.partition_gradients(layers, c, method)
    assert_allclose(sum(plan.pieces) + plan.rest, sum(layer.gradient for layer in layers), rtol=1e-9)
    assert min(plan.pieces) >= 0
    existing = sent = 0.0
    for (kind, number), piece in zip(plan.windows, plan.pieces, strict=True):
        sent += piece
        assert sent <= existing * (1 + 1e-9)
        existing += layers[number].gradient if kind == "dense" else 0.0


@every_method
@settings(max_examples=25, deadline=None, derandomize=True)
@given(stacks())
def test_the_backward_pass_takes_the_sum_of_its_windows_each_piece_with_one_start(method, stack):
    layers, c = stack
    plan = gradients.partition_gradients(layers, c, method)
    back, total, degrees = c.backward(), 0.0, iter(plan.degrees)
    message = lambda numbers: back.alpha[4] + back.beta[4] * numbers if numbers else 0.0  # noqa: E731
    for (kind, number), piece in zip(plan.windows, plan.pieces, strict=True):
        if kind == "experts":
            r = next(degrees)
            total += times.terms(r, back.chunk(layers[number].work, r), message(piece)).max()
        else:
            assert message(piece) <= layers[number].dense * (1 + 1e-9)
            total += layers[number].dense
    assert_allclose(plan.seconds, total + message(plan.rest), rtol=1e-9)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(stacks())
def test_no_method_is_slower_than_gradients_at_the_end_and_pushing_never_hurts(stack):
    end, greedy, de, dp = (gradients.partition_gradients(*stack, method).seconds for method in gradients.METHODS)
    assert greedy <= end * (1 + 1e-9)
    assert de <= greedy * (1 + 1e-9)
    assert dp <= greedy * (1 + 1e-9)


def test_evolution_comes_within_a_percent_of_the_exact_plan_where_pushing_pays():
    c = costs.PUBLISHED.scaled(all_to_all=4, all_reduce=4)
    layers = [gradients.Layer(costs.workload(**costs.PUBLISHED_LAYER), 1e-3, 5e6)] * 6
    greedy, de, dp = (gradients.partition_gradients(layers, c, method).seconds for method in ("greedy", "de", "dp"))
    assert dp < 0.99 * greedy
    assert_allclose(de, dp, rtol=0.01)


def test_the_grid_finds_what_scipys_linear_programme_finds_for_one_degree():
    """With r fixed, a layer's time is convex in z and piecewise linear, so the step is a linear programme.

    Dense parts are shorter than a message's start, so that only layers with experts can take some.
    """
    c = costs.PUBLISHED.scaled(all_to_all=4, all_reduce=4)
    layers = [gradients.Layer(costs.workload(**costs.PUBLISHED_LAYER), 3e-4, g) for g in (4e6, 9e6, 2e6)]
    plan, back = gradients.partition_gradients(layers, c, "dp", degrees=(2,)), c.backward()
    t = back.chunk(layers[0].work, 2)
    free, base = times.terms(2, t).max(), 4 * t[0] + back.alpha[4]
    # unknowns: z of the three layers in the order of the pass, their seconds, the rest
    bounds = [(0, None)] * 3 + [(free, None)] * 3 + [(0, None)]
    above = [[back.beta[4] * (i == j) for i in range(3)] + [-1.0 * (i == j) for i in range(3)] + [0] for j in range(3)]
    exists = [[1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0]]
    found = optimize.linprog([0, 0, 0, 1, 1, 1, back.beta[4]], above + exists, [-base] * 3 + [0, 2e6, 11e6],
                             [[1, 1, 1, 0, 0, 0, 1]], [15e6], bounds)  # fmt: skip
    assert_allclose(plan.seconds, found.fun + 9e-4 + back.alpha[4], rtol=2e-4)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method='magic' is none of end, greedy, de, dp"):
        gradients.partition_gradients([], costs.PUBLISHED, "magic")


@pytest.mark.parametrize("name", claims.MODELS)
@pytest.mark.parametrize("kind", [kind for kind in gradients.RIVALS if kind != "FSMoE"])
def test_fsmoe_is_never_slower_than_a_rival_on_a_model(kind, name):
    assert claims.step_seconds("published", name, "FSMoE") <= claims.step_seconds("published", name, kind) * (1 + 1e-9)


def test_a_rival_without_overlap_takes_the_sum_of_everything():
    layers, c = claims.model("GPT-2 XL", costs.PUBLISHED), costs.PUBLISHED
    t0, t1, t2, t3 = c.chunk(layers[0].work, 1)
    total = 8 * (2 * (2 * t0 + t1 + t3) + 3 * t2 + 1.5 * layers[0].dense)
    total += c.alpha[4] + c.beta[4] * 8 * layers[0].gradient
    assert_allclose(gradients.baseline_time("DeepSpeed-MoE", layers, c), total, rtol=1e-12)


# ---- claims and picture ----------------------------------------------------------------------------------------------


def test_there_are_1458_layers():
    assert len(claims.layers("published")["FSMoE"]) == 1458


def test_the_picture_ends_where_the_pass_ends_and_marks_the_bound_that_binds():
    work = costs.workload(**costs.PUBLISHED_LAYER)
    layers = [claims.layer(costs.PUBLISHED, work, 4096, 1024, 4096)] * 2
    plan = gradients.partition_gradients(layers, costs.PUBLISHED, "dp", degrees=(4,))
    events, finish = picture.timeline(layers, costs.PUBLISHED.backward(), 4, plan)
    assert_allclose(finish, plan.seconds, rtol=1e-3)  # gather and scatter differ by a few parts in a thousand
    assert max(end for *_, end in events) == finish
    drawn = picture.draw(layers, costs.PUBLISHED, 4, "adaptive")
    assert "50% of the gradients travel before the end" in drawn.words
    assert drawn.svg.count("binds") == 1


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"streams": "two"}, "streams='two' is none of three, one network, sequential"),
        ({"hooks": {"on_dispatch": ()}}, "hooks at on_dispatch: places are before_dispatch"),
        ({"r_bwd": 0}, "a layer has at least one chunk"),
    ],
)
def test_a_layer_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fs_moe.FSMoELayer(GATES["sigmoid"], FACTOR, **options)


def test_more_chunks_than_slots_are_refused():
    with pytest.raises(ShapeError, match="11 chunks of 10 slots an expert"):
        timed(11)


def test_lanes_that_do_not_exist_have_no_time():
    with pytest.raises(ValueError, match="streams='two'"):
        times.moe_time(1, costs.PUBLISHED, (1, 1, 1, 1), streams="two")
