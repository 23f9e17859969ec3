"""Searched scales for e2m1: NVFP4 and MXFP4. See ``streamq.kernels.reference.search``.

A block is too short to be a loop that vectorizes, so up to 256 blocks are laid out as a
matrix whose columns they are, and one scale is tried for all of them at a time: 1.1 GB/s
of bf16 with the 9 candidates of NVFP4, 0.2 block by block.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba.extending import register_jitable

from streamq.compiled import jit

from .bits import (
    ROUND_F16,
    e2m1_code,
    e4m3_magnitude,
    e4m3_value,
    f32,
    magnitude,
    pack_nibbles,
    round_to,
    u8,
    u32,
    u64,
    value,
    widen,
)  # fmt: skip
from .literals import of_literals
from .mx import PLAIN, _field

f64, i32 = np.float64, np.int32

#: Elements that are searched together, of one row. With 1024 loops are too short: 0.8 GB/s.
CHUNK = 4096


@register_jitable
def _e2m1_error(a, d, s, rounding):
    """What is lost of a magnitude whose code comes from ``a / d`` and counts as ``code * s``."""
    v = min(round_to(f32(a / d), rounding), f32(6))
    # Adding a power of two whose ulp is the step between values (0.5, 1, 2) rounds to one.
    up = u32(max(f32(v).view(u32), u32(0x3F800000)) & u32(0x7F800000)) + u32(22 << 23)
    power = u32(up).view(f32)
    return f32(a - f32(f32(f32(v + power) - power) * s))


@jit
def _columns(x, first, blocks, width, a, b, out):
    """Magnitudes of ``x[first:]`` as f32 ``[width, blocks]``, a block in each column.

    ``width`` is a power of two; the rows are in the order of the reversed bits of their
    number, so that neighbours within a block end up half the rows apart. Each turn sorts
    even from odd places; ``a`` and ``b`` are scratch in the width of ``x``.
    """
    size = blocks * width
    half = size >> u64(1)
    for i in range(half):
        a[i] = magnitude(x, first + u64(2) * i)
        a[half + i] = magnitude(x, first + u64(2) * i + u64(1))
    turns = width >> u64(1)
    while turns > u64(1):
        for i in range(half):
            b[i] = a[u64(2) * i]
            b[half + i] = a[u64(2) * i + u64(1)]
        a, b = b, a
        turns >>= u64(1)
    for i in range(size):
        out[i] = u32(widen(a[i])).view(f32)


def _squared_errors(quotient: int) -> Any:
    """The function of what a quotient is rounded to, a literal: nearly twice as fast."""

    def squared_errors(numbers, weights, blocks, width, divisor, factor, error, total):
        """Squared error of each block into ``total[:blocks]``, neighbours added first.

        ``weights`` as ``_columns`` lays them out, ``divisor`` and ``factor`` f32 per block.
        """
        for k in range(u64(0), width * blocks, blocks):
            for b in range(blocks):
                error[k + b] = _e2m1_error(weights[k + b], divisor[b], factor[b], quotient)
        # Two turns at a time: the sums of the first stay in registers.
        q = width * blocks >> u64(2)
        for i in range(q):
            s, t = f64(error[i]), f64(error[u64(2) * q + i])
            u, v = f64(error[q + i]), f64(error[u64(3) * q + i])
            total[i] = (s * s + t * t) + (u * u + v * v)
        while q > u64(2) * blocks:
            q >>= u64(2)
            for i in range(q):
                s, t = total[i] + total[u64(2) * q + i], total[q + i] + total[u64(3) * q + i]
                total[i] = s + t
        if q > blocks:
            for i in range(blocks):
                total[i] += total[blocks + i]

    return squared_errors


@jit
def _take_better(total, least, tried, best, blocks):
    for b in range(blocks):
        # Loads of their own: behind a condition they keep the loop scalar, 7 times as slow.
        new, old, code, kept = total[b], least[b], tried[b], best[b]
        better = new < old  # never where it is NaN or both are infinite
        best[b] = code if better else kept
        least[b] = new if better else old


def _codes(width: int, quotient: int) -> Any:
    """The function of a block width and of what a quotient is rounded to."""
    size = u64(width)

    def codes(numbers, x, first, blocks, divisor, out):
        """Codes of ``blocks`` blocks from element ``first`` of a row on, into the row ``out``."""
        for b in range(blocks):
            d, start = divisor[b], first + b * size
            for i in range(start, start + size):
                out[i] = u8(e2m1_code(round_to(f32(value(x, i) / d), quotient)))

    return codes


@register_jitable
def _power(byte):
    """2^(byte - 127)."""
    return u32(u32(byte) << u32(23) if byte > i32(0) else u32(0x400000)).view(f32)


@register_jitable
def _absmax_e4m3(top, g, rounding):
    """Code of the scale of a block, as in ``nvfp4.nvfp4``."""
    sixth = round_to(f32(u32(top).view(f32) / f32(6)), rounding)
    code = i32(e4m3_magnitude(f32(sixth * g)))
    return i32(0x20) if code == i32(0) else code  # 0.125


@jit
def _absmax_of_blocks(top, g, rounding, blocks, code, divisor, factor):
    for b in range(blocks):
        code[b] = _absmax_e4m3(top[b], g, rounding)
    for b in range(blocks):
        d = f32(e4m3_value(u32(code[b])) / g)
        divisor[b] = d
        factor[b] = d


@register_jitable
def _absmax_e8m0(top, rounding):
    """Exponent byte and divisor of a block, as in ``mx.mx``."""
    field = _field(top, rounding)
    byte = max(i32(i32(field) - i32(2)), i32(0))
    d = _power(byte)
    if rounding == PLAIN:
        return byte, d
    d = round_to(d, rounding)
    over = field >= (u32(143) if rounding == ROUND_F16 else u32(255))
    lost = over or d == f32(0)
    d = u32(0x7F800000).view(f32) if over else (f32(1) if lost else d)
    return i32(127) if lost else byte, d


squared_errors, codes_of = of_literals(_squared_errors), of_literals(_codes)


@cache
def kernel(quotient: int) -> Any:
    """The kernel of what x / scale is rounded to."""

    @jit
    def search(
        x: Any, width: int, g: Any, steps: Any, rounding: int, nibbles: bool,
        codes: Any, scale: Any,
    ) -> Any:  # fmt: skip
        """Quantize ``x [rows, cols]`` with the best of the block scales ``absmax + steps``.

        ``width``: 16 for NVFP4, with e4m3 scales under ``g`` f32 ``[rows]``; 32 for MXFP4, with
        e8m0. ``steps`` int32, of the code of a scale. ``rounding`` as in ``nvfp4.nvfp4`` and
        ``mx.mx``; ``quotient``: what x / scale is rounded to. ``codes`` uint8 ``[rows, cols / 2
        or cols]``, ``scale`` uint8 ``[rows, cols / width]``. Returns the bits of the largest
        magnitude.
        """
        e4m3, wide = width == 16, u64(width)
        rows, blocks, chunk = u64(x.shape[0]), u64(x.shape[1]) // wide, u64(CHUNK) // wide
        low, high = i32(1 if e4m3 else 0), i32(0x7E if e4m3 else 254)
        raw, other = np.empty(CHUNK, x.dtype), np.empty(CHUNK, x.dtype)
        weights, error = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
        total, least = np.empty(CHUNK // 2), np.empty(chunk)
        top, absmax = np.empty(chunk, np.uint32), np.empty(chunk, np.int32)
        best, tried = np.empty(chunk, np.int32), np.empty(chunk, np.int32)
        # A code is of weight / divisor; the loader sees code * factor. One number, but for a few
        # absmax scales that compressed-tensors loses in the weight's dtype.
        divisor, factor = np.empty(chunk, np.float32), np.empty(chunk, np.float32)
        first_divisor, first_factor = np.empty(chunk, np.float32), np.empty(chunk, np.float32)
        row_codes = np.empty(x.shape[1], np.uint8)
        largest = u32(0)
        for r in range(rows):
            row, row_scale, gr = x[r], scale[r], g[r]
            out = row_codes if nibbles else codes[r]
            for first in range(u64(0), blocks, chunk):
                n = min(chunk, blocks - first)
                _columns(row, first * wide, n, wide, raw, other, weights)
                top[:] = u32(0)
                for k in range(u64(0), wide * n, n):
                    for b in range(n):
                        top[b] = max(top[b], f32(weights[k + b]).view(u32))
                for b in range(n):
                    largest = max(largest, top[b])
                if e4m3:
                    _absmax_of_blocks(top, gr, rounding, n, absmax, first_divisor, first_factor)
                else:
                    for b in range(n):
                        absmax[b], first_divisor[b] = _absmax_e8m0(top[b], rounding)
                        first_factor[b] = _power(absmax[b])
                for b in range(n):
                    best[b] = absmax[b]
                squared_errors(
                    (quotient,), weights, n, wide, first_divisor, first_factor, error, total
                )
                for b in range(n):
                    least[b] = total[b]
                for step in steps:
                    for b in range(n):
                        c = min(max(i32(absmax[b] + step), low), high)
                        d = f32(e4m3_value(u32(c)) / gr) if e4m3 else round_to(_power(c), quotient)
                        # f16 lacks some powers: absmax once more, which wins nothing.
                        lost = d == f32(0) or d == f32(np.inf)
                        first_c, first_d, first_f = absmax[b], first_divisor[b], first_factor[b]
                        tried[b] = first_c if lost else c
                        divisor[b] = first_d if lost else d
                        factor[b] = first_f if lost else d
                    squared_errors((quotient,), weights, n, wide, divisor, factor, error, total)
                    _take_better(total, least, tried, best, n)
                for b in range(n):
                    c = best[b]
                    row_scale[first + b] = u8(c)
                    first_c, first_d = absmax[b], first_divisor[b]
                    d = f32(e4m3_value(u32(c)) / gr) if e4m3 else _power(c)
                    divisor[b] = first_d if c == first_c else d
                if e4m3:
                    codes_of((16, quotient), row, first * wide, n, divisor, out)
                else:
                    codes_of((32, quotient), row, first * wide, n, divisor, out)
            if nibbles:
                pack_nibbles(row_codes, codes[r])
        return largest

    return search
