"""Convert again, and compare instead of writing: every byte, at the speed of a conversion."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from streamq.checkpoint import Checkpoint, Reader
from streamq.converting import Fresh, Settings, repeat
from streamq.errors import StreamqError
from streamq.planning import MAX_MEMORY, Plan, make_plan, unspelled
from streamq.trust import VERSION, Record, contents, differences
from streamq.writer import joined

from .elements import Progress
from .report import Report

#: What is compared at a time, in bytes: it stays in the cache.
_PIECE = 1 << 19


def plan_of(record: Record, source: Checkpoint, report: Report) -> Plan | None:
    """The plan that made an output of ``source``; None where it is not known, and the report why.

    It is known to this version for this source only: bytes may change from version to version.
    """
    about = record.about
    if about.get("command") != "convert":
        return None
    if about.get("streamq") != VERSION:
        report.inexact = f"it was made by streamq {about.get('streamq')}, this is {VERSION}"
        return None
    prints = contents(source.fingerprint())
    if found := next(differences(contents(about.get("source", {})), prints), None):
        report.inexact = f"the source is not the one that it was made from ({found})"
        return None
    try:
        return make_plan(source, unspelled(about["options"]))
    except (StreamqError, KeyError) as e:
        report.inexact = f"it cannot be planned again: {e}"
        return None


def convert_again(
    out: Checkpoint, source: Checkpoint, plan: Plan, workers: int, progress: Progress | None,
    report: Report,
) -> bool:  # fmt: skip
    """Convert ``source`` again and compare; False where shards are laid out in another way."""
    target = _Comparison(out)
    memory = max(MAX_MEMORY, plan.slab_memory)
    how = Settings(workers, memory, stats=True, progress=progress)
    quality = repeat(source, plan, target, how)
    if quality is not None:
        report.quality = quality
    report.exact = True
    report.failures += [*target.failures, *target.tensors.values()]
    return not target.moved


class _Comparison(Fresh):
    """In place of a Destination: compares what would be written with what is there."""

    def __init__(self, out: Checkpoint) -> None:
        self._out = out
        self.failures: list[str] = []
        self.tensors: dict[str, str] = {}
        self.moved = False

    def shard(self, name: str, header: bytes, size: int) -> _Shard:
        """Open a shard and compare its header."""
        shard = _Shard(self, self._out.root / name)
        if not shard.begins_with(header, size):
            self.moved = True
            self.failures.append(f"{name}: its header is not the one that the source converts to")
        return shard

    def close_shard(self, shard: _Shard) -> None:
        """Compare what is left."""
        shard.close()

    def copy_file(self, source: Path, name: str, keep: bool = False) -> None:
        """Compare a file with that of the source."""
        try:
            with source.open("rb") as a, (self._out.root / name).open("rb") as b:
                same = True
                while same and (piece := a.read(_PIECE)):
                    same = piece == b.read(len(piece))
                same = same and not b.read(1)
        except FileNotFoundError:
            same = False
        if not same:
            self.failures.append(f"{name}: is not that of the source")

    def write_text(self, name: str, pieces: Iterable[str]) -> None:
        """Compare a text file."""
        path = self._out.root / name
        if not path.is_file() or path.read_bytes() != "".join(pieces).encode():
            self.failures.append(f"{name}: is not what the source converts to")

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Compare a JSON file."""
        self.write_text(name, [json.dumps(value, indent=2, ensure_ascii=False), "\n"])

    def differ(self, file: str, at: np.ndarray[Any, Any]) -> None:
        """Note bytes of a shard that differ, by their sorted offsets; one sentence a tensor."""
        tensors = [t for t in self._out.tensors.values() if t.file == file]
        ends = np.array([t.end for t in tensors])
        for i in np.unique(np.searchsorted(ends, at, "right")).tolist():
            t = tensors[i]
            first = int(at[np.searchsorted(at, t.start)]) - t.start
            self.tensors.setdefault(
                t.name, f"{t.name!r} differs from what the source converts to at byte {first}"
            )


class _Shard:
    """An output shard that is there; what units put is compared with it. For several threads."""

    def __init__(self, target: _Comparison, path: Path) -> None:
        self._target = target
        self._file = path.name
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if path.is_file() else -1
        self._small: list[tuple[int, bytes]] = []
        self._lock = threading.Lock()
        self._same = False

    def begins_with(self, header: bytes, size: int) -> bool:
        """Whether it has this header and size; else nothing more is compared."""
        self._same = (
            self._fd >= 0
            and os.fstat(self._fd).st_size == size
            and os.pread(self._fd, len(header), 0) == header
        )
        return self._same

    def unit(self, key: str) -> _Shard:
        """Units are all one here."""
        return self

    def done(self, note: dict[str, Any]) -> None:
        """Nothing to do."""

    def put(self, offset: int, data: Any) -> None:
        """Compare a buffer with what is at an offset."""
        if not self._same:
            return
        wanted = np.frombuffer(memoryview(data).cast("B"), np.uint8)
        for at in range(0, len(wanted), _PIECE):
            part = wanted[at : at + _PIECE]
            found = np.frombuffer(os.pread(self._fd, len(part), offset + at), np.uint8)
            if not np.array_equal(found, part):
                n = min(len(found), len(part))
                bad = np.flatnonzero(found[:n] != part[:n])
                with self._lock:
                    self._target.differ(
                        self._file, offset + at + (bad if len(bad) else np.array([n]))
                    )

    def put_small(self, offset: int, data: bytes) -> None:
        """Remember a few bytes; neighbours are compared together."""
        self._small.append((offset, data))

    def copy_from(self, read: Reader, start: int, offset: int, nbytes: int) -> None:
        """Compare with bytes of a source file."""
        buffer = memoryview(bytearray(min(nbytes, _PIECE)))
        for at in range(0, nbytes, _PIECE):
            n = read(buffer[: min(_PIECE, nbytes - at)], start + at)
            self.put(offset + at, buffer[:n])

    def close(self) -> None:
        """Compare the few bytes, and close."""
        for offset, data in joined(self._small):
            self.put(offset, data)
        self.abandon()

    def abandon(self) -> None:
        """Close."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
