"""What gathers the bytes of one output tensor, or of neighbouring ones, until a write pays."""

from __future__ import annotations

import numpy as np

from streamq.formats import Entry
from streamq.plan import STRIP
from streamq.writer import ShardWriter

from .slabs import Array

#: Bytes an outbox starts with.
OUTBOX = 1 << 18


class Outbox:
    """Neighbouring bytes of one output file."""

    def __init__(self, shard: ShardWriter) -> None:
        self._shard = shard
        self._buffer = np.empty(0, np.uint8)
        self._start = self._filled = 0

    def reserve(self, offset: int, size: int) -> Array:
        """Room for ``size`` bytes that belong at ``offset``, to be filled before the next call."""
        if offset != self._start + self._filled or self._filled + size > len(self._buffer):
            self.flush()
            self._start = offset
            if size > len(self._buffer):
                self._buffer = np.empty(max(size, OUTBOX), np.uint8)
        view = self._buffer[self._filled : self._filled + size]
        self._filled += size
        return view

    def flush(self) -> None:
        """Write what is there."""
        if self._filled:
            self._shard.put(self._start, self._buffer[: self._filled])
        self._start += self._filled
        self._filled = 0


class Strip:
    """A piece of every line of a transposed tensor, as wide as the memory for it allows.

    A tensor that fits is one write; a larger one is written line by line, some KB at a time.
    """

    def __init__(self, shard: ShardWriter) -> None:
        self._shard = shard
        self._entry: Entry | None = None
        self._start = 0  # of the tensor in the file
        self._begun = self._filled = 0  # bytes of each line, from its beginning
        self._buffer = np.empty((0, 0), np.uint8)

    def put(self, entry: Entry, start: int, at: int, lines: Array) -> None:
        """Take in ``lines``, ``[lines, bytes]``, that belong ``at`` this byte of each line."""
        data = lines.view(np.uint8).reshape(entry.lines, -1)
        if (entry, start, at) != (self._entry, self._start, self._filled):
            self.flush()
            self._entry, self._start, self._begun, self._filled = entry, start, at, at
        done, width = 0, data.shape[1]
        while done < width:
            if self._filled == self._begun:
                room = min(entry.stride - self._begun, max(width, STRIP // entry.lines))
                self._buffer = np.empty((entry.lines, room), np.uint8)
            offset = self._filled - self._begun
            n = min(width - done, self._buffer.shape[1] - offset)
            self._buffer[:, offset : offset + n] = data[:, done : done + n]
            self._filled += n
            done += n
            if offset + n == self._buffer.shape[1]:
                self._write()

    def flush(self) -> None:
        """Write what is there."""
        if self._filled > self._begun:
            self._write()

    def _write(self) -> None:
        entry, width = self._entry, self._filled - self._begun
        assert entry is not None
        if width == entry.stride:
            self._shard.put(self._start, self._buffer)
        else:
            for line in range(entry.lines):
                at = self._start + line * entry.stride + self._begun
                self._shard.put(at, self._buffer[line, :width])
        self._begun = self._filled
