"""The Triton kernels in Triton's interpreter: equal to the reference bit by bit."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streamq.kernels import reference
from streamq.kernels.golden import CASES, DTYPES, NUMERICS, outer_of
from test_kernels import any_bytes, equal, matrices, packing_of, read, same_values
from torch_backend import array, interpreted, needs_triton, tensor, with_arrays

from streamq.errors import NonFiniteError
from streamq.schemes import ALL, BYTES, SCHEMES, Packing, Quantized, Scheme

pytestmark = needs_triton


@pytest.fixture(scope="module")
def run():
    return with_arrays(interpreted())


#: The golden cases without those that only their activations tell apart.
DISTINCT = {replace(s, name="", activation=None): name for name, s in CASES.items()}.values()


@pytest.mark.parametrize("name", DISTINCT)
def test_golden(run, name):
    scheme, inputs, golden = CASES[name], read("inputs"), read(name)
    assert run.supports(scheme)
    for dtype in DTYPES:
        for numerics in NUMERICS:
            x = inputs[dtype]
            q = run.quantize(x, scheme, numerics=numerics, outer=outer_of(x, scheme, numerics))
            key = f"{dtype}.{numerics}."
            assert equal(q.codes, golden[key + "codes"]), key
            if not scheme.whole_tensor:
                assert equal(q.scale, golden[key + "scale"]), key
            if q.zero_point is not None:
                assert equal(q.zero_point, golden[key + "zero_point"]), key


#: Of each scheme: 3 in `make test`, 250 in `make soak`; an example takes some 30 ms.
EXAMPLES = max(1, settings.default.max_examples // 20)


def agree(run, x, scheme, packing, numerics, outer):
    """The same codes, scales and zero points, or the same refusal."""
    try:
        wanted = reference.quantize(x, scheme, packing, numerics=numerics, outer=outer)
    except NonFiniteError as e:  # a scale that its dtype cannot hold
        with pytest.raises(NonFiniteError, match=str(e)):
            run.quantize(x, scheme, packing, numerics=numerics, outer=outer)
        return
    got = run.quantize(x, scheme, packing, numerics=numerics, outer=outer)
    assert equal(got.codes.view(np.uint8), wanted.codes.view(np.uint8))
    if not scheme.whole_tensor:
        assert equal(got.scale, wanted.scale)
    if wanted.zero_point is not None:
        assert equal(got.zero_point, wanted.zero_point)


@pytest.mark.parametrize("name", DISTINCT)
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_equals_the_reference(run, name, data):
    scheme = CASES[name]
    x = data.draw(matrices(scheme))
    numerics = data.draw(st.sampled_from(NUMERICS))
    packing = data.draw(st.sampled_from([BYTES, packing_of(scheme)]))
    assert equal(run.amax(x), reference.amax(x))
    agree(run, x, scheme, packing, numerics, outer_of(x, scheme, numerics))


def weights(rows, cols, dtype="bf16"):
    """Ordinary numbers, an outlier, a zero row where there are two."""
    x = np.random.default_rng(cols).standard_normal((rows, cols)) * 0.02
    x[0, -1] = 3
    x[1:2] = 0
    return x.astype(DTYPES[dtype])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("rows", "cols", "group"),
    [(1, 8, 8), (3, 40, 8), (5, 72, 24), (2, 640, 128), (1, 33, ALL), (3, 34, ALL), (2, 1, ALL)],
)
def test_words_of_every_width_and_any_shape(run, bits, rows, cols, group):
    scheme = Scheme("odd", "int", bits, (1, group), symmetric=bits % 2 == 0)
    agree(run, weights(rows, cols), scheme, Packing("words", bits), "f32", None)


#: One scheme for every kernel, and every way in which one walks a matrix.
KERNELS = {
    "integers of groups": SCHEMES["W4A16"],
    "integers with zero points": SCHEMES["W3A16_ASYM"],
    "integers of rows": SCHEMES["W8A8"],
    "integers of rows with zero points": CASES["INT8_CHANNEL_ASYM"],
    "integers, searched": CASES["INT4_SEARCH"],
    "integers of rows, searched": CASES["INT8_CHANNEL_SEARCH"],
    "integers of rows with zero points, searched": replace(
        CASES["INT8_CHANNEL_ASYM"], scales="search"
    ),
    "FP8 of tensors": CASES["FP8_TENSOR"],
    "FP8 of rows": SCHEMES["FP8_DYNAMIC"],
    "FP8 of groups": Scheme("FP8_GROUP", "e4m3", 8, (1, 128), "f32"),
    "FP8 of blocks": SCHEMES["FP8_BLOCK"],
    "FP8 of blocks of other sizes": Scheme("FP8_SMALL", "e4m3", 8, (48, 40), "f32"),
    "MXFP4": SCHEMES["MXFP4"],
    "MXFP4, searched": CASES["MXFP4_SEARCH"],
    "MXFP8": SCHEMES["MXFP8"],
    "NVFP4": SCHEMES["NVFP4"],
    "NVFP4, searched": CASES["NVFP4_SEARCH"],
}


@pytest.mark.parametrize("name", KERNELS)
def test_rows_that_are_strided_and_tiles_that_are_ragged(run, name):
    scheme, packing = KERNELS[name], packing_of(KERNELS[name])
    dtype = list(DTYPES)[list(KERNELS).index(name) % 3]
    whole = weights(13, 640, dtype)
    for part in (whole[3:12, 128:512], whole[-1:], whole[:, :128]):
        outer = outer_of(part, scheme, "f32")
        wanted = reference.quantize(part, scheme, packing, outer=outer)
        there = tensor(whole)[_place(whole, part)]
        assert equal(there.float().numpy(), part.astype(np.float32))
        got = run.module.quantize(there, scheme, packing, outer=tensor(outer))
        assert equal(array(got.codes).view(np.uint8), wanted.codes.view(np.uint8))
        if not scheme.whole_tensor:
            assert equal(array(got.scale), wanted.scale)
        assert equal(array(run.module.amax(there)), reference.amax(part))


def _place(whole, part):
    """Where a part of a matrix lies in it."""
    at = part.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
    row, col = divmod(at // whole.itemsize, whole.shape[1])
    return slice(row, row + part.shape[0]), slice(col, col + part.shape[1])


def of_rows():
    return [n for n in KERNELS if KERNELS[n].block[1] == ALL]


@pytest.mark.parametrize("cols", [65, 128, 200])
@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("name", of_rows())
def test_rows_longer_than_a_tile(run, name, numerics, cols, monkeypatch):
    """As those of 32,769 columns and more are, with 65."""
    for module in (run.module.integer, run.module.fp8):
        monkeypatch.setattr(module, "TILE", 32)
        monkeypatch.setattr(module, "LONGEST", 64)
    monkeypatch.setattr(run.module.integer, "SEARCH_LONGEST", 32)
    scheme, x = KERNELS[name], weights(2, cols)
    agree(run, x, scheme, packing_of(scheme), numerics, outer_of(x, scheme, numerics))


@pytest.mark.parametrize("name", KERNELS)
def test_rows_behind_two_to_the_31_elements(run, name):
    """Of 4 GB that are never touched: offsets of 64 bits though all strides fit 32."""
    import torch

    scheme, stride = KERNELS[name], (1 << 30) + 16
    room = torch.empty(2 * stride + 256, dtype=torch.bfloat16)
    x = room.as_strided((3, 256), (stride, 1))
    x.copy_(tensor(weights(3, 256)))
    outer = outer_of(array(x.contiguous()), scheme, "f32")
    wanted = reference.quantize(weights(3, 256), scheme, outer=outer)
    got = run.module.quantize(x, scheme, outer=tensor(outer))
    assert equal(array(got.codes), wanted.codes)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", KERNELS)
def test_nan_and_inf_are_refused_with_their_place(run, name, bad):
    scheme = KERNELS[name]
    dtype = list(DTYPES)[list(KERNELS).index(name) % 3]
    x = np.ones((5, 256), DTYPES[dtype])
    x[4, 201] = bad
    outer = np.ones(5, np.float32) if scheme.needs_amax else None
    with pytest.raises(NonFiniteError, match="weight at row 4, column 201 "):
        run.quantize(x, scheme, outer=outer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_amax_refuses_nan_and_inf(run, bad, dtype):
    x = np.ones((130, 4100), DTYPES[dtype])
    x[129, 4099] = bad
    with pytest.raises(NonFiniteError, match="weight at row 129, column 4099 "):
        run.amax(x)


@pytest.mark.parametrize("cols", [64, 4160])
def test_nan_in_a_row_longer_than_a_tile(run, cols, monkeypatch):
    monkeypatch.setattr(run.module.integer, "LONGEST", 32)
    x = weights(3, cols)
    x[2, 40] = np.nan
    with pytest.raises(NonFiniteError, match="weight at row 2, column 40 "):
        run.quantize(x, SCHEMES["W8A8"])


def test_a_scale_beyond_its_dtype_is_refused_with_its_place(run):
    scheme = Scheme("INT4_F16", "int", 4, (1, 32), "f16")
    x = weights(4, 96)
    x[3, 70] = 1e6
    with pytest.raises(NonFiniteError, match="scale at row 3, column 2 "):
        run.quantize(x, scheme)


def test_with_a_status_nothing_is_raised_until_it_is_asked(run):
    kernels, scheme = run.module, SCHEMES["NVFP4"]
    x = weights(4, 64)
    x[1, 2] = np.inf
    there, outer = tensor(x), tensor(np.ones(4, np.float32))
    status = kernels.new_status("cpu")
    with np.errstate(all="ignore"):
        q = kernels.quantize(there, scheme, outer=outer, status=status)
        kernels.amax(there, status=status)
    with pytest.raises(NonFiniteError, match="weight at row 1, column 2 "):
        kernels.refuse(status, there, q.scale)
    clean = kernels.new_status("cpu")
    kernels.quantize(there[2:], scheme, outer=outer[2:], status=clean)
    kernels.refuse(clean, there[2:], q.scale)


@pytest.mark.parametrize("name", ["W4A16_ASYM", "NVFP4", "FP8_BLOCK", "MXFP8"])
def test_outputs_may_be_pieces_of_one_buffer(run, name):
    import torch

    scheme, x = SCHEMES[name], weights(6, 256)
    packing, outer = packing_of(scheme), outer_of(x, scheme, "f32")
    room, at, parts = torch.zeros(8192, dtype=torch.uint8), 0, {}
    like = run.module.shapes(6, 256, torch.bfloat16, scheme, packing)
    for role, (shape, dtype) in zip(scheme.parts, like, strict=True):
        size = shape[0] * shape[1] * dtype.itemsize
        parts[role] = room[at : at + size].view(dtype).reshape(shape)
        at += -(-size // 256) * 256
    q = run.module.quantize(
        tensor(x), scheme, packing, outer=tensor(outer), out=Quantized(**parts)
    )  # fmt: skip
    wanted = reference.quantize(x, scheme, packing, outer=outer)
    for role, part in parts.items():
        assert getattr(q, role) is part
        assert equal(array(part).view(np.uint8), getattr(wanted, role).view(np.uint8)), role


@pytest.mark.parametrize("name", DISTINCT)
def test_golden_codes_have_the_values_of_the_reference(run, name):
    scheme, inputs, golden = CASES[name], read("inputs"), read(name)
    for dtype in DTYPES:
        key = f"{dtype}.f32."
        g = outer_of(inputs[dtype], scheme, "f32")
        scale = g[:1, None] if scheme.whole_tensor else golden[key + "scale"]
        q = Quantized(golden[key + "codes"], scale, golden.get(key + "zero_point"),
                      g if scheme.two_level else None)  # fmt: skip
        wanted = reference.dequantize(q, scheme)
        assert equal(run.dequantize(q, scheme), wanted), key
        packed = replace(
            q,
            codes=reference.pack(
                q.codes.view(np.uint8 if scheme.element != "int" else np.int8), packing_of(scheme)
            ),
        )
        out = np.empty(wanted.shape, DTYPES[dtype])
        got = run.dequantize(packed, scheme, out, packing=packing_of(scheme))
        with np.errstate(over="ignore"):
            assert equal(got, wanted.astype(DTYPES[dtype])), key


@pytest.mark.parametrize("name", DISTINCT)
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_dequantize_equals_the_reference(run, name, data):
    q = data.draw(any_bytes(CASES[name]))
    with np.errstate(all="ignore"):
        wanted = reference.dequantize(q, CASES[name])
    assert same_values(run.dequantize(q, CASES[name]), wanted)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("packed", [True, False])
def test_a_bias_is_added_last(run, bits, packed):
    scheme = Scheme("biased", "int", bits, (1, 32), "f16", symmetric=False)
    x = weights(3, 96, "f16")
    q = reference.quantize(x, scheme)
    bias = (q.zero_point.astype(np.float32) * -0.75).astype(np.float16)
    q = Quantized(q.codes, q.scale, bias=bias)
    wanted = reference.dequantize(q, scheme)
    packing = Packing("words", bits) if packed else BYTES
    q = replace(q, codes=reference.pack(q.codes, packing))
    out = np.empty(x.shape, np.float32)
    assert equal(run.dequantize(q, scheme, out, packing=packing), wanted)


@pytest.mark.parametrize("name", KERNELS)
def test_energies_are_those_of_the_dequantized_weight(run, name):
    scheme, x = KERNELS[name], weights(5, 640)
    outer = outer_of(x, scheme, "f32")
    q = reference.quantize(x, scheme, outer=outer)
    w = x.astype(np.float64)
    e = w - reference.dequantize(q, scheme)
    wanted = np.stack([(w * w).sum(axis=1), (e * e).sum(axis=1)], axis=1)
    for packing in (BYTES, packing_of(scheme)):
        packed = replace(q, codes=reference.pack(q.codes, packing))
        got = run.energies(x, packed, scheme, packing, outer)
        np.testing.assert_allclose(got, wanted, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cast(run, dtype):
    import torch

    x = read("inputs")["f32"].reshape(-1)
    with np.errstate(over="ignore"):
        wanted = x.astype(DTYPES[dtype])
    got, finite = run.module.cast(tensor(x), getattr(torch, str(tensor(wanted).dtype)[6:]))
    assert equal(array(got), wanted)
    assert finite == np.isfinite(wanted.astype(np.float32)).all()


def test_what_it_does_not_support_is_said(run):
    others = {
        "inverse": Scheme("", "int", 4, (1, 32), "f32", inverse=True),
        "no whole bytes": Scheme("", "int", 3, (1, 9)),
        "integers of tensors": Scheme("", "int", 8, (ALL, ALL)),
        "other blocks of e2m1": Scheme("", "e2m1", 4, (1, 32), "e4m3"),
        "other blocks of e8m0": Scheme("", "e4m3", 8, (1, 64), "e8m0"),
        "floats": Scheme("", "bf16", 16, (1, ALL)),
    }
    assert [name for name, scheme in others.items() if run.supports(scheme)] == []
