"""Layers equal torch's, Adam equals torch's, and MQAR has the properties that zoology's text gives it."""

import autograd.numpy as anp
import numpy as np
import pytest
import torch
from autograd import grad
from autograd.test_util import check_grads
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import chisquare

from toolkit.learn import layers
from toolkit.learn.optimise import adam, rate_at
from toolkit.learn.recall import mqar, without_replacement
from toolkit.learn.stack import count, language_model, logits
from toolkit.runtime.errors import ShapeError


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def tensors(*arrays):
    return [torch.from_numpy(a) for a in arrays]


# ---- layers ----------------------------------------------------------------------------------------------------------


def test_rms_norm_equals_torchs():
    x, gain = normal(2, 5, 8), normal(8, seed=1)
    want = torch.nn.functional.rms_norm(*tensors(x), (8,), *tensors(gain), eps=1e-6)
    assert_allclose(layers.rms_norm(x, gain), want, rtol=0, atol=1e-12)


def test_silu_equals_torchs_and_does_not_overflow():
    x = np.array([-1e4, -3.0, 0.0, 0.5, 1e4])
    with np.errstate(over="raise"):
        assert_allclose(layers.silu(x), torch.nn.functional.silu(*tensors(x)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_softmax_attention_equals_torchs(causal):
    q, k, v = normal(3, 2, 4, 9, 8)
    want = torch.nn.functional.scaled_dot_product_attention(*tensors(q, k, v), is_causal=causal)
    got = layers.softmax_attention(q, k, v, None if causal else np.ones((9, 9), bool))
    assert_allclose(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", [1, 3, 12])
def test_short_convolution_equals_torchs_padded_on_the_left(width):
    x, kernel = normal(2, 10, 4), normal(width, 4, seed=1)
    x_t, kernel_t = tensors(x.transpose(0, 2, 1).copy(), kernel[::-1].T[:, None].copy())
    want = torch.nn.functional.conv1d(torch.nn.functional.pad(x_t, (width - 1, 0)), kernel_t, groups=4)
    assert_allclose(layers.short_convolution(x, kernel), want.numpy().transpose(0, 2, 1), rtol=0, atol=1e-12)


def test_cross_entropy_equals_torchs_at_the_masked_places():
    logits, mask = normal(3, 7, 11), normal(3, 7, seed=1) > 0
    targets = np.random.default_rng(2).integers(11, size=(3, 7))
    want = torch.nn.functional.cross_entropy(*tensors(logits[mask], targets[mask]))
    assert layers.cross_entropy(logits, targets, mask) == pytest.approx(float(want), abs=1e-12)


def test_logits_outside_the_mask_get_no_gradient_at_all():
    mask = np.zeros((1, 4), bool)
    mask[0, 2] = True
    g = grad(layers.cross_entropy)(normal(1, 4, 5), np.ones((1, 4), int), mask)
    assert np.flatnonzero(np.abs(g).sum(axis=2)).tolist() == [2]


def test_rotary_makes_scores_depend_on_the_distance_alone():
    q, k = normal(2, 1, 8)
    near, far = (layers.rotary(q, np.array([a])) @ layers.rotary(k, np.array([b])).T for a, b in ((5, 3), (105, 103)))
    assert_allclose(near, far, rtol=0, atol=1e-12)


def test_rotary_is_multiplication_by_a_unit_complex_number():
    x = normal(6, 8)
    turned = (x[:, :4] + 1j * x[:, 4:]) * np.exp(1j * np.arange(6)[:, None] * 100.0 ** (-np.arange(4) / 4))
    want = np.concatenate([turned.real, turned.imag], axis=1)
    assert_allclose(layers.rotary(x, base=100.0), want, rtol=0, atol=1e-12)


def test_heads_split_and_merge_back():
    x = normal(2, 5, 12)
    heads = layers.split_heads(x, 3)
    assert_array_equal(heads[1, 2, 4], x[1, 4, 8:])
    assert_array_equal(layers.merge_heads(heads), x)


def test_12_channels_on_5_heads_are_refused_by_number():
    with pytest.raises(ShapeError, match="12 channels do not divide into 5 heads"):
        layers.split_heads(normal(1, 2, 12), 5)


def test_a_linear_layer_keeps_unit_variance():
    y = normal(400, 256) @ layers.linear(np.random.default_rng(1), 256, 300, "float64")
    assert y.std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    "layer, arrays",
    [
        (layers.rms_norm, (normal(1, 3, 4), normal(4))),
        (layers.swiglu, (normal(1, 3, 4), normal(4, 6), normal(4, 6, seed=1), normal(6, 4))),
        (layers.short_convolution, (normal(1, 5, 2), normal(3, 2))),
        (layers.rotary, (normal(1, 5, 4),)),
        (layers.softmax_attention, tuple(normal(3, 1, 2, 5, 4))),
    ],
)
def test_gradients_agree_with_finite_differences(layer, arrays):
    check_grads(layer, modes=["rev"], order=1)(*arrays)


@pytest.mark.parametrize("layer", [layers.silu, layers.rotary, lambda x: layers.softmax_attention(x, x, x)])
def test_float32_stays_float32(layer):
    assert layer(normal(2, 3, 4).astype("float32")).dtype == "float32"


# ---- Adam ------------------------------------------------------------------------------------------------------------


def squared_error(params, x, y):
    return anp.mean((x @ params["w"] + params["b"] - y) ** 2)


def test_adam_takes_the_steps_of_torchs_adamw():
    x, y, w = normal(20, 3), normal(20, 2, seed=1), normal(3, 2, seed=2)
    options = dict(steps=9, rate=0.01, schedule="constant", clip=np.inf, decay=0.1, betas=(0.9, 0.98))
    got, losses = adam(squared_error, {"w": w, "b": np.zeros(2)}, lambda random: (x, y), **options)

    weight, bias = (torch.from_numpy(a.copy()).requires_grad_() for a in (w, np.zeros(2)))
    rival = torch.optim.AdamW([weight, bias], lr=0.01, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1)
    for loss in losses:  # no rise within nine steps
        value = ((tensors(x)[0] @ weight + bias - tensors(y)[0]) ** 2).mean()
        assert float(value.detach()) == pytest.approx(loss, abs=1e-12)
        rival.zero_grad()
        value.backward()
        rival.step()
    assert_allclose(got["w"], weight.detach(), rtol=0, atol=1e-10)
    assert_allclose(got["b"], bias.detach(), rtol=0, atol=1e-10)


def test_adam_leaves_the_given_parameters_alone():
    w = normal(3, 2)
    before = w.copy()
    adam(squared_error, {"w": w, "b": np.zeros(2)}, lambda random: (normal(4, 3), normal(4, 2)), steps=3)
    assert_array_equal(w, before)


def test_the_same_seed_gives_the_same_losses_and_another_one_does_not():
    def losses(seed):
        data = lambda random: (random.standard_normal((4, 3)), np.ones((4, 2)))  # noqa: E731
        return adam(squared_error, {"w": normal(3, 2), "b": np.zeros(2)}, data, steps=5, seed=seed)[1]

    assert_array_equal(losses(1), losses(1))
    assert (losses(1) != losses(2)).any()


def test_cosine_starts_after_a_rise_and_ends_near_zero():
    rates = [rate_at(step, 100) for step in range(100)]
    assert np.argmax(rates) == 9
    assert rates[0] == pytest.approx(0.1) and rates[-1] < 1e-3


def test_a_loss_that_explodes_names_its_step():
    with pytest.raises(FloatingPointError, match="nan at step 0"):
        adam(lambda w: anp.sum(w) * np.nan, np.ones(2), lambda random: (), steps=1)


# ---- MQAR ------------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), pairs=st.integers(1, 8), spare=st.integers(0, 20))
@settings(max_examples=40, deadline=None)
def test_each_repeated_key_has_the_value_that_followed_it(seed, pairs, spare):
    inputs, targets, mask = mqar(np.random.default_rng(seed), 4, 4 * pairs + 2 * spare, pairs, 40)
    for row, wanted, asked in zip(inputs, targets, mask, strict=True):
        facts = dict(zip(row[0 : 2 * pairs : 2].tolist(), row[1 : 2 * pairs : 2].tolist(), strict=True))
        assert len(facts) == pairs and max(facts) < 20 <= min(facts.values())
        assert sorted(row[asked]) == sorted(facts)  # each key once
        assert [facts[key] for key in row[asked].tolist()] == wanted[asked].tolist()
        assert asked.sum() == pairs and not asked[: 2 * pairs].any() and not wanted[~asked].any()


def test_with_a_small_power_most_keys_come_back_early():
    near, even = (mqar(np.random.default_rng(0), 200, 128, 4, 64, power)[2][:, 8:68].mean() for power in (0.01, 1.0))
    assert near > 1.5 * even


def test_draws_without_replacement_have_the_probabilities_of_their_weights():
    weights = np.array([1.0, 2.0, 3.0, 4.0])
    rows = without_replacement(np.random.default_rng(0), weights, 20_000, 2)
    first, pairs = np.bincount(rows[:, 0]), np.bincount(4 * rows[:, 0] + rows[:, 1], minlength=16).reshape(4, 4)
    assert chisquare(first, 20_000 * weights / 10).pvalue > 0.001
    want = weights[:, None] / 10 * weights / (10 - weights[:, None])
    off = ~np.eye(4, dtype=bool)
    assert chisquare(pairs[off], 20_000 * want[off]).pvalue > 0.001 and not pairs[~off].any()


@pytest.mark.parametrize("tokens, pairs, vocabulary", [(15, 2, 64), (14, 4, 64), (64, 16, 32), (8, 0, 64)])
def test_mqar_refuses_sizes_that_leave_no_room(tokens, pairs, vocabulary):
    with pytest.raises(ShapeError):
        mqar(np.random.default_rng(0), 1, tokens, pairs, vocabulary)


# ---- the stack -------------------------------------------------------------------------------------------------------


def mean_of_the_past(weights, x):
    tokens = x.shape[1]
    return (np.tri(tokens) / np.arange(1, tokens + 1)[:, None]) @ x @ weights["w"]


def model(hidden):
    random = np.random.default_rng(0)
    return language_model(random, 11, 8, [{"w": normal(8, 8)}, {"w": normal(8, 8, seed=1)}], hidden, "float64")


def test_the_stack_equals_the_same_model_written_in_torch():
    params, tokens = model(hidden=12), np.random.default_rng(1).integers(11, size=(2, 5))
    norm = lambda x, gain: torch.nn.functional.rms_norm(x, (8,), *tensors(gain), eps=1e-6)  # noqa: E731
    x = torch.nn.functional.embedding(*tensors(tokens, params["embedding"]))
    for layer in params["layers"]:
        past = norm(x, layer["norm"]).cumsum(1) / torch.arange(1, 6)[:, None]
        x = x + past @ tensors(layer["mixer"]["w"])[0]
        y, (gate, up, down) = norm(x, layer["mlp_norm"]), tensors(*layer["mlp"])
        x = x + (torch.nn.functional.silu(y @ gate) * (y @ up)) @ down
    want = norm(x, params["norm"]) @ tensors(params["unembedding"])[0]
    assert_allclose(logits(params, tokens, [mean_of_the_past] * 2), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("hidden, parameters", [(None, 2 * 11 * 8 + 2 * 64 + 3 * 8), (12, 176 + 128 + 40 + 6 * 96)])
def test_parameters_are_counted(hidden, parameters):
    assert count(model(hidden)) == parameters


def test_a_small_stack_learns_to_copy_the_token_before():
    random = np.random.default_rng(0)
    params = language_model(random, 8, 16, [{"kernel": random.standard_normal((2, 16)).astype("float32")}])
    mixers = [lambda weights, x: layers.short_convolution(x, weights["kernel"])]

    def data(random):
        tokens = random.integers(8, size=(32, 10))
        return tokens, np.roll(tokens, 1, axis=1), np.arange(10)[None] + 0 * tokens > 0

    def loss(params, tokens, targets, mask):
        return layers.cross_entropy(logits(params, tokens, mixers), targets, mask)

    params, losses = adam(loss, params, data, steps=150, rate=0.03)
    tokens, targets, mask = data(np.random.default_rng(1))
    assert losses[0] > 1.9 and layers.accuracy(logits(params, tokens, mixers), targets, mask) == 1
