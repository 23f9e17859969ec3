"""MX: blocks of 32 with a power-of-two scale (E8M0), e2m1 or e4m3 elements."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from streamq.schemes import Packing, Quantized, Scheme

from .bits import F16, F32, e2m1_code, e4m3_code, e8m0_value, load, magnitude, report, round_to
from .packing import store_codes, width_and_offset
from .search_fp4 import best_e8m0
from .tiles import KINDS, SMALL_EACH, SMALL_TILE, cover, flattened, launch, place, raw


def quantize(
    x: Any, scheme: Scheme, packing: Packing, weight: bool, search: bool, out: Quantized,
    status: Any,
) -> None:  # fmt: skip
    """Quantize ``x [rows, cols]`` to e2m1 or e4m3 in blocks of 32 columns."""
    rows, cols = flattened(x)
    tiles = cover(rows, cols // 32, 32, *((SMALL_TILE, SMALL_EACH) if search else ()))
    bits = width_and_offset(packing)[0]
    launch(
        mx, tiles, raw(x), raw(out.codes), raw(out.scale), status, x.stride(0), cols * bits // 8,
        KIND=KINDS[x.dtype], WEIGHT=weight, QUOTIENT=KINDS[x.dtype] if weight else F32.value,
        E2M1=scheme.element == "e2m1", SEARCH=search, BITS=bits,
    )  # fmt: skip


@triton.jit
def mx(
    x, codes, scale, status, stride, row_bytes, rows, blocks, across,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, W: tl.constexpr, KIND: tl.constexpr,
    WEIGHT: tl.constexpr, QUOTIENT: tl.constexpr, E2M1: tl.constexpr, SEARCH: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """WEIGHT: the arithmetic of compressed-tensors, in the weight's dtype QUOTIENT."""
    row, block, valid = place(rows, blocks, across, ROWS, BLOCKS)
    lane = tl.arange(0, W)[None, :]
    w = load(x + (row * stride + block * W)[:, None] + lane, valid[:, None], KIND)
    top = tl.max(magnitude(w), axis=1)
    report(status, top, valid)
    # The biased exponent of the power of two that an amax counts as: up from 1.75 on.
    field = (top + 0x200000) >> 23
    if WEIGHT and QUOTIENT == F16:
        # compressed-tensors masks the f16 itself, whose subnormals all have exponent 0.
        field = tl.where(top < 0x38800000, tl.where(top >= 0x38400000, 113, 0), field)
    EMAX: tl.constexpr = 2 if E2M1 else 8
    byte = tl.where(field > EMAX, field - EMAX, 0)
    d = e8m0_value(byte)
    if WEIGHT:
        d = round_to(d, QUOTIENT)
        OVER: tl.constexpr = 143 if QUOTIENT == F16 else 255
        over, lost = field >= OVER, d == 0
        byte = tl.where(over | lost, 127, byte)
        d = tl.where(over, float("inf"), tl.where(lost, 1.0, d))
    if SEARCH:
        byte, d = best_e8m0(tl.abs(w), byte, d, QUOTIENT, ROWS * BLOCKS, W)
    tl.store(scale + row * blocks + block, byte.to(tl.uint8), mask=valid)
    q = round_to(tl.div_rn(w, d[:, None]), QUOTIENT)
    code = e2m1_code(q) if E2M1 else e4m3_code(q)
    at = codes + row * row_bytes + block * (W * BITS // 8)
    store_codes(code, at, valid, valid, ROWS * BLOCKS, W, True, BITS)
