"""What a format tells the planner about one quantized weight, from its shape alone."""

from __future__ import annotations

from math import lcm, prod
from typing import Literal, NamedTuple

from streamq.schemes import Packing
from streamq.tensors import DTYPES

Role = Literal["codes", "scale", "zero_point", "global_scale", "constant"]


class Entry(NamedTuple):
    """One output tensor of a weight.

    Every ``rows`` rows of the weight become ``nbytes`` bytes of it, in order, so that a
    slab of rows lands in one piece; ``rows`` is 0 for what is not made of rows. A
    ``constant`` is known from the shape and carries its bytes in ``value``.
    """

    suffix: str
    role: Role
    dtype: str
    shape: tuple[int, ...]
    rows: int = 0
    nbytes: int = 0
    value: bytes = b""

    @property
    def size(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * DTYPES[self.dtype].bits // 8

    def offset(self, row: int) -> int:
        """Byte offset of what the weight's row ``row`` becomes; a multiple of ``rows``."""
        return row // self.rows * self.nbytes


class Layout(NamedTuple):
    """All output tensors of a ``[rows, cols]`` weight under one scheme."""

    entries: tuple[Entry, ...]
    packing: Packing

    @property
    def row_step(self) -> int:
        """A slab starts at a multiple of this many rows."""
        return lcm(*(e.rows for e in self.entries if e.rows))
