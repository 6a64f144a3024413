"""FlashAttention-2 in counted loops and in the compiled kernel, against dense attention and closed formulas."""

import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from reference import dense_attention, dense_attention_backward
from toolkit.attention import flash_attention as fa
from toolkit.attention._flash_attention_baselines import chunked, forward_1, head_work, heads_on_cores, naive
from toolkit.kernels import attention as kernels
from toolkit.runtime import Cluster, hardware, like, topology
from toolkit.runtime.errors import DtypeError, ShapeError

TILES = dict(rows=16, keys=24)


def inputs(heads=2, kv_heads=2, n=70, m=70, d=8, seed=0, dtype=np.float64):
    random = np.random.default_rng(seed)
    return [random.normal(size=(h, t, d)).astype(dtype) for h, t in ((heads, n), (kv_heads, m), (kv_heads, m))]


def tiled(function):
    return lambda q, k, v, causal, **options: function(q, k, v, causal=causal, empty_rows=True, **TILES, **options)


def plain(function):
    return lambda q, k, v, causal: function(q, k, v, causal=causal)


ALGORITHMS = {
    "version 2": tiled(fa.forward),
    "version 1": tiled(forward_1),
    "naive": plain(naive),
    "chunked": lambda q, k, v, causal: chunked(q, k, v, rows=16, causal=causal),
    "compiled": lambda q, k, v, causal: kernels.attention(q, k, v, causal, return_lse=True),
}
SHAPES = [(1, 1, 1, 1, 1), (2, 1, 3, 7, 5), (4, 2, 70, 70, 8), (2, 2, 33, 97, 16), (3, 1, 97, 33, 4),
          (1, 1, 48, 48, 64)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_equals_dense_attention_and_its_logsumexp(algorithm, shape, causal):
    q, k, v = inputs(*shape)
    out, lse = algorithm(q, k, v, causal)
    expected, expected_lse = dense_attention(q, k, v, causal)
    assert_allclose(out, expected, rtol=0, atol=1e-12)
    assert_allclose(lse, expected_lse, rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_float32_stays_within_5e_6_of_float64_at_1024_tokens(algorithm, causal):
    q, k, v = inputs(1, 1, 1024, 1024, 64, dtype=np.float32)
    out, lse = algorithm(q, k, v, causal)
    expected, expected_lse = dense_attention(q, k, v, causal)
    assert out.dtype == lse.dtype == np.float32
    assert_allclose(out, expected, rtol=0, atol=5e-6)
    assert_allclose(lse, expected_lse, rtol=0, atol=5e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_the_compiled_kernel_stays_within_5e_6_at_4096_tokens(causal):
    q, k, v = inputs(1, 1, 4096, 4096, 64, dtype=np.float32)
    out = kernels.attention(q, k, v, causal)
    for row in range(0, 4096, 512):
        seen = row + 1 if causal else 4096
        expected, _ = dense_attention(q[:, row : row + 1], k[:, :seen], v[:, :seen])
        assert_allclose(out[:, row : row + 1], expected, rtol=0, atol=5e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_no_tile_size_changes_a_result(n, m, rows, keys, causal):
    q, k, v = inputs(2, 1, n, m, 3, seed=n)
    expected, expected_lse = dense_attention(q, k, v, causal)
    for version in (fa.forward, forward_1):
        out, lse = version(q, k, v, rows=rows, keys=keys, causal=causal, empty_rows=True)
        assert_allclose(out, expected, rtol=0, atol=1e-12)
        assert_allclose(lse, expected_lse, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tile", [(8, 8), (64, 16), (16, 64), (100, 300)])
def test_float32_differs_between_tile_sizes_by_rounding_only(tile):
    q, k, v = inputs(2, 2, 200, 200, 32, dtype=np.float32)
    first, other = (fa.forward(q, k, v, rows=r, keys=c, causal=True)[0] for r, c in ((32, 32), tile))
    assert_allclose(first, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_two_runs_give_the_same_bits(algorithm):
    q, k, v = inputs(2, 1, 150, 150, 16, dtype=np.float32)
    for first, again in zip(algorithm(q, k, v, True), algorithm(q, k, v, True), strict=True):
        assert_array_equal(first, again)


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_a_constant_added_to_a_rows_scores_moves_its_lse_and_not_its_output(algorithm):
    q, k, v = inputs(1, 1, 40, 40, 8)
    q[..., 0], k[..., 0] = 1.0, 0.0
    out, lse = algorithm(q, k, v, False)
    k[..., 0] = 5.0 * np.sqrt(8)  # adds 5 to every score
    shifted, shifted_lse = algorithm(q, k, v, False)
    assert_allclose(shifted, out, rtol=0, atol=1e-12)
    assert_allclose(shifted_lse, lse + 5.0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_scores_of_ten_thousand_stay_finite(algorithm, causal, sign):
    q, k, v = inputs(1, 1, 60, 60, 4, dtype=np.float32)
    q[...], k[..., 0] = (sign * 2e4, 0, 0, 0), np.linspace(0, 1, 60)  # scores from 0 to 1e4, or to -1e4
    out, lse = algorithm(q, k, v, causal)
    expected, expected_lse = dense_attention(q, k, v, causal)
    assert_allclose(out, expected, rtol=0, atol=1e-5)
    assert_allclose(lse, expected_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_a_query_that_sees_no_key_gets_zeros_and_minus_infinity(algorithm):
    q, k, v = inputs(1, 1, 30, 11, 4)
    out, lse = algorithm(q, k, v, True)
    assert_array_equal(out[:, :19], 0)
    assert_array_equal(lse[:, :19], -np.inf)
    assert np.isfinite(lse[:, 19:]).all()


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_grouped_queries_equal_repeated_keys_and_values(algorithm):
    q, k, v = inputs(6, 2, 50, 60, 8)
    many = [np.repeat(a, 3, axis=0) for a in (k, v)]
    assert_allclose(algorithm(q, k, v, True)[0], algorithm(q, *many, True)[0], rtol=0, atol=1e-13)


def test_a_loop_that_forgets_to_rescale_is_caught():
    """Proof that the comparison can fail: the sums of two tiles simply added."""
    q, k, v = inputs(1, 1, 10, 40, 4)
    halves = [dense_attention(q, k[:, i], v[:, i])[0] for i in (slice(20), slice(20, None))]
    assert np.abs(sum(halves) / 2 - dense_attention(q, k, v)[0]).max() > 0.01


# Backward


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_the_dense_ones(shape, parts, causal):
    q, k, v = inputs(*shape)
    grad_out = inputs(*shape, seed=1)[0]
    out, lse = tiled(fa.forward)(q, k, v, causal)
    ours = fa.backward(q, k, v, out, lse, grad_out, causal=causal, parts=parts, **TILES)
    for gradient, expected in zip(ours, dense_attention_backward(q, k, v, grad_out, causal), strict=True):
        assert_allclose(gradient, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_gradients_equal_finite_differences(which):
    arrays = dict(zip("qkv", inputs(2, 1, 7, 9, 3), strict=True))
    grad_out, direction = inputs(2, 1, 7, 9, 3, seed=1)[0], np.random.default_rng(2).normal(size=arrays[which].shape)

    def loss(step):
        moved = {**arrays, which: arrays[which] + step * direction}
        return np.sum(grad_out * fa.forward(**moved, rows=3, keys=4, causal=True)[0])

    out, lse = fa.forward(**arrays, rows=3, keys=4, causal=True)
    gradients = fa.backward(**arrays, out=out, lse=lse, grad_out=grad_out, rows=3, keys=4, causal=True)
    gradient = gradients["qkv".index(which)]
    assert (loss(1e-5) - loss(-1e-5)) / 2e-5 == pytest.approx(np.sum(gradient * direction), abs=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_a_common_shift_of_the_keys_changes_nothing_because_rows_of_ds_sum_to_zero(causal):
    """Shift all keys by one vector: the loss moves by the sum of dK over keys, which is rowsum(dS) times q."""
    q, k, v = inputs(2, 2, 60, 60, 8)
    grad_out = inputs(2, 2, 60, 60, 8, seed=1)[0]
    out, lse = fa.forward(q, k, v, causal=causal, **TILES)
    _, dk, _ = fa.backward(q, k, v, out, lse, grad_out, causal=causal, **TILES)
    assert_allclose(dk.sum(axis=1), 0, atol=1e-10)


def test_key_gradients_of_a_group_are_the_sum_over_its_heads():
    q, k, v = inputs(6, 2, 40, 50, 8)
    many = [np.repeat(a, 3, axis=0) for a in (k, v)]
    out, lse = fa.forward(q, k, v, **TILES)
    grouped = fa.backward(q, k, v, out, lse, q, **TILES)[1:]
    each = fa.backward(q, *many, out, lse, q, **TILES)[1:]
    for one, three in zip(grouped, each, strict=True):
        assert_allclose(one, three.reshape(2, 3, 50, 8).sum(axis=1), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("threads", "heads", "parts"), [(2, 2, 1), (2, 1, 2), (4, 1, 4), (4, 2, 2), (3, 2, 3)])
def test_the_compiled_backward_splits_a_heads_keys_when_heads_do_not_share_out(threads, heads, parts, monkeypatch):
    shared = []
    monkeypatch.setattr(kernels, "threads_for", lambda flops: threads)
    monkeypatch.setattr(kernels, "share", lambda threads, units, loop, first, *rest: shared.append((units, first)))
    q = inputs(heads, heads, 40, 40, 8)[0]
    kernels.attention_backward(q, q, q, q, q[:, :, 0], q)
    assert shared == [(heads * parts, parts)]


# Counts


def run_count(version, n, m, d=8, rows=16, keys=16, causal=False, heads=1):
    count = fa.Count()
    version(*inputs(heads, heads, n, m, d), rows=rows, keys=keys, causal=causal, empty_rows=True, count=count)
    return count


@pytest.mark.parametrize("version", [fa.forward, forward_1])
@pytest.mark.parametrize("blocks", [1, 2, 7])
def test_causal_skips_every_tile_above_the_diagonal_and_masks_only_those_on_it(version, blocks):
    count = run_count(version, 16 * blocks, 16 * blocks, causal=True)
    assert (count.tiles, count.masked) == (blocks * (blocks + 1) // 2, blocks)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "m"), [(64, 64), (50, 70), (70, 50), (5, 100)])
def test_the_visited_tiles_are_those_with_a_visible_score(n, m, causal):
    seen = np.tri(n, m, m - n, dtype=bool) if causal else np.ones((n, m), bool)
    corners = [(i, j) for i in range(0, n, 16) for j in range(0, m, 24)]
    visible = sum(seen[i : i + 16, j : j + 24].any() for i, j in corners)
    assert run_count(fa.forward, n, m, keys=24, causal=causal).tiles == visible
    assert run_count(forward_1, n, m, keys=24, causal=causal).tiles == visible


def test_slow_memory_words_of_version_2_are_the_closed_formula():
    n, m, d, rows = 96, 80, 8, 16
    assert run_count(fa.forward, n, m, d, rows).words == 2 * n * d + n + n // rows * 2 * m * d


def test_slow_memory_words_of_version_1_are_the_closed_formula():
    n, m, d, keys = 96, 80, 8, 16
    setup, each = n * d + 2 * n, 3 * n * d + 4 * n  # out, sum and peak written; then q read, the three read and written
    assert run_count(forward_1, n, m, d, keys=keys).words == setup + 2 * m * d + m // keys * each


def test_slow_memory_words_of_the_naive_way_are_four_score_matrices_and_the_arrays():
    count = fa.Count()
    naive(*inputs(2, 2, 50, 60, 8), count=count)
    assert count.words == 2 * (4 * 50 * 60 + 2 * 50 * 8 + 2 * 60 * 8)


def test_slow_memory_words_of_the_backward_pass_are_the_closed_formula():
    n, m, d, tile = 96, 80, 8, 16
    q, k, v = inputs(1, 1, n, m, d)
    count = fa.Count()
    out, lse = fa.forward(q, k, v)
    fa.backward(q, k, v, out, lse, q, rows=tile, keys=tile, count=count)
    assert count.words == 2 * n * d + n + 4 * m * d + m // tile * (4 * n * d + 2 * n)
    assert count.matmul == 10 * n * m * d


def test_flops_that_are_no_matrix_product_are_those_of_the_algorithms_lines():
    n, r, c, d = 64, 16, 16, 8
    tiles = (n // r) ** 2
    assert run_count(fa.forward, n, n, d, r, c).other == tiles * (4 * r * c + r * d + 5 * r) + n * d + 3 * n
    assert run_count(forward_1, n, n, d, r, c).other == tiles * (4 * r * c + (4 + 3) * r * d + 9 * r)


def test_only_version_1_passes_partial_sums_between_warps():
    assert run_count(fa.forward, 64, 64).exchanged == 0
    assert run_count(forward_1, 64, 64, 8, 16, 16).exchanged == 16 * 2 * 4 * 16 * 8  # tiles, there and back, 4 warps


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 30), st.integers(1, 30), st.booleans())
def test_the_work_predicted_without_running_is_the_work_counted(n, m, rows, keys, causal):
    two = fa.Count()
    for _, row in fa.units(1, n, rows):
        two += fa.query_block_work(min(rows, n - row), 3, m, fa.first_row_sees(row, n, m, causal), keys)
    assert two == run_count(fa.forward, n, m, 3, rows, keys, causal)
    assert head_work(n, 3, m, causal, rows, keys) == run_count(forward_1, n, m, 3, rows, keys, causal)


def test_memory_beyond_inputs_and_outputs_does_not_grow_with_the_sequence():
    assert run_count(fa.forward, 64, 64).extra == run_count(fa.forward, 640, 640).extra == 16 * 16 + 16 * 8 + 2 * 16


def peak_bytes(function, n):
    arrays = inputs(1, 1, n, n, 8)
    function(*arrays)  # what numpy keeps for itself comes first
    tracemalloc.start()
    function(*arrays)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak - arrays[0].nbytes - n * 8  # without out and lse


def test_python_allocates_no_more_for_four_times_the_tokens():
    small, large = (peak_bytes(lambda *a: fa.forward(*a, rows=32, keys=32), n) for n in (512, 2048))
    assert large < 1.2 * small + 8 * 1024  # the list of units
    assert peak_bytes(naive, 512) > 512 * 512 * 8


def test_the_backward_pass_holds_delta_and_design_b_one_more_dq_a_part():
    q, k, v = inputs(1, 1, 64, 64, 8)
    out, lse = fa.forward(q, k, v)
    extra = []
    for parts in (1, 4):
        count = fa.Count()
        fa.backward(q, k, v, out, lse, q, parts=parts, count=count, **TILES)
        extra.append(count.extra)
    assert extra == [64, 64 + 3 * 64 * 8]


# Who does what


def cores(number):
    return Cluster(topology.ring(number, hardware.NVLINK3), hardware.Device("core", 1e9, np.inf))


@pytest.mark.parametrize("deal", [fa.contiguous, fa.heaviest_first])
@pytest.mark.parametrize("number", [1, 3, 8])
def test_any_deal_over_any_number_of_cores_gives_the_same_result(number, deal):
    q, k, v = inputs(4, 2, 70, 90, 8)
    run = cores(number).run(fa.on_cores, q, k, v, causal=True, deal=deal, **TILES)
    out, lse = fa.assemble(run, q)
    expected, expected_lse = dense_attention(q, k, v, True)
    assert_allclose(out, expected, rtol=0, atol=1e-12)
    assert_allclose(lse, expected_lse, rtol=0, atol=1e-12)


def test_version_1_on_cores_gives_the_same_result():
    q, k, v = inputs(4, 2, 70, 90, 8)
    out, _ = fa.assemble(cores(3).run(heads_on_cores, q, k, v, causal=True, **TILES), q)
    assert_allclose(out, dense_attention(q, k, v, True)[0], rtol=0, atol=1e-12)


def times(program, heads, number, **options):
    a = like((heads, 1024, 64), np.float32)
    return cores(number).run(program, a, a, a, **options).makespan


def test_one_head_uses_all_cores_in_version_2_and_one_in_version_1():
    assert times(heads_on_cores, 1, 8) == times(heads_on_cores, 1, 1)
    assert times(fa.on_cores, 1, 8) == pytest.approx(times(fa.on_cores, 1, 1) / 8)


def test_equal_runs_of_a_causal_head_leave_the_heavy_half_to_one_core():
    tiles = 1024 // 128
    whole, heavy = tiles * (tiles + 1) / 2, sum(range(tiles // 2 + 1, tiles + 1))
    run, alone = times(fa.on_cores, 1, 2, causal=True, deal=fa.contiguous), times(fa.on_cores, 1, 1, causal=True)
    assert run / alone == pytest.approx(heavy / whole, rel=0.01)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.integers(1, 8))
def test_the_heaviest_first_deal_is_within_a_third_of_the_best_possible(efforts, number):
    plan = fa.heaviest_first(efforts, number)
    assert sorted(unit for part in plan for unit in part) == list(range(len(efforts)))
    pair = sorted(efforts, reverse=True)[number - 1 : number + 1]  # of number + 1 units, two share a core
    bound = max(sum(efforts) / number, max(efforts), sum(pair) if len(pair) == 2 else 0)
    assert max(sum(efforts[u] for u in part) for part in plan) <= 4 / 3 * bound  # Graham 1969


@pytest.mark.parametrize("program", [fa.on_cores, heads_on_cores])
def test_shape_only_runs_take_the_time_of_numeric_ones(program):
    q, k, v = inputs(3, 1, 100, 100, 8)
    real = cores(2).run(program, q, k, v, causal=True, **TILES)
    shapes = cores(2).run(program, like(q), like(k), like(v), causal=True, **TILES)
    assert shapes.makespan == real.makespan > 0


# Mistakes


@pytest.mark.parametrize("version", [fa.forward, forward_1])
@pytest.mark.parametrize(("shapes", "options", "error", "message"), [
    (((4, 5, 8), (3, 5, 8)), {}, ShapeError, "4 query heads cannot share 3 key heads"),
    (((4, 5, 8), (4, 5, 6)), {}, ShapeError, "head_dim is 8 in q .* and 6 in k"),
    (((1, 9, 8), (1, 5, 8)), {"causal": True}, ShapeError, "first 4 queries see no key; pass empty_rows=True"),
    (((1, 5, 8), (1, 5, 8)), {"rows": 0}, ShapeError, "a tile of 0 rows and 128 keys"),
])  # fmt: skip
def test_what_cannot_attend_is_refused_with_its_values(version, shapes, options, error, message):
    q, k = map(np.zeros, shapes)
    with pytest.raises(error, match=message) as caught:
        version(q, k, k, **options)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("version", [fa.forward, forward_1, naive, chunked])
def test_integers_are_refused(version):
    with pytest.raises(DtypeError, match="q is int64"):
        version(*[np.zeros((1, 2, 2), int)] * 3)


# The compiled kernel's two ways to multiply


def test_a_processor_without_wide_registers_gets_the_same_result(tmp_path):
    code = (
        "import numpy as np\n"
        "from toolkit.kernels._tile_product import WIDE\n"
        "from toolkit.kernels.attention import attention\n"
        "q, k, v = np.random.default_rng(0).normal(size=(3, 2, 200, 64)).astype(np.float32)\n"
        "assert not WIDE\n"
        "np.save('out.npy', attention(q, k, v, True))"
    )
    plain = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    environment = {**os.environ, **plain, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 200, 64)).astype(np.float32)
    assert_allclose(np.load(tmp_path / "out.npy"), dense_attention(q, k, v, True)[0], rtol=0, atol=5e-6)
