"""The definition of every scheme, in numpy and ml_dtypes: slow and obvious.

Every other backend returns these bytes, with no tolerance. Arithmetic is f32 after an
exact upcast, division is IEEE, rounding is half to even, results saturate.

``numerics="weight"`` is the arithmetic of compressed-tensors 0.19 and llm-compressor
0.14 on a CPU: scales, zero points and quotients are rounded to the dtype of the weight
after each step. The two differ only where this file asks for ``numerics``.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from streamq.errors import NonFiniteError
from streamq.schemes import BYTES, Numerics, Packing, Quantized, Scheme

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


def supports(scheme: Scheme) -> bool:
    """Whether this backend can run ``scheme``: the definition runs all of them."""
    return True


def amax(x: Array) -> Array:
    """Largest magnitude of each row of ``x [rows, cols]``, f32 ``[rows]``."""
    refuse_non_finite("weight", x)
    top: Array = np.abs(x.astype(F32)).max(axis=1, initial=0)
    return top


def outer_scale(amax: Array, scheme: Scheme, dtype: np.dtype[Any], numerics: Numerics) -> Array:
    """What stands above the blocks, from the amax of a tensor or fused group.

    The NVFP4 global scale (a divisor, f32), or the one scale of a whole-tensor scheme
    (rounded to its storage dtype, returned as f32). Same shape as ``amax``.
    """
    amax = np.asarray(amax, F32)
    if not scheme.two_level:
        return _guarded_scale(amax / _levels(scheme), scheme, dtype, numerics)
    with np.errstate(divide="ignore", over="ignore"):
        if numerics == "weight":
            tiny = F32(ml_dtypes.finfo(dtype).tiny)
            inverse = _as(F32(1) / np.maximum(amax, tiny), dtype)
            g = _as(inverse * NVFP4_RANGE, dtype)
        else:
            g = NVFP4_RANGE / amax
    return np.where(np.isfinite(g) & (amax > 0 if numerics == "f32" else True), g, F32(1))


def quantize(
    x: Array,
    scheme: Scheme,
    packing: Packing = BYTES,
    *,
    numerics: Numerics = "f32",
    outer: Array | None = None,
) -> Quantized:
    """Quantize ``x [rows, cols]`` (bf16, f16 or f32).

    ``outer`` is f32 ``[rows]``: ``outer_scale`` of the tensor that each row belongs to,
    for schemes that need it (a stack of tensors is quantized as one matrix).
    Raises NonFiniteError for a NaN or Inf in ``x`` or in a scale.
    """
    if scheme.inverse:
        from streamq.kernels import reference_group  # which needs this file

        return reference_group.quantize(x, scheme, packing)
    refuse_non_finite("weight", x)
    w = x.astype(F32)
    zero_point = None
    if scheme.whole_tensor:
        assert outer is not None
        stored = scale = outer[:, None]
    elif scheme.scale == "e8m0":
        stored, scale = _mx_scale(w, scheme, x.dtype, numerics)
    elif scheme.scale == "e4m3":
        g = np.ones(len(w), F32) if outer is None else outer
        stored, scale = _nvfp4_scale(w, scheme, x.dtype, numerics, g)
    elif scheme.symmetric:
        top = _block_reduce(np.abs(w), scheme, np.maximum)
        scale = _guarded_scale(top / _levels(scheme), scheme, x.dtype, numerics)
        stored = scale.astype(_scale_dtype(scheme, x.dtype))
        if scheme.unrounded:  # gpt-fast's guard; the stored scale is never 0 either
            scale = np.maximum(top / _levels(scheme), ml_dtypes.finfo(F32).eps)
            stored = _guarded_scale(scale, scheme, x.dtype, numerics).astype(stored.dtype)
    else:
        scale, zero_point = _asymmetric(w, scheme, x.dtype, numerics)
        stored = scale.astype(_scale_dtype(scheme, x.dtype))
    refuse_non_finite("scale", stored)
    if scheme.scales == "search":
        from streamq.kernels import reference_search as better  # which needs all of this file

        if better.searches(scheme):
            absmax = better.Blocks(stored, scale, zero_point)
            found = better.search(w, scheme, x.dtype, numerics, outer, absmax)
            stored, scale, zero_point = found

    codes = codes_of(w, scale, zero_point, scheme, x.dtype, numerics)
    return Quantized(pack(codes, packing), stored, zero_point, outer if scheme.two_level else None)


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
    if numerics == "weight" and not scheme.two_level:
        q = _as(q, weight)
    if scheme.element == "e2m1":
        return e2m1_codes(q)
    if scheme.element == "e4m3":
        return np.clip(q, -E4M3_MAX, E4M3_MAX).astype(E4M3)
    lo, hi = scheme.code_range
    if zero_point is not None:
        q = q + spread(zero_point.astype(F32), scheme, w.shape)
        q = _as(q, weight) if numerics == "weight" else q
    return np.rint(np.clip(q, lo, hi)).astype(np.int8)


def dequantize(q: Quantized, scheme: Scheme) -> Array:
    """Values of unpacked codes, f32 ``[rows, cols]``: ``(code - zero) * scale / global``.

    With a bias ``(code + 2^(bits-1)) * scale + bias``, the zero point is then in the bias.
    Infinite where a weight near the largest f32 was rounded up, as it is for a loader.
    """
    if scheme.inverse:
        from streamq.kernels import reference_group

        return reference_group.dequantize(q, scheme)
    if scheme.element == "e2m1":
        magnitude = E2M1_VALUES[q.codes & 7]
        w = np.where(q.codes & 8, -magnitude, magnitude)
    else:
        w = q.codes.astype(F32)
    scale = _e8m0_value(q.scale) if scheme.scale == "e8m0" else q.scale.astype(F32)
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


def refuse_non_finite(what: str, x: Array) -> None:
    """Raise NonFiniteError at the first NaN or Inf of a 2-D float array."""
    if x.dtype == np.uint8:
        return
    bad = ~np.isfinite(x.astype(F32))
    if bad.any():
        row, col = np.argwhere(bad)[0]
        raise NonFiniteError(what, int(row), int(col))


# --- scales ---------------------------------------------------------------------------


def _as(x: Array, dtype: np.dtype[Any]) -> Array:
    """Round to ``dtype`` and come back to f32."""
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(dtype).astype(F32)


_FLOATS = {"bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype(np.float16)}


def _scale_dtype(scheme: Scheme, weight: np.dtype[Any]) -> np.dtype[Any]:
    return weight if scheme.scale == "weight" else _FLOATS.get(scheme.scale, np.dtype(F32))


def _levels(scheme: Scheme) -> np.float32:
    """What amax is divided by: the code it should land on."""
    if scheme.element == "e4m3":
        return E4M3_MAX
    half = 1 << (scheme.bits - 1)
    return F32(half - 1 if scheme.narrow else half - 0.5)


def _guarded_scale(
    scale: Array, scheme: Scheme, weight: np.dtype[Any], numerics: Numerics
) -> Array:
    """Round to the storage dtype; a scale of 0 becomes one that can be divided by."""
    stored = _scale_dtype(scheme, weight)
    eps = F32(ml_dtypes.finfo(stored).eps)
    substitute = F32(1) if scheme.element == "e4m3" and numerics == "f32" else eps
    if scheme.power_of_two:
        mantissa, exponent = np.frexp(scale)
        scale = np.where(scale == 0, 0, np.ldexp(F32(1), exponent - (mantissa == 0.5)))
    scale = _as(scale, stored)
    return np.where(scale == 0, substitute, scale)


def _asymmetric(
    w: Array, scheme: Scheme, weight: np.dtype[Any], numerics: Numerics, factor: Any = 1
) -> tuple[Array, Array]:
    lo, hi = scheme.code_range
    low = np.minimum(_block_reduce(w, scheme, np.minimum), 0) * factor
    high = np.maximum(_block_reduce(w, scheme, np.maximum), 0) * factor
    if numerics == "weight":
        low, high = _as(low, weight), _as(high, weight)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        span = high - low
        if numerics == "weight":
            span = _as(span, weight)
        scale = _as(span / F32(hi - lo), _scale_dtype(scheme, weight))
        zero = low / scale
        zero = F32(lo) - (_as(zero, weight) if numerics == "weight" else zero)
        if numerics == "weight":
            zero = _as(zero, weight)
    # compressed-tensors divides by an underflowed scale: -inf where the minimum is below 0.
    of_zero_scale = hi if numerics == "weight" else 0
    zero = np.rint(np.clip(np.where(np.isnan(zero), 0, zero), lo, hi))
    zero = np.where(scale == 0, np.where(low < 0, of_zero_scale, 0), zero).astype(np.int8)
    return _guarded_scale(scale, scheme, weight, numerics), zero


def _nvfp4_scale(
    w: Array, scheme: Scheme, weight: np.dtype[Any], numerics: Numerics, g: Array
) -> tuple[Array, Array]:
    sixth = _block_reduce(np.abs(w), scheme, np.maximum) / E2M1_MAX
    if numerics == "weight":
        sixth = _as(sixth, weight)
    g = np.asarray(g, F32).reshape(-1, 1)
    s = np.minimum(sixth * g, E4M3_MAX).astype(E4M3).astype(F32)
    s = np.where(s == 0, NVFP4_ZERO_SCALE, s)
    return s.astype(E4M3), s / g


def _mx_scale(
    w: Array, scheme: Scheme, weight: np.dtype[Any], numerics: Numerics
) -> tuple[Array, Array]:
    top = _block_reduce(np.abs(w), scheme, np.maximum)
    if numerics == "weight":
        return _mx_scale_of_compressed_tensors(top, scheme, weight)
    mantissa, exponent = np.frexp(top)  # top = mantissa * 2^exponent, mantissa in [0.5, 1)
    e = exponent - 1 + (mantissa >= F32(0.875))  # floor(log2), +1 from 1.75 on
    byte = np.where(top == 0, 0, np.clip(e - MX_EMAX[scheme.element] + 127, 0, 254))
    return byte.astype(np.uint8), _e8m0_value(byte)


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
    scale = _as(_e8m0_value(byte), weight)
    lost = scale == 0
    scale = np.where(overflows, F32(np.inf), np.where(lost, F32(1), scale))
    return np.where(overflows | lost, 127, byte).astype(np.uint8), scale


def _e8m0_value(byte: Array) -> Array:
    """2^(byte - 127), exactly, subnormal for byte 0."""
    return np.ldexp(F32(1), byte.astype(np.int32) - 127).astype(F32)


# --- blocks ---------------------------------------------------------------------------


def _block_reduce(w: Array, scheme: Scheme, ufunc: np.ufunc) -> Array:
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
