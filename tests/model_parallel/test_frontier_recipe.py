"""Frontier's recipe: memory to the byte, the pipeline's law, runs beside formulas, a search that learns of failures."""

from dataclasses import replace
from math import isnan, nan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from toolkit.model_parallel import _layers as layers
from toolkit.model_parallel import _recipe_costs as costs
from toolkit.model_parallel import _recipe_forest as forest
from toolkit.model_parallel import _recipe_memory as memory
from toolkit.model_parallel import _recipe_search as hunt
from toolkit.model_parallel import frontier_recipe as recipe
from toolkit.model_parallel._mesh import Grid
from toolkit.model_parallel._model import cut_block
from toolkit.model_parallel._schedule import bubble, one_f_one_b
from toolkit.runtime import Cluster, hardware, like
from toolkit.runtime.errors import ShapeError
from toolkit.sequence_parallel._block import block_weights, one_device

MODELS, RECIPES, Config = recipe.MODELS, recipe.RECIPES, recipe.Config
LARGE = MODELS["175b"]
HEADLESS = replace(LARGE, vocabulary=0)  # equal stages


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "terabytes"), [("22b", 0.308), ("175b", 2.45), ("1t", 14.0)])
def test_the_papers_totals_are_14_bytes_for_each_parameter_of_the_name(name, terabytes):
    assert recipe.BYTES_A_PARAMETER * MODELS[name].nominal == pytest.approx(terabytes * 1e12, rel=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_the_shapes_have_as_many_parameters_as_the_name_says(name):
    model = MODELS[name]
    matrices = model.layers * (4 * model.h**2 + 2 * model.h * 4 * model.h)
    vectors = model.layers * (3 * model.h + model.h + 4 * model.h + model.h + 4 * model.h) + 2 * model.h
    assert model.parameters == matrices + vectors + (model.vocabulary + model.s) * model.h
    assert model.parameters == pytest.approx(model.nominal, rel=0.02)


@pytest.mark.parametrize(("t", "p"), [(1, 1), (8, 1), (1, 8), (4, 16), (8, 12)])
def test_states_of_all_gcds_are_14_p_and_what_is_there_more_than_once(t, p):
    config = Config(t=t, p=p, b=1, m=1, nodes=t * p // 8 or 1)
    total = sum(t * memory.memory_of_stage(config, LARGE, stage).states for stage in range(p))
    norms_and_biases = 96 * (4 * 12_288 + 2 * 12_288) + 2048 * 12_288 + 2 * 12_288
    tied = 51_200 * 12_288 * (p > 1)
    assert total == pytest.approx(14 * (LARGE.parameters + (t - 1) * norms_and_biases + tied), rel=1e-12)
    counted = sum(memory.parameters_of_stage(config, LARGE, stage)[1] for stage in range(p))
    assert counted == norms_and_biases


def test_zero_1_divides_the_optimisers_four_bytes_by_the_replicas_and_nothing_else():
    config = Config(t=4, p=8, b=1, m=8, nodes=16)
    plain, sharded = (recipe.memory_per_gcd(replace(config, zero=z), LARGE) for z in (0, 1))
    assert sharded.optimiser == plain.optimiser / 4
    assert replace(sharded, optimiser=plain.optimiser) == plain


@given(t=st.sampled_from([1, 2, 4]), p=st.sampled_from([1, 2, 4, 8]), zero=st.booleans(), wider=st.booleans())
def test_more_tensor_or_pipeline_ranks_never_add_states(t, p, zero, wider):
    """With the vocabulary's tied copy left out; d is kept, so ZeRO-1 divides by the same number."""
    before = Config(t=t, p=p, b=1, m=8, zero=int(zero), nodes=t * p)
    after = replace(before, t=2 * t, nodes=2 * t * p) if wider else replace(before, p=2 * p, nodes=2 * t * p)
    assert after.d == before.d
    assert recipe.memory_per_gcd(after, HEADLESS).states <= recipe.memory_per_gcd(before, HEADLESS).states


def test_a_larger_microbatch_can_fail_where_a_smaller_one_fits():
    config = Config(t=8, p=8, b=4, m=10, nodes=16)
    found = recipe.one_knob(LARGE, config, "b", (4, 16))
    assert found[0].failure is None
    assert "out of memory" in found[1].failure and "activations" in found[1].failure


def test_a_configuration_that_fails_has_no_rate():
    assert isnan(recipe.evaluate(Config(t=1, p=1, b=1, m=1), LARGE).rate)


def test_a_reserve_of_8_gb_refuses_what_2_gb_allow():
    config = Config(t=8, p=8, b=5, m=10, zero=1, nodes=16)
    assert recipe.evaluate(config, LARGE).failure is None
    assert recipe.evaluate(config, LARGE, reserve=8e9).failure


def test_scores_in_memory_are_5_a_s_over_ht_hidden_states():
    config = Config(t=8, p=8, b=2, m=8, nodes=8)
    extra = (memory.memory_of_stage(config, LARGE, 1, flash).working for flash in (False, True))
    assert np.subtract(*extra) == pytest.approx(5 * 96 * 2048 * 2048 * 2 / 8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"t": 3}, "does not divide"),
        ({"t": 64, "p": 1}, "heads by t"),
        ({"p": 10, "nodes": 5}, "layers by p"),
        ({"b": 0}, "at least 1"),
    ],
)
def test_what_does_not_divide_is_refused_by_name(change, says):
    with pytest.raises(ShapeError, match=says):
        recipe.evaluate(replace(Config(t=4, p=8, b=1, m=8, nodes=8), **change), LARGE)


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ShapeError, match="h by heads"):
        recipe.evaluate(Config(t=1, p=8, b=1, m=8), replace(LARGE, heads=100))


# ---- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize(("p", "m"), [(8, 1), (8, 8), (16, 10), (12, 200)])
def test_without_messages_efficiency_is_the_bubbles_law_times_three_quarters(p, m, share):
    config = Config(t=8, p=p, b=1, m=m, nodes=p)
    step = recipe.evaluate(config, HEADLESS, costs.Machine(share, ideal=True))
    law = share * m / (m + p - 1)
    assert step.efficiency == pytest.approx(law, rel=1e-12)
    assert step.model_rate / costs.PEAK == pytest.approx(0.75 * law, rel=1e-12)


def test_throughput_rises_strictly_with_the_microbatches():
    found = recipe.one_knob(HEADLESS, Config(t=8, p=8, b=1, m=1, nodes=8), "m", range(1, 40))
    assert (np.diff([step.rate for step in found]) > 0).all()


def test_curve_of_products_is_mnk_over_mnk_plus_c():
    machine, c = costs.Machine(0.6, 3e-4), 3e-4 * 0.6 * costs.PEAK / 2
    m, n, k = 2048, 6144, 1536
    busy = costs.product_seconds(machine, (m, n, k)) - machine.device.launch_overhead
    assert 2 * m * n * k / busy / costs.PEAK == pytest.approx(0.6 * m * n * k / (m * n * k + c), rel=1e-12)


def test_only_the_22b_point_is_fitted():
    assert recipe.evaluate(RECIPES["22b"], MODELS["22b"]).efficiency == pytest.approx(0.3838, abs=1e-5)


@pytest.mark.parametrize(
    "config",
    [Config(4, 16, 1, 32, 1, 8), Config(8, 8, 2, 10, 1, 16), Config(8, 12, 1, 20, 0, 12), Config(8, 16, 4, 5, 0, 16)],
)
def test_the_formula_agrees_with_the_pipeline_replayed_on_the_runtime(config):
    step = recipe.evaluate(config, LARGE)
    pipeline = step.compute + step.tensor + step.messages + step.bubble
    assert recipe.simulated(config, LARGE) == pytest.approx(pipeline, rel=0.03)


@pytest.mark.parametrize(("t", "b"), [(1, 1), (2, 1), (4, 2), (8, 1)])
def test_a_layer_takes_what_the_code_that_trains_takes_on_the_described_node(t, b):
    """The layers of `_layers`, flash attention, recomputed, shape-only on GCDs with the same curve."""
    model, machine = MODELS["22b"], recipe.fitted()

    def layer(comm):
        dim = model.h // model.heads
        whole = block_weights(None, model.h, model.heads, model.heads, dim, 4 * model.h, "float16")
        setting = layers.Setting(comm, comm.group([comm.rank]), one_device(True), dim, np.arange(model.s))
        weights = cut_block(whole, comm.rank, comm.size, dim)
        x = like((b * model.s, model.h), "float16")
        _, saved = layers.recomputed(setting, weights, x)
        middle = comm.now
        layers.recomputed_backward(setting, weights, saved, x)
        return middle, comm.now - middle

    nodes = costs.nodes_in_rings(1)
    here = replace(nodes, ranks=nodes.ranks[:t], groups=(tuple(range(t)),))
    forward, backward = Cluster(here, machine.device).run(layer).outputs[0]
    ours = costs.layer_seconds(machine, model, t, b)
    assert sum(ours["F"]) == pytest.approx(forward, rel=0.2)
    assert sum(ours["B"]) == pytest.approx(backward, rel=0.2)


@pytest.mark.parametrize(("t", "d"), [(8, 4), (4, 4), (8, 2)])
def test_sums_of_replicas_take_what_they_take_when_all_gcds_sum_at_once(t, d):
    config, numbers = Config(t=t, p=1, b=1, m=1, nodes=t * d // 8), 2**24

    def program(comm):
        layers.all_reduce(Grid(comm, tp=t, dp=d, order=("tp", "dp", "cp", "ep", "pp")).dp, like((numbers,), "float16"))

    ran = Cluster(costs.nodes_in_rings(config.nodes), hardware.IDEAL).run(program).makespan
    assert costs.data_sum(recipe.fitted(), config, 2 * numbers) == pytest.approx(ran, rel=0.3)


@pytest.mark.parametrize(("t", "link"), [(2, 200e9), (4, 50e9), (8, 50e9)])
def test_a_tensor_sum_runs_at_the_narrowest_link_of_its_ring(t, link):
    nbytes = 2 * 2**26
    assert costs.tensor_sum(recipe.fitted(), t, 2**26) == pytest.approx(2 * (t - 1) / t * nbytes / link, rel=0.02)


def test_tensor_ranks_on_two_nodes_are_slower_than_on_one():
    assert costs.tensor_sum(recipe.fitted(), 16, 2**26) > costs.tensor_sum(recipe.fitted(), 8, 2**26)


@pytest.mark.parametrize(("p", "m"), [(16, 640), (64, 160)])
def test_the_bubble_of_a_recipe_is_p_minus_1_over_m(p, m):
    assert bubble(one_f_one_b(p, m)) == pytest.approx((p - 1) / m, rel=1e-12)


@pytest.mark.parametrize(("name", "replicas", "batch"), [("175b", (1, 2, 4, 8, 16), 8000), ("1t", (1, 2, 3, 6), 8016)])
def test_strong_scaling_stays_under_the_bound_of_the_bubble(name, replicas, batch):
    equal_stages = replace(MODELS[name], vocabulary=0)
    found = recipe.relative(recipe.strong_scaling(equal_stages, RECIPES[name], replicas, batch))
    bounds = [recipe.bubble_bound(RECIPES[name].p, batch, k) for k in replicas]
    assert (np.array(found[1:]) < bounds[1:]).all()


def test_the_bound_of_the_bubble_is_the_law_of_two_pipelines():
    def law(m):
        return m / (m + 31)

    assert recipe.bubble_bound(32, 2000, 8) == pytest.approx(law(250) / law(2000), rel=1e-12)


def test_weak_scaling_keeps_the_batch_of_a_replica():
    steps = recipe.weak_scaling(LARGE, RECIPES["175b"], (1, 16))
    assert [step.config.batch for step in steps] == [640, 16 * 640]


def test_a_batch_that_replicas_cannot_share_is_refused():
    with pytest.raises(ShapeError, match="cannot share"):
        recipe.strong_scaling(LARGE, RECIPES["175b"], (3,), 8000)


def test_hardware_operations_are_8_and_model_operations_6_for_a_parameter_and_token():
    model = replace(LARGE, vocabulary=0)
    matrices, attention = 96 * 12 * model.h**2, 96 * 2 * model.s * model.h  # 4 s h multiply-adds a token: half of it
    assert model.flops(1) == pytest.approx(8 * model.s * (matrices + attention), rel=1e-12)
    assert model.flops(1, recomputed=False) == pytest.approx(6 * model.s * (matrices + attention), rel=1e-12)


# ---- forest, search, sensitivity -------------------------------------------------------------------------------------


def test_a_forest_learns_what_a_rule_says_about_unseen_points():
    random = np.random.default_rng(0)
    x = random.integers(0, 8, size=(600, 4))
    y = np.where(x[:, 0] > 3, 5.0, 0.0) + x[:, 1] * (x[:, 2] > 2)
    found = forest.fit(x[:500], y[:500], random)
    error = ((found.mean(x[500:]) - y[500:]) ** 2).mean()
    assert error < 0.1 * y.var()


def test_a_tree_splits_where_most_variance_goes():
    random, x, y = np.random.default_rng(1), np.repeat(np.arange(6), 50)[:, None], np.repeat([0.0, 1.0], 150)
    tree = forest.fit(x, y, random, trees=1)
    assert (tree.knob[0, 0], tree.level[0, 0]) == (0, 2)


def test_a_forest_refuses_values_that_do_not_match():
    with pytest.raises(ShapeError, match="give"):
        forest.fit(np.zeros((3, 2)), np.zeros(2), np.random.default_rng(0))


SPACE = hunt.Space(**recipe.SPACE)
TRIED = {}
FRESH = range(1000, 1020)  # the search was settled on seeds 0 to 19


def objective(**knobs):
    """The 175B objective, each point priced once."""
    key = tuple(knobs.values())
    if key not in TRIED:
        TRIED[key] = recipe.objective(LARGE)(**knobs)
    return TRIED[key]


@pytest.fixture(scope="module")
def truth():
    return hunt.everything(objective, SPACE)


@pytest.fixture(scope="module")
def twenty(truth):
    return [hunt.search(objective, SPACE, 100, seed=seed) for seed in FRESH]


def test_the_space_has_3264_points():
    assert len(SPACE) == 3264


def test_no_point_is_tried_twice(twenty):
    assert all(len(set(trials.points)) == 100 for trials in twenty)


def test_the_best_so_far_never_falls(twenty):
    assert all((np.diff(t.best_so_far[~np.isnan(t.best_so_far)]) >= 0).all() for t in twenty)


def test_after_60_trials_the_search_regrets_less_than_chance(twenty, truth):
    most = np.nanmax(truth.values)
    chance = [hunt.at_random(objective, SPACE, 60, seed).regret(most) for seed in FRESH]
    assert np.median([trials.regret(most, 60) for trials in twenty]) < np.median(chance)


def test_failures_repel(twenty):
    early, late = (np.mean([t.failed(part) for t in twenty]) for part in (slice(30), slice(-30, None)))
    assert late < early


def test_dropped_failures_repel_less(twenty):
    dropped = [hunt.search(objective, SPACE, 100, seed=seed, impute=hunt.dropped) for seed in FRESH[:5]]
    assert np.mean([t.failed(slice(-30, None)) for t in dropped]) > np.mean(
        [t.failed(slice(-30, None)) for t in twenty[:5]]
    )


def test_failures_count_as_the_worst_value_seen():
    assert_allclose(hunt.worst(np.array([nan, 3.0, nan, 2.0])), [2.0, 3.0, 2.0, 2.0])


def test_before_two_successes_a_failure_counts_as_nothing_attained():
    assert_allclose(hunt.worst(np.array([nan, 3.0, nan])), [0.0, 3.0, 0.0])


def test_a_search_of_a_small_space_ends_with_all_of_it():
    small = hunt.Space(a=(1, 2, 3), b=(0, 1))
    found = hunt.search(lambda a, b: (a * b, 1.0), small, 100)
    assert sorted(found.points) == list(range(6))
    assert found.best == {"a": 3, "b": 1}


def test_a_search_in_which_all_fails_ends_without_a_best():
    found = hunt.search(lambda a: (nan, 1.0), hunt.Space(a=tuple(range(20))), 15)
    assert found.regret(1.0) == 1.0


def test_trials_are_known_in_the_order_in_which_they_end():
    space = hunt.Space(a=tuple(range(8)))
    found = hunt.search(lambda a: (1.0, float(1 + a)), space, 4, q=4, first=4, seed=3)
    assert list(found.points) == sorted(found.points)


def test_one_knob_at_a_time_ends_where_no_single_knob_helps():
    space = hunt.Space(a=tuple(range(5)), b=tuple(range(5)))
    found = hunt.one_at_a_time(
        lambda a, b: (nan if a == b == 0 else -((a - 3) ** 2) - (b - 1) ** 2, 1.0), space, {"a": 0, "b": 4}
    )
    assert found.best == {"a": 3, "b": 1}


def test_the_rule_of_thumb_takes_a_node_of_tensor_ranks_and_the_fewest_stages_that_fit():
    found = recipe.rule_of_thumb(LARGE, 16, b=4, m=10)
    assert (found.config.t, found.config.p, found.failure) == (8, 8, None)
    assert recipe.evaluate(replace(found.config, p=4), LARGE).failure


def test_shapley_values_sum_to_what_the_prediction_differs_from_the_mean(twenty):
    levels, predict = SPACE.levels[twenty[0].points], twenty[0].forest().mean
    values, base = recipe.shapley(predict, levels[:7], levels)
    assert base == pytest.approx(predict(levels).mean(), rel=1e-12)
    scale = np.abs(values).max() + abs(base)
    assert_allclose(values.sum(axis=1), predict(levels[:7]) - base, rtol=0, atol=1e-9 * scale)


def test_a_knob_that_nobody_looks_at_gets_nothing():
    background = np.random.default_rng(0).integers(0, 5, size=(40, 3))
    values, _ = recipe.shapley(lambda x: x[:, 0] * x[:, 2], [4, 4, 1], background)
    assert values[1] == 0


def test_shapley_values_of_a_sum_are_each_knobs_own_difference():
    background = np.random.default_rng(0).normal(size=(40, 4))
    slopes, x = np.array([1.0, -2.0, 0.5, 3.0]), np.array([1.0, 2.0, 3.0, 4.0])
    values, _ = recipe.shapley(lambda rows: rows @ slopes, x, background)
    assert_allclose(values, slopes * (x - background.mean(axis=0)), rtol=0, atol=1e-12)


def test_two_knobs_that_multiply_share_alike():
    values, base = recipe.shapley(lambda x: x[:, 0] * x[:, 1], [1, 1], [[0, 0]])
    assert (values.tolist(), base) == ([0.5, 0.5], 0.0)
