"""MX: blocks of 32 with a power-of-two scale (E8M0), e2m1 or e4m3 elements."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable

from streamq.compiled import jit

from .bits import (
    ROUND_F16,
    ROUND_F32,
    amax_bits,
    e2m1_code,
    e4m3_code,
    f32,
    pack_nibbles,
    round_to,
    u8,
    u32,
    u64,
    value,
    widen,
)  # fmt: skip

PLAIN = -1  # no rounding of the scale and the quotient to the weight's dtype


@register_jitable
def _field(bits, rounding):
    """Biased exponent of the power of two that an amax counts as: up from 1.75 on."""
    if rounding == ROUND_F16 and bits < u32(0x38800000):
        # compressed-tensors masks the f16 itself, whose subnormals all have exponent 0.
        return u32(113) if bits >= u32(0x38400000) else u32(0)
    return u32(bits + u32(0x200000)) >> u32(23)


@jit
def mx(x: Any, bits: int, rounding: int, nibbles: bool, codes: Any, scale: Any) -> Any:
    """Quantize ``x [rows, cols]`` to ``bits`` = 4 (e2m1) or 8 (e4m3) in blocks of 32 columns.

    ``rounding``: PLAIN, or the weight's dtype for the arithmetic of compressed-tensors.
    ``codes`` uint8 ``[rows, cols / 2 or cols]``, ``scale`` uint8 ``[rows, cols / 32]``.
    Returns the bits of the largest magnitude.
    """
    rows, cols = x.shape
    blocks = u64(cols) // u64(32)
    top = np.empty(blocks, np.uint32)
    divisor = np.empty(blocks, np.float32)
    row_codes = np.empty(cols, np.uint8)
    emax = u32(2) if bits == 4 else u32(8)
    over = u32(143) if rounding == ROUND_F16 else u32(255)
    largest = u32(0)
    for r in range(u64(rows)):
        row = x[r]
        for b in range(blocks):
            top[b] = widen(amax_bits(row, b * u64(32), b * u64(32) + u64(32)))
        row_scale = scale[r]
        for b in range(blocks):
            largest = max(largest, top[b])
            field = _field(top[b], rounding)
            byte = field - emax if field > emax else u32(0)
            d = u32(byte << u32(23) if byte > u32(0) else u32(0x400000)).view(f32)
            if rounding != PLAIN:
                d = round_to(d, rounding)
                if field >= over:
                    byte, d = u32(127), u32(0x7F800000).view(f32)
                elif d == f32(0):
                    byte, d = u32(127), f32(1)
            row_scale[b] = u8(byte)
            divisor[b] = d
        out = row_codes if nibbles else codes[r]
        for b in range(blocks):
            first, last = b * u64(32), b * u64(32) + u64(32)
            d = divisor[b]
            if rounding > ROUND_F32:
                for i in range(first, last):
                    q = round_to(f32(value(row, i) / d), rounding)
                    out[i] = u8(e2m1_code(q) if bits == 4 else e4m3_code(q))
            elif bits == 4:
                for i in range(first, last):
                    out[i] = u8(e2m1_code(f32(value(row, i) / d)))
            else:
                for i in range(first, last):
                    out[i] = u8(e4m3_code(f32(value(row, i) / d)))
        if nibbles:
            pack_nibbles(row_codes, codes[r])
    return largest
