"""The definition of ``scales="search"``: block scales of the least squared error, without data.

A block tries the scale that absmax gives and a bounded number of others near it. Each is
rounded to its storage dtype first, and codes come from it as always. The error of an
element is ``x - value`` in f32, with the value as ``dequantize`` gives it to a loader; its
square is taken in f64, where it is exact for every f32. Squares of a block are added in
f64, neighbours first (``sum_of_neighbours``). A candidate replaces what was best so far
only where its sum is less: absmax goes first, so no block is ever worse than with absmax,
equal sums leave it absmax, and a sum that is NaN or Inf never wins.

FP8 and MXFP8 gain nothing and stay absmax, as do scales over more than one row,
``unrounded`` and ``inverse`` ones (``searches``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from streamq.schemes import Numerics, Quantized, Scheme

from . import codes, scales

Array = np.ndarray[Any, Any]

#: Tried in this order around the code of an e4m3 block scale; the result is kept in 1 .. 0x7E.
E4M3_STEPS = (-2, -1, 1, 2, 3, 4, 5, 6)
#: Tried in this order around the exponent byte of an e8m0 scale, kept in 0 .. 254.
E8M0_STEPS = (-1, 1)
#: Integers of so many bits: the largest factor and the step down to the next, in 1/128. The
#: fewer the codes, the more is won by clipping the largest weights.
FACTORS = {2: (96, 6), 3: (120, 6), 4: (132, 4), 5: (136, 3), 6: (138, 2), 7: (138, 2), 8: (138, 1)}
FACTOR_COUNT = 15


class Blocks(NamedTuple):
    """A choice for every block, each ``[row blocks, col blocks]``, as ``quantize`` has them."""

    stored: Array
    scale: Array
    zero_point: Array | None


def searches(scheme: Scheme) -> bool:
    """Whether ``scheme`` asks for a search and there is something to find."""
    return (
        scheme.scales == "search"
        and scheme.element != "e4m3"
        and scheme.block[0] == 1
        and not scheme.unrounded
        and not scheme.inverse
    )


def factors(scheme: Scheme) -> Array:
    """What amax, or both ends of the range, is multiplied with, in order; f32, never 1."""
    top, step = FACTORS[scheme.bits]
    tried = top - step * np.arange(FACTOR_COUNT)
    parts: Array = (tried[tried != 128] / 128).astype(np.float32)
    return parts


def search(
    w: Array,
    scheme: Scheme,
    weight: np.dtype[Any],
    numerics: Numerics,
    outer: Array | None,
    absmax: Blocks,
) -> Blocks:
    """The best blocks for ``w`` f32 ``[rows, cols]``, a weight of dtype ``weight``."""
    stored, scale, zero = absmax
    with np.errstate(over="ignore", invalid="ignore"):
        least = squared_errors(w, scheme, weight, numerics, outer, absmax)
        for candidate in _candidates(w, scheme, weight, numerics, outer, absmax):
            error = squared_errors(w, scheme, weight, numerics, outer, candidate)
            better = error < least
            least = np.where(better, error, least)
            stored = np.where(better, candidate.stored, stored)
            scale = np.where(better, candidate.scale, scale)
            if zero is not None:
                assert candidate.zero_point is not None
                zero = np.where(better, candidate.zero_point, zero)
    return Blocks(stored, scale, zero)


def squared_errors(
    w: Array,
    scheme: Scheme,
    weight: np.dtype[Any],
    numerics: Numerics,
    outer: Array | None,
    blocks: Blocks,
) -> Array:
    """Squared error of each block of one row, f64 ``[rows, col blocks]``."""
    tried = codes.codes_of(w, blocks.scale, blocks.zero_point, scheme, weight, numerics)
    g = outer if scheme.two_level else None
    values = codes.dequantize(Quantized(tried, blocks.stored, blocks.zero_point, g), scheme)
    error = (w - values).astype(np.float64)
    return sum_of_neighbours((error * error).reshape(len(w), blocks.scale.shape[1], -1))


def sum_of_neighbours(x: Array) -> Array:
    """Sum over the last axis of f64 ``[..., n]``: pairs of neighbours, pairs of their sums ...

    The last of an odd number waits for the next turn. Vectors of any width can do it in
    this order.
    """
    while x.shape[-1] > 1:
        if x.shape[-1] % 2:
            x = np.concatenate((x, np.zeros_like(x[..., :1])), axis=-1)
        x = x[..., ::2] + x[..., 1::2]
    return x[..., 0]


def _candidates(
    w: Array,
    scheme: Scheme,
    weight: np.dtype[Any],
    numerics: Numerics,
    outer: Array | None,
    absmax: Blocks,
) -> Iterator[Blocks]:
    """What is tried after absmax, in order."""
    if scheme.scale == "e4m3":
        code = absmax.stored.view(np.uint8).astype(np.int16)
        g = np.ones(1, np.float32) if outer is None else np.asarray(outer, np.float32)
        for step in E4M3_STEPS:
            stored = np.clip(code + step, 1, 0x7E).astype(np.uint8).view(codes.E4M3)
            yield Blocks(stored, stored.astype(np.float32) / g.reshape(-1, 1), None)
    elif scheme.scale == "e8m0":
        for step in E8M0_STEPS:
            byte = np.clip(absmax.stored.astype(np.int16) + step, 0, 254).astype(np.uint8)
            scale = codes.e8m0_value(byte)
            if numerics == "weight":
                scale = codes.round_to(scale, weight)
            # f16 has no such powers of two: nothing to try there.
            lost = (scale == 0) | np.isinf(scale)
            stored = np.where(lost, absmax.stored, byte)
            yield Blocks(stored, np.where(lost, absmax.scale, scale), None)
    elif scheme.symmetric:
        unit = codes.block_reduce(np.abs(w), scheme, np.maximum) / scales.levels(scheme)
        for factor in factors(scheme):
            scale = scales.guarded_scale(unit * factor, scheme, weight, numerics)
            yield Blocks(scale.astype(absmax.stored.dtype), scale, None)
    else:
        for factor in factors(scheme):
            scale, zero = scales.asymmetric(w, scheme, weight, numerics, factor)
            yield Blocks(scale.astype(absmax.stored.dtype), scale, zero)
