"""Pieces of files, about 1 MiB each: rows of one weight, or many small weights in a row.

As many weights as possible go through a kernel as one matrix, so that 70,000 small
tensors cost few more calls than the same bytes in large ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from streamq.checkpoint import Span
from streamq.formats import Entry, Layout, Role
from streamq.planning import SLAB, Weights, slab_rows
from streamq.schemes import BYTES, Packing
from streamq.stored import SLAB as STORED_SLAB
from streamq.stored import Where
from streamq.tensors import TensorInfo

#: Elements of the longest row that flat weights are seen as.
ROW = 1 << 16

Array = np.ndarray[Any, Any]


class Stretch(NamedTuple):
    """Whole weights that follow each other in the source and in every output, or rows of one.

    ``members``: their rows in ``weights``. ``ends``: elements up to the end of each.
    ``first``: the row that a single member is taken from. ``number``: of the first member
    in its job.
    """

    weights: Weights
    members: Array
    ends: Array
    first: int = 0
    number: int = 0


class Slab(NamedTuple):
    """What is read, quantized and written in one go: ``members`` whole, or rows of one.

    ``layout``: of the first member; those of flat ones may differ in their shapes.
    ``start``: absolute byte offset in the file of the first member. ``begins`` and ``ends``
    count elements from there. ``width``: columns of the matrix that the slab is quantized as,
    ``span`` of the one that each member is whole rows of.
    """

    weights: Weights
    members: Array
    begins: Array
    ends: Array
    first: int
    number: int
    start: int
    layout: Layout
    width: int
    span: int

    @property
    def head(self) -> TensorInfo:
        """The first member."""
        return self.weights.sources[int(self.members[0])]

    @property
    def stored(self) -> Where:
        """What the only member is in the source."""
        assert self.weights.stored is not None
        return self.weights.stored[int(self.members[0])]


def stretches(weights: Weights, members: Array) -> Iterator[Stretch]:
    """Cut ``members``, in the order of the source, where one does not continue another."""
    numels = weights.column(lambda x: x.rows * x.cols, members)
    cuts = np.flatnonzero(~_continues(weights, members)) + 1
    begun = 0
    for end in [*cuts.tolist(), len(members)]:
        yield Stretch(weights, members[begun:end], np.cumsum(numels[begun:end]), 0, begun)
        begun = end


def _continues(weights: Weights, members: Array) -> Array:
    """Whether each but the first follows the one before it everywhere, in the same geometry."""
    a, b = members[:-1], members[1:]

    def both(of: Any) -> Array:
        return np.array([weights.column(of, a), weights.column(of, b)])

    if weights.stored is not None:  # each lies in tensors of its own
        return np.zeros(len(a), bool)
    size, cols, flat = both(lambda x: x.bytes_in), both(lambda x: x.cols), both(lambda x: x.flat)
    whole = weights.column(lambda x: x.joins and x.rows % x.row_step == 0, a)
    outputs = np.array([x.sizes for x in weights.layouts])[weights.kind[a]]
    follows: Array = (
        (weights.places[a] + np.stack([0 * size[0], size[0]], 1) == weights.places[b]).all(1)
        & (weights.starts[a] + outputs == weights.starts[b]).all(1)
        & (size <= SLAB).all(0)
        & (flat.all(0) | ((cols[0] == cols[1]) & (whole == 1)))
    )
    return follows


def slabs(stretch: Stretch, size: int | None = None) -> Iterator[Slab]:
    """Cut a stretch into slabs: between members, or between the rows of a single one.

    ``size``: bytes of the source in each, about; None for what suits the caches of a CPU.
    """
    weights, members, ends, first, number = stretch
    itemsize = weights.numpy.itemsize
    layout = weights.layouts[int(weights.kind[members[0]])]
    cols = layout.cols
    start = int(weights.places[members[0], 1])
    if len(members) == 1:
        row_bytes = cols * itemsize
        step = weights.row_step(int(members[0]))
        height = slab_rows(
            step, row_bytes, size or (SLAB if weights.stored is None else STORED_SLAB)
        )
        last = first + int(ends[0]) // cols
        for row in range(first, last, height):
            numel = np.array([(min(row + height, last) - row) * cols])
            at = start + row * row_bytes
            yield Slab(weights, members, 0 * numel, numel, row, number, at, layout, cols, cols)
        return
    # Flat weights may be seen as rows of any length that divides them; long ones cost less.
    span = width = int(np.gcd.reduce(ends))
    if not layout.flat or width > ROW:
        width = int(np.gcd.reduce(weights.column(lambda x: x.cols, members)))
    begins = np.concatenate(([0], ends[:-1]))
    begun = 0
    for end in _cuts(ends, (size or SLAB) // itemsize):
        before = int(begins[begun])
        yield Slab(
            weights, members[begun:end], begins[begun:end] - before, ends[begun:end] - before,
            0, number + begun, start + before * itemsize, layout, width, span,
        )  # fmt: skip
        begun = end


def _cuts(ends: Array, limit: int) -> Iterator[int]:
    """Where to cut, so that as many members as fit into ``limit`` elements stay together."""
    before, begun = 0, 0
    while begun < len(ends):
        begun = max(begun + 1, int(np.searchsorted(ends, before + limit, "right")))
        before = int(ends[begun - 1])
        yield begun


def placed(slab: Slab) -> Iterator[tuple[Entry, int]]:
    """The entries that are made of rows, and where they start in the file."""
    starts = slab.weights.starts[slab.members[0]].tolist()
    return ((e, s) for e, s in zip(slab.layout.entries, starts, strict=True) if e.rows)


def packing_of(layout: Layout) -> Packing:
    """What kernels make of codes: what the file has, or bytes for the format to pack."""
    return layout.packing if layout.entry("codes").direct else BYTES


def shared(
    slab: Slab, above: Array | None
) -> tuple[dict[Role, tuple[Entry, int]], Packing, Array | None]:  # fmt: skip
    """Its entries by role, what kernels make of codes, and for each row the scale ``above``."""
    entries = {e.role: (e, start) for e, start in placed(slab)}
    if above is not None:
        above = np.repeat(above, (slab.ends - slab.begins) // slab.width)
    return entries, packing_of(slab.layout), above


def span_of(rows: Stretch) -> Span:
    """File, first byte and the byte behind the last that a stretch of floats reads."""
    weights, first = rows.weights, int(rows.members[0])
    itemsize = weights.numpy.itemsize
    layout = weights.layouts[int(weights.kind[first])]
    start = int(weights.places[first, 1]) + rows.first * layout.cols * itemsize
    return weights.sources[first].file, start, start + int(rows.ends[-1]) * itemsize


def spans_of(rows: Stretch) -> Iterator[Span]:
    """All that a stretch reads, also where its only member is no tensor of floats by itself."""
    weights = rows.weights
    if weights.stored is None:
        yield span_of(rows)
        return
    member = int(rows.members[0])
    where = weights.stored[member]
    count = int(rows.ends[0]) // weights.layouts[int(weights.kind[member])].cols
    yield from where.spans(rows.first, count)
