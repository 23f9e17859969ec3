"""What the kernels say of errors, beside numpy on the values of the reference."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from streamq.kernels import cpu, reference
from streamq.kernels.cpu import error
from streamq.kernels.golden import CASES, outer_of

from streamq.schemes import BYTES, SCHEMES, Packing, Quantized, Scheme

#: The largest codes and half the step behind them, in values of codes.
ENDS = {"e2m1": 6 + 1, "e4m3": 448 + 16}


def packing_of(scheme):
    """The packing a fused kernel emits for a scheme."""
    if scheme.element == "e2m1":
        return Packing("nibbles", 4)
    return BYTES if scheme.element == "e4m3" else Packing("words", scheme.bits)


def matrix(scheme, dtype, seed=0):
    """Rows of different sizes with a few that stick out, and one of zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((24, 1024)) * np.exp2(rng.integers(-9, 3, (24, 1)))
    x[rng.random(x.shape) < 0.002] *= 20
    x[5] = 0
    return x.astype(dtype)


def expected(x, values, scale, zero, scheme, member):
    """Energies, largest error and clipped weights by numpy in f64, all by member."""
    w, v = x.astype(np.float64), values.astype(np.float64)
    if scheme.element == "int":
        lo, hi = scheme.code_range
        middle, reach = (lo + hi) / 2, (hi - lo + 1) / 2
    else:
        middle, reach = 0, ENDS[scheme.element]
    clipped = abs(w - (middle - zero) * scale) > reach * (1 + 1 / 128) * scale
    rows = [
        ((w[m] ** 2).sum(), ((w[m] - v[m]) ** 2).sum(), abs(w[m] - v[m]).max(), clipped[m].sum())
        for m in (member == i for i in range(member.max() + 1))
    ]
    return np.array(rows, float)


def sampled(x, values, member):
    """Every 127th error of a row, by half octaves below the row's largest weight."""
    w, bins = x.astype(np.float64), np.zeros((member.max() + 1, error.BINS), int)
    for r, row in enumerate(w):
        for i in range(r * 17 % 127, len(row), 127):
            e, top = abs(row[i] - values[r, i]), abs(row).max()
            place = np.floor(-2 * np.log2(e / top)) if e else error.BINS - 1
            bins[member[r], int(np.clip(place, 0, error.BINS - 1))] += 1
    return bins


def spread(scheme, q, outer, shape):
    """Scale and zero point of each element, f64."""
    scale = q.scale.astype(np.float32) if q.scale.dtype != np.uint8 else np.exp2(
        q.scale.astype(np.float64) - 127)  # fmt: skip
    if scheme.whole_tensor:
        scale = outer[:1].reshape(1, 1)
    if scheme.two_level:
        scale = scale / outer[:, None]
    zero = np.zeros_like(scale) if q.zero_point is None else q.zero_point.astype(float)
    found = (reference.spread(np.asarray(a, np.float32), scheme, shape) for a in (scale, zero))
    return [a.astype(np.float64) for a in found]


#: Every way through the kernel: pairs and bytes, zero points, blocks of rows, scales above.
WAYS = [
    "NVFP4", "MXFP4", "MXFP8", "FP8_DYNAMIC", "FP8_BLOCK", "FP8_TENSOR", "W8A8", "W2A16", "W3A16",
    "W4A16", "W8A16", "W3A16_ASYM", "W4A16_ASYM", "W8A16_ASYM", "FP8_BLOCK_UE8M0",
    "NVFP4_ONE_LEVEL", "INT8_CHANNEL_ASYM",
]  # fmt: skip


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, ml_dtypes.bfloat16) for name in WAYS), ("W4A16_ASYM", np.float32),
     ("NVFP4", np.float16)],
)  # fmt: skip
def test_losses_are_those_of_numpy(name, dtype, packed):
    scheme = CASES[name] if name in CASES else SCHEMES[name]
    x = matrix(scheme, dtype)
    member = np.repeat(np.arange(4), [1, 7, 10, 6])
    outer = outer_of(x, scheme, "f32")
    packing = packing_of(scheme) if packed else BYTES
    q = cpu.quantize(x, scheme, packing, outer=outer)
    plain = reference.quantize(x, scheme, outer=outer)
    if scheme.whole_tensor:
        plain = replace(plain, scale=outer[:1].reshape(1, 1))
    values = reference.dequantize(plain, scheme)
    scale, zero = spread(scheme, plain, outer, x.shape)
    got, bins = cpu.losses(x, q, scheme, packing, outer, member)
    wanted = expected(x, values, scale, zero, scheme, member)
    np.testing.assert_allclose(got[:, :3], wanted[:, :3], rtol=1e-5)
    np.testing.assert_array_equal(got[:, 3], wanted[:, 3])
    # f32 against f64: an error at the border of two bins may fall into the other, and what is
    # below 2^-18 of the row's largest weight is rounding.
    counts = sampled(x, values, member)
    assert bins.sum() == counts.sum()
    assert abs(bins - counts)[:, :36].sum() <= 0.05 * counts.sum()


def test_clipped_weights_are_counted():
    """Searched scales of 2 bits clip many weights, those of the largest magnitude none."""
    x = matrix(None, np.float32)[:5]
    scheme, member = SCHEMES["W2A16"], np.zeros(5, np.int64)
    found = [
        cpu.losses(x, cpu.quantize(x, s), s, BYTES, None, member)[0][0, 3]
        for s in (scheme, replace(scheme, scales="search"))
    ]
    assert found[0] == 0
    assert found[1] > 50


@pytest.mark.parametrize("sign", [1, -1])
def test_blocks_with_a_minimum(sign):
    """MLX: a value is code x scale + bias with codes from 0, and scales of either sign."""
    scheme = Scheme("odd", "int", 4, (1, 64), symmetric=False)
    rng = np.random.default_rng(3)
    codes = rng.integers(-8, 8, (6, 128)).astype(np.int8)
    scale = (sign * rng.uniform(0.5, 2, (6, 2))).astype(np.float32)
    bias = rng.standard_normal((6, 2)).astype(np.float32)
    q = Quantized(codes, scale, None, None, bias)
    wide, low = np.repeat(scale, 64, axis=1), np.repeat(bias, 64, axis=1)
    values = (codes + 8) * wide + low
    x = (values + rng.uniform(-0.5, 0.5, values.shape) * wide).astype(np.float32)
    x[2, 3], x[4, 100] = values[2].max() + 30, values[4].min() - 30
    member = np.array([0, 0, 0, 1, 1, 1])
    got, bins = cpu.losses(x, q, scheme, BYTES, None, member)
    e = x.astype(float) - values
    squares, halves = x.astype(float) ** 2, (2, -1)
    parts = [squares.reshape(halves).sum(1), (e**2).reshape(halves).sum(1),
             abs(e).reshape(halves).max(1), [1, 1]]  # fmt: skip
    np.testing.assert_allclose(got.T, parts, rtol=1e-5)
    assert bins.sum() == sum(len(range(r * 17 % 127, 128, 127)) for r in range(6))
