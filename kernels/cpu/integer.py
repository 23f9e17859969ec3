"""Integers of 2 to 8 bits, per group of columns or per row, symmetric or with a zero point."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable

from streamq.compiled import jit

from .bits import (
    ABS_MASK,
    ROUND_F32,
    amax_bits,
    f32,
    key,
    key_value,
    pack_nibbles,
    rint_code,
    round_to,
    u8,
    u32,
    u64,
    value,
    widen,
    zero_key,
)  # fmt: skip


@register_jitable
def _pack_words(codes, bits, out):
    """Least significant bit first; the 32-bit words of the format are little-endian bytes."""
    if bits == u64(8):
        for i in range(u64(codes.size)):
            out[i] = codes[i]
        for i in range(u64(codes.size), u64(out.size)):
            out[i] = u8(0)
    elif bits == u64(4) and u64(out.size) * u64(2) == u64(codes.size):
        pack_nibbles(codes, out)
    else:
        # Eight codes are `bits` whole bytes: 5.3 GB/s of bf16 at 3 bits, 3.0 bit by bit.
        eights = u64(codes.size) // u64(8)
        for i in range(eights):
            eight = u64(0)
            for j in range(u64(8)):
                eight |= u64(codes[i * u64(8) + j]) << (j * bits)
            for j in range(bits):
                out[i * bits + j] = u8(eight >> (j * u64(8)))
        acc, filled, o = u64(0), u64(0), eights * bits
        for i in range(eights * u64(8), u64(codes.size)):
            acc |= u64(codes[i]) << filled
            filled += bits
            while filled >= u64(8):
                out[o] = u8(acc)
                acc >>= u64(8)
                filled -= u64(8)
                o += u64(1)
        while o < u64(out.size):
            out[o] = u8(acc)
            acc >>= u64(8)
            o += u64(1)


@jit
def int_symmetric(
    x: Any, group: int, levels: Any, lo: int, hi: int, stored: int, quotient: int, eps: Any,
    least: Any, packed_bits: int, codes: Any, scale: Any,
) -> Any:  # fmt: skip
    """Quantize ``x [rows, cols]`` with ``scale = amax / levels`` per ``group`` columns.

    ``lo``, ``hi``: code range. ``stored``, ``quotient``: what scale and x / scale are
    rounded to. ``eps``: the scale of a zero group, ``least`` the smallest. ``packed_bits``: 0
    for int8 codes, else offset binary of that many bits. ``codes`` uint8 ``[rows, row
    bytes]``, ``scale`` f32 ``[rows, groups]``. Returns the bits of the largest magnitude.
    """
    rows, cols, width = x.shape[0], u64(x.shape[1]), u64(group)
    groups = cols // width
    row_codes = np.empty(x.shape[1], np.uint8)
    offset = u32(1) << u32(packed_bits - 1) if packed_bits else u32(0)
    largest = u32(0)
    for r in range(u64(rows)):
        row, row_scale = x[r], scale[r]
        for g in range(groups):
            top = widen(amax_bits(row, g * width, g * width + width))
            largest = max(largest, top)
            s = round_to(f32(u32(top).view(f32) / levels), stored)
            row_scale[g] = eps if s == f32(0) else max(s, least)
        out = row_codes if packed_bits else codes[r]
        for g in range(groups):
            d = row_scale[g]
            if quotient > ROUND_F32:
                for i in range(g * width, g * width + width):
                    q = round_to(f32(value(row, i) / d), quotient)
                    out[i] = u8(rint_code(q, lo, hi) + offset)
            else:
                for i in range(g * width, g * width + width):
                    out[i] = u8(rint_code(f32(value(row, i) / d), lo, hi) + offset)
        if packed_bits:
            _pack_words(row_codes, u64(packed_bits), codes[r])
    return largest


@jit
def int_asymmetric(
    x: Any, group: int, lo: int, hi: int, stored: int, step: int, eps: Any, zero_of_lost: int,
    packed_bits: int, codes: Any, scale: Any, zero_point: Any,
) -> Any:  # fmt: skip
    """Quantize ``x [rows, cols]`` with ``scale = (max - min) / (hi - lo)`` and a zero point.

    The range always holds 0. ``step``: what every intermediate result is rounded to.
    ``zero_of_lost``: zero point of a group with a negative minimum whose scale underflows.
    ``zero_point`` int8 ``[rows, groups]``; the rest as in ``int_symmetric``.
    """
    rows, cols, width = x.shape[0], u64(x.shape[1]), u64(group)
    groups = cols // width
    row_codes = np.empty(x.shape[1], np.uint8)
    offset = u32(1) << u32(packed_bits - 1) if packed_bits else u32(0)
    largest = u32(0)
    for r in range(u64(rows)):
        row, row_scale, row_zero = x[r], scale[r], zero_point[r]
        out = row_codes if packed_bits else codes[r]
        for g in range(groups):
            least, most = zero_key(x), zero_key(x)
            for i in range(g * width, g * width + width):
                least = min(least, key(row, i))
                most = max(most, key(row, i))
            low, high = key_value(least), key_value(most)
            largest = max(largest, f32(low).view(u32) & ABS_MASK, f32(high).view(u32) & ABS_MASK)
            s = round_to(f32(round_to(f32(high - low), step) / f32(hi - lo)), stored)
            z = f32(0)
            if s == f32(0):
                s = eps
                z = f32(zero_of_lost) if low < f32(0) else z
            else:
                z = round_to(f32(f32(lo) - round_to(f32(low / s), step)), step)
                z = f32(np.int8(rint_code(z, lo, hi)))
            row_scale[g] = s
            row_zero[g] = np.int8(z)
        for g in range(groups):
            s, z = row_scale[g], f32(row_zero[g])
            if step > ROUND_F32:
                for i in range(g * width, g * width + width):
                    q = round_to(f32(round_to(f32(value(row, i) / s), step) + z), step)
                    out[i] = u8(rint_code(q, lo, hi) + offset)
            else:
                for i in range(g * width, g * width + width):
                    q = f32(f32(value(row, i) / s) + z)
                    out[i] = u8(rint_code(q, lo, hi) + offset)
        if packed_bits:
            _pack_words(row_codes, u64(packed_bits), codes[r])
    return largest
