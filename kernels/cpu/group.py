"""Integers with an inverse scale in groups along rows or columns (DB-GPT, FastChat).

Bit-equal to ``reference.group``. Groups of neighbouring columns are walked one by one. All
others, down the rows or ``stride`` columns apart, are lanes that are walked together, row by
row of a matrix ``[length, lanes]``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable
from streamq.kernels.reference.group import refuse_lost

from streamq.compiled import jit
from streamq.schemes import Packing, Quantized, Scheme

from .bits import (
    INF_BITS,
    amax_bits,
    f32,
    key,
    key_value,
    magnitude,
    rint_code,
    u8,
    u32,
    u64,
    value,
    widen,
    zero_bits,
    zero_key,
)
from .packing import pack_words

Array = np.ndarray[Any, Any]


def quantize(bits: Array, scheme: Scheme, packing: Packing, out: Quantized) -> Any:
    """Quantize ``bits [rows, cols]`` (uint16 of bf16, uint32 of f32) into ``out``.

    Returns the bits of the largest magnitude. Raises NonFiniteError where finite weights
    have a range that f32 cannot hold.
    """
    rows, cols = bits.shape
    height, width = scheme.block_of(rows, cols)
    packed = packing.kind == "words"
    codes = np.empty((rows, cols), np.uint8) if packed else out.codes.view(np.uint8)
    scale, bias = out.scale, out.bias
    if scheme.stride == height == 1:
        if bias is None:
            top = _symmetric(bits, width, _top(scheme), codes, scale)
        else:
            top = _asymmetric(bits, width, _top(scheme), _half(scheme), codes, scale, bias)
    else:
        shape, length = _lanes((rows, cols), scheme), max(height, width)
        x, lanes = bits.reshape(shape), codes.reshape(shape)
        blocks = (shape[0], -1, shape[2])
        if bias is None:
            top = _symmetric_lanes(x, length, _top(scheme), lanes, scale.reshape(blocks))
        else:
            top = _asymmetric_lanes(
                x, length, _top(scheme), _half(scheme), lanes, scale.reshape(blocks),
                bias.reshape(blocks),
            )  # fmt: skip
    if packed:
        pack_words(codes, packing.bits, int(_half(scheme)), out.codes.view(np.uint8))
    if top < INF_BITS:
        refuse_lost(scale, scheme)
    return top


def dequantize(q: Quantized, scheme: Scheme, out: Array) -> Array:
    """Values of unpacked codes ``[rows, cols]`` into ``out``, f32 of the same shape."""
    rows, cols = out.shape
    height, width = scheme.block_of(rows, cols)
    codes = q.codes.view(np.int8)
    offset = np.float32(0) if q.bias is None else _half(scheme)
    if scheme.stride == height == 1:
        _values(codes, width, q.scale, q.scale if q.bias is None else q.bias, offset, out)
        return out
    shape, length = _lanes((rows, cols), scheme), max(height, width)
    blocks = (shape[0], -1, shape[2])
    scale = q.scale.reshape(blocks)
    bias = scale if q.bias is None else q.bias.reshape(blocks)
    _values_of_lanes(codes.reshape(shape), length, scale, bias, offset, out.reshape(shape))
    return out


def energies(x: Array, q: Quantized, scheme: Scheme) -> Array:
    """Sums of squares of each row of ``x`` and of its error, f64 ``[rows, 2]``; codes unpacked."""
    values = dequantize(q, scheme, np.empty(x.shape, np.float32))
    w = x.astype(np.float64)
    return np.stack([np.square(w).sum(axis=1), np.square(w - values).sum(axis=1)], axis=1)


def _top(scheme: Scheme) -> np.float32:
    """The largest code, of those that count from 0 where they are asymmetric."""
    return np.float32((1 << (scheme.bits - scheme.symmetric)) - 1)


def _half(scheme: Scheme) -> np.float32:
    return np.float32(1 << (scheme.bits - 1))


def _lanes(shape: tuple[int, int], scheme: Scheme) -> tuple[int, int, int]:
    """``[matrices, length, lanes]`` of groups that do not lie in neighbouring columns."""
    rows, cols = shape
    if scheme.block[0] != 1:
        return 1, rows, cols
    return rows, cols // scheme.stride, scheme.stride


# --- kernels ---------------------------------------------------------------------------


@register_jitable
def _inverse(top, span):
    """``1 / span * top``, rounded twice; 1 where that is not finite."""
    s = f32(f32(f32(1) / span) * top)
    return s if u32(f32(s).view(u32)) < INF_BITS else f32(1)


@jit
def _symmetric(x: Any, group: int, top: Any, codes: Any, scale: Any) -> Any:
    cols, width, largest = u64(x.shape[1]), u64(group), u32(0)
    for r in range(u64(x.shape[0])):
        row, out, row_scale = x[r], codes[r], scale[r]
        for g in range(u64(row_scale.size)):
            start, stop = g * width, min(cols, g * width + width)
            amax = widen(amax_bits(row, start, stop))
            largest = max(largest, amax)
            s = _inverse(top, u32(amax).view(f32))
            row_scale[g] = s
            for i in range(start, stop):
                out[i] = u8(rint_code(f32(value(row, i) * s), -top, top))
    return largest


@jit
def _asymmetric(
    x: Any, group: int, top: Any, half: Any, codes: Any, scale: Any, bias: Any
) -> Any:  # fmt: skip
    cols, width, largest = u64(x.shape[1]), u64(group), u32(0)
    for r in range(u64(x.shape[0])):
        row, out, row_scale, row_bias = x[r], codes[r], scale[r], bias[r]
        for g in range(u64(row_scale.size)):
            start, stop = g * width, min(cols, g * width + width)
            largest = max(largest, widen(amax_bits(row, start, stop)))
            ragged = stop - start < width
            least = zero_key(x) if ragged else key(row, start)
            most = least
            for i in range(start, stop):
                least = min(least, key(row, i))
                most = max(most, key(row, i))
            low = f32(key_value(least) + f32(0))  # -0 becomes 0
            s = _inverse(top, f32(key_value(most) - low))
            row_scale[g], row_bias[g] = s, low
            for i in range(start, stop):
                q = rint_code(f32(f32(value(row, i) - low) * s), f32(0), top)
                out[i] = u8(q - u32(half))
    return largest


@jit
def _symmetric_lanes(x: Any, length: int, top: Any, codes: Any, scale: Any) -> Any:
    n, lanes, largest = u64(x.shape[1]), u64(x.shape[2]), u32(0)
    tops = np.empty(x.shape[2], x.dtype)
    for m in range(u64(x.shape[0])):
        for g in range(u64(scale.shape[1])):
            start, stop = g * u64(length), min(n, g * u64(length) + u64(length))
            tops[:] = zero_bits(x)
            for i in range(start, stop):
                row = x[m, i]
                for j in range(lanes):
                    tops[j] = max(tops[j], magnitude(row, j))
            row_scale = scale[m, g]
            for j in range(lanes):
                amax = widen(tops[j])
                largest = max(largest, amax)
                row_scale[j] = _inverse(top, u32(amax).view(f32))
            for i in range(start, stop):
                row, out = x[m, i], codes[m, i]
                for j in range(lanes):
                    out[j] = u8(rint_code(f32(value(row, j) * row_scale[j]), -top, top))
    return largest


@jit
def _asymmetric_lanes(
    x: Any, length: int, top: Any, half: Any, codes: Any, scale: Any, bias: Any
) -> Any:  # fmt: skip
    n, lanes, largest = u64(x.shape[1]), u64(x.shape[2]), u32(0)
    least, most = np.empty(x.shape[2], np.float32), np.empty(x.shape[2], np.float32)
    for m in range(u64(x.shape[0])):
        for g in range(u64(scale.shape[1])):
            start, stop = g * u64(length), min(n, g * u64(length) + u64(length))
            ragged = stop - start < u64(length)
            for j in range(lanes):
                v = f32(0) if ragged else value(x[m, start], j)
                least[j], most[j] = v, v
            for i in range(start, stop):
                row = x[m, i]
                for j in range(lanes):
                    v = value(row, j)
                    largest = max(largest, widen(magnitude(row, j)))
                    least[j], most[j] = min(least[j], v), max(most[j], v)
            row_scale, row_bias = scale[m, g], bias[m, g]
            for j in range(lanes):
                low = f32(least[j] + f32(0))  # -0 becomes 0
                row_scale[j], row_bias[j] = _inverse(top, f32(most[j] - low)), low
            for i in range(start, stop):
                row, out = x[m, i], codes[m, i]
                for j in range(lanes):
                    q = f32(f32(value(row, j) - row_bias[j]) * row_scale[j])
                    out[j] = u8(rint_code(q, f32(0), top) - u32(half))
    return largest


@jit
def _values(codes: Any, group: int, scale: Any, bias: Any, offset: Any, out: Any) -> None:
    """``offset`` is 0 where there is no bias, and the bias then anything."""
    cols, width = u64(codes.shape[1]), u64(group)
    for r in range(u64(codes.shape[0])):
        row, row_out = codes[r], out[r]
        for g in range(u64(scale.shape[1])):
            s, low = scale[r, g], bias[r, g] if offset else f32(0)
            for i in range(g * width, min(cols, g * width + width)):
                v = f32(f32(f32(row[i]) + offset) / s)
                row_out[i] = f32(v + low) if offset else v


@jit
def _values_of_lanes(
    codes: Any, length: int, scale: Any, bias: Any, offset: Any, out: Any
) -> None:  # fmt: skip
    for m in range(u64(codes.shape[0])):
        for i in range(u64(codes.shape[1])):
            row, row_out = codes[m, i], out[m, i]
            row_scale, row_bias = scale[m, i // u64(length)], bias[m, i // u64(length)]
            for j in range(u64(codes.shape[2])):
                v = f32(f32(f32(row[j]) + offset) / row_scale[j])
                row_out[j] = f32(v + row_bias[j]) if offset else v
