"""An output file whose size is known only at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .disk import SyncPool
from .shard import ShardWriter


class GrowingShard(ShardWriter):
    """A shard that begins with room for its header and ends with what was appended.

    What is ``known``, in bytes, header included, is preallocated and filled with ``put``.
    """

    def __init__(self, folder: Path, name: str, room: int, known: int, sync: SyncPool) -> None:
        super().__init__(folder, name, b" " * room, known, sync)

    @property
    def size(self) -> int:
        """Bytes so far: the next byte that is appended goes there."""
        return self._size

    def append(self, data: Any) -> None:
        """Write a buffer behind everything; by one thread."""
        view = memoryview(data).cast("B")
        self.put(self._size, view)
        self._size += len(view)

    def seal(self, header: bytes) -> None:
        """Write the header, filled up with spaces to the room for it, and close."""
        room = len(self._header)
        assert len(header) <= room, "a header longer than the plan's"
        self._header = (room - 8).to_bytes(8, "little") + header[8:].ljust(room - 8)
        self.put(0, self._header)
        self.close()

    @property
    def header(self) -> bytes:
        """The header as it is on the disk, once sealed."""
        return self._header
