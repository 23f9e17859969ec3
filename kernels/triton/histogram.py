"""How often each byte is in a tile: what the sparse codec makes its dictionaries of."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

#: Bytes counted in one go; tiles are multiples of it.
STEP = 512


def histogram(data: Any, tile: int) -> Any:
    """Counts of each byte in each tile of ``data`` (u8 ``[n]``), i32 ``[n / tile, 256]``.

    ``tile``: bytes, a multiple of 512, of which n is one.
    """
    assert tile % STEP == 0
    assert data.numel() % tile == 0
    counts = torch.empty((data.numel() // tile, 256), dtype=torch.int32, device=data.device)
    with torch.cuda.device_of(data):
        if len(counts):
            count[(len(counts),)](data, counts, tile, STEP=STEP)
    return counts


@triton.jit
def count(data, counts, tile, STEP: tl.constexpr):
    """The bins of one tile."""
    start = data + tl.program_id(0).to(tl.int64) * tile
    total = tl.zeros((256,), tl.int32)
    for first in range(0, tile, STEP):
        total += tl.histogram(tl.load(start + first + tl.arange(0, STEP)).to(tl.int32), 256)
    tl.store(counts + tl.program_id(0) * 256 + tl.arange(0, 256), total)
