"""What a format tells the planner about one quantized weight, from its shape alone."""

from __future__ import annotations

from math import lcm
from typing import Literal, NamedTuple

from streamq.schemes import BYTES, Packing
from streamq.tensors import DTYPES

#: What a tensor is of its weight. ``offset``: zeros beside the scales; ``row_sum``: sums of rows of
#: values; ``unused``: what others write and nothing here is made from.
Role = Literal[
    "codes", "scale", "zero_point", "bias", "global_scale", "constant", "offset", "row_sum",
    "unused",
]  # fmt: skip


class Entry(NamedTuple):
    """One output tensor of a weight, of ``size`` bytes.

    Every ``rows`` rows of the weight become ``nbytes`` bytes in each of its ``lines``, in
    order. What is row-major has one line, so that a slab of rows lands in one piece; a
    transposed tensor has a line for each of its own rows, ``size / lines`` bytes apart.
    ``rows`` is 0 for what is not made of rows. A ``constant`` is known from the shape and
    carries its bytes in ``value``. ``direct``: a kernel writes these very bytes; the
    format packs the others.
    """

    suffix: str
    role: Role
    dtype: str
    shape: tuple[int, ...]
    size: int
    rows: int = 0
    nbytes: int = 0
    value: bytes = b""
    lines: int = 1
    direct: bool = False
    transposed: bool = False

    @property
    def stride(self) -> int:
        """Bytes from one line to the next."""
        return self.size // self.lines

    @property
    def per_row(self) -> int:
        """Elements that ``rows`` rows of the weight become."""
        return self.lines * self.nbytes // DTYPES[self.dtype].itemsize


class Layout(NamedTuple):
    """All output tensors of a ``[rows, cols]`` weight of one dtype under one scheme.

    ``packing``: what a kernel may emit for the codes. ``row_step``: a slab starts at a
    multiple of this many rows. ``joins``: whole weights that lie one behind the other, and
    whose outputs do, can be quantized as one matrix. ``flat``: rows mean nothing to the
    outputs, which are those of the weight seen as one long row, so that their widths may
    differ too.
    """

    rows: int
    cols: int
    bytes_in: int
    bytes_out: int
    entries: tuple[Entry, ...]
    sizes: tuple[int, ...]  # of the entries
    packing: Packing
    row_step: int
    joins: bool
    flat: bool

    def entry(self, role: Role) -> Entry:
        """The entry of a role that the layout has once."""
        return next(e for e in self.entries if e.role == role)

    @property
    def gathered(self) -> int:
        """Bytes of the entries that have several lines."""
        return sum(e.size for e in self.entries if e.transposed)


def rows_entry(
    suffix: str, role: Role, dtype: str, shape: tuple[int, ...], rows: int, *, direct: bool = True
) -> Entry:
    """A row-major entry: ``rows`` rows of the weight are one along its first axis."""
    size = DTYPES[dtype].itemsize
    for n in shape:
        size *= n
    return Entry(suffix, role, dtype, shape, size, rows, size // shape[0], direct=direct)


def columns_entry(suffix: str, role: Role, dtype: str, shape: tuple[int, int], rows: int) -> Entry:
    """A transposed entry: ``rows`` rows of the weight are one element along its second axis."""
    itemsize = DTYPES[dtype].itemsize
    lines, width = shape
    return Entry(suffix, role, dtype, shape, lines * width * itemsize, rows, itemsize, lines=lines,
                 transposed=True)  # fmt: skip


def make_layout(
    rows: int,
    cols: int,
    dtype: str,
    entries: list[Entry],
    block: tuple[int, int],
    packing: Packing = BYTES,
) -> Layout:
    """A Layout with what follows from its entries and the (resolved) block of the scheme."""
    block_rows, block_cols = block
    made_of_rows = [e for e in entries if e.rows]
    joins = not any(e.transposed for e in made_of_rows)
    flat = (
        joins
        and block_rows == 1
        and cols % block_cols == 0
        and block_cols != cols
        and all(e.rows == 1 and e.direct for e in made_of_rows)
        and (packing.kind != "words" or cols * packing.bits % 32 == 0)
    )
    step = lcm(*(e.rows for e in made_of_rows))
    bytes_in = rows * cols * DTYPES[dtype].itemsize
    sizes = tuple(e.size for e in entries)
    return Layout(
        rows, cols, bytes_in, sum(sizes), tuple(entries), sizes, packing, step, joins, flat
    )
