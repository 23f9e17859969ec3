"""One output file: a planned header and size, then bytes at planned offsets in any order.

Temporary name, preallocate, pwrite, fsync, re-read the header, rename.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from streamq.errors import WriteError
from streamq.pace import FREE, Pace
from streamq.trust import FileSum, Journal, Sums

from .disk import SyncPool, naming, write_all

#: A flush to disk is started whenever this much new data is in a shard, so that the one
#: at the end has little left to wait for. What it brought there is noted in the journal.
SYNC_EVERY = 128 << 20
#: Bytes of one piece of a copy, which stay in the cache (256 KiB to 1 MiB are within 5%).
COPY = 1 << 19
#: What a shard is called until it is complete, behind its name.
TEMPORARY = ".tmp"


class Unit:
    """Bytes of a shard that count as there together: all of them, or they are written again.

    Used by one thread.
    """

    def __init__(self, shard: ShardWriter, key: str | None) -> None:
        self._shard = shard
        self.key = key
        self.note: dict[str, Any] | None = None
        self.sums = Sums(shard.size)
        self.small: list[tuple[int, bytes]] = []

    def put(self, offset: int, data: Any) -> None:
        """Write a buffer at an absolute offset."""
        view = memoryview(data).cast("B")
        self._shard.pace.take(len(view))
        self.sums.add(offset, view)
        self._shard.write(offset, view)

    def put_small(self, offset: int, data: bytes) -> None:
        """Remember a few bytes; those of many units are written together."""
        self.small.append((offset, data))

    def copy_from(
        self, read: Callable[[memoryview, int], int], start: int, offset: int, nbytes: int
    ) -> None:
        """Copy bytes of a source; ``read`` fills some of a buffer from an absolute offset.

        By hand, as the sums need to see them: 6.2 GB/s with the sums, of pieces that stay in the
        cache; the kernel's copy_file_range does 5.4 on the same machine, without them.
        """
        buffer = memoryview(bytearray(min(nbytes, COPY)))
        while nbytes:
            with naming(self._shard.name):
                n = read(buffer[: min(nbytes, COPY)], start)
            if n == 0:
                raise WriteError(f"{self._shard.name}: a source file ended early; it changed.")
            self.put(offset, buffer[:n])
            start, offset, nbytes = start + n, offset + n, nbytes - n

    def done(self, note: dict[str, Any] | None = None) -> None:
        """Everything of this unit was put; ``note`` is kept with it for a run that goes on."""
        self.note = note
        self._shard.take(self)


class ShardWriter:
    """One output shard: planned size and header, then bytes at planned offsets in any order.

    Used by several threads at once. ``close`` must follow the last write. With a ``journal``,
    units are noted there when their bytes are on disk; ``known``: the sums of those that are
    there from an earlier run, where the file is as that one left it.
    """

    def __init__(
        self, folder: Path, name: str, header: bytes, size: int, sync: SyncPool,
        journal: Journal | None = None, known: Sums | None = None, sha256: bool = False,
        pace: Pace = FREE,
    ) -> None:  # fmt: skip
        self.name = name
        self.pace = pace
        self.size = size
        self.notes: list[dict[str, Any]] = []
        self._folder = folder
        self._temporary = folder / (name + TEMPORARY)
        self._header = header
        self._sync = sync
        self._journal = journal
        self._sha256 = sha256
        self._sums = Sums(size)
        self._finished: list[Unit] = []
        self._named = self._failed = False
        self._unsynced = 0
        self._lock = threading.Lock()
        self._pending: Future[None] | None = None
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if known is None else 0)
        with naming(self.name):
            self._fd = os.open(self._temporary, flags, 0o644)
            allocate(self._fd, size)
        if known is not None:
            self._sums.merge(known)
        self.put(0, header)

    def unit(self, key: str | None = None) -> Unit:
        """A new unit; without a key it is not noted in the journal."""
        return Unit(self, key)

    def put(self, offset: int, data: Any) -> None:
        """Write a buffer at an absolute offset, as a unit of its own."""
        unit = self.unit()
        unit.put(offset, data)
        unit.done()

    def write(self, offset: int, view: memoryview) -> None:
        """What units do with bytes that they have summed."""
        with naming(self.name):
            write_all(self._fd, view, offset)
        with self._lock:
            self._unsynced += len(view)
            if self._unsynced < SYNC_EVERY:
                return
            if self._pending is not None:
                if not self._pending.done():
                    return
                self._pending.result()  # the kernel tells of a failed flush only once
            self._unsynced = 0
            self._pending = self._sync.later(self._flush)

    def take(self, unit: Unit) -> None:
        """A unit that is done."""
        with self._lock:
            self._finished.append(unit)

    def close(self) -> FileSum:
        """Write what is left, sync, compare the header on disk with the plan, rename.

        Raises WriteError where bytes were left out, too.
        """
        if self._pending is not None:
            self._pending.result()
        self._failed = True  # until all is well nothing more is noted
        self._settle()
        if self._sums.nbytes != self.size:
            raise WriteError(
                f"{self.name}: {self._sums.nbytes} of {self.size} bytes were written; this is a "
                "bug in streamq."
            )
        with naming(self.name):
            self._sync.file(self._fd)
            found = os.pread(self._fd, len(self._header), 0)
            size = os.fstat(self._fd).st_size
            sha256 = sha256_of(self._fd) if self._sha256 else None
            os.close(self._fd)
            self._fd = -1
            if found != self._header or size != self.size:
                raise WriteError(
                    f"{self.name}: the file read back is not what was written; "
                    "the disk or its driver is at fault."
                )
            os.rename(self._temporary, self._folder / self.name)
            self._sync.path(self._folder)
        return FileSum(self.size, self._sums.all(), sha256)

    def abandon(self) -> None:
        """Close the descriptor after an error; what is finished is noted for the next run."""
        if self._fd < 0:
            return
        if self._pending is not None:
            wait([self._pending])
        try:
            if not self._failed:
                self._flush()
        except WriteError:
            pass  # the error that led here is the one to tell
        finally:
            os.close(self._fd)
            self._fd = -1

    def _flush(self) -> None:
        """Bring what is finished to the disk, then note it."""
        self._failed = True  # for good, if this fails: the kernel drops what it could not write
        units, sums = self._settle()
        with naming(self.name):
            self._sync.data(self._fd)
            if not self._named:
                self._sync.path(self._folder)
                self._named = True
            if self._journal is not None and units:
                self._journal.append(
                    {"shard": self.name, "units": [unit.key for unit in units],
                     "bytes": sums.nbytes, "crc32": sums.items(),
                     "notes": [unit.note for unit in units if unit.note]}
                )  # fmt: skip
        self._failed = False

    def _settle(self) -> tuple[list[Unit], Sums]:
        """Write the few bytes of what is finished; the units with keys, and the sums of those."""
        with self._lock:
            units, self._finished = self._finished, []
        keyed = [unit for unit in units if unit.key is not None]
        self.notes += [unit.note for unit in keyed if unit.note]
        sums = self._settled(keyed)
        self._sums.merge(sums)
        self._sums.merge(self._settled([unit for unit in units if unit.key is None]))
        return keyed, sums

    def _settled(self, units: list[Unit]) -> Sums:
        sums = Sums(self.size)
        for unit in units:
            sums.merge(unit.sums)
        with naming(self.name):
            for offset, data in joined([piece for unit in units for piece in unit.small]):
                view = memoryview(data)
                sums.add(offset, view)
                write_all(self._fd, view, offset)
        return sums


def sha256_of(fd: int) -> str:
    """The sha256 of a whole file, read back in order."""
    found = hashlib.sha256()
    buffer = memoryview(bytearray(COPY))
    at = 0
    while n := os.preadv(fd, [buffer], at):
        found.update(buffer[:n])
        at += n
    return found.hexdigest()


def allocate(fd: int, size: int) -> None:
    """Reserve the space: a full disk shows before any work, and pwrite runs at 10, not 6 GB/s."""
    if not size:
        return
    try:
        os.posix_fallocate(fd, 0, size)
    except (AttributeError, OSError) as e:
        if isinstance(e, OSError) and e.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        os.ftruncate(fd, size)


def joined(pieces: list[tuple[int, bytes]]) -> Iterable[tuple[int, bytes]]:
    """Neighbouring pieces as one."""
    start, chunk = 0, bytearray()
    for offset, data in sorted(pieces):
        if chunk and offset != start + len(chunk):
            yield start, bytes(chunk)
            chunk = bytearray()
        if not chunk:
            start = offset
        chunk += data
    if chunk:
        yield start, bytes(chunk)
