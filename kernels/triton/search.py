"""Searched scales, bit-equal to ``streamq.kernels.reference.search``: sums of squares.

The blocks of a tile stay in registers while each candidate is tried for all of them
(``search_fp4``, ``search_int``).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_of_neighbours(x, N: tl.constexpr, W: tl.constexpr):
    """Sums ``[N]`` of ``x`` f64 ``[N, W]``: pairs of neighbours, pairs of their sums ...

    W is a power of two up to 2^15; zeros behind a shorter block change nothing.
    """
    for i in tl.static_range(0, 15):
        if W >> i > 1:
            x = tl.sum(tl.reshape(x, (N, W >> (i + 1), 2)), axis=2)
    return tl.reshape(x, (N,))


@triton.jit
def sum_of_squares(e, N: tl.constexpr, W: tl.constexpr):
    """The same of the squares of ``e`` f32 ``[N, W]``, which are exact in f64."""
    wide = e.to(tl.float64)
    return sum_of_neighbours(wide * wide, N, W)
