"""Ladder residual: ranks together compute what the definition says, and take as long as the recurrence says."""

from functools import cache, partial

import autograd
import autograd.numpy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from toolkit.model_parallel import _ladder_modules as pieces
from toolkit.model_parallel import _ladder_picture as picture
from toolkit.model_parallel import _ladder_rivals as rivals
from toolkit.model_parallel import _ladder_scale as scale
from toolkit.model_parallel import _ladder_trained as small
from toolkit.model_parallel import ladder_residual as ladder
from toolkit.runtime import Cluster, hardware, like, topology
from toolkit.runtime.errors import ShapeError
from toolkit.sequence_parallel._block import model_weights

D, HEADS, HEAD_DIM, HIDDEN, VOCABULARY, BATCH, TOKENS = 32, 8, 4, 64, 12, 2, 6
RULES = {
    "standard": {"arch": "standard"},
    "ladder": {"arch": "ladder"},
    "hybrid": {"arch": "ladder", "ladder_layers": (1, 2)},
    "parallel": {"arch": "parallel"},
}
any_rule = pytest.mark.parametrize("rule", RULES)
any_ranks = pytest.mark.parametrize("ranks", [1, 2, 4, 8])


@cache
def model(layers=3, kv_heads=HEADS):
    random = np.random.default_rng(layers)
    params = model_weights(random, VOCABULARY, layers, D, HEADS, kv_heads, HEAD_DIM, HIDDEN)
    for weights in params["layers"]:
        weights["norm_1"] += 0.1 * random.standard_normal(D)
        weights["norm_2"] += 0.1 * random.standard_normal(D)
    return params, random.integers(0, VOCABULARY, (BATCH, TOKENS))


def reference(params, tokens, rule):
    """The definition: streams as sums of outputs, all heads on one device, written for autograd in numpy."""
    options = {"arch": rule["arch"], "ladder_layers": rule.get("ladder_layers")}
    return small.logits(params, tokens, small.reads(depth=len(params["layers"]), **options), HEAD_DIM)


def machine(ranks, device=hardware.IDEAL, link=hardware.NVLINK4):
    return Cluster(topology.switch(ranks, link), device)


def both_ways(comm, params, tokens, grad, options):
    shards = ladder.cut(params, comm.rank, comm.size, HEAD_DIM)
    logits, saved = ladder.forward(comm, shards, tokens, head_dim=HEAD_DIM, **options)
    grads = None if grad is None else ladder.backward(comm, shards, saved, grad)
    return logits, grads


def outputs(ranks, options, layers=3, grad=None):
    params, tokens = model(layers)
    return machine(ranks).run(both_ways, params, tokens, grad, options)


# ---- what is computed ------------------------------------------------------------------------------------------------


@any_rule
@any_ranks
def test_ranks_together_compute_the_definition(rule, ranks):
    params, tokens = model()
    wanted = reference(params, tokens, RULES[rule]).reshape(-1, VOCABULARY)
    for logits, _ in outputs(ranks, RULES[rule]).outputs:
        assert_allclose(logits, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rule", ["ladder", "parallel"])
@pytest.mark.parametrize("layers", [1, 3])
def test_another_rule_is_another_function(rule, layers):
    ours, standard = (outputs(2, RULES[name], layers).outputs[0][0] for name in (rule, "standard"))
    assert abs(ours - standard).max() > 1e-2


def test_the_ladder_is_not_parallel_attention_and_mlp():
    assert abs(outputs(2, RULES["ladder"]).outputs[0][0] - outputs(2, RULES["parallel"]).outputs[0][0]).max() > 1e-2


@pytest.mark.parametrize("only", ["o", "down"])
def test_with_one_module_that_is_not_zero_all_rules_agree(only):
    params, tokens = model()
    silent = [{name: w * (name not in ("o", "down")) for name, w in weights.items()} for weights in params["layers"]]
    silent[1] = silent[1] | {only: params["layers"][1][only]}
    runs = [machine(2).run(both_ways, params | {"layers": silent}, tokens, None, RULES[name]) for name in RULES]
    for run in runs[1:]:
        assert_allclose(run.outputs[0][0], runs[0].outputs[0][0], rtol=0, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8), st.integers(0, 2))
def test_scalar_modules_follow_the_recursion_exactly(slopes, stale):
    """h_k(x) = a_k x: x_k = x_{k-1} + a_k x_{k-1-stale}, in whole numbers; two ranks have half of each slope."""
    streams = [1.0]
    for k, slope in enumerate(slopes):
        streams.append(streams[k] + slope * streams[max(0, k - stale)])

    def program(comm):
        def run(slope, x):
            return x * slope / comm.size, None

        return ladder.climb(comm, slopes, [stale] * len(slopes), run, np.ones(2))[0]

    assert machine(2).run(program).outputs[0].tolist() == [streams[-1]] * 2


def test_each_module_reads_the_stream_of_the_papers_table():
    def program(comm):
        read = []

        def run(name, x):
            read.append({i for i in range(6) if x[i] != 0})
            return np.eye(6)[name], None

        stale = ladder.staleness("ladder", 3)
        final, _ = ladder.climb(comm, range(6), stale, run, np.zeros(6))
        return read, final

    read, final = machine(1).run(program).outputs[0]
    assert read == [set(), set(), {0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}]
    assert final.tolist() == [1] * 6


def test_a_hybrids_first_ladder_layer_misses_the_mlp_before_it():
    assert small.reads("ladder", 4, (2, 3)) == [0, 1, 2, 3, 3, 4, 5, 6]


def test_grouped_queries_are_cut_by_key_heads():
    params, tokens = model(2, kv_heads=4)
    params = params | {"layers": [dict(w) for w in params["layers"]]}
    whole = params | {"layers": [w | {n: _repeat(w[n]) for n in "kv"} for w in params["layers"]]}
    wanted = reference(whole, tokens, RULES["ladder"]).reshape(-1, VOCABULARY)
    run = machine(4).run(both_ways, params, tokens, None, RULES["ladder"])
    assert_allclose(run.outputs[0][0], wanted, rtol=0, atol=1e-10)


def _repeat(w):
    """Each key head twice, side by side."""
    return np.repeat(w.reshape(D, -1, HEAD_DIM), 2, axis=1).reshape(D, -1)


def test_the_halves_of_an_interleaved_batch_give_the_standard_model():
    params, tokens = model()

    def program(comm):
        shards = ladder.cut(params, comm.rank, comm.size, HEAD_DIM)
        return ladder.forward_interleaved(comm, shards, tokens, head_dim=HEAD_DIM)

    wanted = reference(params, tokens, RULES["standard"]).reshape(-1, VOCABULARY)
    assert_allclose(machine(2).run(program).outputs[1], wanted, rtol=0, atol=1e-10)


# ---- gradients -------------------------------------------------------------------------------------------------------


@any_rule
@any_ranks
def test_gradients_are_those_of_one_device(rule, ranks):
    params, tokens = model()
    grad = np.random.default_rng(1).standard_normal((BATCH * TOKENS, VOCABULARY))
    wanted = autograd.grad(
        lambda p: autograd.numpy.sum(reference(p, tokens, RULES[rule]) * grad.reshape(BATCH, TOKENS, -1))
    )(params)
    run = outputs(ranks, RULES[rule], grad=grad)
    for rank, (_, grads) in enumerate(run.outputs):
        _assert_same(grads, ladder.cut(wanted, rank, ranks, HEAD_DIM))


def _assert_same(ours, wanted):
    for name in ("embedding", "norm", "head"):
        assert_allclose(ours[name], wanted[name], rtol=0, atol=1e-10)
    for mine, theirs in zip(ours["layers"], wanted["layers"], strict=True):
        assert sorted(mine) == sorted(theirs)
        for name in theirs:
            assert_allclose(mine[name], theirs[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("part", "name"), [("layers", "q"), ("layers", "norm_1"), ("layers", "up"), (None, "embedding")]
)
@pytest.mark.parametrize(
    "options", [RULES["ladder"], *({"arch": "desync", "desync_pattern": name} for name in ("2x", "4x"))], ids=str
)
def test_gradients_are_those_of_finite_differences(options, part, name):
    params, tokens = model(2)
    random = np.random.default_rng(2)
    grad = random.standard_normal((BATCH * TOKENS, VOCABULARY))
    direction = random.standard_normal((params["layers"][0] if part else params)[name].shape)

    def value(step):
        moved = params | {"layers": [dict(w) for w in params["layers"]]}
        place = moved["layers"][0] if part else moved
        place[name] = place[name] + step * direction
        return float((machine(2).run(both_ways, moved, tokens, None, options).outputs[0][0] * grad).sum())

    run = machine(2).run(both_ways, params, tokens, grad, options)
    ours = 0.0
    for rank, (_, grads) in enumerate(run.outputs):
        whole = params | {"layers": [dict(w) for w in params["layers"]]}
        (whole["layers"][0] if part else whole)[name] = direction
        mine = ladder.cut(whole, rank, 2, HEAD_DIM)
        shard, share = ((tree["layers"][0] if part else tree)[name] for tree in (mine, grads))
        ours += (shard * share).sum() / (2 if name in ("norm_1", "embedding") else 1)  # these are whole on both ranks
    assert ours == pytest.approx((value(1e-5) - value(-1e-5)) / 2e-5, rel=1e-6)


def test_a_gradient_that_forgets_the_second_reader_of_the_embedding_is_caught():
    """g_0 = g_1 + J_1 g_1 + J_2 g_2; leaving J_2 out changes it."""
    slopes, g = [2.0, 3.0], np.ones(1)

    def program(comm):
        saved = ladder.climb(comm, slopes, [1, 1], lambda a, x: (a * x, None), np.ones(1))[1]
        return ladder.climb_backward(comm, slopes, saved, lambda a, kept, g: a * g, g)

    assert machine(1).run(program).outputs[0] == 1 + 2 + 3


# ---- desync ----------------------------------------------------------------------------------------------------------


def test_desync_that_always_reduces_is_the_standard_model():
    params, tokens = model()
    run = outputs(4, {"arch": "desync", "desync_pattern": "all"})
    wanted = reference(params, tokens, RULES["standard"]).reshape(-1, VOCABULARY)
    assert_allclose(run.outputs[3][0], wanted, rtol=0, atol=1e-10)


def test_desync_that_always_reduces_has_the_standard_models_gradients():
    grad = np.random.default_rng(3).standard_normal((BATCH * TOKENS, VOCABULARY))
    desync = outputs(4, {"arch": "desync", "desync_pattern": "all"}, grad=grad)
    for (_, ours), (_, wanted) in zip(desync.outputs, outputs(4, RULES["standard"], grad=grad).outputs, strict=True):
        _assert_same(ours, wanted)


@pytest.mark.parametrize("pattern", ["2x", "4x"])
def test_desync_is_another_function_that_all_ranks_agree_on(pattern):
    run = outputs(4, {"arch": "desync", "desync_pattern": pattern})
    assert_allclose(run.outputs[0][0], run.outputs[3][0], rtol=0, atol=0)
    assert abs(run.outputs[0][0] - outputs(4, RULES["standard"]).outputs[0][0]).max() > 1e-2


def test_silent_modules_that_reduce_average_the_streams():
    def program(comm):
        silent = lambda module, x: (np.zeros(3), None)  # noqa: E731
        return ladder.drift(comm, [0], {0}, silent, np.arange(3.0) * (1 + comm.rank))[0]

    assert_allclose(machine(4).run(program).outputs[2], np.arange(3.0) * 2.5, rtol=0, atol=1e-15)


def test_a_desync_model_that_never_reduces_has_no_gradient():
    with pytest.raises(ValueError, match="logits differ"):
        outputs(2, {"arch": "desync", "desync_pattern": "none"}, grad=np.zeros((BATCH * TOKENS, VOCABULARY)))


# ---- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [*RULES, "desync"])
def test_prefill_and_decoding_give_what_the_whole_text_gives(rule):
    options = RULES.get(rule, {"arch": "desync", "desync_pattern": "2x"})
    params, tokens = model()

    def program(comm):
        shards = ladder.cut(params, comm.rank, comm.size, HEAD_DIM)
        cache, parts = [None] * 3, []
        for a, b in ((0, 3), (3, 4), (4, 6)):
            logits, _ = ladder.forward(comm, shards, tokens[:, a:b], head_dim=HEAD_DIM, cache=cache, **options)
            parts.append(logits.reshape(BATCH, b - a, -1))
        return np.concatenate(parts, axis=1).reshape(-1, VOCABULARY)

    assert_allclose(machine(2).run(program).outputs[0], outputs(2, options).outputs[0][0], rtol=0, atol=1e-10)


def test_generation_takes_the_likeliest_token_each_time():
    params, tokens = model()

    def program(comm):
        shards = ladder.cut(params, comm.rank, comm.size, HEAD_DIM)
        return ladder.generate(comm, shards, tokens, 4, "ladder", head_dim=HEAD_DIM)[0]

    text = tokens
    for _ in range(4):
        text = np.concatenate([text, reference(params, text, RULES["ladder"])[:, -1].argmax(-1)[:, None]], axis=1)
    assert machine(2).run(program).outputs[0].tolist() == text[:, TOKENS:].tolist()


@pytest.mark.parametrize("rule", ["standard", "ladder"])
def test_generation_tells_the_virtual_time_it_took(rule):
    params, tokens = model()

    def program(comm):
        shards = ladder.cut(params, comm.rank, comm.size, HEAD_DIM)
        return ladder.generate(comm, shards, tokens, 3, rule, head_dim=HEAD_DIM)[1]

    run = machine(2, hardware.H100).run(program)
    assert max(run.outputs) == run.makespan > 0


def test_generation_runs_without_data():
    params = model_weights(None, VOCABULARY, 2, D, HEADS, HEADS, HEAD_DIM, HIDDEN)

    def program(comm):
        shards = ladder.cut(params, comm.rank, comm.size, HEAD_DIM)
        return ladder.generate(comm, shards, like((2, 5), "int64"), 3, "ladder", head_dim=HEAD_DIM)[0]

    assert machine(2).run(program).outputs[0].shape == (2, 3)


# ---- what is sent ----------------------------------------------------------------------------------------------------


def sent_by_rank_0(options, layers=3, ranks=4, grad=None):
    run = outputs(ranks, options, layers, grad)
    return sum(e.bytes for e in run.trace if e.kind == "send" and e.rank == 0)


ONE_SUM = 2 * 3 * BATCH * TOKENS * D * 8 // 4  # 2 (p-1)/p of the stream's bytes, 4 ranks


@pytest.mark.parametrize(
    ("options", "sums"),
    [
        (RULES["standard"], 6),
        (RULES["ladder"], 6),
        (RULES["hybrid"], 6),
        (RULES["parallel"], 3),
        ({"arch": "desync", "desync_pattern": "all"}, 6),
        ({"arch": "desync", "desync_pattern": "2x"}, 3),
        ({"arch": "desync", "desync_pattern": "4x"}, 2),
        ({"arch": "desync", "desync_pattern": "none"}, 0),
    ],
    ids=str,
)
def test_all_reduces_are_as_many_as_the_rule_says(options, sums):
    assert sent_by_rank_0(options) == sums * ONE_SUM


@any_rule
def test_backward_sends_as_many_sums_and_one_of_the_gains(rule):
    grad = np.zeros((BATCH * TOKENS, VOCABULARY))
    forward, both = sent_by_rank_0(RULES[rule]), sent_by_rank_0(RULES[rule], grad=grad)
    assert both == 2 * forward + 2 * 3 * 6 * D * 8 // 4


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_the_sum_is_numpys_on_one_node_and_on_several(nodes):
    links = hardware.NVLINK4, hardware.IB_NDR
    cluster = Cluster(topology.two_level(nodes, 8 // nodes, *links), hardware.IDEAL)
    parts = np.random.default_rng(0).standard_normal((8, 5, 3))
    run = cluster.run(lambda comm: pieces.isum(comm, parts[comm.rank]).wait())
    for out in run.outputs:
        assert_allclose(out, parts.sum(0), rtol=0, atol=1e-13)


def test_sums_take_turns_in_the_order_they_were_started():
    def program(comm):
        first = pieces.isum(comm, like((1000,)))
        second = pieces.isum(comm, like((1000,)), after=first)
        first.wait()
        middle = comm.now
        second.wait()
        return middle, comm.now

    middle, end = machine(4).run(program).outputs[0]
    assert end == pytest.approx(2 * middle, rel=1e-12)


# ---- time ------------------------------------------------------------------------------------------------------------

FEW = {"layers": 4, "h": 64, "heads": 8, "kv_heads": 8, "head_dim": 8, "hidden": 512}


def simulated(rule, speed, interference=0.0, ranks=4):
    """(virtual seconds without the head, c, a) of a shape-only run in which products alone take time."""
    options = RULES.get(rule) or {"arch": "desync", "desync_pattern": rule}
    if rule == "hybrid":
        options = {"arch": "ladder", "ladder_layers": (1, 2)}
    device = hardware.Device("products", speed, np.inf, overlap_slowdown=interference)
    cluster = machine(ranks, device)
    params = model_weights(None, VOCABULARY, dtype="float64", **FEW)
    tokens = like((BATCH, TOKENS), "int64")

    def whole(comm):
        shards = ladder.cut(params, comm.rank, comm.size, 8)
        ladder.forward(comm, shards, tokens, head_dim=8, **options)

    def lone_sum(comm):
        pieces.fused_sum(comm, like((BATCH * TOKENS, 64)))

    run = cluster.run(whole)
    n = BATCH * TOKENS
    attention = 2 * n * 64 * 64 * 4 / ranks + 4 * (8 / ranks) * BATCH * (TOKENS * (TOKENS + 1) / 2) * 8
    c = np.tile([attention, 2 * 2 * n * 64 * 512 / ranks], 4) / speed
    a = np.full(8, cluster.run(lone_sum).makespan)
    return run.makespan - 2 * n * 64 * VOCABULARY / speed, c, a, options


@pytest.mark.parametrize("speed", [1e10, 1e11, 1e12])
@pytest.mark.parametrize("rule", [*RULES, "all", "2x", "4x", "none"])
def test_the_simulator_takes_as_long_as_the_recurrence(rule, speed):
    seconds, c, a, options = simulated(rule, speed)
    assert seconds == pytest.approx(ladder.timeline(c, a, **options)[0], rel=1e-9)


@pytest.mark.parametrize("speed", [1e10, 1e11, 1e12])
@pytest.mark.parametrize("rule", ["ladder", "hybrid"])
def test_lost_compute_takes_as_long_as_the_recurrence(rule, speed):
    seconds, c, a, options = simulated(rule, speed, interference=0.2)
    assert seconds == pytest.approx(ladder.timeline(c, a, interference=0.2, **options)[0], rel=1e-9)


times = st.lists(
    st.tuples(st.floats(0.1, 10), st.floats(0, 10), st.floats(0.1, 10), st.floats(0, 10)), min_size=1, max_size=6
)


@given(times)
@settings(max_examples=60, deadline=None)
def test_a_ladder_lies_between_no_communication_and_standard(layers):
    c, a = np.array(layers)[:, [0, 2]].ravel(), np.array(layers)[:, [1, 3]].ravel()
    fast, slow = ladder.timeline(c, a, "ladder")[0], ladder.timeline(c, a)[0]
    bound = ladder.timeline(c, a, "desync", desync_pattern="none")[0]
    assert slow == pytest.approx(c.sum() + a.sum())
    assert bound == pytest.approx(c.sum())
    assert bound <= fast * (1 + 1e-12)
    assert fast <= slow * (1 + 1e-12)
    assert slow - fast <= a[:-1].sum() * (1 + 1e-12) + 1e-12


@pytest.mark.parametrize(("c", "a", "finish"), [(3.0, 2.0, 8 * 3.0 + 2.0), (2.0, 3.0, 2.0 + 8 * 3.0), (2.0, 2.0, 18.0)])
def test_equal_modules_take_as_long_as_the_closed_formula(c, a, finish):
    assert ladder.timeline(np.full(8, c), np.full(8, a), "ladder")[0] == pytest.approx(finish)


@pytest.mark.parametrize("rule", ["standard", "ladder"])
@pytest.mark.parametrize("work", [0.3, 1.0, 3.0])
def test_backward_hides_as_much_as_forward(rule, work):
    """Gradients' all-reduces follow the same recurrence, from the last module to the first."""
    x, ratios = like((5000,)), np.array([0.5, 1.0, 2.0, 0.7, 0.2, 1.5]) * work
    a = machine(4).run(lambda comm: pieces.fused_sum(comm, x)).makespan

    def program(comm):
        def sleep(seconds, _, g):
            comm.sleep(seconds)
            return g

        times = (ratios * a).tolist()
        saved = ladder.climb(comm, times, ladder.staleness(rule, 3), lambda _, x: (x, None), x)[1]
        start = comm.now
        ladder.climb_backward(comm, times, saved, sleep, x)
        return comm.now - start

    wanted = ladder.timeline(ratios[::-1] * a, np.full(6, a), rule)[0]
    assert machine(4).run(program).outputs[0] == pytest.approx(wanted, rel=1e-9)


def test_the_simulator_takes_as_long_as_the_recurrence_of_two_halves():
    device = hardware.Device("products", 1e11, np.inf)
    params = model_weights(None, VOCABULARY, dtype="float64", **FEW)
    tokens = like((BATCH, TOKENS), "int64")

    def program(comm):
        shards = ladder.cut(params, comm.rank, comm.size, 8)
        ladder.forward_interleaved(comm, shards, tokens, head_dim=8)

    n = TOKENS
    attention = 2 * n * 64 * 64 * 4 / 4 + 4 * 2 * (n * (n + 1) / 2) * 8
    c = np.tile([attention, 2 * 2 * n * 64 * 512 / 4], 4) / 1e11
    a = machine(4, device).run(lambda comm: pieces.fused_sum(comm, like((n, 64)))).makespan
    seconds = machine(4, device).run(program).makespan - 2 * n * 64 * VOCABULARY * 2 / 1e11
    assert seconds == pytest.approx(rivals.timeline_interleaved(c, [a] * 8), rel=1e-9)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"arch": "spiral"}, "arch='spiral': choose from standard"),
        ({"arch": "desync", "desync_pattern": "3x"}, "desync_pattern='3x': choose from all, 2x"),
        ({"arch": "ladder", "ladder_layers": (3,)}, "a model of 3 layers has layers 0 to 2"),
        ({"arch": "standard", "ladder_layers": (1,)}, "is for arch='ladder'"),
    ],
    ids=str,
)
def test_an_unknown_rule_is_refused_by_name(options, says):
    with pytest.raises(ValueError, match=says):
        outputs(2, options)


@pytest.mark.parametrize("name", ["query heads", "channels of the MLP"])
def test_what_does_not_divide_among_ranks_is_refused(name):
    heads, hidden = (6, 64) if name == "query heads" else (8, 66)
    params = model_weights(np.random.default_rng(0), VOCABULARY, 1, D, heads, heads, HEAD_DIM, hidden)
    with pytest.raises(ShapeError, match=name):
        machine(4).run(both_ways, params, model()[1], None, RULES["ladder"])


def test_more_converted_layers_than_there_are_are_refused():
    with pytest.raises(ValueError, match="the model has 3 layers"):
        ladder.convert(model()[0], 4)


@pytest.mark.parametrize(
    ("tokens", "cache", "says"),
    [(np.zeros(6, int), None, "give \\(sequences, n\\)"), (np.zeros((1, 6), int), [None], "1 entries for 3 layers")],
    ids=["flat", "short cache"],
)
def test_tokens_and_cache_of_other_shapes_are_refused(tokens, cache, says):
    with pytest.raises(ShapeError, match=says):
        machine(1).run(lambda comm: ladder.forward(comm, model()[0], tokens, head_dim=HEAD_DIM, cache=cache))


def test_times_that_do_not_belong_together_are_refused():
    with pytest.raises(ShapeError, match="4 compute times and 3 all-reduces"):
        ladder.timeline([1.0] * 4, [1.0] * 3)


def test_three_sequences_have_no_halves():
    with pytest.raises(ShapeError, match="3 sequences"):
        machine(1).run(partial(ladder.forward_interleaved, head_dim=4), model()[0], np.zeros((3, 2), int))


# ---- at scale --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p2p", [True, False])
@pytest.mark.parametrize("tp", scale.DEGREES)
def test_the_fitted_link_gives_the_published_standard_row(tp, p2p):
    nbytes = scale.LLAMA_70B.width * 2
    a = scale.all_reduce(nbytes, topology.switch, tp, scale.port(tp, p2p))
    seconds = scale.token_seconds(scale.LLAMA_70B, tp, 1, a)
    assert 1 / seconds == pytest.approx(scale.published("standard", tp, p2p=p2p), rel=1e-9)


def test_the_fitted_device_is_near_each_published_row_without_communication():
    for batch in scale.BATCHES:
        for tp in scale.DEGREES:
            wanted = scale.published("none", tp, batch)
            assert np.isnan(wanted) or scale.tokens_per_second("none", tp, batch) == pytest.approx(wanted, rel=0.1)


def test_weights_of_a_decoding_pass_are_read_once():
    """Llama-3-70B on 8 ranks, by hand: 80 layers and the output layer; half-precision."""
    attention = 8192 * (8192 + 2 * 1024 + 8192) / 8
    mlp = 3 * 8192 * 28_672 / 8
    weights = 2 * (80 * (attention + mlp) + 8192 * 128_256)
    cached = 80 * 2 * 2 * 1281 * 128
    moved = sum(nbytes for *_, nbytes in scale.whole_pass(scale.LLAMA_70B, 8, 1))
    assert weights + cached < moved < 1.01 * (weights + cached)


def test_the_program_at_full_size_takes_as_long_as_the_recurrence():
    few = scale.Model(3, 8192, 64, 43_008)
    a = scale.all_reduce(8192 * 2, topology.switch, 8, scale.port(8))
    run = scale.decoded("standard", model=few)
    assert run.makespan == pytest.approx(scale.token_seconds(few, 8, 1, a), rel=1e-9)


def test_the_picture_has_a_bar_for_each_module_and_each_all_reduce():
    c, a = np.array([1.0, 2.0] * 3) * 1e-5, np.full(6, 5e-6)
    drawn = picture.draw(c, a, {name: 1.0 for name in picture.NAMES}, "three layers")
    assert drawn.svg.count(f'fill="{picture.INK.orange}"') == 6 + 3 + 6 + 1  # standard, parallel, ladder, legend
    assert drawn.svg.count(">M1</text>") == 2
    assert "ladder takes 95 µs, of which 5 µs without compute" in drawn.words


# ---- the small models ------------------------------------------------------------------------------------------------


def test_every_verb_agrees_with_its_noun():
    random = np.random.default_rng(0)
    for _ in range(200):
        words, nouns = small.sentence(random), []
        for word in words:
            if small.SINGULAR <= word < small.DOES:
                nouns.append(divmod(word - small.SINGULAR, small.NOUNS))
            elif small.DOES <= word < small.LOVELY:
                form, kind = divmod(word - small.DOES, small.VERBS)
                plural, noun = nouns.pop()
                assert form == plural
                assert kind in (noun, (noun + 1) % small.VERBS)
        assert nouns == []


def test_the_shipped_model_has_learned_the_language():
    assert small.held_out(small.trained(), small.reads("standard", 6)) < np.log(small.VOCABULARY) / 2


def test_ranks_run_the_shipped_model_as_it_was_trained():
    tokens = small.unseen()[0][:2]
    wanted = small.logits(small.trained(), tokens, small.reads("ladder", 6)).reshape(-1, small.VOCABULARY)
    head_dim = small.WIDTH // small.HEADS

    def program(comm):
        shards = ladder.cut(small.trained(), comm.rank, comm.size, head_dim)
        return ladder.forward(comm, shards, tokens, head_dim=head_dim, arch="ladder")[0]

    assert_allclose(machine(4).run(program).outputs[0], wanted, rtol=0, atol=2e-5 * abs(wanted).max())
