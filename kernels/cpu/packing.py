"""Codes of a few bits each, packed into bytes and words, and back again.

Along the columns of a row as ``Packing`` says, and into 32-bit words of the transposed
weight, as AWQ and GPTQ store ``[in, out]``. A code is stored as ``code + offset`` modulo
its range, the first in the lowest bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from streamq.compiled import jit
from streamq.schemes import Packing

from .bits import u8, u32, u64

Array = np.ndarray[Any, Any]

#: A tile that is transposed: 16 words are a line of the cache, 16 x 256 words half of its L1.
TILE_WORDS, TILE_ROWS = 16, 256


def pack(codes: Array, packing: Packing) -> Array:
    """See ``streamq.kernels.reference.pack``."""
    codes = np.ascontiguousarray(codes)
    if packing.kind == "bytes":
        return codes
    if packing.kind == "nibbles":
        return pack_nibbles(codes.view(np.uint8))
    return pack_words(codes, packing.bits, 1 << (packing.bits - 1))


def unpack(packed: Array, packing: Packing, cols: int, signed: bool) -> Array:
    """See ``streamq.kernels.reference.unpack``."""
    packed = np.ascontiguousarray(packed)
    if packing.kind == "bytes":
        return packed
    if packing.kind == "nibbles":
        return unpack_nibbles(packed, cols)
    codes = unpack_words(packed, packing.bits, cols, 1 << (packing.bits - 1) if signed else 0)
    return codes if signed else codes.view(np.uint8)


def pack_nibbles(codes: Array, out: Array | None = None) -> Array:
    """Codes uint8 ``[rows, cols]`` as uint8 ``[rows, ceil(cols / 2)]``, the even column low."""
    rows, cols = codes.shape
    out = np.empty((rows, -(-cols // 2)), np.uint8) if out is None else out
    _pack(4)(codes, np.uint8(0), out)
    return out


def unpack_nibbles(packed: Array, cols: int, out: Array | None = None) -> Array:
    """The inverse of ``pack_nibbles``: uint8 ``[rows, cols]``."""
    out = np.empty((len(packed), cols), np.uint8) if out is None else out
    _unpack(4)(packed, np.uint8(0), out)
    return out


def pack_words(codes: Array, bits: int, offset: int, out: Array | None = None) -> Array:
    """Codes int8 ``[rows, cols]`` as uint8 ``[rows, row bytes]``, whole 32-bit words a row."""
    rows, cols = codes.shape
    out = np.empty((rows, -(-cols * bits // 32) * 4), np.uint8) if out is None else out
    _pack(bits)(codes.view(np.uint8), np.uint8(offset), out)
    return out


def unpack_words(
    packed: Array, bits: int, cols: int, offset: int, out: Array | None = None
) -> Array:
    """The inverse of ``pack_words``: int8 ``[rows, cols]``."""
    out = np.empty((len(packed), cols), np.int8) if out is None else out
    _unpack(bits)(packed, np.uint8(offset), out.view(np.uint8))
    return out


def pack_columns(
    codes: Array,
    bits: int,
    offset: int,
    order: Sequence[int] | None = None,
    out: Array | None = None,
) -> Array:
    """Codes int8 ``[rows, cols]`` packed along the rows: uint32 ``[cols, rows * bits / 32]``.

    Word ``w`` of row ``c`` holds at bit ``i * bits`` the code of column ``c`` in row
    ``w * 32 / bits + order[i]``; AWQ has the order 0, 2, 4, 6, 1, 3, 5, 7. ``bits`` is 2,
    4 or 8, ``rows`` a multiple of ``32 / bits``.
    """
    rows, cols = codes.shape
    out = np.empty((cols, rows * bits // 32), np.uint32) if out is None else out
    assert codes.size * bits == out.size * 32, "rows that do not fill whole words"
    _pack_columns(bits)(codes.view(np.uint8), np.uint8(offset), _places(bits, order), out)
    return out


def unpack_columns(
    packed: Array,
    bits: int,
    offset: int,
    order: Sequence[int] | None = None,
    out: Array | None = None,
) -> Array:
    """The inverse of ``pack_columns``: int8 ``[rows, cols]`` from uint32 ``[cols, words]``."""
    cols, words = packed.shape
    out = np.empty((words * 32 // bits, cols), np.int8) if out is None else out
    _unpack_columns(bits)(packed, np.uint8(offset), _places(bits, order), out.view(np.uint8))
    return out


def pack_rows_transposed(codes: Array, bits: int, offset: int, out: Array | None = None) -> Array:
    """Codes int8 ``[rows, cols]`` packed along the columns: uint32 ``[cols * bits / 32, rows]``.

    Word ``k`` of column ``r`` holds the codes of row ``r`` from column ``k * 32 / bits`` on,
    as GPTQ has them. ``bits`` is 2, 4 or 8, ``cols`` a multiple of ``32 / bits``.
    """
    rows, cols = codes.shape
    out = np.empty((cols * bits // 32, rows), np.uint32) if out is None else out
    assert codes.size * bits == out.size * 32, "columns that do not fill whole words"
    _pack_rows_transposed(bits)(codes.view(np.uint8), np.uint8(offset), out)
    return out


def unpack_rows_transposed(
    packed: Array, bits: int, offset: int, out: Array | None = None
) -> Array:
    """The inverse of ``pack_rows_transposed``: int8 ``[rows, cols]`` from ``[words, rows]``."""
    words, rows = packed.shape
    out = np.empty((rows, words * 32 // bits), np.int8) if out is None else out
    _unpack_rows_transposed(bits)(packed, np.uint8(offset), out.view(np.uint8))
    return out


def _places(bits: int, order: Sequence[int] | None) -> Array:
    """Which of the codes of a word lies at each place."""
    places = np.arange(32 // bits, dtype=np.uint64)
    if order is not None:
        places[:] = order
    return places


# --- kernels: a function of the width in bits, which LLVM then knows: at 4 bits packing ----
# --- takes 60 Gcodes/s and unpacking 18, against 2.2 and 5.8 with the width as an argument. -


@cache
def _pack(width: int) -> Any:
    bits, mask = u64(width), u8((1 << width) - 1)

    @jit
    def pack(codes, offset, out):
        cols = u64(codes.shape[1])
        eights = cols // u64(8)  # eight codes are whole bytes, `bits` of them
        for r in range(u64(codes.shape[0])):
            row, row_out = codes[r], out[r]
            for i in range(eights):
                eight = u64(0)
                for j in range(u64(8)):
                    eight |= u64(u8(row[i * u64(8) + j] + offset) & mask) << (j * bits)
                for j in range(bits):
                    row_out[i * bits + j] = u8(eight >> (j * u64(8)))
            rest = u64(0)
            for i in range(eights * u64(8), cols):
                rest |= u64(u8(row[i] + offset) & mask) << ((i & u64(7)) * bits)
            for o in range(eights * bits, u64(row_out.size)):
                row_out[o] = u8(rest)
                rest >>= u64(8)

    return pack


@cache
def _unpack(width: int) -> Any:
    bits, mask = u64(width), u8((1 << width) - 1)

    @jit
    def unpack(packed, offset, out):
        cols = u64(out.shape[1])
        eights = cols // u64(8)
        for r in range(u64(out.shape[0])):
            row, row_out = packed[r], out[r]
            for i in range(eights):
                eight = u64(0)
                for j in range(bits):
                    eight |= u64(row[i * bits + j]) << (j * u64(8))
                for j in range(u64(8)):
                    row_out[i * u64(8) + j] = u8(u8(eight >> (j * bits)) & mask) - offset
            rest, begun = u64(0), eights * bits
            for o in range(begun, min(begun + bits, u64(row.size))):
                rest |= u64(row[o]) << ((o - begun) * u64(8))
            for i in range(eights * u64(8), cols):
                row_out[i] = u8(u8(rest >> ((i & u64(7)) * bits)) & mask) - offset

    return unpack


@cache
def _pack_columns(width: int) -> Any:
    bits, per, mask = u64(width), u64(32 // width), u8((1 << width) - 1)

    @jit
    def pack(codes, offset, places, out):
        cols, words = u64(out.shape[0]), u64(out.shape[1])
        tile = np.empty((TILE_WORDS, TILE_ROWS), np.uint32)
        for w0 in range(u64(0), words, u64(TILE_WORDS)):
            high = min(u64(TILE_WORDS), words - w0)
            for c0 in range(u64(0), cols, u64(TILE_ROWS)):
                wide = min(u64(TILE_ROWS), cols - c0)
                for w in range(high):
                    line = tile[w]
                    line[:] = u32(0)
                    for i in range(per):
                        row = codes[(w0 + w) * per + places[i]]
                        for c in range(wide):
                            code = u8(row[c0 + c] + offset) & mask
                            line[c] |= u32(code) << u32(i * bits)
                for c in range(wide):
                    row_out = out[c0 + c]
                    for w in range(high):
                        row_out[w0 + w] = tile[w, c]

    return pack


@cache
def _unpack_columns(width: int) -> Any:
    bits, per, mask = u64(width), u64(32 // width), u8((1 << width) - 1)

    @jit
    def unpack(packed, offset, places, out):
        cols, words = u64(packed.shape[0]), u64(packed.shape[1])
        tile = np.empty((TILE_WORDS, TILE_ROWS), np.uint32)
        for w0 in range(u64(0), words, u64(TILE_WORDS)):
            high = min(u64(TILE_WORDS), words - w0)
            for c0 in range(u64(0), cols, u64(TILE_ROWS)):
                wide = min(u64(TILE_ROWS), cols - c0)
                for c in range(wide):
                    row = packed[c0 + c]
                    for w in range(high):
                        tile[w, c] = row[w0 + w]
                for w in range(high):
                    line = tile[w]
                    for i in range(per):
                        row_out = out[(w0 + w) * per + places[i]]
                        for c in range(wide):
                            row_out[c0 + c] = u8(u8(line[c] >> u32(i * bits)) & mask) - offset

    return unpack


@cache
def _pack_rows_transposed(width: int) -> Any:
    bits, per, mask = u64(width), u64(32 // width), u8((1 << width) - 1)

    @jit
    def pack(codes, offset, out):
        words, rows = u64(out.shape[0]), u64(out.shape[1])
        tile = np.empty((TILE_WORDS, TILE_ROWS), np.uint32)
        for r0 in range(u64(0), rows, u64(TILE_WORDS)):
            high = min(u64(TILE_WORDS), rows - r0)
            for k0 in range(u64(0), words, u64(TILE_ROWS)):
                wide = min(u64(TILE_ROWS), words - k0)
                for r in range(high):
                    row, line = codes[r0 + r], tile[r]
                    for k in range(wide):
                        word = u32(0)
                        for i in range(per):
                            code = u8(row[(k0 + k) * per + i] + offset) & mask
                            word |= u32(code) << u32(i * bits)
                        line[k] = word
                for k in range(wide):
                    row_out = out[k0 + k]
                    for r in range(high):
                        row_out[r0 + r] = tile[r, k]

    return pack


@cache
def _unpack_rows_transposed(width: int) -> Any:
    bits, per, mask = u64(width), u64(32 // width), u8((1 << width) - 1)

    @jit
    def unpack(packed, offset, out):
        words, rows = u64(packed.shape[0]), u64(packed.shape[1])
        tile = np.empty((TILE_WORDS, TILE_ROWS), np.uint32)
        for r0 in range(u64(0), rows, u64(TILE_WORDS)):
            high = min(u64(TILE_WORDS), rows - r0)
            for k0 in range(u64(0), words, u64(TILE_ROWS)):
                wide = min(u64(TILE_ROWS), words - k0)
                for k in range(wide):
                    row = packed[k0 + k]
                    for r in range(high):
                        tile[r, k] = row[r0 + r]
                for r in range(high):
                    line, row_out = tile[r], out[r0 + r]
                    for k in range(wide):
                        for i in range(per):
                            code = u8(u8(line[k] >> u32(i * bits)) & mask) - offset
                            row_out[(k0 + k) * per + i] = code

    return unpack
