"""Scales: what a block is divided by, from its largest magnitude or its range."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from streamq.schemes import Numerics, Scheme

from .codes import (
    E2M1_MAX,
    E4M3,
    E4M3_MAX,
    F32,
    MX_EMAX,
    NVFP4_RANGE,
    NVFP4_ZERO_SCALE,
    Array,
    block_reduce,
    e8m0_value,
    round_to,
)

_FLOATS = {"bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype(np.float16)}


def outer_scale(amax: Array, scheme: Scheme, dtype: np.dtype[Any], numerics: Numerics) -> Array:
    """What stands above the blocks, from the amax of a tensor or fused group.

    The NVFP4 global scale (a divisor, f32), or the one scale of a whole-tensor scheme
    (rounded to its storage dtype, returned as f32). Same shape as ``amax``.
    """
    amax = np.asarray(amax, F32)
    if not scheme.two_level:
        return guarded_scale(amax / levels(scheme), scheme, dtype, numerics)
    with np.errstate(divide="ignore", over="ignore"):
        if numerics == "weight":
            tiny = F32(ml_dtypes.finfo(dtype).tiny)
            inverse = round_to(F32(1) / np.maximum(amax, tiny), dtype)
            g = round_to(inverse * NVFP4_RANGE, dtype)
        else:
            g = NVFP4_RANGE / amax
    return np.where(np.isfinite(g) & (amax > 0 if numerics == "f32" else True), g, F32(1))


def scale_dtype(scheme: Scheme, weight: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype that a float scale is stored in."""
    return weight if scheme.scale == "weight" else _FLOATS.get(scheme.scale, np.dtype(F32))


def levels(scheme: Scheme) -> np.float32:
    """What amax is divided by: the code it should land on."""
    if scheme.element == "e4m3":
        return E4M3_MAX
    half = 1 << (scheme.bits - 1)
    return F32(half - 1 if scheme.narrow else half - 0.5)


def guarded_scale(scale: Array, scheme: Scheme, weight: np.dtype[Any], numerics: Numerics) -> Array:
    """Round to the storage dtype; a scale of 0 becomes one that can be divided by."""
    stored = scale_dtype(scheme, weight)
    eps = F32(ml_dtypes.finfo(stored).eps)
    substitute = F32(1) if scheme.element == "e4m3" and numerics == "f32" else eps
    if scheme.power_of_two:
        mantissa, exponent = np.frexp(scale)
        scale = np.where(scale == 0, 0, np.ldexp(F32(1), exponent - (mantissa == 0.5)))
    scale = round_to(scale, stored)
    return np.where(scale == 0, substitute, scale)


def asymmetric(
    w: Array, scheme: Scheme, weight: np.dtype[Any], numerics: Numerics, factor: Any = 1
) -> tuple[Array, Array]:
    """Scale and zero point of each block from its range, which always holds 0."""
    lo, hi = scheme.code_range
    low = np.minimum(block_reduce(w, scheme, np.minimum), 0) * factor
    high = np.maximum(block_reduce(w, scheme, np.maximum), 0) * factor
    if numerics == "weight":
        low, high = round_to(low, weight), round_to(high, weight)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        span = high - low
        if numerics == "weight":
            span = round_to(span, weight)
        scale = round_to(span / F32(hi - lo), scale_dtype(scheme, weight))
        zero = low / scale
        zero = F32(lo) - (round_to(zero, weight) if numerics == "weight" else zero)
        if numerics == "weight":
            zero = round_to(zero, weight)
    # compressed-tensors divides by an underflowed scale: -inf where the minimum is below 0.
    of_zero_scale = hi if numerics == "weight" else 0
    zero = np.rint(np.clip(np.where(np.isnan(zero), 0, zero), lo, hi))
    zero = np.where(scale == 0, np.where(low < 0, of_zero_scale, 0), zero).astype(np.int8)
    return guarded_scale(scale, scheme, weight, numerics), zero


def nvfp4_scale(
    w: Array, scheme: Scheme, weight: np.dtype[Any], numerics: Numerics, g: Array
) -> tuple[Array, Array]:
    """Block scales under a global one ``g`` f32 ``[rows]``: as stored, and what to divide by."""
    sixth = block_reduce(np.abs(w), scheme, np.maximum) / E2M1_MAX
    if numerics == "weight":
        sixth = round_to(sixth, weight)
    g = np.asarray(g, F32).reshape(-1, 1)
    s = np.minimum(sixth * g, E4M3_MAX).astype(E4M3).astype(F32)
    s = np.where(s == 0, NVFP4_ZERO_SCALE, s)
    return s.astype(E4M3), s / g


def mx_scale(
    w: Array, scheme: Scheme, weight: np.dtype[Any], numerics: Numerics
) -> tuple[Array, Array]:
    """Powers of two: as stored, E8M0, and what to divide by."""
    top = block_reduce(np.abs(w), scheme, np.maximum)
    if numerics == "weight":
        return _mx_scale_of_compressed_tensors(top, scheme, weight)
    mantissa, exponent = np.frexp(top)  # top = mantissa * 2^exponent, mantissa in [0.5, 1)
    e = exponent - 1 + (mantissa >= F32(0.875))  # floor(log2), +1 from 1.75 on
    byte = np.where(top == 0, 0, np.clip(e - MX_EMAX[scheme.element] + 127, 0, 254))
    return byte.astype(np.uint8), e8m0_value(byte)


def _mx_scale_of_compressed_tensors(
    top: Array, scheme: Scheme, weight: np.dtype[Any]
) -> tuple[Array, Array]:
    """The same where nothing leaves the weight dtype; else what 0.19 does.

    It adds a quarter to the mantissa bits and masks them off, so that a subnormal amax
    counts as 0. It keeps the scale in the weight dtype, where 2^-127 is 0 in f16 and is
    replaced by 1, and where the power behind the largest is infinite: all quotients are
    then 0, and the integer wrap-around of its logarithm stores 127.
    """
    info = ml_dtypes.finfo(weight)
    unsigned = np.dtype(f"u{weight.itemsize}")
    bits = top.astype(weight).view(unsigned).astype(np.int64)
    field = (bits + (1 << (info.nmant - 2))) >> info.nmant
    overflows = field == (1 << (info.bits - 1 - info.nmant)) - 1
    e = field - (1 << (info.bits - 2 - info.nmant)) + 1
    byte = np.where(field == 0, 0, np.clip(e - MX_EMAX[scheme.element] + 127, 0, 254))
    scale = round_to(e8m0_value(byte), weight)
    lost = scale == 0
    scale = np.where(overflows, F32(np.inf), np.where(lost, F32(1), scale))
    return np.where(overflows | lost, 127, byte).astype(np.uint8), scale
