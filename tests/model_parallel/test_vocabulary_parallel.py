"""Vocabulary parallelism: one softmax however cut, barriers counted in traces, the artifact's seconds and bytes."""

from functools import cache
from itertools import combinations_with_replacement

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from toolkit.claims.model_parallel import vocabulary_parallel as claims
from toolkit.model_parallel import _vocabulary_picture as picture
from toolkit.model_parallel import _vocabulary_scale as scale
from toolkit.model_parallel import vocabulary_parallel as vocabulary
from toolkit.model_parallel._pipeline import check_order
from toolkit.model_parallel._schedule import Pass, bubble, makespan, one_f_one_b, peaks
from toolkit.model_parallel._vocabulary_schedule import (
    METHODS,
    SPLIT,
    build_schedule,
    output_in_layers,
    output_parameters_in_layers,
    redistribute_layers,
)
from toolkit.runtime import Cluster, hardware, like, topology
from toolkit.runtime.errors import ShapeError

N, H, SCALE = 12, 6, 1 / 7


def switch(ranks, device=hardware.A100):
    return Cluster(topology.switch(ranks, hardware.NVLINK3), device)


# ---- one output layer ------------------------------------------------------------------------------------------------


def problem(words, size=1.0, seed=0, dtype="float64"):
    """(X, whole table, targets); logits of magnitude `size`."""
    random = np.random.default_rng(seed)
    x, table = random.standard_normal((N, H)), random.standard_normal((words, H)) * size / H**0.5
    return x.astype(dtype), table.astype(dtype), random.integers(0, words, N)


def dense(x, table, targets):
    """(losses, ∇X, ∇table) on one device, in float64."""
    x, table = x.astype("float64"), table.astype("float64")
    logits = x @ table.T
    logits -= logits.max(axis=1, keepdims=True)
    total = np.exp(logits).sum(axis=1)
    grad = np.exp(logits) / total[:, None]
    grad[np.arange(N), targets] -= 1
    return np.log(total) - logits[np.arange(N), targets], SCALE * grad @ table, SCALE * grad.T @ x


def layer(comm, method, x, table, targets):
    shard = vocabulary.VocabShard(comm.rank, comm.size, len(table))
    mine = x if comm.rank == comm.size - 1 else None
    return vocabulary.output_layer(comm, method, shard, shard.of(table), mine, targets, SCALE)


def check_layer(method, ranks, x, table, targets, rtol=1e-12):
    losses, dx, d_table = zip(*switch(ranks).run(layer, method, x, table, targets).outputs, strict=True)
    true = dense(x, table, targets)
    for found in losses:
        assert_allclose(found, true[0], rtol=rtol, atol=rtol)
    got = dx[-1], np.concatenate(d_table)[: len(table)]
    for found, wanted in zip(got, true[1:], strict=True):
        assert_allclose(found, wanted, rtol=rtol, atol=rtol * abs(wanted).max())


ALL = ["naive", *SPLIT]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("method", ALL)
def test_loss_and_gradients_are_those_of_the_whole_layer(method, ranks):
    check_layer(method, ranks, *problem(48))


@pytest.mark.parametrize("method", ALL)
def test_logits_of_a_thousand_overflow_nowhere(method):
    check_layer(method, 4, *problem(48, size=1e3), rtol=1e-11)


@pytest.mark.parametrize("method", ALL)
def test_a_shard_whose_logits_are_far_below_has_no_share_and_no_nan(method):
    x, table, targets = problem(48)
    x[:, 0], table[:12, 0] = 1.0, -3000.0
    check_layer(method, 4, x, table, targets, rtol=1e-11)


@pytest.mark.parametrize("words, ranks", [(9, 8), (10, 4), (47, 8), (5, 4)])
@pytest.mark.parametrize("method", SPLIT)
def test_words_that_do_not_divide_are_padded(method, words, ranks):
    check_layer(method, ranks, *problem(words))


@pytest.mark.parametrize("method", SPLIT)
def test_padding_gets_no_gradient(method):
    run = switch(4).run(layer, method, *problem(10))
    rows = np.concatenate([d_table for _, _, d_table in run.outputs])
    assert rows.shape == (12, H)
    assert not rows[10:].any()


@pytest.mark.parametrize("method", SPLIT)
def test_float32_is_within_2e_5(method):
    x, table, targets = problem(48, dtype="float32")
    check_layer(method, 4, x, table, targets, rtol=2e-5)


@given(
    words=st.integers(1, 40), ranks=st.integers(1, 6), size=st.sampled_from([1e-3, 1, 30, 500]), seed=st.integers(0, 99)
)
@settings(max_examples=25, deadline=None)
def test_the_one_barrier_layer_equals_the_whole_one_for_any_cut(words, ranks, size, seed):
    check_layer("vocab-2", ranks, *problem(words, size, seed), rtol=1e-9)


def shares(comm, x, table, targets):
    shard = vocabulary.VocabShard(comm.rank, comm.size, len(table))
    own = vocabulary.own_softmax(x @ shard.of(table).T, targets, shard)
    top, both = vocabulary.totals(comm, own, targets, shard)
    return vocabulary.alpha(own, top, both), own.softmax


@pytest.mark.parametrize("words, size", [(48, 1.0), (48, 1e3), (9, 1.0)])
def test_the_shares_of_a_token_add_up_to_one(words, size):
    found = switch(8).run(shares, *problem(words, size)).outputs
    assert_allclose(sum(alpha for alpha, _ in found), 1, rtol=1e-12)


def test_own_softmax_times_its_share_is_the_softmax():
    x, table, targets = problem(48)
    found = switch(4).run(shares, x, table, targets).outputs
    logits = x @ table.T
    true = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert_allclose(np.hstack([alpha[:, None] * own for alpha, own in found]), true, rtol=1e-12)


@pytest.mark.parametrize("method", SPLIT)
def test_a_local_softmax_without_its_share_is_caught(monkeypatch, method):
    monkeypatch.setattr(vocabulary, "alpha", lambda own, top, both: np.ones_like(top))
    monkeypatch.setattr(vocabulary, "beside", lambda comm, function, *args: function(*args))
    with pytest.raises(AssertionError):
        check_layer(method, 4, *problem(48))


def test_scaling_after_the_targets_row_is_subtracted_is_caught(monkeypatch):
    honest = vocabulary.beside

    def wrong(comm, function, *args):
        if function is not vocabulary.input_gradient:
            return honest(comm, function, *args)
        expected, row, factor, factor_of_all = args
        return (expected - row) * factor[:, None] * factor_of_all

    monkeypatch.setattr(vocabulary, "beside", wrong)
    with pytest.raises(AssertionError):
        check_layer("vocab-2", 4, *problem(48))


# ---- barriers, operations, bytes -------------------------------------------------------------------------------------


def shapes(comm, method, words=4096, tokens=64, h=32):
    shard = vocabulary.VocabShard(comm.rank, comm.size, words)
    x, table = like((tokens, h), "float16"), like((shard.rows, h), "float16")
    return vocabulary.output_layer(comm, method, shard, table, x, like((tokens,), "int64"), 1.0)


@pytest.mark.parametrize("rank", [0, 2, 3])
@pytest.mark.parametrize("method, count", [("naive", 3), ("vocab-1", 2), ("vocab-2", 1), ("interlaced", 2)])
def test_barriers_counted_in_the_trace(method, count, rank):
    run = switch(4).run(shapes, method)
    assert picture.barriers(run, nbytes=64 * 4096 // 4 * 2, rank=rank) == count


@pytest.mark.parametrize("method, first", [("vocab-1", 2), ("vocab-2", 4), ("interlaced", 2)])
def test_both_algorithms_do_6nhv_over_p_operations_and_share_them_out_differently(method, first):
    events = [e for e in switch(4).run(shapes, method).trace if e.rank == 1 and e.flops]
    assert sum(e.flops for e in events) == 6 * 64 * 32 * 4096 / 4
    before = [e for e in events if e.name == "linear"]
    assert sum(e.flops for e in before) == first * 64 * 32 * 4096 / 4


def test_the_softmax_that_waits_for_t_is_charged_in_float32():
    run = switch(4).run(shapes, "vocab-1", words=65536)
    assert min(run.peak_memory) > 64 * 65536 // 4 * (4 + 2)


# ---- a whole step ----------------------------------------------------------------------------------------------------

pytest.importorskip("torch")

from placed_model import BATCH, HEAD_DIM, TOKENS, VOCABULARY, H as WIDTH, leaves, mapped, model, torch_step  # noqa: E402, I001


@cache
def trained(method, ranks, tied, layers=4, microbatches=8):
    """(outputs, bytes moved) of one step."""
    params, tokens, targets = model(tied, layers)
    run = switch(ranks).run(
        vocabulary.step, params, tokens, targets, method=method, microbatches=microbatches, head_dim=HEAD_DIM
    )
    return [(float(loss), mapped(np.copy, grads), kept) for loss, grads, kept in run.outputs], run.traffic.total


def assembled(outputs, method):
    """Gradients of all ranks as those of the whole model."""
    grads = [grads for _, grads, _ in outputs]
    found = {"layers": [one for grad in grads for one in grad["layers"]], "norm": grads[-1]["norm"]}
    if method in SPLIT:
        tables = {name: [grad[name] for grad in grads] for name in ("embedding", "head") if name in grads[0]}
        tables = {name: np.concatenate(parts)[:VOCABULARY] for name, parts in tables.items()}
        return found | tables | ({"head": tables["head"].T} if "head" in tables else {})
    head = {"head": grads[-1]["head"]} if "head" in grads[-1] else {}
    return found | {"embedding": grads[0]["embedding"]} | head


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_has_pytorchs_loss_and_gradients(method, ranks, tied):
    outputs, _ = trained(method, ranks, tied)
    loss, grads = torch_step(tied)
    assert_allclose([found for found, _, _ in outputs], loss, rtol=1e-12)
    for (name, got), (_, wanted) in zip(leaves(assembled(outputs, method)), leaves(grads), strict=True):
        assert_allclose(got, wanted, rtol=1e-10, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("method", SPLIT)
def test_eight_ranks_with_two_rows_each_have_pytorchs_gradients(method):
    (outputs, _), (_, grads) = trained(method, 8, False, layers=8), torch_step(False, 8)
    for (name, got), (_, wanted) in zip(leaves(assembled(outputs, method)), leaves(grads), strict=True):
        assert_allclose(got, wanted, rtol=1e-10, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("method", ["vocab-1", "vocab-2"])
def test_three_ranks_pad_sixteen_words_and_still_have_pytorchs_gradients(method):
    (outputs, _), (_, grads) = trained(method, 3, True, layers=3), torch_step(True, 3)
    for (name, got), (_, wanted) in zip(leaves(assembled(outputs, method)), leaves(grads), strict=True):
        assert_allclose(got, wanted, rtol=1e-10, atol=1e-13, err_msg=name)


def test_redistributed_layers_need_not_divide():
    (outputs, _), (_, grads) = trained("redis", 2, True, layers=5), torch_step(True, 5)
    assert [len(found["layers"]) for _, found, _ in outputs] == [3, 2]
    for (name, got), (_, wanted) in zip(leaves(assembled(outputs, "redis")), leaves(grads), strict=True):
        assert_allclose(got, wanted, rtol=1e-10, atol=1e-13, err_msg=name)


@pytest.mark.parametrize(
    "method, adds", [("baseline", True), ("interlaced", False), ("vocab-1", False), ("vocab-2", False)]
)
def test_tying_the_tables_costs_messages_only_where_they_lie_on_two_ranks(method, adds):
    tied, apart = (trained(method, 4, tied)[1] for tied in (True, False))
    assert (tied > apart) == adds


@pytest.mark.parametrize("method", METHODS)
def test_what_a_rank_kept_is_what_the_schedule_says(method):
    kept = [kept for _, _, kept in trained(method, 4, True)[0]]
    assert kept == peaks(build_schedule(method, 4, 8))


@pytest.mark.parametrize("ranks, words", [(4, VOCABULARY), (3, VOCABULARY)])
def test_a_rank_has_two_tables_of_a_pth_of_the_words(ranks, words):
    rows = -(-words // ranks)
    for _, grads, _ in trained("vocab-2", ranks, False, layers=ranks if ranks == 3 else 4)[0]:
        assert grads["embedding"].shape == grads["head"].shape == (rows, WIDTH)


# ---- schedules -------------------------------------------------------------------------------------------------------

COSTS = {"F": 1.0, "B": 2.0, "S": 0.2, "T": 0.4, "IF": 0.0, "IB": 0.0}  # 256k words on 8 ranks of 4 layers
LIGHT = COSTS | {"S": 0.1, "T": 0.2}


@pytest.mark.parametrize("method, extra", [("baseline", 0), ("redis", 0), ("vocab-2", 1), ("vocab-1", 2)])
@pytest.mark.parametrize("p", [2, 4, 8, 16])
def test_each_barrier_keeps_one_more_microbatch(p, method, extra):
    assert peaks(build_schedule(method, p, 4 * p)) == [p - rank + extra for rank in range(p)]


@pytest.mark.parametrize("p", [2, 4, 8, 16])
def test_interlaced_keeps_half_as_many_again(p):
    assert peaks(build_schedule("interlaced", p, 4 * p))[0] == 3 * p // 2


@given(method=st.sampled_from(SPLIT), p=st.integers(1, 9), m=st.integers(1, 14), forward=st.floats(0.1, 0.6))
@settings(max_examples=60, deadline=None)
def test_every_schedule_runs_to_its_end(method, p, m, forward):
    assert check_order(build_schedule(method, p, m, forward))


@pytest.mark.parametrize("method", SPLIT)
def test_every_rank_does_every_pass_of_every_microbatch_once(method):
    wanted = sorted(Pass(kind, k) for kind in COSTS for k in range(12))
    assert all(sorted(order) == wanted for order in build_schedule(method, 4, 12).passes)


@pytest.mark.parametrize("method", ["vocab-1", "vocab-2"])
def test_the_embedding_is_a_pass_ahead_of_the_first_rank(method):
    order = build_schedule(method, 4, 12).passes[0]
    slots = {step: n for n, step in enumerate(order)}
    assert all(slots[Pass("IF", k)] < slots[Pass("F", k)] - 1 for k in range(12))


def idle(method, p, m, costs):
    """Seconds that a step takes beyond the work of one rank."""
    return makespan(build_schedule(method, p, m), costs) - m * sum(costs.values())


@pytest.mark.parametrize("costs", [COSTS, LIGHT])
@pytest.mark.parametrize("p, m", [(4, 16), (8, 32), (8, 128)])
def test_the_bubble_is_no_larger_than_1f1bs_with_one_barrier(p, m, costs):
    assert idle("vocab-2", p, m, costs) <= bubble(one_f_one_b(p, m)) * 3 * m + 1e-9


@pytest.mark.parametrize("p, m", [(4, 16), (8, 32), (8, 128)])
def test_a_second_barrier_costs_one_f_one_s_and_one_t_at_most(p, m):
    difference = idle("vocab-1", p, m, COSTS) - idle("vocab-2", p, m, COSTS)
    assert 0 <= difference <= COSTS["F"] + COSTS["S"] + COSTS["T"]


def late(seconds):
    """Exchanges after S and T that take so long."""
    return lambda source, dest: seconds if source[1].kind in "ST" else 0.0


@given(method=st.sampled_from(SPLIT), a=st.floats(0, 4), b=st.floats(0, 4))
@settings(max_examples=30, deadline=None)
def test_slower_exchanges_never_shorten_a_step(method, a, b):
    order, (low, high) = build_schedule(method, 4, 8), sorted((a, b))
    assert makespan(order, COSTS, late(low)) <= makespan(order, COSTS, late(high))


def test_exchanges_shorter_than_a_pass_are_hidden_behind_the_others():
    order = build_schedule("vocab-2", 8, 64)
    assert makespan(order, COSTS, late(0.5)) - makespan(order, COSTS) <= 1.0  # once, not for each of 64 microbatches


def test_without_slack_the_same_exchanges_are_paid_for_each_microbatch():
    order = build_schedule("interlaced", 8, 64)
    assert makespan(order, COSTS, late(0.5)) - makespan(order, COSTS) >= 64 * 0.5


def shortest(layers, stages, ends):
    """The least possible work of the slowest stage, by trying every composition."""
    cuts = combinations_with_replacement(range(layers + 1), stages - 1)
    counts = (np.diff([0, *cut, layers]) for cut in cuts)
    return min(max(count + np.array([ends[0], *[0] * (stages - 2), ends[1]])) for count in counts)


@pytest.mark.parametrize("ends", [(0.0, 0.0), (0.0, 0.4), (0.0, 2.5), (1.0, 3.1), (2.0, 9.0)])
@pytest.mark.parametrize("layers, stages", [(7, 2), (8, 3), (9, 4), (6, 5)])
def test_redistribution_is_as_good_as_an_exhaustive_search(layers, stages, ends):
    counts = redistribute_layers(layers, stages, ends)
    work = np.array(counts) + np.array([ends[0], *[0] * (stages - 2), ends[1]])
    assert sum(counts) == layers
    assert max(work) == pytest.approx(shortest(layers, stages, ends))


def test_redistribution_finds_the_artifacts_layers():
    assert redistribute_layers(32, 8, (0.0, output_in_layers(256_000, 3072, 2048))) == [4, 4, 4, 5, 5, 5, 5, 0]


def test_the_output_layer_in_transformer_layers_is_the_papers():
    assert output_in_layers(256_000, 3072, 2048) == 6.25
    assert output_parameters_in_layers(256_000, 3072) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("method, milliseconds", [("baseline", 11722.2), ("redis", 7599.2)])
def test_1f1b_of_measured_stages_is_within_2_percent_of_the_measured_step(method, milliseconds):
    assert claims.replayed(method) == pytest.approx(milliseconds, rel=0.02)


# ---- the artifact's scale --------------------------------------------------------------------------------------------


@cache
def short(method, **changes):
    return scale.step(scale.Job(microbatches=24, **changes), method)


@pytest.mark.parametrize("method, first", [("baseline", 8), ("vocab-2", 9), ("vocab-1", 10), ("interlaced", 12)])
def test_microbatches_in_flight_counted_in_the_trace(method, first):
    assert picture.peak_inflight(short(method)) == short(method).kept
    assert short(method).kept[0] == first


def operations(step):
    """Of each rank."""
    kernels = step.run.trace.kernels
    return np.bincount(kernels[:, 0].astype(int), kernels[:, 6])


@pytest.mark.parametrize("method", SPLIT)
def test_every_rank_computes_as_much(method):
    work = operations(short(method))
    assert work.max() / work.mean() <= 1.01


def test_the_baselines_last_rank_computes_its_layers_and_the_whole_output():
    work, job = operations(short("baseline")), short("baseline").job
    share = job.output_flops / (job.output_flops + job.layers * job.layer_flops)
    assert work.max() / work.mean() == pytest.approx(1 + (job.stages - 1) * share, rel=1e-6)


def test_all_methods_compute_as_much_in_all():
    totals = [operations(short(method)).sum() for method in METHODS]
    assert_allclose(totals, short("baseline").job.flops, rtol=1e-9)


def test_the_order_of_peak_memory_is_the_papers():
    first, *others = (max(short(method).peak) for method in ("vocab-2", "vocab-1", "interlaced", "redis"))
    assert first < others[0] < others[1] < others[2]


@pytest.mark.parametrize("method", SPLIT)
def test_a_rank_saves_most_of_the_first_ranks_table(method):
    table = 18 * 256_000 * 3072
    saved = short("baseline").peak[0] - short(method).peak[0]
    more = picture.peak_inflight(short(method))[0] - 8
    buffers = 3 * 4096 * 32_000 * 4  # two softmax in float32, and what makes the next
    each = 4 * scale.KEPT_BYTES * 4096 * 3072
    assert saved == pytest.approx(table - 2 * table / 8 - more * each, abs=buffers)


@pytest.mark.parametrize("link, ratio", [("NVLink", 0.98), ("InfiniBand", 1.05), ("Ethernet", 1.1)])
def test_stopping_for_each_exchange_costs_more_the_slower_the_wires(link, ratio):
    seconds = [short(method, link=scale.LINKS[link]).seconds for method in ("interlaced", "vocab-2")]
    assert seconds[0] / seconds[1] > ratio


@pytest.mark.parametrize("method", ["baseline", "vocab-1", "vocab-2", "interlaced"])
def test_a_longer_step_repeats_the_middle_of_a_short_one(method):
    assert picture.longer(short(method), 48) == pytest.approx(
        scale.step(scale.Job(microbatches=48), method).seconds, rel=0.005
    )


def test_products_that_start_slowly_punish_thin_shards_most():
    slower = {
        method: short(method, start_up=1e-3).seconds / short(method).seconds for method in ("baseline", "vocab-2")
    }
    assert 1 < slower["baseline"] < slower["vocab-2"]


def test_the_picture_says_memory_and_seconds():
    drawn = picture.draw(short("vocab-2"), "Vocab-2")
    assert f"{max(short('vocab-2').peak) / scale.GIB:.1f} GiB" in drawn.words
    assert drawn.svg.count("rank ") >= 8


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [-1, 48])
def test_a_target_that_is_no_word_is_refused_by_name(token):
    x, table, targets = problem(48)
    targets[3] = token
    with pytest.raises(ShapeError, match=f"token {token} is no row of a vocabulary of 48"):
        switch(2).run(layer, "vocab-1", x, table, targets)


@pytest.mark.parametrize("which", [0, 1])
def test_a_token_or_target_of_a_batch_that_is_no_word_is_refused(which):
    params, *text = model(True)
    text[which] = text[which].copy()
    text[which][0, 0] = VOCABULARY
    with pytest.raises(ShapeError, match="is no row"):
        switch(2).run(vocabulary.step, params, *text, method="vocab-1", microbatches=4, head_dim=HEAD_DIM)


def test_an_unknown_method_is_refused_with_those_there_are():
    with pytest.raises(ShapeError, match="vocab-2"):
        build_schedule("vocab-3", 4, 8)


def test_layers_that_do_not_divide_are_refused_with_the_way_out():
    with pytest.raises(ShapeError, match="redis"):
        trained("vocab-1", 3, True)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ShapeError, match=f"{BATCH} sequences"):
        trained("vocab-1", 2, True, microbatches=3)


def test_the_naive_cut_refuses_words_that_do_not_divide():
    with pytest.raises(ShapeError, match="pad it"):
        switch(4).run(layer, "naive", *problem(10))


def test_tokens_of_the_small_model_are_what_this_file_assumes():
    assert model(True)[1].shape == (BATCH, TOKENS)
