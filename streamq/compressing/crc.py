"""CRC-32 of bytes whose parts are summed at the same time."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

from streamq.errors import CheckpointError

from .types import Array

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31  # the polynomial 1: bits are reflected, the highest stands for x^0


def combine(first: int, second: int, length: int) -> int:
    """The sum of two parts from their own; ``length``: bytes of the second.

    CRC-32 of ``a + b`` is that of a times x^(8 * length), plus that of b, modulo the polynomial.
    """
    factor, square = _ONE, 1 << 23  # x^8
    while length:
        if length & 1:
            factor = _product(factor, square)
        square = _product(square, square)
        length >>= 1
    return _product(first, factor) ^ second


def _product(a: int, b: int) -> int:
    """Of two polynomials, modulo the one of CRC-32."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


class Sum:
    """The CRC-32 of parts that are told in order."""

    def __init__(self) -> None:
        self.crc, self.nbytes = 0, 0

    def add(self, crc: int, nbytes: int) -> None:
        """Add the next part by its sum."""
        self.crc = combine(self.crc, crc, nbytes) if self.nbytes else crc
        self.nbytes += nbytes


def of_array(array: Array, crc: int = 0) -> int:
    """The CRC-32 of a contiguous array, behind what has the sum ``crc``."""
    return zlib.crc32(array.data, crc)


def of_file(path: Path) -> int:
    """The CRC-32 of a file. Raises CheckpointError where it cannot be read."""
    crc = 0
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while piece := os.read(fd, 1 << 20):
                crc = zlib.crc32(piece, crc)
        finally:
            os.close(fd)
    except OSError as e:
        raise CheckpointError(f"{path.name}: cannot be read: {e.strerror}.") from e
    return crc
