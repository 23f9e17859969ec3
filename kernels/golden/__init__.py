"""Inputs and what every scheme makes of them, for testing a backend bit by bit.

``inputs.safetensors`` holds one matrix per dtype, ``<scheme>.safetensors`` codes, scales
and zero points, named ``<dtype>.<numerics>.<part>``. ``make golden`` writes them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from streamq.kernels.reference import outer_scale

from streamq.schemes import ALL, SCHEMES, Numerics, Scheme

Array = np.ndarray[Any, Any]

FOLDER = Path(__file__).parent
DTYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}
NUMERICS: tuple[Numerics, ...] = ("f32", "weight")

_SEARCHED: dict[str, Scheme] = {
    name: replace(scheme, name=name, scales="search")
    for name, scheme in {
        "NVFP4_SEARCH": SCHEMES["NVFP4A16"],
        "NVFP4_ONE_LEVEL_SEARCH": Scheme("", "e2m1", 4, (1, 16), "e4m3"),
        "MXFP4_SEARCH": SCHEMES["MXFP4A16"],
        "INT2_SEARCH": replace(SCHEMES["W2A16"], block=(1, 24)),
        "INT3_SEARCH": SCHEMES["W3A16"],
        "INT3_NARROW_SEARCH": Scheme("", "int", 3, (1, 32), "f32", narrow=True),
        "INT4_SEARCH": SCHEMES["W4A16"],
        "INT4_ASYM_SEARCH": SCHEMES["W4A16_ASYM"],
        "INT5_ASYM_SEARCH": Scheme("", "int", 5, (1, 8), "bf16", symmetric=False),
        "INT8_CHANNEL_SEARCH": SCHEMES["W8A8"],
    }.items()
}

#: The presets, and what no preset uses but the kernels do.
CASES: dict[str, Scheme] = {
    **SCHEMES,
    "INT8_CHANNEL_NARROW": Scheme("INT8_CHANNEL_NARROW", "int", 8, (1, ALL), narrow=True),
    "INT4_GROUP_NARROW": Scheme("INT4_GROUP_NARROW", "int", 4, (1, 64), narrow=True),
    "INT8_CHANNEL_ASYM": Scheme("INT8_CHANNEL_ASYM", "int", 8, (1, ALL), symmetric=False),
    "INT3_GROUP_ASYM": Scheme("INT3_GROUP_ASYM", "int", 3, (1, 32), symmetric=False),
    "INT4_GROUP_F32_SCALE": Scheme("INT4_GROUP_F32_SCALE", "int", 4, (1, 32), "f32"),
    "FP8_TENSOR": Scheme("FP8_TENSOR", "e4m3", 8, (ALL, ALL)),
    "FP8_BLOCK_F32_SCALE": Scheme("FP8_BLOCK_F32_SCALE", "e4m3", 8, (128, 128), "f32"),
    "FP8_BLOCK_UE8M0": Scheme("FP8_BLOCK_UE8M0", "e4m3", 8, (128, 128), "f32", power_of_two=True),
    "INT8_CHANNEL_UNROUNDED": Scheme("INT8_CHANNEL_UNROUNDED", "int", 8, (1, ALL), unrounded=True),
    "NVFP4_ONE_LEVEL": Scheme("NVFP4_ONE_LEVEL", "e2m1", 4, (1, 16), "e4m3"),
    "INT4_GROUP_BF16_SCALE": replace(SCHEMES["W4A16"], scale="bf16"),
    **_SEARCHED,
}


def outer_of(x: Array, scheme: Scheme, numerics: Numerics) -> Array | None:
    """``outer`` f32 ``[rows]`` for a matrix, or None where the scheme needs none.

    Taken as one tensor where that has one scale. Else each row is a tensor of its own, as in a
    stack, or the largest of them would leave the others nothing but zeros.
    """
    if not scheme.needs_amax:
        return None
    tops = np.abs(x.astype(np.float32)).max(axis=1)
    if scheme.whole_tensor:
        tops[:] = tops.max()
    return outer_scale(tops, scheme, x.dtype, numerics).astype(np.float32)
