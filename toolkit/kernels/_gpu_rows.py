"""Triton kernels that go over rows of (heads, tokens, head_dim) once: `merge`, `delta`, `along`.

Any strides, as long as channels and the numbers of rows lie side by side; head_dim a power of two.
"""

import torch
import triton
import triton.language as tl

ROWS = 16  # of one program


@triton.jit
def _merge(
    out, lse, part, part_lse, tokens, head, row, part_head, part_row, lse_head, part_lse_head,
    rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    h, t = tl.program_id(1), tl.program_id(0) * rows + tl.arange(0, rows)
    inside, channel = t < tokens, tl.arange(0, width)
    mine = tl.load(lse + h * lse_head + t, inside, float("-inf"))
    theirs = tl.load(part_lse + h * part_lse_head + t, inside, float("-inf"))
    high = tl.maximum(mine, theirs)
    high = tl.where(high == float("-inf"), 0.0, high)  # rows that no key has reached
    a, b = tl.exp(mine - high), tl.exp(theirs - high)
    total = tl.where(a + b > 0, a + b, 1.0)
    place, whole = out + h * head + t[:, None] * row + channel, inside[:, None]
    new = tl.load(part + h * part_head + t[:, None] * part_row + channel, whole, 0.0).to(tl.float32)
    merged = tl.load(place, whole, 0.0) * (a / total)[:, None] + new * (b / total)[:, None]
    tl.store(place, merged, whole)
    tl.store(lse + h * lse_head + t, high + tl.log(a + b), inside)


@triton.jit
def _delta(
    result, grad, out, tokens, grad_head, grad_row, out_head, out_row, rows: tl.constexpr, width: tl.constexpr
):  # fmt: skip
    h, t = tl.program_id(1), tl.program_id(0) * rows + tl.arange(0, rows)
    inside, channel = t < tokens, tl.arange(0, width)
    a = tl.load(grad + h * grad_head + t[:, None] * grad_row + channel, inside[:, None], 0.0).to(tl.float32)
    b = tl.load(out + h * out_head + t[:, None] * out_row + channel, inside[:, None], 0.0).to(tl.float32)
    tl.store(result + h * tokens + t, tl.sum(a * b, 1), inside)


@triton.jit
def _along(
    out, grad, delta, tokens, grad_head, grad_row, delta_head, tiny, rows: tl.constexpr, width: tl.constexpr
):  # fmt: skip
    h, t = tl.program_id(1), tl.program_id(0) * rows + tl.arange(0, rows)
    inside, channel = t < tokens, tl.arange(0, width)
    a = tl.load(grad + h * grad_head + t[:, None] * grad_row + channel, inside[:, None], 0.0).to(tl.float32)
    wanted = tl.load(delta + h * delta_head + t, inside, 0.0)
    share = wanted / tl.maximum(tl.sum(a * a, 1), tiny)
    place = out + (h * tokens + t[:, None]) * width + channel
    tl.store(place, (a * share[:, None]).to(out.dtype.element_ty), inside[:, None])


def merge(out, lse, part, part_lse):
    """As `gpu._merge`: in place."""
    heads, tokens, width = out.shape
    _merge[triton.cdiv(tokens, ROWS), heads](
        out, lse, part, part_lse, tokens, out.stride(0), out.stride(1), part.stride(0), part.stride(1),
        lse.stride(0), part_lse.stride(0), ROWS, width,
    )  # fmt: skip


def delta(grad_out, out):
    """As `gpu.delta`."""
    heads, tokens, width = out.shape
    result = torch.empty(heads, tokens, dtype=torch.float32, device=out.device)
    _delta[triton.cdiv(tokens, ROWS), heads](
        result, grad_out, out, tokens, grad_out.stride(0), grad_out.stride(1), out.stride(0), out.stride(1),
        ROWS, width,
    )  # fmt: skip
    return result


def along(grad_out, delta):
    """As `gpu.along`."""
    heads, tokens, width = grad_out.shape
    out = torch.empty(heads, tokens, width, dtype=grad_out.dtype, device=grad_out.device)
    _along[triton.cdiv(tokens, ROWS), heads](
        out, grad_out, delta, tokens, grad_out.stride(0), grad_out.stride(1), delta.stride(0),
        torch.finfo(torch.float32).tiny, ROWS, width,
    )  # fmt: skip
    return out
