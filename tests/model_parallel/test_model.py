"""A placed transformer: every grid of at most 16 ranks gives the loss and the gradients of one device."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from toolkit.model_parallel import _layers, _model, _schedule
from toolkit.model_parallel._mesh import Grid
from toolkit.runtime import Cluster, hardware, positions, topology
from toolkit.runtime.errors import ShapeError
from toolkit.sequence_parallel import _block as blocks
from toolkit.sequence_parallel import ring_attention

pytest.importorskip("torch")

from placed_model import BATCH, HEAD_DIM, LAYERS, TOKENS, H, leaves, model, torch_step


def place(grid, schedule, layout="zigzag", edge=_layers.REPLICATED, **options):
    """The Plan of one rank, causal attention."""
    where = positions(layout, grid.cp.rank, grid.cp.size, TOKENS)
    attention = blocks.exact(ring_attention, causal=True, layout=layout)
    setting = _layers.Setting(grid.tp, grid.cp, attention, HEAD_DIM, where, edge)
    return _model.Plan(grid, schedule, setting, **options)


def step(comm, params, tokens, targets, wanted, sizes, schedule, **options):
    """(loss, this rank's gradients, the shards that it should have, activations kept)"""
    grid = Grid(comm, **sizes)
    plan = place(grid, schedule, tied="head" not in params, **options)
    m, where = schedule.microbatches, plan.setting.where
    tokens, targets = (_model.share_of(grid, batch, m, where) for batch in (tokens, targets))
    chunks = _model.cut(params, grid, schedule, HEAD_DIM)
    loss, grads, kept = _model.loss_and_gradients(plan, chunks, tokens, targets, BATCH * TOKENS)
    return loss, grads, _model.cut(wanted, grid, schedule, HEAD_DIM), kept


def mesh(ranks):
    return Cluster(topology.switch(ranks, hardware.NVLINK3), hardware.IDEAL)


def run(sizes, schedule, tied=False, layers=LAYERS, kv_heads=4, **options):
    whole = model(tied, layers, kv_heads)
    wanted = torch_step(tied, layers, kv_heads)[1]
    return mesh(int(np.prod(list(sizes.values())))).run(step, *whole, wanted, sizes, schedule, **options)


def worst(result, tied=False, layers=LAYERS, kv_heads=4):
    """Largest error of any rank's loss or gradient, over the largest gradient."""
    loss, _ = torch_step(tied, layers, kv_heads)
    error = max(abs(float(output[0]) - loss) / abs(loss) for output in result.outputs)
    for _, got, want, _ in result.outputs:
        pairs = list(zip(leaves(got), leaves(want), strict=True))
        assert [name for (name, _), _ in pairs] == [name for _, (name, _) in pairs]
        error = max(error, *(np.abs(a - b).max() / np.abs(b).max() for (_, a), (_, b) in pairs))
    return error


# ---- every grid gives the answer of one device -----------------------------------------------------------------------

GRIDS = [
    dict(zip(("tp", "cp", "dp", "pp"), map(int, sizes), strict=True))
    for sizes in np.ndindex(5, 3, 5, 5)
    if all(n in (1, 2, 4) for n in sizes) and np.prod(sizes) <= 16
]


@st.composite
def placements(draw):
    sizes = draw(st.sampled_from(GRIDS))
    chunks = draw(st.sampled_from([v for v in (1, 2, 4) if LAYERS % (v * sizes["pp"]) == 0]))
    per_rank = BATCH // sizes["dp"]
    microbatches = draw(st.sampled_from([m for m in (1, 2, 4, 8) if per_rank % m == 0 and m % sizes["pp"] == 0]))
    edge = draw(st.sampled_from([_layers.REPLICATED, _layers.SEQUENCE]))
    layer = draw(st.sampled_from([_model.KEEP, _model.RECOMPUTE]))
    return sizes, _schedule.interleaved(sizes["pp"], microbatches, chunks), draw(st.booleans()), edge, layer


@settings(max_examples=12, deadline=None, derandomize=True)
@given(placements())
def test_any_grid_gives_pytorchs_loss_and_gradients(placement):
    sizes, schedule, tied, edge, layer = placement
    assert worst(run(sizes, schedule, tied, edge=edge, layer=layer), tied) < 1e-10


@pytest.mark.parametrize("sizes", [s for s in GRIDS if np.prod(list(s.values())) == 8], ids=str)
def test_every_factorisation_of_8_ranks_gives_pytorchs_loss_and_gradients(sizes):
    schedule = _schedule.one_f_one_b(sizes["pp"], 2)
    assert worst(run(sizes, schedule, tied=True), tied=True) < 1e-10


@pytest.mark.parametrize("schedule", [_schedule.gpipe(2, 4), _schedule.interleaved(2, 4, 2)], ids=lambda s: s.name)
def test_schedules_give_the_gradients_of_1f1b_to_the_bit(schedule):
    sizes = {"tp": 2, "pp": 2}
    ours, plain = run(sizes, schedule), run(sizes, _schedule.one_f_one_b(2, 4))
    assert gathered(ours, schedule) == gathered(plain, _schedule.one_f_one_b(2, 4))


def gathered(result, schedule):
    """{layer of the model: bytes of the gradients of tensor rank 0}"""
    found, each = {}, LAYERS // schedule.stages
    for pp, output in enumerate(result.outputs[::2]):
        for chunk, stage in zip(output[1], schedule.where[pp], strict=True):
            for i, layer in enumerate(chunk["layers"]):
                found[stage * each + i] = b"".join(layer[name].tobytes() for name in sorted(layer))
    return found


def test_grouped_key_heads_are_cut_like_query_heads():
    assert worst(run({"tp": 2, "cp": 2}, _schedule.gpipe(1, 2), kv_heads=2), kv_heads=2) < 1e-10


@pytest.mark.parametrize("edge", [_layers.REPLICATED, _layers.SEQUENCE], ids=["replicated", "sequence"])
def test_recomputing_gives_the_same_gradients_to_the_bit(edge):
    kept, again = (
        run({"tp": 2, "pp": 2}, _schedule.one_f_one_b(2, 2), edge=edge, layer=layer)
        for layer in (_model.KEEP, _model.RECOMPUTE)
    )
    for a, b in zip(kept.outputs, again.outputs, strict=True):
        for (_, x), (_, y) in zip(leaves(a[1]), leaves(b[1]), strict=True):
            assert x.tobytes() == y.tobytes()


def test_ranks_that_differ_in_their_data_end_with_the_same_gradients():
    outputs = run({"dp": 4}, _schedule.gpipe(1, 1)).outputs
    for other in outputs[1:]:
        for (_, x), (_, y) in zip(leaves(outputs[0][1]), leaves(other[1]), strict=True):
            assert x.tobytes() == y.tobytes()


def test_shards_are_a_partition_of_the_parameters():
    params = model(tied=False)[0]
    schedule = _schedule.interleaved(2, 2, 2)

    def shards(comm):
        return _model.cut(params, Grid(comm, tp=2, pp=2), schedule, HEAD_DIM)

    outputs = mesh(4).run(shards).outputs
    counted = sum(a.size for output in outputs for name, a in leaves(output) if "norm" not in name)
    assert counted == sum(a.size for name, a in leaves(params) if "norm" not in name)


# ---- the tests above can fail ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "broken",
    [
        {"enter_backward": _layers.nothing},  # f without its all-reduce: each rank has a partial gradient of the input
        {"leave": _layers.nothing},  # g without: each rank goes on with a partial sum
        {"leave_backward": _layers.all_reduce},  # g's gradient summed though it is the same everywhere
    ],
    ids=lambda d: next(iter(d)),
)
def test_an_edge_with_a_wrong_operator_is_caught(broken):
    edge = replace(_layers.REPLICATED, **broken)
    assert worst(run({"tp": 2}, _schedule.gpipe(1, 1), edge=edge)) > 1e-3


def test_a_tied_embedding_that_is_not_summed_is_caught(monkeypatch):
    monkeypatch.setattr(_model, "_sum_tied", lambda plan, grads: None)
    assert worst(run({"pp": 2}, _schedule.gpipe(2, 2), tied=True), tied=True) > 1e-3


def test_norms_that_saw_a_part_of_the_tokens_need_their_sum(monkeypatch):
    monkeypatch.setattr(_model, "NORMS", ())
    assert worst(run({"tp": 2}, _schedule.gpipe(1, 1), edge=_layers.SEQUENCE)) > 1e-3


# ---- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer, times", [(_model.KEEP, 8), (_model.RECOMPUTE, 12)], ids=["kept", "recomputed"])
@pytest.mark.parametrize("t", [2, 4])
def test_a_block_sends_8_or_with_recomputation_12_hidden_states_times_t_minus_1_over_t(t, layer, times):
    def program(comm, weights, x):
        grid = Grid(comm, tp=t)
        setting = place(grid, _schedule.gpipe(1, 1)).setting
        shard = _model.cut_block(weights, grid.tp.rank, t, HEAD_DIM)
        _, saved = layer.forward(setting, shard, x)
        layer.backward(setting, shard, saved, x)

    x = np.random.default_rng(0).standard_normal((2 * TOKENS, H))
    result = mesh(t).run(program, model(False)[0]["layers"][0], x)
    assert set(result.traffic.by_pair.sum(axis=1)) == {times * x.nbytes * (t - 1) // t}


def test_logits_are_not_gathered():
    t, n = 4, 64

    def program(comm, x, weights, targets):
        setting = place(Grid(comm, tp=t), _schedule.gpipe(1, 1)).setting
        mine = weights[:, comm.rank * 32 : (comm.rank + 1) * 32]
        return _layers.head(setting, np.ones(H), mine, x, targets)[0]

    random = np.random.default_rng(0)
    x, weights, targets = random.standard_normal((n, H)), random.standard_normal((H, 128)), random.integers(0, 128, n)
    result = mesh(t).run(program, x, weights, targets)
    assert result.traffic.total == t * 2 * (t - 1) * 3 * n * 8 // t  # three numbers a token
    logits = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6) @ weights
    assert_allclose(
        result.outputs[0], np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(n), targets], rtol=1e-12, atol=1e-12
    )


def test_one_device_sends_nothing():
    assert run({}, _schedule.gpipe(1, 4)).traffic.total == 0


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes, schedule, message",
    [
        ({"tp": 8}, _schedule.gpipe(1, 1), "4 query heads do not divide among 8 ranks"),
        ({"pp": 3}, _schedule.gpipe(3, 2), "4 layers do not divide among 3 stages"),
        ({"dp": 3}, _schedule.gpipe(1, 1), "16 sequences do not divide into 1 microbatches on 3 ranks"),
    ],
    ids=["heads", "layers", "batch"],
)
def test_what_does_not_divide_is_refused_before_anything_is_sent(sizes, schedule, message):
    with pytest.raises(ShapeError, match=message):
        run(sizes, schedule)


def test_a_vocabulary_that_does_not_divide_asks_for_padding():
    params = model(False)[0] | {"embedding": np.zeros((15, H))}
    with pytest.raises(ShapeError, match="a vocabulary of 15 does not divide among 2 ranks: pad it"):
        mesh(2).run(lambda comm: _model.cut(params, Grid(comm, tp=2), _schedule.gpipe(1, 1), HEAD_DIM))
