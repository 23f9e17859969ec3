"""What both a file and a directory need of the disk: flushes, and errors with a name."""

from __future__ import annotations

import errno
import os
from concurrent.futures import Future, ThreadPoolExecutor

from streamq.errors import WriteError


class SyncPool:
    """Flushes files to disk beside the work; does nothing when ``enabled`` is False."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._pool = ThreadPoolExecutor(2, "sync") if enabled else None

    def now(self, fd: int) -> None:
        """Flush and wait."""
        if self._enabled:
            os.fsync(fd)

    def later(self, fd: int) -> Future[None] | None:
        """Start a flush of what is dirty now; the result tells of an I/O error."""
        return self._pool.submit(os.fdatasync, fd) if self._pool else None

    def close(self) -> None:
        """Wait for all flushes."""
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)


class naming:
    """Turns an OSError into a WriteError that names the file."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError):
            return
        if error.errno == errno.ENOSPC:
            raise WriteError(
                f"{self._name}: no space left on the device; free some or choose another place."
            ) from error
        raise WriteError(f"{self._name}: cannot be written: {error.strerror}.") from error
