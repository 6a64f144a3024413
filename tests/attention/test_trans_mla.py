"""TransMLA: exact conversion, its strictness, RoRoPE, the compression, absorbed decoding and what it caches."""

from itertools import pairwise

import numpy as np
import pytest
from autograd import grad
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from reference import dense_attention
from toolkit.attention import _trans_mla_decode as decoding
from toolkit.attention import _trans_mla_layers as layers
from toolkit.attention import _trans_mla_model as tiny
from toolkit.attention import _trans_mla_strict as strict
from toolkit.attention import trans_mla
from toolkit.attention._trans_mla_layers import GQA
from toolkit.learn.layers import cross_entropy
from toolkit.learn.stack import count
from toolkit.runtime import Cluster, hardware, like, per_rank, topology
from toolkit.runtime.errors import OutOfDeviceMemory, ShapeError

HIDDEN, HEADS, HEAD_DIM, TOKENS = 24, 8, 8, 40


def layer(kv_heads=4, heads=HEADS, rope=True, seed=0, hidden=HIDDEN, head_dim=HEAD_DIM):
    random = np.random.default_rng(seed)

    def weights(*shape):
        return random.standard_normal(shape) / np.sqrt(shape[-2])

    theta = layers.frequencies(head_dim) if rope else np.zeros(head_dim // 2)
    keys = weights(kv_heads, hidden, head_dim), weights(kv_heads, hidden, head_dim)
    return GQA(weights(heads, hidden, head_dim), *keys, weights(heads, head_dim, hidden), theta)


def inputs(tokens=TOKENS, hidden=HIDDEN, seed=1):
    """Correlated channels, as a real layer's are."""
    random = np.random.default_rng(seed)
    return random.standard_normal((tokens, hidden)) @ (random.standard_normal((hidden, hidden)) / hidden**0.5)


def turned(a, theta):
    """RoPE with complex numbers: an implementation of its own."""
    half = a.shape[-1] // 2
    z = (a[..., :half] + 1j * a[..., half:]) * np.exp(1j * np.arange(a.shape[-2])[:, None] * theta)
    return np.concatenate([z.real, z.imag], axis=-1)


def reference(gqa, x):
    """The layer by the definition, through the tests' dense attention."""
    q, k, v = (np.einsum("ti,hid->htd", x, w) for w in gqa[:3])
    out, _ = dense_attention(turned(q, gqa.theta), turned(k, gqa.theta), v, causal=True)
    return np.einsum("htd,hdi->ti", out, gqa.w_o)


def error(a, b):
    return np.abs(a - b).max()


# ---- the exact conversion --------------------------------------------------------------------------------------------

CONVERSIONS = {"singular values": trans_mla.exact, "replication": trans_mla.exact_by_replication}


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_grouped_attention_is_the_dense_definition(kv_heads):
    gqa, x = layer(kv_heads), inputs()
    assert_allclose(layers.grouped_attention(gqa, x), reference(gqa, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("rope", [False, True], ids=["no RoPE", "RoPE"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_the_exact_conversion_computes_the_same_function(convert, kv_heads, rope):
    gqa, x = layer(kv_heads, rope=rope), inputs()
    assert_allclose(layers.factored_attention(convert(gqa), x), reference(gqa, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_the_exact_conversion_caches_as_many_words_as_before(convert):
    gqa, x = layer(2), inputs()
    converted = convert(gqa)
    cached = x @ converted.down_k, x @ converted.down_v
    before = [np.einsum("ti,hid->htd", x, w) for w in (gqa.w_k, gqa.w_v)]
    assert sum(a.nbytes for a in cached) == sum(a.nbytes for a in before) == 2 * 2 * HEAD_DIM * TOKENS * 8


@settings(max_examples=25, deadline=None)
@given(kv_heads=st.sampled_from([1, 2, 3]), group=st.integers(1, 4), seed=st.integers(0, 1000))
def test_replication_multiplies_singular_values_by_the_root_of_the_group(kv_heads, group, seed):
    gqa = layer(kv_heads, kv_heads * group, seed=seed)
    wide = np.concatenate(list(trans_mla.replicate(gqa.w_k, kv_heads * group)), axis=1)
    s = np.linalg.svd(wide, compute_uv=False)
    narrow = np.linalg.svd(np.concatenate(list(gqa.w_k), axis=1), compute_uv=False)
    assert_allclose(s[: narrow.size], np.sqrt(group) * narrow, atol=1e-12)
    assert_allclose(s[narrow.size :], 0, atol=1e-12)


def test_singular_value_factors_are_balanced():
    down, up = trans_mla.factored(layer(2).w_k, HEADS)
    wide = np.concatenate(list(up), axis=1)
    assert_allclose(down.T @ down, wide @ wide.T, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_a_truncated_factor_is_the_best_of_its_rank(rank):
    w = layer(2).w_k
    down, up = trans_mla.factored(w, HEADS, rank)
    wide = np.concatenate(list(trans_mla.replicate(w, HEADS)), axis=1)
    missing = np.linalg.svd(wide, compute_uv=False)[rank:]
    assert np.linalg.norm(down @ np.concatenate(list(up), axis=1) - wide) == pytest.approx(np.linalg.norm(missing))


def test_repeating_the_wrong_heads_is_caught():
    gqa, x = layer(2), inputs()
    wrong = gqa._replace(w_k=gqa.w_k[np.arange(HEADS) % 2])  # tiled instead of repeated
    assert error(layers.grouped_attention(wrong, x), reference(gqa, x)) > 1e-3


# ---- strictness ------------------------------------------------------------------------------------------------------

OFFSETS = (0, 1, 2, 5)


def small(kv_heads, rope, head_specific, seed=0):
    gqa = layer(kv_heads, heads=4, rope=rope, seed=seed, hidden=12, head_dim=4)
    converted = trans_mla.exact(gqa)
    if head_specific:
        random = np.random.default_rng(seed + 1)
        converted = converted._replace(up_k=random.standard_normal(converted.up_k.shape))
    return converted


def residuals(converted, kv_heads, offsets, starts, sweeps=100):
    maps = strict.score_maps(converted, offsets)
    fits = [strict.fit_grouped(maps, converted.theta, offsets, kv_heads, s, sweeps)[0] for s in range(starts)]
    return maps, np.array(fits) / np.linalg.norm(maps)


def test_score_maps_are_the_scores():
    converted, x = small(2, rope=True, head_specific=True), inputs(6, hidden=12)
    q = turned(np.einsum("ti,hid->htd", x, converted.w_q), converted.theta)
    k = turned(np.einsum("tr,hrd->htd", x @ converted.down_k, converted.up_k), converted.theta)
    maps = strict.score_maps(converted, range(6))
    for t, s in ((0, 0), (3, 1), (5, 0)):
        assert_allclose(x[t] @ maps[:, t - s] @ x[s], np.sum(q[:, t] * k[:, s], axis=-1), atol=1e-12)


@pytest.mark.parametrize("rope, sweeps", [(False, 20), (True, 2000)])
def test_a_converted_layer_goes_back_without_residual(rope, sweeps):
    offsets = OFFSETS if rope else (0,)
    _, found = residuals(small(2, rope, head_specific=False), 2, offsets, starts=2, sweeps=sweeps)
    assert found.min() < 1e-6


def test_keys_of_two_heads_lie_their_distance_over_root_two_from_any_shared_key():
    one, two = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0].reshape(8, 2, 4).swapaxes(0, 1)
    assert strict.distance_of_keys(np.stack([one, two]), 1) == pytest.approx(np.linalg.norm(one - two) / np.sqrt(2))
    assert np.linalg.norm(one - two) == pytest.approx(np.sqrt(8))  # orthogonal blocks


def test_no_shared_key_of_twenty_searches_comes_nearer_than_the_closed_form():
    from scipy.optimize import minimize

    keys = np.random.default_rng(0).standard_normal((2, 6, 4))
    bound = strict.distance_of_keys(keys, 1)

    def far(shared):
        return np.linalg.norm(keys - shared.reshape(1, 6, 4))

    found = [minimize(far, np.random.default_rng(s).standard_normal(24)).fun for s in range(20)]
    assert bound == pytest.approx(min(found), abs=1e-6)
    assert min(found) >= bound - 1e-12 > 1


def test_without_rope_twenty_fits_of_a_grouped_layer_end_at_the_closed_form():
    converted = small(2, rope=False, head_specific=True)
    maps, found = residuals(converted, 2, (0,), starts=20)
    bound = strict.distance_of_scores(maps, 2, 4) / np.linalg.norm(maps)
    assert_allclose(found, bound, rtol=1e-6)
    assert bound > 0.1


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_with_rope_twenty_fits_of_a_grouped_layer_stay_above_a_tenth(kv_heads):
    maps, found = residuals(small(kv_heads, rope=True, head_specific=True), kv_heads, OFFSETS, starts=20)
    assert found.min() >= strict.distance_of_scores(maps, kv_heads, 4) / np.linalg.norm(maps) - 1e-12
    assert found.min() > 0.1


def test_without_rope_one_key_head_loses_nothing_because_queries_absorb_the_difference():
    """The keys differ from head to head, the function does not: the card's certificate is about keys."""
    converted = small(1, rope=False, head_specific=True)
    keys = converted.down_k @ converted.up_k
    absorbed = GQA(
        converted.w_q @ converted.up_k.swapaxes(1, 2),
        converted.down_k[None],
        converted.down_v[None],
        converted.up_v @ converted.w_o,
        converted.theta,
    )
    x = inputs(hidden=12)
    assert strict.distance_of_keys(keys, 1) > 1
    assert error(layers.grouped_attention(absorbed, x), layers.factored_attention(converted, x)) < 1e-10


def test_where_heads_share_nothing_a_latent_layer_is_a_multi_head_layer():
    converted, x = trans_mla.exact(layer(HEADS)), inputs()
    random = np.random.default_rng(1)
    converted = converted._replace(up_k=random.standard_normal(converted.up_k.shape))
    w_k, w_v = converted.down_k @ converted.up_k, converted.down_v @ converted.up_v
    plain = GQA(converted.w_q, w_k, w_v, converted.w_o, converted.theta)
    assert_allclose(layers.factored_attention(converted, x), reference(plain, x), rtol=0, atol=1e-9)


# ---- RoRoPE ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_rorope_leaves_the_output_at_every_position(kv_heads):
    gqa, x = layer(kv_heads), inputs()
    u = trans_mla.principal_mixture(gqa, x)
    assert_allclose(layers.grouped_attention(trans_mla.mixed_heads(gqa, u), x), reference(gqa, x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("fold", [1, 2, 4])
def test_mixtures_are_orthogonal(fold):
    u = trans_mla.principal_mixture(layer(4), inputs(), fold)
    assert_allclose(u.swapaxes(1, 2) @ u, np.broadcast_to(np.eye(4 * fold), u.shape), atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(kv_heads=st.sampled_from([1, 2, 4, 8]), seed=st.integers(0, 1000))
def test_rorope_never_lowers_the_energy_of_the_first_head(kv_heads, seed):
    gqa, x = layer(kv_heads, seed=seed), inputs(seed=seed + 1)
    before = trans_mla.energy(gqa, x, trans_mla.no_mixture(gqa))
    after = trans_mla.energy(gqa, x, trans_mla.principal_mixture(gqa, x))
    assert after[0] >= before.max() - 1e-12
    assert after.sum() == pytest.approx(before.sum())


@pytest.mark.parametrize("kv_heads", [2, 4, 8])
def test_folding_gathers_more_energy_in_the_first_head(kv_heads):
    gqa, x = layer(kv_heads), inputs()
    shares = [trans_mla.energy(gqa, x, trans_mla.principal_mixture(gqa, x, fold))[0] for fold in (1, 2, 4)]
    assert all(less <= more + 1e-12 for less, more in pairwise(shares))


def test_energy_of_unmixed_heads_is_their_share_of_the_squared_keys():
    gqa, x = layer(4), inputs()
    squares = (np.einsum("ti,hid->htd", x, gqa.w_k) ** 2).sum((1, 2))
    assert_allclose(trans_mla.energy(gqa, x, trans_mla.no_mixture(gqa)), squares / squares.sum())


@pytest.mark.parametrize("fold", [2, 4])
def test_folding_planes_of_one_speed_is_exact(fold):
    gqa, x = layer(4), inputs()
    gqa = gqa._replace(theta=np.repeat(gqa.theta[::fold], fold))
    mixed = trans_mla.mixed_heads(gqa, trans_mla.principal_mixture(gqa, x, fold))
    assert_allclose(layers.grouped_attention(mixed, x), reference(gqa, x), rtol=0, atol=1e-9)


def test_folding_is_not_exact():
    gqa, x = layer(4), inputs()
    u = trans_mla.principal_mixture(gqa, x, fold=4)
    assert error(layers.grouped_attention(trans_mla.mixed_heads(gqa, u), x), reference(gqa, x)) > 1e-2


def rotated_by_hand(gqa, x, u_re, u_im):
    """Keys and queries of all planes mixed across heads, each coordinate of a plane by its own matrix."""
    kv_heads, half = gqa.w_k.shape[0], gqa.theta.size
    group = HEADS // kv_heads
    q, k, v = (np.einsum("ti,hid->htd", x, w) for w in gqa[:3])
    spread = np.zeros((HEADS, kv_heads, len(x), HEAD_DIM))
    for h in range(HEADS):
        spread[h, h // group] = q[h]
    mixed_q, mixed_k = np.empty_like(spread), np.empty_like(k)
    for plane in range(half):
        for c, u in ((plane, u_re[plane]), (plane + half, u_im[plane])):
            mixed_q[..., c] = np.einsum("hjt,jc->hct", spread[..., c], u)
            mixed_k[..., c] = np.einsum("jt,jc->ct", k[..., c], u)
    scores = np.einsum("hjtd,jsd->hts", turned(mixed_q, gqa.theta), turned(mixed_k, gqa.theta)) / np.sqrt(HEAD_DIM)
    weights = np.where(np.tri(len(x), dtype=bool), np.exp(scores - scores.max(-1, keepdims=True)), 0)
    out = weights / weights.sum(-1, keepdims=True) @ np.repeat(v, group, axis=0)
    return np.einsum("htd,hdi->ti", out, gqa.w_o)


def test_one_mixture_for_both_coordinates_of_a_plane_commutes_with_rope_and_two_do_not():
    gqa, x = layer(4), inputs()
    random = np.random.default_rng(3)
    u = np.linalg.qr(random.standard_normal((4, 4, 4)))[0]
    other = np.linalg.qr(random.standard_normal((4, 4, 4)))[0]
    assert error(rotated_by_hand(gqa, x, u, u), reference(gqa, x)) < 1e-9
    assert error(rotated_by_hand(gqa, x, u, other), reference(gqa, x)) > 1e-2


def test_turning_keys_but_not_queries_is_caught():
    gqa, x = layer(4), inputs()
    mixed = trans_mla.mixed_heads(gqa, trans_mla.principal_mixture(gqa, x))
    plain = trans_mla.mixed_heads(gqa, trans_mla.no_mixture(gqa))
    assert error(layers.grouped_attention(mixed._replace(w_q=plain.w_q), x), reference(gqa, x)) > 1e-2


# ---- partial RoPE and compression ------------------------------------------------------------------------------------

CHOICES = [(8, 1), (8, 2), (8, 4), (4, 2), (4, 4), (2, 4)]  # rope_dims, fold


@pytest.mark.parametrize("rope_dims, fold", CHOICES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_where_nothing_turns_dropping_rope_changes_nothing(kv_heads, rope_dims, fold):
    """With all angles 0 the decoupled form, its mixtures and their inverses must be the original layer."""
    gqa, x = layer(kv_heads, rope=False), inputs()
    full = trans_mla.partial_rope(gqa, trans_mla.principal_mixture(gqa, x, fold), rope_dims)
    assert_allclose(layers.latent_attention(full, x), reference(gqa, x), rtol=0, atol=1e-9)


def test_one_key_head_without_folding_keeps_all_of_its_rope():
    gqa, x = layer(1), inputs()
    full = trans_mla.partial_rope(gqa, trans_mla.principal_mixture(gqa, x), HEAD_DIM)
    assert_allclose(layers.latent_attention(full, x), reference(gqa, x), rtol=0, atol=1e-9)


def test_where_one_component_holds_all_keys_partial_rope_is_exact():
    """Key heads that are multiples of one head: RoRoPE finds it, and the heads without mixture do not."""
    gqa, x = layer(4), inputs()
    gqa = gqa._replace(w_k=gqa.w_k[:1] * np.array([1.0, -0.5, 2.0, 0.3])[:, None, None])
    u = trans_mla.principal_mixture(gqa, x)
    assert_allclose(layers.latent_attention(trans_mla.partial_rope(gqa, u, 8), x), reference(gqa, x), atol=1e-9)
    plain = trans_mla.partial_rope(gqa, trans_mla.no_mixture(gqa), 8)
    assert error(layers.latent_attention(plain, x), reference(gqa, x)) > 1e-2


@pytest.mark.parametrize("rope_dims, fold", CHOICES)
def test_full_rank_compresses_without_error(rope_dims, fold):
    gqa, x = layer(2), inputs()
    full = trans_mla.partial_rope(gqa, trans_mla.principal_mixture(gqa, x, fold), rope_dims)
    rank = full.down.shape[1]
    assert rank == 2 * 2 * HEAD_DIM - rope_dims
    want = layers.latent_attention(full, x)
    assert_allclose(layers.latent_attention(trans_mla.compress(full, x, rank), x), want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("balance", [False, True])
def test_reconstruction_error_falls_with_rank_as_the_spectrum_says(balance):
    gqa, x = layer(2), inputs(200)
    full = trans_mla.partial_rope(gqa, trans_mla.principal_mixture(gqa, x), 8)
    scale = np.ones(24)
    scale[:8] = trans_mla.key_to_value_ratio(full, x) if balance else 1
    spectrum = np.linalg.svd(x @ full.down / scale, compute_uv=False)
    wide_up = np.concatenate([*full.up_k, *full.up_v], axis=1)
    back = np.linalg.pinv(wide_up)  # from all heads' keys and values to the latent
    missing = []
    for rank in range(1, 25):
        small = trans_mla.compress(full, x, rank, balance)
        latent = x @ small.down @ np.concatenate([*small.up_k, *small.up_v], axis=1) @ back
        missing.append(np.linalg.norm((latent - x @ full.down) / scale))
        assert missing[-1] == pytest.approx(np.linalg.norm(spectrum[rank:]), abs=1e-9)
    assert all(more >= less - 1e-9 for more, less in pairwise(missing))


def test_output_error_does_not_grow_with_rank():
    gqa, x = layer(2), inputs(200)
    full = trans_mla.partial_rope(gqa, trans_mla.principal_mixture(gqa, x), 8)
    want = layers.latent_attention(full, x)
    norms = [np.linalg.norm(layers.latent_attention(trans_mla.compress(full, x, r), x) - want) for r in (4, 8, 16, 24)]
    assert all(more > less for more, less in pairwise(norms))


@pytest.mark.parametrize("seed", range(5))
def test_balance_lowers_the_output_error_where_keys_are_much_larger_than_values(seed):
    gqa, x = layer(4, seed=seed), inputs(200, seed=seed + 1)
    gqa = gqa._replace(w_k=10 * gqa.w_k, w_q=0.1 * gqa.w_q)
    full = trans_mla.partial_rope(gqa, trans_mla.principal_mixture(gqa, x), 8)
    want = layers.latent_attention(full, x)
    balanced, not_balanced = (
        np.linalg.norm(layers.latent_attention(trans_mla.compress(full, x, 16, balance), x) - want)
        for balance in (True, False)
    )
    assert balanced < 0.8 * not_balanced


def test_the_ratio_is_that_of_mean_column_norms():
    gqa, x = layer(2), inputs()
    full = trans_mla.partial_rope(gqa, trans_mla.no_mixture(gqa), 8)
    k, v = (np.einsum("ti,hid->thd", x, w) for w in (gqa.w_k, gqa.w_v))
    keys = np.linalg.norm(k[:, 1], axis=0)  # head 0 goes on turning
    values = np.linalg.norm(v, axis=0)
    assert trans_mla.key_to_value_ratio(full, x) == pytest.approx(keys.mean() / values.mean())


def test_centring_would_not_be_the_same():
    """Proof that the second moment is not centred: a constant in the inputs must be kept, and is."""
    gqa, x = layer(2), inputs(200) * 0.01 + 3.0
    full = trans_mla.partial_rope(gqa, trans_mla.principal_mixture(gqa, x), 8)
    small = trans_mla.compress(full, x, 1)
    latent = np.linalg.norm(x @ small.down)
    ratio = np.r_[np.full(8, trans_mla.key_to_value_ratio(full, x)), np.ones(16)]
    assert latent == pytest.approx(np.linalg.norm(x @ full.down / ratio), rel=1e-3)


def test_the_converter_is_its_three_steps():
    gqa, x = layer(4), inputs()
    whole = trans_mla.convert(gqa, x, 4, 20, fold=4)
    full = trans_mla.partial_rope(gqa, trans_mla.principal_mixture(gqa, x, 4), 4)
    assert_array_equal(whole.down, trans_mla.compress(full, x, 20).down)
    assert whole.down.shape == (HIDDEN, 20) and whole.w_k_rope.shape == (HIDDEN, 4)


def test_pooled_key_heads_are_means():
    gqa = layer(4)
    assert_allclose(trans_mla.pooled(gqa, 2).w_k[1], (gqa.w_k[2] + gqa.w_k[3]) / 2)


# ---- decoding --------------------------------------------------------------------------------------------------------


def decoded(weights, x, ranks, step, batch=2):
    """Every token in turn through `step`; returns the run. x (batch, tokens, hidden)."""

    def program(comm, mine, x, cache):
        return np.stack([step(comm, mine, x[:, t].copy(), cache, t) for t in range(x.shape[1])], axis=1)

    dealt = decoding.shares(weights, ranks)
    caches = [decoding.empty_cache(share, batch, x.shape[1]) for share in dealt]
    machine = topology.full_mesh(ranks, hardware.NVLINK4) if ranks > 1 else topology.ring(1, hardware.NVLINK4)
    return Cluster(machine, hardware.H100).run(program, per_rank(dealt), x, per_rank(caches))


@pytest.mark.parametrize("rope_dims, fold", CHOICES)
def test_absorbed_decoding_equals_the_expanded_form(rope_dims, fold):
    x = np.stack([inputs(20, seed=5), inputs(20, seed=6)])
    mla = trans_mla.convert(layer(4), x.reshape(-1, HIDDEN), rope_dims, 20, fold)
    assert_allclose(decoded(mla, x, 1, decoding.latent_step).outputs[0], layers.latent_attention(mla, x), atol=1e-9)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_heads_dealt_out_to_ranks_give_the_same_output(ranks):
    gqa, x = layer(2), np.stack([inputs(12, seed=5), inputs(12, seed=6)])
    mla = trans_mla.convert(gqa, x.reshape(-1, HIDDEN), 8, 16)
    latent, grouped = decoded(mla, x, ranks, decoding.latent_step), decoded(gqa, x, ranks, decoding.grouped_step)
    for rank in range(ranks):
        assert_allclose(latent.outputs[rank], layers.latent_attention(mla, x), atol=1e-9)
        assert_allclose(grouped.outputs[rank], [reference(gqa, row) for row in x], atol=1e-9)


def cached_bytes(weights, ranks, step, hidden=HIDDEN, batch=3, tokens=100, dtype="float16"):
    """Bytes of cache on each rank, from peak memory: with room for `tokens`, less with room for one."""

    def peak(capacity):
        dealt = decoding.shares(weights, ranks)
        caches = [decoding.empty_cache(share, batch, capacity, dtype, like) for share in dealt]
        machine = topology.full_mesh(ranks, hardware.NVLINK4) if ranks > 1 else topology.ring(1, hardware.NVLINK4)
        run = Cluster(machine, hardware.H100).run(
            step, per_rank(dealt), like((batch, hidden), dtype), per_rank(caches), 0
        )
        return np.array(run.peak_memory)

    return (peak(tokens + 1) - peak(1)) / (batch * tokens)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_rank_caches_the_whole_latent(ranks):
    mla = trans_mla.convert(layer(4), inputs(), 4, 20, fold=4)
    assert_array_equal(cached_bytes(mla, ranks, decoding.latent_step), 2 * (20 + 4))


@pytest.mark.parametrize("ranks, heads_kept", [(1, 4), (2, 2), (4, 1), (8, 1)])
def test_key_heads_are_dealt_out_while_there_are_enough(ranks, heads_kept):
    assert_array_equal(cached_bytes(layer(4), ranks, decoding.grouped_step), 2 * 2 * heads_kept * HEAD_DIM)


def test_a_step_reads_each_cached_word_of_the_latent_once():
    mla = trans_mla.convert(layer(4), inputs(), 4, 20, fold=4)

    def read(context):
        caches = [decoding.empty_cache(mla, 3, 500, "float16", like)]
        one = Cluster(topology.ring(1, hardware.NVLINK4), hardware.H100)
        run = one.run(
            decoding.latent_step, per_rank([mla]), like((3, HIDDEN), "float16"), per_rank(caches), context - 1
        )
        return sum(e.bytes for e in run.trace if e.kind == "compute")

    assert read(500) - read(100) == 400 * 3 * (20 + 4) * 2


def test_llama_2_keeps_576_of_8192_words():
    words = [
        sum(c.size for c in parts)
        for parts in (
            decoding.empty_cache(decoding.llama_2_7b()[0][0][0], 1, 1, "float16", like),
            [decoding.empty_cache(decoding.llama_2_7b(512)[0][0][0], 1, 1, "float16", like)],
        )
    ]
    assert words == [8192, 576]
    assert 1 - words[1] / words[0] == pytest.approx(0.9297, abs=1e-4)


def test_llama_2_has_6_7_billion_parameters_without_its_embedding_table():
    layers, unembedding = decoding.llama_2_7b()
    count = unembedding.size + sum(a.size for mix, mlp in layers for a in (*mix[:4], *mlp))
    assert count == 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000


def test_the_largest_batch_fits_and_one_more_does_not():
    one = Cluster(topology.ring(1, hardware.NVLINK4), hardware.A10)
    model = decoding.llama_2_7b(512)
    batch, run = decoding.largest_batch(one, model, 8192)
    assert run.peak_memory[0] <= hardware.A10.memory_capacity
    with pytest.raises(OutOfDeviceMemory):
        decoding.decode_run(one, model, batch + 1, 8192)


def test_a_device_without_room_for_the_weights_decodes_nothing():
    tiny = Cluster(topology.ring(1, hardware.NVLINK4), hardware.replace(hardware.A10, memory_capacity=1e9))
    assert decoding.largest_batch(tiny, decoding.llama_2_7b(512), 8192) == (0, None)


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_heads_that_do_not_share_out_are_refused_by_number():
    with pytest.raises(ShapeError, match="8 query heads cannot share 3 key heads"):
        trans_mla.exact(layer(3))


def test_a_forward_pass_refuses_heads_that_do_not_share_out():
    with pytest.raises(ShapeError, match="8 query heads cannot share 3 key heads"):
        layers.grouped_attention(layer(3), inputs())


def test_a_rank_beyond_keys_and_values_is_refused_by_number():
    with pytest.raises(ShapeError, match=r"rank 25 is not in 1 … 24"):
        trans_mla.convert(layer(2), inputs(), 8, 25)


def test_a_fold_that_collapse_does_not_divide_is_refused():
    with pytest.raises(ShapeError, match="fold 2 is no multiple of 4 = 8 / 2"):
        trans_mla.convert(layer(2), inputs(), 2, 8, fold=2)


def test_rope_dims_that_do_not_divide_the_head_are_refused():
    with pytest.raises(ShapeError, match="rope_dims 6: it must be even and divide the head dimension, 8"):
        trans_mla.convert(layer(2), inputs(), 6, 8, fold=4)


def test_a_fold_that_does_not_divide_the_planes_is_refused():
    with pytest.raises(ShapeError, match="fold 3 does not divide the 4 planes of a head of 8"):
        trans_mla.principal_mixture(layer(2), inputs(), fold=3)


def test_key_heads_that_do_not_deal_out_are_refused():
    with pytest.raises(ShapeError, match="3 key heads do not deal out to 2 ranks"):
        decoding.shares(layer(3, heads=6), 2)


def test_heads_that_do_not_deal_out_are_refused():
    with pytest.raises(ShapeError, match="8 heads do not deal out to 3 ranks"):
        decoding.shares(layer(2), 3)


# ---- the small model -------------------------------------------------------------------------------------------------

LATENT_LAYERS = {
    "grouped": lambda gqa: gqa,
    "factored": trans_mla.exact,
    "latent": lambda gqa: trans_mla.convert(gqa, inputs(), 4, 12, fold=2),
}


@pytest.mark.parametrize("convert", LATENT_LAYERS.values(), ids=LATENT_LAYERS)
def test_gradients_of_a_layer_are_those_of_finite_differences(convert):
    weights, x = convert(layer(2)), inputs(6)
    probe = np.random.default_rng(0).standard_normal(x.shape)
    names = [name for name in weights._fields if name != "theta"]

    def loss(arrays):
        return (tiny.COMPUTE[type(weights)](weights._replace(**dict(zip(names, arrays, strict=True))), x) * probe).sum()

    arrays = [getattr(weights, name) for name in names]
    gradients = grad(loss)(arrays)
    step = [np.random.default_rng(1).standard_normal(a.shape) for a in arrays]
    ahead, behind = (loss([a + h * s for a, s in zip(arrays, step, strict=True)]) for h in (1e-5, -1e-5))
    assert sum((g * s).sum() for g, s in zip(gradients, step, strict=True)) == pytest.approx((ahead - behind) / 2e-5)


def log_likelihood(tokens):
    """Of each next token given the six before it, by the definition of the language."""
    found = []
    for row in tokens:
        for t in range(tiny.REACH, len(row)):
            scores = sum(tiny.grammar()[back - 1, row[t - back]] for back in range(1, tiny.REACH + 1))
            found.append(scores[row[t]] - np.log(np.exp(scores).sum()))
    return np.array(found)


def test_sentences_have_the_entropy_they_say():
    tokens, entropy = tiny.sentences(np.random.default_rng(0), 300)
    surprise = -log_likelihood(tokens)
    assert surprise.mean() == pytest.approx(entropy, abs=4 * surprise.std() / np.sqrt(surprise.size))


def test_the_shipped_model_has_learned_the_language_but_knows_no_more_than_there_is():
    _, entropy = tiny.sentences(np.random.default_rng(999), 128)
    assert entropy < tiny.evaluate(tiny.pretrained()) < 0.7 * np.log(tiny.VOCABULARY)


def test_the_shipped_file_was_made_from_these_weights():
    assert tiny.evaluate(tiny.pretrained()) == pytest.approx(tiny.stored()["held_out"][0, -1], abs=1e-4)


def test_all_arms_start_from_the_same_function_as_their_stored_curves_do():
    draw = tiny.language(16)(np.random.default_rng(tiny.stored()["seeds"][0]))
    for name, arm in tiny.arms(tiny.pretrained()).items():
        place = list(tiny.stored()["arms"]).index(name)
        first = cross_entropy(tiny.predict(arm, draw[0]), *draw[1:])
        assert first == pytest.approx(tiny.stored()["curves"][place, 0, 0], abs=1e-3)


def test_the_control_has_as_many_more_parameters_as_the_latent_arm():
    sizes = {name: count(tiny.split(arm)[0]) for name, arm in tiny.arms(tiny.pretrained()).items()}
    more = sizes["MLA"] - sizes["GQA"]
    assert more == tiny.LAYERS * 2 * tiny.HEADS * tiny.HEAD_DIM * tiny.KV_HEADS * tiny.HEAD_DIM
    assert more <= sizes["GQA, wider MLP"] - sizes["GQA"] < 1.05 * more


def test_a_trained_model_converts_exactly_layer_by_layer():
    model = tiny.pretrained()
    converted = tiny.with_layers(model, [trans_mla.exact(gqa) for gqa in tiny.mixers(model)])
    assert tiny.evaluate(converted) == pytest.approx(tiny.evaluate(model), abs=1e-12)


def test_balanced_compression_does_not_see_how_a_model_splits_scores_between_queries_and_keys():
    model = tiny.pretrained()
    louder = tiny.with_layers(model, [g._replace(w_q=g.w_q / 10, w_k=g.w_k * 10) for g in tiny.mixers(model)])
    losses = [tiny.evaluate(tiny.compressed(tiny.without_most_rope(m, 8), 8)) for m in (model, louder)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-9)


def test_training_lowers_the_loss_of_a_converted_model():
    converted = tiny.compressed(tiny.without_most_rope(tiny.pretrained(), 4, 2), 14)
    trained, _ = tiny.train(converted, steps=20, rate=3e-3)
    assert tiny.evaluate(trained) < tiny.evaluate(converted) - 0.1
