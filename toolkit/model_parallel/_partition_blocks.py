"""Block quantisation: 8 or 4 bits a value and one scale for each block of them, all in one row of bytes.

    scale = max|x| / (2^(bits-1) - 1), or 1 for a block of zeros         code = round(x / scale)

Two 4-bit codes share a byte, so the array that travels is as long as the message: bits/8 bytes a value and 4 a block.
Source: block quantisation of ZeRO++, Wang et al. 2023, arXiv 2306.10209. Chapter: model_parallel/frontier_partitioning.
"""

import math

import numpy as np

from toolkit.runtime import Cost, kernel, like
from toolkit.runtime.errors import DtypeError, ShapeError


def packet_bytes(n, bits, block):
    """Bytes of n quantised values; bits None: of n values of 2 bytes."""
    return 2 * n if bits is None else -(-n * bits // 8) + 4 * _blocks(n, block)


def _blocks(n, block):
    return 1 if block == math.inf else -(-n // int(block))


def _out(x, bits, block):
    return like((*x.shape[:-1], packet_bytes(x.shape[-1], bits, block)), "uint8")


@kernel(cost=lambda x, bits, block: Cost(0, x.nbytes + _out(x, bits, block).nbytes), out=_out)
def quantise(x, bits, block):
    """Rows of values as rows of bytes: codes, then scales.

    x        (…, n) float; the last block of a row may be shorter
    returns  (…, packet_bytes(n, bits, block)) uint8
    raises   ShapeError   bits other than 4 or 8          DtypeError   no floats, or values that are not finite
    """
    if bits not in (4, 8):
        raise ShapeError(f"bits={bits!r}: codes have 4 or 8 bits")
    if x.dtype.kind != "f":
        raise DtypeError(f"quantise takes floats, not {x.dtype}")
    if not np.isfinite(x).all():
        raise DtypeError("quantise: a value is not finite, and its block would be lost; scale the loss")
    blocks = _in_blocks(x, block)
    top = np.float32(2 ** (bits - 1) - 1)
    scales = np.abs(blocks).max(axis=-1) / top
    scales = np.where(scales > 0, scales, np.float32(1))
    codes = np.rint(blocks / scales[..., None]).clip(-top, top).astype(np.int8)
    codes = codes.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]].view(np.uint8)
    if bits == 4:
        codes = _pairs(codes)
    return np.concatenate([codes, np.ascontiguousarray(scales).view(np.uint8)], axis=-1)


@kernel(
    cost=lambda packets, n, bits, block, dtype: Cost(
        0, packets.nbytes + math.prod(packets.shape[:-1]) * n * np.dtype(dtype).itemsize
    ),
    out=lambda packets, n, bits, block, dtype: like((*packets.shape[:-1], n), dtype),
)
def dequantise(packets, n, bits, block, dtype):
    """The reverse: (…, packet_bytes) uint8 -> (…, n) of `dtype`, each within half a scale of what was quantised."""
    if packets.shape[-1] != packet_bytes(n, bits, block):
        raise ShapeError(f"a packet of {packets.shape[-1]} bytes for {n} values of {bits} bits in blocks of {block}")
    cut = packets.shape[-1] - 4 * _blocks(n, block)
    codes, scales = packets[..., :cut], np.ascontiguousarray(packets[..., cut:]).view(np.float32)
    if bits == 4:
        low, high = codes << 4, codes & 0xF0
        codes = np.stack([low, high], axis=-1).reshape(*codes.shape[:-1], -1)[..., :n]
    codes = np.ascontiguousarray(codes).view(np.int8)
    if bits == 4:
        codes = codes >> 4  # keeps the sign
    return (_in_blocks(codes, block) * scales[..., None]).reshape(*codes.shape[:-1], -1)[..., :n].astype(dtype)


def _in_blocks(x, block):
    """(…, n) as float32 (…, blocks, block), the last block filled with zeros."""
    size = x.shape[-1] if block == math.inf else int(block)
    missing = -x.shape[-1] % size
    wide = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x
    return wide.reshape(*x.shape[:-1], -1, size).astype(np.float32)


def _pairs(codes):
    """Two codes a byte, the first in the low half."""
    if codes.shape[-1] % 2:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
    return (codes[..., 0::2] & 0x0F) | (codes[..., 1::2] << 4)


@kernel(
    cost=lambda packets, n, bits, block, dtype: Cost(0, packets.nbytes + n * np.dtype(dtype).itemsize),
    out=lambda packets, n, bits, block, dtype: like((n,), dtype),
)
def sum_of_packets(packets, n, bits, block, dtype):
    """Rows of packets dequantised and added: the sum never passes through codes. float32 at least."""
    wide = np.promote_types(dtype, np.float32)
    return dequantise(packets, n, bits, block, wide).sum(axis=0).astype(dtype)


# ---- vectors ---------------------------------------------------------------------------------------------------------


@kernel(cost=lambda x: Cost(0, 2 * x.nbytes), out=lambda x: like(x))
def copied(x):
    """x in memory of its own, so that what it was a view of can go."""
    return x.copy()


@kernel(cost=lambda x: Cost(0, x.nbytes), out=lambda x: like(x))
def zeros(x):
    return np.zeros_like(x)


@kernel(cost=lambda x, order: Cost(0, 2 * x.nbytes), out=lambda x, order: like(x))
def reordered(x, order):
    """Parts of x in another order: part order[i] comes to place i."""
    return x.reshape(len(order), -1)[list(order)].reshape(-1)
