"""compressed-tensors' converter of AutoAWQ checkpoints reads ours as we do.

What it makes of every weight is compared with the bytes that we write when we repack the
same checkpoint to compressed-tensors, and its config with the one we wrote.
"""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.entrypoints.convert import AutoAWQConverter
from helpers import run_convert, write_checkpoint
from safetensors.torch import load_file

from streamq.formats import FORMATS

SHAPES = {
    "model.layers.0.self_attn.q_proj": (64, 256),
    "model.layers.0.self_attn.k_proj": (8, 256),
    "model.layers.0.self_attn.v_proj": (8, 256),
    "model.layers.0.mlp.down_proj": (136, 384),
    "model.layers.1.mlp.down_proj": (24, 128),
    "lm_head": (32, 128),
}
CODES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("ignore", [(), ("model.layers.1.*",)])
def test_their_converter_makes_the_tensors_we_repack_to(ignore, group_size, tmp_path):
    """Codes, scales and zero points of every module, and no module more or less."""
    rng = np.random.default_rng(0)
    weights = {}
    for name, shape in SHAPES.items():
        w = rng.standard_normal(shape) * rng.lognormal(0, 1, (shape[0], 1)) * 0.02
        w[0], w[1], w[2] = 0, abs(w[1]), -abs(w[2])
        weights[name + ".weight"] = w.astype(ml_dtypes.bfloat16)
    source = write_checkpoint(tmp_path / "in", weights)
    how = {"group_size": group_size, "ignore": ignore}
    run_convert(source, tmp_path / "awq", "W4A16_ASYM", format=FORMATS["awq"], **how)
    run_convert(tmp_path / "awq", tmp_path / "ct", "W4A16_ASYM", **how)

    config = json.loads((tmp_path / "awq" / "config.json").read_text())["quantization_config"]
    converter = AutoAWQConverter.from_autoawq_config(config)
    assert (converter.bits, converter.group_size, converter.zero_point) == (4, group_size, True)
    tensors = load_file(tmp_path / "awq" / "model.safetensors")
    converter.validate(tensors)
    theirs, ours = converter.process(tensors), load_file(tmp_path / "ct" / "model.safetensors")
    assert theirs.keys() == ours.keys()
    quantized = {n for n in SHAPES if n != "lm_head" and not (ignore and ".1." in n)}
    assert {n for n in ours if n.endswith(CODES)} == {f"{m}.{c}" for m in quantized for c in CODES}
    for name, tensor in ours.items():
        assert theirs[name].dtype == tensor.dtype, name
        assert torch.equal(theirs[name], tensor), name
