"""Largest magnitudes: the first pass of schemes with a scale over the whole tensor."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamq.compiled import jit

from .bits import amax_bits, u64, widen


@jit
def row_amax(x: Any, out: Any) -> None:
    """Bits of the f32 amax of each row of ``x [rows, cols]`` into ``out`` uint32 ``[rows]``."""
    for r in range(u64(x.shape[0])):
        row = x[r]
        out[r] = widen(amax_bits(row, np.uint64(0), u64(row.size)))
