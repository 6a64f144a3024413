"""Where to put a model: memory by the published formula, a bound that never lies, and a search that misses nothing."""

from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.claims.model_parallel import megatron as claims
from toolkit.model_parallel import _megatron_pieces as pieces
from toolkit.model_parallel import _megatron_scale as scale
from toolkit.model_parallel import _planner as planner
from toolkit.model_parallel._megatron_scale import Job
from toolkit.model_parallel._planner_why import parts, replayed, why
from toolkit.model_parallel._schedule import peaks
from toolkit.model_parallel._zero_bubble import v_half
from toolkit.runtime import Cluster, hardware

EFFICIENCY = planner.EFFICIENCY
GPT3 = Job(*planner.GPTS["gpt-175b"], batch=1536)
PUBLISHED = replace(GPT3, t=8, p=16, d=8, b=1, kind="1F1B")  # examples/pretrain_gpt3_175B.sh of Megatron-LM, 128 nodes
SMALL = Job(8, 1024, 16, 16, s=512)  # 8 layers, 16 sequences


@cache
def all_of(devices, **choices):
    """Placements of SMALL that fit."""
    return [one for one in planner.placements(SMALL, devices, **choices) if planner.refusal(one, EFFICIENCY) is None]


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1, 2, 8])
@pytest.mark.parametrize("b", [1, 4])
def test_what_our_layer_keeps_is_korthikantis_count_but_for_masks_and_gelu(t, b):
    """Theirs has two masks of one byte, a GeLU kept, and of the scores a mask and what dropout leaves."""
    job = Job(1, 1024, 16, 1, t=t, b=b, s=512, recompute="none")
    a_hidden_state, scores = job.s * job.b * job.h, job.heads * job.s**2 * job.b / t
    ours = pieces.layer_seconds(scale.shape(job), EFFICIENCY).kept
    assert ours + a_hidden_state * (2 + 8 / t) + 3 * scores == planner.activation_bytes(job)


@pytest.mark.parametrize("t", [1, 8])
def test_without_scores_only_their_bytes_are_gone(t):
    job = Job(1, 1024, 16, 1, t=t, s=512, recompute="none")
    kept = [
        pieces.layer_seconds(scale.shape(replace(job, recompute=r)), EFFICIENCY).kept for r in ("none", "attention")
    ]
    assert kept[0] - kept[1] == 2 * job.heads * job.s**2 / t
    assert planner.activation_bytes(job) - planner.activation_bytes(replace(job, recompute="attention")) == (
        5 * job.heads * job.s**2 / t
    )


def test_full_recomputation_keeps_the_input():
    job = replace(PUBLISHED, b=2)
    assert planner.activation_bytes(job) == 2 * 2048 * 2 * 12_288
    assert planner.activation_bytes(job) == pieces.layer_seconds(scale.shape(job), EFFICIENCY).kept


def test_inputs_and_gradients_of_the_four_products_wait_for_w():
    t, h, tokens = 4, 1024, 512
    inputs = [h, h / t, h, 4 * h / t]  # of queries, keys and values together; of what attention gives; of the MLP's two
    outputs = [3 * h / t, h, 4 * h / t, h]
    assert planner.product_bytes(Job(1, h, 16, 1, t=t, s=tokens)) == 2 * tokens * sum(inputs + outputs)


def test_1f1b_keeps_the_layers_of_the_whole_model():
    """p microbatches of L / p layers: Korthikanti et al., section 4.2.3."""
    memory = planner.memory(PUBLISHED, EFFICIENCY)
    assert memory.activations == 96 * planner.activation_bytes(PUBLISHED)


def test_interleaving_keeps_1_plus_p_minus_1_over_pv_times_as_much():
    job = replace(PUBLISHED, kind="interleaved", v=3)
    plain, more = (planner.memory(one, EFFICIENCY).activations for one in (PUBLISHED, job))
    assert more / plain == pytest.approx(1 + 15 / (16 * 3))


def test_v_half_keeps_half_of_1f1b_where_w_leaves_nothing_more():
    p = 8
    assert (
        max(peaks(v_half(p, 24), left=0)) <= max(peaks(v_half(p, 24), left=0.5)) <= max(peaks(v_half(p, 24))) == p + 2
    )


@pytest.mark.parametrize("stage, bytes_each", [(0, 16), (1, 4 + 12 / 8), (2, 2 + 14 / 8)])
def test_states_are_16_bytes_a_parameter_of_which_zero_cuts_its_share(stage, bytes_each):
    job = replace(PUBLISHED, zero=stage)
    assert planner.memory(job, EFFICIENCY).states == pytest.approx(bytes_each * scale.numbers_of(job))


def test_zero_3_cuts_layers_and_leaves_the_ends_whole():
    job, ends = replace(PUBLISHED, zero=3), 51_200 * 12_288 / 8
    layers = scale.numbers_of(job) - ends
    assert planner.memory(job, EFFICIENCY).states == pytest.approx(16 / 8 * layers + (2 + 14 / 8) * ends)


def test_a_rank_of_the_first_stage_has_its_layers_and_the_embedding():
    assert scale.numbers_of(PUBLISHED) == 96 // 16 * 12 * 12_288**2 // 8 + 51_200 * 12_288 // 8


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"t": 64, "p": 1, "d": 16}, "96 heads do not divide among 64 tensor ranks"),
        ({"p": 64, "d": 2}, "96 layers do not divide among 64 chunks"),
        ({"p": 32, "d": 4, "kind": "V-Half"}, "96 layers do not divide among 64 chunks"),
        ({"p": 32, "d": 4, "kind": "interleaved", "v": 2}, "96 layers do not divide among 64 chunks"),
        ({"b": 5}, "1536 sequences do not divide among 40 replicas × sequences a microbatch"),
        ({"b": 8, "kind": "interleaved", "v": 2}, "interleaving needs a multiple of 16 microbatches, not 24"),
        ({"t": 4, "p": 4, "d": 64}, "needs 176 GB of 80 GB for weights, gradients and states alone"),
        ({"kind": "GPipe", "recompute": "none", "p": 8, "d": 16}, "needs 712 GB of 80 GB, 667 GB for activations"),
    ],
)
def test_what_cannot_be_says_why(changes, reason):
    assert planner.refusal(replace(PUBLISHED, **changes), EFFICIENCY) == reason


def test_the_published_placement_fits():
    assert planner.refusal(PUBLISHED, EFFICIENCY) is None


# ---- the bound and the search ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data(), st.booleans())
def test_no_step_is_faster_than_its_bound(data, overlap):
    job = replace(data.draw(st.sampled_from(all_of(16))), overlap=overlap)
    assert planner.bound(job, EFFICIENCY) <= scale.step(job, EFFICIENCY).seconds * (1 + 1e-12)


@pytest.mark.parametrize("kind, v", [("GPipe", 1), ("1F1B", 1), ("interleaved", 2)])
def test_the_bound_is_tight_where_the_closed_form_is(kind, v):
    job = replace(PUBLISHED, kind=kind, v=v, batch=384)
    assert planner.bound(job, EFFICIENCY) == pytest.approx(scale.step(job, EFFICIENCY).seconds, rel=0.02)


@pytest.mark.parametrize("overlap", [False, True])
def test_the_search_finds_what_timing_everything_finds(overlap):
    job = replace(SMALL, overlap=overlap)
    found = planner.search(job, 8, EFFICIENCY, keep=5)
    everything = sorted(scale.step(replace(one, overlap=overlap), EFFICIENCY).seconds for one in all_of(8))
    assert [step.seconds for step in found.steps] == everything[:5]
    assert found.timed < found.bounded == len(everything)


def test_every_placement_uses_all_devices_once():
    found = list(planner.placements(SMALL, 8))
    assert len(found) == len(set(found))
    assert {one.devices for one in found} == {8}
    assert {one.zero for one in found if one.d == 1} == {0}
    assert {one.kind for one in found if one.p == 1} == {"1F1B"}


def test_every_placement_is_refused_or_bounded():
    found = planner.search(SMALL, 8, EFFICIENCY, keep=1)
    assert found.refused.total() + found.bounded == len(list(planner.placements(SMALL, 8)))


# ---- against what was published --------------------------------------------------------------------------------------


def test_the_efficiency_is_that_of_megatrons_table():
    assert claims.efficiency() == pytest.approx(EFFICIENCY, abs=1e-3)


def test_gpt3_on_1024_gpus_runs_at_the_published_140_teraflops():
    """Narayanan et al. 2021, section 5.4: 34 days at 140 TFLOP/s and GPU."""
    assert scale.step(PUBLISHED, EFFICIENCY).rate == pytest.approx(140e12, rel=0.03)


def test_the_published_placement_is_within_5_percent_of_the_best_by_its_means():
    """One chunk a rank, all layers recomputed, no ZeRO: what the script of 2021 sets."""
    best = planner.search(GPT3, 1024, EFFICIENCY, keep=1, kinds=("1F1B",), recompute=("full",), zero=(0,)).steps[0]
    assert best.seconds <= scale.step(PUBLISHED, EFFICIENCY).seconds <= 1.05 * best.seconds


def test_recomputing_attention_alone_saves_the_published_29_percent():
    """Korthikanti et al. 2022, abstract: 530 billion on 2 240 A100, 54.2 % of the peak instead of 42.1 %."""
    job = Job(*planner.GPTS["gpt-530b"], 2240, t=8, p=35, d=8, v=3)
    whole, some = (scale.step(replace(job, recompute=r), EFFICIENCY) for r in ("full", "attention"))
    assert whole.seconds / some.seconds == pytest.approx(54.2 / 42.1, rel=0.03)


def test_the_share_of_the_peak_counts_nothing_twice():
    """Three quarters of the paper's count for layers, of which the head's logits are three of three."""
    step = scale.step(PUBLISHED, EFFICIENCY)
    layers, head = 24 * 96 * 12_288**2 * (1 + 2048 / (6 * 12_288)), 2 * 51_200 * 12_288
    assert planner.model_share(step) == pytest.approx(3 * 1536 * 2048 * (layers + head) / step.seconds / 1024 / 312e12)


# ---- the pieces ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute, sums", [("none", 2), ("attention", 2), ("full", 4)])
def test_recomputation_repeats_the_sums_of_the_forward_pass_only_where_it_repeats_layers(recompute, sums):
    talk = pieces.layer_seconds(scale.shape(replace(PUBLISHED, recompute=recompute)), EFFICIENCY).talk
    assert talk["B"] / talk["F"] == pytest.approx(sums / 2)


def test_w_is_the_products_for_weights_that_the_backward_pass_runs():
    job = scale.shape(replace(SMALL, t=4))
    device = replace(hardware.A100, compute_efficiency=EFFICIENCY)
    run = Cluster(pieces.nodes_of(4, 8), device).run(pieces.pieces, job)
    named = sum(e.end - e.start for e in run.trace if e.rank == 0 and e.kind == "compute" and e.name == "linear_grad_w")
    cost = pieces.layer_seconds(job, EFFICIENCY)
    assert cost.layer["W"] + cost.head["W"] == pytest.approx(named)


@pytest.mark.parametrize("ranks, per_node", [(8, 8), (16, 1), (16, 4), (24, 2)])
@pytest.mark.parametrize("numbers", [10**6, 3 * 10**8 + 7])
def test_an_all_reduce_is_a_latency_and_a_rate_and_never_less_than_its_bytes(ranks, per_node, numbers):
    from toolkit.model_parallel import _layers
    from toolkit.runtime import like

    cluster = Cluster(pieces.nodes_of(ranks, per_node), hardware.A100)
    run = cluster.run(lambda comm: _layers.all_reduce(comm, like((numbers,), "float16")) is None)
    assert pieces.all_reduce_seconds(ranks, per_node, numbers) == pytest.approx(run.makespan, rel=1e-3)
    assert pieces.wire_seconds(ranks, per_node, numbers) <= run.makespan * (1 + 1e-9)


def test_both_ends_of_a_v_are_on_one_rank_and_sum_nothing():
    around, line = (scale.step(replace(PUBLISHED, kind=kind), EFFICIENCY).gradients for kind in ("V-ZB", "ZB-H1"))
    assert line - around == pytest.approx(pieces.all_reduce_seconds(2, 1, 51_200 * 12_288 // 8))


def test_zero_2_scatters_every_microbatch_and_overlap_hides_it():
    job = replace(PUBLISHED, p=1, d=128, b=4)
    ways = {"zero": 1}, {"zero": 2}, {"zero": 2, "overlap": True}
    once, often, hidden = (scale.step(replace(job, **changes), EFFICIENCY) for changes in ways)
    each = pieces.all_reduce_seconds(128, 1, 96 * 12 * 12_288**2 // 8) / 2
    assert often.pipeline - once.pipeline == pytest.approx(job.microbatches * each, rel=1e-3)
    assert hidden.pipeline == pytest.approx(once.pipeline, rel=0.02)


# ---- why -------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_parts_add_up_and_none_is_negative(data):
    step = scale.step(data.draw(st.sampled_from(all_of(16))), EFFICIENCY)
    found = parts(step, EFFICIENCY)
    assert sum(found.values()) == pytest.approx(step.seconds)
    assert min(found.values()) >= -1e-9 * step.seconds


@pytest.mark.parametrize("kind", ["1F1B", "interleaved", "ZB-H1", "V-Half"])
@pytest.mark.parametrize("recompute", ["full", "attention"])
def test_the_pipeline_takes_on_the_machine_what_was_predicted(kind, recompute):
    job = replace(PUBLISHED, kind=kind, v=2 if kind == "interleaved" else 1, batch=128 * 3, recompute=recompute)
    assert replayed(job, EFFICIENCY) == pytest.approx(scale.step(job, EFFICIENCY).pipeline, rel=0.01)


def test_the_reason_names_what_is_saved_first():
    slow = scale.step(PUBLISHED, EFFICIENCY)
    fast = scale.step(replace(PUBLISHED, recompute="attention"), EFFICIENCY)
    assert why(fast, slow, EFFICIENCY).startswith(
        f"{fast.seconds:.2f} s instead of {slow.seconds:.2f} s: "
        f"{parts(slow, EFFICIENCY)['run again'] - parts(fast, EFFICIENCY)['run again']:.2f} s less run again, "
    )


def test_equals_differ_by_nothing():
    step = scale.step(PUBLISHED, EFFICIENCY)
    assert why(step, step, EFFICIENCY).endswith("no part differs by much")
