"""Searched scales for integers, symmetric or with a zero point, per group or per row.

See ``streamq.kernels.reference.search``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from streamq.compiled import jit

from .bits import (
    amax_bits,
    f32,
    key,
    key_value,
    rint_code,
    round_to,
    u8,
    u32,
    u64,
    value,
    widen,
    zero_key,
)  # fmt: skip
from .integer import _pack_words
from .literals import of_literals

f64 = np.float64

#: Elements that are searched together, more where a group is longer.
CHUNK = 2048


@jit
def _sum_groups(error, groups, width, a, b, total):
    """Squares of ``error``, groups of ``width`` one after the other, into ``total[:groups]``.

    Neighbours first, in f64; ``a`` and ``b`` are scratch. Groups of an even width are taken
    in one loop, as no pair of neighbours is in two of them, and two turns at a time where
    they can: 1.5 times as fast.
    """
    two, three, four = u64(2), u64(3), u64(4)
    if width % four == u64(0):
        width >>= two
        for i in range(groups * width):
            p, q = f64(error[four * i]), f64(error[four * i + u64(1)])
            s, t = f64(error[four * i + two]), f64(error[four * i + three])
            a[i] = (p * p + q * q) + (s * s + t * t)
    else:
        for i in range(groups * width):
            a[i] = f64(error[i]) * f64(error[i])
    while width > u64(1):
        if width % four == u64(0):
            width >>= two
            for i in range(groups * width):
                p, q = a[four * i] + a[four * i + u64(1)], a[four * i + two] + a[four * i + three]
                b[i] = p + q
        elif width % two == u64(0):
            width >>= u64(1)
            for i in range(groups * width):
                b[i] = a[two * i] + a[two * i + u64(1)]
        else:
            half = width >> u64(1)
            for g in range(groups):
                here, there = g * width, g * (half + u64(1))
                for i in range(half):
                    b[there + i] = a[here + two * i] + a[here + two * i + u64(1)]
                b[there + half] = a[here + width - u64(1)]
            width = half + u64(1)
        a, b = b, a
    for g in range(groups):
        total[g] = a[g]


@jit
def _take_better(total, least, tried, best, tried_zero, best_zero, groups):
    for g in range(groups):
        if total[g] < least[g]:  # never where it is NaN or both are infinite
            least[g] = total[g]
            best[g] = tried[g]
            best_zero[g] = tried_zero[g]


def _scales(quotient: int, stored: int, symmetric: bool) -> Any:
    """The function that makes scales and zero points of what absmax sees, times a factor."""

    def scales(numbers, low, high, factor, lo, hi, eps, zero_of_lost, groups, scale, zero):
        """``low`` is amax / levels for symmetric codes, else ``low`` to ``high`` the range."""
        for g in range(groups):
            z = f32(0)
            if symmetric:
                s = round_to(f32(low[g] * factor), stored)
            else:
                least = round_to(f32(low[g] * factor), quotient)
                most = round_to(f32(high[g] * factor), quotient)
                span = round_to(f32(most - least), quotient)
                s = round_to(f32(span / f32(hi - lo)), stored)
                if s == f32(0):
                    z = f32(zero_of_lost) if least < f32(0) else z
                else:
                    z = round_to(f32(lo - round_to(f32(least / s), quotient)), quotient)
                    z = f32(np.int8(rint_code(z, lo, hi)))
            scale[g] = eps if s == f32(0) else s
            zero[g] = z

    return scales


def _errors(quotient: int, symmetric: bool) -> Any:
    """The function of what is lost of each element under the scale of its group."""

    def errors(numbers, x, first, groups, width, lo, hi, scale, zero, error):
        for g in range(groups):
            s, z, start = scale[g], zero[g], g * width
            for i in range(start, start + width):
                w = value(x, first + i)
                q = round_to(f32(w / s), quotient)
                if not symmetric:
                    q = round_to(f32(q + z), quotient)
                q = min(max(q, lo), hi)
                code = f32(f32(q + f32(12582912)) - f32(12582912))  # rounds to an integer
                if not symmetric:
                    code = f32(code - z)
                error[i] = f32(w - f32(code * s))

    return errors


def _codes(quotient: int, symmetric: bool) -> Any:
    """The function of the codes of some groups."""

    def codes(numbers, x, first, groups, width, lo, hi, scale, zero, offset, out):
        for g in range(groups):
            s, z, start = scale[g], zero[g], first + g * width
            for i in range(start, start + width):
                q = round_to(f32(value(x, i) / s), quotient)
                if not symmetric:
                    q = round_to(f32(q + z), quotient)
                out[i] = u8(rint_code(q, lo, hi) + offset)

    return codes


scales, errors, codes_of = of_literals(_scales), of_literals(_errors), of_literals(_codes)


@cache
def kernel(quotient: int, stored: int, symmetric: bool) -> Any:
    """The kernel of what x / scale and the scale are rounded to, literals for LLVM."""

    @jit
    def search(
        x: Any, group: int, factors: Any, levels: Any, low: Any, high: Any, eps: Any,
        zero_of_lost: int, packed_bits: int, codes: Any, scale: Any, zero_point: Any,
    ) -> Any:  # fmt: skip
        """``integer.int_symmetric`` or ``int_asymmetric`` with the best of amax * ``factors``.

        ``factors`` f32, without 1. ``low``, ``high``: code range, as f32. Without a zero
        point ``zero_point`` is not touched, with one ``levels`` is not read. The rest as there.
        """
        width = u64(group)
        rows, groups = u64(x.shape[0]), u64(x.shape[1]) // width
        chunk = max(u64(1), u64(CHUNK) // width)
        error = np.empty(chunk * width, np.float32)
        a, b = np.empty(chunk * width, np.float64), np.empty(chunk * width, np.float64)
        total, least = np.empty(chunk, np.float64), np.empty(chunk, np.float64)
        bottom, top = np.empty(chunk, np.float32), np.empty(chunk, np.float32)
        best, tried = np.empty(chunk, np.float32), np.empty(chunk, np.float32)
        best_zero, tried_zero = np.empty(chunk, np.float32), np.empty(chunk, np.float32)
        row_codes = np.empty(x.shape[1], np.uint8)
        offset = u32(1) << u32(packed_bits - 1) if packed_bits else u32(0)
        largest = u32(0)
        for r in range(rows):
            row, row_scale, row_zero = x[r], scale[r], zero_point[r]
            out = row_codes if packed_bits else codes[r]
            for first in range(u64(0), groups, chunk):
                n, at = min(chunk, groups - first), first * width
                for g in range(n):
                    start, stop = at + g * width, at + g * width + width
                    amax = widen(amax_bits(row, start, stop))
                    largest = max(largest, amax)
                    if symmetric:
                        bottom[g] = f32(u32(amax).view(f32) / levels)
                    else:
                        least_key, most_key = zero_key(x), zero_key(x)
                        for i in range(start, stop):
                            least_key = min(least_key, key(row, i))
                            most_key = max(most_key, key(row, i))
                        bottom[g], top[g] = key_value(least_key), key_value(most_key)
                scales(
                    (quotient, stored, symmetric), bottom, top, f32(1), low, high, eps,
                    zero_of_lost, n, best, best_zero,
                )  # fmt: skip
                errors((quotient, symmetric), row, at, n, width, low, high, best, best_zero, error)
                _sum_groups(error, n, width, a, b, least)
                for factor in factors:
                    scales(
                        (quotient, stored, symmetric), bottom, top, factor, low, high, eps,
                        zero_of_lost, n, tried, tried_zero,
                    )  # fmt: skip
                    errors(
                        (quotient, symmetric),
                        row,
                        at,
                        n,
                        width,
                        low,
                        high,
                        tried,
                        tried_zero,
                        error,
                    )
                    _sum_groups(error, n, width, a, b, total)
                    _take_better(total, least, tried, best, tried_zero, best_zero, n)
                for g in range(n):
                    row_scale[first + g] = best[g]
                    if not symmetric:
                        row_zero[first + g] = np.int8(best_zero[g])
                codes_of(
                    (quotient, symmetric),
                    row,
                    at,
                    n,
                    width,
                    low,
                    high,
                    best,
                    best_zero,
                    offset,
                    out,
                )
            if packed_bits:
                _pack_words(row_codes, u64(packed_bits), codes[r])
        return largest

    return search
