"""The sparse weight stream by its definition: slow and obvious.

Stated after the outputs of CANN's own encoder (``tests/golden/nz_codec.json``), which it
gives byte for byte.
"""

from __future__ import annotations

import numpy as np

from .tables import (
    BLOCK,
    CODINGS,
    END,
    END_BITS,
    ENGINES,
    HEADER,
    LANE,
    LITERAL,
    LITERAL_BITS,
    REVERSED,
    UNIT,
    Array,
    Coding,
    Mode,
    rank,
)

_ONES = (1 << 64) - 1


def encode(data: Array, tile_bytes: int, mode: Mode) -> tuple[bytes, bytes]:
    """What ``streamq.nz.codec.encode`` gives for ``data`` (u8) with a dictionary per call."""
    stream, index, whole = b"", b"", len(data) // tile_bytes * tile_bytes
    for call in (data[:whole], data[whole:]):
        ranked = np.empty(256, np.uint8)
        rank(np.bincount(call, minlength=256), ranked)
        dictionary = ranked[: len(CODINGS[mode].codes)].tolist()
        for first in range(0, len(call), tile_bytes):
            tile, small = _tile(call[first : first + tile_bytes], CODINGS[mode], dictionary)
            index += (len(tile) // UNIT | small << 15).to_bytes(4, "little")
            index += (len(stream) // UNIT).to_bytes(4, "little")
            stream += tile
    return stream, index


def _tile(tile: Array, coding: Coding, dictionary: list[int]) -> tuple[bytes, bool]:
    """A tile, and whether it is compressed: blocks dealt to engines, engines interleaved."""
    dealt = [tile.reshape(-1, BLOCK)[e::ENGINES].tobytes() for e in range(ENGINES)]
    streams = [_engine(part, coding, dictionary) for part in dealt]
    lanes = [s for s in streams if s is not None]
    small = len(lanes) == ENGINES
    lanes = lanes if small else dealt
    longest = max(len(lane) for lane in lanes)
    longest += -longest % LANE
    padded = b"".join(lane.ljust(longest, b"\0") for lane in lanes)
    return np.frombuffer(padded, f"V{LANE}").reshape(ENGINES, -1).T.tobytes(), small


def _engine(data: bytes, coding: Coding, dictionary: list[int]) -> bytes | None:
    """The stream of one engine, None where it would not be smaller."""
    in_front = len(dictionary) - (HEADER - 6)
    odd, even = (int(np.bitwise_xor.reduce(np.frombuffer(data, np.uint8)[i::2])) for i in (1, 0))
    first = dictionary[:in_front] if in_front else [0, 0]
    out = bytes([coding.mark, len(data) // UNIT, *first, odd, even, *dictionary[in_front:]])
    at = 0
    while True:
        if len(out) >= len(data):
            return None
        bits, length, coded = _packet(data[at : at + 64], coding, dictionary)
        at += coded
        if at == len(data):
            break
        out += bits.to_bytes(8, "little")
    if length + END_BITS <= 64:
        last = bits | END << length
        return out + last.to_bytes(8, "little")[: (length + END_BITS + 7) // 8]
    out += (bits | _ONES << length & _ONES).to_bytes(8, "little")
    return out + b"\xf7\x01" if len(out) < len(data) else None


def _packet(window: bytes, coding: Coding, dictionary: list[int]) -> tuple[int, int, int]:
    """64 bits, how many of them are used, and how many bytes they stand for."""
    bits = length = at = 0
    while at < len(window):
        run = len(window[at:]) - len(window[at:].lstrip(bytes(dictionary[:1])))
        options = [(code, size, zeros) for zeros, code, size in coding.runs if zeros <= run]
        if not run and window[at] in dictionary:
            place = dictionary.index(window[at])
            options = [(coding.codes[place], coding.bits[place], 1)]
        elif not run:
            options = [(LITERAL | int(REVERSED[window[at]]) << 4, LITERAL_BITS, 1)]
        fitting = [option for option in options if length + option[1] <= 64]
        if not fitting:
            return bits | _ONES << length & _ONES, 64, at
        code, size, zeros = fitting[0]
        bits, length, at = bits | code << length, length + size, at + zeros
    return bits, length, at
