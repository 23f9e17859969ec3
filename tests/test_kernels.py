"""Every backend equals the reference bit by bit, and the reference equals its golden files."""

import hashlib
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from streamq.kernels import cpu, reference
from streamq.kernels.cpu import bits
from streamq.kernels.golden import CASES, DTYPES, FOLDER, NUMERICS, make, outer_of

from streamq.checkpoint import open_checkpoint
from streamq.errors import NonFiniteError
from streamq.schemes import ALL, BYTES, SCHEMES, Packing, Quantized, Scheme
from streamq.tensors import DTYPES as TAGS

BACKENDS = {"reference": reference, "cpu": cpu}


def read(name):
    path = FOLDER / f"{name}.safetensors"
    with open_checkpoint(path) as c:
        raw = path.read_bytes()
        return {
            t.name: np.frombuffer(raw[t.start : t.end], TAGS[t.dtype].numpy).reshape(t.shape)
            for t in c.tensors.values()
        }


def packing_of(scheme):
    """The packing a fused kernel emits for a scheme."""
    if scheme.element == "e2m1":
        return Packing("nibbles", 4)
    return BYTES if scheme.element == "e4m3" else Packing("words", scheme.bits)


def equal(a, b):
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_golden(backend, name):
    scheme, inputs, golden = CASES[name], read("inputs"), read(name)
    run = BACKENDS[backend]
    assert run.supports(scheme)
    for dtype in DTYPES:
        for numerics in NUMERICS:
            x = inputs[dtype]
            outer = outer_of(x, scheme, numerics)
            q = run.quantize(x, scheme, numerics=numerics, outer=outer)
            key = f"{dtype}.{numerics}."
            assert equal(q.codes, golden[key + "codes"]), key
            if not scheme.whole_tensor:
                assert equal(q.scale, golden[key + "scale"]), key
            if q.zero_point is not None:
                assert equal(q.zero_point, golden[key + "zero_point"]), key


def test_golden_files_are_those_that_make_golden_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "FOLDER", tmp_path)
    make.main()
    for path in FOLDER.glob("*.safetensors"):
        new = (tmp_path / path.name).read_bytes()
        assert hashlib.sha256(new).digest() == hashlib.sha256(path.read_bytes()).digest(), path.name


@st.composite
def matrices(draw, scheme):
    """Finite matrices of legal shapes: ordinary numbers, or any bit pattern."""
    dtype = np.dtype(draw(st.sampled_from(list(DTYPES.values()))))
    step = 1 if scheme.block[1] == ALL or scheme.block[0] != 1 else scheme.block[1]
    cols = step * draw(st.integers(1, 300 if step == 1 else 5))
    rows = draw(st.integers(1, 140 if scheme.block[0] not in (1, ALL) else 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    if draw(st.booleans()):
        spread = np.exp2(rng.integers(-12, 4, (rows, 1)))
        return (rng.standard_normal((rows, cols)) * spread).astype(dtype)
    raw = rng.integers(0, 1 << 8 * dtype.itemsize, (rows, cols), dtype=f"u{dtype.itemsize}")
    x = raw.view(dtype)
    return np.where(np.isfinite(x.astype(np.float32)), x, np.zeros((), dtype))


@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
def test_cpu_equals_the_reference(name, data):
    scheme = CASES[name]
    x = data.draw(matrices(scheme))
    numerics = data.draw(st.sampled_from(NUMERICS))
    packing = data.draw(st.sampled_from([BYTES, packing_of(scheme)]))
    outer = outer_of(x, scheme, numerics)
    assert equal(cpu.amax(x), reference.amax(x))
    try:
        wanted = reference.quantize(x, scheme, packing, numerics=numerics, outer=outer)
    except NonFiniteError as e:  # a scale that its dtype cannot hold
        with pytest.raises(NonFiniteError, match=str(e)):
            cpu.quantize(x, scheme, packing, numerics=numerics, outer=outer)
        return
    got = cpu.quantize(x, scheme, packing, numerics=numerics, outer=outer)
    assert equal(got.codes.view(np.uint8), wanted.codes.view(np.uint8))
    if not scheme.whole_tensor:
        assert equal(got.scale, wanted.scale)
    if wanted.zero_point is not None:
        assert equal(got.zero_point, wanted.zero_point)


@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
def test_energies_are_those_of_the_dequantized_weight(name, data):
    scheme = CASES[name]
    x = data.draw(matrices(scheme))
    packing = data.draw(st.sampled_from([BYTES, packing_of(scheme)]))
    outer = outer_of(x, scheme, "f32")
    try:
        q = cpu.quantize(x, scheme, packing, outer=outer)
    except NonFiniteError:
        return
    plain = reference.quantize(x, scheme, outer=outer)
    if scheme.whole_tensor:
        plain = replace(plain, scale=outer[:1].reshape(1, 1))
    w = x.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        e = w - reference.dequantize(plain, scheme)
    wanted = np.stack([(w * w).sum(1), (e * e).sum(1)], 1)
    rows = np.isfinite(wanted).all(1)  # f32 cannot hold the dequantized value
    got = cpu.energies(x, q, scheme, packing, outer)
    # An error of an element may be off by an f32 rounding of its value: (e + d)^2 - e^2.
    top = abs(x.astype(np.float64)).max(1, keepdims=True)
    off = x.shape[1] * (2.0**-149 + top * 2.0**-22) ** 2
    slack = 1e-5 * wanted + 2 * np.sqrt(wanted * off) + off
    assert (abs(got - wanted) <= slack)[rows].all()


@pytest.mark.parametrize(("cols", "group"), [(33, ALL), (34, ALL), (45, 9), (40, 8), (200, 40)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [3, 4, 8])
def test_energies_of_packed_codes_are_those_of_unpacked_ones(width, symmetric, cols, group):
    scheme = Scheme("odd", "int", width, (1, group), symmetric=symmetric)
    x = np.random.default_rng(cols).standard_normal((3, cols)).astype(np.float32)
    plain, words = (
        cpu.energies(x, cpu.quantize(x, scheme, packing), scheme, packing, None)
        for packing in (BYTES, Packing("words", width))
    )
    np.testing.assert_allclose(words, plain, rtol=1e-5)


def test_weights_that_are_values_of_codes_have_no_error():
    e4m3 = np.arange(127, dtype=np.uint8).view(reference.E4M3).astype(np.float32)
    exact = {
        "W4A16_ASYM": np.tile(np.arange(-8, 8, dtype=np.float32), 8),
        "FP8_DYNAMIC": np.concatenate([e4m3, -e4m3]),
        "MXFP4": np.tile(np.concatenate([reference.E2M1_VALUES, -reference.E2M1_VALUES]), 2),
        "NVFP4": np.tile(reference.E2M1_VALUES, 6),
    }
    for name, row in exact.items():
        scheme, x = SCHEMES[name], row[None]
        outer = np.float32([256]) if scheme.two_level else None
        q = cpu.quantize(x, scheme, packing_of(scheme), outer=outer)
        ((signal, noise),) = cpu.energies(x, q, scheme, packing_of(scheme), outer)
        assert signal == pytest.approx((row.astype(np.float64) ** 2).sum())
        assert noise == 0, name


def same_values(a, b):
    """Equal bits, but any NaN equals any other."""
    nan = np.isnan(b)
    return equal(np.isnan(a), nan) and equal(np.where(nan, 0, a), np.where(nan, 0, b))


@pytest.mark.parametrize("name", CASES)
def test_golden_codes_have_the_values_of_the_reference(name):
    scheme, inputs, golden = CASES[name], read("inputs"), read(name)
    for dtype in DTYPES:
        for numerics in NUMERICS:
            key = f"{dtype}.{numerics}."
            g = outer_of(inputs[dtype], scheme, numerics)
            scale = g[:1, None] if scheme.whole_tensor else golden[key + "scale"]
            q = Quantized(golden[key + "codes"], scale, golden.get(key + "zero_point"),
                          g if scheme.two_level else None)  # fmt: skip
            assert equal(cpu.dequantize(q, scheme), reference.dequantize(q, scheme)), key


@st.composite
def any_bytes(draw, scheme):
    """Codes, scales, zero points and global scales of any bits, in any shape."""
    rows = draw(st.integers(1, 140 if scheme.block[0] > 1 else 9))
    cols = draw(st.integers(1, 400))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))

    def raw(shape, dtype):
        dtype = np.dtype(dtype)
        bits = rng.integers(0, 1 << 8 * dtype.itemsize, shape, dtype=f"u{dtype.itemsize}")
        return bits.view(dtype)

    types = {"e2m1": np.uint8, "e4m3": reference.E4M3, "int": np.int8}
    scales = {"e8m0": np.uint8, "e4m3": reference.E4M3, "f32": np.float32, **DTYPES}
    stored = draw(st.sampled_from(list(DTYPES))) if scheme.scale == "weight" else scheme.scale
    blocks = scheme.scale_shape(rows, cols)
    if scheme.whole_tensor:
        blocks = draw(st.sampled_from([(1, 1), (rows, 1)]))
    zero = None if scheme.symmetric else raw(blocks, np.int8)
    top = raw(draw(st.sampled_from([1, rows])), np.float32) if scheme.two_level else None
    return Quantized(raw((rows, cols), types[scheme.element]), raw(blocks, scales[stored]),
                     zero, top)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
def test_dequantize_equals_the_reference(name, data):
    scheme = CASES[name]
    q = data.draw(any_bytes(scheme))
    with np.errstate(all="ignore"):
        wanted = reference.dequantize(q, scheme)
    out = np.empty(q.codes.shape, np.float32)
    assert cpu.dequantize(q, scheme, out) is out
    assert same_values(out, wanted)


@pytest.mark.parametrize("name", CASES)
def test_packing_is_undone_by_unpacking(name):
    scheme = CASES[name]
    packing = packing_of(scheme)
    x = np.random.default_rng(1).standard_normal((5, 384)).astype(np.float32)
    outer = outer_of(x, scheme, "f32")
    plain = reference.quantize(x, scheme, outer=outer).codes
    packed = cpu.quantize(x, scheme, packing, outer=outer).codes
    assert packed.shape == (5, packing.row_bytes(384))
    unpacked = reference.unpack(packed, packing, 384, signed=scheme.element == "int")
    assert equal(unpacked.view(np.uint8), plain.view(np.uint8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", CASES)
def test_nan_and_inf_are_refused_with_their_place(backend, dtype, bad, name):
    scheme = CASES[name]
    x = np.ones((130, 256), dtype)
    x[129, 201] = bad
    outer = np.ones(130, np.float32) if scheme.needs_amax else None
    with pytest.raises(NonFiniteError, match="weight at row 129, column 201 "):
        BACKENDS[backend].quantize(x, scheme, outer=outer)
    with pytest.raises(NonFiniteError, match="weight at row 129, column 201 "):
        BACKENDS[backend].amax(x)


def every_half():
    """All finite f16 and bf16 values, and the middles between neighbouring e4m3 values."""
    raw = np.arange(1 << 16, dtype=np.uint16)
    values = [raw.view(np.float16).astype(np.float32), raw.view(ml_dtypes.bfloat16).astype("f4")]
    e4m3 = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    middle = (e4m3[1:] + e4m3[:-1]) / 2
    ulp = np.spacing(middle)
    values += [middle, -middle, middle + ulp, middle - ulp]
    x = np.concatenate(values)
    return x[np.isfinite(x)]


def test_e4m3_code_is_the_rounding_of_ml_dtypes():
    x = every_half()
    wanted = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    codes = np.empty((1, len(x)), np.uint8)
    cpu.fp8.fp8_rows(x.view(np.uint32)[None], np.ones(1, np.float32), 0, codes)
    assert equal(codes[0], wanted)


def test_e2m1_code_is_the_rounding_of_ml_dtypes():
    x = every_half()
    wanted = np.clip(x, -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15
    wanted[x == 0] = 0  # ml_dtypes keeps the sign of a zero
    assert equal(reference.e2m1_codes(x), wanted)


@pytest.mark.parametrize(
    ("code", "dtype"),
    [(bits.ROUND_BF16, ml_dtypes.bfloat16), (bits.ROUND_F16, np.float16)],
    ids=["bf16", "f16"],
)
def test_round_to_is_the_rounding_of_numpy(code, dtype):
    import numba

    rounder = numba.njit(lambda v, d: bits.round_to(v, d))
    rng = np.random.default_rng(3)
    x = rng.integers(0, 1 << 32, 20_000, dtype=np.uint32).view(np.float32)
    x = np.concatenate(
        [x[np.isfinite(x)], every_half()[::7], np.float32([65519.99, 65520, -65520])]
    )
    with np.errstate(over="ignore"):
        wanted = x.astype(dtype).astype(np.float32)
    got = np.array([rounder(v, code) for v in x], np.float32)
    assert equal(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES.values())
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=70))
def test_cast_is_that_of_numpy(dtype, bits):
    x = np.array(bits, np.uint32).view(np.float32)
    dtype = np.dtype(dtype)
    got, finite = cpu.cast(x, dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        want = x.astype(dtype)
    real = ~np.isnan(x)
    assert got[real].tobytes() == want[real].tobytes()
    assert np.isnan(got[~real].astype("f4")).all()
    assert finite == np.isfinite(want.astype("f4")).all()
