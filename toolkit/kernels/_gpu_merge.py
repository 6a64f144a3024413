"""`merge` on a GPU as one Triton kernel: reads both parts once and writes the accumulator once."""

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


def launch(out, lse, part, part_lse):
    """Any strides, as long as channels and rows of lse lie side by side; head_dim a power of two."""
    heads, tokens, width = out.shape
    _merge[triton.cdiv(tokens, ROWS), heads](
        out, lse, part, part_lse, tokens, out.stride(0), out.stride(1), part.stride(0), part.stride(1),
        lse.stride(0), part_lse.stride(0), ROWS, width,
    )  # fmt: skip
