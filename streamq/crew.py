"""The threads of one run: some that work, one that closes what they have finished."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from types import TracebackType


class Stopped(Exception):
    """Another thread failed, or the user interrupted."""


class Crew:
    """Threads that stop together; leaving the context waits until all have come home.

    Raises the first error of any then. ``halt`` wakes up those that wait for work, once
    ``stop`` is set, which all others have to heed.
    """

    def __init__(self, workers: int, halt: Callable[[], None] = lambda: None) -> None:
        self.stop = threading.Event()
        self._workers = workers
        self._halt = halt
        self._pool = ThreadPoolExecutor(workers, "work")
        # Closing a file waits for the disk, so it has a thread of its own.
        self._closer = ThreadPoolExecutor(1, "close")
        self._working: list[Future[None]] = []
        self._closing: list[Future[None]] = []

    def start(self, work: Callable[[int], None]) -> None:
        """Give each thread its number and ``work``, after what it was given before."""
        self._working += [self._pool.submit(work, i) for i in range(self._workers)]

    def close(self, work: Callable[[], None]) -> None:
        """Have something closed, in the order of these calls; from any thread."""
        self._closing.append(self._closer.submit(work))

    def heed(self) -> None:
        """Raise Stopped once another thread has failed."""
        if self.stop.is_set():
            raise Stopped

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        try:
            if error is None:
                wait(self._working, return_when=FIRST_EXCEPTION)
        finally:
            if error is not None or not all(
                f.done() and f.exception() is None for f in self._working
            ):
                self.stop.set()
                self._halt()
            self._pool.shutdown()
            self._closer.shutdown()
        if error is None:
            self._raise_first()

    def _raise_first(self) -> None:
        """Raise what went wrong first; that others were stopped because of it says nothing."""
        for futures in (self._working, self._closing):
            errors = [e for f in futures if (e := f.exception()) is not None]
            for found in sorted(errors, key=lambda e: isinstance(e, Stopped)):
                raise found
