"""The sparse weight codec of the Ascend 310P's decompression engine ("weight_unzip").

A tile of at most 65,024 bytes becomes four streams, one for each engine, that are
interleaved; where that is not smaller it is stored as it is. The stream of a tile says
all that its decoding needs, the index where it lies: 8 bytes each, little-endian, u16
{length in 128 bytes: 9 bits, zeros: 6, compressed: 1}, u16 0, u32 offset in 128 bytes.
``streamq.nz.reference`` is the definition.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Literal, TypeVar

import numpy as np

from streamq.errors import CheckpointError, PlanError

from .decode import REASONS, decode_tiles
from .encode import PLANS, encode_tiles
from .tables import MAX_TILE, TILE_STEP, UNIT, Array, Mode, count_tiles, rank

Dictionary = Literal["call", "tile"]
Buffer = bytes | bytearray | memoryview | Array
T = TypeVar("T")

#: Bytes that one thread takes at a time: its share of dictionary and table is then 1%.
_PORTION = 1 << 21
_COMPRESSED = 0x8000
_LENGTH = 0x01FF


def encode(
    data: Buffer,
    tile_bytes: int,
    mode: Mode = "low",
    dictionary: Dictionary = "call",
    *,
    workers: int | None = None,
) -> tuple[bytes, bytes]:
    """Compress ``data``, a whole number of 512 bytes, in tiles of ``tile_bytes``.

    Returns the stream and its index, 8 bytes a tile. ``mode``: "low" codes runs of two zero
    bytes (for W8A8S), "high" of up to nine (for f16 seen as bytes, W16A16S). ``dictionary``:
    "call" counts the bytes of all whole tiles together, and those of a short last tile by
    themselves, as CANN does, and gives its bytes; "tile" counts by tile, which decodes
    everywhere too and is smaller. ``workers``: threads, as many as CPUs where None.
    Raises PlanError for a tile size or a length that the index cannot hold.
    """
    flat = _flat(data)
    return encode_tiles_of(flat, _sizes(len(flat), tile_bytes), mode, dictionary, workers=workers)


def decode(stream: Buffer, index: Buffer, tile_bytes: int, *, workers: int | None = None) -> bytes:
    """The data of ``encode``, whatever its mode and its dictionary were.

    Raises CheckpointError, which names the tile, where stream or index are damaged as far as
    the format lets one see it: compressed tiles carry an XOR of their bytes, others nothing.
    """
    flat, entries = _flat(stream), _entries(index)
    if tile_bytes % TILE_STEP or not 0 < tile_bytes <= MAX_TILE:
        raise CheckpointError(_bad_tile(tile_bytes))
    sizes = [tile_bytes] * len(entries)
    if sizes:
        offset, length, compressed = entries[-1].tolist()
        sizes[-1] = length
        if compressed:  # the header of a stream counts 128 bytes of a fourth of the tile
            sizes[-1] = TILE_STEP * int(flat[offset + 1]) if offset + 1 < len(flat) else 0
        if not 0 < sizes[-1] <= tile_bytes:
            raise CheckpointError(f"tile {len(entries) - 1} {REASONS[2]}")
    return _decode(flat, entries, sizes, workers)


def encode_tiles_of(
    data: Buffer,
    sizes: Sequence[int],
    mode: Mode = "low",
    dictionary: Dictionary = "call",
    *,
    workers: int | None = None,
) -> tuple[bytes, bytes]:
    """``encode`` for tiles of the given sizes; with "call" tiles of one size share a dictionary."""
    if mode not in PLANS or dictionary not in ("call", "tile"):
        raise PlanError(f"no codec {mode!r} with a dictionary per {dictionary!r}")
    flat, plan = _flat(data), PLANS[mode]
    for size in {*sizes}:
        if size % TILE_STEP or not 0 < size <= MAX_TILE:
            raise PlanError(_bad_tile(size))
    if len(flat) != sum(sizes):
        raise PlanError(f"tiles of {sum(sizes)} bytes do not cut {len(flat)} bytes")
    starts = np.cumsum([0, *sizes], dtype=np.int64)
    names, kinds = np.unique(np.diff(starts), return_inverse=True)
    shared = None
    if dictionary == "call":

        def count(first: int, stop: int) -> Array:
            return count_tiles(flat, starts[first : stop + 1], kinds[first:stop], len(names))

        shared = _ranked(sum(_over(count, starts, workers), np.zeros((len(names), 256), np.int64)))

    def portion(first: int, stop: int) -> tuple[memoryview, Array]:
        here, which = starts[first : stop + 1], kinds[first:stop]
        if shared is None:
            which = np.arange(stop - first)
        ranked = _ranked(count_tiles(flat, here, which, len(which))) if shared is None else shared
        out = np.empty(here[-1] - here[0], np.uint8)
        units = np.empty((stop - first, 2), np.int64)
        used = encode_tiles(
            flat, here, ranked, which, plan.mark, plan.codes, plan.run, plan.flush, plan.tails,
            out, units,
        )  # fmt: skip
        return out[:used].data, units

    parts = _over(portion, starts, workers)
    units = np.concatenate([np.empty((0, 2), np.int64), *(u for _, u in parts)])
    index = np.zeros((len(units), 2), "<u4")
    index[:, 0] = units[:, 0] | units[:, 1] * _COMPRESSED
    offsets = np.cumsum(units[:, 0]) - units[:, 0]
    if len(offsets) and offsets[-1] >= 1 << 32:
        raise PlanError("the index of the sparse codec cannot count beyond 512 GiB")
    index[:, 1] = offsets
    return b"".join(out for out, _ in parts), index.tobytes()


def decode_tiles_of(
    stream: Buffer, index: Buffer, sizes: Sequence[int], *, workers: int | None = None
) -> bytes:
    """``decode`` for tiles of the given sizes, multiples of 512."""
    flat, entries = _flat(stream), _entries(index)
    if len(entries) != len(sizes):
        raise CheckpointError(f"the index has {len(entries)} tiles, expected {len(sizes)}")
    return _decode(flat, entries, sizes, workers)


def _decode(flat: Array, entries: Array, sizes: Sequence[int], workers: int | None) -> bytes:
    starts = np.cumsum([0, *sizes], dtype=np.int64)
    tiles = np.array(sizes, np.int64)
    offsets, lengths, compressed = entries.T
    bad = (offsets + lengths > len(flat)) | (lengths > tiles) | (tiles % TILE_STEP != 0)
    bad |= (lengths != tiles) & (compressed == 0)
    bad[1:] |= offsets[1:] < (offsets + lengths)[:-1]
    if bad.any():
        raise CheckpointError(f"the index of tile {int(bad.argmax())} does not fit the stream")
    out = np.empty(starts[-1], np.uint8)

    def portion(first: int, stop: int) -> None:
        here = out[starts[first] : starts[stop]]
        tile, reason = decode_tiles(flat, entries[first:stop], starts[first : stop + 1], here)
        if reason:
            raise CheckpointError(f"tile {first + tile} {REASONS[reason]}")

    _over(portion, starts, workers)
    return out.tobytes()


def _ranked(counts: Array) -> Array:
    """The bytes by rank, u8 ``[kinds, 256]``."""
    ranked = np.empty(counts.shape, np.uint8)
    for kind in range(len(counts)):
        rank(counts[kind], ranked[kind])
    return ranked


def _over(task: Callable[[int, int], T], starts: Array, workers: int | None) -> list[T]:
    """``task(first, stop)`` over portions of the tiles, in order; threads where it pays."""
    steps = np.searchsorted(starts, np.arange(0, starts[-1], _PORTION))
    cuts = np.unique(np.append(steps, len(starts) - 1)).tolist()
    spans = list(pairwise(cuts))
    workers = min(len(spans), workers or os.cpu_count() or 1)
    if workers <= 1:
        return [task(*span) for span in spans]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(task, *zip(*spans, strict=True)))


def _flat(data: Buffer) -> Array:
    """As u8 ``[n]``, copied only where it was not contiguous.

    Read-only as bytes are, so that the kernels are compiled for one kind of array.
    """
    if isinstance(data, np.ndarray):
        data = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
    flat = np.frombuffer(data, np.uint8)
    flat.flags.writeable = False
    return flat


def _entries(index: Buffer) -> Array:
    """i64 ``[tiles, 3]``: offset, length, compressed."""
    raw = _flat(index)
    if len(raw) % 8:
        raise CheckpointError(f"an index has 8 bytes a tile, this one {len(raw)} bytes")
    words = raw.view("<u4").reshape(-1, 2).astype(np.int64)
    bad = words[:, 0] & ~(_COMPRESSED | _LENGTH) != 0
    bad |= words[:, 0] & _LENGTH == 0
    if bad.any():
        raise CheckpointError(f"the index of tile {int(bad.argmax())} is not of this codec")
    lengths, compressed = (words[:, 0] & _LENGTH) * UNIT, words[:, 0] >> 15
    return np.stack([words[:, 1] * UNIT, lengths, compressed], 1)


def _sizes(length: int, tile_bytes: int) -> list[int]:
    if tile_bytes % TILE_STEP or not 0 < tile_bytes <= MAX_TILE:
        raise PlanError(_bad_tile(tile_bytes))
    if length % TILE_STEP:
        raise PlanError(
            f"the sparse codec takes whole fractals of 512 bytes, not {length} bytes; pad them"
        )
    whole, rest = divmod(length, tile_bytes)
    return [tile_bytes] * whole + [rest] * (rest > 0)


def _bad_tile(tile_bytes: int) -> str:
    return f"a tile has a multiple of 512 bytes up to {MAX_TILE}, not {tile_bytes}"
