"""Integers of 2 to 8 bits, per group of columns or per row, symmetric or with a zero point."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from streamq.kernels.reference.search import FACTORS

from streamq.schemes import Packing, Quantized, Scheme

from .amax import row_ends
from .bits import F32, float_of, load, magnitude, report, report_scale, rint_code, store
from .packing import store_codes, width_and_offset
from .search_int import CANDIDATES, best, piece_errors, quotient, scale_and_zero
from .tiles import (
    KINDS,
    LONGEST,
    SEARCH_LONGEST,
    SMALL_EACH,
    SMALL_TILE,
    TILE,
    cover,
    flattened,
    launch,
    place,
    raw,
)

_EPS = {dtype: torch.finfo(dtype).eps for dtype in KINDS}


def quantize(
    x: Any, scheme: Scheme, packing: Packing, weight: bool, search: bool, out: Quantized,
    status: Any,
) -> None:  # fmt: skip
    """Quantize ``x [rows, cols]``; a row too long for a tile is read twice, or three times."""
    rows, cols = x.shape
    width, row_bytes = scheme.block_of(rows, cols)[1], out.codes.shape[1]
    bits, offset = width_and_offset(packing)
    exact_bytes = -(-cols * bits // 8)
    if row_bytes > exact_bytes:  # the rest of the last 32-bit word of each row
        out.codes[:, exact_bytes:] = 0
    elif width < cols:
        rows, cols = flattened(x)
        row_bytes = cols * bits // 8
    stored = out.scale.dtype
    lo, hi = scheme.code_range
    top, down = FACTORS[scheme.bits]
    rule = {
        "STORED": F32.value if scheme.unrounded else KINDS[stored],
        "STEP": KINDS[x.dtype] if weight else F32.value,
        "SYMMETRIC": scheme.symmetric,
        "LO": float(lo),
        "HI": float(hi),
        "LEVELS": float(hi if scheme.narrow else hi + 0.5),
        "EPS": _EPS[torch.float32 if scheme.unrounded else stored],
        "LOST": float(hi if weight else 0),
        "TOP": top,
        "DOWN": down,
        "KIND": KINDS[x.dtype],
    }
    ends, known, pieces = None, None, 1
    tiles = cover(rows, cols // width, width, *((SMALL_TILE, SMALL_EACH) if search else ()))
    if width > (SEARCH_LONGEST if search else LONGEST):
        ends = row_ends(x, scheme.symmetric, status)
        if search:
            known, pieces = _errors_of_pieces(x, ends, rule)
        tiles = cover(rows, triton.cdiv(cols, TILE), TILE)
    launch(
        integer, tiles, raw(x), raw(out.codes), raw(out.scale),
        None if scheme.symmetric else out.zero_point, ends, known, status,
        cols, width, x.stride(0), row_bytes, SEARCH=search, PIECES=pieces, BITS=bits,
        OFFSET=offset, LEAST=_EPS[torch.float32] if scheme.unrounded else 0.0,
        SCALE=KINDS[stored], EXACT=width % tiles.W == 0 and cols % tiles.W == 0, **rule,
    )  # fmt: skip


def _errors_of_pieces(x: Any, ends: Any, rule: dict[str, Any]) -> tuple[Any, int]:
    """What ``best`` takes as known of rows that no tile holds, and how many pieces they have."""
    rows, cols = x.shape
    tiles = cover(rows, triton.cdiv(cols, SEARCH_LONGEST), SEARCH_LONGEST, SMALL_TILE, SMALL_EACH)
    pieces = triton.next_power_of_2(tiles.blocks)
    shape = (CANDIDATES.value, rows, pieces)
    known = torch.zeros(shape, dtype=torch.float64, device=x.device)
    launch(piece_errors, tiles, raw(x), ends, known, cols, x.stride(0), PIECES=pieces, **rule)
    return known, pieces


@triton.jit
def integer(
    x, codes, scale, zero, ends, known, status, cols, width, stride, row_bytes, rows, blocks,
    across, ROWS: tl.constexpr, BLOCKS: tl.constexpr, W: tl.constexpr, EXACT: tl.constexpr,
    KIND: tl.constexpr, SCALE: tl.constexpr, STORED: tl.constexpr, STEP: tl.constexpr,
    SYMMETRIC: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, LEVELS: tl.constexpr,
    EPS: tl.constexpr, LEAST: tl.constexpr, LOST: tl.constexpr, SEARCH: tl.constexpr,
    TOP: tl.constexpr, DOWN: tl.constexpr, PIECES: tl.constexpr, BITS: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """``width`` columns share a scale; EXACT: a power of two, and no block is ragged.

    ``ends`` f32 ``[2, rows]``: of rows whose blocks here are pieces, else None. SCALE: the dtype
    of ``scale``. For STORED, STEP, LEVELS, EPS, LEAST and LOST see ``scale_and_zero``.
    """
    N: tl.constexpr = ROWS * BLOCKS
    row, block, valid = place(rows, blocks, across, ROWS, BLOCKS)
    lane = tl.arange(0, W)[None, :]
    first, count, byte = block * W, cols - block * W, block * (W * BITS // 8)
    inside = valid[:, None]
    if not EXACT:
        if ends is None:
            first, count = block * width, tl.zeros_like(block) + width
            byte = block * (width // 8 * BITS)  # a width of no whole bytes is that of the row
        inside = inside & (lane < count[:, None])
    w = load(x + (row * stride + first)[:, None] + lane, inside, KIND)
    if ends is not None:
        low = tl.load(ends + row, mask=valid, other=0)
        high = tl.load(ends + rows + row, mask=valid, other=0)
        here, where = valid & (block == 0), row
    else:
        top = tl.max(magnitude(w), axis=1)
        report(status, top, valid)
        low, high = float_of(top), float_of(top)
        if not SYMMETRIC:
            low, high = tl.minimum(tl.min(w, axis=1), 0.0), tl.maximum(tl.max(w, axis=1), 0.0)
        here, where = valid, row * blocks + block
    if SEARCH:
        s, z = best(
            w, low, high, known, row, rows, valid, STORED, STEP, SYMMETRIC, LO, HI, LEVELS, EPS,
            LOST, TOP, DOWN, PIECES, N, W,
        )  # fmt: skip
    else:
        s, z = scale_and_zero(
            low, high, 1.0, STORED, STEP, SYMMETRIC, LO, HI, LEVELS, EPS, LEAST, LOST
        )
    report_scale(status, s, here)
    store(scale + where, s, here, SCALE)
    if not SYMMETRIC:
        tl.store(zero + where, z.to(tl.int8), mask=here)
    code = rint_code(quotient(w, s, z, STEP, SYMMETRIC, LO, HI)) + OFFSET
    if BITS < 8:
        code = code & ((1 << BITS) - 1)
    if not EXACT:
        code = tl.where(inside, code, 0)
    store_codes(code, codes + row * row_bytes + byte, count, valid, N, W, EXACT, BITS)
