"""Bytes of remote shards in memory, and the requests that bring them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from .blocks import Part
from .store import Array, Span

#: Bytes of the largest request, so that a job of 64 MB comes over several connections.
REQUEST = 8 << 20


class Held:
    """Bytes of shards that are in memory: a buffer, uint8, for each of some joined spans."""

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self._begins: dict[str, list[int]] = {}
        self._buffers: dict[str, list[Array]] = {}
        for file, start, end in spans:
            self.add(file, start, np.empty(end - start, np.uint8))

    def add(self, file: str, start: int, buffer: Array) -> None:
        """Take one more, which lies behind all others of its file."""
        self._begins.setdefault(file, []).append(start)
        self._buffers.setdefault(file, []).append(buffer)

    def find(self, file: str, start: int, end: int) -> Array | None:
        """Some bytes; None where they are not all here."""
        for at, buffer in self._from(file, start):
            if at <= start and end <= at + len(buffer):
                return buffer[start - at : end - at]
            break
        return None

    def put(self, file: str, start: int, piece: memoryview) -> None:
        """Take what belongs here of some bytes."""
        end = start + len(piece)
        for at, buffer in self._from(file, start):
            a, b = max(start, at), min(end, at + len(buffer))
            if at >= end:
                break
            if a < b:
                buffer[a - at : b - at] = piece[a - start : b - start]

    def _from(self, file: str, start: int) -> Iterator[tuple[int, Array]]:
        """The buffers of a file from that on which may hold its byte ``start``."""
        begins = self._begins.get(file, [])
        for i in range(max(0, bisect_right(begins, start) - 1), len(begins)):
            yield begins[i], self._buffers[file][i]


NOTHING = Held()


class Request(NamedTuple):
    """Neighbouring bytes to be fetched, and the blocks among them that go to the spool."""

    file: str
    start: int
    end: int
    parts: list[Part]


def requests(parts: list[Part]) -> Iterator[Request]:
    """What has to be fetched for some blocks, neighbours together, none too large."""
    wanted: list[tuple[Span, list[Part]]] = []
    for part in parts:
        if part.kept is not None:
            wanted.append(((part.key[0], part.start, part.end), [part]))
        else:
            wanted += [(span, []) for span in part.spans]
    found: Request | None = None
    for (file, start, end), kept in sorted(wanted, key=lambda w: w[0]):
        if found is not None and _continues(found, file, start, end):
            found = Request(file, found.start, end, found.parts + kept)
            continue
        if found is not None:
            yield found
        found = Request(file, start, end, kept)
    if found is not None:
        yield found


def _continues(request: Request, file: str, start: int, end: int) -> bool:
    """Whether a request takes some more, with a little between: another request costs more."""
    between = (request.end - request.start) >> 7
    return (
        file == request.file and start - request.end <= between and end - request.start <= REQUEST
    )


def pieces(file: str, start: int, end: int) -> Iterator[Span]:
    """A span, cut so that several connections have something to do."""
    for at in range(start, end, REQUEST):
        yield file, at, min(end, at + REQUEST)
