"""The Triton kernels in Triton's interpreter: equal to the reference bit by bit."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streamq.kernels import reference
from streamq.kernels.golden import CASES, DTYPES, NUMERICS, outer_of
from test_kernels import equal, matrices, packing_of, read
from torch_backend import array, interpreted, needs_triton, tensor, with_arrays
from triton_cases import DISTINCT, EXAMPLES, KERNELS, weights

from streamq.errors import NonFiniteError
from streamq.schemes import ALL, BYTES, SCHEMES, Packing, Quantized, Scheme

pytestmark = needs_triton

BENCH = Path(__file__).parent.parent / "bench" / "gpu.py"


@pytest.fixture(scope="module")
def run():
    return with_arrays(interpreted())


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


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("rows", "cols", "group"),
    [(1, 8, 8), (3, 40, 8), (5, 72, 24), (2, 640, 128), (1, 33, ALL), (3, 34, ALL), (2, 1, ALL)],
)
def test_words_of_every_width_and_any_shape(run, bits, rows, cols, group):
    scheme = Scheme("odd", "int", bits, (1, group), symmetric=bits % 2 == 0)
    agree(run, weights(rows, cols), scheme, Packing("words", bits), "f32", None)


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


def test_the_benchmark_says_in_one_sentence_that_there_is_no_gpu():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    out = subprocess.run([sys.executable, BENCH], capture_output=True, text=True, check=False)
    assert out.returncode == 1
    assert out.stderr == "bench/gpu.py measures on a GPU, and torch finds none here.\n"
