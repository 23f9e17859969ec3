"""ND to FRACTAL_NZ: fragments of 32 bytes, whatever the elements are."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

#: Rows of a matrix that a program moves, one fragment of each.
LINES = 128


def to_nz(x: Any) -> Any:
    """Bytes ``x [rows, bytes]`` (u8, contiguous) as u8 ``[ceil(bytes / 32), N1, 16, 32]``.

    What ``streamq.nz.to_nz`` gives for elements of any width, seen as bytes.
    """
    rows, width = x.shape
    shape = (-(-width // 32), -(-rows // 16), 16, 32)
    out = torch.empty(shape, dtype=torch.uint8, device=x.device)
    lines = shape[1] * 16
    grid = (shape[0], triton.cdiv(lines, LINES))
    with torch.cuda.device_of(x):
        fragments[grid](x, out, rows, width, lines, LINES=LINES)
    return out


@triton.jit
def fragments(x, out, rows, width, lines, LINES: tl.constexpr):
    """A column of fragments, LINES of them; zeros beside and below the matrix."""
    part = tl.program_id(0).to(tl.int64)
    row = (tl.program_id(1) * LINES + tl.arange(0, LINES)).to(tl.int64)[:, None]
    lane = tl.arange(0, 32)[None, :]
    at = part * 32 + lane
    values = tl.load(x + row * width + at, mask=(row < rows) & (at < width), other=0)
    tl.store(out + (part * lines + row) * 32 + lane, values, mask=row < lines)
