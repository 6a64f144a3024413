"""Attention kernels against the dense float64 reference, finite differences and PyTorch."""

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from reference import dense_attention, dense_attention_backward
from toolkit.kernels import attention as kernels
from toolkit.kernels.attention import (
    attention,
    attention_backward,
    delta,
    empty_accumulator,
    finish,
    merge,
    visible_area,
)
from toolkit.runtime.arrays import is_shape_only, like
from toolkit.runtime.errors import DtypeError, ShapeError

BAR = {np.float64: 1e-12, np.float32: 5e-6, np.float16: 1e-3}      # absolute, for inputs of unit variance


def normal(*shapes, seed=0, dtype=np.float64):
    random = np.random.default_rng(seed)
    return [random.normal(size=shape).astype(dtype) for shape in shapes]


def inputs(heads, key_heads, n, m, d, seed=0, dtype=np.float64):
    return normal((heads, n, d), (key_heads, m, d), (key_heads, m, d), seed=seed, dtype=dtype)


# one token, ragged tiles, tiles passed by one, several blocks of rows, more queries than keys and the reverse, none
SHAPES = [(1, 1, 1, 1, 1), (2, 1, 3, 7, 5), (2, 2, 80, 192, 64), (4, 2, 81, 193, 64), (3, 3, 333, 1, 16),
          (2, 1, 300, 211, 8), (2, 2, 211, 500, 128), (1, 1, 700, 700, 32), (2, 1, 0, 4, 8), (2, 1, 4, 0, 8),
          (0, 1, 4, 4, 8)]
ACCUMULATION = [("float16", "float32"), ("float32", "float32"), ("float64", "float64")]
LENGTHS = st.integers(0, 300)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", BAR)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_dense_attention(shape, dtype, causal):
    q, k, v = inputs(*shape, dtype=dtype)
    out, lse = attention(q, k, v, causal=causal, return_lse=True)
    expected, expected_lse = dense_attention(q, k, v, causal)
    assert_allclose(out, expected, rtol=0, atol=BAR[dtype])
    assert_allclose(lse, expected_lse, rtol=0, atol=1e-12 if dtype == np.float64 else 5e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_the_dense_ones(shape, dtype, causal):
    q, k, v = inputs(*shape, dtype=dtype)
    out, lse = attention(q, k, v, causal=causal, return_lse=True)
    (grad_out,) = normal(q.shape, seed=1, dtype=dtype)
    gradients = attention_backward(q, k, v, out, lse, grad_out, causal=causal)
    for ours, expected in zip(gradients, dense_attention_backward(q, k, v, grad_out, causal), strict=True):
        assert_allclose(ours, expected, rtol=0, atol=1e-11 if dtype == np.float64 else 2e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), LENGTHS, LENGTHS, st.integers(1, 40), st.booleans())
def test_any_shape_equals_the_reference_forward_and_backward(key_heads, group, n, m, d, causal):
    q, k, v = inputs(key_heads * group, key_heads, n, m, d, seed=n)
    out, lse = attention(q, k, v, causal, return_lse=True)
    expected, expected_lse = dense_attention(q, k, v, causal)
    assert_allclose(out, expected, rtol=0, atol=1e-12)
    assert_allclose(lse, expected_lse, rtol=0, atol=1e-12)
    gradients = attention_backward(q, k, v, out, lse, q, causal)
    for ours, dense in zip(gradients, dense_attention_backward(q, k, v, q, causal), strict=True):
        assert_allclose(ours, dense, rtol=0, atol=1e-10)


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_equal_finite_differences(which, causal):
    arrays = dict(zip("qkv", inputs(2, 1, 5, 6, 3), strict=True))
    (grad_out,) = normal(arrays["q"].shape, seed=1)
    (direction,) = normal(arrays[which].shape, seed=2)
    out, lse = attention(**arrays, causal=causal, return_lse=True)
    gradients = attention_backward(**arrays, out=out, lse=lse, grad_out=grad_out, causal=causal)
    gradient = gradients["qkv".index(which)]

    def loss(step):
        return np.sum(grad_out * attention(**{**arrays, which: arrays[which] + step * direction}, causal=causal))

    assert (loss(1e-5) - loss(-1e-5)) / 2e-5 == pytest.approx(np.sum(gradient * direction), abs=1e-7)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_equals_pytorch_forward_and_backward(dtype, causal):
    torch = pytest.importorskip("torch")
    q, k, v = inputs(4, 4, 200, 200, 64, dtype=dtype)
    tensors = [torch.from_numpy(a.copy())[None].requires_grad_() for a in (q, k, v)]
    theirs = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=causal)
    out, lse = attention(q, k, v, causal, return_lse=True)
    tolerance = dict(rtol=0, atol=1e-11 if dtype == "float64" else 1e-5)
    assert_allclose(out, theirs[0].detach().numpy(), **tolerance)
    expected = torch.autograd.grad(theirs, tensors, torch.from_numpy(q.copy())[None])
    for ours, grad in zip(attention_backward(q, k, v, out, lse, q, causal), expected, strict=True):
        assert_allclose(ours, grad[0].numpy(), **tolerance)


def test_grouped_queries_equal_repeated_keys_and_values():
    q, k, v = inputs(6, 2, 70, 90, 16)
    assert_array_equal(attention(q, k, v, True), attention(q, np.repeat(k, 3, axis=0), np.repeat(v, 3, axis=0), True))


def test_key_gradients_of_a_group_are_the_sum_over_its_heads():
    q, k, v = inputs(6, 2, 70, 90, 16)
    many_k, many_v = np.repeat(k, 3, axis=0), np.repeat(v, 3, axis=0)
    out, lse = attention(q, k, v, return_lse=True)
    _, dk, dv = attention_backward(q, k, v, out, lse, q)
    _, each_dk, each_dv = attention_backward(q, many_k, many_v, out, lse, q)
    assert_allclose(dk, each_dk.reshape(2, 3, 90, 16).sum(axis=1), rtol=0, atol=1e-12)
    assert_allclose(dv, each_dv.reshape(2, 3, 90, 16).sum(axis=1), rtol=0, atol=1e-12)


def test_one_shift_of_all_scores_of_a_row_moves_lse_and_not_the_output():
    q, k, v = inputs(2, 2, 40, 50, 16)
    out, lse = attention(q, k, v, return_lse=True)
    shift = normal((2, 1, 16), seed=3)[0]                   # the same vector added to every key of a head
    moved, moved_lse = attention(q, k + shift, v, return_lse=True)
    assert_allclose(moved, out, rtol=0, atol=1e-12)
    assert_allclose(moved_lse - lse, np.sum(q * shift, axis=2) / 4, rtol=0, atol=1e-12)


def test_query_gradient_is_blind_to_a_shift_of_all_keys():
    """Each row of dS sums to zero: a wrong delta would show here."""
    q, k, v = inputs(2, 2, 40, 50, 16)
    out, lse = attention(q, k, v, return_lse=True)
    _, shifted_lse = attention(q, k + 1, v, return_lse=True)
    dq, _, _ = attention_backward(q, k, v, out, lse, q)
    shifted_dq, _, _ = attention_backward(q, k + 1, v, out, shifted_lse, q)
    assert_allclose(shifted_dq, dq, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_huge_scores_give_finite_results_close_to_the_reference(size, dtype):
    q, k, v = inputs(1, 1, 90, 200, 4, dtype=dtype)
    q = (q * size / 4).astype(dtype)
    out, lse = attention(q, k, v, return_lse=True)
    expected, expected_lse = dense_attention(q, k, v)
    assert_allclose(out, expected, rtol=0, atol=size * (2e-6 if dtype == np.float32 else 1e-14))
    assert_allclose(lse, expected_lse, rtol=1e-6 if dtype == np.float32 else 1e-14)
    assert np.isfinite(attention_backward(q, k, v, out, lse, v[:, :90])[0]).all()


def test_rows_that_see_no_key_are_zero_with_lse_minus_infinity_and_no_gradient():
    q, k, v = inputs(2, 2, 9, 4, 8)
    out, lse = attention(q, k, v, causal=True, return_lse=True)
    dq, _, _ = attention_backward(q, k, v, out, lse, q, causal=True)
    assert_array_equal(out[:, :5], 0)
    assert_array_equal(lse[:, :5], -np.inf)
    assert_array_equal(dq[:, :5], 0)
    assert np.isfinite(lse[:, 5:]).all()


@pytest.mark.parametrize("dtype, accumulation", ACCUMULATION)
def test_outputs_keep_the_dtype_and_sums_have_the_accumulation_dtype(dtype, accumulation):
    q, k, v = inputs(2, 1, 5, 6, 8, dtype=dtype)
    out, lse = attention(q, k, v, return_lse=True)
    gradients = attention_backward(q, k, v, out, lse, q)
    assert [a.dtype.name for a in (out, lse, *gradients)] == [dtype] + 4 * [accumulation]


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


STRIDED = {
    "read-only": read_only,
    "a slice of tokens": lambda a: np.concatenate([a, a, a], axis=1)[:, a.shape[1]:2 * a.shape[1]],
    "every second token": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    "tokens backwards": lambda a: a[:, ::-1].copy()[:, ::-1],
    "heads inside": lambda a: a.transpose(1, 0, 2).copy().transpose(1, 0, 2),
    "channels outside": lambda a: a.transpose(2, 0, 1).copy().transpose(1, 2, 0),
    "every second channel": lambda a: np.repeat(a, 2, axis=2)[:, :, ::2],
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED)
def test_memory_layout_changes_no_result(view):
    q, k, v = inputs(2, 2, 90, 210, 8)
    out, lse = attention(q, k, v, True, return_lse=True)
    expected = attention_backward(q, k, v, out, lse, q, True)
    assert_array_equal(attention(view(q), view(k), view(v), True), out)
    ours = attention_backward(view(q), view(k), view(v), view(out), read_only(lse), view(q), True)
    for gradient, same in zip(ours, expected, strict=True):
        assert_allclose(gradient, same, rtol=0, atol=1e-14)


def test_one_repeated_token_in_a_broadcast_array_is_read_right():
    q, k, v = inputs(2, 2, 5, 1, 8)
    spread = np.broadcast_to(k, (2, 6, 8)), np.broadcast_to(v, (2, 6, 8))
    assert_allclose(attention(q, *spread), np.broadcast_to(v, q.shape), rtol=0, atol=1e-14)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_the_number_of_threads_changes_no_bit_forward_and_only_rounding_backward(threads, monkeypatch):
    q, k, v = inputs(2, 1, 500, 700, 32)
    monkeypatch.setattr(kernels, "threads_for", lambda flops: 1)
    out, lse = attention(q, k, v, True, return_lse=True)
    alone = attention_backward(q, k, v, out, lse, q, True)
    monkeypatch.setattr(kernels, "threads_for", lambda flops: threads)
    together = attention_backward(q, k, v, out, lse, q, True)
    assert_array_equal(attention(q, k, v, True), out)
    for one, many in zip(alone, together, strict=True):
        assert_allclose(many, one, rtol=0, atol=1e-12)
    for first, second in zip(together, attention_backward(q, k, v, out, lse, q, True), strict=True):
        assert_array_equal(first, second)


def test_no_score_matrix_is_ever_in_memory():
    resource = pytest.importorskip("resource")
    q, k, v = inputs(1, 1, 16_384, 16_384, 8, dtype=np.float32)  # scores would take 1 GiB, each of these takes 0.5 MiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    attention(q, k, v, causal=True)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1 if sys.platform == "darwin" else 1024) < 100e6


# Partial results


def partial_results(q, k, v, cuts):
    edges = [0, *sorted(cuts), k.shape[1]]
    return [attention(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in pairwise(edges)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=5), st.permutations(range(6)))
def test_parts_over_any_cuts_of_the_keys_merge_in_any_order_to_the_whole(cuts, order):
    q, k, v = inputs(2, 1, 11, 60, 8)
    parts = partial_results(q, k, v, cuts)
    acc = empty_accumulator(q)
    for index in order:
        if index < len(parts):
            acc = merge(acc, parts[index])
    out, lse = dense_attention(q, k, v)
    assert_allclose(acc[0], out, rtol=0, atol=1e-12)
    assert_allclose(acc[1], lse, rtol=0, atol=1e-12)


def copies(pair):
    return tuple(a.copy() for a in pair)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([-np.inf, -1e4, -700.0, -1.0, 0.0, 1.0, 700.0, 1e4]), min_size=3, max_size=3))
def test_merge_is_associative_and_commutative_whatever_the_sizes(levels):
    outs = normal((1, 2, 3), (1, 2, 3), (1, 2, 3))
    a, b, c = [(out * np.isfinite(lse), np.full((1, 2), lse)) for out, lse in zip(outs, levels, strict=True)]
    left = merge(merge(copies(a), b), c)
    right = merge(copies(a), merge(copies(b), c))
    swapped = merge(merge(copies(c), b), a)
    for other in (right, swapped):
        assert_allclose(other[0], left[0], rtol=0, atol=1e-12)
        assert_allclose(other[1], left[1], rtol=1e-14)


@pytest.mark.parametrize("mine, theirs, expected", [
    (-np.inf, -np.inf, (0.0, -np.inf)), (-np.inf, 2.0, (5.0, 2.0)), (2.0, -np.inf, (3.0, 2.0)),
    (2.0, 2.0, (4.0, 2.0 + np.log(2))), (1e4, -1e4, (3.0, 1e4))])
def test_merge_of_one_number_is_right_by_hand(mine, theirs, expected):
    acc = np.full((1, 1, 1), 3.0 if mine > -np.inf else 0.0), np.full((1, 1), mine)
    part = np.full((1, 1, 1), 5.0 if theirs > -np.inf else 0.0), np.full((1, 1), theirs)
    out, lse = merge(acc, part)
    assert (out.item(), lse.item()) == pytest.approx(expected)


def test_merge_writes_into_the_accumulator_it_was_given():
    q, k, v = inputs(2, 2, 7, 9, 8)
    acc = empty_accumulator(q)
    merged = merge(acc, attention(q, k, v, return_lse=True))
    assert merged[0] is acc[0] and merged[1] is acc[1]
    assert_allclose(acc[0], dense_attention(q, k, v)[0], rtol=0, atol=1e-12)


def test_merge_writes_through_a_slice_of_the_tokens():
    q, k, v = inputs(2, 2, 7, 9, 8)
    acc = empty_accumulator(q)
    merge((acc[0][:, 2:5], acc[1][:, 2:5]), attention(q[:, 2:5], k, v, return_lse=True))
    assert_allclose(acc[0][:, 2:5], dense_attention(q, k, v)[0][:, 2:5], rtol=0, atol=1e-12)
    assert_array_equal(acc[0][:, 5:], 0)


def test_a_part_may_come_in_16_bits_and_the_sum_stays_in_32():
    q, k, v = inputs(2, 2, 7, 9, 8, dtype=np.float32)
    out, lse = attention(q, k, v, return_lse=True)
    acc = merge(empty_accumulator(q), (out.astype(np.float16), lse))
    assert acc[0].dtype == np.float32
    assert_allclose(acc[0], out, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype, accumulation", ACCUMULATION)
def test_the_empty_accumulator_is_attention_over_no_keys(dtype, accumulation):
    q, k, v = inputs(2, 2, 7, 0, 8, dtype=dtype)
    out, lse = empty_accumulator(q)
    assert out.dtype == lse.dtype == accumulation
    assert_array_equal(out, attention(q, k, v))
    assert_array_equal(lse, np.full((2, 7), -np.inf))


def test_finish_returns_the_same_array_or_the_cast_one():
    acc = empty_accumulator(np.zeros((2, 3, 4), np.float16))
    assert finish(acc, like=acc[0])[0] is acc[0]
    assert finish(acc, like=np.zeros(1, np.float16))[0].dtype == np.float16
    assert finish(acc, like=np.zeros(1, np.float16))[1] is acc[1]


@pytest.mark.parametrize("given_delta", [False, True])
def test_gradients_over_blocks_of_keys_sum_to_the_whole(given_delta):
    q, k, v = inputs(4, 2, 40, 60, 8)
    out, lse = attention(q, k, v, return_lse=True)
    (grad_out,) = normal(q.shape, seed=1)
    with_delta = dict(out=None, delta=delta(grad_out, out)) if given_delta else dict(out=out)
    blocks = [attention_backward(q, k[:, a:a + 20], v[:, a:a + 20], lse=lse, grad_out=grad_out, **with_delta)
              for a in (0, 20, 40)]
    dq, dk, dv = dense_attention_backward(q, k, v, grad_out)
    assert_allclose(sum(block[0] for block in blocks), dq, rtol=0, atol=1e-11)
    assert_allclose(np.concatenate([block[1] for block in blocks], axis=1), dk, rtol=0, atol=1e-11)
    assert_allclose(np.concatenate([block[2] for block in blocks], axis=1), dv, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype, accumulation", ACCUMULATION)
def test_delta_is_the_row_sum_of_the_product(dtype, accumulation):
    grad_out, out = normal((2, 5, 8), (2, 5, 8), dtype=dtype)
    assert delta(grad_out, out).dtype == accumulation
    expected = (grad_out.astype(np.float64) * out).sum(axis=2)
    assert_allclose(delta(grad_out, out), expected, rtol=0, atol=1e-14 if dtype == "float64" else 2e-6)


# Costs


@given(st.integers(0, 40), st.integers(0, 40), st.booleans())
def test_the_visible_area_counts_the_pairs_that_attend(n, m, causal):
    pairs = sum(not causal or j <= i + m - n for i in range(n) for j in range(m))
    assert visible_area(n, m, causal) == pairs


def test_costs_are_the_textbook_formulas():
    q, k = like((8, 100, 64), np.float32), like((2, 300, 64), np.float32)
    lse = like((8, 100), np.float32)
    area = 100 * 300 - 100 * 99 // 2
    assert attention.cost(q, k, k, causal=True)[:2] == (4 * 8 * area * 64, 2 * q.nbytes + 2 * k.nbytes)
    assert attention.cost(q, k, k, return_lse=True).flops == 4 * 8 * 100 * 300 * 64
    assert attention.cost(q, k, k, return_lse=True).bytes == 2 * q.nbytes + 2 * k.nbytes + lse.nbytes
    assert attention_backward.cost(q, k, k, q, lse, q, causal=True).flops == 10 * 8 * area * 64
    assert attention_backward.cost(q, k, k, q, lse, q).bytes == 4 * q.nbytes + 4 * k.nbytes + lse.nbytes
    assert merge.cost((q, lse), (q, lse))[:2] == (0, 3 * (q.nbytes + lse.nbytes))
    assert delta.cost(q, q)[:2] == (0, 2 * q.nbytes + lse.nbytes)
    assert empty_accumulator.cost(q)[:2] == (0, q.nbytes + lse.nbytes)
    assert finish.cost((q, lse), q)[:2] == (0, 0)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_shape_only_results_have_the_shapes_and_dtypes_of_the_real_ones(dtype):
    def results(q, k, v):
        out, lse = attention(q, k, v, return_lse=True)
        acc = merge(empty_accumulator(q), (out, lse))
        gradients = attention_backward(q, k, v, out, lse, q)
        return [attention(q, k, v), out, lse, *gradients, delta(q, out), *acc, *finish(acc, q)]

    arrays = inputs(4, 2, 5, 7, 8, dtype=dtype)
    real, shapes = results(*arrays), results(*(like(a) for a in arrays))
    assert all(is_shape_only(a) for a in shapes)
    assert [(a.shape, a.dtype) for a in shapes] == [(a.shape, a.dtype) for a in real]


# Mistakes


ZEROS = np.zeros((4, 5, 8))


@pytest.mark.parametrize("k, v, error, message", [
    (np.zeros((3, 5, 8)), np.zeros((3, 5, 8)), ShapeError, "4 query heads cannot share 3 key heads"),
    (np.zeros((0, 5, 8)), np.zeros((0, 5, 8)), ShapeError, "4 query heads cannot share 0 key heads"),
    (np.zeros((4, 5, 6)), np.zeros((4, 5, 6)), ShapeError, "head_dim is 8 in q .* and 6 in k"),
    (np.zeros((4, 5, 8)), np.zeros((4, 6, 8)), ShapeError, r"k is \(4, 5, 8\) and v is \(4, 6, 8\)"),
    (np.zeros((5, 8)), np.zeros((5, 8)), ShapeError, r"k \(5, 8\), v \(5, 8\): each must be \(heads, tokens"),
    (ZEROS.astype("f4"), ZEROS.astype("f4"), DtypeError, "q is float64, k float32, v float32"),
])
@pytest.mark.parametrize("of", [lambda a: a, like], ids=["arrays", "shapes"])
def test_what_cannot_attend_is_refused_with_its_values(k, v, error, message, of):
    with pytest.raises(error, match=message) as caught:
        attention(of(ZEROS), of(k), of(v))
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("dtype", ["int64", "complex128", "bool"])
def test_numbers_that_are_not_floats_of_16_to_64_bits_are_refused(dtype):
    with pytest.raises(DtypeError, match=f"q is {np.dtype(dtype)}"):
        attention(*[np.zeros((1, 2, 2), dtype)] * 3)


@pytest.mark.parametrize("name, wrong", [
    ("grad_out", (4, 5, 7)), ("out", (4, 6, 8)), ("lse", (5, 4)), ("delta", (4, 5, 1))])
def test_backward_names_the_array_whose_shape_is_wrong(name, wrong):
    arrays = dict(out=ZEROS, lse=ZEROS[:, :, 0], grad_out=ZEROS, delta=ZEROS[:, :, 0]) | {name: np.zeros(wrong)}
    with pytest.raises(ShapeError, match=f"attention_backward: {name} is"):
        attention_backward(ZEROS, ZEROS, ZEROS, **arrays)


def test_backward_needs_the_output_or_delta():
    with pytest.raises(ShapeError, match="out and delta are both None"):
        attention_backward(ZEROS, ZEROS, ZEROS, None, ZEROS[:, :, 0], ZEROS)


def test_merge_refuses_parts_of_another_shape():
    with pytest.raises(ShapeError, match=r"part \(4, 6, 8\)"):
        merge(empty_accumulator(ZEROS), (np.zeros((4, 6, 8)), np.zeros((4, 6))))


def test_merge_refuses_a_16_bit_accumulator():
    with pytest.raises(DtypeError, match="acc is float16"):
        merge((ZEROS.astype("f2"), ZEROS[:, :, 0].astype("f2")), (ZEROS, ZEROS[:, :, 0]))


def test_merge_refuses_a_read_only_accumulator():
    with pytest.raises(ValueError, match="acc is read-only"):
        merge((read_only(ZEROS), ZEROS[:, :, 0].copy()), (ZEROS, ZEROS[:, :, 0]))


def test_a_wrong_mask_alignment_is_caught():
    """The reference disagrees with a mask aligned to the top left, so the comparison above can fail."""
    q, k, v = inputs(1, 1, 4, 6, 8)
    top_left = attention(q, k[:, :4], v[:, :4], causal=True)
    assert np.abs(top_left - dense_attention(q, k, v, causal=True)[0]).max() > 0.1


def test_blas_has_its_threads_back_after_a_call():
    from threadpoolctl import threadpool_info

    before = threadpool_info()
    attention(ZEROS, ZEROS, ZEROS)
    assert [library["num_threads"] for library in threadpool_info()[:len(before)]] == [b["num_threads"] for b in before]


def test_importing_the_kernels_does_not_load_their_compiled_loops():
    code = "import sys, toolkit.kernels.attention; sys.exit('toolkit.kernels._attention_tiles' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
