"""Megatron-LM: steps of one device on any grid, the paper's bytes and seconds, a prediction that fits its own parts."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from numpy.testing import assert_allclose

from reference import dense_attention, dense_attention_backward
from toolkit.claims.model_parallel import megatron as claims
from toolkit.model_parallel import _megatron_scale as scale
from toolkit.model_parallel import _pipeline, _schedule, megatron
from toolkit.model_parallel._megatron_attention import scores_in_memory
from toolkit.model_parallel._mesh import Grid
from toolkit.runtime import Cluster, hardware, like, topology
from toolkit.runtime.errors import ShapeError

pytest.importorskip("torch")

from placed_model import BATCH, HEAD_DIM, TOKENS, H, leaves, mapped, model, torch_step

RATE, STEPS = 0.05, 3
GRIDS = [(1, 1, 8, 1), (1, 2, 4, 1), (1, 4, 2, 1), (2, 1, 4, 2), (2, 2, 2, 1), (2, 2, 2, 2), (2, 4, 1, 2), (4, 1, 2, 1)]
GRIDS += [(4, 2, 1, 1), (2, 1, 4, 1)]  # p, t, d, v of 8 ranks, 4 layers


def train(p=1, t=1, d=1, v=1, steps=1, tied=True, machine=None, **options):
    params, *text = model(tied)
    machine = machine or topology.switch(p * t * d, hardware.NVLINK3)
    options = {
        "kind": "interleaved" if v > 1 else "1F1B",
        "microbatches": 2,
        "head_dim": HEAD_DIM,
        "rate": RATE,
    } | options
    return Cluster(machine, hardware.IDEAL).run(megatron.train, params, [text] * steps, p=p, t=t, d=d, v=v, **options)


def same(a, b):
    """Whether two runs end with the same bits on every rank."""
    pairs = zip(a.outputs, b.outputs, strict=True)
    return all(
        x.tobytes() == y.tobytes()
        for (loss, chunks), (loss_2, chunks_2) in pairs
        for (_, x), (_, y) in zip([("", loss), *leaves(chunks)], [("", loss_2), *leaves(chunks_2)], strict=True)
    )


# ---- strict semantics ------------------------------------------------------------------------------------------------


@cache
def descent_on_one_device(steps):
    """Losses of gradient descent in PyTorch: our own gradients of one device are PyTorch's (test_model)."""
    params, *text = model(True)
    losses = []
    for _ in range(steps):
        run = Cluster(topology.switch(1, hardware.NVLINK3), hardware.IDEAL).run(
            megatron.train, params, [text], p=1, t=1, d=1, microbatches=1, head_dim=HEAD_DIM, rate=RATE
        )
        loss, (params,) = run.outputs[0]
        losses.append(loss[0])
    return losses


@pytest.mark.parametrize("p, t, d, v", GRIDS)
def test_three_steps_on_8_ranks_are_three_steps_of_one_device(p, t, d, v):
    run = train(p, t, d, v, steps=STEPS)
    for losses, _ in run.outputs:
        assert_allclose(losses, descent_on_one_device(STEPS), rtol=1e-10)


def test_the_first_step_moves_weights_by_rate_times_pytorchs_gradient():
    _, (after,) = train().outputs[0]
    wanted = mapped(np.asarray, model(True)[0]), torch_step(True)[1]
    for (name, got), (_, before), (_, gradient) in zip(leaves(after), *map(leaves, wanted), strict=True):
        assert_allclose(got, before - RATE * gradient, rtol=1e-10, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("kind", ["GPipe", "1F1B"])
def test_schedules_without_interleaving_give_the_same_losses(kind):
    run = train(p=2, t=2, steps=2, kind=kind, microbatches=4)
    assert_allclose(run.outputs[0][0], descent_on_one_device(2), rtol=1e-10)


def test_gradients_averaged_over_microbatches_only_are_caught(monkeypatch):
    """The loss of d = 2 divided by a rank's own tokens: gradients twice as large."""
    honest, right = megatron.loss_and_gradients, descent_on_one_device(2)[1]
    monkeypatch.setattr(megatron, "loss_and_gradients", lambda *args, total: honest(*args, total=total // 2))
    loss = train(d=2, steps=2).outputs[0][0][1] / 2  # it is divided by half of the tokens, too
    assert abs(loss / right - 1) > 1e-3


# ---- scatter and gather ----------------------------------------------------------------------------------------------


def nodes(p, t):
    """A stage on each node."""
    return topology.two_level(p, t, hardware.NVLINK3, hardware.IB_HDR, inside="switch")


def crossing(run, t, name=None):
    """Bytes between nodes, of one channel or all."""
    return sum(e.bytes for e in run.trace if e.kind == "send" and e.rank // t != e.peer // t and name in (None, e.name))


@pytest.mark.parametrize("p, t, v", [(2, 2, 1), (2, 4, 2), (4, 2, 1)])
def test_scatter_and_gather_change_no_bit_and_divide_what_crosses_by_t(p, t, v):
    whole, parts = (train(p, t, v=v, machine=nodes(p, t), microbatches=4, scatter_gather=on) for on in (False, True))
    assert same(whole, parts)
    for channel in ("activations", "gradients"):
        assert crossing(whole, t, channel) == t * crossing(parts, t, channel) > 0


@pytest.mark.parametrize("t", [2, 4])
def test_scatter_and_gather_add_t_minus_1_over_t_of_a_message_on_the_fast_wires(t):
    whole, parts = (train(2, t, machine=nodes(2, t), microbatches=4, scatter_gather=on) for on in (False, True))
    message, messages = BATCH // 4 * TOKENS * H * 8, 2 * 4  # one boundary, both ways, 4 microbatches
    inside = [run.traffic.total - crossing(run, t) for run in (whole, parts)]
    assert inside[1] - inside[0] == messages * t * message * (t - 1) // t


def test_what_crosses_is_b_s_h_over_t_for_each_rank_microbatch_and_direction():
    run = train(2, 2, machine=nodes(2, 2), microbatches=4)
    each = megatron.stage_bytes(BATCH // 4, TOKENS, H, t=2, itemsize=8)
    assert {e.bytes for e in run.trace if e.kind == "send" and e.name in ("activations", "gradients")} == {each}


# ---- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("t", [2, 4])
def test_more_layers_cost_a_tensor_group_the_bytes_of_the_closed_form(t, recompute):
    def sent(layers):
        params, *text = model(True, layers)
        run = Cluster(topology.switch(t, hardware.NVLINK3), hardware.IDEAL).run(
            megatron.train, params, [text], p=1, t=t, d=1, microbatches=2, head_dim=HEAD_DIM, recompute=recompute
        )
        return int(run.traffic.by_pair.sum(axis=1)[0])

    closed = megatron.tensor_bytes(t, BATCH // 2, TOKENS, H, 2, 2, itemsize=8, recompute=recompute)
    assert sent(4) - sent(2) == closed


@pytest.mark.parametrize("microbatches", [1, 4])
def test_data_parallelism_talks_once_a_batch_whatever_the_microbatches(microbatches):
    run = train(d=4, microbatches=microbatches)
    numbers = sum(a.size for _, a in leaves(model(True)[0]))
    sent = run.traffic.by_pair.sum(axis=1)
    assert sent.sum() == 4 * megatron.gradient_bytes(4, numbers, itemsize=8) + 2 * 3 * 8  # and the loss, one number


@pytest.mark.parametrize("t, d", [(2, 1), (1, 2), (2, 2)])
def test_one_stage_sends_no_activations_and_no_gradients_of_them(t, d):
    assert {e.name for e in train(t=t, d=d).trace if e.kind == "send"} == {"all_reduce"}


def test_a_pipeline_alone_sums_a_tied_embedding_and_the_loss_and_nothing_else():
    sums = [e.bytes for e in train(p=2).trace if e.kind == "send" and e.name == "all_reduce"]
    assert sum(sums) == 2 * model(True)[0]["embedding"].nbytes + 2 * 8


def test_two_stages_with_an_embedding_each_sum_the_loss_only():
    sums = [e.bytes for e in train(p=2, tied=False).trace if e.kind == "send" and e.name == "all_reduce"]
    assert sum(sums) == 2 * 8


def test_one_rank_and_one_microbatch_send_nothing():
    assert train(microbatches=1).traffic.total == 0


# ---- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, v", [("GPipe", 1), ("1F1B", 1), ("interleaved", 2), ("interleaved", 4)])
@pytest.mark.parametrize("p, m", [(2, 4), (4, 8), (8, 16)])
def test_seconds_and_bubble_of_a_pipeline_are_the_closed_forms(kind, v, p, m):
    order = megatron.schedule(kind, p, m, v)
    assert _schedule.bubble(order) == pytest.approx(megatron.bubble(p, m, v))
    assert _schedule.makespan(order, {"F": 1 / v, "B": 2 / v}) == pytest.approx(
        megatron.pipeline_seconds(p, m, 1, 2, v)
    )


def test_parameters_are_counted_array_by_array():
    layers, h, s, words = 3, 64, 32, 100
    block = 4 * h * h + 4 * h + 8 * h * h + 5 * h + 4 * h  # attention, MLP, two norms, with biases
    assert megatron.parameters(layers, h, s, words) == pytest.approx(layers * block + (words + s) * h)


def test_flops_are_those_that_kernels_declare():
    """Of one sequence through one layer with recomputation, and the head once forward and twice backward."""
    h, heads, s, words = 64, 4, 32, 96
    job = scale.Job(1, h, heads, 1, s=s, vocabulary=words)
    run = Cluster(topology.switch(1, hardware.NVLINK3), hardware.A100).run(scale.pieces, job)
    assert sum(e.flops for e in run.trace) == pytest.approx(megatron.flops(1, 1, h, s, words), rel=1e-12)


@pytest.mark.parametrize("row", range(len(claims.TABLE)))
def test_the_table_of_the_paper_agrees_with_its_own_formulas(row):
    layers, h, *_, devices, rate = claims.TABLE[row]
    billions = (1.7, 3.6, 7.5, 18.4, 39.1, 76.1, 145.6, 310.1, 529.6, 1008.0)
    petaflops = (4.4, 8.8, 18.2, 34.6, 70.8, 143.8, 227.1, 297.4, 410.2, 502.0)
    assert megatron.parameters(layers, h) / 1e9 == pytest.approx(billions[row], abs=0.05)
    assert devices * rate / 1e3 == pytest.approx(petaflops[row], rel=0.005)


# ---- attention of 2021 -----------------------------------------------------------------------------------------------


def heads(seed=0):
    return np.random.default_rng(seed).standard_normal((4, 3, 10, 8))  # q, k, v, grad


def test_attention_with_scores_in_memory_is_attention():
    q, k, v, grad = heads()
    attention = scores_in_memory()
    out, saved = attention.forward(None, q, k, v)
    assert_allclose(out, dense_attention(q, k, v, True)[0], atol=1e-12)
    for got, want in zip(
        attention.backward(None, saved, grad), dense_attention_backward(q, k, v, grad, True), strict=True
    ):
        assert_allclose(got, want, atol=1e-12)


def test_gradients_with_dropout_agree_with_finite_differences():
    q, k, v, grad = heads()
    attention = scores_in_memory(dropout=0.3)
    _, saved = attention.forward(None, q, k, v)
    along = heads(1)[:3]
    ends = [np.vdot(attention.forward(None, *(heads()[:3] + step * along))[0], grad) for step in (1e-6, -1e-6)]
    slope = sum(np.vdot(d, a) for d, a in zip(attention.backward(None, saved, grad), along, strict=True))
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6)


# ---- the prediction --------------------------------------------------------------------------------------------------

SMALL = scale.Job(8, 1024, 16, 16, t=8, p=4, d=1, v=2, s=512)


def test_a_layer_s_seconds_are_those_of_the_whole_program():
    """One tensor group, one stage, two microbatches: the parts put together against one run of `loss_and_gradients`."""
    job = replace(SMALL, p=1, v=1, kind="1F1B", batch=2, layers=4)
    whole = Cluster(scale.nodes_of(8, 8), replace(hardware.A100, compute_efficiency=0.6)).run(whole_step, job)
    assert scale.step(job, 0.6).pipeline == pytest.approx(whole.makespan, rel=0.02)


def whole_step(comm, job):
    """Forward and backward of a job on one tensor group, shape-only, by the code that trains."""
    from toolkit.model_parallel import _layers, _model
    from toolkit.sequence_parallel._block import model_weights

    head_dim, grid = job.h // job.heads, Grid(comm, tp=job.t)
    params = model_weights(
        None, job.vocabulary, job.layers, job.h, job.heads, job.heads, head_dim, 4 * job.h, "float16"
    )
    del params["head"]
    order = megatron.schedule("1F1B", 1, job.microbatches)
    attention = scores_in_memory(dropout=0.1)
    setting = _layers.Setting(grid.tp, grid.cp, attention, head_dim, np.arange(job.s))
    plan = _model.Plan(grid, order, setting, tied=True, layer=_model.RECOMPUTE)
    text = like((job.microbatches, job.b * job.s), "int64")
    _model.loss_and_gradients(plan, _model.cut(params, grid, order, head_dim), text, text, job.batch * job.s)


@pytest.mark.parametrize(
    "kind, v, scatter_gather", [("1F1B", 1, True), ("interleaved", 2, True), ("interleaved", 2, False)]
)
def test_a_pipeline_put_together_from_parts_takes_what_it_takes_on_the_machine(kind, v, scatter_gather):
    job = replace(SMALL, kind=kind, v=v, scatter_gather=scatter_gather, batch=8)
    order, parts = megatron.schedule(kind, job.p, job.microbatches, v), 8 if scatter_gather else 1
    cost, last = scale.layer_seconds(scale.shape(job), 0.6), order.stages - 1
    gather = scale.gather_seconds(8, (job.s // 8, job.h)) if scatter_gather else 0.0
    ends = {0: cost.embedding, last: cost.head}

    def seconds(kind, stage):
        return job.layers // order.stages * cost.layer[kind] + ends.get(stage, {kind: 0.0})[kind]

    def unpack(x):
        return _pipeline.forward_pass(x, gather)

    machine = Cluster(topology.switch(job.p, scale.NIC), _pipeline.CLOCK)
    message = like((job.s // parts, job.h), "float16")
    run = machine.run(_pipeline.replay, order, seconds, message, unpack=unpack, overlap=False)
    ours = _schedule.makespan(order, scale.pass_seconds(job, order, 0.6))
    assert ours == pytest.approx(run.makespan, rel=0.02)


def test_the_largest_microbatch_is_that_which_fits():
    small, large = (scale.best(SMALL, 0.6, capacity).job.b for capacity in (scale.memory(SMALL), 80e9))
    assert (small, large) == (1, 4)


def test_all_nics_divide_what_zero_waits_for_by_8():
    job = scale.Job(24, 12_288, 96, 64, d=64)
    one, two = (scale.zero3(job, 1.0, nics).pipeline for nics in (0.1, 0.8))
    assert one / two == pytest.approx(8, rel=1e-6)


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"p": 3, "t": 1, "machine": topology.switch(2, hardware.NVLINK3)}, "is 3 ranks, and there are 2"),
        ({"t": 8}, "4 query heads do not divide among 8 ranks"),
        ({"p": 3}, "4 layers do not divide among 3 stages"),
        ({"p": 2, "v": 2, "microbatches": 3}, "3 microbatches are no multiple of 2 stages"),
        ({"d": 3}, "16 sequences do not divide into 2 microbatches on 3 ranks"),
        ({"kind": "PipeDream"}, "none of GPipe, 1F1B, interleaved"),
        ({"kind": "GPipe", "v": 2}, "GPipe has one chunk of layers a rank, not 2"),
    ],
    ids=["n", "a", "l", "m", "B", "kind", "v"],
)
def test_what_does_not_divide_is_a_value_error_before_anything_is_sent(options, message):
    with pytest.raises(ShapeError, match=message) as caught:
        train(**options)
    assert isinstance(caught.value, ValueError)
    assert any("at 0 s" in note for note in caught.value.__notes__)
