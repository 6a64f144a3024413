"""FlashFFTConv: the transform, the convolution and its gradients are exact, and what is skipped is exactly skipped."""

import ctypes
import os
from itertools import product
from math import prod
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest
import scipy.fft
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from toolkit.attention import _flash_fft_conv_costs as costs
from toolkit.attention import _flash_fft_conv_rivals as rivals
from toolkit.attention import _flash_fft_conv_stages as stages
from toolkit.attention import flash_fft_conv as fft
from toolkit.attention._flash_fft_conv_plan import tables
from toolkit.attention.flash_fft_conv import Plan, conv, conv_backward
from toolkit.runtime import Cluster, hardware, like, topology
from toolkit.runtime.errors import DtypeError, ShapeError

ONE = Cluster(topology.ring(1, hardware.NVLINK4), hardware.H100)
KINDS = ["plain", "packed", "paired"]


def factorisations(n, p):
    """Every ordered way to write a power of two as p factors of at least 2."""
    bits = n.bit_length() - 1
    parts = product(range(1, bits + 1), repeat=p - 1)
    return [(*(1 << b for b in some), 1 << bits - sum(some)) for some in parts if sum(some) < bits]


def normal(*shapes, seed=0, dtype=np.float64):
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape).astype(dtype) for shape in shapes]


def definition(u, k, pre=None, post=None):
    """numpy.convolve, row by row, in float64, cut after L samples."""
    u, k = u.astype(np.float64), k.astype(np.float64)
    u = u if pre is None else u * pre
    y = np.array([[np.convolve(row, taps)[: len(row)] for row, taps in zip(one, k, strict=True)] for one in u])
    return y if post is None else y * post


def plan(n, factors, real):
    return Plan(2 * n if real == "packed" else n, factors, real)


# ---- the transform ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [64, 128, 256, 512, 1024, 2048, 4096])
def test_every_factorisation_gives_numpys_transform_in_the_stated_order(n, p):
    re, im = normal((n,), (n,))
    x = re + 1j * im
    want = np.fft.fft(x)
    worst = max(abs(fft.dft(x, f) - want[fft.bins(f)]).max() for f in factorisations(n, p))
    assert worst <= 1e-10 * abs(want).max()


@pytest.mark.parametrize("factors", [(3, 5, 7), (6, 10), (2, 3, 2, 5)])
def test_factors_need_not_be_powers_of_two(factors):
    (x,) = normal((2, prod(factors)))
    assert_allclose(fft.dft(x, factors), np.fft.fft(x)[:, fft.bins(factors)], atol=1e-12)


@pytest.mark.parametrize("factors", [(64,), (8, 8), (4, 2, 8), (2, 4, 2, 4)])
def test_there_and_back_is_the_identity(factors):
    (x,) = normal((3, 64))
    assert_allclose(fft.inverse_dft(fft.dft(x, factors), factors), x, atol=1e-13)


def test_a_transform_without_twiddle_factors_is_caught(monkeypatch):
    """Proof that the tests above can fail: without them it is a two-dimensional transform."""
    (x,) = normal((64,))
    monkeypatch.setattr(fft, "twiddles", lambda n, rest: np.ones((n, rest)))
    assert abs(fft.dft(x, (8, 8)) - np.fft.fft(x)[fft.bins((8, 8))]).max() > 1


@pytest.mark.parametrize("factors", [(64,), (8, 8), (4, 2, 8), (2, 4, 2, 4)])
def test_a_filters_bins_lie_where_the_stages_leave_them(factors):
    (k,) = normal((2, 40))
    s = fft.spectrum(k, Plan(64, factors)).s
    got = (s[:, :, 0] + 1j * s[:, :, 1]).reshape(2, 64)
    assert_allclose(got, np.fft.fft(k, 64)[:, fft.bins(factors)], atol=1e-12)


# ---- the convolution -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("real", KINDS)
@pytest.mark.parametrize("factors", [(256,), (16, 16), (8, 4, 8), (4, 4, 4, 4)])
def test_equals_numpys_convolution(factors, real, gated):
    u, k, *gates = normal((3, 2, 128), (2, 100), (3, 2, 128), (3, 2, 128))
    gates = gates if gated else (None, None)
    got = conv(u, k, plan(256, factors, real), *gates)
    assert_allclose(got, definition(u, k, *gates), rtol=0, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(batch=st.integers(1, 5), length=st.integers(1, 150), data=st.data())
def test_any_length_and_any_number_of_taps_without_a_plan(batch, length, data):
    taps = data.draw(st.integers(1, length))
    u, k = normal((batch, 2, length), (2, taps), seed=length)
    assert_allclose(conv(u, k), definition(u, k), rtol=0, atol=1e-10)


@pytest.mark.parametrize("real", KINDS)
def test_float32_is_exact_to_a_hundred_thousandth(real):
    u, k = normal((3, 4, 2048), (4, 2048), dtype=np.float32)
    n = 2048 if real == "packed" else 4096
    want = definition(u, k)
    got = conv(u, k, plan(n, fft.even_factors(n), real))
    assert got.dtype == np.float32 and abs(got - want).max() <= 1e-5 * abs(want).max()


def test_float16_comes_back_as_float16_and_is_rounded_once():
    u, k = normal((2, 3, 64), (3, 64), dtype=np.float16)
    want = definition(u, k)
    got = conv(u, k)
    assert got.dtype == np.float16 and abs(got - want).max() <= 2**-10 * abs(want).max()


@pytest.mark.parametrize("n", [*sorted(fft.SHIPPED)[:9], 2**20])
def test_the_shipped_plans_close_the_convolution_on_their_circle(n):
    u, k = normal((1, 1, n), (1, n))
    want = scipy.fft.ifft(scipy.fft.fft(u) * scipy.fft.fft(k)).real
    assert abs(conv(u, k, fft.shipped(n)) - want).max() <= 1e-10 * abs(want).max()


def test_a_circle_shorter_than_both_wraps_round():
    u, k = normal((1, 1, 48), (1, 48))
    wrapped = conv(u, k, Plan(64, (8, 8))) - definition(u, k)
    assert abs(wrapped[..., : 48 + 48 - 1 - 64]).max() > 0.1 and abs(wrapped[..., 48 + 48 - 1 - 64 :]).max() < 1e-12


@pytest.mark.parametrize("real", KINDS)
@pytest.mark.parametrize("start", [0, 1, 63, 127])
def test_no_output_sees_a_later_input(start, real):
    u, k, other = normal((2, 2, 128), (2, 128), (2, 2, 128))
    changed = u.copy()
    changed[..., start:] = 1e3 * other[..., start:]
    p = plan(256, (16, 16), real)
    before, after = conv(u, k, p), conv(changed, k, p)
    assert abs(after - before)[..., :start].max(initial=0) <= 1e-9 * abs(after).max()


def test_a_spectrum_serves_many_calls():
    u, k = normal((2, 3, 50), (3, 20))
    filters = fft.spectrum(k, Plan(128, (8, 16)))
    assert_allclose(conv(u, filters), definition(u, k), atol=1e-12)


def test_rows_of_any_strides_are_taken():
    u, k = normal((64, 3, 4), (8, 64))
    u = u.transpose(2, 1, 0)
    assert_allclose(conv(u, k[::3]), definition(u, k[::3]), atol=1e-12)


def test_threads_do_not_change_a_bit(monkeypatch):
    u, k = normal((8, 6, 512), (6, 512))
    filters = fft.spectrum(k, Plan(1024, (32, 32)))
    results = []
    for threads in (1, 3):
        monkeypatch.setattr(fft, "threads_for", lambda flops, n=threads: n)
        results.append(conv(u, filters))
    assert (results[0] == results[1]).all()


# ---- gradients -------------------------------------------------------------------------------------------------------


def correlations(u, k, grad):
    """(du, dk) by the definition: y[t] = sum over j of k[j] u[t - j]."""
    du, dk = np.zeros_like(u), np.zeros_like(k)
    length = u.shape[2]
    for lag in range(k.shape[1]):
        du[..., : length - lag] += k[:, lag, None] * grad[..., lag:]
        dk[:, lag] = (u[..., : length - lag] * grad[..., lag:]).sum(axis=(0, 2))
    return du, dk


@pytest.mark.parametrize("real", KINDS)
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_gradients_are_correlations(batch, real):
    u, k, grad = normal((batch, 2, 64), (2, 50), (batch, 2, 64))
    du, dk, *none = conv_backward(u, k, grad, plan(128, (8, 16), real))
    want = correlations(u, k, grad)
    assert none == [None, None]
    assert max(abs(du - want[0]).max(), abs(dk - want[1]).max()) < 1e-11


@pytest.mark.parametrize("changed", range(4), ids=["du", "dk", "dpre", "dpost"])
@pytest.mark.parametrize("real", KINDS)
def test_gradients_agree_with_finite_differences(real, changed):
    arrays = normal((3, 2, 32), (2, 20), (3, 2, 32), (3, 2, 32))
    grad, along = normal((3, 2, 32), arrays[changed].shape, seed=1)
    p = plan(64, (4, 4, 4), real)

    def loss(step):
        u, k, pre, post = (a + step * along if i == changed else a for i, a in enumerate(arrays))
        return np.vdot(grad, conv(u, k, p, pre, post))

    gradient = conv_backward(arrays[0], arrays[1], grad, p, *arrays[2:])[changed]
    slope = (loss(1e-4) - loss(-1e-4)) / 2e-4
    assert np.vdot(gradient, along) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("keep", [(4, 4, 2), (2, 3, 1)])
@pytest.mark.parametrize("changed", [0, 1], ids=["du", "dk"])
def test_gradients_of_sparse_filters_agree_with_finite_differences(keep, changed):
    arrays = normal((2, 2, 32), (2, 20))
    grad, along = normal((2, 2, 32), arrays[changed].shape, seed=1)
    p = Plan(64, (4, 4, 4), keep=keep)

    def loss(step):
        u, k = (a + step * along if i == changed else a for i, a in enumerate(arrays))
        return np.vdot(grad, conv(u, k, p))

    gradient = conv_backward(*arrays, grad, p)[changed]
    assert np.vdot(gradient, along) == pytest.approx((loss(1e-4) - loss(-1e-4)) / 2e-4, rel=1e-6)


def test_the_gradient_of_the_filter_sums_over_the_batch():
    u, k, grad = normal((3, 2, 32), (2, 32), (3, 2, 32))
    one_by_one = sum(conv_backward(u[i : i + 1], k, grad[i : i + 1])[1] for i in range(3))
    assert_allclose(conv_backward(u, k, grad)[1], one_by_one, atol=1e-12)


# ---- what is counted -------------------------------------------------------------------------------------------------


PRODUCT = stages._product.py_func


def products_done(p, samples, monkeypatch, way):
    """Operations of the matrix products that one transform really does, counted where they are done."""
    counted = []

    def multiply(one, a, transpose, b, zero, out):
        counted.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        out[...] = a @ b

    monkeypatch.setattr(stages, "multiply", multiply)
    monkeypatch.setattr(stages, "_product", PRODUCT)
    given = tables(p, samples, np.dtype(np.float64))
    x = np.zeros(4 * p.length)
    way.py_func(given, 1, x, x.copy())
    return sum(counted)


def pair(p, samples, monkeypatch):
    return sum(products_done(p, samples, monkeypatch, way) for way in (stages.to_bins, stages.from_bins))


FACTORS = [(64,), (8, 8), (4, 4, 4), (8, 2, 4), (2, 4, 2, 4)]


@pytest.mark.parametrize("factors", FACTORS)
def test_a_transform_there_and_back_takes_16_operations_a_sample_and_unit_of_factor(factors, monkeypatch):
    assert pair(Plan(64, factors), 64, monkeypatch) == 16 * 64 * sum(factors)


@pytest.mark.parametrize("factors", FACTORS)
def test_implicit_padding_saves_half_of_the_first_and_half_of_the_last_stage(factors, monkeypatch):
    saved = pair(Plan(64, factors), 64, monkeypatch) - pair(Plan(64, factors), 32, monkeypatch)
    assert saved == 2 * (8 * 64 * factors[0] // 2)


@pytest.mark.parametrize("factors", FACTORS)
def test_packing_halves_the_work(factors, monkeypatch):
    assert pair(Plan(128, factors, "packed"), 64, monkeypatch) == pair(Plan(64, factors), 32, monkeypatch)


@pytest.mark.parametrize("keep", [(8, 8), (8, 1), (1, 8), (3, 5)])
def test_skipped_blocks_are_exactly_the_operations_saved(keep, monkeypatch):
    c1, c2 = keep
    saved = pair(Plan(64, (8, 8)), 64, monkeypatch) - pair(Plan(64, (8, 8), keep=keep), 64, monkeypatch)
    skipped_rows = 16 * 8 * 8 * (8 - c1)  # stage 1 and its inverse: 8 columns, 8 samples, rows that nobody reads
    skipped_bins = 16 * 8 * (64 - c1 * c2)  # stage 2 and its inverse: each bin takes 8 samples
    assert saved == skipped_rows + skipped_bins


@pytest.mark.parametrize("samples", [64, 32, 5])
@pytest.mark.parametrize("keep", [None, (4, 2, 3)])
def test_the_declared_operations_are_those_done(keep, samples, monkeypatch):
    p = Plan(64, (4, 4, 4), keep=keep)
    assert 2 * p.flops(samples) == pair(p, samples, monkeypatch)


def event(program, *args):
    (only,) = ONE.run(program, *args).trace
    return only


@pytest.mark.parametrize("gates", [0, 2])
def test_the_fused_kernel_reads_each_input_and_writes_the_result_once(gates):
    u, k = like((64, 8, 512), np.float16), like((8, 512), np.float16)
    only = event(lambda comm, u, k, *g: conv(u, k, Plan(1024, (32, 32)), *g), u, k, *[u] * gates)
    bins, tiles = 8 * 1024 * 2 * 2, 64 // (fft.FAST // 1024)
    assert only.bytes == (2 + gates) * u.nbytes + k.nbytes + bins * (1 + tiles)
    assert only.flops == 8 * (2 * 64 + 1) * (8 * 1024 * 64 - 8 * 1024 * 16)


def test_a_sequence_longer_than_fast_memory_passes_through_slow_memory_twice_each_way():
    u, k = like((1, 1, 2**17), np.float16), like((1, 1), np.float16)
    long = event(lambda comm, u, k: conv(u, k, fft.shipped(2**17)), u, k).bytes
    bins = 2**17 * 4
    assert long == 2 * u.nbytes + k.nbytes + 2 * bins + 4 * bins


@pytest.mark.parametrize("gated", [False, True])
def test_the_backward_kernel_runs_without_data_and_is_charged_its_transforms(gated):
    u, k = like((4, 2, 64), np.float32), like((2, 64), np.float32)
    gates = (u, u) if gated else (None, None)
    p = Plan(128, (8, 16))
    run = ONE.run(lambda comm, u, k: conv_backward(u, k, u, p, *gates), u, k)
    du, dk, *dgates = run.outputs[0]
    ways = 4 if gated else 3  # u, gradient, du, and the result again where a gate needs it
    assert (du.shape, dk.shape, [d is not None for d in dgates]) == (u.shape, k.shape, [gated] * 2)
    assert run.trace[0].flops == 2 * (ways * 4 + 2) * (8 * 128 * 24 - 8 * 128 * 4)


@pytest.mark.parametrize("factors", [(64, 32), (16, 16, 8), (8, 8, 8, 4)])
def test_the_unfused_stages_move_the_complex_batch_at_every_step(factors):
    u, bins = like((2, 3, 1024), np.float32), like((3, 2048), np.complex64)
    run = ONE.run(rivals.unfused, u, bins, factors)
    batch = 2 * 3 * 2048 * 8
    assert sum(e.bytes for e in run.trace) == 2 * u.nbytes + bins.nbytes + (4 * len(factors) + 3) * batch + batch // 2


@pytest.mark.parametrize("factors", [(64, 32), (16, 16, 8)])
def test_the_unfused_stages_compute_the_same(factors):
    u, k = normal((2, 3, 1000), (3, 900))
    padded = np.zeros((3, 2048))
    padded[:, :900] = k
    assert_allclose(rivals.unfused(None, u, fft.dft(padded, factors), factors), definition(u, k), atol=1e-10)


def test_the_librarys_kernels_compute_the_same():
    u, pre, post = normal((2, 3, 64), (2, 3, 64), (2, 3, 64), dtype=np.float16)
    (k,) = normal((3, 64), dtype=np.float32)
    got = rivals.library_conv(None, u, k, 128, pre, post)
    want = definition(u, k, pre.astype(float), post.astype(float))
    assert got.dtype == np.float16 and abs(got - want).max() < 2e-3 * abs(want).max()


linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")


def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_of(function):
    """Bytes by which the process grows while `function` runs, watched from a thread; and what it returns."""
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed must not hide what this one takes
    before, seen, done = resident(), [], Event()

    def watch():
        while not done.is_set():
            seen.append(resident())

    watcher = Thread(target=watch)
    watcher.start()
    result = function()
    done.set()
    watcher.join()
    return max(seen) - before, result


@linux
def test_the_fused_form_takes_the_result_the_bins_and_two_tiles_a_thread_and_no_more(monkeypatch):
    u, k = normal((24, 32, 4096), (32, 4096), dtype=np.float32)
    p = Plan(8192, (32, 16, 16))
    filters = fft.spectrum(k, p)
    conv(u[:1], filters)
    monkeypatch.setattr(fft, "threads_for", lambda flops: 2)
    grown, out = peak_of(lambda: conv(u, filters))
    tiles = 2 * 2 * fft.FAST * 8
    assert grown <= out.nbytes + tiles + 4e6
    complex_batch = 24 * 32 * 8192 * 8
    assert complex_batch > 2 * (out.nbytes + tiles + 4e6)  # what an unfused form holds at least


@linux
def test_the_unfused_form_holds_a_complex_copy_of_the_batch():
    u, k = normal((8, 16, 4096), (16, 4096), dtype=np.float32)
    bins = fft.dft(np.pad(k, ((0, 0), (0, 4096))), (64, 128)).astype(np.complex64)
    grown, _ = peak_of(lambda: rivals.unfused(None, u, bins, (64, 128)))
    assert grown >= 8 * 16 * 8192 * 8


# ---- the cost model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [n for n, (_, real) in fft.SHIPPED.items() if real == "plain"])
def test_the_model_chooses_the_shipped_factors(n):
    assert sorted(costs.best_factors(n)) == sorted(fft.SHIPPED[n][0])


@pytest.mark.parametrize("n", [n for n in fft.SHIPPED if n <= 1_048_576 and fft.SHIPPED[n][1] == "plain"])
def test_as_even_as_possible_is_what_is_shipped_up_to_a_million(n):
    assert sorted(fft.even_factors(n)) == sorted(fft.SHIPPED[n][0])


def test_the_model_is_equation_2_by_hand():
    machine = costs.Machine("toy", matrix=100.0, general=10.0, slow=2.0, fast=8.0, smallest=16, holds=64)
    outer = 16 * 256 * 32 / 100 + 4 * 256 / 2
    inner = 16 * 256 * 8 / 10 + 4 * 256 / 8
    assert costs.model_seconds((32, 8), machine, batch=3, channels=5) == pytest.approx(15 * (outer + inner))


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_the_model_looks_at_every_factorisation(p):
    assert set(costs.factorisations(256, p)) == {tuple(sorted(f, reverse=True)) for f in factorisations(256, p)}


def test_the_rates_of_this_cpu_are_those_of_a_cpu():
    cpu = costs.this_cpu(1)
    assert 1e9 < cpu.matrix < 1e12 and 1e8 < cpu.slow < 1e12 and cpu.fast > 1e9


# ---- sparse ----------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(data=st.data(), factors=st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple))
def test_skipping_equals_masking_the_dense_spectrum(factors, data):
    n = prod(factors)
    keep = tuple(data.draw(st.integers(1, factor)) for factor in factors)
    length = data.draw(st.integers(1, n))
    u, k = normal((3, 2, length), (2, data.draw(st.integers(1, length))))
    block = fft.bins(factors).reshape(factors)[tuple(slice(c) for c in keep)].reshape(-1)
    mask = np.zeros(n)
    mask[block] = mask[-block] = 1
    want = np.fft.ifft(np.fft.fft(u, n) * np.fft.fft(k, n) * mask).real[..., :length]
    assert_allclose(conv(u, k, Plan(n, factors, keep=keep)), want, atol=1e-11)


@pytest.mark.parametrize("kept", [1, 3, 8])
def test_keeping_the_first_bins_of_the_last_factor_is_a_low_pass(kept):
    """What the authors' reference does: zero the bins of a real transform from `kept` · 16 on."""
    u, k = normal((2, 2, 128), (2, 128))
    filters = scipy.fft.rfft(k, 256)
    filters[:, kept * 16 :] = 0
    want = scipy.fft.irfft(scipy.fft.rfft(u, 256) * filters, 256)[..., :128]
    assert_allclose(conv(u, k, Plan(256, (16, 16), keep=(16, kept))), want, atol=1e-12)


CHUNKED = [(1, 1000, 17, 64), (3, 257, 33, 64), (2, 40, 40, 128), (2, 65, 1, 8)]


@pytest.mark.parametrize("batch, length, taps, n", CHUNKED)
def test_chunks_equal_the_whole(batch, length, taps, n):
    u, k = normal((batch, 2, length), (2, 40))
    assert_allclose(fft.partial_conv(u, k, taps, n), definition(u, k[:, :taps]), rtol=0, atol=1e-9)


@linux
def test_chunks_take_the_same_memory_whatever_the_length():
    (k,) = normal((1, 64), dtype=np.float32)
    fft.partial_conv(np.ones((1, 1, 4096), np.float32), k, 64, 1024)
    grown, out = peak_of(lambda: fft.partial_conv(np.ones((1, 1, 2**21), np.float32), k, 64, 1024))
    assert grown <= 2 * out.nbytes + 8e6  # input and result; a transform of the whole takes 33.5 MB more


@pytest.mark.parametrize("taps", [1, 7, 64])
def test_the_direct_loop_is_the_definition(taps):
    u, k = normal((3, 2, 64), (2, taps))
    assert_allclose(rivals.direct(u, k), definition(u, k), atol=1e-12)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: Plan(64, (8, 4)), r"8 · 4 make 32.*length 64"),
        (lambda: Plan(64, (8, 8), "packed"), r"8 · 8 make 64.*length 32.*packed"),
        (lambda: Plan(64, ()), "nothing"),
        (lambda: Plan(64, (8, 8), "halved"), "plain, packed, paired"),
        (lambda: Plan(65, (8, 4), "packed"), "even n, got 65"),
        (lambda: Plan(64, (8, 8), keep=(8, 9)), r"\(8, 9\)"),
        (lambda: Plan(64, (8, 4), "packed", keep=(8, 4)), "keep needs real='plain'"),
        (lambda: fft.shipped(1000), "1000.*powers of two, 256"),
        (lambda: fft.shipped(128), "128"),
        (lambda: fft.even_factors(1000), "1000 is no power of two"),
        (lambda: costs.best_factors(1000), "1000 is no power of two"),
        (lambda: fft.dft(np.ones(10), (2, 4)), "2 · 4 make 8.*length 10"),
    ],
)
def test_plans_that_do_not_fit_are_refused(build, words):
    with pytest.raises(ShapeError, match=words):
        build()


@pytest.mark.parametrize(
    "u, k, options, words",
    [
        ((1, 1, 65), (1, 2), {"plan": Plan(64, (8, 8))}, "L = 65 exceeds FFT size 64"),
        ((1, 1, 8), (1, 9), {}, "9 taps.*taps ≤ L"),
        ((1, 1, 31), (1, 9), {"plan": Plan(64, (8, 4), "packed")}, "even L, got 31"),
        ((1, 2, 8), (3, 8), {}, r"\(3, 8\)"),
        ((2, 8), (2, 8), {}, r"\(2, 8\)"),
        ((1, 1, 8), (1, 8), {"pre_gate": np.ones((1, 1, 7))}, "pre_gate"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(u, k, options, words):
    with pytest.raises(ShapeError, match=words):
        conv(np.ones(u), np.ones(k), **options)


@pytest.mark.parametrize("u, k", [(np.float32, np.float64), (np.int64, np.int64), (np.complex128, np.complex128)])
def test_dtypes_that_do_not_fit_are_refused(u, k):
    with pytest.raises(DtypeError, match="float"):
        conv(np.ones((1, 1, 8), u), np.ones((1, 8), k))


def test_a_spectrum_keeps_its_plan():
    with pytest.raises(ShapeError, match="leave plan out"):
        conv(np.ones((1, 1, 8)), fft.spectrum(np.ones((1, 8)), Plan(16, (4, 4))), Plan(16, (16,)))


def test_more_taps_than_the_filter_has_are_refused():
    with pytest.raises(ShapeError, match="9 taps of 8, FFT size 16"):
        fft.partial_conv(np.ones((1, 1, 20)), np.ones((1, 8)), 9, 16)
