"""Values of codes, as a loader computes them: f32, ``(code - zero) * scale``."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable

from streamq.compiled import jit

from .bits import e4m3_value, f32, u8, u32, u64

i8 = np.int8

E2M1, E4M3, INT = 0, 1, 2


@register_jitable
def e2m1_value(code):
    """Value of a code with its sign in bit 3; the bits above are not looked at."""
    m = u32(code & u8(7))
    normal = u32((m << u32(22)) + u32(126 << 23)).view(f32)  # two bits of exponent, one behind
    v = normal if m > u32(1) else f32(f32(m) * f32(0.5))
    return u32(f32(v).view(u32) | (u32(code & u8(8)) << u32(28))).view(f32)


@register_jitable
def e4m3_signed_value(code):
    """Value of a code with its sign in bit 7."""
    m = u32(code & u8(127))
    v = u32(f32(e4m3_value(m)).view(u32)) if m != u32(127) else u32(0x7FC00000)
    return u32(v | (u32(code & u8(128)) << u32(24))).view(f32)


@register_jitable
def _value(code, element):
    if element == E2M1:
        return e2m1_value(code)
    if element == E4M3:
        return e4m3_signed_value(code)
    return f32(i8(code))


@jit
def look_up(codes: Any, table: Any, out: Any) -> None:
    """``table`` f32 ``[256]`` at each of ``codes`` uint8 ``[n]``, into ``out`` f32 ``[n]``.

    7 microseconds for 32,768 scales, ``table.take`` 17, a quarter of the NVFP4 kernel's time.
    """
    for i in range(u64(codes.size)):
        out[i] = table[codes[i]]


def _values(element: int) -> Any:
    """The kernel of an element type, a literal so that no loop has a branch in it."""

    @jit
    def values(codes, scale, zero, br, bc, out):
        cols, width = u64(codes.shape[1]), u64(bc)
        for r in range(u64(codes.shape[0])):
            row, row_out = codes[r], out[r]
            row_scale, row_zero = scale[r // u64(br)], zero[r // u64(br)]
            begun = u64(0)
            if width == u64(16):
                # By 32, as LLVM unrolls a loop of 16: 53 against 23 GB/s of e2m1 values.
                begun = cols & u64(0xFFFFFFFFFFFFFFE0)
                for first in range(u64(0), begun, u64(32)):
                    a = first // u64(16)
                    low, high = row_scale[a], row_scale[a + u64(1)]
                    low_zero, high_zero = row_zero[a], row_zero[a + u64(1)]
                    for i in range(u64(32)):
                        s = low if i < u64(16) else high
                        z = low_zero if i < u64(16) else high_zero
                        v = _value(row[first + i], element)
                        row_out[first + i] = f32(f32(v - z) * s)
            for block in range(begun // width, (cols + width - u64(1)) // width):
                s, z = row_scale[block], row_zero[block]
                for i in range(block * width, min(cols, (block + u64(1)) * width)):
                    row_out[i] = f32(f32(_value(row[i], element) - z) * s)

    return values


#: By element: values of ``codes`` uint8 ``[rows, cols]`` into ``out`` f32 of the same shape.
#: ``scale`` and ``zero`` f32 ``[row blocks, col blocks]`` of ``br`` by ``bc``, the last ragged.
VALUES = {"e2m1": _values(E2M1), "e4m3": _values(E4M3), "int": _values(INT)}
