"""Searched scales: never worse than absmax, ties to absmax, and what they gain in dB."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from streamq.kernels import cpu, reference
from streamq.kernels.golden import DTYPES, NUMERICS, outer_of
from streamq.kernels.reference import search as reference_search

from streamq.errors import NonFiniteError
from streamq.schemes import ALL, SCHEMES, Scheme

BLOCKS = {
    "NVFP4": SCHEMES["NVFP4A16"],
    "NVFP4 without a global scale": Scheme("", "e2m1", 4, (1, 16), "e4m3"),
    "MXFP4": SCHEMES["MXFP4A16"],
    **{f"INT{b}": SCHEMES[f"W{b}A16"] for b in range(2, 9)},
    **{f"INT{b} asym": SCHEMES[f"W{b}A16_ASYM"] for b in range(2, 9)},
    "INT4 g24, f16 scale": Scheme("", "int", 4, (1, 24), "f16"),
    "INT4 narrow, f32 scale": Scheme("", "int", 4, (1, 32), "f32", narrow=True),
    "INT8 channel": SCHEMES["W8A8"],
    "INT4 channel asym": Scheme("", "int", 4, (1, ALL), symmetric=False),
}


def searched(scheme):
    return replace(scheme, scales="search")


@st.composite
def matrices(draw, scheme, dtypes=DTYPES):
    """Finite matrices: ordinary numbers, few values, one outlier a row, or any bit pattern."""
    dtype = np.dtype(dtypes[draw(st.sampled_from(list(dtypes)))])
    cols = draw(st.integers(1, 70)) if scheme.block[1] == ALL else scheme.block[1]
    cols *= draw(st.integers(1, 5))
    rows = draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["normal", "few", "outlier", "bits"]))
    if kind == "bits":
        raw = rng.integers(0, 1 << 8 * dtype.itemsize, (rows, cols), dtype=f"u{dtype.itemsize}")
        x = raw.view(dtype)
        return np.where(np.isfinite(x.astype(np.float32)), x, np.zeros((), dtype))
    x = rng.standard_normal((rows, cols)) * np.exp2(rng.integers(-12, 4, (rows, 1)))
    if kind == "few":
        x = rng.integers(-4, 5, (rows, cols)) * np.exp2(rng.integers(-9, 5, (rows, 1)))
    elif kind == "outlier":
        x[:, rng.integers(cols)] = float(ml_dtypes.finfo(dtype).max) / 8
    return x.astype(dtype)


def block_errors(x, q, scheme):
    """Squared error of every block as a loader sees it, f64, from the codes."""
    with np.errstate(over="ignore", invalid="ignore"):
        error = (x.astype(np.float32) - reference.dequantize(q, scheme)).astype(np.float64)
        blocks = (error * error).reshape(*q.scale.shape, -1)
        return reference_search.sum_of_neighbours(blocks)


@pytest.mark.parametrize("name", BLOCKS)
@given(data=st.data())
def test_no_block_is_worse_than_with_absmax(name, data):
    scheme = BLOCKS[name]
    x = data.draw(matrices(scheme))
    numerics = data.draw(st.sampled_from(NUMERICS))
    outer = outer_of(x, scheme, numerics)
    try:
        absmax = cpu.quantize(x, scheme, numerics=numerics, outer=outer)
    except NonFiniteError as e:  # a scale that its dtype cannot hold is refused all the same
        with pytest.raises(NonFiniteError, match=str(e)):
            cpu.quantize(x, searched(scheme), numerics=numerics, outer=outer)
        return
    found = cpu.quantize(x, searched(scheme), numerics=numerics, outer=outer)
    before, after = block_errors(x, absmax, scheme), block_errors(x, found, scheme)
    assert not np.isnan(after).any()
    assert (after <= before).all()
    same = after == before
    for part in ("scale", "zero_point"):
        if getattr(found, part) is not None:
            a, b = getattr(found, part), getattr(absmax, part)
            assert a[same].tobytes() == b[same].tobytes(), "a tie that left absmax"


@pytest.mark.parametrize("name", ["INT4 g24, f16 scale", "INT4 narrow, f32 scale",
                                  "INT4 channel asym", "INT6 asym", "INT7"])  # fmt: skip
@given(data=st.data())
def test_cpu_equals_the_reference_where_no_golden_file_does(name, data):
    scheme = searched(BLOCKS[name])
    x = data.draw(matrices(scheme))
    numerics = data.draw(st.sampled_from(NUMERICS))
    try:
        wanted = reference.quantize(x, scheme, numerics=numerics)
    except NonFiniteError as e:
        with pytest.raises(NonFiniteError, match=str(e)):
            cpu.quantize(x, scheme, numerics=numerics)
        return
    got = cpu.quantize(x, scheme, numerics=numerics)
    assert got.codes.tobytes() == wanted.codes.tobytes()
    assert got.scale.tobytes() == wanted.scale.tobytes()
    if wanted.zero_point is not None:
        assert got.zero_point.tobytes() == wanted.zero_point.tobytes()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", BLOCKS)
def test_zeros_subnormals_and_the_largest_of_a_dtype(name, dtype):
    scheme, info = BLOCKS[name], ml_dtypes.finfo(dtype)
    cols = 48 if scheme.block[1] == ALL else 2 * scheme.block[1]
    top = float(info.max) * (1 / 16 if "f16" in name else 1 / 4)  # a range that f32 can hold
    x = np.zeros((7, cols))
    x[1] = -0.0
    x[2, ::3] = float(info.smallest_subnormal)
    x[3] = float(info.smallest_subnormal) * (np.arange(cols) - cols // 2)
    x[4] = top
    x[5, ::2] = -top
    x[6] = np.linspace(-top, top, cols)
    if name == "INT4 g24, f16 scale" and dtype is not np.float16:
        x[4:] = 0  # a scale of f16 is 65504 at most
    x = x.astype(dtype)
    outer = outer_of(x, scheme, "f32")
    absmax = cpu.quantize(x, scheme, outer=outer)
    found = cpu.quantize(x, searched(scheme), outer=outer)
    assert (block_errors(x, found, scheme) <= block_errors(x, absmax, scheme)).all()
    assert found.scale[:2].tobytes() == absmax.scale[:2].tobytes()
    wanted = reference.quantize(x, searched(scheme), outer=outer)
    assert found.codes.tobytes() == wanted.codes.tobytes()


@pytest.mark.parametrize("name", ["MXFP8A16", "FP8_DYNAMIC", "FP8_BLOCK"])
@pytest.mark.parametrize("backend", [reference, cpu], ids=["reference", "cpu"])
def test_fp8_has_nothing_to_search_for(backend, name):
    x = np.random.default_rng(5).standard_normal((130, 256)).astype(ml_dtypes.bfloat16)
    absmax = backend.quantize(x, SCHEMES[name])
    found = backend.quantize(x, searched(SCHEMES[name]))
    assert found.scale.tobytes() == absmax.scale.tobytes()
    assert found.codes.tobytes() == absmax.codes.tobytes()


def test_sums_of_neighbours_take_the_odd_one_later():
    x = np.array([1.0, 2.0**53, 1.0, 1.0, 3.0])
    assert reference_search.sum_of_neighbours(x) == ((1 + 2.0**53) + 2.0) + 3
    assert reference_search.sum_of_neighbours(x[:1]) == 1


def synthetic():
    """Matrices bf16 [512, 1024] as the table of docs/quality.md has them."""
    rng, shape = np.random.default_rng(0), (512, 1024)
    weights = {
        "Gaussian": rng.standard_normal(shape) * 0.02,
        "Laplace": rng.laplace(0, 0.02, shape),
        "t5": rng.standard_t(5, shape) * 0.02,
        "rows": rng.standard_normal(shape) * 0.02 * rng.lognormal(0, 1, (shape[0], 1)),
    }
    return {name: w.astype(ml_dtypes.bfloat16) for name, w in weights.items()}


def sqnr(x, scheme):
    w = x.astype(np.float64)
    outer = None
    if scheme.needs_amax:  # one tensor, not one for each row
        g = reference.outer_scale(np.abs(w).max(), scheme, x.dtype, "f32")
        outer = np.full(len(x), g, np.float32)
    error = w - reference.dequantize(cpu.quantize(x, scheme, outer=outer), scheme)
    return 10 * np.log10((w * w).sum() / (error * error).sum())


#: dB of weight SQNR that a search has to gain on Gaussian, Laplace, t5 and row-varying weights.
GAINS = {
    "NVFP4": (1.3, 0.9, 0.9, 1.1),
    "MXFP4": (0.03, 0.05, 0.05, 0.03),
    "INT2": (3.0, 2.9, 3.2, 3.0),
    "INT3": (1.6, 1.7, 1.9, 1.6),
    "INT4": (0.75, 0.75, 0.75, 0.75),
    "INT4 asym": (0.4, 0.4, 0.4, 0.4),
    "INT8": (0.3, 0.25, 0.2, 0.2),
    "INT4 channel asym": (1.3, 1.5, 1.7, 1.3),
    "INT8 channel": (0.1, 0.05, 0.05, 0.05),
}


@pytest.mark.parametrize("name", GAINS)
def test_gain_in_db(name):
    scheme = BLOCKS[name]
    for (kind, x), gain in zip(synthetic().items(), GAINS[name], strict=True):
        assert sqnr(x, searched(scheme)) >= sqnr(x, scheme) + gain, kind
