"""Write the golden files from the reference: ``python -m streamq.kernels.golden.make``."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from streamq.kernels.golden import CASES, DTYPES, FOLDER, NUMERICS, Array, outer_of
from streamq.kernels.reference import quantize

ROWS, COLS = 24, 384


def inputs(dtype: Any) -> Array:
    """A matrix whose rows each go at one corner of the arithmetic."""
    rng = np.random.default_rng(20)
    info = ml_dtypes.finfo(dtype)
    x = rng.standard_normal((ROWS, COLS)) * 0.02
    x[1] = 0
    x[2, 128:256] = 0  # a zero group between others
    x[2, ::2] = np.where(x[2, ::2] == 0, -0.0, x[2, ::2])
    x[3, ::32] = 3.0  # one outlier per block
    # Ties of every rounding: the largest element makes the scale a power of two.
    x[4] = np.tile([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -1.25, -1.75, -2.5,
                    -3.5, -5, -0.0], COLS // 16)  # fmt: skip
    x[5] = np.resize(np.concatenate(([448], np.arange(1, 48) + 0.5, np.arange(17, 31) * 15)), COLS)
    x[6] = np.resize(np.concatenate(([7.5], np.arange(-8, 8) + 0.5)), COLS)
    x[7] = np.resize(np.concatenate(([127.5], np.arange(-128, 128, 3) + 0.5)), COLS)
    x[8] = np.resize([float(info.smallest_subnormal), -float(info.smallest_subnormal), 0], COLS)
    x[9] = np.resize(float(info.smallest_subnormal) * np.arange(-40, 41), COLS)
    x[10] = float(info.tiny) * rng.uniform(0.5, 2, COLS)
    x[11] = np.abs(x[11]) + 1  # one sign: zero points at the ends of their range
    x[12] = -np.abs(x[12]) - 1
    x[13] = 1
    x[14] = np.exp2(rng.integers(-12, 3, COLS)) * rng.choice([-1, 1], COLS)
    x[15] = rng.standard_normal(COLS) * np.exp2(rng.integers(-20, 4, COLS // 32).repeat(32))
    for i, mantissa in enumerate((1.0, 1.5, 1.74, 1.75, 1.76, 1.99)):  # MX rounds amax up at 1.75
        x[16 + i] *= mantissa / np.abs(x[16 + i]).reshape(-1, 32).max(1).repeat(32)
    x[22] = rng.uniform(-1, 1, COLS) * float(info.max) / 8
    x[23, 0] = float(info.max) / 4
    return x.astype(dtype)


def main() -> None:
    """Write inputs and the outputs of every scheme."""
    matrices = {name: inputs(dtype) for name, dtype in DTYPES.items()}
    _write("inputs", matrices)
    for name, scheme in CASES.items():
        made: dict[str, Array] = {}
        for dtype, x in matrices.items():
            for numerics in NUMERICS:
                q = quantize(x, scheme, numerics=numerics, outer=outer_of(x, scheme, numerics))
                made[f"{dtype}.{numerics}.codes"] = q.codes
                if not scheme.whole_tensor:
                    made[f"{dtype}.{numerics}.scale"] = q.scale
                if q.zero_point is not None:
                    made[f"{dtype}.{numerics}.zero_point"] = q.zero_point
        _write(name, made)


def _write(name: str, arrays: dict[str, Array]) -> None:
    contiguous = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
    save_file(contiguous, FOLDER / f"{name}.safetensors")


if __name__ == "__main__":
    main()
