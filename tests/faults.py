"""A layer under the writer: it counts syscalls, fails one of them, and cuts the power.

Only calls that change what is below a directory count. The power cut is harsher than any file
system: of what was not flushed, each write to a file is there or not by itself, perhaps in part,
and of each directory only a beginning of its changes.
"""

from __future__ import annotations

import errno
import os
import random
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EINTR": errno.EINTR}
KINDS = [*ERRORS, "short", "crash"]


class Crash(BaseException):
    """The process is gone: nothing that it would do afterwards happens."""


class Op(NamedTuple):
    """A change that was made: ``data`` at ``offset`` of an inode, or of a name."""

    what: str
    inode: int = 0
    path: str = ""
    to: str = ""
    offset: int = 0
    data: bytes = b""
    begun: int = 0  # of a flush: how many changes there were when it began


class Layer:
    """In place of functions of ``os`` while it is entered.

    ``fail``: the number of the call that fails, from 1, and ``kind``: how. ``until``: says when
    the process crashes.
    """

    CALLS = (
        "open", "close", "pwrite", "write", "posix_fallocate", "ftruncate", "fsync", "fdatasync",
        "rename", "unlink", "mkdir", "rmdir",
    )  # fmt: skip

    def __init__(
        self, root: Path, fail: int = 0, kind: str = "", until: Callable[[], bool] | None = None
    ) -> None:
        self._root = os.path.realpath(root)
        self._fail, self._kind, self._until = fail, kind, until
        self._real = {name: getattr(os, name) for name in self.CALLS}
        self._lock = threading.RLock()
        self._files: dict[int, tuple[str, int, int]] = {}  # path, inode, flags of descriptors
        self._dead = False
        self.count = 0
        self.log: list[Op] = []

    def __enter__(self) -> Layer:
        for name in self.CALLS:
            setattr(os, name, getattr(self, "_" + name))
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.CALLS:
            setattr(os, name, self._real[name])
        for fd in self._files:  # the kernel does it when a process ends
            os.close(fd)

    def _path(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The path below the root, None for any other."""
        if isinstance(path, int):
            return self._files.get(path, (None,))[0]
        if dir_fd is not None and dir_fd in self._files:
            path = os.path.join(self._files[dir_fd][0], path)
        path = os.path.abspath(path)
        return path if path.startswith(self._root + os.sep) else None

    def _step(self) -> str:
        """Count a call; raises what it is to fail with, or says "short"."""
        self.count += 1
        if self._dead or (self._until and self._until()):
            self._dead = True
            raise Crash
        if self.count != self._fail:
            return ""
        if self._kind == "crash":
            self._dead = True
            raise Crash
        if self._kind in ERRORS:
            raise OSError(ERRORS[self._kind], os.strerror(ERRORS[self._kind]))
        return self._kind

    # --- the calls ------------------------------------------------------------------------

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: Any = None) -> int:
        with self._lock:
            place = self._path(path, dir_fd)
            if place is None:
                return self._real["open"](path, flags, mode, dir_fd=dir_fd)
            made = flags & os.O_CREAT and not os.path.exists(place)
            if flags & os.O_CREAT:
                self._step()
            fd = self._real["open"](path, flags, mode, dir_fd=dir_fd)
            inode = os.fstat(fd).st_ino
            self._files[fd] = place, inode, flags
            if made:
                self.log.append(Op("create", inode, place))
            elif flags & os.O_TRUNC:
                self.log.append(Op("size", inode, place))
            return fd

    def _close(self, fd: int) -> None:
        with self._lock:
            self._files.pop(fd, None)
            self._real["close"](fd)

    def _put(self, name: str, fd: int, data: Any, *at: int) -> int:
        with self._lock:
            if fd not in self._files:
                return self._real[name](fd, data, *at)
            data = bytes(data)
            if self._step() == "short" and len(data) > 1:
                data = data[: len(data) // 2]
            _, inode, _ = self._files[fd]
            offset = at[0] if at else os.fstat(fd).st_size  # all others append
            n = self._real[name](fd, data, *at)
            self.log.append(Op("write", inode, offset=offset, data=data[:n]))
            return n

    def _pwrite(self, fd: int, data: Any, at: int) -> int:
        return self._put("pwrite", fd, data, at)

    def _write(self, fd: int, data: Any) -> int:
        return self._put("write", fd, data)

    def _posix_fallocate(self, fd: int, at: int, size: int) -> None:
        with self._lock:
            if fd not in self._files:
                self._real["posix_fallocate"](fd, at, size)
                return
            self._step()
            self._real["posix_fallocate"](fd, at, size)
            if os.fstat(fd).st_size == at + size:
                self.log.append(Op("grow", self._files[fd][1], offset=at + size))

    def _ftruncate(self, fd: int, size: int) -> None:
        with self._lock:
            self._step()
            self._real["ftruncate"](fd, size)
            self.log.append(Op("size", self._files[fd][1], offset=size))

    def _flush(self, fd: int) -> None:
        """No real flush, as no real power is cut. What is written meanwhile does not count."""
        with self._lock:
            if fd not in self._files:
                return
            self._step()
            path, inode, _ = self._files[fd]
            self.log.append(Op("flush", inode, path, begun=len(self.log)))

    _fsync = _fdatasync = _flush

    def _named(self, name: str, path: Any, to: Any = None, **kw: Any) -> None:
        with self._lock:
            place = self._path(path, kw.get("dir_fd"))
            arguments = (path,) if to is None else (path, to)
            if place is None:
                self._real[name](*arguments, **kw)
                return
            self._step()
            self._real[name](*arguments, **kw)
            self.log.append(Op(name, path=place, to=(to and self._path(to)) or ""))

    def _rename(self, a: Any, b: Any, **kw: Any) -> None:
        self._named("rename", a, b, **kw)

    def _unlink(self, path: Any, **kw: Any) -> None:
        self._named("unlink", path, **kw)

    def _rmdir(self, path: Any, **kw: Any) -> None:
        self._named("rmdir", path, **kw)

    def _mkdir(self, path: Any, mode: int = 0o777, **kw: Any) -> None:
        with self._lock:
            place = self._path(path)
            if place is not None and not os.path.exists(place):
                self._step()
                self.log.append(Op("mkdir", path=place))
            self._real["mkdir"](path, mode, **kw)


# --- the power cut ------------------------------------------------------------------------


def after_power_cut(log: list[Op], root: Path, into: Path, rng: random.Random) -> None:
    """Make ``into`` what may be left of ``root`` after some of the changes in ``log``."""
    done = log[: rng.randint(0, len(log))]
    flushed: dict[Any, int] = defaultdict(int)  # changes that are safe, of inodes and paths
    for op in done:
        if op.what == "flush":
            flushed[op.inode] = flushed[op.path] = op.begun
    contents: dict[int, bytearray] = defaultdict(bytearray)
    for i, op in enumerate(done):
        if op.what in ("write", "size", "grow"):
            _change(contents[op.inode], op, rng, safe=i < flushed[op.inode])
    names: dict[str, int | None] = {}  # of files their inodes, None for a directory
    lost: set[str] = set()  # directories of which no further change is there
    for i, op in enumerate(done):
        if op.what not in ("create", "mkdir", "rename", "unlink", "rmdir"):
            continue
        folder = os.path.dirname(op.to or op.path)
        if i >= flushed[folder] and (folder in lost or rng.random() < 0.3):
            lost.add(folder)
            continue
        _rename(names, op)
    base = os.path.realpath(root)
    for path, inode in sorted(names.items()):
        place = into / os.path.relpath(path, base)
        if not place.parent.is_dir():  # in a directory that is not there
            continue
        if inode is None:
            place.mkdir()
        else:
            place.write_bytes(contents[inode])


def _change(content: bytearray, op: Op, rng: random.Random, safe: bool) -> None:
    if op.what == "write":
        data = op.data
        if not safe:
            luck = rng.random()
            data = data if luck < 0.4 else data[: rng.randint(0, len(data))] if luck < 0.6 else b""
        if data:
            content.extend(bytes(max(0, op.offset - len(content))))
            content[op.offset : op.offset + len(data)] = data
    elif safe or rng.random() < 0.5:
        content.extend(bytes(max(0, op.offset - len(content))))
        if op.what == "size":
            del content[op.offset :]


def _rename(names: dict[str, int | None], op: Op) -> None:
    """Apply a change of names, if what it is about is there."""
    if op.what in ("create", "mkdir"):
        names[op.path] = op.inode if op.what == "create" else None
    elif op.path in names:
        moved = {path: inode for path, inode in names.items()
                 if path == op.path or path.startswith(op.path + os.sep)}  # fmt: skip
        for path in moved:
            del names[path]
        if op.what == "rename":
            names.update({op.to + path[len(op.path) :]: inode for path, inode in moved.items()})
