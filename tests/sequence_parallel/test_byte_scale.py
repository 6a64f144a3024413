"""ByteScale: exact under any assignment, within memory, as fast as its cost model says, and never below the bound."""

import re
from dataclasses import replace
from math import ceil
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from toolkit.runtime import Cluster, hardware, topology
from toolkit.runtime.errors import DeadlockError
from toolkit.sequence_parallel import _block as blocks
from toolkit.sequence_parallel import _byte_scale_execute as execution
from toolkit.sequence_parallel import _byte_scale_lengths as lengths
from toolkit.sequence_parallel import _byte_scale_picture as picture
from toolkit.sequence_parallel import _byte_scale_simulate as simulation
from toolkit.sequence_parallel import byte_scale as bs
from toolkit.sequence_parallel._byte_scale_cost import MEASURED

K, M = 1024, 1024**2
LLAMA = bs.llama_7b()
SMALL = replace(LLAMA, layers=4)  # as LLaMA, and quicker to simulate
HEAD_DIM, VOCABULARY = 4, 11
SCHEMES = {
    "static": bs.plan_static,
    "power of two": bs.plan_power_of_two,
    "naive": bs.plan_naive,
    "balanced dp": bs.plan_balanced,
    "balanced pp": lambda *a: bs.plan_balanced(*a, strategy="pp"),
}


# ---- exact -----------------------------------------------------------------------------------------------------------

LENGTHS = [200, 100, 64, 30, 17, 5, 60, 44, 3, 128, 1, 90, *range(20, 56, 2)]  # 30 sequences, 64 tokens a rank
RANKS, CAPACITY = 4, 64
TEXT = [np.random.default_rng(i).integers(0, VOCABULARY, s + 1) for i, s in enumerate(LENGTHS)]


def model():
    random = np.random.default_rng(0)
    params = blocks.model_weights(random, VOCABULARY, 2, 16, 4, 2, HEAD_DIM, 24)
    for weights in params["layers"]:
        weights["norm_1"] += 0.1 * random.standard_normal(16)
    return execution.Model(params, HEAD_DIM)


def cluster(ranks, device=hardware.IDEAL):
    return Cluster(topology.switch(ranks, hardware.Link(LLAMA.network)), device)


def run_step(plan, text=TEXT):
    return cluster(plan.ranks).run(bs.execute, plan, model(), text)


def worst(a, b):
    """Largest difference between two nested gradients."""
    if isinstance(a, np.ndarray):
        return np.abs(a - b).max()
    return max(worst(a[k], b[k]) for k in (a if isinstance(a, dict) else range(len(a))))


@pytest.fixture(scope="module")
def alone():
    """(gradients, losses) of one device that takes sequence by sequence, with dense attention."""

    def whole(comm, tokens):
        where, count = np.arange(len(tokens) - 1), sum(LENGTHS)
        attention = blocks.one_device(causal=True)
        return blocks.loss_and_gradients(
            comm, model().params, tokens[:-1], tokens[1:], where, attention, HEAD_DIM, count
        )

    outputs = [cluster(1).run(whole, tokens).outputs[0] for tokens in TEXT]
    total = outputs[0][1]
    for _, grads in outputs[1:]:
        execution.add_up(total, grads)
    return total, [losses for losses, _ in outputs]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_equal_one_device_s(scheme, alone):
    run = run_step(SCHEMES[scheme](LENGTHS, CAPACITY, RANKS, LLAMA))
    assert max(worst(alone[0], grads) for grads, _ in run.outputs) < 1e-9


@pytest.mark.parametrize("scheme", SCHEMES)
def test_shares_of_the_loss_add_up_to_the_mean_over_all_tokens(scheme, alone):
    run = run_step(SCHEMES[scheme](LENGTHS, CAPACITY, RANKS, LLAMA))
    mean = np.concatenate(alone[1]).mean()
    assert sum(stats["loss"] for _, stats in run.outputs) == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_token_is_processed_once_and_padding_is_counted(scheme):
    plan = SCHEMES[scheme](LENGTHS, CAPACITY, RANKS, LLAMA)
    stats = [stats for _, stats in run_step(plan).outputs]
    assert sum(s["tokens"] for s in stats) == sum(LENGTHS)
    assert sum(s["padding"] for s in stats) == plan.padding


def random_plan(random, batch=LENGTHS, ranks=RANKS):
    """Any sequences on any groups, in any order: memory is not looked at."""
    order, micro_batches = random.permutation(len(batch)).tolist(), []
    while order:
        members = random.permutation(ranks)[: random.integers(1, ranks + 1)]
        chosen = [order.pop() for _ in range(min(len(order), int(random.integers(1, 4))))]
        micro_batches.append(bs.MicroBatch(tuple(members.tolist()), tuple((i, batch[i]) for i in chosen)))
    return bs.Plan(micro_batches, ranks, SMALL)


@pytest.mark.parametrize("seed", range(4))
def test_gradients_are_exact_under_any_assignment(seed, alone):
    run = run_step(random_plan(np.random.default_rng(seed)))
    assert worst(alone[0], run.outputs[0][0]) < 1e-9


def test_gradients_are_exact_when_one_rank_does_everything_and_the_others_nothing(alone):
    plan = bs.Plan([bs.MicroBatch((2,), ((i, s),)) for i, s in enumerate(LENGTHS)], RANKS, LLAMA)
    run = run_step(plan)
    assert [stats["micro_batches"] for _, stats in run.outputs] == [0, 0, 30, 0]
    assert max(worst(alone[0], grads) for grads, _ in run.outputs) < 1e-9


@pytest.mark.parametrize("name", ["q", "v", "up"])
def test_gradients_agree_with_finite_differences(name):
    plan, nudged = bs.plan_balanced(LENGTHS, CAPACITY, RANKS, LLAMA), model()
    weights = nudged.params["layers"][0][name]
    along = np.random.default_rng(1).standard_normal(weights.shape)

    def loss(size):
        weights[...] += size * along
        run = cluster(RANKS).run(bs.execute, plan, nudged, TEXT)
        weights[...] -= size * along
        return sum(stats["loss"] for _, stats in run.outputs)

    gradient = run_step(plan).outputs[0][0]["layers"][0][name]
    assert np.vdot(gradient, along) == pytest.approx((loss(1e-5) - loss(-1e-5)) / 2e-5, rel=1e-6)


@pytest.mark.parametrize(
    "weight",
    [lambda s, batch: 1 / (len(batch) * s), lambda s, batch: 1 / (RANKS * CAPACITY)],
    ids=["mean of samples' means", "mean over a micro-batch"],
)
def test_a_mean_that_is_not_over_all_tokens_is_caught(weight, alone, monkeypatch):
    monkeypatch.setattr(execution, "loss_weight", weight)
    run = run_step(bs.plan_balanced(LENGTHS, CAPACITY, RANKS, LLAMA))
    assert worst(alone[0], run.outputs[0][0]) > 1e-3


def test_a_pack_without_its_block_diagonal_mask_is_caught(alone, monkeypatch):
    honest = execution.packed
    monkeypatch.setattr(execution, "packed", lambda lengths: honest([sum(lengths)]))
    run = run_step(bs.plan_balanced(LENGTHS, CAPACITY, RANKS, LLAMA))
    assert worst(alone[0], run.outputs[0][0]) > 1e-3


# ---- how many ranks --------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 4 * M), st.integers(1, 4 * M), st.floats(0, 1), st.floats(0, 1))
def test_ranks_grow_with_length_and_shrink_with_offloading(s, t, r, q):
    def ranks(s, r):
        return bs.ranks_needed(s, 8 * K, 32, r, LLAMA.act)

    assert ranks(min(s, t), r) <= ranks(max(s, t), r)
    assert ranks(s, max(r, q)) <= ranks(s, min(r, q))


@settings(deadline=None)
@given(st.integers(1, 4 * M), st.sampled_from([1, 64, 8 * K, 12345]), st.integers(3, 80))
def test_without_offloading_it_takes_one_rank_for_each_capacity(s, capacity, layers):
    assert bs.ranks_needed(s, capacity, layers, 0.0, LLAMA.act) == ceil(s / capacity)


def test_fixed_activations_count_once_a_sequence():
    act = replace(LLAMA, act_fixed=LLAMA.act_token * 4 * K).act  # as much as 4K tokens
    assert bs.ranks_needed(20 * K, 8 * K, 32, 0.0, act) == 2  # (20 + 4) / (8 + 4)


def test_eq_3_solved_by_hand():
    # 32 layers, r = 1/2: 2 + 15 of 32 layers stay, so 128 capacities need 68 ranks.
    assert bs.ranks_needed(128 * 8 * K, 8 * K, 32, 0.5, LLAMA.act) == 68


@pytest.mark.parametrize("s", [17 * K, 64 * K, 200_000, M, 2 * M])
def test_the_best_ratio_is_the_smallest_that_reaches_the_fewest_ranks(s):
    r, ranks = bs.best_offload_ratio(s, 8 * K, LLAMA)
    hidden = [q for q in np.linspace(0, 1, 2001) if LLAMA.seconds(s) >= q * LLAMA.act(s) / LLAMA.host]
    by_search = {q: bs.ranks_needed(s, 8 * K, LLAMA.layers, q, LLAMA.act) for q in hidden}
    assert ranks == min(by_search.values())
    assert min(q for q, d in by_search.items() if d == ranks) - 1 / 2000 <= r <= max(hidden) + 1e-12


@pytest.mark.parametrize("layers", [1, 2])
def test_two_layers_are_too_few_to_offload(layers):
    assert bs.best_offload_ratio(M, 16 * K, replace(LLAMA, layers=layers)) == (0.0, 64)


def test_short_sequences_stay_on_the_device():
    assert bs.best_offload_ratio(8 * K, 8 * K, LLAMA) == (0.0, 1)


def test_a_sequence_that_would_outlast_the_average_rank_gets_more_ranks():
    alone, crowd = [M], [M] * 64
    fewest = bs.best_offload_ratio(M, 16 * K, LLAMA)[1]
    assert bs.needs(crowd, 16 * K, 64, LLAMA)[0][1] == fewest
    assert bs.needs(alone, 16 * K, 64, LLAMA)[0] == (0.0, 64)


# ---- plans -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(1, 100), max_size=40))
def test_best_fit_takes_the_fullest_bin_with_room(sizes):
    bins = bs.pack_best_fit(sizes, 100)
    assert sorted(i for b in bins for i in b) == list(range(len(sizes)))
    number = {i: n for n, b in enumerate(bins) for i in b}
    for i, s in enumerate(sizes):  # replay, looking at every bin
        full = {n: sum(sizes[j] for j in b if j < i) for n, b in enumerate(bins) if b[0] < i}
        fitting = {n: load for n, load in full.items() if load + s <= 100}
        assert full.get(number[i], 0) == (max(fitting.values()) if fitting else 0)


BATCHES = st.builds(
    lambda kind, seed, longest: bs.length_sampler(kind, longest, seed, 4 * M),
    st.sampled_from(["github", "byted"]), st.integers(0, 999), st.sampled_from([64 * K, 256 * K, 512 * K]),
)  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(BATCHES, st.sampled_from(list(SCHEMES)))
def test_plans_cover_the_batch_within_every_rank_s_memory(batch, scheme):
    plan = SCHEMES[scheme](batch, 16 * K, 32, LLAMA)
    plan.check(batch, 16 * K)
    assert all(b.r or sum(b.padded) <= 16 * K * len(b.ranks) for b in plan.micro_batches)


@settings(max_examples=15, deadline=None)
@given(BATCHES, st.booleans())
def test_balanced_ends_no_later_than_naive_and_no_earlier_than_the_bound(batch, offload):
    naive, balanced = (p(batch, 16 * K, 32, LLAMA, offload=offload) for p in (bs.plan_naive, bs.plan_balanced))
    assert balanced.makespan() <= naive.makespan()
    assert balanced.makespan() >= bs.lower_bound(batch, 16 * K, 32, LLAMA) * (1 - 1e-12)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda b: b[1:], "each goes in once"),
        (lambda b: [*b, b[0]], "each goes in once"),
        (lambda b: [b[0]._replace(ranks=(0, 0)), *b[1:]], "names ranks"),
        (lambda b: [b[0]._replace(ranks=(9,)), *b[1:]], "names ranks"),
        (lambda b: [b[0]._replace(ranks=(0,)), *b[1:]], "use more ranks"),
    ],
    ids=["dropped", "twice", "rank twice", "unknown rank", "too few ranks"],
)
def test_a_plan_that_breaks_a_promise_is_caught(change, message):
    plan = bs.plan_naive(LENGTHS, CAPACITY, RANKS, LLAMA)
    with pytest.raises(ValueError, match=message):
        replace(plan, micro_batches=change(plan.micro_batches)).check(LENGTHS, CAPACITY)


def test_the_worked_example_of_the_card():
    batch = [16 * K, 12 * K, *[4 * K] * 6]
    naive = bs.plan_naive(batch, 8 * K, 4, LLAMA, offload=False)
    assert [b.ranks for b in naive.micro_batches] == [(0, 1), (2, 3), (0,), (1,), (2,)]
    static = bs.plan_static(batch, 8 * K, 4, LLAMA, longest=32 * K)
    assert (naive.token_hops, static.token_hops) == (28 * K, 156 * K)


def test_hops_are_the_formulas_and_short_sequences_make_none():
    batch = bs.length_sampler("github", 512 * K, 3, 8 * M)
    static = bs.plan_static(batch, 16 * K, 32, LLAMA, 512 * K)
    balanced = bs.plan_balanced(batch, 16 * K, 32, LLAMA, offload=False)
    assert static.token_hops == 31 * sum(batch)
    assert balanced.token_hops == sum(s * (ceil(s / (16 * K)) - 1) for s in batch if s > 16 * K)


def test_the_mesh_of_powers_of_two_uses_nothing_else():
    batch = bs.length_sampler("byted", 512 * K, 0, 8 * M)
    groups = {b.ranks for b in bs.plan_power_of_two(batch, 16 * K, 32, LLAMA).micro_batches}
    assert all(len(g) & (len(g) - 1) == 0 and g[0] % len(g) == 0 and g[-1] - g[0] == len(g) - 1 for g in groups)


def test_any_number_of_ranks_works_96_for_one_sequence_and_32_alone():
    batch = [96 * 16 * K, *[16 * K] * 32]
    plan = bs.plan_balanced(batch, 16 * K, 128, replace(LLAMA, layers=1), offload=False)
    assert sorted(len(b.ranks) for b in plan.micro_batches) == [1] * 32 + [96]
    assert {r for b in plan.micro_batches for r in b.ranks} == set(range(128))
    assert simulation.simulate(plan).makespan == pytest.approx(plan.makespan(), rel=1e-9)


@pytest.mark.parametrize("seed", range(2))
def test_pp_balance_keeps_a_pipeline_at_one_length_level_and_fast_pipelines_take_more(seed):
    batch, spread, most = bs.length_sampler("github", 256 * K, seed, 32 * M), {}, {}
    for strategy in ("dp", "pp"):
        plan = bs.plan_balanced(batch, 16 * K, 128, LLAMA, strategy=strategy, stages=4)
        seconds = [[] for _ in range(128)]
        for micro_batch, time in zip(plan.micro_batches, plan.seconds.sum(axis=1), strict=True):
            for rank in micro_batch.ranks:
                seconds[rank].append(time)
        spread[strategy] = np.mean([np.std(times) / np.mean(times) for times in seconds])
        most[strategy] = max(map(len, seconds)) / min(map(len, seconds))
    assert spread["pp"] < 0.5 * spread["dp"]
    assert most["pp"] > 5 > 2 > most["dp"]


@settings(deadline=None)
@given(st.lists(st.integers(1, 16 * K), min_size=1, max_size=12), st.integers(1, 6))
def test_one_pipeline_takes_the_flow_shop_s_closed_formula(sizes, stages):
    plan = bs.Plan([bs.MicroBatch((0,), ((i, s),)) for i, s in enumerate(sizes)], 1, LLAMA)
    each = plan.seconds.sum(axis=1) / stages  # equal stages: the sum, and the longest once more for each further stage
    assert plan.makespan(stages) == pytest.approx(each.sum() + (stages - 1) * each.max(), rel=1e-12)


def test_a_group_starts_when_its_last_member_is_free():
    batch = [8 * K, 4 * K, 2 * K]
    ranks = [(0,), (1,), (0, 1)]
    plan = bs.Plan([bs.MicroBatch(r, ((i, batch[i]),)) for i, r in enumerate(ranks)], 2, LLAMA)
    starts, ends, _ = plan.flow()
    assert starts[2] == max(ends[:2]) == ends[0] > ends[1]


def test_twelve_thousand_ranks_come_within_a_hundredth_of_the_bound():
    ranks, batch = 12_288, bs.length_sampler("github", 2 * M, 0, 256 * M)
    plan = bs.plan_balanced(batch, 16 * K, ranks, LLAMA)
    plan.check(batch, 16 * K)
    assert plan.makespan() < 1.01 * bs.lower_bound(batch, 16 * K, ranks, LLAMA)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: bs.ranks_needed(0, 8, 4, 0.0, LLAMA.act), "s ≥ 1"),
        (lambda: bs.ranks_needed(8, 8, 4, 1.5, LLAMA.act), "0 ≤ r ≤ 1"),
        (lambda: bs.best_offload_ratio(-3, 8, LLAMA), "s ≥ 1"),
        (lambda: bs.plan_naive([100 * K], 8 * K, 4, LLAMA, False), "needs 13 ranks of 8,192 tokens; there are 4"),
        (lambda: bs.plan_balanced([0, 5], 8, 4, LLAMA), "s ≥ 1"),
        (lambda: bs.plan_balanced([5], 8, 4, LLAMA, strategy="tp"), "neither 'dp' nor 'pp'"),
        (lambda: bs.plan_static([100 * K], 8 * K, 4, LLAMA), "takes 13 ranks of 8,192 tokens; there are 4"),
        (lambda: bs.plan_power_of_two([5], 8, 6, LLAMA), "does not divide 6"),
        (lambda: bs.plan_power_of_two([100], 8, 4, LLAMA), "does not fit 4 ranks"),
        (lambda: bs.pack_best_fit([3, 9], 8), "sequence 1 has 9 tokens"),
        (lambda: bs.length_sampler("books"), "'github' or 'byted'"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_chart_has_a_bar_for_each_run_of_ranks_and_says_the_shares():
    ranks = [(0, 1, 3), (2,), (4, 5)]
    plan = bs.Plan([bs.MicroBatch(r, ((i, 32 * K),)) for i, r in enumerate(ranks)], 6, LLAMA)
    chart = picture.gantt(plan, "mine", {"mine": plan})
    bars = {
        style: re.findall(rf'<path style="{style}" d="(M[^"]*)"/>', chart.svg)[-1].count("M")  # the first is the legend
        for style in (picture.PACKS, picture.RINGS, picture.LATE)
    }
    assert bars == {picture.PACKS: 1, picture.RINGS: 3, picture.LATE: 3}  # 0–1, 3 and 4–5 are three pieces
    assert all(f"{share:.0%} {what}" in chart.words for what, share in plan.shares.items())


# ---- on the machine --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["static", "naive", "balanced dp", "power of two"])
@pytest.mark.parametrize("ranks, tokens", [(32, M), (64, 2 * M), (128, 4 * M)])
def test_the_cost_model_is_the_runtime(ranks, tokens, scheme):
    cost = replace(LLAMA, layers=3)
    batch = bs.length_sampler("github", 512 * K if scheme != "static" else 256 * K, 1, tokens)
    plan = SCHEMES[scheme](batch, 16 * K, ranks, cost, *([256 * K] if scheme == "static" else []))
    assert simulation.simulate(plan).makespan == pytest.approx(plan.makespan(), rel=1e-8)


def test_profiled_on_real_kernels_the_cost_model_predicts_a_step_to_a_tenth():
    weights = blocks.model_weights(None, 1000, 2, 4096, 32, 8, 128, 11_008, "float16")
    llama, ranks, link = execution.Model(weights, 128), 16, hardware.Link(100e9)
    fitted = execution.profile(llama, hardware.H100, [k * K for k in (2, 4, 8, 16, 32, 64)])
    cost = bs.Cost(*fitted, LLAMA.act_token, 0.0, 4096, link.bandwidth, 25e9, 2)  # 8 key heads, 16 bits
    batch = bs.length_sampler("github", 128 * K, 0, M)
    plan = bs.plan_balanced(batch, 16 * K, ranks, cost, offload=False)
    text, machine = [np.zeros(s + 1, np.int64) for s in batch], Cluster(topology.switch(ranks, link), hardware.H100)
    run, reduction = (machine.run(bs.execute, p, llama, text) for p in (plan, bs.Plan([], ranks, cost)))
    assert run.makespan - reduction.makespan == pytest.approx(plan.makespan(), rel=0.1)


def sent(run, *names):
    return sum(e.bytes for e in run.trace if e.kind == "send" and e.name in names)


@pytest.mark.parametrize("scheme", ["static", "naive", "balanced dp"])
def test_bytes_of_keys_and_gradients_are_the_token_hops(scheme):
    batch = [64 * K, 32 * K, 48 * K, *[4 * K] * 12]  # no padding
    plan = SCHEMES[scheme](batch, 16 * K, 4, SMALL)
    run = simulation.simulate(plan)
    spread = sum(sum(b.lengths) for b in plan.micro_batches if len(b.ranks) > 1)
    assert sent(run, "keys and values") == 3 * SMALL.layers * SMALL.kv_token * plan.token_hops
    assert sent(run, "gradients") == SMALL.layers * SMALL.kv_token * spread


def test_numeric_rings_send_the_token_hops_too():
    plan = bs.plan_naive([256, 128, 60, 64], CAPACITY, RANKS, LLAMA, offload=False)
    text = [np.zeros(s + 1, np.int64) for s in (256, 128, 60, 64)]
    keys = 2 * 2 * HEAD_DIM * 8  # keys and values, 2 heads, float64
    assert sent(run_step(plan, text), "keys and values") == 2 * 2 * keys * plan.token_hops  # 2 layers, both ways


def test_short_sequences_send_nothing():
    plan = bs.plan_balanced([3 * K] * 20, 16 * K, 4, SMALL)
    assert simulation.simulate(plan).traffic.total == 0


@pytest.mark.parametrize("scheme", ["naive", "balanced dp"])
def test_activations_never_exceed_those_of_the_capacity(scheme):
    cost = replace(LLAMA, layers=6)
    batch = bs.length_sampler("byted", 256 * K, 1, 2 * M)
    plan = SCHEMES[scheme](batch, 16 * K, 16, cost)
    peaks = simulation.simulate(plan).peak_memory[:16]
    assert any(b.r for b in plan.micro_batches)
    assert 0.95 < max(peaks) / (cost.layers * cost.act(16 * K)) <= 1


def one_sequence(s, ranks, r, cost=SMALL):
    return simulation.simulate(bs.Plan([bs.MicroBatch(tuple(range(ranks)), ((0, s),), r)], ranks, cost))


@pytest.mark.parametrize("s", [32 * K, 64 * K, 256 * K, M])
def test_offloading_by_the_rule_costs_no_time(s):
    r, ranks = bs.best_offload_ratio(s, 16 * K, LLAMA)
    assert r > 0
    assert one_sequence(s, ranks, r).makespan <= one_sequence(s, ranks, 0.0).makespan * (1 + 1e-9)


def test_offloading_all_of_a_short_sequence_makes_the_step_longer():
    deep = replace(LLAMA, layers=24)
    assert one_sequence(4 * K, 1, 1.0, deep).makespan > 1.2 * one_sequence(4 * K, 1, 0.0, deep).makespan


def test_forced_offloading_takes_what_the_cost_model_says():
    plan = bs.Plan([bs.MicroBatch((0,), ((0, 4 * K),), 1.0)], 1, replace(LLAMA, layers=24))
    assert simulation.simulate(plan).makespan == pytest.approx(plan.makespan(), rel=0.05)  # the last layer stays


@pytest.mark.parametrize("r", [0.25, 1.0])
def test_even_slow_copies_leave_no_more_than_two_whole_layers_on_the_device(r):
    deep = replace(LLAMA, layers=12)
    assert one_sequence(4 * K, 1, r, deep).peak_memory[0] == pytest.approx(deep.resident(4 * K, r), rel=1e-6)


def test_offloaded_bytes_load_the_host_s_link_and_not_the_network():
    with_it, without = one_sequence(256 * K, 4, 0.5), one_sequence(256 * K, 4, 0.0)
    each = int(0.5 * SMALL.act(256 * K) / 4) * (SMALL.layers - 1)  # all but the last layer
    links = with_it.traffic.by_link
    assert links[0, "host0"] == links["host0", 0] == each
    assert {e: n for e, n in links.items() if not {*e} & {f"host{i}" for i in range(4)}} == without.traffic.by_link


# ---- deadlock --------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_overlapping_groups_in_one_order_never_deadlock(seed):
    plan = random_plan(np.random.default_rng(seed), [K] * 24, 6)
    assert simulation.simulate(plan, layers=1).makespan == pytest.approx(
        replace(plan, cost=replace(SMALL, layers=1)).makespan(), rel=1e-8
    )


def test_two_ranks_that_disagree_about_the_order_deadlock(monkeypatch):
    groups = [(0, 1), (1, 2), (2, 0)]
    plan = bs.Plan([bs.MicroBatch(g, ((i, K),)) for i, g in enumerate(groups)], 3, SMALL)
    honest = bs.Plan.of
    monkeypatch.setattr(bs.Plan, "of", lambda self, rank: honest(self, rank)[:: -1 if rank == 0 else 1])
    with pytest.raises(DeadlockError):
        simulation.simulate(plan)


# ---- the numbers it starts from --------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", MEASURED)
def test_the_fitted_cost_model_meets_each_measured_time_to_a_tenth(k):
    assert LLAMA.seconds(k * K) == pytest.approx(1e-3 * sum(MEASURED[k]), rel=0.1)


def test_the_fit_finds_the_coefficients_that_made_the_times():
    s = np.array([4, 8, 16, 64, 256]) * K
    assert bs.fit(s, 1e-11 * s**2 + 3e-7 * s + 1e-4) == pytest.approx((1e-11, 3e-7, 1e-4), rel=1e-6)


@pytest.fixture(scope="module")
def drawn():
    return {kind: lengths.draw(kind, 2_000_000, np.random.default_rng(0)) for kind in ("byted", "github")}


@pytest.mark.parametrize(
    "kind, measure, published",
    [
        ("byted", lambda x: np.mean(x <= 4 * K), 0.80),
        ("byted", lambda x: np.mean(x >= 128 * K), 0.01),
        ("byted", lambda x: np.mean(x >= 2 * M), 0.0005),
        ("byted", lambda x: x[x >= 128 * K].sum() / x.sum(), 0.443),
        ("byted", lambda x: x[x >= 2 * M].sum() / x.sum(), 0.121),
        ("github", lambda x: x[x >= 128 * K].sum() / x.sum(), 0.162),
    ],
    ids=["≤ 4K", "≥ 128K", "≥ 2M", "tokens ≥ 128K", "tokens ≥ 2M", "GitHub tokens ≥ 128K"],
)
def test_lengths_have_the_published_quantiles(drawn, kind, measure, published):
    assert measure(drawn[kind]) == pytest.approx(published, rel=0.1)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["github", "byted"]), st.integers(1, 2 * M), st.integers(0, 99), st.integers(1, M))
def test_a_batch_has_exactly_its_tokens_and_no_sequence_above_the_longest(kind, longest, seed, tokens):
    assume(tokens / longest < 5000)
    batch = bs.length_sampler(kind, longest, seed, tokens)
    assert batch.sum() == tokens and 1 <= batch.min() <= batch.max() <= longest
    assert np.array_equal(batch, bs.length_sampler(kind, longest, seed, tokens))


def test_a_share_of_nothing_is_padding_alone():
    group = SimpleNamespace(rank=3, size=4)
    inputs, _, where, weights = execution.share(group, np.array([5, 6, 7]), 0.5)  # 2 tokens on 4 ranks
    assert len(inputs) == 2 and not weights.any() and where.tolist() == [3, 4]
