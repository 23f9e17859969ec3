"""Floating point by its bits: the pieces all CPU kernels are made of.

Weights come in as unsigned integers, uint16 for bf16 and uint32 for f32, because numba
has neither bf16 nor f16 on a CPU and because the largest magnitude of a block is an
integer maximum. Everything here is inlined into the kernels and has no branches that
would keep LLVM from vectorizing the loop around it.
"""

from __future__ import annotations

import numba as nb
import numpy as np
from numba.extending import overload, register_jitable

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
i16, i32 = np.int16, np.int32
f32 = np.float32

INF_BITS = u32(0x7F800000)
ABS_MASK = u32(0x7FFFFFFF)

# How `round_to` and the kernels name the dtype that a number is rounded to.
ROUND_F32, ROUND_BF16, ROUND_F16 = 0, 1, 2


def value(x, i):
    """Element ``i`` as f32."""


@overload(value)
def _value(x, i):
    if x.dtype == nb.uint16:
        return lambda x, i: u32(u32(x[i]) << u32(16)).view(f32)
    return lambda x, i: u32(x[i]).view(f32)


def magnitude(x, i):
    """Bits of element ``i`` without its sign, in the width of the array."""


@overload(magnitude)
def _magnitude(x, i):
    if x.dtype == nb.uint16:
        return lambda x, i: u16(x[i] & u16(0x7FFF))
    return lambda x, i: u32(x[i] & ABS_MASK)


def zero_bits(x):
    """0 in the width of the array."""


@overload(zero_bits)
def _zero_bits(x):
    if x.dtype == nb.uint16:
        return lambda x: u16(0)
    return lambda x: u32(0)


def widen(bits):
    """Bits of bf16 (uint16) or f32 (uint32) as bits of f32."""


@overload(widen)
def _widen(bits):
    if bits == nb.uint16:
        return lambda bits: u32(u32(bits) << u32(16))
    return lambda bits: u32(bits)


def key(x, i):
    """Element ``i`` as a signed integer that sorts as the floats do (-0 below 0)."""


@overload(key)
def _key(x, i):
    if x.dtype == nb.uint16:
        return lambda x, i: i16(i16(x[i]) ^ i16(i16(i16(x[i]) >> i16(15)) & i16(0x7FFF)))
    return lambda x, i: i32(i32(x[i]) ^ i32(i32(i32(x[i]) >> i32(31)) & i32(0x7FFFFFFF)))


def zero_key(x):
    """The key of 0."""


@overload(zero_key)
def _zero_key(x):
    if x.dtype == nb.uint16:
        return lambda x: i16(0)
    return lambda x: i32(0)


def key_value(k):
    """The f32 of a key."""


@overload(key_value)
def _key_value(k):
    if k == nb.int16:
        return lambda k: u32(
            u32(u16(i16(k ^ i16(i16(k >> i16(15)) & i16(0x7FFF))))) << u32(16)
        ).view(f32)
    return lambda k: u32(i32(k ^ i32(i32(k >> i32(31)) & i32(0x7FFFFFFF)))).view(f32)


@register_jitable
def amax_bits(x, start, stop):
    """Largest magnitude of ``x[start:stop]`` as bits; NaN and Inf are larger than all else.

    Indices and no slices, here and in all kernels: on blocks of 16 59 against 17 GB/s.
    """
    m = zero_bits(x)
    for i in range(start, stop):
        m = max(m, magnitude(x, i))
    return m


@register_jitable
def round_to(v, dtype):
    """Round an f32 to bf16 or f16, half to even, and return it as f32."""
    b = f32(v).view(u32)
    if dtype == ROUND_F32:
        return f32(v)
    if dtype == ROUND_BF16:
        if (b & ABS_MASK) > INF_BITS:
            return f32(v)
        b = u32(b + u32(0x7FFF) + ((b >> u32(16)) & u32(1)))
        return u32(b & u32(0xFFFF0000)).view(f32)
    a = u32(b & ABS_MASK)
    sign = u32(b ^ a)
    if a < u32(0x38800000):  # below 2^-14: f16 is subnormal, in steps of 2^-24, the ulp of 0.5
        r = f32(f32(u32(a).view(f32) + f32(0.5)) - f32(0.5))
        return u32(sign | f32(r).view(u32)).view(f32)
    if a >= u32(0x477FF000) and a <= INF_BITS:  # from 65520 on
        return u32(sign | INF_BITS).view(f32)
    if a > INF_BITS:
        return f32(v)
    a = u32(a + u32(0xFFF) + ((a >> u32(13)) & u32(1)))
    return u32(sign | (a & u32(0xFFFFE000))).view(f32)


@register_jitable
def e4m3_magnitude(a):
    """Code of a non-negative f32 in e4m3fn, saturated to 448; uint32 without a sign."""
    a = min(f32(a), f32(448))
    b = f32(a).view(u32)
    # Normal: round the mantissa to 3 bits with a carry into the exponent, rebias 127 -> 7.
    normal = u32(u32(b + u32(0x7FFFF) + ((b >> u32(20)) & u32(1))) >> u32(20)) - u32(120 << 3)
    # Subnormal: steps of 2^-9, which is the ulp of 2^14.
    small = f32(f32(a) + f32(16384)).view(u32) - u32(0x46800000)
    return u32(normal) if b >= u32(0x3C800000) else u32(small)


@register_jitable
def e4m3_value(code):
    """Value of a non-negative e4m3fn code."""
    normal = u32(u32(code + u32(120 << 3)) << u32(20)).view(f32)
    small = f32(f32(code) * f32(0.001953125))
    return normal if code > u32(7) else small


@register_jitable
def e4m3_code(q):
    """Code of an f32 in e4m3fn, half to even, saturated."""
    b = f32(q).view(u32)
    a = u32(b & ABS_MASK)
    return u32(((b ^ a) >> u32(24)) | e4m3_magnitude(u32(a).view(f32)))


@register_jitable
def e2m1_code(q):
    """Code of an f32 in e2m1, half to even, saturated to 6; a zero of either sign is 0.

    The value is added to a power of two whose ulp is the step of its range (0.5, 1, 2),
    so that the FPU does the rounding: 16.2 GB/s of bf16 against 9.8 with seven
    comparisons and 5.8 by rounding the mantissa bits.
    """
    b = f32(q).view(u32)
    a = u32(b & ABS_MASK)
    sign = u32((b ^ a) >> u32(28)) if a != u32(0) else u32(0)
    v = min(u32(a).view(f32), f32(6))
    high = a >= u32(0x40800000)  # 4
    middle = a >= u32(0x40000000)  # 2
    magic = u32(0x4B800000) if high else (u32(0x4B000000) if middle else u32(0x4A800000))
    base = u32(4) if high else (u32(2) if middle else u32(0))
    steps = u32(f32(v + u32(magic).view(f32)).view(u32) - magic)
    return u32(sign | u32(steps + base))


@register_jitable
def rint_code(v, lo, hi):
    """Clamp to ``[lo, hi]`` and round half to even; the integer as uint32 two's complement."""
    v = min(max(f32(v), f32(lo)), f32(hi))
    return u32(f32(v + f32(12582912)).view(u32) - u32(0x4B400000))


@register_jitable
def pack_nibbles(codes, out):
    """Two codes per byte, the even one low; ``codes`` has an even length."""
    for i in range(u64(out.size)):
        out[i] = u8(codes[u64(2) * i] | (codes[u64(2) * i + u64(1)] << u8(4)))
