"""The NPU backend on torch tensors: those of the CPU with the kernels of the shim, and an NPU's."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from ascendc_shim import needs_compiler, on_host, pruned
from streamq.kernels import ascendc, reference
from streamq.kernels.ascendc import build, chips, loader
from streamq.kernels.golden import CASES, DTYPES, NUMERICS, make, outer_of

from streamq.errors import DeviceError, NonFiniteError
from streamq.nz import to_nz
from streamq.schemes import Packing

torch = pytest.importorskip("torch", reason="torch is not installed")
pytestmark = needs_compiler


NPU = "the NPU of this machine"


@pytest.fixture(params=["Atlas inference (310P)", "Atlas A2 (910B)", "Ascend 950", NPU])
def chip(request, monkeypatch):
    if request.param == NPU:
        try:
            return ascendc.open_device().chip
        except DeviceError as error:
            pytest.skip(str(error))
    chip = next(c for c in chips.CHIPS if c.name == request.param)
    npu = SimpleNamespace(
        synchronize=lambda: None, current_stream=lambda: SimpleNamespace(npu_stream=None)
    )
    monkeypatch.setattr(torch, "npu", npu, raising=False)
    device = on_host(chip, torch)
    monkeypatch.setattr(ascendc, "open_device", lambda: device)
    return chip


def tensor(x):
    if x.dtype == np.dtype(DTYPES["bf16"]):
        return there(torch.from_numpy(x.view(np.int16)).view(torch.bfloat16))
    return there(torch.from_numpy(x))


def there(t):
    return t.to(ascendc.open_device().type)


def raw(t):
    return t.cpu().contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("arch", sorted({c.arch for c in chips.CHIPS}))
@pytest.mark.skipif(shutil.which("bisheng") is None, reason="bisheng of CANN is not here")
def test_bisheng_compiles(monkeypatch, tmp_path, arch):
    monkeypatch.setenv(loader.VARIABLE, str(tmp_path / "kernels.so"))
    assert build.build(arch).stat().st_size > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_case_that_is_supported(chip, dtype):
    x = make.inputs(DTYPES[dtype])
    for name, scheme in CASES.items():
        for numerics in NUMERICS:
            outer = outer_of(x, scheme, numerics)
            given = None if outer is None else tensor(outer)
            if not ascendc.supports(scheme, chip, numerics):
                with pytest.raises(DeviceError, match="has no kernel for"):
                    ascendc.quantize(tensor(x), scheme, numerics=numerics, outer=given)
                continue
            want = reference.quantize(x, scheme, numerics=numerics, outer=outer)
            got = ascendc.quantize(tensor(x), scheme, numerics=numerics, outer=given)
            assert raw(got.codes) == want.codes.tobytes(), name
            assert got.codes.shape == want.codes.shape
            if not scheme.whole_tensor:
                assert raw(got.scale) == want.scale.tobytes(), name
                assert got.scale.shape == want.scale.shape
    if "streamq_amax" in chip.functions:
        assert raw(ascendc.amax(tensor(x))) == reference.amax(x).tobytes()
        assert raw(ascendc.keep_largest(tensor(x), 100)) == pruned(x, 100).tobytes()
    else:
        with pytest.raises(DeviceError, match="does not run streamq_amax"):
            ascendc.amax(tensor(x))


def test_layout_and_histogram(chip):
    data = np.random.default_rng(0).integers(0, 256, (33, 64), dtype=np.uint8)
    nz = ascendc.to_nz(tensor(data))
    assert raw(nz) == to_nz(data).tobytes()
    assert nz.shape == to_nz(data).shape
    if not chip.ragged:
        with pytest.raises(DeviceError, match="multiples of 32 bytes, not of 63"):
            ascendc.to_nz(tensor(data)[:, :63])
    counts = ascendc.histogram(nz.reshape(-1)[:1024], 512)
    want = [np.bincount(t, minlength=256) for t in to_nz(data).reshape(-1)[:1024].reshape(2, 512)]
    assert counts.tolist() == np.array(want).tolist()
    assert ascendc.histogram(nz.reshape(-1)[:0], 512).shape == (0, 256)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(chip, bad):
    if "streamq_amax" not in chip.functions:
        return
    x = there(torch.ones(130, 256))
    x[129, 201] = bad
    for what in (ascendc.amax, lambda x: ascendc.quantize(x, CASES["W8A8"])):
        with pytest.raises(NonFiniteError, match="weight at row 129, column 201 "):
            what(x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ascendc.amax(x[0]), "a matrix"),
        (lambda x: ascendc.amax(x.to(torch.float64)), "bf16, f16 or f32, not torch.float64"),
        (lambda x: ascendc.quantize(x, CASES["W4A16"], Packing("words", 4)), "as words"),
        (lambda x: ascendc.keep_largest(x, 0), "keeps 1 to 256 of them, not 0"),
        (lambda x: ascendc.keep_largest(there(torch.ones(1, 30_000)), 1), "120000 bytes"),
        (lambda x: ascendc.histogram(x.view(torch.uint8), 100), "whole tiles of 100"),
    ],
)
def test_what_is_refused(chip, call, message):
    if "streamq_amax" in chip.functions:
        with pytest.raises(DeviceError, match=message):
            call(there(torch.ones(2, 256)))


def test_no_rows(chip):
    if "streamq_amax" in chip.functions:
        assert ascendc.amax(there(torch.ones(0, 8))).shape == (0,)
        assert ascendc.keep_largest(there(torch.ones(0, 8)), 3).shape == (0, 8)
