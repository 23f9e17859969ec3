"""Triton kernels of the sparse codec's way, in Triton's interpreter: equal to those of the CPU."""

import os
import subprocess
import sys

import numpy as np
import pytest
from ascendc_shim import pruned
from hypothesis import given, settings
from hypothesis import strategies as st
from streamq.kernels.golden import DTYPES, make
from torch_backend import array, interpreted, needs_triton, tensor

from streamq.nz import to_nz

pytestmark = needs_triton
SOAK = settings.default.max_examples > 1000
EXAMPLES = settings.default.max_examples // 15


@pytest.fixture(scope="module")
def kernels():
    interpreted()
    from streamq.kernels.triton import histogram, layout, magnitude

    return layout, histogram, magnitude


@pytest.mark.parametrize(
    "shape", [(1, 1), (16, 32), (17, 33), (15, 31), (300, 40), (5, 1025), (130, 700)]
)
def test_nz_is_that_of_the_cpu(kernels, shape):
    x = np.random.default_rng(shape[0]).integers(1, 256, shape, dtype=np.uint8)
    got = array(kernels[0].to_nz(tensor(x)))
    assert got.shape == to_nz(x).shape
    assert got.tobytes() == to_nz(x).tobytes()
    assert got.tobytes() == to_nz(x, bits=4).tobytes()


@pytest.mark.parametrize(("size", "tiles"), [(512, 3), (2560, 2), (4096, 1), (512, 0)])
def test_histogram_counts_bytes(kernels, size, tiles):
    x = np.random.default_rng(size).integers(0, 256, (tiles, size), dtype=np.uint8)
    x[1:] = np.maximum(x[1:], 200)
    got = kernels[1].histogram(tensor(x.reshape(-1)), size).numpy()
    assert got.shape == (tiles, 256)
    for row, counts in zip(x, got, strict=True):
        assert np.array_equal(counts, np.bincount(row, minlength=256))


@pytest.mark.parametrize("keep", [1, 192, 384])
@pytest.mark.parametrize("dtype", DTYPES)
def test_magnitude_keeps_the_largest(kernels, dtype, keep):
    x = make.inputs(DTYPES[dtype])  # zeros, ties over all of a row, subnormals, the largest
    got = array(kernels[2].keep_largest(tensor(x), keep))
    assert got.tobytes() == pruned(x, keep).tobytes()


@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_magnitude_of_long_and_tied_rows(kernels, data):
    dtype = data.draw(st.sampled_from(list(DTYPES)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    cols, levels = data.draw(st.integers(1, 5000)), data.draw(st.integers(1, 40))
    x = rng.integers(-levels, levels + 1, (2, cols)).astype(DTYPES[dtype])
    keep = data.draw(st.integers(1, cols))
    got = array(kernels[2].keep_largest(tensor(x), keep))
    assert got.tobytes() == pruned(x, keep).tobytes()


COMPILE = """
from streamq.kernels.triton import histogram, layout, magnitude
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

TARGETS = [GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("cuda", 100, 32),
           GPUTarget("hip", "gfx942", 64)]
for target in TARGETS:
    for kernel, types, constants in (
        (layout.fragments, "*u8 *u8 i32 i32 i32", {"LINES": layout.LINES}),
        (histogram.count, "*u8 *i32 i32", {"STEP": histogram.STEP}),
        (magnitude.prune, "*i16 *i16 i32 i32", {"BITS": 16, "WIDE": magnitude.WIDE}),
        (magnitude.prune, "*i32 *i32 i32 i32", {"BITS": 32, "WIDE": magnitude.WIDE}),
    ):
        names = kernel.arg_names
        signature = dict(zip(names, types.split() + ["constexpr"] * len(constants), strict=True))
        source = ASTSource(kernel, signature, constants)
        assert compile(source, target).kernel
"""


@pytest.mark.skipif(not SOAK, reason="compiling for four GPUs takes 15 s: make soak")
def test_they_compile_for_gpus_that_are_not_here():
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
