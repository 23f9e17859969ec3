"""Floating point by its bits: the pieces that all Triton kernels are made of.

Nothing here asks what the device can do: sm_80 converts no e4m3 and gfx942 has another one,
so codes are made by adding a power of two whose ulp is the step between them, as on the CPU.
Weights and scales of 16 bits are loaded and stored as integers.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What a number is rounded to, and what a pointer holds.
F32 = tl.constexpr(0)
BF16 = tl.constexpr(1)
F16 = tl.constexpr(2)

#: Instead of a dtype: a scale is rounded up to a power of two.
UP = tl.constexpr(3)

_ABS = tl.constexpr(0x7FFFFFFF)
_INF = tl.constexpr(0x7F800000)
#: 1.5 * 2^23: its ulp is 1, so adding it rounds to an integer, half to even.
_RINT = tl.constexpr(12582912.0)
_RINT_BITS = tl.constexpr(0x4B400000)


@triton.jit
def bits_of(v):
    """The bits of an f32."""
    return v.to(tl.uint32, bitcast=True)


@triton.jit
def float_of(bits):
    """The f32 of its bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def magnitude(v):
    """Bits of an f32 without its sign; those of NaN and Inf are larger than all others."""
    return bits_of(v) & _ABS


@triton.jit
def load(at, mask, KIND: tl.constexpr):
    """What lies ``at`` pointers of f32, or of int16 with the bits of bf16 or f16; f32."""
    v = tl.load(at, mask=mask, other=0)
    if KIND == BF16:
        v = float_of(v.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    elif KIND == F16:
        v = v.to(tl.float16, bitcast=True).to(tl.float32)
    return v


@triton.jit
def store(at, v, mask, KIND: tl.constexpr):
    """Round an f32 to bf16 or f16 and store its bits ``at`` pointers of int16, or as it is."""
    if KIND == BF16:
        bits = tl.where(magnitude(v) > _INF, 0x7FC0, bits_of(round_to(v, BF16)) >> 16)
        tl.store(at, bits.to(tl.uint16).to(tl.int16, bitcast=True), mask=mask)
    elif KIND == F16:
        tl.store(at, v.to(tl.float16).to(tl.int16, bitcast=True), mask=mask)
    else:
        tl.store(at, v, mask=mask)


@triton.jit
def round_to(v, KIND: tl.constexpr):
    """Round an f32 to bf16 or f16, half to even, and return it as f32; NaN becomes anything."""
    if KIND == BF16:
        b = bits_of(v)
        v = float_of((b + 0x7FFF + ((b >> 16) & 1)) & 0xFFFF0000)
    elif KIND == F16:
        v = v.to(tl.float16).to(tl.float32)
    return v


@triton.jit
def power_of_two(s):
    """The least power of two that is not below a positive f32; 0 for 0."""
    small = s < 7.888609052210118e-31  # 2^-100: may be subnormal, exact after a shift
    b = bits_of(tl.where(small, s * 18446744073709551616.0, s))
    up = float_of((b + 0x7FFFFF) & _INF)
    return tl.where(small, up * 5.421010862427522e-20, up)  # 2^64 and 2^-64


@triton.jit
def _nearest(a, MANTISSA: tl.constexpr, LEAST: tl.constexpr, TOP: tl.constexpr):
    """Code of a magnitude f32 with so many bits of mantissa, half to even, saturated to TOP.

    LEAST is the biased exponent of the smallest normal number, which subnormals share. Adding
    a power of two whose ulp is the step between codes makes the adder round.
    """
    v = tl.minimum(a, TOP)
    exponent = tl.maximum(bits_of(v), LEAST << 23) & _INF
    power = exponent + ((23 - MANTISSA) << 23)
    steps = bits_of(v + float_of(power)) - power
    return steps + (exponent >> (23 - MANTISSA)) - (LEAST << MANTISSA)


@triton.jit
def e4m3_magnitude(a):
    """Code of a non-negative f32 in e4m3fn, saturated to 448; uint32."""
    return _nearest(a, 3, 121, 448.0)


@triton.jit
def e4m3_code(q):
    """Code of an f32 in e4m3fn, half to even, saturated; uint32."""
    return e4m3_magnitude(tl.abs(q)) | ((bits_of(q) >> 24) & 0x80)


@triton.jit
def e2m1_code(q):
    """Code of an f32 in e2m1, half to even, saturated to 6; a zero of either sign is 0."""
    sign = tl.where(q != 0, (bits_of(q) >> 28) & 8, 0)
    return _nearest(tl.abs(q), 1, 127, 6.0) | sign


@triton.jit
def e4m3_value(code):
    """Value of a non-negative e4m3fn code, uint32."""
    return tl.where(code > 7, float_of((code + 960) << 20), code.to(tl.float32) * 0.001953125)


@triton.jit
def e4m3_signed_value(code):
    """Value of an e4m3fn code with its sign in bit 7, uint32; 0x7F and 0xFF are NaN."""
    m = code & 0x7F
    value = tl.where(m == 0x7F, 0x7FC00000, bits_of(e4m3_value(m)))
    return float_of(value | ((code & 0x80) << 24))


@triton.jit
def e2m1_value(code):
    """Value of an e2m1 code with its sign in bit 3, uint32; the bits above do not count."""
    m = code & 7
    value = tl.where(m > 1, float_of((m << 22) + (126 << 23)), m.to(tl.float32) * 0.5)
    return float_of(bits_of(value) | ((code & 8) << 28))


@triton.jit
def e2m1_nearest(a):
    """The value of the e2m1 code of a magnitude f32."""
    v = tl.minimum(a, 6.0)
    power = float_of((tl.maximum(bits_of(v), 127 << 23) & _INF) + (22 << 23))
    return (v + power) - power


@triton.jit
def e8m0_value(byte):
    """2^(byte - 127) of a uint32, subnormal for byte 0, Inf for 255."""
    return float_of(tl.where(byte > 0, byte << 23, 0x400000))


@triton.jit
def rint(v):
    """The nearest integer of an f32 below 2^22, half to even, as f32."""
    return (v + _RINT) - _RINT


@triton.jit
def rint_code(v):
    """The same as the two's complement of an int32, uint32."""
    return bits_of(v + _RINT) - _RINT_BITS


@triton.jit
def clamp(v, LO: tl.constexpr, HI: tl.constexpr):
    """``v`` kept within LO .. HI."""
    return tl.minimum(tl.maximum(v, LO), HI)


@triton.jit
def report(status, top, valid):
    """Note a NaN or Inf among weights of which ``top`` are the largest magnitudes, as bits."""
    tl.store(status + tl.zeros_like(top).to(tl.int32), 1, mask=valid & (top >= _INF))


@triton.jit
def report_scale(status, scale, valid):
    """Note a scale that is not finite, in the second place of ``status``."""
    tl.store(
        status + 1 + tl.zeros_like(scale).to(tl.int32), 1, mask=valid & (magnitude(scale) >= _INF)
    )
