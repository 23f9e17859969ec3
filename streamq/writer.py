"""The write side: shards that land in any order, a directory that lands all at once.

Order of a shard: temporary name, preallocate, pwrite, fsync, re-read the header, rename.
Order of a directory: all of it in ``DST.partial``, index and config last, fsync, rename.
``DST`` is therefore absent or complete at every moment.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from streamq.errors import WriteError
from streamq.tensors import size_text

#: A flush to disk is started whenever this much new data is in a shard, so that the one
#: at the end has little left to wait for.
SYNC_EVERY = 128 << 20


def build_header(tensors: Iterable[tuple[str, str, tuple[int, ...], int, int]]) -> bytes:
    """The length and JSON that open a file, from ``(name, dtype, shape, start, end)``.

    Offsets count from the first data byte. Padded with spaces to a multiple of 8, as the
    format's owner does, so that data starts aligned. ``format: pt`` because loaders
    refuse files without it.
    """
    quote = json.encoder.encode_basestring
    middles: dict[tuple[str, tuple[int, ...]], str] = {}  # few, for very many tensors
    parts = ['{"__metadata__":{"format":"pt"}']
    for name, dtype, shape, start, end in tensors:
        middle = middles.get((dtype, shape))
        if middle is None:
            sizes = ",".join(map(str, shape))
            middle = f':{{"dtype":"{dtype}","shape":[{sizes}],"data_offsets":['
            middles[dtype, shape] = middle
        parts.append(f"{quote(name)}{middle}{start},{end}]}}")
    text = ",".join(parts).encode() + b"}"
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


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
        with _naming(self.name):
            self._fd = os.open(
                self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644
            )
            _allocate(self._fd, size)
        self.put(0, header)

    def put(self, offset: int, data: Any) -> None:
        """Write a buffer at an absolute offset."""
        view = memoryview(data).cast("B")
        with _naming(self.name):
            done = 0
            while done < len(view):
                done += os.pwrite(self._fd, view[done:], offset + done)
        self._written(len(view))

    def put_small(self, offset: int, data: bytes) -> None:
        """Remember a few bytes; neighbours are written together when the shard closes."""
        self._small.append((offset, data))  # list.append is atomic

    def copy_from(self, fd: int, start: int, offset: int, nbytes: int) -> None:
        """Copy bytes of another file without bringing them here where the kernel can."""
        with _naming(self.name):
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
        if self._pending is not None:
            self._pending.result()
        with _naming(self.name):
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
            idle = self._pending is None or self._pending.done()
            if self._unsynced < SYNC_EVERY or not idle:
                return
            self._unsynced = 0
            self._pending = self._sync.later(self._fd)


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


class Destination:
    """The directory ``DST``, built in ``DST.partial``."""

    def __init__(self, dst: Path, overwrite: bool, sync: bool) -> None:
        self.dst = dst
        self.partial = dst.with_name(dst.name + ".partial")
        self._overwrite = overwrite
        self._sync_enabled = sync
        self.sync = SyncPool(sync)

    def begin(self) -> None:
        """Make an empty ``DST.partial``, replacing what an interrupted run left there."""
        with _naming(str(self.partial)):
            if self.partial.is_symlink() or self.partial.is_file():
                self.partial.unlink()
            elif self.partial.exists():
                shutil.rmtree(self.partial)
            self.partial.mkdir(parents=True)

    def shard(self, name: str, header: bytes, size: int) -> ShardWriter:
        """Start a shard."""
        return ShardWriter(self.partial, name, header, size, self.sync)

    def copy_file(self, source: Path, name: str) -> None:
        """Copy a file of the source as it is, its mode included."""
        target = self.partial / name
        with _naming(name):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            shutil.copymode(source, target)
            self._sync_path(target)

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON object, keys in the order given, indented as the Hub has them."""
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file in UTF-8."""
        target = self.partial / name
        with _naming(name):
            target.write_text(text, "utf-8")
            self._sync_path(target)

    def commit(self) -> None:
        """Make ``DST`` appear, complete; an old one makes way in the same moment."""
        self.sync.close()
        with _naming(str(self.dst)):
            for folder, _, _ in os.walk(self.partial):
                self._sync_path(Path(folder))
            if not os.path.lexists(self.dst):
                os.rename(self.partial, self.dst)
            elif self._overwrite:
                old = self.dst.with_name(f"{self.dst.name}.old-{os.getpid()}")
                os.rename(self.dst, old)
                os.rename(self.partial, self.dst)
                if old.is_dir() and not old.is_symlink():
                    shutil.rmtree(old)
                else:
                    old.unlink()
            else:
                raise WriteError(
                    f"{self.dst}: appeared while converting; the result is in {self.partial}."
                )
            self._sync_path(self.dst.parent)

    def _sync_path(self, path: Path) -> None:
        if self._sync_enabled:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


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


class _naming:
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


def check_destination(dst: Path, need: int, overwrite: bool) -> int:
    """Everything about ``DST`` that can be known before writing; returns the free bytes.

    Raises WriteError if it exists without ``overwrite``, cannot be made there, or the
    disk has less than ``need`` bytes free.
    """
    if os.path.lexists(dst) and not overwrite:
        raise WriteError(f"{dst}: already exists; give another name, or --overwrite to replace it.")
    parent = _existing_parent(dst)
    if not parent.is_dir():
        raise WriteError(f"{dst}: {parent} is not a directory.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise WriteError(f"{dst}: {parent} cannot be written to (read-only, or no permission).")
    free = free_bytes(dst)
    if free < need:
        raise WriteError(
            f"{dst}: needs {size_text(need)}, the disk has {size_text(free)} free; "
            "free some or choose another place."
        )
    return free


def free_bytes(dst: Path) -> int:
    """Free bytes on the disk of ``dst``, what an interrupted run left there counted as free."""
    free = shutil.disk_usage(_existing_parent(dst)).free
    partial = dst.with_name(dst.name + ".partial")
    return free + sum(p.lstat().st_blocks * 512 for p in partial.rglob("*"))


def _existing_parent(path: Path) -> Path:
    parent = Path(os.path.abspath(path)).parent
    while not os.path.lexists(parent):
        parent = parent.parent
    return parent
