"""A weight as the 310P reads it: the NZ array cut into tiles of 8 x 8 fractals, compressed.

Tiles of 8 fractals along k by 8 along n, 32 KiB, n the outer loop; inside of a tile the rows
of fractals along k, each with its columns along n. So 128 rows of the matrix, a row of tiles,
are whole tiles that lie one behind the other, and no more than these is needed at a time.
What k leaves over is a short tile. Of n the last tile overlaps the one before, so that it is
whole: that is inferred from how the consumer cuts, no output of CANN was at hand for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from streamq.errors import CheckpointError, PlanError

from .codec import Buffer, Dictionary, decode_tiles_of, encode_tiles_of, entries_of
from .layout import FRAGMENT, ROWS, Layout
from .tables import Array, Mode

TILE = 8
#: Rows of the matrix in a row of tiles.
HEIGHT = TILE * ROWS


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a matrix ``[rows, cols]`` of ``itemsize`` bytes an element is cut into tiles.

    ``transpose``: the matrix is transposed first; a row of tiles is then 128 of its columns.
    ``width``: fractals of a tile along k. ``overlap``: whether the last row of tiles goes back to
    be whole, where it else has fewer fractals along n.
    """

    rows: int
    cols: int
    itemsize: int = 1
    transpose: bool = False
    width: int = TILE
    overlap: bool = True

    @property
    def lines(self) -> int:
        """Rows of the matrix after the transpose."""
        return self.cols if self.transpose else self.rows

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of the matrix after the transpose."""
        return (self.rows if self.transpose else self.cols) * self.itemsize

    @property
    def count(self) -> int:
        """Rows of tiles."""
        return -(-self.lines // HEIGHT)

    @property
    def across(self) -> int:
        """Tiles in a row of them."""
        return -(-self.row_bytes // (FRAGMENT * self.width))

    def span(self, t: int) -> tuple[int, int]:
        """The lines that row ``t`` of tiles holds, first and behind the last.

        Those before ``t * HEIGHT`` are in the row before it as well.
        """
        first = t * HEIGHT
        if self.overlap:
            padded = -(-self.lines // ROWS) * ROWS
            first = max(0, min(first, padded - HEIGHT))
        return first, min(first + HEIGHT, self.lines)

    def sizes(self, t: int) -> list[int]:
        """Bytes of the tiles in row ``t`` of them."""
        first, stop = self.span(t)
        line = -(-(stop - first) // ROWS) * ROWS * FRAGMENT
        whole, rest = divmod(-(-self.row_bytes // FRAGMENT), self.width)
        return [self.width * line] * whole + [rest * line] * (rest > 0)

    def fill(self, t: int, block: Array) -> Array:
        """The tiles of row ``t``, u8, from its lines of the matrix as it is stored.

        ``block``: u8 ``[lines, bytes]``, or with ``transpose`` u8 ``[rows, lines * itemsize]``.
        """
        layout = self._layout(t)
        nz = np.empty(layout.nbytes, np.uint8)
        layout.fill(nz, block, 0)
        return nz

    def take(self, t: int, nz: Array) -> Array:
        """The block that ``fill`` made the tiles ``nz`` of."""
        layout = self._layout(t)
        return layout.take(nz, 0, layout.rows)

    def _layout(self, t: int) -> Layout:
        first, stop = self.span(t)
        rows, cols = (self.rows, stop - first) if self.transpose else (stop - first, self.cols)
        return Layout(rows, cols, 8 * self.itemsize, self.transpose)


def compress(
    weight: Array,
    mode: Mode = "low",
    dictionary: Dictionary = "call",
    *,
    transpose: bool = False,
    workers: int | None = None,
) -> tuple[Array, Array, Array]:
    """``weight`` (i8 or u8 ``[n, k]``) as stream i8 ``[c]``, index i8 ``[8 * tiles]`` and info.

    Info: i64 ``[5]``, [8, 8, k, n, 1] for the fractals of a tile along k and n, the matrix
    after the transpose, and the order of tiles. A 16-bit weight comes as its bytes ``[n, 2k]``.
    """
    if weight.ndim != 2 or weight.dtype.itemsize != 1:
        raise PlanError(f"the sparse codec takes i8 [n, k], not {weight.dtype} {[*weight.shape]}")
    tiling = Tiling(weight.shape[0], weight.shape[1], 1, transpose)
    blocks, sizes = [], []
    for t in range(tiling.count):
        lines = slice(*tiling.span(t))
        blocks.append(tiling.fill(t, weight[:, lines] if transpose else weight[lines]))
        sizes += tiling.sizes(t)
    stream, index = encode_tiles_of(
        np.concatenate(blocks), sizes, mode, dictionary, workers=workers
    )
    return np.frombuffer(stream, np.int8), np.frombuffer(index, np.int8), info_of(tiling)


def info_of(tiling: Tiling) -> Array:
    """What the consumer is told of a matrix, i64 ``[5]``; k counts bytes."""
    return np.array([TILE, TILE, tiling.row_bytes, tiling.lines, 1], np.int64)


def decompress(
    stream: Buffer,
    index: Buffer,
    info: Array,
    *,
    transpose: bool = False,
    workers: int | None = None,
) -> Array:
    """The weight i8 ``[n, k]`` that ``compress`` was given. Raises CheckpointError on damage."""
    if info.shape != (5,) or [info[0], info[1], info[4]] != [TILE, TILE, 1]:
        raise CheckpointError(f"compress info is [8, 8, k, n, 1], not {info.tolist()}")
    k, n = int(info[2]), int(info[3])
    if k < 1 or n < 1:
        raise CheckpointError(f"compress info {info.tolist()} has an empty matrix")
    tiling = Tiling(*((k, n) if transpose else (n, k)), 1, transpose)
    if len(entries_of(index)) != tiling.count * tiling.across:
        raise CheckpointError(f"the index does not have the tiles of {info.tolist()}")
    rows = [tiling.sizes(t) for t in range(tiling.count)]
    sizes = [size for row in rows for size in row]
    data = np.frombuffer(decode_tiles_of(stream, index, sizes, workers=workers), np.uint8)
    weight, at = np.empty((tiling.rows, tiling.cols), np.uint8), 0
    for t, row in enumerate(rows):
        lines = slice(*tiling.span(t))
        block = tiling.take(t, data[at : at + sum(row)])
        weight[(slice(None), lines) if transpose else lines] = block
        at += sum(row)
    return weight.view(np.int8)
