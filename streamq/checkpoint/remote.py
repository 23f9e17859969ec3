"""Shards on the Hub: fetched by ranges, for jobs that are known before they are read."""

from __future__ import annotations

import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from streamq.errors import CheckpointError, Stopped
from streamq.hub import Repository, Stop
from streamq.pace import Pace
from streamq.trust import fingerprint, without_times

from .blocks import Book, Kept, Part, joined
from .header import Header
from .held import NOTHING, Held, Request, pieces, requests
from .spool import Spool
from .store import Array, LocalFiles, Reader, Remote, Span

#: Connections at once: more than threads, as one alone is bound by the way to it and back.
CONNECTIONS = 16
#: Reads that nobody told of: bytes that are fetched together, how many of these are kept, and how
#: many are fetched ahead where a thread reads on where it was. LARGE ones get what they ask for.
AROUND, AROUNDS, AHEAD, LARGE = 2 << 20, 48, 4, 8 << 20
#: Lines are fetched with what is between them, about so many bytes at a time.
LINES = 8 << 20


class HubFiles:
    """A ``Store`` of some shards of a repository, by their headers. ``cached``: the paths of those
    that are in the cache of the Hub. ``folder``: the place of all other files, removed at the end.
    """

    def __init__(
        self, repository: Repository, headers: Mapping[str, Header], cached: Mapping[str, Path],
        spool: Spool, folder: tempfile.TemporaryDirectory[str],
    ) -> None:  # fmt: skip
        self.repository = repository
        self._headers = headers
        self._here = {*cached}
        self._local = LocalFiles(cached, {name: headers[name].stamp for name in cached})
        self._spool, self._folder = spool, folder
        extents = {
            name: (self.size(name) - header.nbytes, self.size(name))
            for name, header in headers.items() if name not in cached
        }  # fmt: skip
        self.remote = Remote(extents, spool.slots, spool.folder)
        self._book = Book(extents, spool.slots)
        self._pool = ThreadPoolExecutor(CONNECTIONS, "hub")
        self._lock = threading.Lock()
        self._closing = threading.Event()  # for requests that nothing else stops
        self._mine = threading.local()  # ``held`` of the job of each thread
        self._around: OrderedDict[Span, Future[Array]] = OrderedDict()

    @property
    def pace(self) -> Pace:
        """See ``Store``: of what comes over the network, and of shards in the cache."""
        return self._local.pace

    @pace.setter
    def pace(self, pace: Pace) -> None:
        self._local.pace = pace

    @property
    def received(self) -> int:
        """See ``Store``."""
        return self.repository.received

    def size(self, file: str) -> int:
        """See ``Store``."""
        return self.repository.files[file].size

    def pread(self, file: str, start: int, into: memoryview) -> None:
        """See ``Store``. What no job told of is fetched now."""
        if file in self._here:
            self._local.pread(file, start, into)
            return
        end = start + len(into)
        if (found := self._held.find(file, start, end)) is not None:
            into[:] = found.data
            return
        if len(into) >= LARGE:
            held = Held()
            held.add(file, start, np.frombuffer(into, np.uint8))
            self._run([Request(*span, []) for span in pieces(file, start, end)], held, None)
            return
        self._read_near(file, start, end, into)

    def _read_near(self, file: str, start: int, end: int, into: memoryview) -> None:
        """A read of some bytes from pieces that are kept; the next ones are on their way already
        where this thread reads on.
        """
        goes_on = getattr(self._mine, "end", None) == (file, start)
        self._mine.end = file, end
        size, first = self.size(file), start // AROUND * AROUND
        last = min(size, end + AHEAD * AROUND) if goes_on else end
        spans = [(file, at, min(size, at + AROUND)) for at in range(first, last, AROUND)]
        coming = [(span, self._near(span)) for span in spans]
        for span, piece in coming:
            a, b = max(start, span[1]), min(end, span[2])
            if a < b:
                data = self._whole(span, piece)
                into[a - start : b - start] = data[a - span[1] : b - span[1]].data

    @property
    def _held(self) -> Held:
        """What the job of this thread reads."""
        held: Held = getattr(self._mine, "held", NOTHING)
        return held

    def pread_lines(self, file: str, start: int, step: int, into: Array) -> None:
        """See ``Store``. Lines that no job told of come with what is between them."""
        if file in self._here:
            self._local.pread_lines(file, start, step, into)
            return
        lines, width = into.shape
        end = start + (lines - 1) * step + width
        if (found := self._held.find(file, start, end)) is not None:
            into[:] = np.lib.stride_tricks.as_strided(found, into.shape, (step, 1))
            return
        many = max(1, LINES // step)
        for first in range(0, lines, many):
            part = into[first : first + many]
            raw = np.empty((len(part) - 1) * step + width, np.uint8)
            self.pread(file, start + first * step, raw.data)
            part[:] = np.lib.stride_tricks.as_strided(raw, part.shape, (step, 1))

    def reader(self, file: str) -> Reader:
        """See ``Store``."""
        if file in self._here:
            return self._local.reader(file)
        size = self.size(file)

        def read(into: memoryview, start: int) -> int:
            n = max(0, min(len(into), size - start))
            self.pread(file, start, into[:n])
            return n

        return read

    def expect(self, work: Iterable[Iterable[Span]]) -> None:
        """See ``Store``."""
        with self._lock:
            for spans in work:
                self._book.expect(self._elsewhere(spans))

    def limit(self, slots: int) -> None:
        """See ``Store``."""
        with self._lock:
            self._book.limit(slots)

    def _elsewhere(self, spans: Iterable[Span]) -> list[Span]:
        return [span for span in spans if span[0] not in self._here]

    def reading(
        self, spans: Callable[[], Iterable[Span]], stop: Stop | None
    ) -> AbstractContextManager[None]:
        """See ``Store``. Raises HubError, and Stopped when ``stop`` says so."""
        return self._reading(list(joined(self._elsewhere(spans()))), stop)

    @contextmanager
    def _reading(self, spans: list[Span], stop: Stop | None) -> Iterator[None]:
        held = Held(spans)
        self._fetch(spans, held, stop)
        self._mine.held = held
        try:
            yield
        finally:
            self._mine.held = NOTHING

    def _fetch(self, spans: list[Span], held: Held, stop: Stop | None) -> None:
        """Bring the bytes of a job into memory."""
        with self._lock:
            parts = self._book.take(spans)
        try:
            self._run(list(requests([part for part in parts if part.new])), held, stop)
            for part in parts:
                if part.kept is not None and not part.new:
                    self._from_spool(part, part.kept, held, stop)
        except BaseException:
            for part in parts:
                if part.new and part.kept is not None and not part.kept.ready.is_set():
                    part.kept.failed = True
                    part.kept.ready.set()
            raise
        finally:
            with self._lock:
                self._book.give_back(parts)

    def _from_spool(self, part: Part, kept: Kept, held: Held, stop: Stop | None) -> None:
        """Take a block that an earlier job has had fetched, or has it fetched now."""
        while not kept.ready.wait(0.1):
            if stop is not None and stop.is_set():
                raise Stopped
        if kept.failed:
            self._run([Request(*span, []) for span in part.spans], held, stop)
            return
        for file, start, end in part.spans:
            into = held.find(file, start, end)
            assert into is not None
            try:
                self._spool.read(kept.slot, start - part.start, into.data)
            except OSError as e:
                raise CheckpointError(
                    f"{self._spool.folder}: the spool cannot be read: {e.strerror}."
                ) from e

    def _run(self, requests: list[Request], held: Held, stop: Stop | None) -> None:
        """Fetch, over several connections; raises the first error when all have ended."""
        futures = [self._pool.submit(self._request, r, held, stop) for r in requests]
        wait(futures)
        errors = [e for f in futures if (e := f.exception()) is not None]
        for error in sorted(errors, key=lambda e: isinstance(e, Stopped)):
            raise error

    def _request(self, request: Request, held: Held, stop: Stop | None) -> None:
        keep = {part.start: part for part in request.parts if part.kept is not None}

        def take(at: int, piece: bytes) -> None:
            view = memoryview(piece)
            self.pace.take(len(view))
            held.put(request.file, at, view)
            for part in keep.values():
                self._to_spool(part, at, view)

        self.repository.read(request.file, request.start, request.end, take, stop or self._closing)
        for part in keep.values():
            assert part.kept is not None
            part.kept.ready.set()

    def _to_spool(self, part: Part, at: int, piece: memoryview) -> None:
        """Keep what belongs to a block; a disk that is full holds no more of them."""
        a, b = max(at, part.start), min(at + len(piece), part.end)
        kept = part.kept
        assert kept is not None
        if a < b and not kept.failed:
            try:
                self._spool.write(kept.slot, a - part.start, piece[a - at : b - at])
            except OSError:
                kept.failed = True
                with self._lock:
                    self._book.limit(0)

    def _near(self, span: Span) -> Future[Array]:
        """A piece of a shard that small reads are in, fetched once while it is kept."""
        with self._lock:
            found = self._around.get(span)
            if found is None:
                found = self._around[span] = self._pool.submit(self._piece, span)
                if len(self._around) > AROUNDS:
                    self._around.popitem(last=False)
            self._around.move_to_end(span)
        return found

    def _piece(self, span: Span) -> Array:
        held, data = Held(), np.empty(span[2] - span[1], np.uint8)
        held.add(span[0], span[1], data)
        self._request(Request(*span, []), held, None)
        return data

    def _whole(self, span: Span, found: Future[Array]) -> Array:
        try:
            return found.result()
        except BaseException:  # the next one that needs it may have more luck
            with self._lock:
                self._around.pop(span, None)
            raise

    def fingerprint(self, root: Path, files: list[str], others: list[str]) -> dict[str, Any]:
        """See ``Store``. The times are those of a download and say nothing; the commit does."""
        source = self.repository.address._replace(revision=None)
        return {
            str(source): {"commit": self.repository.commit},
            **{
                file: {"size": self.size(file), "header_sha256": self._headers[file].sha256}
                for file in files
            },
            **without_times(fingerprint(root, [], others)),
        }

    def refuse_changed(self) -> None:
        """See ``Store``. A commit does not change."""
        self._local.refuse_changed()

    def close(self) -> None:
        """See ``Store``."""
        self._closing.set()
        self._pool.shutdown(cancel_futures=True)
        self._local.close()
        self._spool.close()
        self._folder.cleanup()
