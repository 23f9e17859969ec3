"""Weights that lie inside larger tensors: the experts of a layer, transposed perhaps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from streamq.checkpoint import Checkpoint, Span
from streamq.tensors import DTYPES, TensorInfo

Array = np.ndarray[Any, Any]

#: Columns that are transposed in one go: 5.3 GB/s, with 32 or 256 of them 1.8 (u16, 1638 rows).
LINES = 64


class View(NamedTuple):
    """A float weight of ``rows`` and ``cols`` in ``tensor``.

    ``start``: absolute byte offset of its first element. ``row_stride``, ``col_stride``: elements
    from one row, or one column, to the next; one of them is small (1, or 2 where two
    weights interleave). A vector has one column, and no column stride.
    """

    tensor: TensorInfo
    start: int
    rows: int
    cols: int
    row_stride: int
    col_stride: int

    @property
    def shape(self) -> tuple[int, ...]:
        """``(rows, cols)``, or ``(rows,)`` of a vector."""
        return (self.rows, self.cols) if self.col_stride else (self.rows,)

    @property
    def in_a_row(self) -> bool:
        """Whether its elements lie one behind the other."""
        return self.row_stride == self.cols and self.col_stride in (0, 1)

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """The tensor it lies in."""
        return (self.tensor,)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.rows * self.cols * DTYPES[self.tensor.dtype].itemsize

    @property
    def row_step(self) -> int:
        """Rows that a slab is a multiple of."""
        return 1

    def spans(self, first: int, rows: int) -> Iterator[Span]:
        """What ``read`` reads, and what lies between."""
        itemsize = DTYPES[self.tensor.dtype].itemsize
        at = self.start + first * self.row_stride * itemsize
        last = (rows - 1) * self.row_stride + max(0, self.cols - 1) * self.col_stride
        yield self.tensor.file, at, at + (last + 1) * itemsize

    def read(self, checkpoint: Checkpoint, first: int, rows: int) -> Array:
        """Some rows, contiguous, ``[rows, cols]`` in the dtype of the tensor."""
        dtype = DTYPES[self.tensor.dtype].numpy
        assert dtype is not None
        at = self.start + first * self.row_stride * dtype.itemsize
        file = self.tensor.file
        if self.col_stride < self.row_stride:  # rows with others between them
            width = ((rows - 1) * self.row_stride + (self.cols - 1) * self.col_stride) + 1
            raw = np.empty(width, dtype)
            checkpoint.pread(file, at, raw.view(np.uint8).data)
            steps = (self.row_stride * dtype.itemsize, self.col_stride * dtype.itemsize)
            seen = np.lib.stride_tricks.as_strided(raw, (rows, self.cols), steps)
            return np.ascontiguousarray(seen)
        bits = np.dtype(f"u{dtype.itemsize}")
        out = np.empty((rows, self.cols), bits)
        lines = np.empty((min(LINES, self.cols), (rows - 1) * self.row_stride + 1), bits)
        raw_lines = lines.view(np.uint8)
        step = self.col_stride * dtype.itemsize
        for left in range(0, self.cols, LINES):
            n = min(LINES, self.cols - left)
            checkpoint.pread_lines(file, at + left * step, step, raw_lines[:n])
            out[:, left : left + n] = lines[:n, :: self.row_stride].T
        return out.view(dtype)


class Joined(NamedTuple):
    """The rows of several float tensors of one width, one tensor behind the other.

    ``orders``: for each tensor which of its rows comes at each place, None as they lie.
    """

    tensors: tuple[TensorInfo, ...]
    orders: tuple[Array | None, ...]

    @property
    def start(self) -> int:
        """Absolute byte offset of the first tensor, for ordering."""
        return self.tensors[0].start

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, cols)``."""
        return self.rows, self.cols

    @property
    def rows(self) -> int:
        """Rows of all tensors."""
        return sum(t.shape[0] for t in self.tensors)

    @property
    def cols(self) -> int:
        """Columns, the same in all."""
        return self.tensors[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def row_step(self) -> int:
        """Rows that a slab is a multiple of."""
        return 1

    def _parts(self, first: int, rows: int) -> Iterator[tuple[TensorInfo, Array, int, int]]:
        """Of each tensor that has some of these rows: which, the least of them and the most."""
        begun = 0
        for t, order in zip(self.tensors, self.orders, strict=True):
            a, b = max(first - begun, 0), min(first + rows - begun, t.shape[0])
            begun += t.shape[0]
            if a < b:
                wanted = np.arange(a, b) if order is None else order[a:b]
                yield t, wanted, int(wanted.min()), int(wanted.max())

    def spans(self, first: int, rows: int) -> Iterator[Span]:
        """What ``read`` reads."""
        for t, _, least, most in self._parts(first, rows):
            row = t.nbytes // t.shape[0]
            yield t.file, t.start + least * row, t.start + (most + 1) * row

    def read(self, checkpoint: Checkpoint, first: int, rows: int) -> Array:
        """Some rows, contiguous, ``[rows, cols]`` in the dtype of the tensors."""
        pieces = []
        for t, wanted, least, most in self._parts(first, rows):
            found = np.empty((most - least + 1, self.cols), DTYPES[t.dtype].numpy)
            at = t.start + least * found.strides[0]
            checkpoint.pread(t.file, at, found.view(np.uint8).reshape(-1).data)
            pieces.append(found[wanted - least])
        return np.concatenate(pieces)
