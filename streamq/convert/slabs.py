"""Pieces of files, about 1 MiB each: rows of one weight, or many small weights in a row.

As many weights as possible go through a kernel as one matrix, so that 70,000 small
tensors cost few more calls than the same bytes in large ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise
from math import gcd
from operator import add
from typing import Any, NamedTuple

import numpy as np

from streamq.plan import SLAB, Member, slab_rows
from streamq.tensors import DTYPES

#: Elements of the longest row that flat weights are seen as.
ROW = 1 << 16

Array = np.ndarray[Any, Any]


class Stretch(NamedTuple):
    """Whole weights that follow each other in the source and in every output, or rows of one.

    ``ends``: elements up to the end of each member. ``first``: the row that a single
    member is taken from. ``number``: of the first member in its job.
    """

    members: list[Member]
    number: int
    ends: list[int]
    first: int = 0


class Slab(NamedTuple):
    """What is read, quantized and written in one go: ``members`` whole, or rows of one.

    ``start``: absolute byte offset in ``file``. ``ends`` counts elements from there.
    """

    members: list[Member]
    number: int
    ends: list[int]
    first: int
    file: str
    start: int
    dtype: np.dtype[Any]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.ends[-1]

    @property
    def width(self) -> int:
        """Columns of the matrix that the slab is seen as.

        Flat weights may be seen as rows of any length that divides them; long ones cost less.
        """
        layout = self.members[0].layout
        if len(self.members) == 1 or not layout.flat:
            return layout.cols
        width = gcd(*self.ends)
        return width if width <= ROW else gcd(*[m.layout.cols for m in self.members])


def stretches(members: list[Member]) -> Iterator[Stretch]:
    """Cut members, which come in the order of the source, where one does not continue another."""
    begun = 0
    for i, (a, b) in enumerate(pairwise(members), 1):
        if not _continues(a, b):
            yield _stretch(members[begun:i], begun)
            begun = i
    if members:
        yield _stretch(members[begun:], begun)


def _stretch(members: list[Member], number: int) -> Stretch:
    numels = [m.layout.rows * m.layout.cols for m in members]
    return Stretch(members, number, list(accumulate(numels)))


def _continues(a: Member, b: Member) -> bool:
    """Whether ``b`` follows ``a`` everywhere, in the same geometry, and both are small."""
    t, x, starts = a
    u, y, starts_of_next = b
    return (
        t.start + x.bytes_in == u.start
        and tuple(map(add, starts, x.sizes)) == starts_of_next
        and t.file == u.file
        and t.dtype == u.dtype
        and x.bytes_in <= SLAB
        and y.bytes_in <= SLAB
        and ((x.flat and y.flat) or (x.cols == y.cols and x.rows % x.row_step == 0))
    )


def slabs(stretch: Stretch) -> Iterator[Slab]:
    """Cut a stretch into slabs: between members, or between the rows of a single one."""
    members, number, ends, first = stretch
    t, layout = members[0].source, members[0].layout
    dtype = numpy_dtype(t.dtype)
    if len(members) == 1:
        row_bytes = layout.cols * dtype.itemsize
        height = slab_rows(layout, row_bytes)
        last = first + ends[0] // layout.cols
        for row in range(first, last, height):
            numel = (min(row + height, last) - row) * layout.cols
            yield Slab(members, number, [numel], row, t.file, t.start + row * row_bytes, dtype)
        return
    limit = SLAB // dtype.itemsize
    begun, before = 0, 0
    for i, end in enumerate([*ends[1:], ends[-1] + limit + 1], 1):
        if end - before > limit:
            part = [e - before for e in ends[begun:i]]
            start = t.start + before * dtype.itemsize
            yield Slab(members[begun:i], number + begun, part, 0, t.file, start, dtype)
            begun, before = i, ends[i - 1]


def numpy_dtype(tag: str) -> np.dtype[Any]:
    """The numpy dtype of a weight's header tag."""
    dtype = DTYPES[tag].numpy
    assert dtype is not None
    return dtype
