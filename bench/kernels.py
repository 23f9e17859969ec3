"""GB/s of each kernel on one thread, in bytes of the bf16 weight, beside memcpy in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from streamq.kernels import cpu
from streamq.kernels.cpu import packing

from streamq.formats import FORMATS
from streamq.schemes import BYTES, SCHEMES, Packing, Quantized, Scheme

#: One slab of a conversion: it stays in the L2 cache there as well.
ROWS, COLS = 128, 4096
TIMES, ROUNDS = 200, 7


def measure() -> list[dict[str, Any]]:
    """One row per scheme: the medians of alternating rounds."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((ROWS, COLS)) * 0.02).astype(ml_dtypes.bfloat16)
    y = np.empty_like(x)
    field: dict[str, Callable[[], Any]] = {
        "memcpy": lambda: np.copyto(y.view(np.uint16), x.view(np.uint16)),
        "amax": lambda: cpu.amax(x),
    }
    for name, scheme in SCHEMES.items():
        kind = _packing(scheme)
        buffers = [np.empty(*b) for b in cpu.shapes(ROWS, COLS, x.dtype, scheme, kind)]
        outer = np.full(ROWS, 25000, np.float32) if scheme.needs_amax else None
        out = Quantized(*buffers)
        field[name] = _call(x, scheme, kind, outer, out)
    for name in ("NVFP4A16", "MXFP4A16", "FP8_BLOCK", "W8A8", "W4A16", "W4A16_ASYM", "W3A16"):
        field |= _reading(x, name)
    codes = rng.integers(-8, 8, (ROWS, COLS), np.int8)
    awq, gptq = packing.pack_columns(codes, 4, 8), packing.pack_rows_transposed(codes, 4, 8)
    field |= {
        "AWQ words": lambda: packing.pack_columns(codes, 4, 8, None, awq),
        "AWQ codes": lambda: packing.unpack_columns(awq, 4, 8, None, codes),
        "GPTQ words": lambda: packing.pack_rows_transposed(codes, 4, 8, gptq),
        "GPTQ codes": lambda: packing.unpack_rows_transposed(gptq, 4, 8, codes),
    }
    for call in field.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in field}
    for _ in range(ROUNDS):
        for name, call in field.items():
            began = time.perf_counter()
            for _ in range(TIMES):
                call()
            seconds[name].append((time.perf_counter() - began) / TIMES)
    speed = {name: x.nbytes / statistics.median(times) / 1e9 for name, times in seconds.items()}
    return [
        {"kernel": name, "GB/s": f"{v:.1f}", "of memcpy": f"{v / speed['memcpy']:.2f}"}
        for name, v in speed.items()
    ]


def _packing(scheme: Scheme) -> Packing:
    return FORMATS["compressed-tensors"].layout(ROWS, COLS, "BF16", scheme).packing


def _reading(x: Any, name: str) -> dict[str, Callable[[], Any]]:
    """What reads the codes of a scheme: their errors, and their values as f32."""
    scheme, kind = SCHEMES[name], _packing(SCHEMES[name])
    outer = np.full(ROWS, 25000, np.float32) if scheme.needs_amax else None
    q, plain = (cpu.quantize(x, scheme, p, outer=outer) for p in (kind, BYTES))
    out = np.empty(x.shape, np.float32)
    return {
        f"{name} errors": lambda: cpu.energies(x, q, scheme, kind, outer),
        f"{name} values": lambda: cpu.dequantize(plain, scheme, out),
    }


def _call(x: Any, scheme: Any, packing: Any, outer: Any, out: Any) -> Callable[[], Any]:
    return lambda: cpu.quantize(x, scheme, packing, outer=outer, out=out)
