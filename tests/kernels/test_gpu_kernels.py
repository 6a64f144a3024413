"""Triton's kernels give what the operators they replace give. On a GPU; elsewhere where TRITON_INTERPRET=1 is set."""

import os

import pytest

torch = pytest.importorskip("torch", reason="tensors need pip install '.[gpu]'")
pytest.importorskip("triton", reason="Triton comes with PyTorch for GPUs")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from toolkit.kernels import _gpu_linear, _gpu_rows, gpu  # noqa: E402
from toolkit.sequence_parallel import _lasp2_kernels as book  # noqa: E402

PLACE = "cuda" if torch.cuda.is_available() else "cpu"


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(PLACE, dtype)


def accumulator(tokens):
    """Some rows have seen no key."""
    out, lse = numbers(3, tokens, 32), numbers(3, tokens, seed=1)
    lse[:, :5] = -torch.inf
    out[:, :5] = 0
    return out, lse


@pytest.mark.parametrize("tokens", [64, 50, 1])
def test_merge_is_that_of_the_operators_on_strided_parts(tokens):
    out, lse = accumulator(tokens)
    part, part_lse = numbers(3, tokens, 64, seed=2, dtype=torch.float16)[:, :, :32], numbers(3, tokens, seed=3)
    part_lse[:, 3:9] = -torch.inf
    wanted_out, wanted_lse = out.clone(), lse.clone()
    gpu._merge(wanted_out, wanted_lse, part, part_lse)
    _gpu_rows.merge(out, lse, part, part_lse)
    torch.testing.assert_close(out, wanted_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [64, 50])
def test_delta_is_the_sum_of_products(tokens):
    grad, out = (numbers(3, tokens, 32, seed=seed, dtype=torch.float16) for seed in (0, 1))
    wanted = (grad.double() * out.double()).sum(-1).float()
    torch.testing.assert_close(_gpu_rows.delta(grad, out), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [64, 50])
def test_along_has_the_delta_that_was_asked_for(tokens):
    grad, delta = numbers(3, tokens, 32, dtype=torch.float16), numbers(3, tokens, seed=1)
    found = _gpu_rows.along(grad, delta)
    assert found.dtype == torch.float16
    torch.testing.assert_close((grad.double() * found.double()).sum(-1).float(), delta, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_linear_attention_inside_a_rank_is_that_of_the_book_in_float32(chunks):
    q, k, v = (numbers(2, 256, 32, seed=seed, dtype=torch.float16) for seed in range(3))
    states = book.chunk_states.__wrapped__(k.float(), v.float(), chunks)
    wanted = (q.double() @ k.double().swapaxes(1, 2)).tril() @ v.double()
    found = _gpu_linear.inside(q, k, v, states)
    assert found.dtype == torch.float32
    assert (found - wanted).abs().max() < 2e-3 * wanted.abs().max()


def test_what_passes_through_a_state_is_added_in_place():
    out, x, state = numbers(2, 128, 32), numbers(2, 128, 32, seed=1, dtype=torch.float16), numbers(2, 32, 32, seed=2)
    wanted = out.double() + x.double() @ state.double()
    assert _gpu_linear.add_through(out, x, state) is out
    assert (out - wanted).abs().max() < 2e-3 * wanted.abs().max()


@pytest.mark.parametrize(
    "heads, tokens, width, chunks, dtype",
    [(2, 100, 32, 1, torch.float16), (2, 128, 48, 1, torch.float16), (2, 128, 32, 4, torch.float16),
     (2, 128, 32, 1, torch.float32), (2, 128, 8, 1, torch.float16)],
)  # fmt: skip
def test_arrays_that_do_not_fit_the_tiles_are_left_to_the_operators(heads, tokens, width, chunks, dtype):
    x = numbers(heads, tokens, width, dtype=dtype)
    assert not _gpu_linear.fits(x, x, chunks)
