"""What both a file and a directory need of the disk: flushes, a lock, and errors with a name."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from streamq.errors import WriteError


class SyncPool:
    """Flushes files to disk beside the work; nothing is flushed when ``enabled`` is False."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._pool = ThreadPoolExecutor(2, "sync")

    def file(self, fd: int) -> None:
        """Flush a file and wait."""
        if self.enabled:
            os.fsync(fd)

    def data(self, fd: int) -> None:
        """Flush the data of a file and wait."""
        if self.enabled:
            os.fdatasync(fd)

    def path(self, path: Path) -> None:
        """Flush a file, or the names in a directory, and wait."""
        if self.enabled:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def later(self, work: Callable[[], None]) -> Future[None]:
        """Start some work on a thread of the pool; the result tells of an error."""
        return self._pool.submit(work)

    def close(self) -> None:
        """Wait for all work."""
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


def lock(folder: Path) -> int:
    """Make a directory and lock it until the descriptor that is returned is closed.

    The kernel lets go of it when a process ends, however it ends. Raises WriteError where
    another has it. A file system without locks is used without one.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            found = WriteError(
                f"{folder}: another process is at work on it; wait for it, or choose another "
                "destination."
            )
            found.transient = True
            raise found from None
        except OSError as e:
            if e.errno not in (errno.ENOLCK, errno.EBADF, errno.EOPNOTSUPP, errno.ENOSYS):
                os.close(fd)
                raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(folder), os.fstat(fd)):
                return fd
        os.close(fd)  # the one before has finished and removed it meanwhile


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of a buffer at an offset; the kernel may take part of it at a time."""
    while data:
        n = os.pwrite(fd, data, offset)
        data, offset = data[n:], offset + n
