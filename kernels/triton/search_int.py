"""Scales of integers: from the ends of a block, or the best of several.

See ``streamq.kernels.reference.search``. A row that no tile holds is searched in pieces: their
errors under every candidate are written out first, and added in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import clamp, load, rint, round_to
from .search import sum_of_neighbours, sum_of_squares
from .tiles import place

#: Candidates: absmax, and 15 factors.
CANDIDATES = tl.constexpr(16)


@triton.jit
def scale_and_zero(
    low, high, factor, STORED: tl.constexpr, STEP: tl.constexpr, SYMMETRIC: tl.constexpr,
    LO: tl.constexpr, HI: tl.constexpr, LEVELS: tl.constexpr, EPS: tl.constexpr,
    LEAST: tl.constexpr, LOST: tl.constexpr,
):  # fmt: skip
    """Scale and zero point, f32 both, of blocks that reach from ``low`` to ``high``.

    ``high`` is their amax where the codes are SYMMETRIC. STORED, STEP: what the scale and
    every other intermediate result is rounded to; EPS: the scale of a zero block, LEAST the
    smallest; LOST: zero point of a block with a negative minimum whose scale underflows.
    """
    if SYMMETRIC:
        s = round_to(tl.div_rn(high, LEVELS) * factor, STORED)
        z = tl.zeros_like(s)
    else:
        low, high = round_to(low * factor, STEP), round_to(high * factor, STEP)
        s = round_to(tl.div_rn(round_to(high - low, STEP), HI - LO), STORED)
        z = round_to(LO - round_to(tl.div_rn(low, tl.where(s == 0, EPS, s)), STEP), STEP)
        z = rint(clamp(z, LO, HI))
        z = tl.where(s == 0, tl.where(low < 0, LOST, 0.0), z)
    return tl.where(s == 0, EPS, tl.maximum(s, LEAST)), z


@triton.jit
def quotient(w, s, z, STEP: tl.constexpr, SYMMETRIC: tl.constexpr, LO: tl.constexpr,
             HI: tl.constexpr):  # fmt: skip
    """The code of each of ``w`` f32 ``[N, W]`` before it is rounded to an integer."""
    q = round_to(tl.div_rn(w, s[:, None]), STEP)
    if not SYMMETRIC:
        q = round_to(q + z[:, None], STEP)
    return clamp(q, LO, HI)


@triton.jit
def factor_of(i, TOP: tl.constexpr, DOWN: tl.constexpr):
    """What the ends of a block are multiplied with in candidate ``i``; 1 in the first.

    It may be 1 once more, which wins nothing.
    """
    n = tl.where(i == 0, 128, TOP - DOWN * (i - 1))
    return n.to(tl.float32) * 0.0078125


@triton.jit
def errors(w, s, z, STEP: tl.constexpr, SYMMETRIC: tl.constexpr, LO: tl.constexpr,
           HI: tl.constexpr, N: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """Squared errors f64 ``[N]`` of ``w`` f32 ``[N, W]``; zeros have none."""
    code = rint(quotient(w, s, z, STEP, SYMMETRIC, LO, HI))
    if not SYMMETRIC:
        code = code - z[:, None]
    return sum_of_squares(w - code * s[:, None], N, W)


@triton.jit
def best(
    w, low, high, known, row, rows, valid, STORED: tl.constexpr, STEP: tl.constexpr,
    SYMMETRIC: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, LEVELS: tl.constexpr,
    EPS: tl.constexpr, LOST: tl.constexpr, TOP: tl.constexpr, DOWN: tl.constexpr,
    PIECES: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The scale and zero point of the least error, the first of equals.

    ``known`` f64 ``[CANDIDATES, rows, PIECES]``: the errors of rows in pieces, or None.
    """
    scale, zero = tl.zeros_like(high), tl.zeros_like(high)
    least = tl.zeros((N,), tl.float64)
    for i in range(CANDIDATES):
        factor = factor_of(i, TOP, DOWN)
        s, z = scale_and_zero(
            low, high, factor, STORED, STEP, SYMMETRIC, LO, HI, LEVELS, EPS, 0.0, LOST
        )
        if known is None:
            error = errors(w, s, z, STEP, SYMMETRIC, LO, HI, N, W)
        else:
            at = known + ((i * rows + row) * PIECES)[:, None] + tl.arange(0, PIECES)[None, :]
            error = sum_of_neighbours(tl.load(at, mask=valid[:, None], other=0), N, PIECES)
        better = (i == 0) | (error < least)  # never where it is NaN or both are infinite
        least = tl.where(better, error, least)
        scale, zero = tl.where(better, s, scale), tl.where(better, z, zero)
    return scale, zero


@triton.jit
def piece_errors(
    x, ends, out, cols, stride, rows, blocks, across,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, W: tl.constexpr, KIND: tl.constexpr,
    STORED: tl.constexpr, STEP: tl.constexpr, SYMMETRIC: tl.constexpr, LO: tl.constexpr,
    HI: tl.constexpr, LEVELS: tl.constexpr, EPS: tl.constexpr, LOST: tl.constexpr,
    TOP: tl.constexpr, DOWN: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Errors of pieces of W columns into ``out`` f64 ``[CANDIDATES, rows, PIECES]``.

    ``ends`` f32 ``[2, rows]`` as ``amax.row_ends`` has them.
    """
    row, block, valid = place(rows, blocks, across, ROWS, BLOCKS)
    lane = (block * W)[:, None] + tl.arange(0, W)[None, :]
    w = load(x + (row * stride)[:, None] + lane, valid[:, None] & (lane < cols), KIND)
    low = tl.load(ends + row, mask=valid, other=0)
    high = tl.load(ends + rows + row, mask=valid, other=0)
    for i in range(CANDIDATES):
        s, z = scale_and_zero(
            low, high, factor_of(i, TOP, DOWN),
            STORED, STEP, SYMMETRIC, LO, HI, LEVELS, EPS, 0.0, LOST,
        )  # fmt: skip
        error = errors(w, s, z, STEP, SYMMETRIC, LO, HI, ROWS * BLOCKS, W)
        tl.store(out + (i * rows + row) * PIECES + block, error, mask=valid)
