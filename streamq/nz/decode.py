"""Streams to tiles, compiled; nothing a stream says is believed before it was checked.

Whatever the bytes are, a packet takes 8 of them and a tile has a fixed size, so the work is
bounded; reads end with the stream's part and writes with the tile.
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
    LONG_END,
    REVERSED,
    UNIT,
    Array,
    Mode,
    Number,
    checks,
    copy_words,
    jit,
    u8,
    u64,
)  # fmt: skip

#: Why a tile cannot be decoded, by the code that ``decode_tiles`` returns.
REASONS = (
    "",
    "does not begin as a stream does",
    "has a header for another tile size",
    "ends before its data does",
    "has a code that stands for nothing",
    "has packets that do not end as packets do",
    "has no end mark behind its data",
    "has bytes that do not fit its check sum",
    "has another length than its index says",
)  # fmt: skip
_NOTHING = -100
_OK, _BEGIN, _SIZE, _SHORT, _CODE, _PACKET, _END, _SUM, _LENGTH = range(len(REASONS))

#: Bytes that a look-up may write behind the data it stands for.
_SLACK = 32
_LOW, _HIGH = CODINGS["low"].mark, CODINGS["high"].mark
_ONES = 0xFFFFFFFFFFFFFFFF


def _lookup(mode: Mode) -> Array:
    """What the lowest 9 bits of a packet mean: i16 ``[512, 6]``.

    The columns: bits, bytes, then up to three ranks, with a run of n zero bytes as -n and
    nothing as _NOTHING. 0 bits: a literal, the end, or no code. A symbol is taken only while all
    fits into 9 bits and 16 bytes, of which the last 8 are zero bytes.
    """
    coding = CODINGS[mode]
    symbols = {(c, b): r for r, (c, b) in enumerate(zip(coding.codes, coding.bits, strict=True))}
    symbols |= {(code, bits): -run for run, code, bits in coding.runs}
    table = np.full((512, 6), _NOTHING, np.int16)
    for window in range(512):
        at, size = 0, 0
        found: list[int] = []
        while True:
            fits = [
                (bits, symbol)
                for (code, bits), symbol in symbols.items()
                if at + bits <= 9 and (window >> at) & ((1 << bits) - 1) == code
            ]
            if not fits:
                break
            ((bits, symbol),) = fits
            more = max(-symbol, 1)
            if size + more > 16 or (size + 1 > 8 and symbol > 0):
                break
            at, size, found = at + bits, size + more, [*found, symbol]
        table[window, 0], table[window, 1] = at, size
        table[window, 2 : 2 + len(found)] = found
    return table


#: By whether the mode is HIGH.
LOOKUPS = np.stack([_lookup("low"), _lookup("high")])
LOOKUPS.flags.writeable = False


@jit
def _learn(head: Array, high: bool, table: Array) -> None:
    """The look-up for the dictionary of a header (u8 ``[40]``).

    ``table``: u64 ``[513, 2]``, for 9 bits eight bytes, and their number << 8 | bits; in the
    last row eight zero bytes.
    """
    ranked = np.zeros(36, np.uint8)
    in_front = 0 if high else 2
    for r in range(in_front):
        ranked[r] = head[2 + r]
    for r in range(HEADER - 6):
        ranked[in_front + r] = head[6 + r]
    lookup = LOOKUPS[1 if high else 0]
    zero = u64(ranked[0])
    zeros = zero * u64(0x0101010101010101)
    table[512, 0] = zeros
    for window in range(512):
        value, at = zeros, 0
        for s in range(3):
            symbol = lookup[window, 2 + s]
            if symbol == _NOTHING:
                break
            if symbol > 0:
                value ^= (u64(ranked[symbol]) ^ zero) << u64(8 * at)
                at += 1
            else:
                at -= symbol
        table[window, 0] = value
        table[window, 1] = u64(lookup[window, 1]) << u64(8) | u64(lookup[window, 0])


@jit
def _store(out: Array, at: Number, value: Number) -> None:
    """Eight bytes, lowest first; one instruction once compiled."""
    for b in range(8):
        out[u64(at) + u64(b)] = u8(value >> u64(8 * b))


@jit
def _engine(
    words: Array, count: Number, table: Array, high: bool, out: Array, size: Number
) -> Number:
    """Decode ``count`` words (u64) into ``out[:size]``; where they end in bytes, or -reason."""
    ones = u64(_ONES)
    zeros = table[512, 0]
    w, i, full = HEADER // 8, u64(0), u64(size)
    while True:
        if w >= count:
            return -_SHORT
        bits, at, end = words[w], u64(0), min(i + u64(64), full)
        w += 1
        while i < end:
            window = bits & u64(511)
            meaning = table[window, 1]
            length = meaning & u64(255)
            if length:
                _store(out, i, table[window, 0])
                if high:
                    _store(out, i + u64(8), zeros)
                i += meaning >> u64(8)
            elif at + u64(LITERAL_BITS) > u64(64):
                break
            elif window & u64(15) == u64(LITERAL):
                out[i] = REVERSED[(bits >> u64(4)) & u64(255)]
                length = u64(LITERAL_BITS)
                i += u64(1)
            else:
                return -_CODE
            # Ones come in from above: what is cut off looks like the fill of a packet.
            bits = (bits >> length) | ~(ones >> length)
            at += length
        if i < end:
            if at > u64(64) or bits != ones:
                return -_PACKET
            continue
        if end < full:
            i = end  # behind 64 bytes a packet is zeros, which read as zero bytes
            continue
        if i > full or at > u64(64):
            return -_PACKET
        if at + u64(END_BITS) <= u64(64):
            if bits & u64(511) != u64(END):
                return -_END
            return 8 * w - 8 + (np.int64(at) + END_BITS + 7) // 8
        if bits != ones:
            return -_PACKET
        if w >= count or words[w] & u64(0xFFFF) != u64(LONG_END):
            return -_END
        return 8 * w + 2


@jit
def _tile(
    stream: Array, start: Number, count: Number, out: Array, first: Number, size: Number,
    engine: Array, lane: Array, table: Array, known: Array,
) -> Number:  # fmt: skip
    """Decode a tile: ``count`` words an engine to ``size`` words an engine; 0, or why not.

    ``stream``, ``out``: u64, from ``start`` and ``first``. ``engine``: u8; ``lane``: u64.
    ``known``: u8 ``[40]``, the header that ``table`` was made for.
    """
    step, words = LANE // 8, BLOCK // 8
    head, decoded = lane.view(np.uint8), engine.view(np.uint64)
    longest = 0
    for e in range(ENGINES):
        for i in range(0, count, step):
            copy_words(stream, start + i * ENGINES + e * step, lane, i, step)
        if head[0] != _LOW and head[0] != _HIGH:
            return _BEGIN
        if head[1] != size * 8 // UNIT:
            return _SIZE
        high = head[0] == _HIGH
        same = head[0] == known[0] and head[2] == known[2] and head[3] == known[3]
        for i in range(6, HEADER):
            same &= head[i] == known[i]
        if not same:
            _learn(head, high, table)
            known[:] = head[:HEADER]
        used = _engine(lane, count, table, high, engine, size * 8)
        if used < 0:
            return -used
        longest = max(longest, used)
        if checks(decoded, size) != u64(head[4]) << u64(8) | u64(head[5]):
            return _SUM
        for i in range(0, size, words):
            copy_words(decoded, i, out, first + i * ENGINES + e * words, words)
    return _OK if (longest + LANE - 1) // LANE * step == count else _LENGTH


@jit
def _raw_tile(stream: Array, start: Number, out: Array, first: Number, size: Number) -> None:
    """A tile that was not compressed: dealt to engines in 64 bytes, interleaved in 32."""
    step, words = LANE // 8, BLOCK // 8
    for i in range(0, size, words):
        for e in range(ENGINES):
            at = first + i * ENGINES + e * words
            copy_words(stream, start + i * ENGINES + e * step, out, at, step)
            copy_words(stream, start + (i + step) * ENGINES + e * step, out, at + step, step)


@jit
def decode_tiles(stream: Array, entries: Array, starts: Array, out: Array) -> tuple[Number, Number]:
    """Decode tiles into ``out[starts[t] - starts[0]:]`` (u8); (tile, reason) of the first bad.

    ``entries``: i64 ``[tiles, 3]``, offset and length in bytes, both inside of ``stream``
    (u8), and whether it is compressed; a raw one has the length of its tile. ``starts``: i64
    ``[tiles + 1]``.
    """
    most = 0
    for t in range(len(entries)):
        most = max(most, starts[t + 1] - starts[t])
    engine = np.zeros(most // ENGINES + _SLACK, np.uint8)
    lane = np.zeros(max(most // ENGINES, HEADER) // 8, np.uint64)
    table = np.zeros((513, 2), np.uint64)
    known = np.zeros(HEADER, np.uint8)
    words, decoded = stream[: len(stream) // 8 * 8].view(np.uint64), out.view(np.uint64)
    for t in range(len(entries)):
        size = (starts[t + 1] - starts[t]) // (ENGINES * 8)
        start, first = entries[t, 0] // 8, (starts[t] - starts[0]) // 8
        if entries[t, 2]:
            count = entries[t, 1] // (ENGINES * 8)
            reason = _tile(words, start, count, decoded, first, size, engine, lane, table, known)
            if reason:
                return t, reason
        else:
            _raw_tile(words, start, decoded, first, size)
    return 0, _OK
