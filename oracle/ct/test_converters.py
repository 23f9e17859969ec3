"""What compressed-tensors converts our ModelOpt checkpoints to is what we convert them to.

Its ModelOptNvfp4Converter renames tensors and inverts scales. The inverse of our multiplier is
our divisor, or one unit in the last place away, because we recover the amax behind it.
FP8BlockDequantizer is in test_fp8_block.py, with the checkpoints that it reads.
"""

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters import ModelOptNvfp4Converter
from compressed_tensors.quantization import preset_name_to_scheme
from helpers import run_convert, write_checkpoint
from safetensors.torch import load_file
from streamq.kernels.reference import dequantize

from streamq.checkpoint import open_checkpoint
from streamq.formats import named
from streamq.stored import find_stored, read_rows

NUMPY = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}
COUNT = 60


@pytest.fixture(scope="module", params=NUMPY)
def checkpoint(request, tmp_path_factory):
    """Many small weights, so that there are many global scales; one of zeros."""
    rng = np.random.default_rng(0)
    tensors = {}
    for i in range(COUNT):
        w = rng.standard_normal((16, 64)) * rng.lognormal(-4, 2)
        tensors[f"model.layers.{i}.mlp.down_proj.weight"] = w.astype(NUMPY[request.param])
    tensors["model.layers.0.mlp.down_proj.weight"][:] = 0
    folder = tmp_path_factory.mktemp(request.param)
    return write_checkpoint(folder / "in", tensors), request.param


def _ulps(a, b):
    return abs(a.view(torch.int32).long() - b.view(torch.int32).long())


@pytest.mark.parametrize("name", ["NVFP4", "NVFP4A16"])
def test_their_converter_makes_what_we_make(name, checkpoint, tmp_path):
    """Every tensor but the global scales to the bit, and those to one unit in the last place."""
    source, dtype = checkpoint
    run_convert(source, tmp_path / "ct", name, input_scale=24.0)
    run_convert(source, tmp_path / "modelopt", name, format=named("modelopt"), input_scale=24.0)
    ours = load_file(tmp_path / "ct" / "model.safetensors")
    converter = ModelOptNvfp4Converter(targets=["re:.*_proj$"])
    theirs = converter.validate(load_file(tmp_path / "modelopt" / "model.safetensors"))
    assert sorted(theirs) == sorted(ours)
    same = 0
    for key, tensor in ours.items():
        found = theirs[key].reshape(tensor.shape)
        assert found.dtype == tensor.dtype, key
        if key.endswith("weight_global_scale"):
            assert _ulps(found, tensor).max() <= 1, key
            same += torch.equal(found, tensor)
        else:
            assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8)), key
    assert same >= COUNT / 2

    # Back from ModelOpt by ourselves: for amaxes that are bf16 or f16 numbers, to the bit.
    run_convert(tmp_path / "modelopt", tmp_path / "back", name, input_scale=24.0,
                format=named("compressed-tensors"))  # fmt: skip
    back = load_file(tmp_path / "back" / "model.safetensors")
    for key, tensor in ours.items():
        if dtype != "f32" or not key.endswith("weight_global_scale"):
            assert torch.equal(back[key].view(torch.uint8), tensor.view(torch.uint8)), key
        else:
            assert _ulps(back[key], tensor).max() <= 1, key


def test_what_they_decompress_is_what_we_unpack(checkpoint, tmp_path):
    """To the bit where their global scale is ours, elsewhere within a rounding to bf16."""
    source, _ = checkpoint
    run_convert(source, tmp_path / "out", "NVFP4A16", format=named("modelopt"))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    theirs = ModelOptNvfp4Converter(targets=["re:.*_proj$"]).process(tensors)
    preset = preset_name_to_scheme("NVFP4A16", ["Linear"])
    compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    exact = 0
    with open_checkpoint(tmp_path / "out") as c:
        for s in find_stored(c).values():
            q = read_rows(c, s, 0, s.layout.rows)
            parts = ("weight_packed", "weight_scale", "weight_global_scale")
            state = {k: theirs[f"{s.module}.{k}"] for k in parts}
            state["weight_global_scale"] = state["weight_global_scale"].reshape(1)
            found = compressor.decompress(state, preset)["weight"]
            ours = torch.from_numpy(dequantize(q, s.scheme))
            if torch.equal(state["weight_global_scale"], torch.from_numpy(q.global_scale)):
                assert torch.equal(found, ours.to(found.dtype)), s.name
                exact += 1
            assert torch.allclose(found.float(), ours, rtol=2.0**-8, atol=0), s.name
    assert exact >= COUNT / 2
