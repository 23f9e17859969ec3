"""A journal: records that are appended and never changed, of which a torn last one is dropped."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from .checksums import crc32


class Journal:
    """Lines ``<crc32 of the rest> <json>``; ``append`` may be called by several threads."""

    def __init__(self, path: Path, keep: int = 0) -> None:
        """``keep``: bytes of good records, as ``read_journal`` counts them; what follows goes."""
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._lock = threading.Lock()
        os.ftruncate(self._fd, keep)

    def append(self, record: dict[str, Any], durable: bool = False) -> None:
        """Add a record; with ``durable`` it is on disk on return. Raises OSError."""
        text = json.dumps(record, separators=(",", ":")).encode()
        line = memoryview(b"%08x %s\n" % (crc32(text), text))
        with self._lock:
            while line:
                line = line[os.write(self._fd, line) :]
            if durable:
                os.fsync(self._fd)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def read_journal(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records up to the first that is torn, and how many bytes they take.

    A torn line cannot pass for a whole one, and what was appended behind one is not counted:
    it was written later, so less is taken for done than is.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    records, good = [], 0
    for line in raw.splitlines(keepends=True):
        said, _, text = line.partition(b" ")
        if not line.endswith(b"\n") or said != b"%08x" % crc32(text[:-1]):
            break
        records.append(json.loads(text))
        good += len(line)
    return records, good
