"""Largest magnitudes and ranges of rows: the first pass where a tile cannot hold a block."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .bits import float_of, load, magnitude, report
from .tiles import KINDS, TILE, cover, launch, place, raw


def row_amax(x: Any, out: Any, status: Any) -> None:
    """Largest magnitude of each row of ``x [rows, cols]`` into ``out`` f32 ``[rows]``."""
    _stats(x, out, None, status)


def row_ends(x: Any, symmetric: bool, status: Any) -> Any:
    """f32 ``[2, rows]``: the smallest and the largest of each row and 0, or amax in the second."""
    out = torch.empty((2, len(x)), dtype=torch.float32, device=x.device)
    if symmetric:
        _stats(x, out[1], None, status)
    else:
        _stats(x, out[1], out[0], status)
    return out


def _stats(x: Any, high: Any, low: Any, status: Any) -> None:
    rows, cols = x.shape
    tiles = cover(rows, 1, min(cols, TILE))
    launch(row_stats, tiles, raw(x), high, low, status, cols, x.stride(0), KIND=KINDS[x.dtype])


@triton.jit
def row_stats(
    x, high, low, status, cols, stride, rows, blocks, across,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, W: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Amax of rows into ``high``; where there is a ``low``, the ends of their range with 0."""
    row, _, valid = place(rows, blocks, across, ROWS, BLOCKS)
    lane = tl.arange(0, W)[None, :]
    start = x + (row * stride)[:, None]
    top = tl.zeros((ROWS * BLOCKS, W), tl.uint32)
    most = tl.zeros((ROWS * BLOCKS, W), tl.float32)
    least = tl.zeros((ROWS * BLOCKS, W), tl.float32)
    for first in range(0, cols, W):
        w = load(start + first + lane, valid[:, None] & (first + lane < cols), KIND)
        top = tl.maximum(top, magnitude(w))
        if low is not None:
            least, most = tl.minimum(least, w), tl.maximum(most, w)
    found = tl.max(top, axis=1)
    report(status, found, valid)
    if low is None:
        tl.store(high + row, float_of(found), mask=valid)
    else:
        tl.store(low + row, tl.min(least, axis=1), mask=valid)
        tl.store(high + row, tl.max(most, axis=1), mask=valid)
