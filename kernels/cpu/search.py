"""Searched scales, bit-equal to ``streamq.kernels.reference.search``: which kernel does what."""

from __future__ import annotations

from typing import Any

import numpy as np
from streamq.kernels.reference.search import E4M3_STEPS, E8M0_STEPS, factors

from streamq.errors import NonFiniteError
from streamq.schemes import Packing, Quantized, Scheme

from . import search_fp4, search_int
from .bits import INF_BITS, ROUND_F32
from .mx import PLAIN

Array = np.ndarray[Any, Any]

_STEPS = {"e4m3": np.array(E4M3_STEPS, np.int32), "e8m0": np.array(E8M0_STEPS, np.int32)}


def quantize(
    bits: Array,
    scheme: Scheme,
    packing: Packing,
    weight: int | None,
    stored: int,
    eps: Any,
    outer: Array | None,
    out: Quantized,
) -> Any:
    """Quantize ``bits [rows, cols]`` into ``out``; the bits of the largest magnitude.

    ``weight``: the dtype that every step is rounded to, None for f32 arithmetic.
    ``stored``: that of an integer scale, ``eps`` what replaces one of 0.
    """
    codes = out.codes.view(np.uint8)
    quotient = ROUND_F32 if weight is None else weight
    if scheme.element == "int":
        return _integers(bits, scheme, packing, quotient, stored, eps, weight is not None, out)
    nibbles, scale = packing.kind == "nibbles", out.scale.view(np.uint8)
    g = np.ones(len(bits), np.float32) if outer is None else outer
    rounding = PLAIN if weight is None and scheme.scale == "e8m0" else quotient
    kernel = search_fp4.kernel(ROUND_F32 if scheme.scale == "e4m3" else quotient)
    steps = _STEPS[scheme.scale]
    return kernel(bits, scheme.block[1], g, steps, rounding, nibbles, codes, scale)


def _integers(
    bits: Array,
    scheme: Scheme,
    packing: Packing,
    quotient: int,
    stored: int,
    eps: Any,
    lost: bool,
    out: Quantized,
) -> Any:
    """``lost``: compressed-tensors' zero point of a group whose scale underflows."""
    lo, hi = scheme.code_range
    levels = np.float32(hi if scheme.narrow else hi + 0.5)
    narrow = out.scale.dtype != np.float32
    scale = np.empty(out.scale.shape, np.float32) if narrow else out.scale
    zero = out.zero_point
    top = search_int.kernel(quotient, stored, scheme.symmetric)(
        bits, scheme.block_of(*bits.shape)[1], factors(scheme), levels,
        np.float32(lo), np.float32(hi), eps, hi if lost else 0,
        packing.bits if packing.kind == "words" else 0, out.codes.view(np.uint8), scale,
        np.empty((len(bits), 0), np.int8) if zero is None else zero,
    )  # fmt: skip
    if top >= INF_BITS:
        return top  # the caller names the weight; the scales of its row may be unwritten
    if narrow:
        out.scale[...] = scale
    if not np.isfinite(scale).all():
        row, col = np.argwhere(~np.isfinite(scale))[0]
        raise NonFiniteError("scale", int(row), int(col))
    return top
