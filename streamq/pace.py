"""A limit for bytes a second that all threads of a run share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

#: Seconds of pause whose bytes may be caught up on.
SLACK = 0.25


class Pace:
    """Lets bytes through at ``rate`` a second, those read and those written together.

    Each call of ``take`` has a place in a row that is as long as all bytes before it take, and
    returns when its bytes are due, so that threads wait for their turn and not for a lock. In any
    time t no more than ``rate * (t + SLACK)`` bytes and one call of each thread are let through.
    ``rate`` None: no limit. ``clock`` and ``wait`` are those of the machine but in tests.
    """

    def __init__(
        self, rate: int | None = None, clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], object] | None = None,
    ) -> None:  # fmt: skip
        self._rate = rate
        self._clock = clock
        self._over = threading.Event()
        self._wait = wait or self._over.wait
        self._lock = threading.Lock()
        self._due = 0.0

    def take(self, nbytes: int) -> None:
        """Wait until so many bytes may be read or written."""
        if self._rate is None:
            return
        with self._lock:
            now = self._clock()
            self._due = max(self._due, now - SLACK) + nbytes / self._rate
            pause = self._due - now
        if pause > 0:
            self._wait(pause)

    def stop(self) -> None:
        """Let everybody through, now and later: the run is over, and threads should hear of it."""
        self._over.set()


#: As fast as it goes.
FREE = Pace()
