"""The prefix code of the sparse weight stream, and the sort that gives a byte its rank.

Bits are filled from the lowest up; all lengths are multiples of 3. Every stream carries the
bytes by rank, most frequent first. The numbers are those of CANN's encoder for the weight
decompression engine of the Ascend 310P; its outputs are in ``tests/golden/nz_codec.json``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar, cast

import numpy as np

from streamq import compiled

Array = np.ndarray[Any, Any]
Mode = Literal["low", "high"]
#: A scalar in a kernel, compiled for the type that it is called with.
Number = Any
F = TypeVar("F", bound=Callable[..., Any])

u8: Any = np.uint8
u32: Any = np.uint32
u64: Any = np.uint64


def jit(function: F) -> F:
    """``compiled.jit``, typed."""
    return cast(F, compiled.jit(function))


class Coding(NamedTuple):
    """One mode: 36 ranks in LOW, 34 in HIGH.

    ``mark``: first byte of a stream. ``codes``, ``bits``: by rank; rank 0 is the code of a
    single zero byte. ``runs``: (zero bytes, code, bits), longest first.
    """

    mark: int
    codes: tuple[int, ...]
    bits: tuple[int, ...]
    runs: tuple[tuple[int, int, int], ...]


_SIXES = (37, 21, 53, 13, 45, 29, 61, 3, 35, 19, 51, 11, 43, 27, 59, 7, 39)
_NINES = (23, 279, 151, 407, 87, 343, 215, 471, 55, 311, 183, 439, 119, 375)
CODINGS: dict[Mode, Coding] = {
    "low": Coding(
        0xA8, (0, 2, 6, 1, 5, *_SIXES, *_NINES), (3,) * 4 + (6,) * 18 + (9,) * 14,
        ((2, 4, 3), (1, 0, 3)),
    ),
    "high": Coding(
        0x88, (0, 1, *_SIXES, *_NINES, 247), (3,) * 2 + (6,) * 17 + (9,) * 15,
        ((9, 5, 6), (4, 6, 3), (3, 2, 3), (2, 4, 3), (1, 0, 3)),
    ),
}  # fmt: skip

END, END_BITS = 503, 9
#: Behind a last packet that has no room for the end mark.
LONG_END = 0x01F7
LITERAL, LITERAL_BITS = 0b1111, 12
HEADER = 40
ENGINES, BLOCK, LANE = 4, 64, 32
#: A tile is dealt to four engines in blocks of 64 bytes, and an engine counts in 128.
TILE_STEP, MAX_TILE = 512, 65_024
UNIT = 128

#: The bits of a byte, last first.
REVERSED = np.array([int(f"{b:08b}"[::-1], 2) for b in range(256)], np.uint8)
REVERSED.flags.writeable = False

_THRESHOLD = 16  # libstdc++ leaves shorter ranges to the insertion sort


@jit
def copy_words(source: Array, start: Number, out: Array, at: Number, count: Number) -> None:
    """``out[at:at + count] = source[start:start + count]``, both u64.

    Unsigned indices: numba asks of signed ones whether they are negative, and then LLVM does
    not vectorize. Blocks of 64 bytes are dealt at 25 GB/s this way, as bytes with signed
    indices at 1.3.
    """
    s, o = u64(start), u64(at)
    for i in range(u64(count)):
        out[o + u64(i)] = source[s + u64(i)]


@jit
def checks(words: Array, count: Number) -> Number:
    """XOR of the even bytes of ``words[:count]`` (u64), and of the odd ones above it, 16 bits."""
    xor = u64(0)
    for i in range(u64(count)):
        xor ^= words[u64(i)]
    xor ^= xor >> u64(32)
    xor ^= xor >> u64(16)
    return xor & u64(0xFFFF)


@jit
def count_tiles(data: Array, starts: Array, kinds: Array, rows: int) -> Array:
    """How often each byte is in the tiles of each kind, i64 ``[rows, 256]``.

    ``data``: u8; tile t is ``data[starts[t]:starts[t + 1]]`` and of ``kinds[t]``. Into four
    tables in turn: with one, a run of a byte waits for its own last count.
    """
    counts = np.zeros((rows, 256), np.int64)
    parts = np.empty((4, 256), np.int64)
    for t in range(len(kinds)):
        parts[:] = 0
        for i in range(starts[t], starts[t + 1], 4):
            parts[0, data[i]] += 1
            parts[1, data[i + 1]] += 1
            parts[2, data[i + 2]] += 1
            parts[3, data[i + 3]] += 1
        for b in range(256):
            counts[kinds[t], b] += parts[0, b] + parts[1, b] + parts[2, b] + parts[3, b]
    return counts


@jit
def _sift(a: Array, first: int, hole: int, length: int, key: int) -> None:
    top = hole
    child = hole
    while child < (length - 1) // 2:
        child = 2 * (child + 1)
        if a[first + child] >> 8 > a[first + child - 1] >> 8:
            child -= 1
        a[first + hole] = a[first + child]
        hole = child
    if length % 2 == 0 and child == (length - 2) // 2:
        child = 2 * (child + 1)
        a[first + hole] = a[first + child - 1]
        hole = child - 1
    while hole > top and a[first + (hole - 1) // 2] >> 8 > key >> 8:
        a[first + hole] = a[first + (hole - 1) // 2]
        hole = (hole - 1) // 2
    a[first + hole] = key


@jit
def _heap_sort(a: Array, first: int, last: int) -> None:
    length = last - first
    for parent in range((length - 2) // 2, -1, -1):
        _sift(a, first, parent, length, a[first + parent])
    while last - first > 1:
        last -= 1
        key = a[last]
        a[last] = a[first]
        _sift(a, first, 0, last - first, key)


@jit
def _partition(a: Array, first: int, last: int) -> int:
    """Where the range parts around the median of three, which moves to ``first``."""
    x, y, z = first + 1, first + (last - first) // 2, last - 1
    p, q, r = a[x] >> 8, a[y] >> 8, a[z] >> 8
    if p > q:  # noqa: SIM108 - one line of four conditions says nothing
        median = y if q > r else (z if p > r else x)
    else:
        median = x if p > r else (z if q > r else y)
    a[first], a[median] = a[median], a[first]
    pivot = a[first] >> 8
    low, high = first + 1, last
    while True:
        while a[low] >> 8 > pivot:
            low += 1
        high -= 1
        while pivot > a[high] >> 8:
            high -= 1
        if low >= high:
            return low
        a[low], a[high] = a[high], a[low]
        low += 1


@jit
def rank(counts: Array, out: Array) -> None:
    """All 256 bytes by count, most frequent first, into ``out`` (u8 ``[256]``).

    Ties fall as in ``std::sort`` of libstdc++, which CANN uses: an introsort, not stable, over
    (byte, count) in the order of the bytes; so streams are CANN's bit for bit. ``counts``: i64.
    """
    a = np.empty(256, np.int64)
    for b in range(256):
        a[b] = counts[b] << 8 | b
    stack = np.empty((32, 3), np.int64)
    stack[0, 0], stack[0, 1], stack[0, 2] = 0, 256, 16  # 2 * log2(256) levels, then heaps
    depth = 1
    while depth:
        depth -= 1
        first, last, levels = stack[depth, 0], stack[depth, 1], stack[depth, 2]
        while last - first > _THRESHOLD:
            if levels == 0:
                _heap_sort(a, first, last)
                break
            levels -= 1
            cut = _partition(a, first, last)
            stack[depth, 0], stack[depth, 1], stack[depth, 2] = cut, last, levels
            depth += 1
            last = cut
    for i in range(1, 256):
        key, j = a[i], i
        while j and key >> 8 > a[j - 1] >> 8:
            a[j] = a[j - 1]
            j -= 1
        a[j] = key
    for i in range(256):
        out[i] = a[i] & 255
