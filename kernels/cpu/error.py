"""What quantizing lost: energies of a weight and of its error, from the codes as written.

Computed in units of the row, so that a loader which overflows f32 at the very end of its
range is not seen here. The scales of a row are spread over its elements first: one flat
loop then reads codes and weights and adds up squares, 23 GB/s of bf16 for NVFP4, against
19 with the values of the codes in memory and 13 block by block.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba as nb
import numpy as np
from numba.extending import register_jitable

from .bits import JIT, amax_bits, f32, i32, u8, u32, u64, value, widen

f64, i8 = np.float64, np.int8

#: Elements, or pairs of them, summed in f32 before they are added to an f64.
RUN = 1024


@register_jitable
def _twice_e2m1(code):
    """Twice the value of a code, whose magnitude is a digit of one constant."""
    twice = u32(0xC8643210) >> u32((code & u32(7)) << u32(2))
    v = f32(i32(twice & u32(15)))
    return u32(f32(v).view(u32) | u32((code & u32(8)) << u32(28))).view(f32)


@register_jitable
def _e4m3(code):
    """Value of a code that is no NaN; its subnormals are subnormals of f32 on the way.

    20 GB/s of bf16, against 14 with cases for subnormals and NaN.
    """
    bits = u32(i32(i32(i8(code)) << i32(20)))
    return f32(u32(bits & u32(0x87F00000)).view(f32) * f32(2.0**120))


@register_jitable
def _unit(row):
    """Exponent of a power of two near the largest of a row: squares in it stay within f32."""
    top = u32(widen(amax_bits(row, u64(0), u64(row.size))) >> u32(23))
    return u32(min(max(top, u32(32)), u32(253)))


@register_jitable
def _spread(per_block, factor, width, out):
    """Each block's scale times ``factor`` at each of its elements.

    Bounded, so that codes of 0 can be multiplied with it: a row far below has no others.
    """
    n, begun = u64(out.size), u64(0)
    if u64(8) <= width <= u64(64) and width & (width - u64(1)) == u64(0):
        # By 16 with two scales, as LLVM leaves shorter loops scalar: NVFP4 18 against 11 GB/s.
        shift = u64(3)
        while width >> shift > u64(1):
            shift += u64(1)
        begun = n >> max(shift, u64(4)) << max(shift, u64(4))
        for first in range(u64(0), begun, u64(16)):
            low = min(f32(per_block[first >> shift] * factor), f32(1e34))
            high = min(f32(per_block[(first + u64(8)) >> shift] * factor), f32(1e34))
            for i in range(u64(16)):
                out[first + i] = low if i < u64(8) else high
    for block in range(begun // width, (n + width - u64(1)) // width):
        s = min(f32(per_block[block] * factor), f32(1e34))
        for i in range(block * width, min(n, (block + u64(1)) * width)):
            out[i] = s


@cache
def sums(element: str, paired: bool, zeroed: bool) -> Any:
    """The kernel for an element type, two codes or one a byte, with or without zero points.

    ``f(x, codes, flip, scale, zero, g, br, bc, out)``: sums of squares of ``x [rows, cols]``
    (bits) and of what its codes miss into ``out`` f64 ``[rows, 2]``. ``codes`` uint8: pairs of
    e2m1 or of offset binary; e4m3; or int8 with its bits turned over where ``flip`` has
    them. ``scale`` and ``zero`` f32 ``[row blocks, col blocks]`` of ``br`` by ``bc``, ``g`` f32
    ``[rows]`` what the scale is divided by. Pairs need ``bc`` and ``cols`` to be even.
    """
    e2m1, e4m3 = element == "e2m1", element == "e4m3"
    unit_of_codes = f32(0.5 if e2m1 else 1)
    offset = f32(8 if paired and not e2m1 else 0)

    @nb.njit(fastmath={"reassoc", "contract"}, **JIT)  # a SQNR is not a checkpoint byte
    def kernel(x, codes, flip, scale, zero, g, br, bc, out):
        step = u64(2 if paired else 1)
        n, width = u64(x.shape[1]) // step, u64(bc) // step
        scales, zeros = np.empty(n, np.float32), np.empty(n, np.float32)
        for r in range(u64(x.shape[0])):
            row, row_codes = x[r], codes[r]
            unit = _unit(row)
            inverse = u32(u32(u32(254) - unit) << u32(23)).view(f32)
            _spread(scale[r // u64(br)], f32(f32(inverse / g[r]) * unit_of_codes), width, scales)
            if zeroed:
                _spread(zero[r // u64(br)], f32(1), width, zeros)
            signal, noise = f64(0), f64(0)
            for first in range(u64(0), n, u64(RUN)):
                ww, ee = f32(0), f32(0)
                for i in range(first, min(n, first + u64(RUN))):
                    code, s = row_codes[i], scales[i]
                    z = zeros[i] + offset if zeroed else offset
                    if paired:
                        even = f32(value(row, u64(2) * i) * inverse)
                        odd = f32(value(row, u64(2) * i + u64(1)) * inverse)
                        low, high = u32(code & u8(15)), u32(code >> u8(4))
                        if e2m1:
                            v, u = _twice_e2m1(low), _twice_e2m1(high)
                        else:
                            v, u = f32(i32(low)), f32(i32(high))
                        ww += even * even + odd * odd
                        ee += (even - (v - z) * s) ** 2 + (odd - (u - z) * s) ** 2
                    else:
                        w = f32(value(row, i) * inverse)
                        v = _e4m3(code) if e4m3 else f32(i8(code ^ flip))
                        ww += w * w
                        ee += (w - (v - z) * s) ** 2
                signal += f64(ww)
                noise += f64(ee)
            square = f64(u32(unit << u32(23)).view(f32)) ** 2
            out[r, 0] = signal * square
            out[r, 1] = noise * square

    return kernel
