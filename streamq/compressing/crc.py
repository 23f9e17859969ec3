"""CRC-32 of bytes whose parts are summed at the same time; ``zlib.crc32`` gives the same."""

from __future__ import annotations

import os
from pathlib import Path

from zlib_ng.zlib_ng import crc32, crc32_combine

from streamq.errors import CheckpointError

from .types import Array


class Sum:
    """The CRC-32 of parts that are told in order."""

    def __init__(self) -> None:
        self.crc, self.nbytes = 0, 0

    def add(self, crc: int, nbytes: int) -> None:
        """Add the next part by its sum."""
        self.crc = crc32_combine(self.crc, crc, nbytes)
        self.nbytes += nbytes


def of_array(array: Array, crc: int = 0) -> int:
    """The CRC-32 of a contiguous array, behind what has the sum ``crc``."""
    return int(crc32(array.data, crc))


def of_file(path: Path) -> int:
    """The CRC-32 of a file. Raises CheckpointError where it cannot be read."""
    crc = 0
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while piece := os.read(fd, 1 << 20):
                crc = crc32(piece, crc)
        finally:
            os.close(fd)
    except OSError as e:
        raise CheckpointError(f"{path.name}: cannot be read: {e.strerror}.") from e
    return crc
