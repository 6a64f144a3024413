"""Linear attention on a GPU as Triton kernels: scores and states stay on the chip.

For float16 and bfloat16; sums are float32. head_dims are powers of two from 16, tokens a multiple of 64.
Source: Sun et al. 2025, arXiv 2502.07563, algorithm 2; tiles as FlashAttention-2 has them.
"""

import torch
import triton
import triton.language as tl

TILE = 64  # queries of one program, and keys that it sees at once


@triton.jit
def _queries(
    out, q, k, v, states, head, row, k_head, k_row, v_head, v_row, chunks, chunk,
    masked: tl.constexpr, through: tl.constexpr, add: tl.constexpr,
    tile: tl.constexpr, dk: tl.constexpr, dv: tl.constexpr,
):  # fmt: skip
    """out = (add: out +) (through: queries @ the state of their chunk +) (masked: ((q kᵀ) ⊙ Ψ) v inside the chunk)."""
    h, first = tl.program_id(1), tl.program_id(0) * tile
    i, r, c = tl.arange(0, tile), tl.arange(0, dk), tl.arange(0, dv)
    mine = tl.load(q + h * head + (first + i)[:, None] * row + r)
    place = out + (h * tl.num_programs(0) * tile + first + i[:, None]) * dv + c
    acc = tl.load(place) if add else tl.zeros((tile, dv), tl.float32)
    if through:
        state = states + (h * chunks + first // chunk) * dk * dv + r[:, None] * dv + c
        acc += tl.dot(mine, tl.load(state).to(mine.dtype))
    if masked:
        for start in range(first // chunk * chunk, first + 1, tile):
            keys = tl.load(k + h * k_head + (start + i)[:, None] * k_row + r)
            values = tl.load(v + h * v_head + (start + i)[:, None] * v_row + c)
            scores = tl.dot(mine, tl.trans(keys))
            scores = tl.where((first + i)[:, None] >= start + i, scores, 0.0)
            acc += tl.dot(scores.to(values.dtype), values)
    tl.store(place, acc)


def fits(q, v, chunks=1):
    """Whether the kernels take such arrays, cut into so many chunks."""
    widths = all(x.shape[2] >= 16 and x.shape[2].bit_count() == 1 and x.stride(2) == 1 for x in (q, v))
    return q.dtype in (torch.float16, torch.bfloat16) and q.shape[1] // chunks % TILE == 0 and widths


def inside(q, k, v, states=None):
    """As `toolkit.sequence_parallel._lasp2_kernels.inside`."""
    out = torch.empty(*q.shape[:2], v.shape[2], dtype=torch.float32, device=q.device)
    chunks = 1 if states is None else states.shape[1]
    before = states.cumsum(1).sub_(states) if chunks > 1 else None  # queries see the chunks before theirs
    _launch(out, q, k, v, before, chunks, masked=True)
    return out


def add_through(out, x, state):
    """out += x @ state, in place; out is contiguous."""
    _launch(out, x, x, out, state[:, None], 1, add=True)
    return out


def _launch(out, q, k, v, states, chunks, masked=False, add=False):
    heads, tokens, width = q.shape
    states = None if states is None else states.contiguous()
    _queries[tokens // TILE, heads](
        out, q, k, v, states, q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), chunks,
        tokens // chunks, masked, states is not None, add, TILE, width, out.shape[2],
    )  # fmt: skip
