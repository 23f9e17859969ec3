"""A closer look at single tensors: how their weights were distributed, and what became of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamq.checkpoint import Checkpoint
from streamq.kernels.reference import dequantize
from streamq.stored import Stored, read_rows
from streamq.verifying.elements import source_rows

from .pairs import Pair

Array = np.ndarray[Any, Any]

#: Rows are taken from so many places of a tensor, about so many weights from each: a look costs
#: the same whatever the size of the tensor.
PLACES, WEIGHTS = 16, 1 << 15

#: Bins of a histogram, and its reach to either side in root mean squares of the weights.
BINS, REACH = 49, 4.0  # an odd number, so that codes of 0 are in the middle of one


def histogram(out: Checkpoint, source: Checkpoint, pair: Pair) -> dict[str, Any]:
    """Weights before and after, counted from ``-reach`` to ``reach``; what is beyond, in the ends.

    Of a tensor with more than PLACES x WEIGHTS weights a part is looked at, from all over it.
    """
    s = pair.stored
    assert s is not None
    before, after = [], []
    for first, rows in _places(pair, s):
        x = source_rows(source, pair.source, pair.origin, first, rows, s.layout.cols)
        before.append(x.astype(np.float64).reshape(-1))
        with np.errstate(over="ignore"):
            values = dequantize(read_rows(out, s, first, rows), s.scheme)
        after.append(values.astype(np.float64).reshape(-1))
    x, y = np.concatenate(before), np.concatenate(after)
    reach = REACH * float(np.sqrt(np.square(x).mean())) or 1.0
    return {
        "reach": float(f"{reach:.6g}"), "weights": len(x),
        "source": _counts(x, reach), "dequantized": _counts(y, reach),
    }  # fmt: skip


def _places(pair: Pair, s: Stored) -> list[tuple[int, int]]:
    """First row and number of rows of each piece, multiples of what both sides read by."""
    step = np.lcm(s.row_step, pair.origin.row_step if pair.origin else 1)
    height = int(max(step, WEIGHTS // s.layout.cols // step * step))
    pieces = -(-s.layout.rows // height)
    taken = np.unique(np.linspace(0, pieces - 1, min(PLACES, pieces)).round().astype(int))
    return [(int(i) * height, min(height, s.layout.rows - int(i) * height)) for i in taken]


def _counts(x: Array, reach: float) -> list[int]:
    place = np.clip((x / reach + 1) * (BINS / 2), 0, BINS - 1).astype(np.int64)
    counts: list[int] = np.bincount(place, minlength=BINS).tolist()
    return counts
