"""Reading what is compressed: rows, columns or bytes of a tensor whose rows lie in runs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from streamq.checkpoint import Checkpoint

from .types import Array, Item, Run

#: Columns are read with what is between them up to this many times their width.
SPAN = 8
#: Bytes of whole rows that are read for some of their columns at a time.
_BATCH = 1 << 20


class Reader:
    """Reads the tensors of a source; used by several threads at once."""

    def __init__(self, source: Checkpoint) -> None:
        self._source = source

    def rows(self, item: Item, first: int, stop: int) -> Array:
        """Rows of a matrix, u8 ``[stop - first, bytes]``, pruned where that is asked for."""
        width = item.nbytes // item.shape[0]
        out = np.empty((stop - first, width), np.uint8)
        self._fill(item, out, first, 0)
        return out

    def columns(self, item: Item, first: int, stop: int) -> Array:
        """Columns of a matrix, u8 ``[rows, bytes]``."""
        out = np.empty((item.shape[0], (stop - first) * item.itemsize), np.uint8)
        self._fill(item, out, 0, first * item.itemsize)
        return out

    def flat(self, item: Item, first: int, stop: int) -> Array:
        """Bytes of a tensor, u8 ``[stop - first]``."""
        out = np.zeros(stop - first, np.uint8)
        at = 0
        for run in item.runs:
            end = at + run.rows * run.width
            a, b = max(first, at), min(stop, end)
            if a < b:
                top, left = divmod(a - at, run.width)
                bottom = -(-(b - at) // run.width)
                if bottom - top == 1:
                    part = self._segment(run, top, 1, left, b - a, None)
                else:
                    part = self._segment(run, top, bottom - top, 0, run.width, None)
                    part = part.reshape(-1)[left : left + b - a]
                out[a - first : b - first] = part.reshape(-1)
            at = end
        return out

    def _fill(self, item: Item, out: Array, first: int, left: int) -> None:
        """``out[:]`` from row ``first`` on and from byte ``left`` of the rows on."""
        at, stop = 0, first + len(out)
        for run in item.runs:
            a, b = max(first, at), min(stop, at + run.rows)
            if a < b:
                out[a - first : b - first] = self._segment(
                    run, a - at, b - a, left, out.shape[1], item
                )
            at += run.rows

    def _segment(
        self, run: Run, first: int, count: int, left: int, width: int, item: Item | None
    ) -> Array:
        """``width`` bytes of ``count`` rows of a run, pruned as ``item`` says."""
        lead, start = run.lead + left, run.start + first * run.step
        keep = item.keep if item is not None else None
        out = np.empty((count, width), np.uint8)
        if keep is None and (width == run.step or count == 1):
            self._source.pread(run.file, start + lead, out.reshape(-1).data)
        elif keep is None and run.step > SPAN * width:
            for i in range(count):
                self._source.pread(run.file, start + i * run.step + lead, out[i].data)
        else:
            for i, stop in _batches(count, run.step):
                raw = np.empty((stop - i, run.step), np.uint8)
                self._source.pread(run.file, start + i * run.step, raw.reshape(-1).data)
                if item is not None and keep is not None:
                    prune(raw, item.itemsize, keep)
                out[i:stop] = raw[:, lead : lead + width]
        return out


def _batches(count: int, step: int) -> Iterator[tuple[int, int]]:
    height = max(1, _BATCH // step)
    return ((i, min(i + height, count)) for i in range(0, count, height))


def prune(rows: Array, itemsize: int, keep: float) -> None:
    """Set all but the largest magnitudes of each row to zero; floats of ``itemsize`` bytes.

    ``rows``: u8 ``[n, bytes]``, changed in place. Of k elements round(keep * k) are kept, of equal
    magnitudes the first. Without their sign bit floats are in the order of their bits.
    """
    bits = rows.view(f"u{itemsize}")
    magnitude = bits & ((1 << 8 * itemsize - 1) - 1)
    cols = bits.shape[1]
    kept = max(1, round(keep * cols))
    if kept == cols:
        return
    least = np.partition(magnitude, cols - kept, axis=1)[:, cols - kept, None]
    equal = magnitude == least
    room = kept - np.count_nonzero(magnitude > least, axis=1, keepdims=True)
    bits[(magnitude < least) | (equal & (np.cumsum(equal, axis=1) > room))] = 0
