"""Parts of tensors, coded and decoded: rows of tiles, or bytes as they are.

The bytes do not depend on how a tensor is cut into parts: tiles are coded one by one, and
what they share, the dictionary of a call, is counted before.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from streamq.errors import CheckpointError
from streamq.nz.codec import decode_part, encode_part, entries_of, index_of
from streamq.nz.tables import count_tiles
from streamq.nz.tiles import HEIGHT, Tiling
from streamq.nz.zstd import bound_of, frames_of, unframe

from .crc import of_array
from .rows import Reader
from .types import FLAT_TILE, Array, Item, mode_of

#: The largest part in bytes: more is not faster, and small parts end together.
PART = 8 << 20


class Part(NamedTuple):
    """Some of a tensor: rows of its tiles, or bytes where it has none, from ``first`` on."""

    item: Item
    first: int
    stop: int


class Coded(NamedTuple):
    """A part, coded: its bytes, what the index is made of, and the sum of what was coded."""

    data: bytes | memoryview
    units: Array
    crc: int
    nbytes: int


def parts_of(item: Item, budget: int) -> Iterator[Part]:
    """Parts that have at most ``budget`` bytes and, unless columns are taken, ``PART``.

    One row of tiles is the least.
    """
    tiling = item.tiling
    # Of columns the more the better: 32,768 rows of 256 bytes each are written at 17 MB/s.
    budget = budget if item.transpose else min(PART, budget)
    if tiling is None:
        total, step = item.nbytes, max(1, budget // FLAT_TILE) * FLAT_TILE
    else:
        total, step = tiling.count, max(1, budget // row_of_tiles(tiling))
    return (Part(item, i, min(i + step, total)) for i in range(0, total, step))


def row_of_tiles(tiling: Tiling) -> int:
    """Bytes of the matrix in a row of tiles."""
    return HEIGHT * tiling.row_bytes


def units_of(item: Item) -> int:
    """Entries of the index: tiles of the sparse codec, frames of the zstd codec."""
    tiling = item.tiling
    tiles = -(-item.nbytes // FLAT_TILE) if tiling is None else tiling.count * tiling.across
    return tiles * (item.itemsize if item.coding == "zstd" else 1)


def units_within(part: Part) -> slice:
    """The entries of the index that a part has."""
    item, tiling = part.item, part.item.tiling
    planes = item.itemsize if item.coding == "zstd" else 1
    if tiling is None:
        return slice(part.first // FLAT_TILE * planes, -(-part.stop // FLAT_TILE) * planes)
    return slice(part.first * tiling.across * planes, part.stop * tiling.across * planes)


def most_bytes(item: Item) -> int:
    """The most bytes that the stream of a tensor can have, its index included for zstd."""
    tiling = item.tiling
    if tiling is None:
        whole, rest = divmod(item.nbytes, FLAT_TILE)
        sizes = {FLAT_TILE: whole, rest: 1}
    else:
        sizes = {}
        for t, count in ((0, tiling.count - 1), (tiling.count - 1, 1)):
            for size in tiling.sizes(t):
                sizes[size] = sizes.get(size, 0) + count
    if item.coding != "zstd":
        return sum(size * count for size, count in sizes.items())
    w = item.itemsize
    return sum(w * (bound_of(size // w) + 8) * count for size, count in sizes.items() if size)


def count(part: Part, reader: Reader) -> Array:
    """How often each byte is in the tiles of a part, i64 ``[2, 256]``: in whole, in short ones."""
    counts = np.zeros((2, 256), np.int64)
    for _, nz, sizes in _tiles(part, reader):
        counts += count_tiles(_fixed(nz), _starts(sizes), _kinds(part.item, sizes), 2)
    return counts


def encode(part: Part, reader: Reader, shared: Array | None) -> Coded:
    """Read a part and code it; ``shared``: the dictionaries of whole and of short tiles."""
    item, tiling = part.item, part.item.tiling
    if tiling is None:
        flat = reader.flat(item, part.first, part.stop)
        crc = of_array(flat)
        if item.coding == "raw":
            return Coded(flat.data, np.empty(0, np.int64), crc, flat.nbytes)
        frames = frames_of(_planes(flat, _flat_sizes(flat.nbytes), item.itemsize))
        return Coded(b"".join(frames), np.array([*map(len, frames)]), crc, flat.nbytes)
    data: list[bytes | memoryview] = []
    units, crc, nbytes = [], 0, 0
    for fresh, nz, sizes in _tiles(part, reader):
        crc, nbytes = of_array(fresh, crc), nbytes + fresh.nbytes
        mode = mode_of(item.coding)
        if mode is None:
            frames = frames_of(_planes(nz, sizes, item.itemsize))
            data += frames
            units.append(np.array([*map(len, frames)]))
        else:
            stream, found = encode_part(
                _fixed(nz), _starts(sizes), mode, shared, _kinds(item, sizes)
            )
            data.append(stream)
            units.append(found)
    return Coded(b"".join(data), np.concatenate(units), crc, nbytes)


def index_bytes(item: Item, units: Array) -> bytes:
    """The index of a tensor from the units of all its parts."""
    if mode_of(item.coding):
        return index_of(units)
    return np.cumsum(units).astype("<u8").tobytes()


def spans_of(item: Item, index: bytes, nbytes: int) -> Array:
    """Where each tile or frame is in a stream of ``nbytes``: i64 ``[units, 3]``, as ``entries_of``.

    Raises CheckpointError for an index that does not cut the whole stream in order.
    """
    if mode_of(item.coding):
        entries = entries_of(index)
    else:
        ends = np.frombuffer(index, "<u8").astype(np.int64)
        starts = np.append(np.int64(0), ends)[:-1]
        entries = np.stack([starts, ends - starts, np.ones_like(ends)], 1)
    ends = entries[:, 0] + entries[:, 1]
    whole = len(entries) == units_of(item) > 0 and (entries[:, 1] > 0).all()
    whole = whole and entries[0, 0] == 0 and ends[-1] == nbytes
    if not whole or (entries[1:, 0] != ends[:-1]).any():
        raise CheckpointError(f"the index of {item.name!r} does not fit its stream")
    return entries


def decode(part: Part, stream: Array, entries: Array) -> tuple[Array, int, int]:
    """The bytes of a part, their sum, and how many they are.

    ``stream``: u8 of this part, read-only; ``entries``: its ``spans_of``, with offsets in it. The
    bytes are u8 ``[n]``, or ``[rows, bytes]`` of the columns of a transposed matrix. Raises
    CheckpointError on damage.
    """
    item, tiling = part.item, part.item.tiling
    if item.coding == "raw":
        return stream, of_array(stream), stream.nbytes
    w = item.itemsize
    if tiling is None:
        sizes = _flat_sizes(part.stop - part.first)
        flat = _unplaned(stream, entries, sizes, w, units_within(part).start)
        return flat, of_array(flat), flat.nbytes
    blocks, crc, nbytes, at = [], 0, 0, 0
    per = tiling.across * (w if item.coding == "zstd" else 1)
    for t in range(part.first, part.stop):
        here, at = entries[at : at + per], at + per
        if item.coding == "zstd":
            nz = _unplaned(stream, here, tiling.sizes(t), w, t * per)
        else:
            nz = decode_part(stream, here, tiling.sizes(t), 1)
        fresh = _fresh(tiling, t, tiling.take(t, nz))
        crc, nbytes = of_array(fresh, crc), nbytes + fresh.nbytes
        blocks.append(fresh)
    if tiling.transpose:
        return np.concatenate(blocks, axis=1), crc, nbytes
    return np.concatenate(blocks).reshape(-1), crc, nbytes


def _tiles(part: Part, reader: Reader) -> Iterator[tuple[Array, Array, list[int]]]:
    """For each row of tiles the lines that no row before has, the tiles, and their sizes."""
    item, tiling = part.item, part.item.tiling
    assert tiling is not None
    begin, end = tiling.span(part.first)[0], tiling.span(part.stop - 1)[1]
    read = (reader.columns if tiling.transpose else reader.rows)(item, begin, end)
    for t in range(part.first, part.stop):
        first, stop = (line - begin for line in tiling.span(t))
        if tiling.transpose:
            w = tiling.itemsize
            block = np.ascontiguousarray(read[:, first * w : stop * w])
        else:
            block = read[first:stop]
        yield _fresh(tiling, t, block), tiling.fill(t, block), tiling.sizes(t)


def _fresh(tiling: Tiling, t: int, block: Array) -> Array:
    """The part of a block that no row of tiles before ``t`` has, contiguous."""
    known = t * HEIGHT - tiling.span(t)[0]
    if tiling.transpose:
        return np.ascontiguousarray(block[:, known * tiling.itemsize :])
    return block[known:]


def _kinds(item: Item, sizes: list[int]) -> Array:
    """Which tiles are whole, 0, and which are short, 1: each kind is a call of its own."""
    tiling = item.tiling
    assert tiling is not None
    short: Array = np.array(sizes) != tiling.sizes(0)[0]
    return short.astype(np.int64)


def _starts(sizes: list[int]) -> Array:
    return np.cumsum([0, *sizes], dtype=np.int64)


def _fixed(array: Array) -> Array:
    """Read-only, as the kernels are compiled for."""
    array.flags.writeable = False
    return array


def _flat_sizes(nbytes: int) -> list[int]:
    return [min(FLAT_TILE, nbytes - at) for at in range(0, nbytes, FLAT_TILE)]


def _planes(data: Array, sizes: list[int], itemsize: int) -> Iterator[Array]:
    """Of each tile first all first bytes of its elements, then all second ones and so on."""
    for first, stop in pairwise(_starts(sizes).tolist()):
        elements = data[first:stop].reshape(-1, itemsize)
        for plane in range(itemsize):
            yield np.ascontiguousarray(elements[:, plane])


def _unplaned(stream: Array, entries: Array, sizes: list[int], itemsize: int, number: int) -> Array:
    """What ``_planes`` was given, u8; ``number``: that of the first frame, for errors."""
    out = np.empty(sum(sizes), np.uint8)
    frames = iter(entries[:, :2].tolist())
    for first, stop in pairwise(_starts(sizes).tolist()):
        elements = out[first:stop].reshape(-1, itemsize)
        for plane in range(itemsize):
            start, length = next(frames)
            frame = stream[start : start + length].data
            raw = unframe(frame, number, (stop - first) // itemsize)
            elements[:, plane] = np.frombuffer(raw, np.uint8)
            number += 1
    return out
