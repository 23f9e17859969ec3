"""A weight as the 310P reads it: the NZ array cut into tiles of 8 x 8 fractals, compressed.

Tiles of 8 fractals along k by 8 along n, 32 KiB, n the outer loop; inside of a tile the rows
of fractals along k, each with its columns along n. What k leaves over is a short tile. Of n
the last tile overlaps the one before, so that it is whole: that is inferred from how the
consumer cuts, no output of CANN was at hand for it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from streamq.errors import CheckpointError, PlanError

from .codec import Buffer, Dictionary, decode_tiles_of, encode_tiles_of
from .layout import Layout
from .tables import Array, Mode

TILE = 8
_FRACTAL = 512


def compress(
    weight: Array,
    mode: Mode = "low",
    dictionary: Dictionary = "call",
    *,
    transpose: bool = False,
    workers: int | None = None,
) -> tuple[Array, Array, Array]:
    """``weight`` (i8 or u8 ``[n, k]``) as stream i8 ``[c]``, index i8 ``[8 * tiles]`` and info.

    Info: i64 ``[5]``, [8, 8, k, n, 1] for the fractals of a tile along k and n, the matrix
    after the transpose, and the order of tiles. A 16-bit weight comes as its bytes ``[n, 2k]``.
    """
    if weight.ndim != 2 or weight.dtype.itemsize != 1:
        raise PlanError(f"the sparse codec takes i8 [n, k], not {weight.dtype} {[*weight.shape]}")
    layout = Layout(weight.shape[0], weight.shape[1], 8, transpose)
    nz = np.empty(layout.nbytes, np.uint8)
    layout.fill(nz, weight, 0)
    fractals = nz.reshape(*layout.shape[:2], _FRACTAL)
    cuts = list(_cuts(layout))
    data = np.concatenate([fractals[cut].reshape(-1) for cut in cuts])
    sizes = [fractals[cut].size for cut in cuts]
    stream, index = encode_tiles_of(data, sizes, mode, dictionary, workers=workers)
    n, k = weight.shape[::-1] if transpose else weight.shape
    info = np.array([TILE, TILE, k, n, 1], np.int64)
    return np.frombuffer(stream, np.int8), np.frombuffer(index, np.int8), info


def decompress(
    stream: Buffer,
    index: Buffer,
    info: Array,
    *,
    transpose: bool = False,
    workers: int | None = None,
) -> Array:
    """The weight i8 ``[n, k]`` that ``compress`` was given. Raises CheckpointError on damage."""
    if info.shape != (5,) or [info[0], info[1], info[4]] != [TILE, TILE, 1]:
        raise CheckpointError(f"compress info is [8, 8, k, n, 1], not {info.tolist()}")
    k, n = int(info[2]), int(info[3])
    if k < 1 or n < 1:
        raise CheckpointError(f"compress info {info.tolist()} has an empty matrix")
    rows, cols = (k, n) if transpose else (n, k)
    layout = Layout(rows, cols, 8, transpose)
    cuts = list(_cuts(layout))
    shape = (*layout.shape[:2], _FRACTAL)
    sizes = [(c[0].stop - c[0].start) * (c[1].stop - c[1].start) * _FRACTAL for c in cuts]
    data = np.frombuffer(decode_tiles_of(stream, index, sizes, workers=workers), np.uint8)
    fractals, at = np.empty(shape, np.uint8), 0
    for cut, size in zip(cuts, sizes, strict=True):
        fractals[cut] = data[at : at + size].reshape(fractals[cut].shape)
        at += size
    return layout.take(fractals.reshape(-1), 0, layout.rows).view(np.int8)


def _cuts(layout: Layout) -> Iterator[tuple[slice, slice]]:
    """The tiles in order, as parts of ``[K1, N1]``."""
    k1, n1 = layout.shape[:2]
    for n in range(0, n1, TILE):
        first = max(0, min(n, n1 - TILE))
        for k in range(0, k1, TILE):
            yield slice(k, min(k + TILE, k1)), slice(first, min(first + TILE, n1))
