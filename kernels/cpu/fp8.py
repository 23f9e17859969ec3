"""FP8 e4m3: a scale per row, per block of rows and columns, or given from outside."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable

from streamq.compiled import jit

from .bits import (
    ROUND_F32,
    amax_bits,
    e4m3_code,
    f32,
    round_to,
    u8,
    u32,
    u64,
    value,
    widen,
)  # fmt: skip

#: Instead of a dtype: the scale is rounded up to a power of two.
UP = -1


@register_jitable
def _power_of_two(s):
    """The least power of two that is not below an f32."""
    small = s < f32(2.0**-100)  # may be subnormal; exact after a shift
    b = f32(s * f32(2.0**64) if small else s).view(u32)
    up = u32((b + u32(0x7FFFFF)) & u32(0x7F800000)).view(f32)
    return f32(up * f32(2.0**-64)) if small else up


@register_jitable
def _codes(x, start, stop, d, rounding, out):
    if rounding > ROUND_F32:
        for i in range(start, stop):
            out[i] = u8(e4m3_code(round_to(f32(value(x, i) / d), rounding)))
    else:
        for i in range(start, stop):
            out[i] = u8(e4m3_code(f32(value(x, i) / d)))


@jit
def fp8_blocks(
    x: Any, br: int, bc: int, stored: int, quotient: int, substitute: Any, codes: Any, scale: Any
) -> Any:
    """Quantize ``x [rows, cols]`` in blocks of ``br`` rows and ``bc`` columns, the last ragged.

    ``stored``: what the scale is rounded to, or UP; ``quotient``: what x / scale is rounded to
    before the code; ``substitute``: the scale of a zero block. ``codes`` uint8 ``[rows,
    cols]``, ``scale`` f32 ``[row blocks, col blocks]``.
    Returns the bits of the largest magnitude.
    """
    rows, cols = u64(x.shape[0]), u64(x.shape[1])
    height, width = u64(br), u64(bc)
    blocks = (cols + width - u64(1)) // width
    # Flat, because a row as an array of its own costs 20 ns: a quarter of the time at 256 columns.
    flat, flat_codes = x.reshape(x.size), codes.reshape(codes.size)
    top = np.empty(blocks, np.uint32)
    largest = u32(0)
    for i in range((rows + height - u64(1)) // height):
        first, last = i * height, min(rows, (i + u64(1)) * height)
        top[:] = u32(0)
        for r in range(first, last):
            for b in range(blocks):
                start, stop = r * cols + b * width, r * cols + min(cols, (b + u64(1)) * width)
                top[b] = max(top[b], widen(amax_bits(flat, start, stop)))
        row_scale = scale[i]
        for b in range(blocks):
            largest = max(largest, top[b])
            s = f32(u32(top[b]).view(f32) / f32(448))
            s = _power_of_two(s) if stored == UP else round_to(s, stored)
            row_scale[b] = substitute if s == f32(0) else s
        for r in range(first, last):
            for b in range(blocks):
                start, stop = r * cols + b * width, r * cols + min(cols, (b + u64(1)) * width)
                _codes(flat, start, stop, row_scale[b], quotient, flat_codes)
    return largest


@jit
def fp8_rows(x: Any, scale: Any, quotient: int, codes: Any) -> Any:
    """Codes of ``x [rows, cols]`` under the given ``scale`` f32 ``[rows]``.

    Returns the bits of the largest magnitude.
    """
    largest = u32(0)
    for r in range(u64(x.shape[0])):
        row = x[r]
        largest = max(largest, widen(amax_bits(row, u64(0), u64(row.size))))
        _codes(row, u64(0), u64(row.size), scale[r], quotient, codes[r])
    return largest
