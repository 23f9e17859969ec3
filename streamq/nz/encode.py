"""Tiles to streams: the coder of CANN's weight compression, compiled.

``streamq.nz.reference`` is the definition. Here a state machine codes byte by byte: the state
is the number of zero bytes that wait for their run code, and one table gives, for a state and
a byte, the bits to emit and the next state.
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
    u32,
    u64,
)  # fmt: skip

#: An entry of the table: code (18 bits), its length (6), the next state.
_CODE, _LENGTH_AT, _STATE_AT = 0x3FFFF, 18, 24
_WORDS = BLOCK // 8


def _zeros(mode: Mode, zeros: int, room: int) -> tuple[int, int, int]:
    """Code, bits and zero bytes coded when ``zeros`` of them are to go into ``room`` bits."""
    code = bits = done = 0
    for run, run_code, run_bits in CODINGS[mode].runs:
        while zeros - done >= run and bits + run_bits <= room:
            code, bits, done = code | run_code << bits, bits + run_bits, done + run
    return code, bits, done


class Plan:
    """What the coder knows of a mode, as arrays.

    ``codes``: u32 ``[ranks, 2]``, code and bits. ``flush``: u32 ``[longest, 2]``, the codes of
    so many zero bytes before another byte. ``run``: u32 ``[2]``, the code of the longest run.
    ``tails``: i64 ``[longest + 1, 3, 3]``, for so many zero bytes at the end of a packet with
    room for 0, 1, or more codes of 3 bits: what ``_zeros`` says.
    """

    def __init__(self, mode: Mode) -> None:
        coding = CODINGS[mode]
        longest, *run = coding.runs[0]
        self.mark = coding.mark
        self.codes = np.array([coding.codes, coding.bits], np.uint32).T.copy()
        self.run = np.array(run, np.uint32)
        self.flush = np.array([_zeros(mode, n, 6)[:2] for n in range(longest)], np.uint32)
        self.tails = np.array(
            [[_zeros(mode, n, room) for room in (0, 3, 6)] for n in range(longest + 1)], np.int64
        )


PLANS: dict[Mode, Plan] = {"low": Plan("low"), "high": Plan("high")}


@jit
def fill_table(ranked: Array, codes: Array, run: Array, flush: Array, table: Array) -> None:
    """The table for one dictionary. ``ranked``: u8; ``table``: u32 ``[256, states]``."""
    alone = np.empty((256, 2), np.uint32)
    for b in range(256):
        alone[b, 0] = u32(LITERAL) | u32(REVERSED[b]) << u32(4)
        alone[b, 1] = LITERAL_BITS
    for r in range(1, len(codes)):
        alone[ranked[r], 0], alone[ranked[r], 1] = codes[r, 0], codes[r, 1]
    zero = ranked[0]
    for state in range(len(flush)):
        before, length = flush[state, 0], flush[state, 1]
        for b in range(256):
            table[b, state] = (
                before | alone[b, 0] << length | (length + alone[b, 1]) << u32(_LENGTH_AT)
            )
        table[zero, state] = u32(state + 1) << u32(_STATE_AT)
    table[zero, len(flush) - 1] = run[0] | run[1] << u32(_LENGTH_AT)


@jit
def _packet(
    data: Array, first: Number, stop: Number, table: Array, zero: Number, tails: Array
) -> tuple[Number, Number, Number]:
    """Code what fits into 64 bits of ``data[first:stop]``.

    Where the next packet starts, the packet, its length in bits: 64 if it was filled with ones.
    """
    bits, at, state, i = u64(0), u64(0), u64(0), u64(first)
    while i < u64(stop):
        entry = table[u64(data[i]), state]
        length = u64(entry >> u32(_LENGTH_AT)) & u64(63)
        if at + length > u64(63):
            break
        bits |= u64(entry & u32(_CODE)) << at
        at += length
        state = u64(entry >> u32(_STATE_AT))
        i += u64(1)
    # Of zero bytes some may fit yet. By a table: 320 MB/s, with loops over the runs 203.
    tail = tails[
        state + u64(i < u64(stop) and data[i] == zero), min(u64(63) - at, u64(6)) // u64(3)
    ]
    bits |= u64(tail[0]) << at
    at += u64(tail[1])
    i += u64(tail[2]) - state
    if i < u64(stop):
        bits |= ~u64(0) << at
        at = u64(64)
    return np.int64(i), bits, np.int64(at)


@jit
def _engine(
    data: Array, mark: Number, ranked: Array, ranks: Number, table: Array, tails: Array, out: Array
) -> Number:
    """Code what one engine gets, ``data`` u8, into ``out`` (u64); its bytes, 0 for bypass."""
    size = len(data)
    xor = checks(data.view(np.uint64), size // 8)
    head = out.view(np.uint8)
    head[0], head[1], head[2], head[3] = mark, size // UNIT, 0, 0
    head[4], head[5] = u8(xor >> u64(8)), u8(xor)
    in_front = ranks - (HEADER - 6)
    head[0], head[1], head[2], head[3] = mark, size // UNIT, 0, 0
    head[4], head[5] = u8(xor >> u64(8)), u8(xor)
    for r in range(ranks):
        head[2 + r if r < in_front else 6 + r - in_front] = ranked[r]
    w, i = HEADER // 8, 0
    while True:
        if 8 * w >= size:
            return 0
        i, bits, at = _packet(data, i, min(i + 64, size), table, ranked[0], tails)
        if i == size:
            break
        out[w] = bits
        w += 1
    if at + END_BITS <= 64:
        out[w] = bits | u64(END) << u64(at)
        return 8 * w + (at + END_BITS + 7) // 8
    out[w] = bits | (~u64(0) << u64(at) if at < 64 else u64(0))
    w += 1
    if 8 * w >= size:
        return 0
    out[w] = LONG_END
    return 8 * w + 2


@jit
def _interleave(lanes: Array, pitch: Number, out: Array, at: Number, count: Number) -> None:
    """32 bytes of each engine in turn; all u64, an engine every ``pitch`` words."""
    step = LANE // 8
    for i in range(0, count, step):
        for e in range(ENGINES):
            copy_words(lanes, e * pitch + i, out, at + i * ENGINES + e * step, step)


@jit
def encode_tiles(
    data: Array,
    starts: Array,
    dictionaries: Array,
    kinds: Array,
    mark: Number,
    codes: Array,
    run: Array,
    flush: Array,
    tails: Array,
    out: Array,
    units: Array,
) -> Number:
    """Code the tiles ``data[starts[t]:starts[t + 1]]`` (u8) into ``out`` (u8); the bytes written.

    ``dictionaries``: u8 ``[n, 256]``, bytes by rank; ``kinds``: which a tile has. ``units``:
    i64 ``[tiles, 2]`` takes the length in 128 bytes and whether it is compressed. A tile
    never grows, so ``out`` of the size of the data is enough.
    """
    table = np.empty((256, 2 if len(flush) == 2 else 16), np.uint32)
    most = 0
    for t in range(len(starts) - 1):
        most = max(most, starts[t + 1] - starts[t])
    most //= ENGINES * 8
    dealt = np.empty(ENGINES * most, np.uint64)
    pitch = most + 4
    lanes = np.empty(ENGINES * pitch, np.uint64)
    words, packed, at = data.view(np.uint64), out.view(np.uint64), 0
    for t in range(len(starts) - 1):
        ranked = dictionaries[kinds[t]]
        if t == 0 or kinds[t] != kinds[t - 1]:
            fill_table(ranked, codes, run, flush, table)
        size = (starts[t + 1] - starts[t]) // (ENGINES * 8)
        for block in range(0, size, _WORDS):
            for e in range(ENGINES):
                start = starts[t] // 8 + block * ENGINES + e * _WORDS
                copy_words(words, start, dealt, e * size + block, _WORDS)
        lanes[:] = u64(0)
        longest, smaller = 0, True
        for e in range(ENGINES):
            engine = dealt[e * size : (e + 1) * size].view(np.uint8)
            lane = lanes[e * pitch : (e + 1) * pitch]
            length = _engine(engine, mark, ranked, len(codes), table, tails, lane)
            longest, smaller = max(longest, length), length > 0
            if not smaller:
                break
        count = (longest + LANE - 1) // LANE * (LANE // 8) if smaller else size
        if smaller:
            _interleave(lanes, pitch, packed, at, count)
        else:
            _interleave(dealt, size, packed, at, count)
        units[t, 0], units[t, 1] = count * ENGINES * 8 // UNIT, smaller
        at += count * ENGINES
    return at * 8
