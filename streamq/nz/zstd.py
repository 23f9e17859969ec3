"""Tiles as zstandard frames: the portable codec, for storage and transport.

One frame a tile, one behind the other, each with its size and its check sum; the index is
where each frame ends, u64, little-endian. Frames have no dictionary: on tiles of 32 KiB one
costs more than it saves (4-bit range .392 without, .400 with; 70% zeros .269, .275), and
larger tiles are as good to read from. Which bytes zstandard makes depends on its version.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np

from streamq.errors import CheckpointError, PlanError

from .tables import Array

Buffer = bytes | bytearray | memoryview | Array

#: The narrow alphabets of weights have no long matches to find: level 1 is the smallest on
#: 4 bits (.392, level 9 .432) and 10 times as fast; on 70% zeros level 9 has .246 of .269.
LEVEL = 1
#: Frames that a thread makes at a time.
_PORTION = 64
#: The largest tile that a stream may claim.
MAX_TILE = 1 << 26


def encode(
    data: Buffer, tile_bytes: int, *, level: int = LEVEL, workers: int | None = None
) -> tuple[bytes, bytes]:
    """Compress ``data`` in tiles of ``tile_bytes``, the last perhaps shorter.

    Returns the stream and its index, 8 bytes a tile. ``workers``: threads, as many as CPUs
    where None. Raises PlanError for a tile size out of 1 to 64 MiB or if zstandard is missing.
    """
    if not 0 < tile_bytes <= MAX_TILE:
        raise PlanError(f"a tile has 1 to {MAX_TILE} bytes, not {tile_bytes}")
    view = _view(data)

    def portion(starts: Iterable[int]) -> list[bytes]:
        return frames_of((view[at : at + tile_bytes] for at in starts), level)

    starts = range(0, len(view), tile_bytes)
    parts = [starts[i : i + _PORTION] for i in range(0, len(starts), _PORTION)]
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        frames = [frame for made in pool.map(portion, parts) for frame in made]
    ends = np.cumsum([len(frame) for frame in frames], dtype="<u8")
    return b"".join(frames), ends.tobytes()


def frames_of(pieces: Iterable[Buffer], level: int = LEVEL) -> list[bytes]:
    """A frame of each piece, with its size and its check sum. Raises PlanError as ``encode``."""
    made = _zstandard().ZstdCompressor(level=level, write_checksum=True)
    return [made.compress(piece) for piece in pieces]


def bound_of(size: int) -> int:
    """The most bytes that a frame of ``size`` bytes can have (``ZSTD_COMPRESSBOUND``)."""
    return size + (size >> 8) + ((1 << 17) - size >> 11 if size < 1 << 17 else 0)


def unframe(frame: Buffer, tile: int, size: int, *, short: bool = False) -> bytes:
    """The ``size`` bytes that ``frames_of`` was given for ``tile``; with ``short`` perhaps fewer.

    Raises CheckpointError, which names the tile, for anything else.
    """
    zstandard = _zstandard()
    try:
        # The size comes first: a frame is believed only what a tile can hold.
        found: int = zstandard.frame_content_size(frame)
        if found != size and not (short and 0 < found < size):
            raise CheckpointError(f"tile {tile} has {found} bytes, expected {size}")
        made: bytes = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CheckpointError(f"tile {tile} is no zstandard frame: {error}") from None
    if len(made) != found:
        raise CheckpointError(f"tile {tile} has {len(made)} bytes, its frame says {found}")
    return made


def decode(stream: Buffer, index: Buffer, tile_bytes: int, *, workers: int | None = None) -> bytes:
    """The data of ``encode``. Raises CheckpointError where stream or index are damaged."""
    view, ends = _view(stream), _ends(stream, index)
    last = len(ends) - 1

    def portion(tiles: Iterable[int]) -> list[bytes]:
        return [_tile(view, ends, t, tile_bytes, short=t == last) for t in tiles]

    parts = [range(i, min(i + _PORTION, len(ends))) for i in range(0, len(ends), _PORTION)]
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return b"".join(tile for made in pool.map(portion, parts) for tile in made)


def decode_tile(stream: Buffer, index: Buffer, tile: int, tile_bytes: int) -> bytes:
    """One tile of the data of ``encode``, without reading the others."""
    ends = _ends(stream, index)
    if not 0 <= tile < len(ends):
        raise CheckpointError(f"there is no tile {tile} among {len(ends)}")
    return _tile(_view(stream), ends, tile, tile_bytes, short=tile == len(ends) - 1)


def _tile(view: memoryview, ends: list[int], tile: int, tile_bytes: int, *, short: bool) -> bytes:
    return unframe(view[ends[tile - 1] if tile else 0 : ends[tile]], tile, tile_bytes, short=short)


def _ends(stream: Buffer, index: Buffer) -> list[int]:
    raw = _view(index)
    if len(raw) % 8:
        raise CheckpointError(f"an index has 8 bytes a tile, this one {len(raw)} bytes")
    ends: list[int] = np.frombuffer(raw, "<u8").tolist()
    if any(b <= a for a, b in zip([0, *ends], ends, strict=False)):
        raise CheckpointError("the index of the zstandard frames does not rise")
    if (ends[-1] if ends else 0) != len(_view(stream)):
        raise CheckpointError("the index of the zstandard frames does not end with the stream")
    return ends


def _view(data: Buffer) -> memoryview:
    if isinstance(data, np.ndarray):
        data = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
    return memoryview(data).cast("B")


def _zstandard() -> ModuleType:
    try:
        import zstandard
    except ImportError:
        raise PlanError("the zstd codec needs the package zstandard: pip install it") from None
    return zstandard
