"""How the results for a slab lie in one piece of memory, so that one copy brings all of them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import numpy as np

from .layer import Array, DType

#: Where a part begins, in bytes: a multiple of any dtype and of what a GPU reads at once.
ALIGNED = 128

Buffer = tuple[tuple[int, int], DType]


def aligned(nbytes: int) -> int:
    """Bytes that a part takes."""
    return -(-nbytes // ALIGNED) * ALIGNED


class Parts(NamedTuple):
    """Shape and dtype of each part, the byte it begins at, and that of the ``status``.

    The status is int32 ``[2]``: not 0 where a weight, or a scale, is not finite.
    """

    buffers: tuple[Buffer, ...]
    starts: tuple[int, ...]
    status: int

    @property
    def nbytes(self) -> int:
        """Bytes of all parts and the status."""
        return self.status + 8

    def views(self, raw: Array) -> list[Array]:
        """The parts in bytes, uint8 ``[nbytes]``."""
        return [
            raw[start : start + prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
            for (shape, dtype), start in zip(self.buffers, self.starts, strict=True)
        ]

    def status_in(self, raw: Array) -> Array:
        """The status in bytes, uint8 ``[nbytes]``."""
        return raw[self.status : self.nbytes].view(np.int32)


def arrange(buffers: Sequence[Buffer]) -> Parts:
    """Parts one behind the other."""
    starts, end = [], 0
    for shape, dtype in buffers:
        starts.append(end)
        end += aligned(prod(shape) * dtype.itemsize)
    return Parts(tuple(buffers), tuple(starts), end)
