"""Where bytes of an output wait until a write pays, and what is counted on the way."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np

from streamq.checkpoint import Reader
from streamq.formats import Entry, Role
from streamq.planning import STRIP
from streamq.quality import Quality

from .slabs import Array, Slab

#: Bytes an outbox starts with.
OUTBOX = 1 << 18


class Writer(Protocol):
    """Takes bytes of an output file, at absolute offsets."""

    def put(self, offset: int, data: Any) -> None:
        """Take a buffer."""

    def put_small(self, offset: int, data: bytes) -> None:
        """Take a few bytes."""

    def copy_from(self, read: Reader, start: int, offset: int, nbytes: int) -> None:
        """Take bytes of a source file."""


class Unit(Writer, Protocol):
    """Bytes that count as there together."""

    def done(self, note: dict[str, Any]) -> None:
        """All of them were put."""


class Shard(Protocol):
    """An output file, or what takes its place."""

    def unit(self, key: str) -> Unit:
        """A new unit; the key tells it from others."""

    def abandon(self) -> None:
        """Nothing more will come."""


class Outbox:
    """Neighbouring bytes of one output file."""

    def __init__(self, shard: Writer) -> None:
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

    def put(self, offset: int, data: Array) -> None:
        """Take in bytes, uint8 ``[n]``, that belong at ``offset``; many are written at once."""
        if len(data) < OUTBOX:
            self.reserve(offset, len(data))[:] = data
            return
        self.flush()
        self._shard.put(offset, data)

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

    def __init__(self, shard: Writer) -> None:
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


class Tally:
    """What is counted over an output: what weights lost, if anybody asks, and rounded scales."""

    def __init__(self, quality: Quality | None) -> None:
        self.quality = quality
        self.rounded = 0
        self._lock = threading.Lock()

    def round(self, count: int) -> None:
        """Note scales that were not exact in the dtype of the output."""
        with self._lock:
            self.rounded += count

    def note(self) -> dict[str, Any]:
        """What was counted, for ``take``."""
        found: dict[str, Any] = {"rounded": self.rounded} if self.rounded else {}
        return {**found, "quality": self.quality.note()} if self.quality is not None else found

    def take(self, note: dict[str, Any]) -> None:
        """Count what another has counted; weights that it did not measure are not counted."""
        self.round(note.get("rounded", 0))
        if self.quality is not None and "quality" in note:
            self.quality.take(note["quality"])

    def is_whole(self, note: dict[str, Any]) -> bool:
        """Whether another has counted all that is asked for here."""
        if self.quality is None:
            return True
        return "quality" in note and (not self.quality.detailed or "bins" in note["quality"])


class Sink(NamedTuple):
    """Where some weights of a shard go."""

    writer: Writer
    tally: Tally


class ShardSink(NamedTuple):
    """Where the weights of a shard go."""

    shard: Shard
    tally: Tally

    @contextmanager
    def unit(self, key: str) -> Iterator[Sink]:
        """A sink for what counts as done together, when the context is left without an error."""
        unit = self.shard.unit(key)
        over = self.tally.quality
        tally = Tally(None if over is None else Quality(over.detailed))
        yield Sink(unit, tally)
        note = tally.note()
        self.tally.take(note)
        unit.done(note)


class Out:
    """The boxes of one job, by role."""

    def __init__(self, sink: Sink) -> None:
        self.tally = sink.tally
        self._boxes: defaultdict[Role, Outbox] = defaultdict(lambda: Outbox(sink.writer))
        self._strips: defaultdict[Role, Strip] = defaultdict(lambda: Strip(sink.writer))

    def reserve(self, slab: Slab, e: Entry, start: int, size: int) -> Array:
        """Room for what the rows of a slab become in a row-major tensor."""
        return self._boxes[e.role].reserve(start + slab.first // e.rows * e.nbytes, size)

    def put(self, slab: Slab, e: Entry, start: int, data: Array) -> None:
        """What the rows of a slab became."""
        if e.transposed:
            self._strips[e.role].put(e, start, slab.first // e.rows * e.nbytes, data)
            return
        offset = start + slab.first // e.rows * e.nbytes
        self._boxes[e.role].put(offset, data.view(np.uint8).reshape(-1))

    def flush(self) -> None:
        """Write what is left."""
        for box in self._boxes.values():
            box.flush()
        for strip in self._strips.values():
            strip.flush()
