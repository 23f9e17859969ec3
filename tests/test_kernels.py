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
from streamq.schemes import ALL, BYTES, Packing
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
