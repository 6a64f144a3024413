"""ZeRO's stages: the steps of PyTorch's Adam, with the bytes and the memory of the paper's table."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from toolkit.model_parallel import _layers, _model, _schedule
from toolkit.model_parallel import _zero as zero
from toolkit.model_parallel._mesh import Grid
from toolkit.runtime import Cluster, hardware, topology
from toolkit.runtime.errors import ShapeError
from toolkit.sequence_parallel._block import one_device

torch = pytest.importorskip("torch")

from placed_model import BATCH, HEAD_DIM, TOKENS, leaves, mapped, model, torch_step  # noqa: E402

RATE = 0.01


def train(comm, params, tokens, targets, sizes, schedule, stage, steps):
    """(losses, whole weights of this rank's chunks)"""
    grid = Grid(comm, **sizes)
    data, chunks = grid.along("cp", "ep", "dp"), _model.cut(params, grid, schedule, HEAD_DIM)
    shapes = {name: a.shape for name, a in chunks[0]["layers"][0].items()}
    setting = _layers.Setting(grid.tp, grid.cp, one_device(causal=True), HEAD_DIM, np.arange(TOKENS))
    plan = _model.Plan(
        grid, schedule, setting, "head" not in params, zero.layer(data, stage, shapes), across=zero.across(stage)
    )
    text = [_model.share_of(grid, part, schedule.microbatches, setting.where) for part in (tokens, targets)]
    chunks, states = zero.begin(data, chunks, stage)
    losses = []
    for _ in range(steps):
        loss, grads, _ = _model.loss_and_gradients(plan, chunks, *text, BATCH * TOKENS)
        chunks = zero.update(data, stage, chunks, states, grads, RATE)
        losses.append(float(loss))
    kept = sum(a.size for chunk in chunks for block in chunk["layers"] for a in arrays(block))
    state = sum(3 * s.master.size for some in states for s in some)
    return losses, chunks, kept, state


def arrays(block):
    return [block] if isinstance(block, np.ndarray) else list(block.values())


def run(stage, sizes, schedule=None, steps=3, tied=True):
    machine = Cluster(topology.switch(int(np.prod(list(sizes.values()))), hardware.NVLINK3), hardware.IDEAL)
    return machine.run(train, *model(tied), sizes, schedule or _schedule.gpipe(1, 2), stage, steps)


# ---- the same steps --------------------------------------------------------------------------------------------------


def test_the_first_step_is_that_of_torch_optim_adam():
    params, gradients = (mapped(torch.tensor, tree) for tree in (model(True)[0], torch_step(True)[1]))
    wanted = [a for _, a in torch_leaves(params)]
    for tensor, (_, gradient) in zip(wanted, torch_leaves(gradients), strict=True):
        tensor.grad = gradient
    torch.optim.Adam(wanted, lr=RATE).step()
    _, (chunk,), *_ = run(0, {}, steps=1).outputs[0]
    for (name, got), want in zip(leaves(chunk), wanted, strict=True):
        assert_allclose(got, want.numpy(), rtol=1e-9, atol=1e-9, err_msg=name)


def torch_leaves(value, name=""):
    if isinstance(value, torch.Tensor):
        return [(name, value)]
    items = sorted(value.items()) if isinstance(value, dict) else enumerate(value)
    return [leaf for key, part in items for leaf in torch_leaves(part, f"{name}/{key}")]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("sizes", [{"dp": 4}, {"tp": 2, "dp": 2}, {"dp": 2, "pp": 2}], ids=str)
def test_every_stage_takes_the_steps_of_one_device(stage, sizes):
    alone = run(0, {}).outputs[0][0]
    for losses, *_ in run(stage, sizes, _schedule.one_f_one_b(sizes.get("pp", 1), 2)).outputs:
        assert_allclose(losses, alone, rtol=1e-10)


def test_a_step_without_the_gather_of_weights_is_caught(monkeypatch):
    monkeypatch.setattr(zero.layers, "all_gather", lambda comm, x: np.tile(x, comm.size))
    losses = run(1, {"dp": 2}).outputs[0][0]
    assert abs(losses[-1] / run(0, {}).outputs[0][0][-1] - 1) > 1e-3


# ---- bytes and memory ------------------------------------------------------------------------------------------------

NUMBERS = sum(a.size for _, a in leaves(model(True)[0]))
ENDS = model(True)[0]["embedding"].size + model(True)[0]["norm"].size
LOSS = 2 * 3 * 8  # an all-reduce of one number over 4 ranks


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("microbatches", [1, 4])
def test_cut_states_send_what_an_all_reduce_sends_once_a_batch(stage, microbatches):
    result = run(stage, {"dp": 4}, _schedule.gpipe(1, microbatches), steps=1)
    assert result.traffic.total == 4 * 2 * 3 * NUMBERS * 8 // 4 + LOSS


@pytest.mark.parametrize("stage, times", [(2, lambda m: m + 1), (3, lambda m: 3 * m)])
@pytest.mark.parametrize("m", [1, 2])
def test_cut_gradients_are_summed_and_cut_weights_gathered_twice_for_every_microbatch(stage, times, m):
    result = run(stage, {"dp": 4}, _schedule.gpipe(1, m), steps=1)
    assert result.traffic.total == 3 * 8 * (times(m) * (NUMBERS - ENDS) + 2 * ENDS) + LOSS


@pytest.mark.parametrize("stage, weights, states", [(0, 1, 1), (1, 1, 4), (2, 1, 4), (3, 4, 4)])
def test_each_stage_keeps_a_quarter_of_what_it_cuts_over_4_ranks(stage, weights, states):
    for _, _, kept, state in run(stage, {"dp": 4}, steps=1).outputs:
        assert kept * weights == NUMBERS - ENDS
        assert state * states == 3 * NUMBERS


@pytest.mark.parametrize("stage, wanted", [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_bytes_of_7_and_a_half_billion_parameters_on_64_ranks_are_the_paper_s(stage, wanted):
    assert zero.bytes_a_parameter(stage, 64) * 7.5 == pytest.approx(wanted, abs=0.05)


def test_an_unknown_stage_is_refused():
    with pytest.raises(ShapeError, match="stage=4: ZeRO has stages 1, 2 and 3"):
        run(4, {"dp": 2})
