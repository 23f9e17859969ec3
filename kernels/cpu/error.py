"""What quantizing lost: energies of a weight and of its error, from the codes as written.

Computed in units of the row, so that a loader which overflows f32 at the very end of its
range is not seen here.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
from numba.extending import register_jitable

from .bits import JIT, amax_bits, e4m3_value, f32, i32, u8, u16, u32, u64, value, widen

f64, i8 = np.float64, np.int8

E2M1, E4M3, INT = 0, 1, 2
#: Elements summed in f32 before they are added to an f64.
RUN = 1024


@register_jitable
def _e2m1_value(code):
    """Value of a code with its sign in bit 3."""
    m = u32(code & u8(7))
    normal = u32((m << u32(22)) + u32(126 << 23)).view(f32)  # two bits of exponent, one behind
    v = normal if m > u32(1) else f32(f32(m) * f32(0.5))
    return u32(f32(v).view(u32) | (u32(code & u8(8)) << u32(28))).view(f32)


@register_jitable
def _e4m3_value(code):
    """Value of a code with its sign in bit 7."""
    v = f32(e4m3_value(u32(code & u8(127))))
    return u32(f32(v).view(u32) | (u32(code & u8(128)) << u32(24))).view(f32)


@register_jitable
def _unpack_row(codes, bits, out):
    """One code per byte, offset binary as it is; ``bits`` of a code in the row."""
    n = u64(out.size)
    if bits == 4:
        pairs = out[: n // u64(2) * u64(2)].view(np.uint16)
        for i in range(u64(pairs.size)):
            v = u16(codes[i])
            pairs[i] = u16((v & u16(15)) | ((v & u16(240)) << u16(4)))
        if n % u64(2):
            out[n - u64(1)] = codes[n // u64(2)] & u8(15)
        return
    mask = (u32(1) << u32(bits)) - u32(1)
    for i in range(n):
        at = i * u64(bits)
        word = u32(codes[at >> u64(3)])
        if (at & u64(7)) + u64(bits) > u64(8):
            word |= u32(codes[(at >> u64(3)) + u64(1)]) << u32(8)
        out[i] = u8((word >> u32(at & u64(7))) & mask)


@register_jitable
def _decode(code, element, shift):
    if element == E2M1:
        return _e2m1_value(code)
    if element == E4M3:
        return _e4m3_value(code)
    return f32(i32(code) - i32(shift)) if shift else f32(i8(code))


@register_jitable
def _bounded(s):
    """A scale that codes of 0 can be multiplied with: a row far below it has no others."""
    return min(f32(s), f32(1e34))


def _sums(element: int) -> Any:
    """The kernel of an element type, a literal so that no loop has a branch in it."""

    @nb.njit(fastmath={"reassoc"}, **JIT)  # sums in any order: a SQNR is not a checkpoint byte
    def sums(x, codes, bits, shift, scale, zero, g, br, bc, out):
        cols, width = u64(x.shape[1]), u64(bc)
        unpacked = np.empty(x.shape[1], np.uint8)
        values = np.empty(x.shape[1], np.float32)
        for r in range(u64(x.shape[0])):
            row, row_scale, row_zero = x[r], scale[r // u64(br)], zero[r // u64(br)]
            if bits == 8:
                row_codes = codes[r]
            else:
                _unpack_row(codes[r], bits, unpacked)
                row_codes = unpacked
            # All in units of a power of two near the largest, so that squares stay within f32.
            top = u32(widen(amax_bits(row, u64(0), cols)) >> u32(23))
            unit = u32(min(max(top, u32(32)), u32(253)))
            inverse = u32(u32(u32(254) - unit) << u32(23)).view(f32)
            factor = f32(inverse / g[r])
            begun = u64(0)
            if width == u64(16) or width == u64(32):
                # By 32, as LLVM unrolls a loop of 16 and leaves it scalar: 10.6 against 2.4 GB/s.
                begun = cols & u64(0xFFFFFFFFFFFFFFE0)
                for first in range(u64(0), begun, u64(32)):
                    a, b = first // width, (first + u64(16)) // width
                    low, high = _bounded(row_scale[a] * factor), _bounded(row_scale[b] * factor)
                    low_zero, high_zero = row_zero[a], row_zero[b]
                    for i in range(u64(32)):
                        s = low if i < u64(16) else high
                        z = low_zero if i < u64(16) else high_zero
                        v = _decode(row_codes[first + i], element, shift)
                        values[first + i] = f32(f32(v - z) * s)
            for block in range(begun // width, (cols + width - u64(1)) // width):
                s, z = _bounded(row_scale[block] * factor), row_zero[block]
                for i in range(block * width, min(cols, (block + u64(1)) * width)):
                    values[i] = f32(f32(_decode(row_codes[i], element, shift) - z) * s)
            signal, noise = f64(0), f64(0)
            for first in range(u64(0), cols, u64(RUN)):
                ww, ee = f32(0), f32(0)
                for i in range(first, min(cols, first + u64(RUN))):
                    w = f32(value(row, i) * inverse)
                    e = f32(w - values[i])
                    ww += w * w
                    ee += e * e
                signal += f64(ww)
                noise += f64(ee)
            square = f64(u32(unit << u32(23)).view(f32)) ** 2
            out[r, 0] = signal * square
            out[r, 1] = noise * square

    return sums


#: By element: sums of squares of ``x [rows, cols]`` (bits) and of what its codes miss, into
#: ``out`` f64 ``[rows, 2]``. ``bits`` of a code in a row of ``codes``, ``shift`` of offset
#: binary, ``scale`` and ``zero`` f32 ``[row blocks, col blocks]`` of ``br`` by ``bc``, ``g``
#: f32 ``[rows]`` what the scale is divided by.
SUMS = {"e2m1": _sums(E2M1), "e4m3": _sums(E4M3), "int": _sums(INT)}
