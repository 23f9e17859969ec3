"""FRACTAL_NZ, the order in which Ascend's cube units read a matrix.

``[n, k]`` is padded with zeros to whole fractals of 16 rows by 32 bytes (512 bytes) and
stored as ``(K1, N1, 16, K0)``: K0 elements are 32 bytes, K1 fractals lie along k and N1 along
n. An optional transpose of the weight comes first. In bytes this is the same for all
dtypes: ``(K1, N1 * 16, 32)``, row r of every fragment of 32 bytes behind row r - 1.
``to_nz_slow`` and ``from_nz_slow`` define it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamq.errors import PlanError

from . import moves

Array = np.ndarray[Any, Any]

ROWS, FRAGMENT = 16, 32


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the elements of a matrix ``[rows, cols]`` of ``bits`` each lie in FRACTAL_NZ.

    ``bits``: 32, 16, 8, or 4; of 4 bits two are in a byte, the even column in the low
    nibble. ``transpose``: the matrix is transposed first. Raises PlanError for other widths,
    for an empty matrix, and for an odd number of columns of 4 bits.
    """

    rows: int
    cols: int
    bits: int = 8
    transpose: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8, 16, 32):
            raise PlanError(f"FRACTAL_NZ is defined for 4, 8, 16 and 32 bits, not {self.bits}")
        if self.rows < 1 or self.cols < 1:
            raise PlanError(f"an empty matrix {[self.rows, self.cols]} has no FRACTAL_NZ")
        if self.bits == 4 and self.cols % 2:
            raise PlanError(f"4-bit elements are packed in pairs, and {self.cols} columns are odd")

    @property
    def k0(self) -> int:
        """Elements in 32 bytes."""
        return FRAGMENT * 8 // self.bits

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(K1, N1, 16, K0)`` in elements."""
        n, k = (self.cols, self.rows) if self.transpose else (self.rows, self.cols)
        return -(-k // self.k0), -(-n // ROWS), ROWS, self.k0

    @property
    def lines(self) -> int:
        """Rows of a matrix of fragments, padded: N1 * 16."""
        return self.shape[1] * ROWS

    @property
    def nbytes(self) -> int:
        """Bytes of the NZ buffer, a multiple of 512."""
        return self.shape[0] * self.lines * FRAGMENT

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of the matrix."""
        return self.cols * self.bits // 8

    @property
    def step(self) -> int:
        """A block of rows that ``pieces`` takes begins at a multiple of this."""
        return self.k0 if self.transpose else 1

    def fill(self, nz: Array, block: Array, first: int) -> None:
        """Write rows ``first`` and on of the matrix, ``block [r, cols]``, to their places.

        ``nz``: the whole buffer, u8 ``[nbytes]``; it may be a memory map. The padding beside
        and below these rows is written too; blocks are to come in order where ``first`` is
        not a multiple of ``step``.
        """
        rows = self._bytes(block)
        self._check(first, len(rows))
        fragments = nz.reshape(self.shape[0], self.lines, FRAGMENT)
        if not self.transpose:
            last = self.lines if first + len(rows) == self.rows else first + len(rows)
            moves.rows_in(rows, fragments, first, last)
        elif self.bits == 4:
            moves.nibbles_in(rows, fragments, first)
        elif self.bits == 8 and first % FRAGMENT == 0:
            moves.bytes_in(rows, fragments, first)
        else:
            wide = np.dtype(f"u{self.bits // 8}")
            moves.columns_in(rows.view(wide), fragments.view(wide), first)

    def pieces(self, block: Array, first: int) -> Iterator[tuple[int, memoryview]]:
        """The bytes of rows ``first`` and on, ``block [r, cols]``, and where they go.

        Yields byte offsets in the NZ buffer with what is to be written there, so that the
        buffer is never held. All blocks together, each beginning at a multiple of ``step``
        and of a multiple of ``step`` rows but the last, give every byte once.
        """
        if first % self.step or (len(block) % self.step and first + len(block) != self.rows):
            raise PlanError(
                f"blocks of a transposed matrix have multiples of {self.step} rows, not "
                f"{first} to {first + len(block)}"
            )
        rows = self._bytes(block)
        self._check(first, len(rows))
        alone = Layout(len(rows), self.cols, self.bits, self.transpose)
        part = np.empty(alone.nbytes, np.uint8)
        alone.fill(part, block, 0)
        if self.transpose:
            yield first // self.k0 * self.lines * FRAGMENT, part.data
            return
        last = first + len(rows) == self.rows
        count = (self.lines - first if last else len(rows)) * FRAGMENT
        fragments = part.reshape(self.shape[0], -1)
        if count > fragments.shape[1]:
            fragments = np.pad(fragments, ((0, 0), (0, count - fragments.shape[1])))
        for k1, run in enumerate(fragments[:, :count]):
            yield (k1 * self.lines + first) * FRAGMENT, run.data

    def take(self, nz: Array, first: int, count: int, *, out: Array | None = None) -> Array:
        """Rows ``first`` to ``first + count`` of the matrix, u8 ``[count, row_bytes]``.

        ``out``: where to write them; made where None.
        """
        self._check(first, count)
        fragments = nz.reshape(self.shape[0], self.lines, FRAGMENT)
        if out is None:
            out = np.empty((count, self.row_bytes), np.uint8)
        if not self.transpose:
            moves.rows_out(fragments, first, out)
        elif self.bits == 4:
            moves.nibbles_out(fragments, first, out)
        elif self.bits == 8 and first % FRAGMENT == 0:
            moves.bytes_out(fragments, first, out)
        else:
            wide = np.dtype(f"u{self.bits // 8}")
            moves.columns_out(fragments.view(wide), first, out.view(wide))
        return out

    def _check(self, first: int, count: int) -> None:
        if first < 0 or first + count > self.rows:
            raise PlanError(f"rows {first} to {first + count} are not all in {self.rows} rows")

    def _bytes(self, block: Array) -> Array:
        """Rows of any dtype of the right width as u8 ``[r, row_bytes]``."""
        block = np.ascontiguousarray(block)
        rows = block.view(np.uint8).reshape(len(block), -1)
        if rows.shape[1] != self.row_bytes:
            raise PlanError(
                f"a row has {rows.shape[1]} bytes, and {self.cols} elements of {self.bits} bits "
                f"have {self.row_bytes}"
            )
        return rows


def to_nz(x: Array, *, bits: int | None = None, transpose: bool = False) -> Array:
    """``x [n, k]`` in FRACTAL_NZ, ``(K1, N1, 16, K0)`` of its dtype.

    ``bits=4``: ``x`` is u8 or i8 ``[n, k / 2]``, two elements a byte, and so is the result,
    ``(K1, N1, 16, 32)``. Raises PlanError as ``Layout`` does.
    """
    layout = _layout(x, bits, transpose)
    nz = np.empty(layout.nbytes, np.uint8)
    layout.fill(nz, x, 0)
    return nz.view(x.dtype).reshape(*layout.shape[:3], -1)


def from_nz(
    nz: Array, rows: int, cols: int, *, bits: int | None = None, transpose: bool = False
) -> Array:
    """The ``[rows, cols]`` that ``to_nz`` made ``nz`` of; with ``bits=4`` cols / 2 bytes a row."""
    layout = Layout(rows, cols, bits or nz.dtype.itemsize * 8, transpose)
    flat = np.ascontiguousarray(nz).reshape(-1).view(np.uint8)
    if len(flat) != layout.nbytes:
        raise PlanError(f"[{rows}, {cols}] has {layout.nbytes} bytes in NZ, not {len(flat)}")
    return layout.take(flat, 0, rows).view(nz.dtype)


def to_nz_slow(x: Array, *, bits: int | None = None, transpose: bool = False) -> Array:
    """What ``to_nz`` gives, by the definition: pad, split, exchange axes."""
    four = bits == 4
    if four:
        x = _nibbles(x.view(np.uint8))
    if transpose:
        x = x.T
    k0 = 64 if four else FRAGMENT // x.dtype.itemsize
    x = np.pad(x, [(0, -x.shape[0] % ROWS), (0, -x.shape[1] % k0)])
    nz = x.reshape(x.shape[0] // ROWS, ROWS, x.shape[1] // k0, k0).transpose(2, 0, 1, 3)
    return nz[..., 0::2] | nz[..., 1::2] << 4 if four else np.ascontiguousarray(nz)


def from_nz_slow(
    nz: Array, rows: int, cols: int, *, bits: int | None = None, transpose: bool = False
) -> Array:
    """What ``from_nz`` gives, by the definition."""
    if bits == 4:
        nz = _nibbles(nz.view(np.uint8))
    k1, n1, _, k0 = nz.shape
    x = nz.transpose(1, 2, 0, 3).reshape(n1 * ROWS, k1 * k0)
    x = (x.T if transpose else x)[:rows, :cols]
    return x[:, 0::2] | x[:, 1::2] << 4 if bits == 4 else np.ascontiguousarray(x)


def _nibbles(packed: Array) -> Array:
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


def _layout(x: Array, bits: int | None, transpose: bool) -> Layout:
    width = x.dtype.itemsize * 8
    if bits not in (None, width) and (bits, width) != (4, 8):
        raise PlanError(f"elements of {bits} bits do not lie in an array of {x.dtype}")
    cols = x.shape[1] * (2 if bits == 4 else 1)
    return Layout(x.shape[0], cols, bits or width, transpose)
