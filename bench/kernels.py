"""GB/s of bf16 input that each kernel takes on one thread, beside memcpy in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from streamq.kernels import cpu

from streamq.formats import FORMATS
from streamq.schemes import SCHEMES, Quantized

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
        packing = FORMATS["compressed-tensors"].layout(ROWS, COLS, "BF16", scheme).packing
        buffers = [np.empty(*b) for b in cpu.shapes(ROWS, COLS, x.dtype, scheme, packing)]
        outer = np.full(ROWS, 25000, np.float32) if scheme.needs_amax else None
        out = Quantized(*buffers)
        field[name] = _call(x, scheme, packing, outer, out)
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


def _call(x: Any, scheme: Any, packing: Any, outer: Any, out: Any) -> Callable[[], Any]:
    return lambda: cpu.quantize(x, scheme, packing, outer=outer, out=out)
