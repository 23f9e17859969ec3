"""One output file: a planned header and size, then bytes at planned offsets in any order.

Temporary name, preallocate, pwrite, fsync, re-read the header, rename.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from streamq.errors import WriteError

from .disk import SyncPool, naming

#: A flush to disk is started whenever this much new data is in a shard, so that the one
#: at the end has little left to wait for.
SYNC_EVERY = 128 << 20


Column = np.ndarray[Any, Any]
Region = tuple[list[str], str, list[tuple[int, ...]], list[int], Column, Column]


def quoted(names: list[str]) -> list[str]:
    """The insides of JSON strings, by one look at all of them: names hardly ever need escapes."""
    quote: Callable[[str], str] = json.encoder.encode_basestring
    together = "".join(names)
    if len(quote(together)) == len(together) + 2:
        return names
    return [quote(name)[1:-1] for name in names]


def build_header(regions: Iterable[Region], metadata: Mapping[str, str] | None = None) -> bytes:
    """The length and JSON that open a file.

    Takes columns ``(names, dtype, shapes, kinds, starts, sizes)`` in the order of the data,
    which has no gaps; names ``quoted``, ``kinds`` numbers in ``shapes``, offsets counted from
    the first data byte. Padded with spaces to a multiple of 8, as the format's owner does, so
    that data starts aligned. ``format: pt`` because loaders refuse files without it, and
    ``metadata`` beside it. Columns are joined, as formatting each entry takes twice as long.
    """
    said = json.dumps({"format": "pt", **(metadata or {})}, separators=(",", ":"))
    parts = [f'{{"__metadata__":{said}']
    for names, dtype, shapes, kinds, starts, sizes in regions:
        middles = [
            f'":{{"dtype":"{dtype}","shape":[{",".join(map(str, shape))}],"data_offsets":['
            for shape in shapes
        ]
        edges = list(map(str, [*starts.tolist(), int(starts[-1] + sizes[-1])]))
        columns = [","] * (6 * len(names))
        columns[0::6] = [']},"'] * len(names)
        columns[1::6] = names
        columns[2::6] = map(middles.__getitem__, kinds)
        columns[3::6] = edges[:-1]
        columns[5::6] = edges[1:]
        columns[0] = ',"'
        parts += [*columns, "]}"]
    parts.append("}")
    text = "".join(parts).encode()
    padding = -len(text) % 8
    return b"".join(((len(text) + padding).to_bytes(8, "little"), text, b" " * padding))


class ShardWriter:
    """One output shard: planned size and header, then bytes at planned offsets in any order.

    Used by several threads at once. ``close`` must follow the last write.
    """

    def __init__(self, folder: Path, name: str, header: bytes, size: int, sync: SyncPool) -> None:
        self.name = name
        self._path = folder / name
        self._temporary = folder / (name + ".tmp")
        self._header = header
        self._size = size
        self._sync = sync
        self._small: list[tuple[int, bytes]] = []
        self._unsynced = 0
        self._lock = threading.Lock()
        self._pending: Future[None] | None = None
        with naming(self.name):
            self._fd = os.open(
                self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644
            )
            _allocate(self._fd, size)
        self.put(0, header)

    def put(self, offset: int, data: Any) -> None:
        """Write a buffer at an absolute offset."""
        view = memoryview(data).cast("B")
        with naming(self.name):
            done = 0
            while done < len(view):
                done += os.pwrite(self._fd, view[done:], offset + done)
        self._written(len(view))

    def put_small(self, offset: int, data: bytes) -> None:
        """Remember a few bytes; neighbours are written together when the shard closes."""
        self._small.append((offset, data))  # list.append is atomic

    def copy_from(self, fd: int, start: int, offset: int, nbytes: int) -> None:
        """Copy bytes of another file without bringing them here where the kernel can."""
        with naming(self.name):
            done = 0
            while done < nbytes:
                try:
                    n = os.copy_file_range(fd, self._fd, nbytes - done, start + done, offset + done)
                except (AttributeError, OSError) as e:
                    if isinstance(e, OSError) and e.errno not in _NO_COPY_RANGE:
                        raise
                    self._copy_by_hand(fd, start + done, offset + done, nbytes - done)
                    return
                if n == 0:
                    raise WriteError(f"{self.name}: a source file ended early; it changed.")
                done += n
        self._written(nbytes)

    def close(self) -> None:
        """Write what is left, sync, compare the header on disk with the plan, rename."""
        for offset, data in _joined(self._small):
            self.put(offset, data)
        with naming(self.name):
            if self._pending is not None:
                self._pending.result()
            self._sync.now(self._fd)
            found = os.pread(self._fd, len(self._header), 0)
            size = os.fstat(self._fd).st_size
            os.close(self._fd)
            self._fd = -1
            if found != self._header or size != self._size:
                raise WriteError(
                    f"{self.name}: the file read back is not what was written; "
                    "the disk or its driver is at fault."
                )
            os.rename(self._temporary, self._path)

    def abandon(self) -> None:
        """Close the descriptor after an error; the temporary file stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _copy_by_hand(self, fd: int, start: int, offset: int, nbytes: int) -> None:
        buffer = memoryview(bytearray(min(nbytes, 1 << 20)))
        while nbytes:
            n = os.preadv(fd, [buffer[: min(nbytes, len(buffer))]], start)
            if n == 0:
                raise WriteError(f"{self.name}: a source file ended early; it changed.")
            self.put(offset, buffer[:n])
            start, offset, nbytes = start + n, offset + n, nbytes - n

    def _written(self, nbytes: int) -> None:
        with self._lock:
            self._unsynced += nbytes
            if self._unsynced < SYNC_EVERY:
                return
            if self._pending is not None:
                if not self._pending.done():
                    return
                with naming(self.name):  # the kernel tells of a failed flush only once
                    self._pending.result()
            self._unsynced = 0
            self._pending = self._sync.later(self._fd)


_NO_COPY_RANGE = {
    errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF,
    errno.ETXTBSY,
}  # fmt: skip


def _allocate(fd: int, size: int) -> None:
    """Reserve the space: a full disk shows before any work, and pwrite runs at 10, not 6 GB/s."""
    if not size:
        return
    try:
        os.posix_fallocate(fd, 0, size)
    except (AttributeError, OSError) as e:
        if isinstance(e, OSError) and e.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        os.ftruncate(fd, size)


def _joined(pieces: list[tuple[int, bytes]]) -> Iterable[tuple[int, bytes]]:
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
