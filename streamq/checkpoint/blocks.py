"""Which blocks of a remote source are kept, for whom, and where: bookkeeping without any bytes.

Shards are seen in blocks of 4 MiB. What will be read is known before, job by job, so that of each
block it is known how often it is still needed. One that is needed again goes to the spool when it
is fetched; the last one that needs it frees its place. Where the spool is full, or 0, a job gets
the bytes that it needs itself and no more.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from .store import Span

#: Bytes of a block: a request of some size, and many of them in a spool of a few GB.
BLOCK = 4 << 20

#: A shard, and the number of a block in it.
Key = tuple[str, int]


class Kept:
    """A block in the spool: ``ready`` when it is there, ``failed`` if it will never be."""

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.readers = 0
        self.failed = False
        self.ready = threading.Event()


class Part(NamedTuple):
    """What a job needs of a block: ``spans`` of its bytes, from ``start`` up to ``end``.

    ``kept``: where the block is; None where the job has its bytes fetched for itself. ``new``: the
    job is the one that has it fetched.
    """

    key: Key
    start: int
    end: int
    spans: list[Span]
    kept: Kept | None
    new: bool


class Book:
    """Which blocks are needed how often, and which slots of the spool hold which.

    ``extents``: of each shard the first byte behind its header, and its size. ``peak``: most slots
    that were in use.
    """

    def __init__(self, extents: Mapping[str, tuple[int, int]], slots: int) -> None:
        self._extents = extents
        self._uses: Counter[Key] = Counter()
        self._kept: dict[Key, Kept] = {}
        self._free: list[int] = []
        self._slots = slots
        self.peak = 0

    def expect(self, spans: Iterable[Span]) -> None:
        """A job will need these."""
        self._uses.update({key: 1 for key, _ in _cut(joined(spans))})

    def take(self, spans: Iterable[Span]) -> list[Part]:
        """What becomes of the blocks that a job needs now; ``give_back`` has to follow."""
        found: dict[Key, list[Span]] = {}
        for key, span in _cut(joined(spans)):
            found.setdefault(key, []).append(span)
        parts = []
        for key, needed in found.items():
            self._uses[key] = max(0, self._uses[key] - 1)
            kept = self._kept.get(key)
            new = kept is None
            if kept is None and self._uses[key] > 0 and (slot := self._slot()) is not None:
                kept = self._kept[key] = Kept(slot)
            if kept is not None:
                kept.readers += 1
            first, size = self._extents[key[0]]
            start, end = max(first, key[1] * BLOCK), min(size, (key[1] + 1) * BLOCK)
            parts.append(Part(key, start, end, needed, kept, new))
        return parts

    def give_back(self, parts: Iterable[Part]) -> None:
        """A job has its bytes, or failed."""
        for part in parts:
            kept = part.kept
            if kept is None:
                continue
            kept.readers -= 1
            done = kept.failed or not self._uses[part.key]
            if done and self._kept.get(part.key) is kept and (kept.failed or not kept.readers):
                del self._kept[part.key]  # if it failed, the next that needs it has it fetched
            if done and not kept.readers:
                self._free.append(kept.slot)

    def limit(self, slots: int) -> None:
        """No more slots than so many, or than were in use already."""
        self._slots = max(self.peak, min(self._slots, slots))

    def _slot(self) -> int | None:
        if self._free:
            return self._free.pop()
        if self.peak == self._slots:
            return None
        self.peak += 1
        return self.peak - 1


class Traffic(NamedTuple):
    """What some work will download: ``needed`` bytes of the source, ``fetched`` with what comes
    twice; ``spooled``: bytes on disk at most, ``held``: in memory for the largest job.
    """

    needed: int
    fetched: int
    spooled: int
    held: int

    @property
    def factor(self) -> float:
        """How often a byte comes, on average."""
        return self.fetched / self.needed if self.needed else 1.0


def forecast(
    jobs: Iterable[Iterable[Span]], extents: Mapping[str, tuple[int, int]], slots: int
) -> Traffic:
    """What jobs will download if one comes after the other."""
    work = [[span for span in spans if span[0] in extents] for spans in jobs]
    book = Book(extents, slots)
    for spans in work:
        book.expect(spans)
    needed = sum(end - start for _, start, end in joined(s for spans in work for s in spans))
    fetched = held = 0
    for spans in work:
        parts = book.take(spans)
        fetched += sum(fetched_of(part) for part in parts)
        held = max(held, sum(end - start for part in parts for _, start, end in part.spans))
        book.give_back(parts)
    return Traffic(needed, fetched, book.peak * BLOCK, held)


def fetched_of(part: Part) -> int:
    """Bytes that a job has fetched for a block."""
    if not part.new:
        return 0
    if part.kept is not None:
        return part.end - part.start
    return sum(end - start for _, start, end in part.spans)


def joined(spans: Iterable[Span]) -> Iterator[Span]:
    """Spans without what they have in common: overlapping and neighbouring ones become one."""
    last: Span | None = None
    for file, start, end in sorted(spans):
        if last is not None and file == last[0] and start <= last[2]:
            last = file, last[1], max(end, last[2])
            continue
        if last is not None:
            yield last
        last = file, start, end
    if last is not None:
        yield last


def _cut(spans: Iterable[Span]) -> Iterator[tuple[Key, Span]]:
    """Spans, cut where blocks end."""
    for file, start, end in spans:
        while start < end:
            stop = min(end, (start // BLOCK + 1) * BLOCK)
            yield (file, start // BLOCK), (file, start, stop)
            start = stop
