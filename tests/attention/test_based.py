"""BASED: three views of one attention, states that are as large as they say, and recall that the state limits."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from reference import dense_attention
from toolkit.attention import _based_mixers as mixers
from toolkit.attention import _based_recall as recall
from toolkit.attention import _based_throughput as throughput
from toolkit.attention import _based_trained as trained
from toolkit.attention import based
from toolkit.claims.attention import based as claims
from toolkit.kernels.selective_scan import selective_scan, selective_scan_backward
from toolkit.learn.stack import language_model, logits
from toolkit.runtime import hardware, like
from toolkit.runtime.errors import OutOfDeviceMemory, ShapeError

HEADS, FEATURES, VALUES = 2, 5, 7


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def qkv(tokens, features=FEATURES, seed=0):
    random = np.random.default_rng(seed)
    return [random.standard_normal((HEADS, tokens, width)) for width in (features, features, VALUES)]


def by_definition(q, k, v, seen=None):
    """Loops over queries and keys, with 1 + z + z²/2 written out; float64."""
    out = np.zeros((*q.shape[:2], v.shape[2]))
    for h, i in np.ndindex(*q.shape[:2]):
        total = 0.0
        for j in range(k.shape[1]):
            if (j <= i) if seen is None else seen[i, j]:
                z = float(np.dot(q[h, i], k[h, j])) / q.shape[2] ** 0.5
                out[h, i] += (1 + z + z**2 / 2) * v[h, j]
                total += 1 + z + z**2 / 2
        out[h, i] /= total or 1
    return out


# ---- features --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("d", [1, 8, 16, 24])
def test_products_of_features_are_the_series(d, symmetric):
    q, k = normal(2, 40, d)
    z = (q * k).sum(axis=1) / np.sqrt(d)
    got = (based.taylor_features(q, symmetric) * based.taylor_features(k, symmetric)).sum(axis=1)
    assert_allclose(got, 1 + z + z**2 / 2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("d, full, half", [(8, 73, 45), (16, 273, 153), (24, 601, 325)])
def test_the_feature_dimension_is_that_of_the_paper(d, full, half):
    assert based.taylor_features(np.ones(d)).shape == (full,)
    assert based.taylor_features(np.ones(d), symmetric=True).shape == (half,)


def test_features_scaled_twice_are_caught():
    """Proof that the tests above can fail: the pitfall of dividing by √d' although φ carries d'^¼."""
    q, k = normal(2, 40, 8)
    z = (q * k).sum(axis=1) / np.sqrt(8)
    twice = (based.taylor_features(q / 8**0.25) * based.taylor_features(k / 8**0.25)).sum(axis=1)
    assert np.abs(twice - (1 + z + z**2 / 2)).max() > 0.1


# ---- three views -----------------------------------------------------------------------------------------------------


def test_the_quadratic_view_equals_the_definition():
    q, k, v = qkv(23)
    assert_allclose(based.linear_attention(q, k, v), by_definition(q, k, v), rtol=0, atol=1e-12)


def test_any_mask_may_be_given():
    q, k, v = qkv(9)
    seen = normal(9, 9) > 0
    want = by_definition(q, k, v, seen)
    assert_allclose(based.linear_attention(q, k, v, seen), want, rtol=0, atol=1e-11)  # ε = 1e-12 over a weight of 1/2


@given(tokens=st.integers(1, 40), chunk=st.integers(1, 50), d=st.integers(1, 6), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_three_views_agree_for_any_chunk(tokens, chunk, d, seed):
    q, k, v = qkv(tokens, d, seed)
    quadratic = based.linear_attention(q, k, v)
    recurrent, state = based.recurrent(q, k, v)
    chunked, prefilled = based.chunked(q, k, v, chunk)
    assert_allclose(recurrent, quadratic, rtol=0, atol=1e-9)
    assert_allclose(chunked, quadratic, rtol=0, atol=1e-9)
    assert_allclose(prefilled, state, rtol=0, atol=1e-9)


@pytest.mark.parametrize("cut", [1, 16, 29])
def test_decoding_goes_on_exactly_where_the_prefill_ended(cut):
    q, k, v = qkv(30)
    _, state = based.chunked(q[:, :cut], k[:, :cut], v[:, :cut], chunk=8)
    rest, _ = based.recurrent(q[:, cut:], k[:, cut:], v[:, cut:], state)
    assert_allclose(rest, by_definition(q, k, v)[:, cut:], rtol=0, atol=1e-9)


def test_symmetric_storage_gives_the_same_output():
    q, k, v = qkv(30)
    half, state = based.recurrent(q, k, v, features=partial(based.taylor_features, symmetric=True))
    assert state.shape == (HEADS, 1 + 5 + 15, VALUES + 1)
    assert_allclose(half, based.linear_attention(q, k, v), rtol=0, atol=1e-10)


@pytest.mark.parametrize("view", [based.recurrent, partial(based.chunked, chunk=4)])
def test_padding_leaves_no_trace_because_features_are_taken_out(view):
    q, k, v = qkv(12)
    keep = np.ones((HEADS, 12))
    keep[:, :5] = 0
    out, state = view(q, k, v, keep=keep)
    alone, state_alone = view(q[:, 5:], k[:, 5:], v[:, 5:])
    assert_allclose(out[:, 5:], alone, rtol=0, atol=1e-10)
    assert_allclose(state, state_alone, rtol=0, atol=1e-10)


def test_zeroed_keys_would_still_leave_a_trace():
    q, k, v = qkv(12)
    k[:, :5] = v[:, :5] = 0
    out, _ = based.recurrent(q, k, v)
    alone, _ = based.recurrent(q[:, 5:], k[:, 5:], v[:, 5:])
    assert np.abs(out[:, 5:] - alone).max() > 0.01


def test_a_state_in_float32_stays_within_a_hundred_thousandth():
    q, k, v = (a.astype("float32") for a in qkv(512))
    out, state = based.chunked(q, k, v)
    assert out.dtype == state.dtype == "float32"
    assert np.abs(out - based.linear_attention(*(a.astype("float64") for a in (q, k, v)))).max() < 1e-5


@given(tokens=st.integers(1, 20), size=st.floats(0.1, 30), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_outputs_lie_between_the_least_and_the_largest_value_seen(tokens, size, seed):
    q, k, v = qkv(tokens, seed=seed)
    out, _ = based.chunked(size * q, size * k, v, chunk=7)
    assert (out <= np.maximum.accumulate(v, axis=1) + 1e-9).all()
    assert (out >= np.minimum.accumulate(v, axis=1) - 1e-9).all()


def test_a_constant_value_comes_back_unchanged():
    q, k, v = qkv(20)
    assert_allclose(based.chunked(q, k, np.ones_like(v), chunk=6)[0], 1, rtol=0, atol=1e-9)


# ---- gradients -------------------------------------------------------------------------------------------------------


def slope(function, arrays, changed, along, step=1e-5):
    moved = [[a + s * along if i == changed else a for i, a in enumerate(arrays)] for s in (step, -step)]
    return (function(*moved[0]) - function(*moved[1])) / (2 * step)


@pytest.mark.parametrize("changed", [0, 1, 2], ids=["dq", "dk", "dv"])
@pytest.mark.parametrize("masked", [False, True])
def test_quadratic_gradients_agree_with_finite_differences(changed, masked):
    arrays, grad_out = qkv(11), normal(HEADS, 11, VALUES, seed=5)
    mask = None
    if masked:  # a causal part beside keys that all queries see, as prefix linear attention needs
        arrays = [arrays[0], *(np.concatenate([a, a[:, ::-1] + 1], axis=1) for a in arrays[1:])]
        mask = np.concatenate([np.tri(11), np.ones((11, 11))], axis=1)
    gradient = based.linear_attention_backward(*arrays, based.linear_attention(*arrays, mask), grad_out, mask)[changed]
    along = normal(*arrays[changed].shape, seed=6)
    loss = lambda *arrays: np.vdot(based.linear_attention(*arrays, mask), grad_out)  # noqa: E731
    assert np.vdot(gradient, along) == pytest.approx(slope(loss, arrays, changed, along), rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 4, 11, 64])
def test_the_chunked_backward_equals_the_quadratic_one(chunk):
    arrays, grad_out = qkv(11), normal(HEADS, 11, VALUES, seed=5)
    out = based.linear_attention(*arrays)
    want = based.linear_attention_backward(*arrays, out, grad_out)
    for got, ours in zip(based.chunked_backward(*arrays, out, grad_out, chunk), want, strict=False):
        assert_allclose(got, ours, rtol=0, atol=1e-9)


@pytest.mark.parametrize("changed", [0, 1, 2, 3], ids=["dq", "dk", "dv", "dstate"])
def test_gradients_through_a_state_agree_with_finite_differences(changed):
    _, state = based.chunked(*qkv(6, seed=9))
    arrays, grad_out = [*qkv(11), state], normal(HEADS, 11, VALUES, seed=5)
    loss = lambda q, k, v, state: np.vdot(based.chunked(q, k, v, 4, state)[0], grad_out)  # noqa: E731
    out, _ = based.chunked(*arrays[:3], 4, state)
    gradient = based.chunked_backward(*arrays[:3], out, grad_out, 4, state)[changed]
    along = normal(*arrays[changed].shape, seed=6)
    if changed == 3:  # only states that a past can leave: symmetric in order 2
        along = based.chunked(*qkv(6, seed=10))[1]
    assert np.vdot(gradient, along) == pytest.approx(slope(loss, arrays, changed, along), rel=1e-6)


@pytest.mark.parametrize("changed", range(5), ids=["dx", "ddelta", "da", "db", "dc"])
def test_gradients_of_the_selective_scan_agree_with_finite_differences(changed):
    x, a, b, c = normal(2, 9, 4), -np.exp(normal(3, 4)), normal(2, 9, 3, seed=1), normal(2, 9, 3, seed=2)
    arrays, grad_y = [x, np.exp(normal(2, 9, 4, seed=3)), a, b, c], normal(2, 9, 4, seed=4)
    along = normal(*arrays[changed].shape, seed=6)
    loss = lambda *arrays: np.vdot(selective_scan(*arrays)[0], grad_y)  # noqa: E731
    gradient = selective_scan_backward(*arrays, grad_y)[changed]
    assert np.vdot(gradient, along) == pytest.approx(slope(loss, arrays, changed, along), rel=1e-6)


def test_the_selective_scan_equals_its_recurrence_written_out():
    x, delta, a = normal(1, 6, 2), np.exp(normal(1, 6, 2, seed=3)), -np.exp(normal(3, 2))
    b, c = normal(2, 1, 6, 3, seed=1)
    h, want = np.zeros((3, 2)), []
    for t in range(6):
        for s, channel in np.ndindex(3, 2):
            step = delta[0, t, channel]
            h[s, channel] = np.exp(step * a[s, channel]) * h[s, channel] + step * b[0, t, s] * x[0, t, channel]
        want.append([sum(c[0, t, s] * h[s, channel] for s in range(3)) for channel in range(2)])
    assert_allclose(selective_scan(x, delta, a, b, c)[0][0], want, rtol=0, atol=1e-12)


# ---- the window ------------------------------------------------------------------------------------------------------


def windowed(q, k, v, window):
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[2])
    i, j = np.indices(scores.shape[1:])
    scores[:, (j > i) | (i - j >= window)] = -np.inf
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    return weights / weights.sum(axis=2, keepdims=True) @ v


def in_pieces(q, k, v, window, pieces):
    """`cached_attention` over pieces of the sequence; also the slots that the cache held after each."""
    cache, outs, slots, first = based.empty_cache(k, v, window), [], [], 0
    for size in pieces:
        now = slice(first, first + size)
        out, cache = based.cached_attention(cache, q[:, now], k[:, now], v[:, now], window)
        outs.append(out)
        slots.append(cache[0].shape[1])
        first += size
    return np.concatenate(outs, axis=1), slots


@given(window=st.integers(1, 12), pieces=st.lists(st.integers(1, 9), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_the_window_equals_masked_attention_and_its_cache_never_grows(window, pieces):
    q, k, v = qkv(sum(pieces))
    out, slots = in_pieces(q, k, v, window, pieces)
    assert_allclose(out, windowed(q, k, v, window), rtol=0, atol=1e-12)
    assert set(slots) == {window}


@pytest.mark.parametrize("window", [24, 100, None])
def test_a_window_of_the_whole_sequence_is_full_attention(window):
    q, k, v = (a[..., :FEATURES] for a in qkv(24))
    out, _ = in_pieces(q, k, v, window, [20, 1, 1, 2])
    assert_allclose(out, dense_attention(q, k, v, True)[0], rtol=0, atol=1e-12)


# ---- layers and their states -----------------------------------------------------------------------------------------

D = 12
LAYERS = {
    "linear": mixers.linear_attention(D, 4, heads=3, dtype="float64"),
    "softmax": mixers.softmax(D, heads=2, dtype="float64"),
    "window": mixers.softmax(D, window=5, heads=3, dtype="float64"),
    "convolution": mixers.gated_convolution(D, dtype="float64"),
    "elu + 1": mixers.plain_linear_attention(D, based.elu_features, 4, heads=2, dtype="float64"),
    "same": mixers.plain_linear_attention(D, None, 4, heads=2, dtype="float64"),
    "selective": mixers.selective_ssm(D, 5, dtype="float64"),
    "long convolution": mixers.gated_long_convolution(D, 6, dtype="float64"),
}
each_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


def advanced(layer, weights, x, pieces):
    state, outs, first = layer.start(weights, x.shape[0]), [], 0
    for size in pieces:
        out, state = layer.advance(weights, state, x[:, first : first + size])
        outs.append(out)
        first += size
    return np.concatenate(outs, axis=1), state


@each_layer
@pytest.mark.parametrize("pieces", [[21], [1] * 21, [9, 1, 1, 10]], ids=["prefill", "decode", "both"])
def test_prefill_and_decode_equal_training(layer, pieces):
    weights, x = layer.weights(np.random.default_rng(0)), normal(2, 21, D)
    assert_allclose(advanced(layer, weights, x, pieces)[0], layer.train(weights, x), rtol=0, atol=1e-10)


@each_layer
def test_no_layer_sees_the_future(layer):
    weights, x = layer.weights(np.random.default_rng(0)), normal(1, 21, D)
    changed = x.copy()
    changed[:, 13:] += 1
    assert_allclose(layer.train(weights, changed)[:, :13], layer.train(weights, x)[:, :13], rtol=0, atol=1e-12)


@each_layer
@pytest.mark.parametrize("tokens", [3, 21])
def test_the_state_counter_equals_the_bytes_of_the_arrays_held(layer, tokens):
    weights = layer.weights(np.random.default_rng(0))
    _, state = advanced(layer, weights, normal(2, tokens, D), [tokens])
    assert mixers.state_bytes(state) == 2 * 8 * layer.floats(tokens)  # two sequences, float64


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "softmax"])
def test_only_softmax_needs_more_for_more_tokens(name):
    assert LAYERS[name].floats(10) == LAYERS[name].floats(10**6)
    assert LAYERS["softmax"].floats(20) == 2 * LAYERS["softmax"].floats(10)


def test_the_reduced_stack_decodes_what_it_was_trained_to_say():
    layers = [LAYERS[name] for name in ("convolution", "linear", "window", "linear")]
    random = np.random.default_rng(0)
    weights = [layer.weights(random) for layer in layers]
    params = language_model(random, 11, D, weights, hidden=16, dtype="float64")
    tokens = random.integers(11, size=(2, 15))
    states = [layer.start(w, 2) for layer, w in zip(layers, weights, strict=True)]

    def remembering(place):
        def mix(weights, x):
            out, states[place] = layers[place].advance(weights, states[place], x)
            return out

        return mix

    steps = [logits(params, tokens[:, t : t + 1], [remembering(i) for i in range(4)]) for t in range(15)]
    want = logits(params, tokens, [layer.train for layer in layers])
    assert_allclose(np.concatenate(steps, axis=1), want, rtol=0, atol=1e-10)


# ---- recall ----------------------------------------------------------------------------------------------------------


def test_strong_keys_do_not_turn_the_series_into_softmax():
    assert recall.recall(256) == 1.0
    assert recall.recall(256, 8) < 0.6


def test_recall_falls_with_facts_and_rises_with_features():
    grid = np.array([[recall.recall(n, d) for n in (8, 32, 128, 256)] for d in (4, 8, 16, 24)])
    assert (np.diff(grid, axis=1) <= 0.02).all() and (np.diff(grid, axis=0) >= -0.02).all()
    assert grid[0, -1] < 0.2 and grid[-1, -1] > 0.98


def test_a_window_knows_the_last_facts_and_nothing_else():
    keys, codes = recall.facts(np.random.default_rng(0), 40, 16)
    known = recall.recalled_by_cache(keys, codes, window=10)
    assert known[-10:].all() and known[:30].mean() < 0.2


@pytest.mark.parametrize("window", [0, 16])
def test_numbers_of_a_recall_are_those_of_its_arrays(window):
    keys, codes = recall.facts(np.random.default_rng(0), 40, 8)
    values = recall.CODES[codes][None]
    held = based.chunked(keys, keys, values)[1].size
    if window:
        cache = based.cached_attention(based.empty_cache(keys, values, window), keys, keys, values, window)[1]
        held += cache[0].size + cache[1].size
    assert recall.state_numbers(8, window) == held


def test_unpacked_is_what_was_packed_to_half_an_interval():
    state, scale = normal(7, 1), np.full((7, 1), 2.0)
    packed = recall.message(state, scale, bits=5)
    assert packed.nbytes == 5  # 35 bits
    assert np.abs(recall.unpacked(packed, scale, 5) - state).max() <= 6 * 2.0 / 2**5 / 2 + 1e-12


@pytest.mark.parametrize("feature_dim", [1, 2, 4])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("count", [8, 64, 256])
def test_no_message_is_shorter_than_the_bound_of_index(count, bits, feature_dim):
    sent, error = recall.index_protocol(count, feature_dim, bits)
    assert sent >= recall.least_bits(count, error)


@pytest.mark.parametrize("count, error, bits", [(64, 0.0, 64), (64, 0.5, 0), (100, 0.11002786443836, 50)])
def test_the_bound_of_index_is_that_of_the_binary_symmetric_channel(count, error, bits):
    assert recall.least_bits(count, error) == pytest.approx(bits, abs=1e-6)


@pytest.mark.parametrize("sent", [0, 1, 31, 63, 64])
def test_sending_some_bits_and_guessing_the_rest_obeys_the_bound_and_knowing_the_rest_would_not(sent):
    assert sent >= recall.least_bits(64, (64 - sent) / 128) - 1e-9
    assert sent == 64 or sent < recall.least_bits(64, 0.0)


def test_more_state_and_finer_numbers_let_bob_err_less():
    errors = [recall.index_protocol(64, d, bits)[1] for d, bits in ((2, 1), (4, 1), (8, 1), (8, 8))]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.3 and errors[-1] < 0.25


# ---- recall that is learned ------------------------------------------------------------------------------------------


def test_the_kept_grid_lists_every_mixer_with_the_state_that_it_holds():
    states = {name: state for name, (state, _, _) in claims.grid().items()}
    assert states == {name: make().floats(trained.TOKENS) for name, make in trained.MIXERS.items()}


@pytest.mark.parametrize("name", trained.MIXERS)
def test_ten_steps_of_training_lower_the_loss_of_every_mixer(name):
    losses = trained.run(name, rate=1e-2, steps=10).losses
    assert losses[-1] < losses[0]


def test_the_same_seed_trains_the_same_model():
    one, two = (trained.run("Taylor d' = 2", steps=4) for _ in range(2))
    assert one.accuracy == two.accuracy
    assert_array_equal(one.losses, two.losses)


# ---- bytes and time --------------------------------------------------------------------------------------------------


def test_the_fused_prefill_reads_and_writes_what_the_formula_says():
    h, n, d, width = 16, 1024, 16, 64
    q, v = like((h, n, d), "float16"), like((h, n, width), "float16")
    state = h * (1 + d + d * d) * (width + 1)
    words = n * h * (2 * d + width) + n * h * width + state
    assert throughput.prefill_bytes(throughput.fused_prefill, q, q, v) == 2 * words


def test_the_unfused_prefill_moves_the_features_of_q_and_k_twice():
    q, v = like((16, 1024, 16), "float16"), like((16, 1024, 64), "float16")
    fused = 2 * 1024 * 16 * (2 * 16 + 2 * 64)
    extra = throughput.prefill_bytes(throughput.unfused_prefill, q, q, v) - fused
    assert extra == 2 * 2 * (2 * 1024 * 16 * 273)  # two arrays, written and read, of 2-byte words
    assert extra >= 2 * (2 * 1024 * 16 * 273)


def test_both_prefills_give_the_same_numbers():
    q, k, v = qkv(20)
    outs = [program(None, q, k, v) for program in (throughput.unfused_prefill, throughput.fused_prefill)]
    assert_allclose(*outs, rtol=0, atol=1e-9)


def test_a_step_of_decoding_takes_the_time_of_its_bytes():
    model, batch = throughput.TRANSFORMER, 8
    slow = hardware.Device("all memory", flops=np.inf, memory_bandwidth=1e12)
    weights, state = 2 * 1.31e9, batch * 2 * 2 * 24 * 2048  # bytes; of one token of context
    want = sum(weights + state * (context + 1) for context in range(100, 110)) / 1e12
    got = batch * 10 / throughput.tokens_per_second(model, batch, prompt=100, tokens=10, device=slow)
    assert got == pytest.approx(want, rel=1e-9)


def test_the_model_s_fixed_state_is_that_of_its_layers():
    model = throughput.BASED
    layers = 5 * [mixers.linear_attention(2048, 16, heads=16)] + 5 * [mixers.softmax(2048, 64)]
    layers += 14 * [mixers.gated_convolution(2048)]
    assert model.fixed() == sum(layer.floats(1) for layer in layers)


def test_a_batch_too_large_for_the_cache_is_refused_and_the_largest_is_not():
    most = throughput.largest_batch(throughput.TRANSFORMER)
    assert throughput.tokens_per_second(throughput.TRANSFORMER, most, tokens=1024) > 0
    with pytest.raises(OutOfDeviceMemory):
        throughput.tokens_per_second(throughput.TRANSFORMER, most + 1, tokens=1024)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: based.empty_cache(normal(1, 2, 3), normal(1, 2, 3), 0), "window of 0 tokens"),
        (lambda: based.empty_cache(normal(1, 2, 3), normal(1, 2, 3), -4), "window of -4 tokens"),
        (lambda: based.taylor_features(np.zeros((3, 0))), "d' is 0"),
        (lambda: based.linear_attention(*(np.zeros((1, 3, w)) for w in (0, 0, 2))), "d' = 0"),
        (lambda: based.read(None, normal(1, 1, 4)), "prefill first"),
        (lambda: based.cached_attention(None, *qkv(1)), "no cache yet"),
        (lambda: based.chunked(*qkv(4), chunk=0), "chunk of 0 tokens"),
        (lambda: based.linear_attention(normal(1, 3, 4), normal(1, 5, 4), normal(1, 5, 4)), "3 queries and 5 keys"),
        (lambda: based.chunked(normal(1, 3, 4), normal(1, 5, 4), normal(1, 5, 4)), "3 queries and 5 keys"),
        (lambda: based.linear_attention(normal(1, 3, 4), normal(2, 3, 4), normal(2, 3, 4)), "heads"),
        (lambda: based.recurrent(normal(1, 3, 4), normal(1, 5, 4), normal(1, 5, 4)), "3 queries and 5 keys"),
        (lambda: mixers.softmax(10, heads=4), "10 channels do not divide into 4 heads"),
        (lambda: mixers.linear_attention(10, 4, heads=4), "10 channels do not divide into 4 heads"),
        (lambda: selective_scan(*normal(2, 1, 3, 4), *normal(3, 3, 4)), "selective_scan"),
        (lambda: recall.facts(np.random.default_rng(0), 0, 4), "0 facts"),
    ],
)
def test_what_makes_no_sense_is_refused_by_number(call, words):
    with pytest.raises(ShapeError, match=words):
        call()


def test_seeds_fix_every_experiment():
    assert recall.recall(64, 8, seed=3) == recall.recall(64, 8, seed=3) != recall.recall(64, 8, seed=4)
    assert_array_equal(recall.index_protocol(32, 2, 2), recall.index_protocol(32, 2, 2))
