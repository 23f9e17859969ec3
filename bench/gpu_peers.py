"""What the kernels of ``bench/gpu.py`` are measured against: torch eager, and torchao's own."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

Call = Callable[[], Any]


def eager(x: Any) -> dict[str, Call]:
    """Schemes as torch computes them, one operation after the other; keys begin with a scheme."""
    import torch

    e4m3 = torch.float8_e4m3fn
    rows, cols = x.shape

    def amax() -> Any:
        return x.abs().amax(dim=1)

    def fp8_rows() -> Any:
        w = x.float()
        s = w.abs().amax(dim=1, keepdim=True) / 448
        return (w / s).clamp(-448, 448).to(e4m3), s.to(x.dtype)

    def fp8_blocks() -> Any:
        w = x.float().reshape(rows // 128, 128, cols // 128, 128)
        s = w.abs().amax(dim=(1, 3), keepdim=True) / 448
        return (w / s).clamp(-448, 448).to(e4m3).reshape(rows, cols), s.to(x.dtype)

    def int8_rows() -> Any:
        w = x.float()
        s = w.abs().amax(dim=1, keepdim=True) / 127.5
        return (w / s).round().clamp(-128, 127).to(torch.int8), s.to(x.dtype)

    def int4_groups() -> Any:
        w = x.float().reshape(rows, cols // 128, 128)
        s = w.abs().amax(dim=2, keepdim=True) / 7.5
        codes = ((w / s).round().clamp(-8, 7) + 8).to(torch.uint8).reshape(rows, cols)
        return codes[:, ::2] | codes[:, 1::2] << 4, s.to(x.dtype)

    calls = {
        "amax": amax, "FP8_DYNAMIC": fp8_rows, "FP8_BLOCK": fp8_blocks, "W8A8": int8_rows,
        "W4A16": int4_groups,
    }  # fmt: skip
    return {f"{name} torch eager": call for name, call in calls.items()}


def torchao(x: Any) -> dict[str, Call]:
    """torchao 0.18's own conversions of the same schemes, where it is installed."""
    if find_spec("torchao") is None:
        return {}
    import torch
    from torchao.prototype.mx_formats.mx_tensor import to_mx
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize
    from torchao.quantization import Float8Tensor

    outer = torch.tensor(1 / 25000, device=x.device)
    calls = {
        "NVFP4A16": lambda: nvfp4_quantize(x, per_tensor_scale=outer),
        "MXFP4A16": lambda: to_mx(x, torch.float4_e2m1fn_x2, 32),
        "MXFP8A16": lambda: to_mx(x, torch.float8_e4m3fn, 32),
        "FP8_DYNAMIC": lambda: Float8Tensor.from_hp(x),
    }
    return {f"{name} torchao": call for name, call in calls.items()}
