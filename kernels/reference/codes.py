"""Codes: rounding, packing, and the values that they stand for."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from streamq.errors import NonFiniteError
from streamq.schemes import Numerics, Packing, Quantized, Scheme

Array = np.ndarray[Any, Any]

F32 = np.float32
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E4M3_MAX = F32(448)
E2M1_MAX = F32(6)
E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], F32)
#: 448 * 6: the largest block scale times the largest code (NVFP4).
NVFP4_RANGE = F32(2688)
#: What replaces an NVFP4 block scale of 0 (the guard compressed-tensors uses).
NVFP4_ZERO_SCALE = F32(0.125)
#: floor(log2(largest element)) per element type (OCP MX specification 1.0, table 1).
MX_EMAX = {"e2m1": 2, "e4m3": 8}


def codes_of(
    w: Array,
    scale: Array,
    zero_point: Array | None,
    scheme: Scheme,
    weight: np.dtype[Any],
    numerics: Numerics,
) -> Array:
    """Codes, one per byte, of ``w`` f32 ``[rows, cols]`` under the scale of each block."""
    q = w / spread(scale, scheme, w.shape)
    if numerics == "weight" and scheme.scale != "e4m3":
        q = round_to(q, weight)
    if scheme.element == "e2m1":
        return e2m1_codes(q)
    if scheme.element == "e4m3":
        return np.clip(q, -E4M3_MAX, E4M3_MAX).astype(E4M3)
    lo, hi = scheme.code_range
    if zero_point is not None:
        q = q + spread(zero_point.astype(F32), scheme, w.shape)
        q = round_to(q, weight) if numerics == "weight" else q
    return np.rint(np.clip(q, lo, hi)).astype(np.int8)


def e2m1_codes(q: Array) -> Array:
    """Index of the nearest E2M1 value, ties to the even index, sign in bit 3; uint8.

    A negative that rounds to zero keeps its sign, a zero of either sign is code 0.
    """
    a = np.minimum(np.abs(q), E2M1_MAX)
    middle = (E2M1_VALUES[1:] + E2M1_VALUES[:-1]) / 2
    # At a tie the even index wins: going up from an odd index means `>=`, from an even one `>`.
    code = sum((a >= m) if i % 2 else (a > m) for i, m in enumerate(middle))
    sign = (np.signbit(q) & (q != 0)).astype(np.uint8) << 3
    signed: Array = np.asarray(code, np.uint8) | sign
    return signed


def pack(codes: Array, packing: Packing) -> Array:
    """Arrange ``codes [rows, cols]`` as ``packing`` says; uint8 ``[rows, row bytes]``."""
    if packing.kind == "bytes":
        return codes
    width = 4 if packing.kind == "nibbles" else packing.bits
    offset = 0 if packing.kind == "nibbles" else 1 << (packing.bits - 1)
    value = (codes.astype(np.int16) + offset).astype(np.uint8)
    bits = np.unpackbits(value[:, :, None], axis=2, count=width, bitorder="little")
    out = np.packbits(bits.reshape(len(codes), -1), axis=1, bitorder="little")
    return np.pad(out, ((0, 0), (0, packing.row_bytes(codes.shape[1]) - out.shape[1])))


def unpack(packed: Array, packing: Packing, cols: int, signed: bool) -> Array:
    """The inverse of ``pack``: int8 (``signed``) or uint8 codes ``[rows, cols]``."""
    if packing.kind == "bytes":
        return packed
    width = 4 if packing.kind == "nibbles" else packing.bits
    bits = np.unpackbits(packed, axis=1, count=cols * width, bitorder="little")
    value = np.packbits(bits.reshape(len(packed), cols, width), axis=2, bitorder="little")[:, :, 0]
    if not signed:
        return value
    return (value.astype(np.int16) - (1 << (packing.bits - 1))).astype(np.int8)


def dequantize(q: Quantized, scheme: Scheme) -> Array:
    """Values of unpacked codes, f32 ``[rows, cols]``: ``(code - zero) * scale / global``.

    With a bias ``(code + 2^(bits-1)) * scale + bias``, the zero point is then in the bias.
    Infinite where a weight near the largest f32 was rounded up, as it is for a loader.
    """
    if scheme.element == "e2m1":
        magnitude = E2M1_VALUES[q.codes & 7]
        w = np.where(q.codes & 8, -magnitude, magnitude)
    else:
        w = q.codes.astype(F32)
    scale = e8m0_value(q.scale) if scheme.scale == "e8m0" else q.scale.astype(F32)
    if q.global_scale is not None:
        scale = scale / np.asarray(q.global_scale, F32).reshape(-1, 1)
    if q.bias is not None:
        w = w + F32(1 << (scheme.bits - 1))
    elif q.zero_point is not None:
        w = w - spread(q.zero_point.astype(F32), scheme, w.shape)
    with np.errstate(over="ignore"):
        values: Array = w * spread(scale, scheme, w.shape)
        if q.bias is not None:
            values = values + spread(q.bias, scheme, w.shape)
    return values


def refuse_non_finite(what: str, x: Array) -> None:
    """Raise NonFiniteError at the first NaN or Inf of a 2-D float array."""
    if x.dtype == np.uint8:
        return
    bad = ~np.isfinite(x.astype(F32))
    if bad.any():
        row, col = np.argwhere(bad)[0]
        raise NonFiniteError(what, int(row), int(col))


def round_to(x: Array, dtype: np.dtype[Any]) -> Array:
    """Round to ``dtype`` and come back to f32."""
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(dtype).astype(F32)


def e8m0_value(byte: Array) -> Array:
    """2^(byte - 127), exactly, subnormal for byte 0."""
    return np.ldexp(F32(1), byte.astype(np.int32) - 127).astype(F32)


def block_reduce(w: Array, scheme: Scheme, ufunc: np.ufunc) -> Array:
    """Reduce each block of ``w [rows, cols]`` to one number: ``[row blocks, col blocks]``."""
    rows, cols = w.shape
    br, bc = scheme.block_of(rows, cols)
    across: Array = ufunc.reduceat(w, np.arange(0, cols, bc), axis=1)
    down: Array = ufunc.reduceat(across, np.arange(0, rows, br), axis=0)
    return down


def spread(per_block: Array, scheme: Scheme, shape: tuple[int, ...]) -> Array:
    """Each block's number at each of its elements."""
    rows, cols = shape
    br, bc = scheme.block_of(rows, cols)
    if per_block.shape[0] not in (rows, 1) or br == 1:
        per_block = per_block.repeat(br, axis=0)[:rows]
    return per_block.repeat(bc, axis=1)[:, :cols]
