"""FP8 e4m3: a scale per row, per block of rows and columns, or given from outside."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from streamq.schemes import Quantized, Scheme

from .amax import row_ends
from .bits import (
    F32,
    UP,
    e4m3_code,
    float_of,
    load,
    magnitude,
    power_of_two,
    report,
    report_scale,
    round_to,
    store,
)
from .tiles import KINDS, LONGEST, TILE, WARP, Tiles, cover, launch, place, raw


def quantize(x: Any, scheme: Scheme, weight: bool, outer: Any, out: Quantized, status: Any) -> None:
    """Quantize ``x [rows, cols]``; ``outer`` f32 ``[rows]``: the scale of a whole tensor."""
    rows, cols = x.shape
    height, width = scheme.block_of(rows, cols)
    rule: dict[str, Any] = {"KIND": KINDS[x.dtype], "STEP": KINDS[x.dtype] if weight else F32.value}
    if scheme.whole_tensor:
        tiles = cover(rows, triton.cdiv(cols, TILE), min(cols, TILE))
        launch(fp8_given, tiles, raw(x), raw(out.codes), outer, status, cols, x.stride(0), **rule)
        return
    stored = KINDS[out.scale.dtype]
    rule |= {
        "SCALE": stored,
        "STORED": UP.value if scheme.power_of_two else stored,
        "ZERO": torch.finfo(out.scale.dtype).eps if weight else 1.0,
    }
    if height > 1:
        high, wide = triton.next_power_of_2(height), triton.next_power_of_2(width)
        across = triton.cdiv(cols, width)
        programs = triton.cdiv(rows, height) * across
        warps = max(4, high * wide // (64 * WARP))
        tiles = Tiles(rows, across, across, programs, warps, high, 1, wide)
        launch(
            fp8_blocks, tiles, raw(x), raw(out.codes), raw(out.scale), status,
            cols, height, width, x.stride(0), **rule,
        )  # fmt: skip
        return
    tops, piece = None, width
    if width > LONGEST:
        tops, piece = row_ends(x, True, status)[1], TILE
    tiles = cover(rows, triton.cdiv(cols, piece), piece)
    launch(
        fp8_rows, tiles, raw(x), raw(out.codes), raw(out.scale), tops, status,
        cols, piece, x.stride(0), **rule,
    )  # fmt: skip


@triton.jit
def _scale(top, STORED: tl.constexpr, ZERO: tl.constexpr):
    """The scale of an amax, rounded as it is stored."""
    s = tl.div_rn(top, 448.0)
    s = power_of_two(s) if STORED == UP else round_to(s, STORED)
    return tl.where(s == 0, ZERO, s)


@triton.jit
def fp8_given(
    x, codes, scale, status, cols, stride, rows, blocks, across,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, W: tl.constexpr, KIND: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Codes under the given ``scale`` f32 ``[rows]``. STEP: what x / scale is rounded to."""
    row, block, valid = place(rows, blocks, across, ROWS, BLOCKS)
    lane = (block * W)[:, None] + tl.arange(0, W)[None, :]
    inside = valid[:, None] & (lane < cols)
    w = load(x + (row * stride)[:, None] + lane, inside, KIND)
    report(status, tl.max(magnitude(w), axis=1), valid)
    s = tl.load(scale + row, mask=valid, other=1.0)
    code = e4m3_code(round_to(tl.div_rn(w, s[:, None]), STEP))
    tl.store(codes + (row * cols)[:, None] + lane, code.to(tl.uint8), mask=inside)


@triton.jit
def fp8_rows(
    x, codes, scale, tops, status, cols, width, stride, rows, blocks, across,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, W: tl.constexpr, KIND: tl.constexpr,
    STEP: tl.constexpr, SCALE: tl.constexpr, STORED: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """Blocks of ``width`` columns of one row, the last ragged.

    ``tops`` f32 ``[rows]``: amax of rows whose blocks here are pieces, else None. SCALE: the
    dtype of ``scale``, STORED what it is rounded to, ZERO what replaces 0.
    """
    row, block, valid = place(rows, blocks, across, ROWS, BLOCKS)
    lane = tl.arange(0, W)[None, :]
    at = (block * width)[:, None] + lane
    inside = valid[:, None] & (lane < width) & (at < cols)
    w = load(x + (row * stride)[:, None] + at, inside, KIND)
    if tops is not None:
        top = tl.load(tops + row, mask=valid, other=0)
        here, where = valid & (block == 0), row
    else:
        found = tl.max(magnitude(w), axis=1)
        report(status, found, valid)
        top, here, where = float_of(found), valid, row * blocks + block
    s = _scale(top, STORED, ZERO)
    report_scale(status, s, here)
    store(scale + where, s, here, SCALE)
    code = e4m3_code(round_to(tl.div_rn(w, s[:, None]), STEP))
    tl.store(codes + (row * cols)[:, None] + at, code.to(tl.uint8), mask=inside)


@triton.jit
def fp8_blocks(
    x, codes, scale, status, cols, height, width, stride, rows, blocks, across,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, W: tl.constexpr, KIND: tl.constexpr,
    STEP: tl.constexpr, SCALE: tl.constexpr, STORED: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """One block of ``height`` rows and ``width`` columns a program, the last ragged."""
    tile = tl.program_id(0)
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, W)[None, :]
    row = (tile // across).to(tl.int64) * height + i
    col = (tile % across).to(tl.int64) * width + j
    inside = (i < height) & (row < rows) & (j < width) & (col < cols)
    w = load(x + row * stride + col, inside, KIND)
    found = tl.max(tl.max(magnitude(w), axis=1), axis=0)
    report(status, found, True)
    s = _scale(float_of(found), STORED, ZERO)
    report_scale(status, s, True)
    store(scale + tile, s, True, SCALE)
    code = e4m3_code(round_to(tl.div_rn(w, s), STEP))
    tl.store(codes + row * cols + col, code.to(tl.uint8), mask=inside)
