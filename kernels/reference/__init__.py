"""The definition of every scheme, in numpy and ml_dtypes: slow and obvious.

Every other backend returns these bytes, with no tolerance. Arithmetic is f32 after an
exact upcast, division is IEEE, rounding is half to even, results saturate.

``numerics="weight"`` is the arithmetic of compressed-tensors 0.19 and llm-compressor
0.14 on a CPU: scales, zero points and quotients are rounded to the dtype of the weight
after each step. The two differ only where this file asks for ``numerics``.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from streamq.schemes import BYTES, Numerics, Packing, Quantized, Scheme

from . import group, search
from .codes import (
    E2M1_MAX,
    E2M1_VALUES,
    E4M3,
    E4M3_MAX,
    F32,
    NVFP4_RANGE,
    Array,
    block_reduce,
    codes_of,
    e2m1_codes,
    pack,
    refuse_non_finite,
    spread,
    unpack,
)  # fmt: skip
from .codes import dequantize as _dequantize
from .scales import (
    asymmetric,
    guarded_scale,
    levels,
    mx_scale,
    nvfp4_scale,
    outer_scale,
    scale_dtype,
)  # fmt: skip

__all__ = [
    "E2M1_MAX", "E2M1_VALUES", "E4M3", "E4M3_MAX", "F32", "NVFP4_RANGE", "amax", "dequantize",
    "e2m1_codes", "outer_scale", "pack", "quantize", "refuse_non_finite", "spread", "supports",
    "unpack",
]  # fmt: skip


def supports(scheme: Scheme) -> bool:
    """Whether this backend can run ``scheme``: the definition runs all of them."""
    return True


def amax(x: Array) -> Array:
    """Largest magnitude of each row of ``x [rows, cols]``, f32 ``[rows]``."""
    refuse_non_finite("weight", x)
    top: Array = np.abs(x.astype(F32)).max(axis=1, initial=0)
    return top


def quantize(
    x: Array,
    scheme: Scheme,
    packing: Packing = BYTES,
    *,
    numerics: Numerics = "f32",
    outer: Array | None = None,
) -> Quantized:
    """Quantize ``x [rows, cols]`` (bf16, f16 or f32).

    ``outer`` is f32 ``[rows]``: ``outer_scale`` of the tensor that each row belongs to,
    for schemes that need it (a stack of tensors is quantized as one matrix).
    Raises NonFiniteError for a NaN or Inf in ``x`` or in a scale.
    """
    if scheme.inverse:
        return group.quantize(x, scheme, packing)
    refuse_non_finite("weight", x)
    w = x.astype(F32)
    zero_point = None
    if scheme.whole_tensor:
        assert outer is not None
        stored = scale = outer[:, None]
    elif scheme.scale == "e8m0":
        stored, scale = mx_scale(w, scheme, x.dtype, numerics)
    elif scheme.scale == "e4m3":
        g = np.ones(len(w), F32) if outer is None else outer
        stored, scale = nvfp4_scale(w, scheme, x.dtype, numerics, g)
    elif scheme.symmetric:
        top = block_reduce(np.abs(w), scheme, np.maximum)
        scale = guarded_scale(top / levels(scheme), scheme, x.dtype, numerics)
        stored = scale.astype(scale_dtype(scheme, x.dtype))
        if scheme.unrounded:  # gpt-fast's guard; the stored scale is never 0 either
            scale = np.maximum(top / levels(scheme), ml_dtypes.finfo(F32).eps)
            stored = guarded_scale(scale, scheme, x.dtype, numerics).astype(stored.dtype)
    else:
        scale, zero_point = asymmetric(w, scheme, x.dtype, numerics)
        stored = scale.astype(scale_dtype(scheme, x.dtype))
    refuse_non_finite("scale", stored)
    if search.searches(scheme):
        absmax = search.Blocks(stored, scale, zero_point)
        stored, scale, zero_point = search.search(w, scheme, x.dtype, numerics, outer, absmax)

    codes = codes_of(w, scale, zero_point, scheme, x.dtype, numerics)
    return Quantized(pack(codes, packing), stored, zero_point, outer if scheme.two_level else None)


def dequantize(q: Quantized, scheme: Scheme) -> Array:
    """Values of unpacked codes, f32 ``[rows, cols]``; see ``codes`` and ``group``."""
    return group.dequantize(q, scheme) if scheme.inverse else _dequantize(q, scheme)
