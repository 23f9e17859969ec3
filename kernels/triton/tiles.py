"""Tiles: what one program takes of a matrix, and how kernels are started.

A tile is some blocks, of some columns each, in some rows. Its sizes are powers of two and
chosen from the shape of the matrix alone: nothing is tuned at run time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .bits import BF16, F16, F32

#: Elements of a tile and of a thread: four loads of 16 bytes of bf16 are under way in each.
TILE, EACH = 4096, 32
#: Columns of the longest block that a program holds in its registers.
LONGEST = 32768
#: The same where sums in f64, or codes and scales that are gathered, take more registers: with
#: tiles of 4096 values of INT4 with zero points spill in f32.
SMALL_TILE, SMALL_EACH = 2048, 16
#: LONGEST where scales are searched.
SEARCH_LONGEST = 16384

#: Threads of a warp; no program has more than 1024, which 32 warps of AMD would.
WARP = 64 if torch.version.hip else 32

#: How kernels name the dtype of a weight or of a float scale.
KINDS: dict[Any, int] = {torch.float32: F32.value, torch.bfloat16: BF16.value,
                         torch.float16: F16.value}  # fmt: skip
_RAW = {1: torch.uint8, 2: torch.int16, 4: torch.float32}


class Tiles(NamedTuple):
    """``rows x blocks`` covered by tiles of ``ROWS x BLOCKS`` blocks of at most ``W`` columns."""

    rows: int
    blocks: int
    across: int  # tiles side by side
    programs: int
    warps: int
    ROWS: int
    BLOCKS: int
    W: int

    @property
    def arguments(self) -> dict[str, int]:
        """What ``place`` wants to know, by the names that all kernels use."""
        return {
            "rows": self.rows, "blocks": self.blocks, "across": self.across,
            "ROWS": self.ROWS, "BLOCKS": self.BLOCKS, "W": self.W,
        }  # fmt: skip


def cover(rows: int, blocks: int, width: int, size: int = TILE, each: int = EACH) -> Tiles:
    """Tiles of about ``size`` elements for ``rows`` of so many ``blocks`` of ``width`` columns.

    Long tiles read long pieces of memory, but one that fits the row leaves no thread without
    work: of 320 blocks a row, tiles of 4 rows by 64 waste nothing, one row by 256 a third.
    """
    wide = max(8, triton.next_power_of_2(width))
    n = max(1, size // wide)
    shortest = min(n, max(1, 256 // wide))
    choices = [n >> i for i in range(n.bit_length()) if n >> i >= shortest]

    def covered(across: int) -> tuple[int, int]:
        down = n // across
        return triton.cdiv(blocks, across) * triton.cdiv(rows, down), -across

    best = min(choices, key=covered)
    across, down = triton.cdiv(blocks, best), triton.cdiv(rows, n // best)
    warps = max(4, n * wide // (WARP * each))
    return Tiles(rows, blocks, across, across * down, warps, n // best, best, wide)


def launch(kernel: Any, tiles: Tiles, *args: Any, **constants: Any) -> None:
    """Start ``kernel`` for each tile, on the device of its first argument.

    Without fusion: a fused multiply-add rounds once where the reference rounds twice.
    """
    with torch.cuda.device_of(args[0]):
        kernel[(tiles.programs,)](
            *args, **tiles.arguments, **constants, num_warps=tiles.warps, enable_fp_fusion=False
        )


def raw(t: Any) -> Any:
    """A tensor as the integers, or f32, that kernels see."""
    return t.view(_RAW[t.element_size()])


def flattened(x: Any) -> tuple[int, int]:
    """``[rows, cols]`` of a matrix as one row, where it is one in memory: no tile is ragged."""
    return (1, x.numel()) if x.is_contiguous() else tuple(x.shape)


@triton.jit
def place(rows, blocks, across, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """Row and block, int64 ``[ROWS * BLOCKS]``, of this program's tile, and which of them exist."""
    i = tl.arange(0, ROWS * BLOCKS)
    tile = tl.program_id(0)
    row = (tile // across).to(tl.int64) * ROWS + i // BLOCKS
    block = (tile % across).to(tl.int64) * BLOCKS + i % BLOCKS
    return row, block, (row < rows) & (block < blocks)
