"""CRC-32 of the blocks of a file that is written in pieces, in any order, by several threads.

The polynomial is that of zlib, gzip and Python's ``zlib.crc32``, so that anybody can check it.
Blocks and not tensors: 70,000 tensors need no more sums than a few large ones, headers are
covered, and a block in which a bit flipped leads to the tensors in it by the header.
zlib-ng computes it at 60 GB/s from the cache (zlib at 7), without the interpreter's lock.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from zlib_ng.zlib_ng import crc32, crc32_combine

__all__ = ["BLOCK", "Running", "Sums", "block_sum", "blocks_of", "crc32"]

#: Bytes of a block. CRC-32 finds any two flipped bits within 2**32 bits, so in any block.
BLOCK = 4 << 20
#: What is read at a time to be summed: it stays in the cache.
_PIECE = 1 << 19


class Sums:
    """The sums of a file of ``size`` bytes, as far as pieces of it are known.

    The sum of pieces that follow each other is that of each, moved by what is behind it in
    the block, xored; so pieces come in any order, but each byte once. Used by one thread.
    ``nbytes``: how many were taken in.
    """

    def __init__(self, size: int, known: Iterable[tuple[int, int]] = (), nbytes: int = 0) -> None:
        """``known``, ``nbytes``: of another that goes on here, see ``items``."""
        self._size = size
        self._blocks: dict[int, int] = dict(known)
        self.nbytes = nbytes

    def add(self, offset: int, data: memoryview) -> None:
        """Take in the bytes at ``offset``."""
        end = offset + len(data)
        for start in range(offset - offset % BLOCK, end, BLOCK):
            first, last = max(start, offset), min(start + BLOCK, end)
            crc = crc32(data[first - offset : last - offset])
            behind = min(start + BLOCK, self._size) - last
            self._xor(start // BLOCK, crc32_combine(crc, 0, behind) if behind else crc)
        self.nbytes += len(data)

    def merge(self, other: Sums) -> None:
        """Take in the pieces that another has seen."""
        for number, crc in other._blocks.items():
            self._xor(number, crc)
        self.nbytes += other.nbytes

    def _xor(self, number: int, crc: int) -> None:
        self._blocks[number] = self._blocks.get(number, 0) ^ crc

    def items(self) -> list[tuple[int, int]]:
        """Blocks with what is known of their sums."""
        return sorted(self._blocks.items())

    def all(self) -> list[int]:
        """The sum of each block, when every byte was taken in."""
        return [self._blocks.get(number, 0) for number in range(blocks_of(self._size))]


class Running:
    """The sums of a file that is written from its beginning."""

    def __init__(self) -> None:
        self.size = 0
        self._blocks: list[int] = []

    def add(self, data: memoryview) -> None:
        """Take in the next bytes."""
        while data:
            room = BLOCK - self.size % BLOCK
            if room == BLOCK:
                self._blocks.append(0)
            part, data = data[:room], data[room:]
            self._blocks[-1] = crc32(part, self._blocks[-1])
            self.size += len(part)

    def all(self) -> list[int]:
        """The sum of each block."""
        return self._blocks


def blocks_of(size: int) -> int:
    """Number of blocks of a file of ``size`` bytes."""
    return -(-size // BLOCK)


def block_sum(fd: int, number: int, size: int) -> int:
    """The sum of one block of a file of ``size`` bytes, as it is on disk. Raises OSError."""
    start = number * BLOCK
    end = min(start + BLOCK, size)
    buffer = memoryview(bytearray(min(_PIECE, end - start)))
    crc = 0
    while start < end:
        n = os.preadv(fd, [buffer[: end - start]], start)
        if n == 0:
            break
        crc = crc32(buffer[:n], crc)
        start += n
    return crc
