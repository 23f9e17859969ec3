"""The NPU backend: AscendC kernels, one header per operation, defined by the reference.

``quantize`` and ``amax`` mean what those of ``streamq.kernels.reference`` do, on torch tensors that
lie on an NPU. Neither torch nor CANN is needed to import this; ``open_device`` says in one sentence
what is missing. ``docs/ascend.md`` says what of it ran where.
"""

from __future__ import annotations

from typing import Any

from streamq.errors import DeviceError, NonFiniteError
from streamq.schemes import BYTES, Numerics, Packing, Quantized, Scheme

from .chips import CHIPS, DTYPES, LONGEST_ROW, LONGEST_TILE, Call, Chip, call_of, function_of
from .loader import Device, library_path, open_device

__all__ = [
    "CHIPS", "NAME", "Chip", "Device", "amax", "histogram", "keep_largest",
    "library_path", "open_device", "quantize", "supports", "to_nz",
]  # fmt: skip

NAME = "ascendc"

#: A torch tensor on an NPU.
Tensor = Any


def supports(scheme: Scheme, chip: Chip | None = None, numerics: Numerics = "f32") -> bool:
    """Whether there are kernels for ``scheme`` on ``chip``, or on any where None."""
    function = function_of(scheme, numerics)
    return function is not None and any(
        function in c.functions for c in ([chip] if chip else CHIPS)
    )


def amax(x: Tensor) -> Tensor:
    """Largest magnitude of each row of ``x [rows, cols]``, f32 ``[rows]``."""
    device = open_device()
    x = _weight(device, x, "streamq_amax")
    out = device.torch.empty(len(x), dtype=device.torch.float32, device=x.device)
    if x.numel() == 0:
        return out.zero_()
    _refuse_non_finite(device, "weight", x)
    device.run(Call("streamq_amax", (*x.shape, DTYPES[_dtype(device, x)]), (0, 0)), x, out)
    return out


def quantize(
    x: Tensor,
    scheme: Scheme,
    packing: Packing = BYTES,
    *,
    numerics: Numerics = "f32",
    outer: Tensor | None = None,
) -> Quantized:
    """Quantize ``x [rows, cols]`` (bf16, f16 or f32) to tensors on the same NPU.

    ``outer``: f32 ``[rows]``, the scale of the tensor each row belongs to, where the scheme has
    one for whole tensors. Codes are one a byte: formats pack them. Raises NonFiniteError for a
    NaN or Inf in ``x`` or in a scale, DeviceError for what ``supports`` refuses.
    """
    device = open_device()
    torch = device.torch
    if packing.kind != "bytes" or not supports(scheme, device.chip, numerics):
        raise DeviceError(
            f"{device.chip.name} has no kernel for {scheme.name} as {packing.kind} with "
            f"{numerics} numerics; the CPU has."
        )
    x = _weight(device, x, function_of(scheme, numerics))
    _refuse_non_finite(device, "weight", x)
    rows, cols = x.shape
    dtype = _dtype(device, x)
    call = call_of(scheme, rows, cols, dtype, numerics)
    kind = torch.uint8 if scheme.element == "e2m1" else torch.int8
    codes = torch.empty(rows, cols, dtype=kind, device=x.device)
    if scheme.whole_tensor:
        assert outer is not None
        scale = outer.to(torch.float32).contiguous()
    else:
        kind = torch.uint8 if scheme.scale == "e8m0" else torch.float32
        scale = torch.empty(call.scales, dtype=kind, device=x.device)
    device.run(call, x, codes, scale)
    if scheme.element == "e4m3":
        codes = codes.view(torch.float8_e4m3fn)
    if scheme.whole_tensor:
        return Quantized(codes, scale[:, None])
    if scheme.scale != "e8m0":
        _refuse_non_finite(device, "scale", scale)
        # Rounded to it already.
        names = {"weight": x.dtype, "bf16": torch.bfloat16, "f32": torch.float32}
        scale = scale.to(names[scheme.scale])
    return Quantized(codes, scale)


def to_nz(x: Tensor) -> Tensor:
    """``x [n, bytes]`` of one byte each in FRACTAL_NZ, u8 ``[ceil(bytes / 32), N1, 16, 32]``.

    Elements of any width: give their bytes, ``x.view(torch.uint8)``, and view the result.
    """
    device = open_device()
    if not device.chip.ragged and x.shape[1] % 32:
        raise DeviceError(
            f"{device.chip.name} lays out rows of multiples of 32 bytes, not of {x.shape[1]}: "
            "pad them."
        )
    x = x.contiguous()
    rows, width = x.shape
    shape = (-(-width // 32), -(-rows // 16), 16, 32)
    out = device.torch.empty(shape, dtype=device.torch.uint8, device=x.device)
    device.run(Call("streamq_to_nz", (rows, width), (0, 0)), x, out)
    return out


def histogram(data: Tensor, tile: int) -> Tensor:
    """How often each byte is in each tile of ``data`` (u8 ``[n]``), i64 ``[n / tile, 256]``.

    ``tile``: bytes, a multiple of 512 up to 65,024, of which n is a multiple. What the sparse
    codec makes its dictionaries of: by tile, or of all of them added up.
    """
    device = open_device()
    if tile % 512 or not 0 < tile <= LONGEST_TILE or data.numel() % tile:
        raise DeviceError(
            f"{data.numel()} bytes are not whole tiles of {tile}, and tiles are multiples of 512 "
            f"up to {LONGEST_TILE}."
        )
    tiles = data.numel() // tile
    out = device.torch.empty(tiles, 256, dtype=device.torch.float32, device=data.device)
    if tiles:
        device.run(Call("streamq_histogram", (tiles, tile), (0, 0)), data.contiguous(), out)
    return out.to(device.torch.int64)


def keep_largest(x: Tensor, keep: int) -> Tensor:
    """``x [rows, cols]`` with all but the ``keep`` largest magnitudes of each row set to 0.

    Of equal magnitudes the first columns stay; what stays keeps its bits.
    """
    device = open_device()
    x = _weight(device, x, "streamq_keep_largest")
    rows, cols = x.shape
    if not 1 <= keep <= cols:
        raise DeviceError(f"a row of {cols} elements keeps 1 to {cols} of them, not {keep}")
    if cols * x.element_size() > LONGEST_ROW:
        raise DeviceError(
            f"a row has {cols * x.element_size()} bytes, and {LONGEST_ROW} is the most that is "
            "pruned on an NPU; the CPU has no limit."
        )
    _refuse_non_finite(device, "weight", x)
    out = device.torch.empty_like(x)
    if rows:
        kind = DTYPES[_dtype(device, x)]
        device.run(Call("streamq_keep_largest", (rows, cols, kind, keep), (0, 0)), x, out)
    return out


def _weight(device: Device, x: Tensor, function: str | None) -> Tensor:
    """``x`` as kernels take it. Raises DeviceError for what they do not."""
    if function not in device.chip.functions:
        raise DeviceError(f"{device.chip.name} does not run {function}; the CPU does the same.")
    if x.ndim != 2 or x.device.type != device.type:
        raise DeviceError(f"kernels take a matrix on an NPU, not {x.ndim} axes on {x.device}")
    _dtype(device, x)
    return x.contiguous()


def _dtype(device: Device, x: Tensor) -> str:
    torch = device.torch
    names = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
    if x.dtype not in names:
        raise DeviceError(f"weights are bf16, f16 or f32, not {x.dtype}")
    return names[x.dtype]


def _refuse_non_finite(device: Device, what: str, x: Tensor) -> None:
    """On the device, with torch: what the reduction of a kernel does to a NaN is not documented."""
    bad = ~device.torch.isfinite(x)
    if bad.any():
        row, col = bad.nonzero()[0].tolist()
        raise NonFiniteError(what, row, col)
