"""The CPU backend: numba kernels, one file per operation, bit-equal to the reference.

``quantize`` and ``amax`` have the signatures of ``streamq.kernels.reference``, but write into
buffers the caller may hand in (``shapes``), so that a worker allocates nothing per slab.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
from streamq.kernels.reference import E4M3, refuse_non_finite
from streamq.kernels.reference.search import searches

from streamq.errors import NonFiniteError
from streamq.schemes import BYTES, Numerics, Packing, Quantized, Scheme

from . import amax as _amax
from . import dequantize as _dequantize
from . import error, fp8, group, integer, mx, nvfp4, search
from .bits import INF_BITS, ROUND_BF16, ROUND_F16, ROUND_F32
from .cast import cast as cast
from .packing import pack_nibbles, unpack_words

Array = np.ndarray[Any, Any]

_BF16 = np.dtype(ml_dtypes.bfloat16)
_ROUND = {_BF16: ROUND_BF16, np.dtype(np.float16): ROUND_F16, np.dtype(np.float32): ROUND_F32}
_EPS = {dtype: np.float32(ml_dtypes.finfo(dtype).eps) for dtype in _ROUND}
_SCALE: dict[str, np.dtype[Any]] = {
    "bf16": _BF16,
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "e4m3": E4M3,
    "e8m0": np.dtype(np.uint8),
}
_BYTES = np.arange(256, dtype=np.uint8)
#: Values of scales of one byte; a table is 30 times faster than the cast of ml_dtypes.
_SCALE_VALUES = {
    "e4m3": _BYTES.view(E4M3).astype(np.float32),
    "e8m0": np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32(np.inf)),
}

NAME = "cpu (numba)"


def supports(scheme: Scheme) -> bool:
    """True for every scheme whose blocks the kernels can walk."""
    if scheme.element == "int":
        return scheme.inverse or (scheme.block[0] == 1 and not scheme.two_level)
    if scheme.scale == "e8m0":
        return scheme.block == (1, 32)
    return scheme.element == "e4m3" or scheme.block == (1, 16)


def amax(x: Array) -> Array:
    """Largest magnitude of each row of ``x [rows, cols]``, f32 ``[rows]``."""
    out = np.empty(len(x), np.uint32)
    _amax.row_amax(_as_bits(x), out)
    if len(out) and out.max() >= INF_BITS:
        refuse_non_finite("weight", x)
    return out.view(np.float32)


def quantize(
    x: Array,
    scheme: Scheme,
    packing: Packing = BYTES,
    *,
    numerics: Numerics = "f32",
    outer: Array | None = None,
    out: Quantized | None = None,
) -> Quantized:
    """Quantize ``x [rows, cols]``; see ``streamq.kernels.reference.quantize``.

    ``out``: where to write, arrays of the right shape and dtype; made where None.
    """
    if out is None:
        like = shapes(x.shape[0], x.shape[1], x.dtype, scheme, packing)
        made = (np.empty(shape, dtype) for shape, dtype in like)
        out = Quantized(**dict(zip(scheme.parts, made, strict=True)))
    bits = _as_bits(x)
    codes = out.codes.view(np.uint8)
    weight = _ROUND[x.dtype]
    quotient = weight if numerics == "weight" else ROUND_F32
    if scheme.inverse:
        top = group.quantize(bits, scheme, packing, out)
    elif searches(scheme):
        stored = out.scale.dtype if scheme.element == "int" else x.dtype
        dialect = weight if numerics == "weight" else None
        top = search.quantize(
            bits, scheme, packing, dialect, _ROUND[stored], _EPS[stored], outer, out
        )
    elif scheme.whole_tensor:
        assert outer is not None
        top = fp8.fp8_rows(bits, outer, quotient, codes)
    elif scheme.scale == "e4m3":
        outer = np.ones(len(x), np.float32) if outer is None else outer
        scale = out.scale.view(np.uint8)
        top = nvfp4.nvfp4(bits, outer, quotient, packing.kind == "nibbles", codes, scale)
    elif scheme.scale == "e8m0":
        rounding = weight if numerics == "weight" else mx.PLAIN
        nibbles = packing.kind == "nibbles"
        top = mx.mx(bits, scheme.bits, rounding, nibbles, codes, out.scale)
    else:
        top = _with_float_scale(bits, scheme, packing, x.dtype, numerics, out)
    if top >= INF_BITS:
        refuse_non_finite("weight", x)
    return replace(out, global_scale=outer if scheme.two_level else None)


def dequantize(q: Quantized, scheme: Scheme, out: Array | None = None) -> Array:
    """Values of unpacked codes, f32; see ``streamq.kernels.reference.dequantize``.

    ``out``: where to write, f32 ``[rows, cols]``; made where None.
    """
    rows, cols = q.codes.shape
    if out is None:
        out = np.empty((rows, cols), np.float32)
    if scheme.inverse:
        return group.dequantize(q, scheme, out)
    scale = _widened(q.scale, scheme)
    if q.global_scale is not None:
        with np.errstate(all="ignore"):
            scale = scale / np.asarray(q.global_scale, np.float32).reshape(-1, 1)
    zero = np.zeros_like(scale) if q.zero_point is None else q.zero_point.astype(np.float32)
    if q.bias is not None:
        zero = np.full_like(scale, -(1 << (scheme.bits - 1)))
    br, bc = scheme.block_of(rows, cols)
    br = 1 if len(scale) == rows else br
    _dequantize.VALUES[scheme.element](q.codes.view(np.uint8), scale, zero, br, bc, out)
    if q.bias is not None:
        blocks = out.reshape(rows, -1, bc)
        blocks += q.bias[:, :, None]
    return out


def energies(
    x: Array, q: Quantized, scheme: Scheme, packing: Packing, outer: Array | None
) -> Array:
    """Sums of squares of each row of ``x`` and of its error under ``q``, f64 ``[rows, 2]``.

    ``q`` as ``quantize`` gave it for ``packing``.
    """
    if scheme.inverse:
        return group.energies(x, _unpacked(q, packing, x.shape[1]), scheme)
    out = np.empty((len(x), 2))
    none = np.empty(0, np.int64)
    _measure(x, q, scheme, packing, outer, out, none, none.reshape(0, 0))
    return out


def losses(
    x: Array, q: Quantized, scheme: Scheme, packing: Packing, outer: Array | None, member: Array
) -> tuple[Array, Array]:
    """What the members of ``x`` lost under ``q``, and how their errors are distributed.

    ``q`` as ``quantize`` gave it for ``packing``, or as a format unpacked it (``BYTES``);
    ``member`` int64 ``[rows]``, ascending from 0: the weight that a row belongs to. f64
    ``[members, 4]``: sums of squares of weights and of errors, the largest error, and the
    number of clipped weights: those further beyond the last code than half a step, and 1/128 of
    the largest code more, because scales are rounded. int64 ``[members, error.BINS]``: one error in
    ``error.SAMPLED``, in bins of half an octave below the largest weight of its row.
    """
    count = int(member[-1]) + 1 if len(member) else 0
    out, bins = np.zeros((count, 4)), np.zeros((count, error.BINS), np.int64)
    if scheme.inverse or q.bias is not None:
        q = _unpacked(q, packing, x.shape[1])
        error.of_values(x, dequantize(q, scheme), q, scheme, member, out, bins)
    else:
        _measure(x, q, scheme, packing, outer, out, member, bins)
    return out, bins


def _unpacked(q: Quantized, packing: Packing, cols: int) -> Quantized:
    if packing.kind != "words":
        return q
    half = 1 << (packing.bits - 1)
    return replace(q, codes=unpack_words(q.codes, packing.bits, cols, half))


def _measure(
    x: Array, q: Quantized, scheme: Scheme, packing: Packing, outer: Array | None, out: Array,
    member: Array, bins: Array,
) -> None:  # fmt: skip
    """Run the kernel of ``error.sums``; detailed where there are members."""
    if scheme.whole_tensor:
        assert outer is not None
        scale = outer.reshape(-1, 1)
    else:
        scale = _widened(q.scale, scheme)
    g = outer if scheme.two_level and outer is not None else np.ones(len(x), np.float32)
    br, bc = scheme.block_of(*x.shape)
    br = 1 if scheme.whole_tensor else br
    codes, flip = q.codes.view(np.uint8), np.uint8(0)
    paired = scheme.element == "e2m1" or (packing.bits == 4 and bc % 2 == x.shape[1] % 2 == 0)
    if packing.kind == "words" and packing.bits == 8:
        flip = np.uint8(128)
    elif packing.kind == "words" and not paired:
        offset = 1 << (packing.bits - 1)
        codes = unpack_words(codes, packing.bits, x.shape[1], offset).view(np.uint8)
    elif packing.kind == "bytes" and paired:
        codes = pack_nibbles(codes)
    zeroed = q.zero_point is not None
    zero = scale if q.zero_point is None else q.zero_point.astype(np.float32)
    reach = np.float32(error.reach(scheme) * (2 if scheme.element == "e2m1" else 1))  # of halves
    sums = error.sums(scheme.element, paired, zeroed, len(member) > 0)
    sums(_as_bits(x), codes, flip, scale, zero, g, br, bc, out, reach, member, bins)


def warm_up(
    scheme: Scheme, packing: Packing, dtype: np.dtype[Any], numerics: Numerics,
    stats: bool = False, details: bool = False,
) -> None:  # fmt: skip
    """Compile what ``quantize`` of such a weight runs, or load it from the cache.

    With ``stats`` what ``energies`` runs as well, with ``details`` what ``losses`` does instead.
    """
    x = np.zeros((1, (128 if scheme.block[1] < 0 else scheme.block[1]) * scheme.stride), dtype)
    if scheme.needs_amax:
        amax(x)
    outer = np.ones(1, np.float32)
    q = quantize(x, scheme, packing, numerics=numerics, outer=outer)
    if details:
        losses(x, q, scheme, packing, outer, np.zeros(1, np.int64))
    elif stats:
        energies(x, q, scheme, packing, outer)


def _with_float_scale(
    bits: Array, scheme: Scheme, packing: Packing, dtype: Any, numerics: Numerics, out: Quantized
) -> Any:
    """FP8 and integers: the kernels give scales as f32, here they get their storage dtype."""
    codes = out.codes.view(np.uint8)
    narrow = out.scale.dtype != np.float32
    scale = np.empty(out.scale.shape, np.float32) if narrow else out.scale
    stored = _ROUND[out.scale.dtype]
    quotient = _ROUND[dtype] if numerics == "weight" else ROUND_F32
    br, bc = scheme.block_of(*bits.shape)
    eps = _EPS[out.scale.dtype]
    packed_bits = packing.bits if packing.kind == "words" else 0
    lo, hi = scheme.code_range
    least = np.float32(0)
    if scheme.power_of_two:
        stored = fp8.UP
    if scheme.unrounded:
        stored, eps = ROUND_F32, _EPS[scale.dtype]
        least = eps
    if scheme.element == "e4m3":
        substitute = eps if numerics == "weight" else np.float32(1)
        top = fp8.fp8_blocks(bits, br, bc, stored, quotient, substitute, codes, scale)
    elif scheme.symmetric:
        levels = np.float32(hi if scheme.narrow else hi + 0.5)
        top = integer.int_symmetric(
            bits, bc, levels, lo, hi, stored, quotient, eps, least, packed_bits, codes, scale
        )
    else:
        top = integer.int_asymmetric(
            bits, bc, lo, hi, stored, quotient, eps, hi if numerics == "weight" else 0,
            packed_bits, codes, scale, out.zero_point,
        )  # fmt: skip
    if narrow:
        out.scale[...] = scale
    if top < INF_BITS and not np.isfinite(scale).all():
        row, col = np.argwhere(~np.isfinite(scale))[0]
        raise NonFiniteError("scale", int(row), int(col))
    return top


def _widened(scale: Array, scheme: Scheme) -> Array:
    """A scale of any storage dtype as f32."""
    if scale.itemsize > 1:
        return scale.astype(np.float32, copy=False)
    wide = np.empty(scale.shape, np.float32)
    _dequantize.look_up(
        scale.reshape(-1).view(np.uint8), _SCALE_VALUES[scheme.scale], wide.reshape(-1)
    )
    return wide


Buffer = tuple[tuple[int, int], np.dtype[Any]]


def shapes(
    rows: int, cols: int, dtype: np.dtype[Any], scheme: Scheme, packing: Packing
) -> list[Buffer]:
    """Shape and dtype of each of ``Scheme.parts`` of a weight."""
    codes: np.dtype[Any] = np.dtype(np.uint8)
    if packing.kind == "bytes" and scheme.element != "e2m1":
        codes = np.dtype(np.int8) if scheme.element == "int" else E4M3
    scale: np.dtype[Any] = _SCALE.get(scheme.scale, dtype)
    blocks = scheme.scale_shape(rows, cols)
    buffers = [((rows, packing.row_bytes(cols)), codes), (blocks, scale)]
    if scheme.symmetric:
        return buffers
    return [*buffers, (blocks, np.dtype(np.float32 if scheme.inverse else np.int8))]


def _as_bits(x: Array) -> Array:
    """bf16 as uint16, everything else as the uint32 of its f32 value."""
    if x.dtype == _BF16:
        return x.view(np.uint16)
    return np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
