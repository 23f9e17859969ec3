"""Largest magnitudes: the first pass of schemes with a scale over the whole tensor."""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np

from .bits import JIT, amax_bits, u64, widen


@nb.njit(**JIT)
def row_amax(x: Any, out: Any) -> None:
    """Bits of the f32 amax of each row of ``x [rows, cols]`` into ``out`` uint32 ``[rows]``."""
    for r in range(u64(x.shape[0])):
        row = x[r]
        out[r] = widen(amax_bits(row, np.uint64(0), u64(row.size)))
