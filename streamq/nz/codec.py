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
    flat, entries = _flat(stream), entries_of(index)
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
    return decode_part(flat, entries, sizes, workers).tobytes()


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
    flat = _flat(data)
    for size in {*sizes}:
        if size % TILE_STEP or not 0 < size <= MAX_TILE:
            raise PlanError(_bad_tile(size))
    if len(flat) != sum(sizes):
        raise PlanError(f"tiles of {sum(sizes)} bytes do not cut {len(flat)} bytes")
    starts = np.cumsum([0, *sizes], dtype=np.int64)
    names, kinds = np.unique(np.diff(starts), return_inverse=True)
    shared = None
    if dictionary == "call":

        def counted(first: int, stop: int) -> Array:
            return count_tiles(flat, starts[first : stop + 1], kinds[first:stop], len(names))

        counts = sum(_over(counted, starts, workers), np.zeros((len(names), 256), np.int64))
        shared = dictionaries(counts)

    def portion(first: int, stop: int) -> tuple[memoryview, Array]:
        return encode_part(flat, starts[first : stop + 1], mode, shared, kinds[first:stop])

    parts = _over(portion, starts, workers)
    units = np.concatenate([np.empty((0, 2), np.int64), *(u for _, u in parts)])
    return b"".join(out for out, _ in parts), index_of(units)


def encode_part(
    flat: Array, starts: Array, mode: Mode, shared: Array | None, kinds: Array
) -> tuple[memoryview, Array]:
    """Code the tiles ``flat[starts[t]:starts[t + 1]]`` of a longer call.

    ``flat``: u8, read-only. ``starts``: i64 ``[tiles + 1]``. ``shared``: the ``dictionaries`` of
    the call, of which a tile has that of its ``kinds``, i64 ``[tiles]``; a dictionary by tile
    where None. Returns the stream and i64 ``[tiles, 2]``, see ``index_of``.
    """
    plan = PLANS[mode]
    if shared is None:
        kinds = np.arange(len(starts) - 1)
        shared = dictionaries(count_tiles(flat, starts, kinds, len(kinds)))
    out = np.empty(starts[-1] - starts[0], np.uint8)
    units = np.empty((len(starts) - 1, 2), np.int64)
    used = encode_tiles(
        flat, starts, shared, kinds, plan.mark, plan.codes, plan.run, plan.flush, plan.tails,
        out, units,
    )  # fmt: skip
    return out[:used].data, units


def index_of(units: Array) -> bytes:
    """The index of a stream. ``units``: i64 ``[tiles, 2]``, length / 128 and whether compressed."""
    index = np.zeros((len(units), 2), "<u4")
    index[:, 0] = units[:, 0] | units[:, 1] * _COMPRESSED
    offsets = np.cumsum(units[:, 0]) - units[:, 0]
    if len(offsets) and offsets[-1] >= 1 << 32:
        raise PlanError("the index of the sparse codec cannot count beyond 512 GiB")
    index[:, 1] = offsets
    return index.tobytes()


def decode_tiles_of(
    stream: Buffer, index: Buffer, sizes: Sequence[int], *, workers: int | None = None
) -> bytes:
    """``decode`` for tiles of the given sizes, multiples of 512."""
    flat, entries = _flat(stream), entries_of(index)
    if len(entries) != len(sizes):
        raise CheckpointError(f"the index has {len(entries)} tiles, expected {len(sizes)}")
    return decode_part(flat, entries, sizes, workers).tobytes()


def decode_part(
    flat: Array, entries: Array, sizes: Sequence[int], workers: int | None = None
) -> Array:
    """The tiles of the given sizes, u8, from ``flat``, u8 and read-only.

    ``entries``: as of ``entries_of``, with offsets in ``flat``. Raises CheckpointError on damage.
    """
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
    return out


def dictionaries(counts: Array) -> Array:
    """The bytes by rank, u8 ``[kinds, 256]``, from how often each is there, i64 alike."""
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


def entries_of(index: Buffer) -> Array:
    """What an index says, i64 ``[tiles, 3]``: offset and length in bytes, compressed or not."""
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
