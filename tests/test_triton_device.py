"""The Triton kernels on a GPU: the golden files, and shapes that only a device can hold.

``make test-gpu``, in a process of its own: where Triton's interpreter was chosen, it stays.
"""

import os

import numpy as np
import pytest
from streamq.kernels import reference
from streamq.kernels.golden import CASES, DTYPES, NUMERICS, outer_of
from test_kernels import equal, packing_of, read
from torch_backend import MISSING, array, tensor, with_arrays

from streamq.errors import NonFiniteError
from streamq.schemes import BYTES, SCHEMES, Quantized


def _unable():
    """Why nothing here can run, None where it can."""
    if MISSING:
        return f"not installed: {', '.join(MISSING)}"
    if os.environ.get("STREAMQ_TEST_GPU") != "1":
        return "`make test-gpu` runs this"
    import torch

    return None if torch.cuda.is_available() else "torch finds no GPU"


UNABLE = _unable()
pytestmark = pytest.mark.skipif(UNABLE is not None, reason=UNABLE or "")


@pytest.fixture(scope="module")
def run():
    from streamq.kernels import triton

    return with_arrays(triton, "cuda")


@pytest.mark.parametrize("name", CASES)
def test_golden(run, name):
    scheme, inputs, golden = CASES[name], read("inputs"), read(name)
    for dtype in DTYPES:
        for numerics in NUMERICS:
            x, key = inputs[dtype], f"{dtype}.{numerics}."
            outer = outer_of(x, scheme, numerics)
            q = run.quantize(x, scheme, numerics=numerics, outer=outer)
            assert equal(q.codes, golden[key + "codes"]), key
            if not scheme.whole_tensor:
                assert equal(q.scale, golden[key + "scale"]), key
            if q.zero_point is not None:
                assert equal(q.zero_point, golden[key + "zero_point"]), key
            packing = packing_of(scheme)
            packed = run.quantize(x, scheme, packing, numerics=numerics, outer=outer)
            wanted = reference.pack(golden[key + "codes"], packing)
            assert equal(packed.codes.view(np.uint8), wanted.view(np.uint8)), key


@pytest.mark.parametrize("name", CASES)
def test_values_of_golden_codes(run, name):
    scheme, inputs, golden = CASES[name], read("inputs"), read(name)
    for dtype in DTYPES:
        key, g = f"{dtype}.f32.", outer_of(inputs[dtype], scheme, "f32")
        scale = g[:1, None] if scheme.whole_tensor else golden[key + "scale"]
        q = Quantized(golden[key + "codes"], scale, golden.get(key + "zero_point"),
                      g if scheme.two_level else None)  # fmt: skip
        assert equal(run.dequantize(q, scheme), reference.dequantize(q, scheme)), key


def anything(rows, cols, dtype, seed):
    """Any finite bits."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(dtype)
    raw = rng.integers(0, 1 << 8 * dtype.itemsize, (rows, cols), dtype=f"u{dtype.itemsize}")
    x = raw.view(dtype)
    return np.where(np.isfinite(x.astype(np.float32)), x, np.zeros((), dtype))


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_any_bits(run, name, dtype, numerics):
    from streamq.kernels import cpu

    scheme = CASES[name]
    for seed, (rows, cols) in enumerate([(1, 3072), (129, 1536), (512, 6144), (3, 49152)]):
        x = anything(rows, cols, DTYPES[dtype], seed)
        outer = outer_of(x, scheme, numerics)
        assert equal(run.amax(x), cpu.amax(x))
        for packing in (BYTES, packing_of(scheme)):
            try:
                wanted = cpu.quantize(x, scheme, packing, numerics=numerics, outer=outer)
            except NonFiniteError as e:
                with pytest.raises(NonFiniteError, match=str(e)):
                    run.quantize(x, scheme, packing, numerics=numerics, outer=outer)
                continue
            got = run.quantize(x, scheme, packing, numerics=numerics, outer=outer)
            for part in scheme.parts:
                if part != "scale" or not scheme.whole_tensor:
                    a, b = getattr(got, part), getattr(wanted, part)
                    assert equal(a.view(np.uint8), b.view(np.uint8)), (part, rows, cols)


@pytest.mark.parametrize("name", ["NVFP4", "W4A16", "W8A8", "FP8_BLOCK", "MXFP8"])
def test_more_than_two_to_the_31_elements(run, name):
    """The last rows of a matrix of 2.2 billion weights, beside the same rows by themselves."""
    import torch

    rows, cols = 262656, 8192
    free, _ = torch.cuda.mem_get_info()
    if free < 12 << 30:
        pytest.skip(f"needs 12 GB of device memory, {free / 1e9:.0f} GB are free")
    scheme = SCHEMES[name]
    x = torch.randn(rows // 64, cols, device="cuda").bfloat16().repeat(64, 1)
    outer = torch.full((rows,), 2688.0, device="cuda") if scheme.needs_amax else None
    packing = packing_of(scheme)
    kernels = run.module
    whole = kernels.quantize(x, scheme, packing, outer=outer)
    last = kernels.quantize(
        x[-128:].clone(), scheme, packing, outer=None if outer is None else outer[-128:]
    )  # fmt: skip
    assert equal(array(whole.codes[-128:]), array(last.codes))
    assert equal(array(whole.scale[-len(last.scale) :]), array(last.scale))
    assert equal(array(kernels.amax(x)[-128:]), array(kernels.amax(x[-128:])))


def test_kernels_run_on_the_stream_of_their_caller(run):
    import torch

    scheme, kernels = SCHEMES["W4A16"], run.module
    x = np.random.default_rng(1).standard_normal((256, 1024)).astype(DTYPES["bf16"])
    there, stream = tensor(x, "cuda"), torch.cuda.Stream()
    status = kernels.new_status("cuda")
    stream.wait_stream(torch.cuda.default_stream())
    with torch.cuda.stream(stream):
        q = kernels.quantize(there, scheme, packing_of(scheme), status=status)
    stream.synchronize()
    kernels.refuse(status, there, q.scale)
    assert equal(array(q.codes), reference.quantize(x, scheme, packing_of(scheme)).codes)
