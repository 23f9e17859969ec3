"""f32 to the dtype of a float checkpoint, rounded half to even."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from streamq.compiled import jit

from .bits import ABS_MASK, INF_BITS, ROUND_BF16, f32, round_to, u16, u32, u64

Array = np.ndarray[Any, Any]

_BF16 = np.dtype(ml_dtypes.bfloat16)


@jit
def _to_bf16(x: Any, out: Any) -> Any:
    largest = u32(0)
    for i in range(u64(x.size)):
        bits = f32(round_to(x[i], ROUND_BF16)).view(u32)
        largest = max(largest, u32(bits & ABS_MASK))
        out[i] = u16(bits >> u32(16))
    return largest


def cast(x: Array, dtype: np.dtype[Any]) -> tuple[Array, bool]:
    """f32 ``[n]`` in ``dtype``, and whether all of it is finite there.

    bf16 by its bits, as the cast of ml_dtypes takes 20 times as long.
    """
    if dtype == _BF16:
        out = np.empty(len(x), np.uint16)
        return out.view(_BF16), bool(_to_bf16(x, out) < INF_BITS)
    with np.errstate(over="ignore"):
        narrow = x.astype(dtype, copy=False)
    return narrow, bool(np.isfinite(narrow).all())
