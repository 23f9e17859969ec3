"""What a format tells the planner about one quantized weight, from its shape alone."""

from __future__ import annotations

from math import lcm
from typing import Literal, NamedTuple

from streamq.schemes import Packing
from streamq.tensors import DTYPES

Role = Literal["codes", "scale", "zero_point", "global_scale", "constant"]


class Entry(NamedTuple):
    """One output tensor of a weight, of ``size`` bytes.

    Every ``rows`` rows of the weight become ``nbytes`` bytes of it, in order, so that a
    slab of rows lands in one piece; ``rows`` is 0 for what is not made of rows. A
    ``constant`` is known from the shape and carries its bytes in ``value``.
    """

    suffix: str
    role: Role
    dtype: str
    shape: tuple[int, ...]
    size: int
    rows: int = 0
    nbytes: int = 0
    value: bytes = b""


class Layout(NamedTuple):
    """All output tensors of a ``[rows, cols]`` weight of one dtype under one scheme.

    ``row_step``: a slab starts at a multiple of this many rows. ``flat``: rows mean
    nothing to the outputs, which are those of the weight seen as one long row; so any
    weights that lie one behind the other are quantized as one matrix.
    """

    rows: int
    cols: int
    bytes_in: int
    bytes_out: int
    entries: tuple[Entry, ...]
    sizes: tuple[int, ...]  # of the entries
    packing: Packing
    row_step: int
    flat: bool


def make_layout(
    rows: int, cols: int, dtype: str, entries: list[Entry], packing: Packing, block: tuple[int, int]
) -> Layout:
    """A Layout with what follows from its entries and the (resolved) block of the scheme."""
    block_rows, block_cols = block
    made_of_rows = [e for e in entries if e.rows]
    flat = (
        block_rows == 1
        and cols % block_cols == 0
        and block_cols != cols
        and all(e.rows == 1 for e in made_of_rows)
        and (packing.kind != "words" or cols * packing.bits % 32 == 0)
    )
    step = lcm(*(e.rows for e in made_of_rows))
    bytes_in = rows * cols * DTYPES[dtype].itemsize
    sizes = tuple(e.size for e in entries)
    return Layout(rows, cols, bytes_in, sum(sizes), tuple(entries), sizes, packing, step, flat)
