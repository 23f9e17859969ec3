"""Whole conversions against the reference, tensor by tensor: slabs, stretches, places."""

import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers import run_convert, tensors_of, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from streamq.kernels import reference

from streamq.schemes import ALL, SCHEMES

FLOATS = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}


def matrix(rows, cols, dtype, seed):
    return (np.random.default_rng(seed).standard_normal((rows, cols)) * 0.02).astype(dtype)


def check(tensors, scheme, **options):
    """Convert, and compare every output with what the reference makes of its whole weight."""
    with tempfile.TemporaryDirectory() as folder:
        src = write_checkpoint(Path(folder, "in"), tensors)
        plan = run_convert(src, Path(folder, "out"), scheme.name, **options)
        out = tensors_of(Path(folder, "out"))
    for shard in plan.shards:
        for weights in shard.weights:
            tops = {}
            for t, step in zip(weights.sources, weights.steps.tolist(), strict=True):
                tops[step] = max(tops.get(step, 0), np.abs(tensors[t.name].astype("f4")).max())
            rows = zip(weights.pairs(), weights.steps.tolist(), strict=True)
            for (t, layout), step in rows:
                x = tensors[t.name]
                outer = None
                if scheme.needs_amax:
                    top = np.full(len(x), tops[step], np.float32)
                    outer = reference.outer_scale(top, scheme, x.dtype, "f32")
                q = reference.quantize(x, weights.scheme, outer=outer)
                pack = weights.target.format.pack
                module = t.name.removesuffix("weight")
                for e in layout.entries:
                    found, data = out[module + e.suffix]
                    assert (found.dtype, found.shape) == (e.dtype, e.shape)
                    if e.role == "global_scale":
                        g = weights.target.format.pack_global(outer[:1], x.dtype)
                        assert data == g.tobytes()
                    elif e.role == "constant":
                        assert data == e.value
                    else:
                        wanted = pack(e.role, q, layout, weights.scheme)
                        assert data == wanted.tobytes(), (t.name, e.suffix)


# A small weight after a lower one: the slab of both is higher than either's own would be.
@pytest.mark.parametrize(
    ("name", "dtype", "shapes"),
    [
        ("FP8_BLOCK", "BF16", [(128, 2176), (110, 2176)]),
        ("FP8_BLOCK", "BF16", [(128, 2304), (99, 2304)]),
        ("W4A16_ASYM", "BF16", [(8, 34944), (7, 34944)]),
        ("W2A16", "F32", [(1, 170368), (1, 91392)]),
        ("NVFP4A16", "F16", [(2, 131072), (3, 65536), (1, 16)]),
    ],
)
def test_several_weights_in_a_slab(name, dtype, shapes):
    tensors = {
        f"{chr(97 + i)}.o_proj.weight": matrix(*shape, FLOATS[dtype], i)
        for i, shape in enumerate(shapes)
    }
    check(tensors, SCHEMES[name])


@pytest.mark.parametrize("name", SCHEMES)
@given(data=st.data())
def test_any_checkpoint(name, data):
    scheme = SCHEMES[name]
    step = 1 if scheme.block[1] == ALL or scheme.block[0] != 1 else scheme.block[1]
    dtype = data.draw(st.sampled_from(list(FLOATS)))
    leaves = st.sampled_from(["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"])
    modules = st.tuples(st.integers(0, 2), leaves)
    tensors = {}
    for i, (layer, leaf) in enumerate(data.draw(st.lists(modules, min_size=1, unique=True))):
        rows, cols = (
            data.draw(st.integers(1, 260)),
            step * data.draw(st.integers(1, 300 // step + 1)),
        )
        tensors[f"model.layers.{layer}.{leaf}.weight"] = matrix(rows, cols, FLOATS[dtype], i)
        if data.draw(st.booleans()):
            tensors[f"model.layers.{layer}.{leaf}.bias"] = np.arange(i, dtype="f4")
    shard_size = data.draw(st.sampled_from([None, 1, 50_000]))
    check(tensors, scheme, shard_size=shard_size, workers=data.draw(st.integers(1, 2)))
