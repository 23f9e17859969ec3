"""NVFP4: e2m1 codes, e4m3 block scales under an f32 global scale."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from streamq.schemes import Packing, Quantized, Scheme

from .bits import (
    F32,
    e2m1_code,
    e4m3_magnitude,
    e4m3_value,
    float_of,
    load,
    magnitude,
    report,
    round_to,
)
from .packing import store_codes, width_and_offset
from .search_fp4 import best_e4m3
from .tiles import KINDS, SMALL_EACH, SMALL_TILE, cover, launch, place, raw


def quantize(
    x: Any, scheme: Scheme, packing: Packing, weight: bool, search: bool, outer: Any,
    out: Quantized, status: Any,
) -> None:  # fmt: skip
    """Quantize ``x [rows, cols]`` in blocks of 16 columns; ``outer`` f32 ``[rows]`` or None."""
    rows, cols = x.shape
    tiles = cover(rows, cols // 16, 16, *((SMALL_TILE, SMALL_EACH) if search else ()))
    launch(
        nvfp4, tiles, raw(x), outer, raw(out.codes), raw(out.scale), status,
        x.stride(0), out.codes.shape[1], KIND=KINDS[x.dtype],
        SIXTH=KINDS[x.dtype] if weight else F32.value, SEARCH=search,
        BITS=width_and_offset(packing)[0],
    )  # fmt: skip


@triton.jit
def nvfp4(
    x, g, codes, scale, status, stride, row_bytes, rows, blocks, across,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, W: tl.constexpr, KIND: tl.constexpr,
    SIXTH: tl.constexpr, SEARCH: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """``g`` f32 ``[rows]``, 1 where None. SIXTH: what ``amax / 6`` is rounded to."""
    row, block, valid = place(rows, blocks, across, ROWS, BLOCKS)
    lane = tl.arange(0, W)[None, :]
    w = load(x + (row * stride + block * W)[:, None] + lane, valid[:, None], KIND)
    top = tl.max(magnitude(w), axis=1)
    report(status, top, valid)
    sixth = round_to(tl.div_rn(float_of(top), 6.0), SIXTH)
    gr = tl.full((ROWS * BLOCKS,), 1.0, tl.float32)
    if g is not None:
        gr = tl.load(g + row, mask=valid, other=1.0)
    code = e4m3_magnitude(sixth * gr)
    code = tl.where(code == 0, 0x20, code)  # 0.125
    d = tl.div_rn(e4m3_value(code), gr)
    if SEARCH:
        code, d = best_e4m3(tl.abs(w), code, d, gr, ROWS * BLOCKS, W)
    tl.store(scale + row * blocks + block, code.to(tl.uint8), mask=valid)
    at = codes + row * row_bytes + block * (W * BITS // 8)
    q = e2m1_code(tl.div_rn(w, d[:, None]))
    store_codes(q, at, valid, valid, ROWS * BLOCKS, W, True, BITS)
