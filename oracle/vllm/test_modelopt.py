"""vLLM reads our ModelOpt checkpoints: both config files, names, fused loading, scales.

FP8_PER_CHANNEL_PER_TOKEN runs on a CPU as it is. For the other algorithms vLLM has no CPU
kernel. There its own loading and its own dequantization run, and torch multiplies: that tests
names, fused loading and the meaning of every scale, not its kernels. transformers does not
load ModelOpt checkpoints, so it gets the same numbers in another format.
"""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from helpers import run_convert
from safetensors.torch import load_file, save_file
from streamq.kernels.reference import dequantize
from test_vllm import NEW, PROMPTS, VOCAB, _generate, _transformers
from test_vllm import source as source_fixture
from transformers import AutoModelForCausalLM

from streamq.checkpoint import open_checkpoint
from streamq.formats import named
from streamq.stored import find_stored, read_rows

source = source_fixture
MODELOPT = named("modelopt")
# The constant of NVFP4 as compressed-tensors stores it; not 1, whose reciprocal is itself.
INPUT_SCALE = 24.0

# Bounds of the mean |difference| of log-probabilities. Without quantized inputs only the order
# of sums and roundings to bf16 differ: 0.0018 to 0.0024. Quantized inputs turn that into whole
# steps: 0.012 with e4m3, and with e2m1 0.037, where 0.048 is what one step of bf16 here and
# there in the inputs does to transformers alone.
BOUNDS = {
    "FP8_DYNAMIC": 0.02,
    "NVFP4A16": 0.005,
    "NVFP4": 0.045,
    "MXFP8": 0.005,
    "FP8_BLOCK": 0.005,
}
ALGOS = {
    "FP8_DYNAMIC": "FP8_PER_CHANNEL_PER_TOKEN",
    "NVFP4A16": "W4A16_NVFP4",
    "NVFP4": "NVFP4",
    "MXFP8": "MXFP8",
    "FP8_BLOCK": "FP8_PB_WO",
}


class _Torch:
    """A kernel that multiplies in torch with the weights as vLLM dequantizes them."""

    supports_pre_processed_weights = False

    def input_quant_key(self):
        """None: the input comes as it is."""

    def process_weights_after_loading(self, layer):
        """After vLLM joined the shards and made of the scales what its kernels take."""
        from vllm.model_executor.layers.quantization.utils.mxfp8_utils import (
            dequant_mxfp8_to_bf16,
        )
        from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
            dequantize_to_dtype,
        )

        weight, scale = layer.weight.data, layer.weight_scale.data
        if weight.dtype == torch.uint8:
            self.values = dequantize_to_dtype(
                weight, scale, layer.weight_global_scale.data, torch.bfloat16, swizzle=False
            )
        elif scale.dtype == torch.uint8:
            self.values = dequant_mxfp8_to_bf16(weight, scale)
        else:
            wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            wide = wide[: weight.shape[0], : weight.shape[1]]
            self.values = (weight.float() * wide).to(torch.bfloat16)

    def apply_weights(self, layer, x, bias=None):
        """x @ W.T"""
        return torch.nn.functional.linear(x, self.values, bias)


def _generate_in_torch(folder):
    """``_generate`` with the kernel above, or with vLLM's emulation of NVFP4 on both sides."""
    from vllm.model_executor.kernels.linear.nvfp4.emulation import EmulationNvFp4LinearKernel
    from vllm.model_executor.layers.quantization import modelopt

    class Emulation(EmulationNvFp4LinearKernel):
        def process_weights_after_loading(self, layer):
            """What vLLM made of input_scale is what compressed-tensors would have told it."""
            assert layer.input_global_scale_inv.item() == INPUT_SCALE
            super().process_weights_after_loading(layer)

    def kernel(spec, layer, rt, weight_shape=None):
        if hasattr(layer, "input_scale") and spec.activation is not None:
            return Emulation(None)
        return _Torch()

    modelopt.select_linear_kernel = kernel
    return _generate(folder)


def _vllm(folder, generate):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(generate, folder).result()


class _Linear(torch.nn.Module):
    """A Linear of our codes and scales, whose inputs are quantized as its algorithm says."""

    def __init__(self, scheme, q):
        super().__init__()
        self.codes = torch.from_numpy(q.codes.astype(np.float32))
        self.scale = torch.from_numpy(q.scale.astype(np.float32)).reshape(1, -1)
        self.values = torch.from_numpy(dequantize(q, scheme)).to(torch.bfloat16)
        self.two_level = scheme.two_level

    def forward(self, x):
        """By token in f32 with one rounding at the end, or in bf16 as vLLM's emulation does."""
        from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
            ref_nvfp4_quant_dequant,
        )

        if self.two_level:
            flat = x.reshape(-1, x.shape[-1])
            inputs = ref_nvfp4_quant_dequant(flat, torch.tensor(INPUT_SCALE), 16)
            return torch.nn.functional.linear(inputs, self.values).reshape(*x.shape[:-1], -1)
        scale = x.float().abs().amax(-1, keepdim=True) / 448
        codes = (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
        return ((codes @ self.codes.T) * scale * self.scale).to(x.dtype)


@torch.no_grad()
def _expected(original, out, tokens):
    """The log-probabilities of the original model with our codes and scales in its Linears."""
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16).eval()
    with open_checkpoint(out) as c:
        for s in find_stored(c).values():
            linear = _Linear(s.scheme, read_rows(c, s, 0, s.layout.rows))
            parent, _, leaf = s.module.rpartition(".")
            setattr(model.get_submodule(parent), leaf, linear)
    rows = [model(torch.tensor([t[:-1]])).logits[0] for t in tokens]
    return torch.cat(rows).float().log_softmax(-1).numpy()


def _theirs(name, original, out, tokens):
    """What transformers makes of the same numbers: of ours, or of what we dequantize."""
    if name in ("FP8_DYNAMIC", "NVFP4"):
        return _expected(original, out, tokens)
    floats = out.with_name(out.name + "-bf16")
    run_convert(out, floats, "BF16")
    return _transformers(floats, tokens)


def _spoiled(folder, to, name="model.layers.0.self_attn.q_proj.weight_scale"):
    """A copy in which a scale of one projection of fourteen lies a row or a block further on."""
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    tensors = load_file(to / "model.safetensors")
    tensors[name] = tensors[name].roll(1, 0).contiguous()
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.fixture(scope="module")
def blocks(source, tmp_path_factory):
    """The model with blocks of 128x128 that differ in size, rows of which hardly do."""
    folder = tmp_path_factory.mktemp("blocks") / "bf16"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.model.modules():
            if isinstance(module, torch.nn.Linear):
                rows, cols = module.weight.shape
                size = torch.randn(rows // 128, cols // 128).mul(0.7).exp()
                module.weight *= size.repeat_interleave(128, 0).repeat_interleave(128, 1)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", BOUNDS)
def test_vllm_computes_with_our_numbers(name, source, blocks, tmp_path):
    """In prefill and in decoding, over the whole vocabulary."""
    original = blocks if name == "FP8_BLOCK" else source
    out = tmp_path / "out"
    run_convert(original, out, name, format=MODELOPT, input_scale=INPUT_SCALE)
    made = _vllm(out, _generate if name == "FP8_DYNAMIC" else _generate_in_torch)
    assert [len(new) for new, _ in made] == [NEW] * len(PROMPTS)
    tokens = [[*p, *new] for p, (new, _) in zip(PROMPTS, made, strict=True)]
    found = np.concatenate([np.float32(rows) for _, rows in made])
    assert found.shape == (sum(map(len, tokens)) - len(tokens), VOCAB)

    apart = abs(found - _theirs(name, original, out, tokens)).mean()
    spoiled = _spoiled(out, tmp_path / "spoiled")
    wrong = abs(found - _theirs(name, original, spoiled, tokens)).mean()
    print(f"\n{name}: {apart:.5f}, spoiled {wrong:.5f}")
    assert apart < BOUNDS[name] < wrong


# --- the config files -------------------------------------------------------------------


@pytest.mark.parametrize("name", ALGOS)
@pytest.mark.parametrize("file", ["config.json", "hf_quant_config.json"])
def test_their_config_classes_read_both_files(file, name, source, tmp_path):
    """What vLLM parses, and which class of it takes the checkpoint."""
    from vllm.model_executor.layers.quantization import modelopt
    from vllm.model_executor.layers.quantization.modelopt import resolve

    run_convert(source, tmp_path / "out", name, format=MODELOPT)
    read = json.loads((tmp_path / "out" / file).read_text())
    flat = read["quantization_config"] if file == "config.json" else read
    classes = {"N": modelopt.ModelOptNvFp4Config, "M": modelopt.ModelOptMxFp8Config}
    cls = classes.get(ALGOS[name].removeprefix("W4A16_")[0], modelopt.ModelOptFp8Config)
    config = cls.from_config(flat)
    assert config.quant_method == ALGOS[name]
    assert getattr(config, "kv_cache_quant_algo", None) is None
    if "NVFP4" in name:
        assert config.group_size == 16
        assert config.is_checkpoint_nvfp4_serialized
    # Who reads it is told by quant_method and quant_algo, as vLLM asks all of its classes.
    if file == "config.json":
        others = (*classes.values(), modelopt.ModelOptFp8Config)
        claims = [c.override_quantization_method(flat, None) for c in others]
        said = next(filter(None, claims), flat["quant_method"])
        assert said == config.get_name()
    spec, _, _ = resolve(config.quant_method, config, "layer")
    assert (spec.activation is None) == (name == "NVFP4A16")


def test_an_ignored_name_within_a_quantized_one(tmp_path):
    """vLLM leaves out whatever has an ignored name in its own: mlp.gate hides gate_up_proj."""
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

    from streamq.schemes import SCHEMES

    modules = [f"model.layers.0.mlp.{p}" for p in ("gate_proj", "up_proj", "down_proj")]
    ignore = ["lm_head", "model.layers.0.mlp.gate", *QKV]
    written = MODELOPT.config({SCHEMES["NVFP4"]: modules}, ignore, {})
    for flat in (
        written["quantization_config"], MODELOPT.files(written)["hf_quant_config.json"],
    ):  # fmt: skip
        config = ModelOptNvFp4Config.from_config(flat)
        config.packed_modules_mapping = {
            "qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"],
        }  # fmt: skip
        for left_out in ("mlp.gate", "self_attn.qkv_proj"):
            assert config.is_layer_excluded("model.layers.0." + left_out)
        for quantized in ("mlp.gate_up_proj", "mlp.down_proj", "self_attn.o_proj"):
            assert not config.is_layer_excluded("model.layers.0." + quantized)


QKV = [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"]
