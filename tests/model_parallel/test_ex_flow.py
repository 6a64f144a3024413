"""ExFlow: a placement changes no result, bytes are the crossings that routes say, solvers come near the optimum."""

from functools import cache
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from toolkit.model_parallel import _ex_flow_picture as picture
from toolkit.model_parallel import _ex_flow_placement as place
from toolkit.model_parallel import _ex_flow_scale as scale
from toolkit.model_parallel import _ex_flow_trained as trained
from toolkit.model_parallel import ex_flow
from toolkit.model_parallel._ex_flow_context import empty_caches
from toolkit.model_parallel._ex_flow_model import Shape, attend, experts, turned, weights
from toolkit.model_parallel._ex_flow_wire import exchange
from toolkit.runtime import Cluster, hardware, like, topology
from toolkit.runtime.errors import ShapeError

SMALL = Shape(vocabulary=20, layers=3, width=16, heads=4, hidden=8, experts=6)
T, M, N = 6, 4, 4  # sequences, tokens of a prompt, new tokens
WAYS = ["direct", "pairwise", "hierarchical"]


@cache
def model():
    return weights(np.random.default_rng(0), SMALL)


@cache
def prompts():
    return np.random.default_rng(1).integers(0, SMALL.vocabulary, (T, M))


@cache
def reference():
    """One device, no cache, all experts computed: (logits (T, N, V), routes (T, M + N - 1, L)) of greedy decoding."""
    tokens, logits = prompts(), []
    for _ in range(N):
        scores, gates = trained.forward(model(), tokens, SMALL.heads)
        routes = np.stack([gate.argmax(axis=-1) for gate in gates], axis=-1)
        logits.append(scores[:, -1])
        tokens = np.concatenate((tokens, logits[-1].argmax(axis=-1)[:, None]), axis=1)
    return np.stack(logits, axis=1), routes


def machine(ranks, nodes=1):
    if nodes == 1:
        return Cluster(topology.switch(ranks, hardware.NVLINK3), hardware.A100)
    return Cluster(topology.two_level(nodes, ranks // nodes, hardware.NVLINK3, hardware.IB_HDR), hardware.A100)


def placement(ranks, seed=0):
    return place.shuffled(np.random.default_rng(seed), SMALL.layers, SMALL.experts, ranks)


def decode(ranks, scheme="coherent", coherence="kv", n=N, nodes=1, where=None, **options):
    where = placement(ranks) if where is None else where
    return ex_flow.decode(
        machine(ranks, nodes), model(), prompts(), n, where, heads=4, scheme=scheme, coherence=coherence, **options
    )


any_ranks = pytest.mark.parametrize("ranks", [1, 2, 3, 6])
any_coherence = pytest.mark.parametrize("coherence", ex_flow.COHERENCE)

# ---- results do not depend on where experts are ----------------------------------------------------------------------


@any_ranks
def test_tokens_that_return_home_give_the_dense_models_logits(ranks):
    assert_allclose(decode(ranks, "home").logits, reference()[0], rtol=0, atol=1e-10)


@any_coherence
@any_ranks
def test_tokens_that_stay_give_the_dense_models_logits(ranks, coherence):
    assert_allclose(decode(ranks, coherence=coherence).logits, reference()[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("scheme", ex_flow.SCHEMES)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_placement_changes_the_result(scheme, seed):
    found = decode(3, scheme, where=placement(3, seed))
    assert_allclose(found.logits, reference()[0], rtol=0, atol=1e-10)
    assert_array_equal(found.tokens, reference()[0].argmax(axis=-1))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scheme", ex_flow.SCHEMES)
def test_any_way_of_the_all_to_all_gives_the_same_on_two_nodes(scheme, way):
    assert_allclose(decode(6, scheme, nodes=2, way=way).logits, reference()[0], rtol=0, atol=1e-10)


def test_without_keys_and_values_from_other_gpus_the_result_is_wrong(monkeypatch):
    monkeypatch.setattr("toolkit.model_parallel._ex_flow_context.Context._spread", lambda self: None)
    assert abs(decode(3, coherence="kv").logits - reference()[0]).max() > 1e-3


def test_only_ids_says_what_it_does_not_charge():
    assert "not charged" in decode(2, coherence="ids").note
    assert not decode(2, coherence="kv").note


def test_forced_routes_that_the_gate_would_take_change_nothing():
    routes = np.zeros((T, M + N, SMALL.layers), int)
    routes[:, : M + N - 1] = reference()[1]
    assert_allclose(decode(2, routes=routes).logits, reference()[0], rtol=0, atol=1e-10)


def test_the_shipped_weights_route_in_parallel_as_they_did_on_one_device():
    of, text = trained.shape(8), trained.corpus("test")[:4, :6]
    where = place.contiguous(of.layers, 8, 4)
    found = ex_flow.decode(machine(4), trained.trained(), text, 1, where, heads=of.heads)
    wanted, _ = trained.forward(trained.trained(), text, of.heads)
    assert_allclose(found.logits[:, 0], wanted[:, -1], rtol=0, atol=1e-10)


# ---- messages and bytes ----------------------------------------------------------------------------------------------


def sends(found, name):
    return [event for event in found.run.trace if event.kind == "send" and event.name == name]


def one_more(name, measure, **options):
    """What one more iteration adds, so that the prefill drops out."""
    return measure(sends(decode(n=N, **options), name)) - measure(sends(decode(n=N - 1, **options), name))


def from_0_to_1(events):
    return sum(event.rank == 0 and event.peer == 1 for event in events)


@pytest.mark.parametrize(
    ("scheme", "coherence", "a_layer"),
    [("home", "kv", 2), ("coherent", "kv", 1), ("coherent", "ids", 1), ("coherent", "fetch", 3)],
)
def test_all_to_alls_in_each_layer(scheme, coherence, a_layer):
    count = one_more("all_to_all", from_0_to_1, ranks=3, scheme=scheme, coherence=coherence)
    assert count == a_layer * SMALL.layers


@pytest.mark.parametrize(
    ("scheme", "coherence", "gathers"), [("home", "kv", 0), ("coherent", "ids", 1), ("coherent", "kv", 2)]
)
def test_all_gathers_in_each_iteration(scheme, coherence, gathers):
    # between two ranks an all-gather is one message each way
    assert one_more("all_gather", from_0_to_1, ranks=2, scheme=scheme, coherence=coherence) == gathers


def total(events):
    return sum(event.bytes for event in events)


def decoded_routes():
    """(N - 1 iterations, T, L)."""
    return np.moveaxis(reference()[1][:, M:], 1, 0)


def charged(found, prefill):
    return {name: total(sends(found, name)) - total(sends(prefill, name)) for name in ("all_to_all", "all_gather")}


@pytest.mark.parametrize("coherence", ["ids", "kv"])
@pytest.mark.parametrize("scheme", ex_flow.SCHEMES)
@any_ranks
def test_counted_bytes_are_the_crossings_of_the_routes(ranks, scheme, coherence):
    where, options = placement(ranks), {"scheme": scheme, "coherence": coherence}
    counted = charged(decode(ranks, **options), decode(ranks, n=1, **options))
    crossed = scale.crossings(decoded_routes(), where, ranks, scheme)
    said = scale.ledger(crossed, T, ranks, SMALL.width, 8, scheme, coherence)
    assert counted["all_to_all"] == round((N - 1) * (said["dispatch"] + said["combine"]))
    assert counted["all_gather"] == (N - 1) * (said["tokens"] + said["K/V"])


@pytest.mark.parametrize("coherence", ["kv", "early"])
def test_keys_and_values_cost_2_l_h_for_every_token_and_every_other_gpu(coherence):
    ranks, itemsize, ids = 3, 8, 12
    options = {"ranks": ranks, "coherence": coherence}
    more = one_more("all_gather", total, **options) - one_more("all_gather", total, ranks=ranks, coherence="ids")
    assert more == (2 * SMALL.width * itemsize + ids) * SMALL.layers * T * (ranks - 1)


def test_fetching_moves_fewer_bytes_than_gathering_where_sequences_keep_their_experts():
    routes = np.zeros((T, M + 4, SMALL.layers), int)
    routes[:] = np.arange(T)[:, None, None]  # sequence s always takes expert s
    where = np.tile(np.arange(6) // 2, (3, 1))
    gathered, fetched = (decode(3, coherence=c, where=where, routes=routes).run.traffic.total for c in ("kv", "fetch"))
    assert fetched < gathered


def test_tokens_whose_experts_are_all_on_one_gpu_send_nothing_in_all_to_alls():
    routes = np.zeros((T, M + N, SMALL.layers), int)
    routes[:] = np.arange(T)[:, None, None]  # sequence s is at home on rank s // 2, as its expert is
    found = decode(3, where=np.tile(np.arange(6) // 2, (3, 1)), routes=routes)
    assert total(sends(found, "all_to_all")) == 0


@pytest.mark.parametrize("scheme", ex_flow.SCHEMES)
def test_one_gpu_sends_nothing(scheme):
    assert decode(1, scheme).run.traffic.total == 0


def test_uniform_routes_cross_as_often_as_chance_says():
    gpus, random = 4, np.random.default_rng(3)
    routes = random.integers(0, 8, (500, 16, 6))
    for scheme in ex_flow.SCHEMES:
        crossed = scale.crossings(routes, place.contiguous(6, 8, gpus), gpus, scheme) / 16
        assert_allclose(crossed, 1 - 1 / gpus, atol=4 * (0.25 * 0.75 / 8000) ** 0.5)


@pytest.mark.parametrize("scheme", ex_flow.SCHEMES)
def test_a_run_without_data_takes_the_same_time_and_bytes(scheme):
    random = np.random.default_rng(4)
    routes = random.integers(0, 6, (T, M + 3, SMALL.layers))
    runs = [
        ex_flow.decode(
            machine(3), params, text, 3, placement(3), heads=4, scheme=scheme, routes=routes, prefill=False
        ).run
        for params, text in ((model(), prompts()), (weights(None, SMALL), like((T, M), "int32")))
    ]
    assert runs[0].traffic.total == runs[1].traffic.total
    assert runs[0].makespan == pytest.approx(runs[1].makespan, rel=1e-12)


def test_an_all_to_all_by_way_of_the_nodes_delivers_what_a_direct_one_does():
    def program(comm, way):
        parcels = [
            (np.full((comm.rank + to, 2), 10 * comm.rank + to), np.arange(comm.rank + to)) for to in range(comm.size)
        ]
        return exchange(comm, parcels, way)

    direct, by_nodes = (machine(6, 2).run(program, way).outputs for way in ("direct", "hierarchical"))
    for here, there in zip(direct, by_nodes, strict=True):
        for a, b in zip(here, there, strict=True):
            assert_array_equal(a[0], b[0])
            assert_array_equal(a[1], b[1])


# ---- pieces of the model ---------------------------------------------------------------------------------------------


def test_cached_attention_is_softmax_over_a_sequences_past():
    random, heads = np.random.default_rng(5), 2
    cache, q = random.standard_normal((3, 7, 16)), random.standard_normal((4, 8))
    sequence, where = np.array([2, 0, 2, 1]), np.array([3, 6, 0, 4])
    for row, out in enumerate(attend(q, cache, sequence, where, heads)):
        past = cache[sequence[row], : where[row] + 1]
        for h in range(heads):
            k, v = past[:, 4 * h : 4 * h + 4], past[:, 8 + 4 * h : 12 + 4 * h]
            share = np.exp(k @ q[row, 4 * h : 4 * h + 4] / 2)
            assert_allclose(out[4 * h : 4 * h + 4], share @ v / share.sum(), atol=1e-12)


def test_rotary_of_rows_is_the_libraries():
    from toolkit.kernels.layers import merge_heads, rotary, split_heads

    x, where = np.random.default_rng(6).standard_normal((5, 12)), np.array([0, 3, 1, 7, 2])
    assert_allclose(turned(x, where, 3), merge_heads(rotary(split_heads(x, 4), where)), atol=1e-12)


def test_each_row_goes_through_its_own_expert():
    import torch

    random = np.random.default_rng(7)
    x, up, down = (random.standard_normal(s) for s in ((5, 4), (3, 4, 6), (3, 6, 4)))
    local = np.array([2, 0, 2, 1, 0])
    rows = zip(map(torch.tensor, x), local, strict=True)
    wanted = [
        torch.nn.functional.gelu(r @ torch.tensor(up[e]), approximate="tanh") @ torch.tensor(down[e]) for r, e in rows
    ]
    assert_allclose(experts(x, local, up, down), torch.stack(wanted), atol=1e-12)


# ---- counts and measures ---------------------------------------------------------------------------------------------


def test_transitions_are_counted_by_hand():
    counts = place.transition_counts([[0, 1, 1], [0, 1, 0], [1, 0, 0]], 2)
    assert_array_equal(counts, [[[0, 2], [1, 0]], [[1, 0], [1, 1]]])


def brute_cost(trace, where, nodes=1):
    g = where.max() + 1
    cost = 0
    for token in trace:
        for j in range(len(token) - 1):
            a, b = where[j][token[j]], where[j + 1][token[j + 1]]
            cost += 0 if a == b else 1 if a // (g // nodes) == b // (g // nodes) else 2
    return cost / len(trace)


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_cost_of_a_placement_is_a_walk_over_the_trace(nodes):
    random = np.random.default_rng(8)
    trace, where = random.integers(0, 8, (50, 5)), place.shuffled(random, 5, 8, 4)
    cost = place.placement_cost(place.transition_counts(trace, 8), where, place.distance(4, nodes))
    assert cost == pytest.approx(brute_cost(trace, where, nodes))


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_no_placement_keeps_more_than_the_affinity_bound(seed):
    random = np.random.default_rng(seed)
    counts = place.transition_counts(scale.markov(random, 200, 4, 6, random.random()), 6)
    stays = 1 - place.placement_cost(counts, place.solve_placement(counts, 3, seed=seed), place.distance(3)) / 3
    assert stays <= place.affinity(counts, 2) + 1e-12


def test_information_is_the_entropies_apart_less_the_entropy_together():
    from scipy.stats import entropy

    counts = place.transition_counts(scale.markov(np.random.default_rng(9), 2_000, 3, 5, 0.6), 5)
    wanted = [entropy(n.sum(axis=0)) + entropy(n.sum(axis=1)) - entropy(n.ravel()) for n in counts]
    assert place.information(counts) == pytest.approx(np.mean(wanted) / np.log(2), rel=1e-9)


# ---- solvers ---------------------------------------------------------------------------------------------------------


def instance(seed, layers=4, e=6):
    return np.random.default_rng(seed).integers(0, 100, (layers - 1, e, e))


def cost_of(counts, gpus, method="hungarian", nodes=1):
    return place.placement_cost(counts, place.solve_placement(counts, gpus, nodes, method), place.distance(gpus, nodes))


def balanced_layers(e, gpus):
    return sorted(set(permutations(np.repeat(range(gpus), e // gpus).tolist())))


@pytest.mark.parametrize("nodes", [1, 2])
def test_dp_is_the_best_of_all_placements(nodes):
    counts = instance(0, layers=3, e=4)
    everything = product(balanced_layers(4, 2 * nodes), repeat=3)
    best = min(place.placement_cost(counts, np.array(p), place.distance(2 * nodes, nodes)) for p in everything)
    assert cost_of(counts, 2 * nodes, "dp", nodes) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(3))
def test_matching_is_exact_where_each_gpu_has_one_expert(seed):
    counts = instance(seed, layers=3, e=4)
    assert cost_of(counts, 4, "matching") == pytest.approx(cost_of(counts, 4, "dp"))


def test_ten_restarts_save_97_percent_of_the_optimum_on_average_and_80_at_worst():
    shares = []
    for seed in range(50):
        counts, gpus = instance(seed), 2 + seed % 2
        plain = place.placement_cost(counts, place.contiguous(4, 6, gpus), place.distance(gpus))
        shares.append((plain - cost_of(counts, gpus)) / (plain - cost_of(counts, gpus, "dp")))
    assert np.mean(shares) >= 0.97
    assert min(shares) >= 0.80


@given(st.integers(0, 10**6), st.sampled_from([(2, 1), (4, 1), (4, 2), (8, 4)]))
@settings(max_examples=40, deadline=None)
def test_descent_never_rises_and_ends_where_no_layer_can_improve(seed, shape):
    gpus, nodes = shape
    random, w = np.random.default_rng(seed), place.distance(gpus, nodes)
    counts, start = random.integers(0, 50, (4, 8, 8)), place.shuffled(random, 5, 8, gpus)
    end = place.descent(counts, start, w)
    assert place.placement_cost(counts, end, w) <= place.placement_cost(counts, start, w) + 1e-9
    assert_array_equal(place.descent(counts, end, w), end)


@pytest.mark.parametrize(
    ("method", "gpus", "nodes"),
    [
        ("hungarian", 4, 1),
        ("hungarian", 4, 2),
        ("dp", 2, 1),
        ("matching", 8, 1),
        ("bipart", 8, 1),
        ("nodes first", 4, 2),
        ("anneal", 4, 2),
    ],
)
def test_placements_are_balanced_and_no_worse_than_contiguous(method, gpus, nodes):
    counts = place.transition_counts(scale.markov(np.random.default_rng(10), 3_000, 5, 8, 0.6), 8)
    found, w = place.solve_placement(counts, gpus, nodes, method), place.distance(gpus, nodes)
    assert_array_equal(np.sort(found, axis=1), np.tile(np.repeat(np.arange(gpus), 8 // gpus), (5, 1)))
    assert place.placement_cost(counts, found, w) <= place.placement_cost(counts, place.contiguous(5, 8, gpus), w)


def test_partners_that_always_follow_each_other_are_all_found():
    counts = place.transition_counts(scale.markov(np.random.default_rng(11), 2_000, 6, 16, 1.0), 16)
    assert cost_of(counts, 4) == 0


@pytest.mark.parametrize("swap", [[1, 0, 2, 3], [0, 1, 3, 2]])
def test_renaming_gpus_of_a_node_leaves_the_cost(swap):
    counts, where, w = instance(12, e=8), place.shuffled(np.random.default_rng(12), 4, 8, 4), place.distance(4, 2)
    assert place.placement_cost(counts, np.array(swap)[where], w) == pytest.approx(
        place.placement_cost(counts, where, w)
    )


def test_renaming_gpus_across_nodes_does_not():
    counts, where, w = instance(12, e=8), place.shuffled(np.random.default_rng(12), 4, 8, 4), place.distance(4, 2)
    assert place.placement_cost(counts, np.array([0, 2, 1, 3])[where], w) != pytest.approx(
        place.placement_cost(counts, where, w)
    )


def test_routes_without_affinity_give_a_gain_on_their_own_trace_and_none_on_another():
    gpus, w = 4, place.distance(4)
    seen, unseen = (place.transition_counts(np.random.default_rng(s).integers(0, 8, (400, 6)), 8) for s in (13, 14))
    where = place.solve_placement(seen, gpus)
    spread = 5 * (5 * 0.75 * 0.25 / 400) ** 0.5  # five standard deviations of the mean of 5 steps, 400 tokens
    assert place.placement_cost(seen, where, w) < 5 * 0.75 - spread
    assert abs(place.placement_cost(unseen, where, w) - 5 * 0.75) < spread


def test_an_expert_that_no_token_takes_is_placed():
    trace = scale.markov(np.random.default_rng(15), 500, 4, 6, 0.5) % 5
    found = place.solve_placement(place.transition_counts(trace, 6), 3)
    assert_array_equal(np.sort(found, axis=1), np.tile([0, 0, 1, 1, 2, 2], (4, 1)))


def test_placing_by_load_evens_out_the_work():
    random = np.random.default_rng(16)
    trace = random.choice(8, (4_000, 3), p=np.arange(1, 9) / 36)
    counts = place.transition_counts(trace, 8)
    for layer, where in enumerate(place.by_load(counts, 4)):
        work = np.bincount(where[trace[:, layer]], minlength=4)
        plain = np.bincount(trace[:, layer] // 2, minlength=4)
        assert work.max() < 0.75 * plain.max()


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trace", "error", "words"),
    [
        (np.zeros((0, 3), int), ShapeError, "one token"),
        ([[0, 9]], ValueError, "names experts 0 to 9"),
        ([[-1, 0]], ValueError, "-1"),
    ],
)
def test_a_bad_trace_is_refused_by_name(trace, error, words):
    with pytest.raises(error, match=words):
        place.transition_counts(trace, 8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((4, 1, "hungarian"), "6 experts on 4 GPUs"),
        ((2, 1, "guess"), "choose from"),
        ((3, 1, "matching"), "as many GPUs"),
        ((3, 1, "bipart"), "power of two"),
        ((3, 2, "hungarian"), "3 GPUs on 2 nodes"),
    ],
)
def test_a_solver_says_what_it_cannot_do(arguments, words):
    with pytest.raises(ValueError, match=words):
        place.solve_placement(instance(0), *arguments)


def test_dp_refuses_what_would_not_end():
    with pytest.raises(ValueError, match="take 'hungarian'"):
        place.solve_placement(instance(0, e=16), 4, method="dp")


@pytest.mark.parametrize(
    ("ranks", "options", "words"),
    [
        (4, {"where": np.zeros((3, 6), int)}, "6 sequences and 6 experts on 4"),
        (2, {"where": np.zeros((3, 6), int)}, "3 experts of each"),
        (2, {"coherence": "hope"}, "hope"),
        (2, {"way": "round"}, "round"),
    ],
)
def test_decode_says_what_it_cannot_do(ranks, options, words):
    with pytest.raises(ValueError, match=words):
        decode(ranks, **options)


def test_a_run_without_data_needs_routes():
    with pytest.raises(ValueError, match="give the routes"):
        ex_flow.decode(machine(2), weights(None, SMALL), like((T, M), "int32"), 2, placement(2), heads=4)


# ---- what is shipped, and the picture --------------------------------------------------------------------------------


@pytest.mark.parametrize("experts_", trained.EXPERTS)
def test_a_placement_from_one_text_helps_on_another(experts_):
    seen, unseen = (place.transition_counts(trained.routes(experts_, kind), experts_) for kind in ("profile", "test"))
    w, plain = place.distance(4), place.contiguous(6, experts_, 4)
    assert place.placement_cost(unseen, place.solve_placement(seen, 4), w) < 0.9 * place.placement_cost(
        unseen, plain, w
    )


def test_shipped_routes_are_those_of_the_shipped_weights():
    routes = trained.routed(trained.trained(), trained.corpus("test")[:20], trained.shape(8).heads)
    assert np.mean(routes == trained.routes(8)[: len(routes)]) > 0.99  # weights were rounded to 16 bits


def test_training_starts_where_the_shipped_one_did():
    untrained = weights(np.random.default_rng(0), trained.shape(8), "float32")
    routes = trained.routed(untrained, trained.corpus("test")[:20], trained.shape(8).heads)
    assert np.mean(routes == trained.checkpoint(0)[: len(routes)]) > 0.99


def test_ten_steps_of_training_lower_the_loss():
    before, after = trained.train(8, steps=10)[0], trained.train(8, steps=10)[10]
    text = trained.text(np.random.default_rng(0), 16)
    assert trained.loss(4, after, *text) < trained.loss(4, before, *text)


def test_a_router_of_full_strength_is_decided_by_its_first_expert():
    routes = scale.markov(np.random.default_rng(17), 1_000, 4, 8, 1.0)
    assert len(np.unique(routes, axis=0)) == 8


def test_six_layers_extrapolate_to_twelve():
    setting = {"floor": scale.LIBRARY, "strength": 0.0, "placed": False}
    wanted = scale.simulated(4, "home", "kv", 12, **setting)
    assert scale.iteration(4, "home", layers=12, **setting) == pytest.approx(wanted, rel=0.05)


def test_the_picture_colours_what_stays_and_says_the_share_that_does_not():
    routes, where = np.array([[0, 0], [0, 1], [1, 1], [1, 1]]), np.array([[0, 1], [0, 1]])
    sent = {"dispatch": 20_000, "combine": 0, "tokens": 12, "K/V": 50_000}
    drawn = picture.draw(routes, where, 2, sent, 50_000, "coherent")
    assert "25 % of the steps" in drawn.words
    assert "K/V 0.05 MB" in drawn.words
    assert drawn.svg.count(f'stroke="{picture.INK.grey}"') == 1


def test_a_cache_of_a_shape_only_run_takes_no_memory():
    assert empty_caches(2, 1_000, 1_000, 1_000, "float16", shape_only=True)[0].strides == (0, 0, 0)
