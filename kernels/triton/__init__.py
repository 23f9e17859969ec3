"""The Triton backend: one pass from weights to packed codes and scales, bit-equal to the reference.

Arrays are torch tensors on one device: a GPU, or the CPU where ``TRITON_INTERPRET=1`` runs the
kernels in numpy. torch and triton are imported with this package and by nothing else.

The face is that of ``streamq.kernels.cpu``. What differs is that nothing here has to wait for
the device: with a ``status`` (``new_status``) the functions only start kernels on the current
stream, a NaN or Inf is noted there, and ``refuse`` raises for it when the results are fetched.
Without one they wait and raise themselves.

Weights ``x [rows, cols]`` are bf16, f16 or f32; rows may be strided, their elements are not.
``out``: contiguous tensors of the shapes that ``shapes`` gives, of its dtypes or others of as many
bytes, so that pieces of one buffer of bytes will do. ``outer``: f32 ``[rows]`` on the device.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from streamq.kernels.reference.search import searches

from streamq.errors import NonFiniteError
from streamq.schemes import BYTES, Numerics, Packing, Quantized, Scheme

from . import amax as _amax
from . import dequantize as _dequantize
from . import error, fp8, integer, mx, nvfp4

NAME = "triton"

_SCALE = {
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f32": torch.float32,
    "e4m3": torch.float8_e4m3fn,
    "e8m0": torch.uint8,
}


def supports(scheme: Scheme) -> bool:
    """True for all schemes but inverse scales (DB-GPT) and groups that are no whole bytes."""
    rows, cols = scheme.block
    if scheme.inverse or scheme.is_float:
        return False
    if scheme.element == "int":
        return rows == 1 and (cols < 0 or cols % 8 == 0) and not scheme.two_level
    if scheme.element == "e2m1":
        return scheme.block == {"e4m3": (1, 16), "e8m0": (1, 32)}.get(scheme.scale)
    if scheme.scale == "e8m0":
        return scheme.block == (1, 32)
    return scheme.whole_tensor or rows == 1 or 0 < rows * cols <= 1 << 15


Buffer = tuple[tuple[int, int], Any]


def shapes(rows: int, cols: int, dtype: Any, scheme: Scheme, packing: Packing) -> list[Buffer]:
    """Shape and torch dtype of each of ``Scheme.parts`` of a weight of torch ``dtype``."""
    codes = torch.uint8
    if packing.kind == "bytes" and scheme.element != "e2m1":
        codes = torch.int8 if scheme.element == "int" else torch.float8_e4m3fn
    blocks = scheme.scale_shape(rows, cols)
    buffers = [((rows, packing.row_bytes(cols)), codes), (blocks, _SCALE.get(scheme.scale, dtype))]
    return buffers if scheme.symmetric else [*buffers, (blocks, torch.int8)]


def new_status(device: Any) -> Any:
    """int32 ``[2]`` of zeros, where kernels note a weight, and a scale, that is not finite."""
    return torch.zeros(2, dtype=torch.int32, device=device)


def refuse(status: Any, x: Any, scale: Any = None) -> None:
    """Wait for the device, and raise NonFiniteError with its place where one was noted.

    ``x`` and ``scale``: what the kernels read and wrote; the weight is named before a scale.
    """
    for bad, what, values in zip(status.tolist(), ("weight", "scale"), (x, scale), strict=True):
        if bad:
            found = ~torch.isfinite(values)
            row, col = divmod(int(found.flatten().byte().argmax()), values.shape[1])
            raise NonFiniteError(what, row, col)


def amax(x: Any, *, out: Any = None, status: Any = None) -> Any:
    """Largest magnitude of each row of ``x``, f32 ``[rows]``; NaN or Inf where a weight is."""
    if out is None:
        out = torch.empty(len(x), dtype=torch.float32, device=x.device)
    seen = new_status(x.device) if status is None else status
    _amax.row_amax(x, out, seen)
    if status is None:
        refuse(seen, x)
    return out


def quantize(
    x: Any,
    scheme: Scheme,
    packing: Packing = BYTES,
    *,
    numerics: Numerics = "f32",
    outer: Any = None,
    out: Quantized | None = None,
    status: Any = None,
) -> Quantized:
    """Quantize ``x [rows, cols]``; see ``streamq.kernels.reference.quantize``.

    Fields of the result are torch tensors. The scale of a whole-tensor scheme is ``outer``, and
    ``out.scale`` is left as it is.
    """
    if out is None:
        like = shapes(x.shape[0], x.shape[1], x.dtype, scheme, packing)
        made = (torch.empty(shape, dtype=dtype, device=x.device) for shape, dtype in like)
        out = Quantized(**dict(zip(scheme.parts, made, strict=True)))
    seen = new_status(x.device) if status is None else status
    weight, search = numerics == "weight", searches(scheme)
    if scheme.scale == "e4m3":
        nvfp4.quantize(x, scheme, packing, weight, search, outer, out, seen)
    elif scheme.scale == "e8m0":
        mx.quantize(x, scheme, packing, weight, search, out, seen)
    elif scheme.element == "e4m3":
        fp8.quantize(x, scheme, weight, outer, out, seen)
    else:
        integer.quantize(x, scheme, packing, weight, search, out, seen)
    if status is None:
        refuse(seen, x, out.scale)
    return replace(out, global_scale=outer if scheme.two_level else None)


def dequantize(q: Quantized, scheme: Scheme, out: Any = None, *, packing: Packing = BYTES) -> Any:
    """Values of codes, f32 ``[rows, cols]``; see ``streamq.kernels.reference.dequantize``.

    ``out``: where to write, f32, or bf16 or f16 to which values are rounded; made where None,
    which needs unpacked codes. ``packing``: how the codes lie.
    """
    if out is None:
        out = torch.empty(q.codes.shape, dtype=torch.float32, device=q.codes.device)
    _dequantize.dequantize(q, scheme, packing, out)
    return out


def energies(x: Any, q: Quantized, scheme: Scheme, packing: Packing, outer: Any) -> Any:
    """Sums of squares of each row of ``x`` and of its error under ``q``, f64 ``[rows, 2]``.

    ``q`` as ``quantize`` gave it for ``packing``.
    """
    if scheme.whole_tensor:
        q = replace(q, scale=outer.reshape(-1, 1))
    out = torch.empty((len(x), 2), dtype=torch.float64, device=x.device)
    error.energies(x, q, scheme, packing, out)
    return out


def cast(x: Any, dtype: Any) -> tuple[Any, bool]:
    """f32 ``x`` in a torch ``dtype``, and whether all of it is finite there, for which it waits."""
    narrow = x.to(dtype)
    return narrow, bool(torch.isfinite(narrow).all())


def warm_up(
    scheme: Scheme,
    packing: Packing,
    dtype: Any,
    numerics: Numerics,
    stats: bool = False,
    *,
    shape: tuple[int, int] = (128, 4096),
    device: Any = "cuda",
) -> None:
    """Compile what ``quantize`` of weights of this ``shape`` runs, or load it from the cache.

    With ``stats`` what ``energies`` runs as well. Tiles depend on the shape, so another number of
    columns may compile once more.
    """
    x = torch.zeros(shape, dtype=dtype, device=device)
    if scheme.needs_amax:
        amax(x)
    outer = torch.ones(len(x), device=device) if scheme.needs_amax else None
    q = quantize(x, scheme, packing, numerics=numerics, outer=outer)
    if stats:
        energies(x, q, scheme, packing, outer)
