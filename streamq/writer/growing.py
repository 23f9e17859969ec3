"""An output file whose size is known only at its end."""

from __future__ import annotations

import os
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import Any

from streamq.errors import WriteError

from .disk import SyncPool, naming, write_all
from .shard import SYNC_EVERY, TEMPORARY, allocate


class GrowingShard:
    """A shard that begins with room for its header and ends with what was appended.

    What is ``known``, in bytes, header included, is preallocated and filled with ``put``. Used by
    one thread at a time. ``header``: as it is on the disk, once sealed.
    """

    def __init__(self, folder: Path, name: str, room: int, known: int, sync: SyncPool) -> None:
        self.name, self.size, self.header = name, known, b" " * room
        self._folder = folder
        self._temporary = folder / (name + TEMPORARY)
        self._sync = sync
        self._unsynced = 0
        self._pending: Future[None] | None = None
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_TRUNC
        with naming(name):
            self._fd = os.open(self._temporary, flags, 0o644)
            allocate(self._fd, known)

    def put(self, offset: int, data: Any) -> None:
        """Write a buffer at an absolute offset."""
        view = memoryview(data).cast("B")
        with naming(self.name):
            write_all(self._fd, view, offset)
            self._unsynced += len(view)
            if self._unsynced >= SYNC_EVERY and (self._pending is None or self._pending.done()):
                self._flushed()
                self._unsynced = 0
                self._pending = self._sync.later(partial(self._sync.data, self._fd))

    def append(self, data: Any) -> None:
        """Write a buffer behind everything."""
        self.put(self.size, data)
        self.size += memoryview(data).nbytes

    def seal(self, header: bytes) -> None:
        """Write the header, filled up with spaces to the room for it; sync, compare, rename."""
        room = len(self.header)
        assert len(header) <= room, "a header longer than the plan's"
        self.header = (room - 8).to_bytes(8, "little") + header[8:].ljust(room - 8)
        self.put(0, self.header)
        with naming(self.name):
            self._flushed()
            self._sync.file(self._fd)
            found, size = os.pread(self._fd, room, 0), os.fstat(self._fd).st_size
            os.close(self._fd)
            self._fd = -1
            if found != self.header or size != self.size:
                raise WriteError(
                    f"{self.name}: the file read back is not what was written; "
                    "the disk or its driver is at fault."
                )
            os.rename(self._temporary, self._folder / self.name)
            self._sync.path(self._folder)

    def abandon(self) -> None:
        """Close the descriptor after an error; the temporary file stays."""
        if self._fd >= 0:
            if self._pending is not None:
                wait([self._pending])
            os.close(self._fd)
            self._fd = -1

    def _flushed(self) -> None:
        """Hear of what the last flush met: the kernel tells of it only once."""
        if self._pending is not None:
            self._pending.result()
