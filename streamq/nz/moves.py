"""The moves of FRACTAL_NZ, compiled: 32 bytes at a time, or tiles of a transpose."""

from __future__ import annotations

from .tables import Array, Number, jit, u8, u64

_LINES, _BYTES = 16, 32
#: Columns that are transposed in one go.
_COLUMNS = 64


@jit
def _load(x: Array, row: Number, at: Number) -> Number:
    """Eight bytes of a row, lowest first; one instruction once compiled."""
    value = u64(0)
    for b in range(8):
        value |= u64(x[row, at + u64(b)]) << u64(8 * b)
    return value


@jit
def _store(x: Array, row: Number, at: Number, value: Number) -> None:
    """``_load`` the other way."""
    for b in range(8):
        x[row, at + u64(b)] = u8(value >> u64(8 * b))


@jit
def _copy(source: Array, row: Number, at: Number, out: Array, line: Number, place: Number) -> None:
    """32 bytes. All are loaded before one is stored: LLVM cannot know that they do not overlap."""
    a, b = _load(source, row, at), _load(source, row, at + u64(8))
    c, d = _load(source, row, at + u64(16)), _load(source, row, at + u64(24))
    _store(out, line, place, a)
    _store(out, line, place + u64(8), b)
    _store(out, line, place + u64(16), c)
    _store(out, line, place + u64(24), d)


@jit
def rows_in(rows: Array, fragments: Array, first: Number, last: Number) -> None:
    """Rows (u8 ``[r, bytes]``) to ``fragments[:, first:last]`` (u8 ``[K1, lines, 32]``).

    Lines behind the rows, up to ``last``, become zeros, as does the end of a fragment that a
    row does not fill. 16 rows at a time, two fragments of each: reads are whole lines of the
    cache, writes 512 bytes in a row (10.4 GB/s; 64 rows at a time 6.9).
    """
    count, size = rows.shape
    whole, lines = size // _BYTES, fragments.shape[1]
    flat = fragments.reshape(len(fragments) * lines, _BYTES)
    for top in range(0, count, _LINES):
        bottom = min(top + _LINES, count)
        for pair in range(u64(0), u64(whole), u64(2)):
            for r in range(u64(top), u64(bottom)):
                for k in range(pair, min(pair + u64(2), u64(whole))):
                    line = k * u64(lines) + u64(first) + r
                    _copy(rows, r, k * u64(_BYTES), flat, line, u64(0))
        for k in range(whole, len(fragments)):
            for r in range(top, bottom):
                for c in range(_BYTES):
                    at = k * _BYTES + c
                    fragments[k, first + r, c] = rows[r, at] if at < size else u8(0)
    fragments[:, first + count : last] = u8(0)


@jit
def rows_out(fragments: Array, first: Number, rows: Array) -> None:
    """``rows_in`` the other way: ``rows`` (u8 ``[r, bytes]``) from line ``first`` on."""
    count, size = rows.shape
    whole, lines = size // _BYTES, fragments.shape[1]
    flat = fragments.reshape(len(fragments) * lines, _BYTES)
    for top in range(0, count, _LINES):
        bottom = min(top + _LINES, count)
        for pair in range(u64(0), u64(whole), u64(2)):
            for r in range(u64(top), u64(bottom)):
                for k in range(pair, min(pair + u64(2), u64(whole))):
                    line = k * u64(lines) + u64(first) + r
                    _copy(flat, line, u64(0), rows, r, k * u64(_BYTES))
        for r in range(top, bottom):
            for at in range(whole * _BYTES, size):
                rows[r, at] = fragments[whole, first + r, at - whole * _BYTES]


@jit
def _swap(a: Number, b: Number, mask: Number, shift: Number) -> tuple[Number, Number]:
    """Exchange the fields of ``a`` above ``mask`` with those of ``b`` below it."""
    difference = ((a >> shift) ^ b) & mask
    return a ^ (difference << shift), b ^ difference


@jit
def _turn(source: Array, row: Number, at: Number, out: Array, line: Number, place: Number) -> None:
    """Transpose 8 x 8 bytes in registers."""
    a, b = _load(source, row, at), _load(source, row + u64(1), at)
    c, d = _load(source, row + u64(2), at), _load(source, row + u64(3), at)
    e, f = _load(source, row + u64(4), at), _load(source, row + u64(5), at)
    g, h = _load(source, row + u64(6), at), _load(source, row + u64(7), at)
    mask, shift = u64(0x00000000FFFFFFFF), u64(32)
    a, e = _swap(a, e, mask, shift)
    b, f = _swap(b, f, mask, shift)
    c, g = _swap(c, g, mask, shift)
    d, h = _swap(d, h, mask, shift)
    mask, shift = u64(0x0000FFFF0000FFFF), u64(16)
    a, c = _swap(a, c, mask, shift)
    b, d = _swap(b, d, mask, shift)
    e, g = _swap(e, g, mask, shift)
    f, h = _swap(f, h, mask, shift)
    mask, shift = u64(0x00FF00FF00FF00FF), u64(8)
    a, b = _swap(a, b, mask, shift)
    c, d = _swap(c, d, mask, shift)
    e, f = _swap(e, f, mask, shift)
    g, h = _swap(g, h, mask, shift)
    _store(out, line, place, a)
    _store(out, line + u64(1), place, b)
    _store(out, line + u64(2), place, c)
    _store(out, line + u64(3), place, d)
    _store(out, line + u64(4), place, e)
    _store(out, line + u64(5), place, f)
    _store(out, line + u64(6), place, g)
    _store(out, line + u64(7), place, h)


@jit
def columns_in(rows: Array, fragments: Array, first: Number) -> None:
    """Rows ``first`` and on (``[r, cols]``) as columns of ``fragments`` (``[K1, lines, K0]``).

    The lines behind the last column become zeros, and so do the columns behind the rows up to
    the end of their fragment.
    """
    count, cols = rows.shape
    lines, k0 = u64(fragments.shape[1]), u64(fragments.shape[2])
    end = (u64(first + count) + k0 - u64(1)) // k0 * k0
    for left in range(u64(0), lines, u64(_COLUMNS)):
        for at in range(u64(first) // k0 * k0, end, k0):
            low, high = max(at, u64(first)), min(at + k0, u64(first + count))
            for j in range(left, min(left + u64(_COLUMNS), lines)):
                if j >= u64(cols):
                    for c in range(low - at, k0):
                        fragments[at // k0, j, c] = 0
                    continue
                for r in range(low, high):
                    fragments[at // k0, j, r - at] = rows[r - u64(first), j]
                for c in range(high - at, k0):
                    fragments[at // k0, j, c] = 0


@jit
def columns_out(fragments: Array, first: Number, rows: Array) -> None:
    """``columns_in`` the other way."""
    count, cols = rows.shape
    k0 = u64(fragments.shape[2])
    for left in range(u64(0), u64(cols), u64(_COLUMNS)):
        for r in range(u64(count)):
            at = u64(first) + r
            for j in range(left, min(left + u64(_COLUMNS), u64(cols))):
                rows[r, j] = fragments[at // k0, j, at % k0]


@jit
def bytes_in(rows: Array, fragments: Array, first: Number) -> None:
    """``columns_in`` for bytes, where ``first`` is a multiple of 32: 8 x 8 at a time.

    3.7 GB/s, byte by byte 0.7. What is no whole fragment, or behind the last 8 columns, goes
    byte by byte.
    """
    count, cols = rows.shape
    lines = fragments.shape[1]
    flat = fragments.reshape(len(fragments) * lines, _BYTES)
    whole, wide = count // _BYTES * _BYTES, cols // 8 * 8
    for top in range(u64(0), u64(whole), u64(_BYTES)):
        line = u64(first + top) // u64(_BYTES) * u64(lines)
        for block in range(u64(0), u64(wide), u64(_COLUMNS)):
            for r in range(u64(0), u64(_BYTES), u64(8)):
                for left in range(block, min(block + u64(_COLUMNS), u64(wide)), u64(8)):
                    _turn(rows, top + r, left, flat, line + left, r)
        part = (first + top) // _BYTES
        fragments[part, wide:] = u8(0)
        for r in range(_BYTES):
            for j in range(wide, cols):
                fragments[part, j, r] = rows[top + r, j]
    if whole < count:
        columns_in(rows[whole:], fragments, first + whole)


@jit
def bytes_out(fragments: Array, first: Number, rows: Array) -> None:
    """``bytes_in`` the other way."""
    count, cols = rows.shape
    lines = fragments.shape[1]
    flat = fragments.reshape(len(fragments) * lines, _BYTES)
    whole, wide = count // _BYTES * _BYTES, cols // 8 * 8
    for top in range(u64(0), u64(whole), u64(_BYTES)):
        line = u64(first + top) // u64(_BYTES) * u64(lines)
        for block in range(u64(0), u64(wide), u64(_COLUMNS)):
            for r in range(u64(0), u64(_BYTES), u64(8)):
                for left in range(block, min(block + u64(_COLUMNS), u64(wide)), u64(8)):
                    _turn(flat, line + left, r, rows, top + r, left)
        part = (first + top) // _BYTES
        for r in range(_BYTES):
            for j in range(wide, cols):
                rows[top + r, j] = fragments[part, j, r]
    if whole < count:
        columns_out(fragments, first + whole, rows[whole:])


@jit
def nibbles_in(rows: Array, fragments: Array, first: Number) -> None:
    """``columns_in`` for two elements of 4 bits a byte, u8 on both sides."""
    count, size = rows.shape
    lines, k0 = fragments.shape[1], 2 * _BYTES
    for at in range(first, first + count):
        part, place = at // k0, at % k0
        shift = u8(4 * (place & 1))
        keep = u8(15) if place & 1 else u8(0)
        for j in range(u64(size)):
            pair = rows[u64(at - first), j]
            for half in range(u64(2)):
                line = u64(2) * j + half
                old = fragments[u64(part), line, u64(place // 2)] & keep
                nibble = u8(pair >> u8(u64(4) * half)) & u8(15)
                fragments[u64(part), line, u64(place // 2)] = old | nibble << shift
        for line in range(2 * size, lines):
            if not place & 1:
                fragments[part, line, place // 2] = 0
    at = first + count
    if at % k0:
        fragments[at // k0, :, (at % k0 + 1) // 2 :] = u8(0)


@jit
def nibbles_out(fragments: Array, first: Number, rows: Array) -> None:
    """``nibbles_in`` the other way."""
    count, size = rows.shape
    k0 = 2 * _BYTES
    for r in range(count):
        part, place = (first + r) // k0, (first + r) % k0
        shift = u8(4 * (place & 1))
        for j in range(u64(size)):
            low = (fragments[u64(part), u64(2) * j, u64(place // 2)] >> shift) & u8(15)
            high = (fragments[u64(part), u64(2) * j + u64(1), u64(place // 2)] >> shift) & u8(15)
            rows[u64(r), j] = low | high << u8(4)
