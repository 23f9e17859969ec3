"""Searched scales for e2m1: NVFP4 and MXFP4. See ``streamq.kernels.reference.search``."""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import F32, e2m1_nearest, e4m3_value, e8m0_value, round_to
from .search import sum_of_squares


@triton.jit
def _errors(a, d, factor, QUOTIENT: tl.constexpr, N: tl.constexpr, W: tl.constexpr):
    """Squared errors f64 ``[N]`` of magnitudes whose codes are of ``a / d``, worth ``* factor``."""
    q = round_to(tl.div_rn(a, d[:, None]), QUOTIENT)
    return sum_of_squares(a - e2m1_nearest(q) * factor[:, None], N, W)


@triton.jit
def best_e4m3(a, absmax, d, g, N: tl.constexpr, W: tl.constexpr):
    """The best e4m3 code of a block scale around ``absmax`` and what to divide by.

    ``a`` f32 ``[N, W]``: magnitudes; ``d``: the divisor of ``absmax``; ``g``: global scales.
    """
    least = _errors(a, d, d, F32, N, W)
    code = absmax
    for i in range(8):
        step = i - 2 + (i >= 2)  # E4M3_STEPS
        tried = tl.minimum(tl.maximum(absmax.to(tl.int32) + step, 1), 0x7E).to(tl.uint32)
        divisor = tl.div_rn(e4m3_value(tried), g)
        error = _errors(a, divisor, divisor, F32, N, W)
        better = error < least  # never where it is NaN or both are infinite
        least = tl.where(better, error, least)
        code = tl.where(better, tried, code)
        d = tl.where(better, divisor, d)
    return code, d


@triton.jit
def best_e8m0(a, absmax, d, QUOTIENT: tl.constexpr, N: tl.constexpr, W: tl.constexpr):
    """The best exponent byte around ``absmax`` and what to divide by, ``d`` for absmax.

    That is not always the value of the byte: compressed-tensors loses some in f16 (``mx``).
    """
    first, power = d, e8m0_value(absmax)
    least = _errors(a, first, power, QUOTIENT, N, W)
    byte = absmax
    for i in range(2):
        step = 2 * i - 1  # E8M0_STEPS
        tried = tl.minimum(tl.maximum(absmax.to(tl.int32) + step, 0), 254).to(tl.uint32)
        divisor = round_to(e8m0_value(tried), QUOTIENT)
        # f16 lacks some powers of two: absmax once more, which wins nothing.
        lost = (divisor == 0) | (divisor == float("inf"))
        factor = tl.where(lost, power, divisor)
        divisor = tl.where(lost, first, divisor)
        error = _errors(a, divisor, factor, QUOTIENT, N, W)
        better = error < least
        least = tl.where(better, error, least)
        byte = tl.where(better, tried, byte)
        d = tl.where(better, divisor, d)
    return byte, d
