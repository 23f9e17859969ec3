"""The output directory: all of it below ``DST.partial``, then renamed in one moment."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamq.errors import AddressError, WriteError
from streamq.hub import Committed
from streamq.pace import FREE, Pace
from streamq.tensors import size_text
from streamq.trust import RECORD, FileSum, Running, record_text

from .disk import SyncPool, lock, naming, write_all
from .growing import GrowingShard
from .partial import Partial
from .shard import COPY, TEMPORARY, ShardWriter, sha256_of
from .uploader import Uploader


class Destination:
    """The directory ``DST``, built in ``DST.partial/output``, with a journal beside it.

    ``sync``: everything is on disk before it counts as done. ``sha256``: of every file as well.
    ``pace``: how fast shards and copies are written, and copies read. ``outlet``: what takes
    complete shards off the disk, where they go on from there, and then ``committed``: where the
    output is in the end.
    """

    outlet: Uploader | None = None
    committed: Committed | None = None

    def __init__(
        self, dst: Path, overwrite: bool, sync: bool, sha256: bool = False, pace: Pace = FREE
    ) -> None:
        self.dst = dst
        self.partial = dst.with_name(dst.name + ".partial")
        self.output = self.partial / "output"
        self.files: dict[str, FileSum] = {}
        self.sync = SyncPool(sync)
        self.begun = False
        self._overwrite = overwrite
        self._sha256 = sha256
        self._pace = pace
        self._lock = -1
        self._state: Partial | None = None

    @property
    def name(self) -> str:
        """What people call it."""
        return str(self.dst)

    @property
    def wants_sha256(self) -> bool:
        """Whether that of every file is to be known."""
        return self._sha256

    @property
    def attempts(self) -> Path:
        """Where others may build shards, for ``accept``; what is there at the end goes."""
        return self.partial / "attempts"

    @property
    def state(self) -> Partial:
        """What is done and noted, after ``begin``."""
        assert self._state is not None
        return self._state

    def begin(self, identity: Mapping[str, Any] | None = None, restart: bool = False) -> None:
        """Make ``DST.partial``, or go on with what an interrupted run left there.

        ``identity``: all that decides the bytes of the output; without one, or with
        ``restart``, what is there goes. Raises WriteError where another process is at work
        there, or another conversion was begun.
        """
        with naming(str(self.partial)):
            if self.partial.is_symlink() or self.partial.is_file():
                self.partial.unlink()
            self._lock = lock(self.partial)
            self._state = Partial(self.partial, self.output, self.sync)
            self._state.begin(None if restart else identity)
            if not self._state.goes_on:
                self._state.start(identity or {})
            shutil.rmtree(self.attempts, ignore_errors=True)  # of a run that was killed
        self.begun = True

    def shard(self, name: str, header: bytes, size: int) -> ShardWriter:
        """Start a shard, or go on with it."""
        with naming(name):
            known = self.state.known(name, size)
        return ShardWriter(
            self.output, name, header, size, self.sync, self.state.journal, known, self._sha256,
            self._pace,
        )  # fmt: skip

    def growing(self, name: str, room: int, known: int) -> GrowingShard:
        """Start a shard whose size is not known; see there."""
        return GrowingShard(self.output, name, room, known, self.sync)

    def finished(self, name: str, size: int, units: set[str]) -> set[str]:
        """Which units of a shard are there from an earlier run; all, if it is complete."""
        with naming(name):
            found = self.state.finished(name, size, units)
        if name in self.state.done:
            self._was_done(name)
        return found

    def _was_done(self, name: str) -> None:
        """Take a file over from an earlier run, which may have been asked for another sha256."""
        sums = self.state.done[name].sums
        if self._sha256 and sums.sha256 is None:
            with (self.output / name).open("rb", buffering=0) as file:
                sums = replace(sums, sha256=sha256_of(file.fileno()))
        self.files[name] = sums if self._sha256 else replace(sums, sha256=None)

    @property
    def goes_on(self) -> bool:
        """Whether an earlier run has begun the same output."""
        return self._state is not None and self._state.goes_on

    def how_far(self, names: list[str], total: int) -> str | None:
        """A sentence on how far an earlier run came with shards of ``total`` bytes, or why it
        does not count; None without one. After all of them were asked for by ``finished``.
        """
        if not self.goes_on:
            return self.state.said
        done = size_text(sum(map(self.bytes_of, names)))
        complete = sum(map(self.is_complete, names))
        return (
            f"resuming {self.name}: {complete} of {len(names)} shards, {done} of "
            f"{size_text(total)} done"
        )

    def bytes_of(self, name: str) -> int:
        """Bytes of a file that are there from an earlier run, after ``finished``."""
        return self.state.bytes_of(name)

    def is_complete(self, name: str) -> bool:
        """Whether a file is complete from an earlier run."""
        return name in self.state.done

    def notes_of(self, name: str) -> list[dict[str, Any]]:
        """What was noted of the units of a shard that are ``finished``."""
        done = self.state.done.get(name)
        return done.notes if done else self.state.notes.get(name, [])

    def close_shard(self, shard: ShardWriter) -> None:
        """Close a shard; from now on it is complete."""
        notes = self.state.notes.get(shard.name, [])
        self._complete(shard.name, shard.close(), notes + shard.notes)

    def accept(
        self, path: Path, name: str, header: bytes, size: int, sums: FileSum, notes: list[Any]
    ) -> None:
        """Give a shard that another process has written its place; it is complete from now on.

        It is on disk under ``path``, and flushed. Raises WriteError where it is not what was
        planned. What this process had of it goes.
        """
        with naming(name):
            with path.open("rb") as file:
                found = file.read(len(header)), os.fstat(file.fileno()).st_size
            if found != (header, size):
                raise WriteError(
                    f"{name}: {path} is not what was written there; its storage is not the same "
                    "for all who use it, or at fault."
                )
            self.state.known(name, size)
            (self.output / (name + TEMPORARY)).unlink(missing_ok=True)
            os.rename(path, self.output / name)
            self.sync.path(self.output)
        self._complete(name, sums, notes)

    def _complete(self, name: str, found: FileSum, notes: list[Any]) -> None:
        self.files[name] = found
        with naming(name):
            self.state.complete(name, found, notes)

    def copy_file(self, source: Path, name: str, keep: bool = False) -> None:
        """Copy a file of the source as it is, its mode included.

        ``keep``: it is large, so a run that goes on takes it for copied.
        """
        if keep and self.is_complete(name):
            self._was_done(name)
            return
        target = self.output / name
        with naming(name):
            target.parent.mkdir(parents=True, exist_ok=True)
            with source.open("rb", buffering=0) as file:
                buffer = memoryview(bytearray(COPY))

                def pieces() -> Iterator[memoryview]:
                    while n := file.readinto(buffer):
                        self._pace.take(2 * n)  # it was read, and is written
                        yield buffer[:n]

                self._write(name, pieces())
            shutil.copymode(source, target)
            if keep:
                self.sync.path(target.parent)
                self._complete(name, self.files[name], [])

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON object, keys in the order given, indented as the Hub has them."""
        self.write_text(name, [json.dumps(value, indent=2, ensure_ascii=False), "\n"])

    def write_text(self, name: str, pieces: Iterable[str]) -> None:
        """Write a text file in UTF-8."""
        with naming(name):
            self._write(name, (memoryview(piece.encode()) for piece in pieces))

    def _write(self, name: str, pieces: Iterable[memoryview]) -> None:
        sums = Running()
        fd = os.open(self.output / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            for data in pieces:
                write_all(fd, data, sums.size)
                sums.add(data)
            self.sync.file(fd)
            sha256 = sha256_of(fd) if self._sha256 else None
        finally:
            os.close(fd)
        self.files[name] = FileSum(sums.size, sums.all(), sha256)

    def commit(self, about: Mapping[str, Any] | None = None) -> None:
        """Make ``DST`` appear, complete; an old one makes way in the same moment.

        ``about``: what streamq.json says of the origin; without it there is none.
        """
        self.sync.close()
        if about is not None:
            self.write_text(RECORD, [record_text(about, self.files)])
        with naming(str(self.dst)):
            for folder, _, _ in os.walk(self.output):
                self.sync.path(Path(folder))
            if os.path.lexists(self.dst):
                if not self._overwrite:
                    raise WriteError(
                        f"{self.dst}: appeared while converting; the result is in {self.output}."
                    )
                os.rename(self.dst, self.partial / f"old-{os.getpid()}")
            os.rename(self.output, self.dst)
            self.sync.path(self.dst.parent)
            shutil.rmtree(self.partial, ignore_errors=True)  # while no other may begin there

    def close(self) -> None:
        """Let go of the directory; what is in it stays."""
        self.sync.close()
        if self._state is not None:
            self._state.close()
            self._state = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def check_destination(dst: Path, need: int, overwrite: bool) -> int:
    """Everything about ``DST`` that can be known before writing; returns the free bytes.

    Raises WriteError if it exists without ``overwrite``, cannot be made there, or the
    disk has less than ``need`` bytes free; AddressError for an address of the Hub.
    """
    if str(dst).startswith("hf:/"):
        raise AddressError(f"{dst}: only `streamq convert` writes to the Hub; give a directory.")
    if os.path.lexists(dst) and not overwrite:
        raise WriteError(f"{dst}: already exists; give another name, or --overwrite to replace it.")
    parent = existing_parent(dst)
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


def same_disk(a: Path, b: Path) -> bool:
    """Whether two destinations would share the space of one disk."""
    return existing_parent(a).stat().st_dev == existing_parent(b).stat().st_dev


def free_bytes(dst: Path) -> int:
    """Free bytes on the disk of ``dst``, what an interrupted run left there counted as free."""
    return shutil.disk_usage(existing_parent(dst)).free + partial_bytes(dst)


def partial_bytes(dst: Path) -> int:
    """Bytes on disk of what is not finished of ``dst``, which may be at work meanwhile."""
    found = 0
    for folder, _, names in os.walk(dst.with_name(dst.name + ".partial")):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return found


def existing_parent(path: Path) -> Path:
    """The directory that is there of those that hold ``path``."""
    parent = Path(os.path.abspath(path)).parent
    while not os.path.lexists(parent):
        parent = parent.parent
    return parent
