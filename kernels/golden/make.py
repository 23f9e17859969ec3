"""Write the golden files from the reference: ``python -m streamq.kernels.golden.make``."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from streamq.kernels.golden import CASES, DTYPES, FOLDER, NUMERICS, Array, outer_of
from streamq.kernels.reference import quantize

ROWS, COLS = 30, 384


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
    # Ties of quotients whose divisor is no power of two: x / d is exact, x * (1 / d) is not.
    odd = np.arange(17, 33, 2)  # between two e4m3 values, in every binade
    x[24] = np.resize(np.concatenate(([448], odd / 2, odd, odd * 2, -odd * 4, odd * 8)), COLS) * 3
    scales = np.resize(np.array([3, 5, 7, 9, 11, 13, 15]), COLS // 16)  # of NVFP4, under 2688
    x[25] = (scales[:, None] * x[4, :16]).reshape(-1)
    x[25, 0] = 2688
    x[26] = x[25] * 3
    x[27] = 0
    x[27, ::16] = np.resize(odd * 6, COLS // 16)  # a sixth of it is between two block scales
    x[27, 128::16] = 6  # 1 * 6 is 1.5 * 4, and 1.1 * 6 is nothing else
    x[27, 256::16] = 72.5  # a sixth of it is too, under 2240; not so 72.5 * (1 / 6)
    x[27, 0] = 2240
    x[28] = float(info.smallest_subnormal) * np.resize(np.arange(-640, 640, 7), COLS)
    x[29] = np.resize([6, -6, 4, 2, 0, -2], COLS)  # as exact under twice the MX scale
    x[29, 0] = 57344  # 1.75 * 2^15, behind which f16 has no power of two
    x[29, 128:256] = 0
    x[29, 128:130] = 1, -(2.0**-8)  # a range between two bf16
    x[29, 256:] = 0
    x[29, 256::32] = 7.5 * (1 + 2.0**-8)  # a scale between two bf16
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
