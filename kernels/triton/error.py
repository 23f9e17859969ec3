"""What quantizing lost: energies of a weight and of its error, from the codes as written."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from streamq.schemes import Packing, Quantized, Scheme

from .bits import load
from .dequantize import code_and_scale, operands
from .tiles import KINDS, SMALL_EACH, SMALL_TILE, cover, launch, place, raw

#: Columns that a program adds up at a time.
COLUMNS = 512


def energies(x: Any, q: Quantized, scheme: Scheme, packing: Packing, out: Any) -> None:
    """Sums of squares of each row of ``x`` and of its error into ``out`` f64 ``[rows, 2]``."""
    rows, cols = x.shape
    tiles = cover(rows, 1, min(cols, COLUMNS), SMALL_TILE, SMALL_EACH)
    args, constants = operands(q, scheme, packing, rows, cols)
    del args[3], constants["BIAS"]  # of inverse schemes only
    launch(
        squares, tiles, *args, raw(x), out, cols, x.stride(0), KIND=KINDS[x.dtype], **constants
    )  # fmt: skip


@triton.jit
def squares(
    codes, scale, zero, g, row_bytes, scales, height, g_step, x, out, cols, stride, rows, blocks,
    across, ROWS: tl.constexpr, BLOCKS: tl.constexpr, W: tl.constexpr, ELEMENT: tl.constexpr,
    SCALE: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, SIGNED: tl.constexpr,
    OFFSET: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """In f64 from the scale on: a loader's overflow at the end of f32 is not seen here."""
    row, _, valid = place(rows, blocks, across, ROWS, BLOCKS)
    signal = tl.zeros((ROWS * BLOCKS, W), tl.float64)
    noise = tl.zeros((ROWS * BLOCKS, W), tl.float64)
    for first in range(0, cols, W):
        col = first + tl.arange(0, W)[None, :]
        inside = valid[:, None] & (col < cols)
        w = load(x + (row * stride)[:, None] + col, inside, KIND).to(tl.float64)
        v, s, _block = code_and_scale(
            codes, scale, zero, g, row_bytes, scales, height, g_step, row, valid, col, inside,
            ELEMENT, SCALE, WIDTH, BITS, SIGNED, OFFSET,
        )  # fmt: skip
        e = tl.where(inside, w - v.to(tl.float64) * s.to(tl.float64), 0.0)
        signal += w * w
        noise += e * e
    tl.store(out + 2 * row, tl.sum(signal, axis=1), mask=valid)
    tl.store(out + 2 * row + 1, tl.sum(noise, axis=1), mask=valid)
