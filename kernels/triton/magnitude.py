"""Pruning by magnitude: of each row the largest elements stay, all others become 0."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

#: Columns looked at in one go.
WIDE = 2048


def keep_largest(x: Any, keep: int) -> Any:
    """``x [rows, cols]`` with all but the ``keep`` largest magnitudes of each row set to 0.

    bf16, f16 or f32, contiguous and finite. Of equal magnitudes the first columns stay; what stays
    keeps its bits. Without their sign bit floats are in the order of their bits.
    """
    rows, cols = x.shape
    assert 1 <= keep <= cols
    bits = x.view(torch.int32 if x.element_size() == 4 else torch.int16)
    out = torch.empty_like(bits)
    wide = min(WIDE, triton.next_power_of_2(cols))
    with torch.cuda.device_of(x):
        if rows:
            prune[(rows,)](bits, out, cols, keep, BITS=8 * x.element_size(), WIDE=wide)
    return out.view(x.dtype)


@triton.jit
def prune(x, out, cols, keep, BITS: tl.constexpr, WIDE: tl.constexpr):
    """One row: its keep-th largest magnitude bit by bit from the highest, then what is above it."""
    start = tl.program_id(0).to(tl.int64) * cols
    lane = tl.arange(0, WIDE)
    mask: tl.constexpr = (1 << (BITS - 1)) - 1
    least = tl.zeros((), tl.int32)
    above = tl.zeros((), tl.int32)
    for i in range(BITS - 1):
        candidate = least | (1 << (BITS - 2 - i))
        found = tl.zeros((), tl.int32)
        for first in range(0, cols, WIDE):
            at = first + lane
            # 0 behind the end: a candidate is never 0
            values = tl.load(x + start + at, mask=at < cols, other=0).to(tl.int32) & mask
            found += tl.sum((values >= candidate).to(tl.int32))
        if found >= keep:
            least = candidate
        else:
            above = found  # of the bounds above `least` the last that was tried is the next one
    seen = tl.zeros((), tl.int32)
    for first in range(0, cols, WIDE):
        at = first + lane
        values = tl.load(x + start + at, mask=at < cols, other=0)
        magnitude = values.to(tl.int32) & mask
        equal = ((magnitude == least) & (at < cols)).to(tl.int32)
        stays = (magnitude > least) | ((equal > 0) & (seen + tl.cumsum(equal) <= keep - above))
        seen += tl.sum(equal)
        tl.store(out + start + at, tl.where(stays, values, 0), mask=at < cols)
