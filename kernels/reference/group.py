"""The definition of group compression with an inverse scale (DB-GPT, FastChat).

The rule is that of FastChat's ``compress`` on f32 tensors. The stored scale is ``1 / largest
magnitude * top code``, rounded twice, and a weight is multiplied by it. Asymmetric groups
have their true minimum beside it. A ragged last group is filled up with zeros, which count
as elements of it.

Integer codes are signed here as everywhere: an asymmetric code is FastChat's minus
2^(bits-1). FastChat leaves an infinite scale of a constant group as it is; here it is 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamq.errors import NonFiniteError
from streamq.schemes import BYTES, Packing, Quantized, Scheme

from .codes import pack, refuse_non_finite

Array = np.ndarray[Any, Any]

F32 = np.float32


def quantize(x: Array, scheme: Scheme, packing: Packing = BYTES) -> Quantized:
    """Quantize ``x [rows, cols]`` (bf16, f16 or f32); scale and bias are f32.

    Raises NonFiniteError for a NaN or Inf in ``x``, or a range that f32 cannot hold.
    """
    refuse_non_finite("weight", x)
    w = _groups(x.astype(F32), scheme)
    shape, half = scheme.scale_shape(*x.shape), 1 << (scheme.bits - 1)
    if scheme.symmetric:
        least, most, offset = F32(1 - half), F32(half - 1), F32(0)
        bias: Array = np.zeros((), F32)
        span = np.abs(w).max(axis=_ACROSS, keepdims=True)
    else:
        least, most, offset = F32(0), F32(2 * half - 1), F32(half)
        bias = w.min(axis=_ACROSS, keepdims=True) + F32(0)  # a minimum of -0 is stored as 0
        with np.errstate(over="ignore"):
            span = w.max(axis=_ACROSS, keepdims=True) - bias
    with np.errstate(over="ignore", divide="ignore"):
        scale = F32(1) / span * most  # what torch computes for a number divided by a tensor
    scale = np.where(np.isfinite(scale), scale, F32(1))  # all elements are (nearly) the same
    refuse_lost(scale.reshape(shape), scheme)
    code = np.rint(np.clip((w - bias) * scale, least, most)) - offset
    codes = pack(_ungroup(code.astype(np.int8), x.shape), packing)
    stored = None if scheme.symmetric else bias.reshape(shape)
    return Quantized(codes, scale.reshape(shape), bias=stored)


def dequantize(q: Quantized, scheme: Scheme) -> Array:
    """Values of unpacked codes, f32: ``code / scale``, then ``+ bias`` where there is one.

    For that an asymmetric code is counted from 0, by adding 2^(bits-1).
    """
    shape = q.codes.shape
    codes = q.codes.astype(F32)
    if q.bias is not None:
        codes = codes + F32(1 << (scheme.bits - 1))
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        values = codes / spread(q.scale, scheme, shape)
        if q.bias is not None:
            values = values + spread(q.bias, scheme, shape)
    return values


def refuse_lost(scale: Array, scheme: Scheme) -> None:
    """Raise NonFiniteError for a scale of 0: the range of its group is infinite in f32."""
    if not scale.all():
        row, col = np.argwhere(scale == 0)[0]
        raise NonFiniteError("scale", int(row) * max(scheme.block[0], 1), int(col))


def spread(per_group: Array, scheme: Scheme, shape: tuple[int, ...]) -> Array:
    """Each group's number at each of its elements."""
    rows, cols = shape
    height, width = scheme.block_of(rows, cols)
    tall = per_group.repeat(height, axis=0)[:rows]
    lanes = tall.reshape(rows, -1, scheme.stride).repeat(width, axis=1)
    return lanes[:, : cols // scheme.stride].reshape(shape)


#: The axes of one group in what ``_groups`` returns.
_ACROSS = (1, 3)


def _groups(w: Array, scheme: Scheme) -> Array:
    """``[row groups, height, column groups, width, stride]``, filled up with zeros."""
    rows, cols = w.shape
    height, width = scheme.block_of(rows, cols)
    lanes = w.reshape(rows, -1, scheme.stride)
    n = lanes.shape[1]
    filled = np.pad(lanes, ((0, -rows % height), (0, -n % width), (0, 0)))
    return filled.reshape(-(-rows // height), height, -(-n // width), width, scheme.stride)


def _ungroup(groups: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of ``_groups``."""
    down, height, across, width, stride = groups.shape
    rows, cols = shape
    filled = groups.reshape(down * height, across * width, stride)
    return np.ascontiguousarray(filled[:rows, : cols // stride].reshape(shape))
