"""One compressed file while it is written, and what is noted of it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from streamq.nz.tiles import info_of
from streamq.writer import Destination

from .blocks import Coded, Part, index_bytes
from .crc import Sum
from .layout import Laid, beside, header_of, stream_entry
from .manifest import File, Sums
from .types import Array, Item, Shard, mode_of


@dataclass(frozen=True, slots=True)
class Layer:
    """A tensor that was compressed: bytes before and after, index and info included.

    ``stream``: without these.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    nbytes: int
    stored: int
    stream: int


class Building:
    """A shard that takes the parts of its tensors in order."""

    def __init__(self, target: Destination, shard: Shard, laid: Laid) -> None:
        self._shard, self._laid = shard, laid
        self._writer = target.growing(shard.name, laid.room, laid.known)
        original = len(shard.header) + sum(item.nbytes for item in shard.items)
        self._file = File(0, original, shard.header[8:].decode())
        self._sizes: dict[str, int] = {}
        self._done = 0
        self._start()

    def _start(self) -> None:
        """Expect the next tensor."""
        self._begin, self._crc, self._stored = self._writer.size, Sum(), Sum()
        self._units: list[Array] = []

    @property
    def complete(self) -> bool:
        """Whether all tensors are there."""
        return self._done == len(self._shard.items)

    def take(self, part: Part, coded: Coded) -> Layer | None:
        """Write a part; with the last of a tensor that is compressed, what became of it."""
        item = part.item
        if item.coding == "raw":
            self._writer.put(self._laid.starts[item.name] + part.first, coded.data)
        else:
            self._writer.append(coded.data)
            self._stored.add(zlib.crc32(coded.data), len(coded.data))
            self._units.append(coded.units)
        self._crc.add(coded.crc, coded.nbytes)
        if part.stop < (item.nbytes if item.tiling is None else item.tiling.count):
            return None
        layer = self._index(item) if item.coding != "raw" else None
        stored = self._stored.crc if layer else self._crc.crc
        self._file.tensors[item.name] = Sums(item.coding, self._crc.crc, stored)
        self._done += 1
        self._start()
        return layer

    def _index(self, item: Item) -> Layer:
        """Write the index, and what else is beside a stream."""
        index = index_bytes(item, np.concatenate(self._units))
        stream, stored = self._stored.nbytes, self._stored.nbytes + len(index)
        self._stored.add(zlib.crc32(index), len(index))
        if mode_of(item.coding):
            assert item.tiling is not None
            names, info = beside(item), info_of(item.tiling).tobytes()
            for name, value in zip(names, (index, info), strict=True):
                self._writer.put(self._laid.starts[name], value)
            self._stored.add(zlib.crc32(info), len(info))
            stored += len(info)
        else:
            self._writer.append(index)
        self._sizes[item.name] = self._writer.size - self._begin
        return Layer(
            item.name, item.dtype, item.shape, self._shard.name, item.nbytes, stored, stream
        )  # fmt: skip

    def names(self) -> list[str]:
        """The tensors of the file, in the order of its data."""
        return [*(e.name for e in self._laid.fixed), *self._sizes]

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return self._writer.size - self._laid.room

    def seal(self) -> File:
        """Write the header, wait for the disk, rename."""
        streams = [stream_entry(item, self._sizes[item.name]) for item in self._laid.streams]
        self._writer.seal(header_of([*self._laid.fixed, *streams], self._shard.metadata))
        self._file.header_crc32 = zlib.crc32(self._writer.header)
        return self._file

    def abandon(self) -> None:
        """Close the descriptor after an error."""
        self._writer.abandon()
