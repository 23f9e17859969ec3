"""gpt-fast's rule gives our bytes, and its linear layer computes with our values.

gpt-fast (commit 32971d3) is scripts, not a package: ``dynamically_quantize_per_channel`` and
``WeightOnlyInt8Linear`` are written here from the formulas of its quantize.py.
"""

import ml_dtypes
import numpy as np
import pytest
import torch
from helpers import run_convert, write_checkpoint
from safetensors.torch import load_file
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from streamq.formats import FORMATS
from streamq.stored import open_tensors

TORCH = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
NUMPY = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}
TOKENS = torch.arange(96).reshape(2, 48) * 7 % 64

# Bounds of the mean |difference| of log-probabilities, which spread by 0.43: products that are
# scaled before or after they are summed differ by 2e-7 in f32 and by 0.003 in bf16.
CLOSE = {"f32": 2e-6, "bf16": 0.005}


def _quantized(weight):
    """Codes and scales of a float ``[out, in]``, as gpt-fast's quantizer of int8 makes them."""
    x = weight.float()
    low, high = torch.aminmax(x, dim=1)
    top = torch.max(-low.clamp(max=0), high.clamp(min=0))
    scales = torch.clamp(top / (float(127 - -128) / 2), min=torch.finfo(torch.float32).eps)
    codes = torch.clamp(torch.round(x / scales.unsqueeze(-1)), -128, 127).to(torch.int8)
    return codes, scales.to(weight.dtype)


class Int8Linear(torch.nn.Module):
    """What gpt-fast puts in the place of a Linear."""

    def __init__(self, weight, scales):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)

    def forward(self, x):
        """The sum of the codes, and then the scale."""
        return linear(x, self.weight.to(dtype=x.dtype)) * self.scales


def _edges(dtype):
    """Rows of 128 columns: where rules of rounding and guards differ."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((64, 128)).astype("f4") * np.exp(rng.standard_normal((64, 1)))
    limit = float(ml_dtypes.finfo(NUMPY[dtype]).max)
    w[0] = 0
    w[1] = np.resize(np.arange(-255, 256) / 2, 128)  # ties
    w[2], w[3] = np.abs(w[2]), -np.abs(w[3])
    w[4, 0], w[4, 1] = 127.5, -127.5  # clipped at one end only
    w[5] = np.resize([127.5, 63.5, -0.5, 0.5, 1.5, 2.5, -1.5], 128)
    w[6], w[7] = w[6] * 1e-7, w[7] * 1e-6  # below and around the least scale
    w[8] *= limit / np.abs(w[8]).max() / 1.01
    w[9, 5] *= 1e4
    w[10] = -1
    return w.astype(NUMPY[dtype])


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("seed", [None, *range(8)])
def test_codes_and_scales_are_those_of_its_rule(seed, dtype, tmp_path):
    """Every bit, in the dtype that it stores scales in."""
    name = "model.layers.0.mlp.down_proj.weight"
    w = _edges(dtype)
    if seed is not None:
        rng = np.random.default_rng(seed)
        w = (rng.standard_normal((300, 257)) * rng.lognormal(0, 2, (300, 1))).astype(NUMPY[dtype])
    source = write_checkpoint(tmp_path / "in", {name: w})
    run_convert(source, tmp_path / "out", "W8A16", format=FORMATS["gpt-fast"])
    made = load_file(tmp_path / "out" / "model.safetensors")
    codes, scales = _quantized(load_file(source / "model.safetensors")[name])
    assert made.keys() == {name, name.removesuffix("weight") + "scales"}
    assert torch.equal(made[name], codes)
    ours = made[name.removesuffix("weight") + "scales"]
    assert ours.dtype == scales.dtype == TORCH[dtype]
    assert torch.equal(ours, scales)


@torch.no_grad()
def _logprobs(model):
    return model.eval()(TOKENS).logits.float().log_softmax(-1)


def _with_int8(source, tensors, dtype):
    """The source model with gpt-fast's layers in it, and how many they are."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    modules = [n.removesuffix(".scales") for n in tensors if n.endswith(".scales")]
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        scales = tensors[module + ".scales"].to(dtype)
        layer = Int8Linear(tensors[module + ".weight"], scales)
        setattr(model.get_submodule(parent), leaf, layer)
    return model, len(modules)


@pytest.mark.parametrize("dtype", CLOSE)
def test_its_layer_computes_with_our_values(dtype, tmp_path):
    """The model with its layers against the model with our dequantized weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight *= torch.randn(module.out_features, 1).mul(0.5).exp()
    source, out = tmp_path / "in", tmp_path / "out"
    model.to(TORCH[dtype]).save_pretrained(source)
    run_convert(source, out, "W8A16", format=FORMATS["gpt-fast"])
    tensors = load_file(out / "model.safetensors")
    theirs, count = _with_int8(source, tensors, TORCH[dtype])
    assert count == 14
    ours = AutoModelForCausalLM.from_pretrained(source, dtype=TORCH[dtype])
    with open_tensors(out) as values:
        assert len(values.stored) == 14
        for name in values.stored:
            weight = torch.from_numpy(values[name]).to(TORCH[dtype])
            ours.get_submodule(name.removesuffix(".weight")).weight.data = weight
    found = _logprobs(theirs)
    assert found.std() > 0.2
    assert (found - _logprobs(ours)).abs().mean() < CLOSE[dtype]

    # Scales of the row before in one projection are seen.
    module = theirs.get_submodule("model.layers.1.self_attn.o_proj")
    module.scales = module.scales.roll(1, 0)
    assert (_logprobs(theirs) - found).abs().mean() > 2 * CLOSE[dtype]
