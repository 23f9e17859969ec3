"""What quantizing lost: energies of a weight and of its error, from the codes as written.

On request also the largest error, how many weights were clipped, and how errors are distributed.

Computed in units of the row, so that a loader which overflows f32 at the very end of its
range is not seen here. The scales of a row are spread over its elements first: one flat
loop then reads codes and weights and adds up squares, 23 GB/s of bf16 for NVFP4, against
19 with the values of the codes in memory and 13 block by block.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba.extending import register_jitable

from streamq.compiled import jit
from streamq.schemes import Quantized, Scheme

from .bits import ABS_MASK, amax_bits, f32, i32, u8, u32, u64, value, widen

Array = np.ndarray[Any, Any]

f64, i8 = np.float64, np.int8

#: Elements, or pairs of them, summed in f32 before they are added to an f64.
RUN = 1024

#: One element of so many goes into the distribution of errors; prime, so that every place in a
#: block is seen. All of them would cost as much as quantizing.
SAMPLED = 127
#: The distribution: bins of half an octave, 3.01 dB, below the largest weight of the row; the
#: last has all the rest.
BINS = 48


@register_jitable
def _twice_e2m1(code):
    """Twice the value of a code, whose magnitude is a digit of one constant."""
    twice = u32(0xC8643210) >> u32((code & u32(7)) << u32(2))
    v = f32(i32(twice & u32(15)))
    return u32(f32(v).view(u32) | u32((code & u32(8)) << u32(28))).view(f32)


@register_jitable
def _e4m3(code):
    """Value of a code that is no NaN; its subnormals are subnormals of f32 on the way.

    20 GB/s of bf16, against 14 with cases for subnormals and NaN.
    """
    bits = u32(i32(i32(i8(code)) << i32(20)))
    return f32(u32(bits & u32(0x87F00000)).view(f32) * f32(2.0**120))


@register_jitable
def _unit(top):
    """Exponent of a power of two near the largest of a row: squares in it stay within f32."""
    return u32(min(max(u32(top >> u32(23)), u32(32)), u32(253)))


@register_jitable
def bin_of(error, top):
    """The bin of the magnitude of an error, in a row whose largest magnitude is ``top``.

    From the bits of the quotient, as a logarithm takes as long as 60 elements of the sums.
    """
    if error == 0:
        return BINS - 1
    bits = u32(f32(f32(error) / f32(top)).view(u32))
    octave, upper = i32(bits >> u32(23)), i32(u32(bits & u32(0x7FFFFF)) >= u32(0x3504F3))
    return min(max(i32(253) - i32(2) * octave - upper, 0), BINS - 1)


@register_jitable
def _spread(per_block, factor, width, out):
    """Each block's scale times ``factor`` at each of its elements.

    Bounded, so that codes of 0 can be multiplied with it: a row far below has no others.
    """
    n, begun = u64(out.size), u64(0)
    if u64(8) <= width <= u64(64) and width & (width - u64(1)) == u64(0):
        # By 16 with two scales, as LLVM leaves shorter loops scalar: NVFP4 18 against 11 GB/s.
        shift = u64(3)
        while width >> shift > u64(1):
            shift += u64(1)
        begun = n >> max(shift, u64(4)) << max(shift, u64(4))
        for first in range(u64(0), begun, u64(16)):
            low = min(f32(per_block[first >> shift] * factor), f32(1e34))
            high = min(f32(per_block[(first + u64(8)) >> shift] * factor), f32(1e34))
            for i in range(u64(16)):
                out[first + i] = low if i < u64(8) else high
    for block in range(begun // width, (n + width - u64(1)) // width):
        s = min(f32(per_block[block] * factor), f32(1e34))
        for i in range(block * width, min(n, (block + u64(1)) * width)):
            out[i] = s


@cache
def sums(element: str, paired: bool, zeroed: bool, detailed: bool = False) -> Any:
    """The kernel for an element type, two codes or one a byte, with or without zero points.

    ``f(x, codes, flip, scale, zero, g, br, bc, out, reach, member, bins)``: sums of
    squares of ``x [rows, cols]`` (bits) and of what its codes miss into ``out`` f64 ``[rows, 2]``.
    ``codes`` uint8: pairs of e2m1 or of offset binary; e4m3; or int8 with its bits turned over
    where ``flip`` has them. ``scale`` and ``zero`` f32 ``[row blocks, col blocks]`` of ``br`` by
    ``bc``, ``g`` f32 ``[rows]`` what the scale is divided by. Pairs need ``bc`` and ``cols`` to be
    even.

    ``detailed``: instead by the ``member`` int64 ``[rows]`` that a row belongs to, added to
    ``out`` f64 ``[members, 4]``, with the largest error and the number of errors above ``reach``
    codes; and a sample of the errors counted in ``bins`` int64 ``[members, BINS]``. These three
    are looked at only then.
    """
    e2m1, e4m3 = element == "e2m1", element == "e4m3"
    unit_of_codes = f32(0.5 if e2m1 else 1)
    offset = f32(8 if paired and not e2m1 else 0)

    @register_jitable
    def value_of(code, odd, flip):
        if paired:
            nibble = u32(code >> u8(4)) if odd else u32(code & u8(15))
            return _twice_e2m1(nibble) if e2m1 else f32(i32(nibble))
        return _e4m3(code) if e4m3 else f32(i8(code ^ flip))

    @register_jitable
    def bits_of(error):
        return u32(f32(error).view(u32) & ABS_MASK)

    @register_jitable
    def over(error, limit):
        """Above 0 where an error is above the limit; a float's bits have its sign."""
        return i32(f32(abs(f32(error)) - f32(limit)).view(i32))

    @register_jitable
    def error_at(row, row_codes, i, inverse, scales, zeros, flip):
        """An error by itself, in units of the row."""
        at = i // u64(2 if paired else 1)
        z = zeros[at] + offset if zeroed else offset
        v = value_of(row_codes[at], paired and i % u64(2) == u64(1), flip)
        return abs(f32(value(row, i) * inverse) - (v - z) * scales[at])

    @jit(fastmath={"reassoc", "contract"})  # a SQNR is not a checkpoint byte
    def kernel(x, codes, flip, scale, zero, g, br, bc, out, reach, member, bins):
        step = u64(2 if paired else 1)
        n, width = u64(x.shape[1]) // step, u64(bc) // step
        scales, zeros = np.empty(n, np.float32), np.empty(n, np.float32)
        for r in range(u64(x.shape[0])):
            row, row_codes = x[r], codes[r]
            largest = widen(amax_bits(row, u64(0), u64(row.size)))
            unit = _unit(largest)
            inverse = u32(u32(u32(254) - unit) << u32(23)).view(f32)
            _spread(scale[r // u64(br)], f32(f32(inverse / g[r]) * unit_of_codes), width, scales)
            if zeroed:
                _spread(zero[r // u64(br)], f32(1), width, zeros)
            signal, noise, top, far = f64(0), f64(0), u32(0), i32(0)
            for first in range(u64(0), n, u64(RUN)):
                ww, ee = f32(0), f32(0)
                for i in range(first, min(n, first + u64(RUN))):
                    code, s = row_codes[i], scales[i]
                    z = zeros[i] + offset if zeroed else offset
                    if paired:
                        even = f32(value(row, u64(2) * i) * inverse)
                        odd = f32(value(row, u64(2) * i + u64(1)) * inverse)
                        v, u = value_of(code, False, flip), value_of(code, True, flip)
                        a, b = even - (v - z) * s, odd - (u - z) * s
                        ww += even * even + odd * odd
                        ee += a * a + b * b
                        if detailed:
                            top = max(top, max(bits_of(a), bits_of(b)))
                            far = max(far, max(over(a, reach * s), over(b, reach * s)))
                    else:
                        w = f32(value(row, i) * inverse)
                        e = w - (value_of(code, False, flip) - z) * s
                        ww += w * w
                        ee += e * e
                        if detailed:
                            top = max(top, bits_of(e))
                            far = max(far, over(e, reach * s))
                signal += f64(ww)
                noise += f64(ee)
            power = f64(u32(unit << u32(23)).view(f32))
            if not detailed:
                out[r, 0], out[r, 1] = signal * power**2, noise * power**2
                continue
            sums, counts = out[member[r]], bins[member[r]]
            sums[0] += signal * power**2
            sums[1] += noise * power**2
            sums[2] = max(sums[2], f64(u32(top).view(f32)) * power)
            if far > i32(0):  # counting at once costs as much as all the rest
                for i in range(u64(row.size)):
                    e = error_at(row, row_codes, i, inverse, scales, zeros, flip)
                    sums[3] += e > f32(reach * scales[i // step])
            most = f32(u32(largest).view(f32) * inverse)
            for i in range(r * u64(17) % u64(SAMPLED), u64(row.size), u64(SAMPLED)):
                e = error_at(row, row_codes, i, inverse, scales, zeros, flip)
                counts[bin_of(e, most)] += 1

    return kernel


def reach(scheme: Scheme) -> float:
    """The largest error of a weight that is not clipped, in codes.

    Half a step, of floats the last and largest one; and as scales are rounded to bf16, and
    quotients of ``--numerics weight`` too, 1/128 of the codes to either side.
    """
    if scheme.element != "int":
        return {"e2m1": 1 + 7 / 128, "e4m3": 16 + 464 / 128}[scheme.element]
    return 0.5 + (1 << (scheme.bits - 1)) / 128


def of_values(
    x: Array, values: Array, q: Quantized, scheme: Scheme, member: Array, out: Array, bins: Array
) -> None:
    """The same from the values f32 ``[rows, cols]`` of codes with a float for each block."""
    w = x.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        e = np.abs(w - values)
        squares = np.square(e)
    np.add.at(out[:, 0], member, np.square(w).sum(axis=1))
    np.add.at(out[:, 1], member, squares.sum(axis=1))
    np.maximum.at(out[:, 2], member, e.max(axis=1, initial=0))
    if not scheme.inverse:  # there scale and minimum are those of the very group
        assert q.bias is not None
        far = (
            e.reshape(*q.bias.shape, -1) > reach(scheme) * np.abs(q.scale.astype(float))[:, :, None]
        )
        np.add.at(out[:, 3], member, far.sum(axis=(1, 2)))
    _count(e, np.abs(w).max(axis=1, initial=0), member, bins)


@jit
def _count(errors: Any, tops: Any, member: Any, bins: Any) -> None:
    for r in range(errors.shape[0]):
        for i in range(r * 17 % SAMPLED, errors.shape[1], SAMPLED):
            bins[member[r], bin_of(errors[r, i], tops[r])] += 1
