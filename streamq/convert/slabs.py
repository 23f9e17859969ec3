"""Pieces of files, about 1 MiB each: rows of one weight, or many small weights in a row.

Inside a slab as many weights as possible go through a kernel as one matrix, so that
70,000 small tensors cost few more calls than the same bytes in large ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import Any, NamedTuple

import numpy as np

from streamq.plan import SLAB, Member, slab_rows
from streamq.tensors import DTYPES

#: Elements of the longest row that flat weights are seen as.
ROW = 1 << 16


class Segment(NamedTuple):
    """Rows ``[first, last)`` of a weight that is quantized."""

    member: Member
    first: int
    last: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return (self.last - self.first) * self.member.layout.cols


class Slab(NamedTuple):
    """Segments whose bytes follow each other in one file."""

    file: str
    start: int
    dtype: np.dtype[Any]
    segments: list[Segment]
    numel: int


def slabs(segments: list[Segment]) -> Iterator[Slab]:
    """Cut and join segments, which come in the order of the source, into slabs."""
    joined: list[Segment] = []
    file, dtype, start, numel, limit = "", "", 0, 0, 0
    itemsize = 1
    for segment in segments:
        member, first, last = segment
        t, layout = member.source, member.layout
        size = (last - first) * layout.cols
        if joined and (
            numel + size > limit
            or t.file != file
            or t.dtype != dtype
            or t.start != start + numel * itemsize
            or first
        ):
            yield Slab(file, start, numpy_dtype(dtype), joined, numel)
            joined = []
        if not joined:
            file, dtype = t.file, t.dtype
            itemsize = DTYPES[dtype].itemsize
            start, numel, limit = t.start, 0, SLAB // itemsize
        if numel + size <= limit and not first:
            joined.append(segment)
            numel += size
            continue
        step = slab_rows(layout, layout.cols * itemsize)
        for row in range(first, last, step):
            piece = Segment(member, row, min(row + step, last))
            at = t.start + row * layout.cols * itemsize
            yield Slab(file, at, numpy_dtype(dtype), [piece], piece.numel)
    if joined:
        yield Slab(file, start, numpy_dtype(dtype), joined, numel)


def numpy_dtype(tag: str) -> np.dtype[Any]:
    """The numpy dtype of a weight's header tag."""
    dtype = DTYPES[tag].numpy
    assert dtype is not None
    return dtype


def stacks(segments: list[Segment]) -> Iterator[list[Segment]]:
    """Split a slab's segments into runs that a kernel can take as one matrix."""
    run = [segments[0]]
    for segment in segments[1:]:
        if not _continues(run[-1], segment):
            yield run
            run = []
        run.append(segment)
    yield run


def _continues(a: Segment, b: Segment) -> bool:
    """Whether ``b`` follows ``a`` in every output made of rows, in the same geometry."""
    x, y = a.member.layout, b.member.layout
    if not (x.flat and y.flat) and (x.cols != y.cols or x.rows % x.row_step):
        return False
    for e, s, t in zip(x.entries, a.member.starts, b.member.starts, strict=True):
        if e.rows and t != s + e.size:
            return False
    return True


def width_of(run: list[Segment]) -> int:
    """Columns of the matrix that a run is seen as.

    Flat weights may be seen as rows of any length that divides them; long ones cost less.
    """
    if len(run) == 1 or not run[0].member.layout.flat:
        return run[0].member.layout.cols
    width = gcd(*[s.numel for s in run])
    return width if width <= ROW else gcd(*[s.member.layout.cols for s in run])
