"""Threads that bring complete files away, and off the disk."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from streamq.errors import Stopped

#: Files that go up at the same time: one connection to storage rarely fills a line.
UPLOADS = 2


class Uploader:
    """Threads that bring complete files away, beside the work, and say when one is gone.

    ``room``: bytes of files that may be on the disk. ``send``: brings away the file of a name,
    called on these threads; it may raise Stopped when ``stop`` is set.
    """

    def __init__(self, room: int, send: Callable[[str], None]) -> None:
        self.room = room
        self._send = send
        self._waiting: deque[str] = deque()
        self._sizes: dict[str, int] = {}  # of what is not gone
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._gone: Callable[[str, BaseException | None], None] = lambda name, error: None
        self._started = False

    def watch(self, gone: Callable[[str, BaseException | None], None]) -> None:
        """Have it called with the name of each file that is gone, or the error that ends it all."""
        with self._changed:
            self._gone, error = gone, self._error
        if error is not None:
            gone("", error)

    def put(self, name: str, size: int) -> None:
        """Take over a complete file."""
        with self._changed:
            self._sizes[name] = size
            self._waiting.append(name)
            self._changed.notify_all()
            started, self._started = self._started, True
        for _ in range(0 if started else UPLOADS):
            # Daemons: a connection that hangs must not keep the process.
            threading.Thread(target=self._work, name="upload", daemon=True).start()

    def holds(self, name: str) -> bool:
        """Whether a file is still on the disk."""
        with self._changed:
            return name in self._sizes

    @property
    def left(self) -> int:
        """How many files are still to go."""
        with self._changed:
            return len(self._sizes)

    def make_room(self, size: int) -> None:
        """Wait until there is room for ``size`` bytes more, or nothing left to go."""
        self._wait(lambda: sum(self._sizes.values()) + size <= self.room or not self._sizes)

    def finish(self) -> None:
        """Wait until everything is gone."""
        self._wait(lambda: not self._sizes)

    def _wait(self, until: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or until())
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Begin nothing more; what is under way is left to itself and not noted any more."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()

    @property
    def stop(self) -> threading.Event:
        """Set when nobody wants the files to go any more."""
        return self._stop

    def _work(self) -> None:
        while (name := self._next()) is not None:
            try:
                self._send(name)
            except Stopped:
                return
            except BaseException as e:
                with self._changed:
                    self._error = self._error or e
                    self._changed.notify_all()
                self._stop.set()
                self._gone(name, e)
                return
            with self._changed:
                del self._sizes[name]
                self._changed.notify_all()
            self._gone(name, None)

    def _next(self) -> str | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stop.is_set())
            return None if self._stop.is_set() else self._waiting.popleft()
