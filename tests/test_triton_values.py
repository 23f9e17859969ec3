"""What the Triton kernels read back, in Triton's interpreter: values, energies, casts."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streamq.kernels import reference
from streamq.kernels.golden import CASES, DTYPES, outer_of
from test_kernels import any_bytes, equal, packing_of, read, same_values
from torch_backend import array, interpreted, needs_triton, tensor, with_arrays
from triton_cases import DISTINCT, EXAMPLES, KERNELS, weights

from streamq.schemes import BYTES, Packing, Quantized, Scheme

pytestmark = needs_triton


@pytest.fixture(scope="module")
def run():
    return with_arrays(interpreted())


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
