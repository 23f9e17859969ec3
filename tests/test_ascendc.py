"""The AscendC kernels, compiled for the host, give the reference's bytes."""

from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from ascendc_shim import Aborted, Kernels, library, needs_compiler, pruned
from hypothesis import given
from hypothesis import strategies as st
from streamq.kernels import ascendc, reference
from streamq.kernels.ascendc import build, chips, loader
from streamq.kernels.golden import CASES, DTYPES, NUMERICS, make, outer_of

from streamq.errors import DeviceError, NonFiniteError
from streamq.nz import to_nz
from streamq.schemes import ALL, Scheme

ARCHES = (2201, 3510)
INPUTS = {name: make.inputs(dtype) for name, dtype in DTYPES.items()}

#: Golden cases with a kernel; schemes that differ for loaders only, once.
HAVE = {
    replace(scheme, name="", activation=None): name
    for name, scheme in CASES.items()
    if chips.function_of(scheme)
}.values()


def arches(name):
    """The architectures whose chips have the kernel of a golden case."""
    function = chips.function_of(CASES[name])
    return sorted({c.arch for c in chips.CHIPS if function in c.functions})


@pytest.fixture(scope="module")
def kernels():
    """Libraries by architecture, each in a process of its own."""
    with ExitStack() as stack:
        yield {a: stack.enter_context(Kernels(library(a))) for a in (2002, *ARCHES)}


def check(run, x, scheme, numerics, blocks):
    outer = outer_of(x, scheme, numerics)
    try:
        want = reference.quantize(x, scheme, numerics=numerics, outer=outer)
    except NonFiniteError:
        return  # a scale that its dtype cannot hold, which the host refuses
    codes, scale = run.quantize(x, scheme, numerics, outer, blocks)
    assert codes.tobytes() == want.codes.tobytes()
    if scale is not None:
        assert scale.dtype == want.scale.dtype
        assert scale.tobytes() == want.scale.tobytes()


@needs_compiler
@pytest.mark.parametrize("name", HAVE)
def test_golden(kernels, name):
    scheme = CASES[name]
    for dtype, x in INPUTS.items():
        for numerics in NUMERICS:
            if chips.function_of(scheme, numerics) is None:
                assert scheme.scale == "e8m0"
                continue
            for arch in arches(name):
                for blocks in (1, 5, 40) if dtype == "bf16" else (3,):
                    check(kernels[arch], x, scheme, numerics, blocks)


SHAPES = {  # rows and columns: ragged ends of a tile, of 32 bytes, of a repeat
    "one element": (1, 1),
    "a tail of 32 bytes": (3, 4097),
    "tiles": (2, 12_300),
    "narrow": (37, 5),
    "one block": (128, 128),
    "blocks, ragged": (257, 200),
    "a block of one row": (129, 300),
    "33 rows": (33, 77),
}


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["W8A8", "INT8_CHANNEL_NARROW", "FP8_DYNAMIC", "FP8_BLOCK", "FP8_TENSOR"]
)
def test_ragged_shapes(kernels, name, dtype, shape):
    rng = np.random.default_rng(7)
    x = rng.standard_normal(SHAPES[shape]) * np.exp2(rng.integers(-30, 8, (SHAPES[shape][0], 1)))
    x[::5] = 0
    for arch in arches(name):
        check(kernels[arch], x.astype(DTYPES[dtype]), CASES[name], "f32", 3)


@st.composite
def weights(draw):
    """Finite matrices of any shape: ordinary numbers, or any bit pattern."""
    dtype = np.dtype(draw(st.sampled_from(list(DTYPES.values()))))
    group = draw(st.sampled_from([ALL, 8, 32, 40, 128, 256, 512, 3, 100, 520]))
    cols = draw(st.integers(1, 600 if group == ALL else 1200 // group + 1)) * abs(group)
    rows = draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    if draw(st.booleans()):
        return (rng.standard_normal((rows, cols)) * 0.02).astype(dtype), group
    raw = rng.integers(0, 1 << 8 * dtype.itemsize, (rows, cols), dtype=f"u{dtype.itemsize}")
    x = raw.view(dtype)
    return np.where(np.isfinite(x.astype(np.float32)), x, np.zeros((), dtype)), group


@needs_compiler
@given(data=st.data())
def test_integers_equal_the_reference(kernels, data):
    x, group = data.draw(weights())
    scheme = Scheme(
        "any", "int", data.draw(st.integers(3, 8)), (1, group),
        data.draw(st.sampled_from(["weight", "f32", "bf16"])), narrow=data.draw(st.booleans()),
    )  # fmt: skip
    numerics = data.draw(st.sampled_from(NUMERICS))
    run = kernels[data.draw(st.sampled_from(ARCHES))]
    check(run, x, scheme, numerics, data.draw(st.integers(1, 9)))


@needs_compiler
@given(data=st.data())
def test_floats_equal_the_reference(kernels, data):
    x, _ = data.draw(weights())
    name = data.draw(
        st.sampled_from(["FP8_DYNAMIC", "FP8_BLOCK", "FP8_BLOCK_F32_SCALE", "MXFP8", "MXFP4"])
    )
    if name.startswith("MX"):
        x = np.resize(x, (len(x), -(-x.shape[1] // 32) * 32))
    numerics = "f32" if name.startswith("MX") else data.draw(st.sampled_from(NUMERICS))
    check(kernels[3510], x, CASES[name], numerics, data.draw(st.integers(1, 9)))


@needs_compiler
@given(data=st.data())
def test_amax_equals_the_reference(kernels, data):
    x, _ = data.draw(weights())
    kind = chips.DTYPES[next(k for k, v in DTYPES.items() if np.dtype(v) == x.dtype)]
    blocks = data.draw(st.integers(1, 9))
    out = (len(x),), np.float32
    (got,) = kernels[2201].run("streamq_amax", (*x.shape, kind), x, out, blocks=blocks)
    assert got.tobytes() == reference.amax(x).tobytes()


NZ = [(1, 1), (16, 32), (17, 33), (15, 31), (300, 40), (5, 1025), (130, 700), (256, 512)]


@needs_compiler
@pytest.mark.parametrize(("arch", "blocks"), [(2002, 1), (2201, 3), (3510, 8)])
@pytest.mark.parametrize("shape", NZ)
def test_nz_is_that_of_the_cpu(kernels, arch, shape, blocks):
    rows, width = shape
    if arch == 2002 and width % 32:  # no DataCopyPad: aligned rows only, the host refuses others
        with pytest.raises(Aborted):
            kernels[arch].run(
                "streamq_to_nz", shape, np.zeros(shape, "u1"), ((-(-width // 32), 512), "u1")
            )
        return
    rng = np.random.default_rng(rows)
    for dtype in ("u1", "u2", "u4"):
        size = np.dtype(dtype).itemsize
        if width % size:
            continue
        x = rng.integers(0, 256, shape, dtype="u1").view(dtype)
        want = to_nz(x)
        out = (*want.shape[:3], 32), np.uint8
        (got,) = kernels[arch].run("streamq_to_nz", shape, x, out, blocks=blocks)
        assert got.tobytes() == want.tobytes()
    x = rng.integers(0, 256, shape, dtype="u1")
    (got,) = kernels[arch].run(
        "streamq_to_nz", shape, x, ((-(-width // 32), -(-rows // 16), 16, 32), np.uint8)
    )
    assert got.tobytes() == to_nz(x, bits=4).tobytes()


@needs_compiler
@pytest.mark.parametrize(
    ("size", "arch", "blocks"), [(512, 2201, 1), (2560, 2002, 2), (1536, 3510, 4)]
)
def test_histogram_counts_bytes(kernels, arch, size, blocks):
    x = np.random.default_rng(size).integers(0, 256, (3, size), dtype=np.uint8)
    x[1] = 255
    x[2] = np.minimum(x[2], 3)
    out = (3, 256), np.float32
    (got,) = kernels[arch].run("streamq_histogram", (3, size), x, out, blocks=blocks)
    assert np.array_equal(got, [np.bincount(row, minlength=256) for row in x])


@needs_compiler
@pytest.mark.parametrize("keep", [1, 2, 192, 383, 384])
@pytest.mark.parametrize("dtype", DTYPES)
def test_magnitude_keeps_the_largest(kernels, dtype, keep):
    x = INPUTS[dtype]  # zeros, ties over all of a row, subnormals, the largest numbers
    arguments = (*x.shape, chips.DTYPES[dtype], keep)
    for blocks in (1, 5):
        out = x.shape, x.dtype
        (got,) = kernels[2201].run("streamq_keep_largest", arguments, x, out, blocks=blocks)
        assert got.tobytes() == pruned(x, keep).tobytes()


@needs_compiler
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_magnitude_of_the_longest_row(kernels, dtype):
    dtype = np.dtype(DTYPES[dtype])
    cols = chips.LONGEST_ROW // dtype.itemsize
    x = np.random.default_rng(4).integers(-90, 91, (1, cols)).astype(dtype)
    arguments = (1, cols, 2 if dtype.itemsize == 4 else 0, cols // 3)
    (got,) = kernels[2201].run("streamq_keep_largest", arguments, x, (x.shape, dtype))
    assert got.tobytes() == pruned(x, cols // 3).tobytes()


@needs_compiler
@given(data=st.data())
def test_magnitude_of_long_and_tied_rows(kernels, data):
    dtype = data.draw(st.sampled_from(list(DTYPES)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    cols = data.draw(st.integers(1, 4500))
    levels = data.draw(st.integers(1, 40))
    x = rng.integers(-levels, levels + 1, (1, cols)).astype(DTYPES[dtype])
    keep = data.draw(st.integers(1, cols))
    run = kernels[data.draw(st.sampled_from(ARCHES))]
    arguments = (*x.shape, chips.DTYPES[dtype], keep)
    (got,) = run.run("streamq_keep_largest", arguments, x, (x.shape, x.dtype))
    assert got.tobytes() == pruned(x, keep).tobytes()


@pytest.mark.parametrize(
    ("scheme", "runs_on"),
    [
        ("W8A8", {"Atlas A2 (910B)", "Atlas A3 (910_93)", "Ascend 950"}),
        ("W4A16", {"Atlas A2 (910B)", "Atlas A3 (910_93)", "Ascend 950"}),
        ("FP8_DYNAMIC", {"Ascend 950"}),
        ("MXFP8", {"Ascend 950"}),
        ("MXFP4", {"Ascend 950"}),
        ("NVFP4", set()),
        ("W4A16_ASYM", set()),
        ("INT4_SEARCH", set()),
        ("FP8_BLOCK_UE8M0", set()),
        ("INT8_CHANNEL_UNROUNDED", set()),
    ],
)
def test_supports_by_chip(scheme, runs_on):
    assert {c.name for c in chips.CHIPS if ascendc.supports(CASES[scheme], c)} == runs_on
    assert ascendc.supports(CASES[scheme]) == bool(runs_on)


def test_what_kernels_do_not_do_is_not_supported():
    w8a8 = CASES["W8A8"]
    assert not ascendc.supports(CASES["MXFP8"], numerics="weight")
    assert not ascendc.supports(replace(w8a8, scale="f16"))  # f32 weights may overflow it
    assert not ascendc.supports(replace(w8a8, bits=2, narrow=True))  # the scale is the amax


@pytest.mark.parametrize(
    ("name", "arch"),
    [("Ascend310P3", 2002), ("Ascend910B2C", 2201), ("Ascend910B4-1", 2201),
     ("Ascend910_9391", 2201), ("Ascend950PR_9599", 3510), ("Ascend910A", None),
     ("Ascend310", None)],
)  # fmt: skip
def test_chips_by_their_names(name, arch):
    chip = chips.chip_of(name)
    assert (chip and chip.arch) == arch


def modules(available=True, name="Ascend910B2"):
    npu = SimpleNamespace(is_available=lambda: available, get_device_name=lambda: name)
    return {"torch": SimpleNamespace(npu=npu), "torch_npu": SimpleNamespace()}


@pytest.mark.parametrize(
    ("have", "library_bytes", "message"),
    [
        ({}, None, "install both"),
        ({"torch": SimpleNamespace()}, None, "torch_npu"),
        (modules(available=False), None, "torch_npu finds no NPU"),
        (modules(name="Ascend910A"), None, "no kernels for the chip Ascend910A: known are"),
        (modules(), None, "python -m streamq.kernels.ascendc.build 2201"),
        (modules(), b"no library", "cannot be used"),
    ],
)
def test_what_is_missing_is_said(monkeypatch, tmp_path, have, library_bytes, message):
    def import_module(name):
        if name not in have:
            raise ImportError(f"No module named {name!r}")
        return have[name]

    path = tmp_path / "lib.so"
    if library_bytes is not None:
        path.write_bytes(library_bytes)
    monkeypatch.setattr(loader.importlib, "import_module", import_module)
    monkeypatch.setenv(loader.VARIABLE, str(path))
    loader.open_device.cache_clear()
    with pytest.raises(DeviceError, match=message):
        ascendc.open_device()


@pytest.mark.parametrize("code", [0, 1])
def test_a_launch_waits_before_and_behind(code):
    """torch_npu's own queue must not be overtaken; what a launcher refuses is an error."""
    order = []
    stream = SimpleNamespace(npu_stream=77)
    npu = SimpleNamespace(synchronize=lambda: order.append("wait"), current_stream=lambda: stream)

    def launcher(*given):
        order.append(given)
        return code

    device = loader.Device(
        chips.CHIPS[1], SimpleNamespace(npu=npu), SimpleNamespace(streamq_amax=launcher), 40
    )
    call = chips.Call("streamq_amax", (3, 4, 0), (0, 0))
    tensors = [SimpleNamespace(data_ptr=lambda at=at: at) for at in (1000, 2000)]
    if code:
        with pytest.raises(DeviceError, match="streamq_amax refused its arguments"):
            device.run(call, *tensors)
        return
    device.run(call, *tensors)
    assert order == ["wait", (40, 77, 1000, 2000, 3, 4, 0), "wait"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "usage"),
        (["a2"], 2, "usage"),
        (["1234"], 1, "2002, 2201, 3510"),
        (["2201"], 1, "bisheng"),
    ],
)
def test_build_says_what_it_cannot(monkeypatch, capsys, arguments, code, message):
    monkeypatch.setenv("PATH", "")
    assert build.main(arguments) == code
    assert message in capsys.readouterr().err


def test_the_library_has_every_launcher_that_the_table_names():
    text = (build.FOLDER / "kernels.asc").read_text()
    names = {f"streamq_{part.split('(')[0]}" for part in text.split("int32_t streamq_")[1:]}
    assert names == set(chips.SIGNATURES)
