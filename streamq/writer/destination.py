"""The output directory: all of it in ``DST.partial``, then renamed in one moment."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from streamq.errors import WriteError
from streamq.tensors import size_text

from .disk import SyncPool, naming
from .growing import GrowingShard
from .shard import ShardWriter


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
        with naming(str(self.partial)):
            if self.partial.is_symlink() or self.partial.is_file():
                self.partial.unlink()
            elif self.partial.exists():
                shutil.rmtree(self.partial)
            self.partial.mkdir(parents=True)

    def shard(self, name: str, header: bytes, size: int) -> ShardWriter:
        """Start a shard."""
        return ShardWriter(self.partial, name, header, size, self.sync)

    def growing(self, name: str, room: int, known: int) -> GrowingShard:
        """Start a shard whose size is not known; see there."""
        return GrowingShard(self.partial, name, room, known, self.sync)

    def copy_file(self, source: Path, name: str) -> None:
        """Copy a file of the source as it is, its mode included."""
        target = self.partial / name
        with naming(name):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            shutil.copymode(source, target)
            self._sync_path(target)

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON object, keys in the order given, indented as the Hub has them."""
        self.write_text(name, [json.dumps(value, indent=2, ensure_ascii=False), "\n"])

    def write_text(self, name: str, pieces: Iterable[str]) -> None:
        """Write a text file in UTF-8."""
        target = self.partial / name
        with naming(name):
            with target.open("wb") as file:
                for piece in pieces:
                    file.write(piece.encode())
            self._sync_path(target)

    def commit(self) -> None:
        """Make ``DST`` appear, complete; an old one makes way in the same moment."""
        self.sync.close()
        with naming(str(self.dst)):
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


def same_disk(a: Path, b: Path) -> bool:
    """Whether two destinations would share the space of one disk."""
    return _existing_parent(a).stat().st_dev == _existing_parent(b).stat().st_dev


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
