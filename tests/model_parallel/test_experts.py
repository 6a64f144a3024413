"""Experts spread over ranks, alone and in a placed transformer: the outputs, loss and gradients of one device."""

from functools import cache, partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from toolkit.model_parallel import _experts, _gates, _layers, _model, _schedule
from toolkit.model_parallel._mesh import Grid
from toolkit.runtime import Cluster, hardware, like, positions, topology
from toolkit.runtime.errors import ShapeError
from toolkit.sequence_parallel import _block as blocks
from toolkit.sequence_parallel import ring_attention

torch = pytest.importorskip("torch")
import mixture_by_hand as by_hand  # noqa: E402
from placed_model import BATCH, HEAD_DIM, HEADS, LAYERS, TOKENS, VOCABULARY, H, leaves, mapped, model  # noqa: E402

EXPERTS, HIDDEN = 4, 16
WITH_EXPERTS = (1, 3)  # layers; the others have an MLP
GATES = {"noisy top-k": _gates.noisy_top_k(2), "sigmoid": _gates.sigmoid(2), "cosine": _gates.cosine(2)}
any_gate = pytest.mark.parametrize("kind", GATES)


def machine(ranks):
    return Cluster(topology.switch(ranks, hardware.NVLINK3), hardware.IDEAL)


def alone(comm):
    return comm.group([comm.rank])


# ---- a transformer with experts in every second layer, on one device -------------------------------------------------


@cache
def mixed(kind, tied=False):
    """(whole parameters, tokens, targets)"""
    params, tokens, targets = model(tied)
    params, random = dict(params, layers=list(params["layers"])), np.random.default_rng(7)
    for number in WITH_EXPERTS:
        attention = {name: w for name, w in params["layers"][number].items() if name not in ("up", "down")}
        params["layers"][number] = attention | _experts.expert_weights(random, GATES[kind], H, HIDDEN, EXPERTS)
    return params, tokens, targets


@cache
def torch_step(kind, tied=False):
    """Loss and gradients by PyTorch's autograd; experts token by token."""
    params, tokens, targets = mixed(kind, tied)
    params = mapped(lambda a: torch.tensor(a, requires_grad=True), params)
    functional = torch.nn.functional
    angle = torch.as_tensor(np.arange(TOKENS)[:, None] * 10_000.0 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2)))
    norm = partial(functional.rms_norm, normalized_shape=(H,), eps=1e-6)

    def heads(x):
        return x.reshape(BATCH, TOKENS, HEADS, HEAD_DIM).transpose(1, 2)

    def turned(x):
        a, b = heads(x).chunk(2, dim=-1)
        return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), dim=-1)

    x = params["embedding"][torch.as_tensor(tokens)]
    for w in params["layers"]:
        normed = norm(x, weight=w["norm_1"])
        q, k, v = turned(normed @ w["q"]), turned(normed @ w["k"]), heads(normed @ w["v"])
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + out.transpose(1, 2).reshape(BATCH, TOKENS, -1) @ w["o"]
        normed = norm(x, weight=w["norm_2"])
        if "router" in w:
            x = x + by_hand.mixture(kind, w, normed.reshape(-1, H))[0].reshape(x.shape)
        else:
            x = x + functional.gelu(normed @ w["up"], approximate="tanh") @ w["down"]
    logits = norm(x, weight=params["norm"]) @ (params["embedding"].T if tied else params["head"])
    loss = functional.cross_entropy(logits.reshape(-1, VOCABULARY), torch.as_tensor(targets).reshape(-1))
    loss.backward()
    return float(loss.detach()), mapped(lambda a: a.grad.numpy(), params)


# ---- and placed ------------------------------------------------------------------------------------------------------


def step(comm, kind, tied, sizes, schedule, edge=_layers.REPLICATED, broken=None):
    """(loss, this rank's gradients, those that it should have)"""
    grid = Grid(comm, **sizes)
    params, tokens, targets = mixed(kind, tied)
    where = positions("zigzag", grid.cp.rank, grid.cp.size, TOKENS)
    attention = blocks.exact(ring_attention, causal=True, layout="zigzag")
    setting = _layers.Setting(grid.tp, grid.cp, attention, HEAD_DIM, where, edge)
    layer = _model.Layer(*_experts.layer(grid.ep, GATES[kind]))
    plan = _model.Plan(grid, schedule, setting, tied, layer)
    mine = (_model.share_of(grid, batch, schedule.microbatches, where) for batch in (tokens, targets))
    chunks = _model.cut(params, grid, schedule, HEAD_DIM)
    loss, grads, _ = _model.loss_and_gradients(plan, chunks, *mine, BATCH * TOKENS)
    if broken == "experts summed over ep, too":
        for chunk in grads:
            for w in chunk["layers"]:
                w |= {name: grid.ep.all_reduce(w[name]) for name in _experts.EXPERTS if name in w}
    return loss, grads, _model.cut(torch_step(kind, tied)[1], grid, schedule, HEAD_DIM)


def run(sizes, schedule, kind="noisy top-k", tied=False, **options):
    return machine(int(np.prod(list(sizes.values())))).run(step, kind, tied, sizes, schedule, **options)


def worst(result, kind="noisy top-k", tied=False):
    """Largest error of any rank's loss or gradient, over the largest gradient."""
    loss, _ = torch_step(kind, tied)
    error = max(abs(float(output[0]) - loss) / abs(loss) for output in result.outputs)
    for _, got, want in result.outputs:
        pairs = list(zip(leaves(got), leaves(want), strict=True))
        assert [name for (name, _), _ in pairs] == [name for _, (name, _) in pairs]
        error = max(error, *(np.abs(a - b).max() / np.abs(b).max() for (_, a), (_, b) in pairs))
    return error


GRIDS = [
    dict(zip(("tp", "cp", "ep", "dp", "pp"), map(int, sizes), strict=True))
    for sizes in np.ndindex(5, 3, 5, 5, 5)
    if all(n in (1, 2, 4) for n in sizes) and np.prod(sizes) <= 16 and sizes[2] > 1
]


@st.composite
def placements(draw):
    sizes = draw(st.sampled_from(GRIDS))
    chunks = draw(st.sampled_from([v for v in (1, 2) if LAYERS % (v * sizes["pp"]) == 0]))
    per_rank = BATCH // (sizes["dp"] * sizes["ep"])
    fitting = [m for m in (1, 2, 4) if per_rank % m == 0 and m % sizes["pp"] == 0]
    if not fitting:
        sizes, chunks, fitting = dict(sizes, pp=1), 1, [1]
    schedule = _schedule.interleaved(sizes["pp"], draw(st.sampled_from(fitting)), chunks)
    edge = draw(st.sampled_from([_layers.REPLICATED, _layers.SEQUENCE]))
    return sizes, schedule, draw(st.sampled_from(sorted(GATES))), draw(st.booleans()), edge


@settings(max_examples=15, deadline=None, derandomize=True)
@given(placements())
def test_any_grid_with_experts_gives_pytorchs_loss_and_gradients(placement):
    sizes, schedule, kind, tied, edge = placement
    assert worst(run(sizes, schedule, kind, tied, edge=edge), kind, tied) < 1e-9


@pytest.mark.parametrize("sizes", [s for s in GRIDS if np.prod(list(s.values())) == 8], ids=str)
def test_every_factorisation_of_8_ranks_with_experts_gives_pytorchs_loss_and_gradients(sizes):
    assert worst(run(sizes, _schedule.one_f_one_b(sizes["pp"], 2))) < 1e-9


@pytest.mark.parametrize("left_out", ["tp", "cp", "dp", "pp"])
def test_four_axes_of_two_at_once_fill_16_ranks(left_out):
    sizes = {axis: 1 if axis == left_out else 2 for axis in ("tp", "cp", "ep", "dp", "pp")}
    assert worst(run(sizes, _schedule.one_f_one_b(sizes["pp"], 2), tied=True), tied=True) < 1e-9


def test_experts_summed_over_the_ranks_that_share_them_are_caught():
    result = run({"ep": 2}, _schedule.gpipe(1, 1), broken="experts summed over ep, too")
    assert worst(result) > 0.1


def test_ep_and_dp_differ_only_in_who_has_the_experts():
    """One layer's experts: with ep=2 a rank has half of the numbers, and both ranks of dp=2 have them all."""

    def numbers(comm, sizes):
        params = mixed("sigmoid")[0]
        (chunk,) = _model.cut(params, Grid(comm, **sizes), _schedule.gpipe(1, 1), HEAD_DIM)
        return sum(chunk["layers"][1][name].size for name in _experts.EXPERTS)

    whole = 2 * EXPERTS * H * HIDDEN
    assert machine(2).run(numbers, {"ep": 2}).outputs == [whole // 2] * 2
    assert machine(2).run(numbers, {"dp": 2}).outputs == [whole] * 2


# ---- the layer alone -------------------------------------------------------------------------------------------------


@cache
def tokens_and_weights(kind):
    random = np.random.default_rng(1)
    return random.standard_normal((4, 12, H)), _experts.expert_weights(random, GATES[kind], H, HIDDEN, EXPERTS)


def mixture(comm, kind, slots):
    x, whole = tokens_and_weights(kind)
    mine = _experts.cut_experts(whole, comm, alone(comm))
    y, saved = _experts.mixture(comm, GATES[kind], mine, x[comm.rank], slots)
    dx, _ = _experts.mixture_backward(comm, GATES[kind], mine, saved, np.ones_like(y))
    return y, dx, saved[1].token


@pytest.mark.parametrize("slots", [None, 3, 6])
@any_gate
def test_four_ranks_of_one_expert_each_equal_pytorch_token_by_token(kind, slots):
    x, whole = tokens_and_weights(kind)
    for rank, (y, dx, _) in enumerate(machine(4).run(mixture, kind, slots).outputs):
        mine = by_hand.tensors(x[rank])
        want, _ = by_hand.mixture(kind, by_hand.tensors(whole), mine, 2, slots)
        want.sum().backward()
        assert_allclose(y, want.detach().numpy(), rtol=0, atol=1e-12)
        assert_allclose(dx, mine.grad.numpy(), rtol=0, atol=1e-12)


def test_without_a_capacity_nobody_is_dropped_and_the_fullest_expert_has_no_empty_slot():
    tokens = [output[2] for output in machine(4).run(mixture, "sigmoid", None).outputs]
    loads = np.array([(token >= 0).sum(axis=1) for token in tokens])
    assert loads.sum() == 4 * 12 * 2
    assert loads.max() == tokens[0].shape[1]


def test_overflow_drops_the_last_tokens():
    chosen = np.array([[True, False], [True, True], [True, False]])
    assert _experts.place(chosen, 2).tolist() == [[0, 1], [1, -1]]


def test_empty_slots_are_zero_and_get_no_gradient():
    x, token = np.ones((2, 3)), np.array([[1, -1]])
    mix, grad = np.ones((2, 1)), np.full((2, 3), 5.0)
    assert _experts.order(x, token)[0].tolist() == [[1, 1, 1], [0, 0, 0]]
    d_buffer, _ = _experts.unorder_backward(np.ones((1, 2, 3)), token, mix, grad)
    assert d_buffer[0].tolist() == [[5, 5, 5], [0, 0, 0]]


def test_bytes_are_two_all_to_alls_of_the_buffer_each_way():
    result = machine(4).run(mixture, "sigmoid", 6)
    buffer = EXPERTS * 6 * H * 8
    assert result.traffic.total == 4 * (2 + 2) * buffer * 3 // 4


def test_a_shape_only_run_sends_what_a_balanced_one_would():
    def program(comm):
        up, down = like((1, H, HIDDEN)), like((1, HIDDEN, H))
        weights = {"router": {"logits": like((H, EXPERTS))}, "expert_up": up, "expert_down": down}
        y, saved = _experts.mixture(comm, GATES["sigmoid"], weights, like((12, H)))
        return _experts.mixture_backward(comm, GATES["sigmoid"], weights, saved, y)[0]

    result = machine(4).run(program)
    assert result.outputs[0].shape == (12, H)
    assert result.traffic.total == 4 * 4 * (EXPERTS * 6 * H * 8) * 3 // 4


# ---- gates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(_gates.GATES))
def test_weights_are_zero_where_an_expert_was_not_chosen(kind):
    random, gate = np.random.default_rng(2), _gates.GATES[kind](2)
    chosen, mix, _ = gate.forward(gate.init(random, H, 5), random.standard_normal((20, H)), 8)
    assert (mix[~chosen] == 0).all()
    assert (mix[chosen] > 0).all()


def test_experts_that_choose_are_equally_busy():
    random, gate = np.random.default_rng(2), _gates.expert_choice(2)
    chosen, _, _ = gate.forward(gate.init(random, H, 5), random.standard_normal((20, H)), 8)
    assert chosen.sum(axis=0).tolist() == [8] * 5


def test_the_same_seed_draws_the_same_noise_and_another_one_another():
    random = np.random.default_rng(2)
    x, w = random.standard_normal((20, H)), _gates.noisy_top_k(2, seed=1).init(random, H, 5)
    one, again, other = (_gates.noisy_top_k(2, seed=s).forward(w, x, None)[1] for s in (1, 1, 2))
    assert (one == again).all()
    assert (one != other).any()


def test_the_balancing_loss_is_smallest_when_all_experts_are_first_equally_often():
    equal, one = 5 * np.eye(4), np.tile([5.0, 0, 0, 0], (4, 1))
    assert_allclose(_gates.balance_loss(equal, 0.1), 0.1, rtol=1e-12)
    assert _gates.balance_loss(one, 0.1) > 0.35


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_more_choices_than_experts_are_refused():
    gate = _gates.sigmoid(5)
    with pytest.raises(ShapeError, match="a gate cannot choose k=5 of 4 experts"):
        gate.forward({"logits": np.ones((H, 4))}, np.ones((3, H)), None)


def test_experts_that_do_not_divide_among_ranks_are_refused():
    with pytest.raises(ShapeError, match="4 experts do not divide among 3 ranks"):
        run({"ep": 3}, _schedule.gpipe(1, 1))


def test_channels_of_an_expert_that_do_not_divide_are_refused():
    with pytest.raises(ShapeError, match="16 channels of an expert do not divide among 3 ranks"):
        machine(3).run(lambda comm: _experts.cut_experts(mixed("sigmoid")[0]["layers"][1], alone(comm), comm))


def test_experts_that_choose_tokens_need_a_capacity():
    random, gate = np.random.default_rng(2), _gates.expert_choice(2)
    weights = _experts.expert_weights(random, gate, H, HIDDEN, EXPERTS)
    with pytest.raises(ShapeError, match="need a capacity"):
        machine(1).run(lambda comm: _experts.mixture(comm, gate, weights, np.ones((6, H))))


def test_a_piecewise_sum_of_experts_is_refused():
    def program(comm):
        grid = Grid(comm, ep=1)
        plan = _model.Plan(grid, None, _layers.Setting(grid.tp, grid.cp, None, 1, None), across=_model.summed)
        _model.sum_gradients(plan, [{"layers": [{"router": {}, "expert_up": np.ones(1), "expert_down": np.ones(1)}]}])

    with pytest.raises(ShapeError, match="use across=None"):
        machine(1).run(program)
