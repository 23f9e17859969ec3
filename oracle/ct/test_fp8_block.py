"""transformers loads our fp8 block checkpoints, with f32 scales and with powers of two.

On a CPU it dequantizes while it loads, so the model it makes is compared to the bit with the
source model that holds what we dequantize.
"""

import json
import shutil

import pytest
import torch
from compressed_tensors.entrypoints.convert.converters import FP8BlockDequantizer
from helpers import run_convert
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from transformers.quantizers.quantizers_utils import should_convert_module

from streamq.formats import named
from streamq.schemes import SCHEMES
from streamq.stored import open_tensors

FORMATS = {"f32": named("fp8"), "ue8m0": named("fp8", scale_fmt="ue8m0")}
TOKENS = torch.arange(96).reshape(2, 48) * 7 % 64
SIZES = {
    "vocab_size": 64, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)),
    # Without lm_head in the file, and with one in the model.
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    # mlp.gate beside experts, and a dense layer with mlp.gate_proj.
    "moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **SIZES, moe_intermediate_size=128, shared_expert_intermediate_size=256,
            num_experts=4, num_experts_per_tok=2, mlp_only_layers=[0],
        )
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Random models whose blocks differ in size, as transformers saves them."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, make in MODELS.items():
        model = make()
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, torch.nn.Linear) and module.out_features % 128 == 0:
                    rows, cols = module.weight.shape
                    size = torch.randn(rows // 128, cols // 128).exp()
                    module.weight *= size.repeat_interleave(128, 0).repeat_interleave(128, 1)
        model.to(torch.bfloat16).save_pretrained(folder / name)
    return folder


@torch.no_grad()
def _logits(model):
    return model.eval()(TOKENS).logits.float()


def _load(folder):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    assert {k: v for k, v in info.items() if v} == {}
    return model


@pytest.mark.parametrize("scales", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_with_our_values(name, scales, models, tmp_path):
    """The same logits, to the bit; other ones with the scales of a weight a block further on."""
    out = tmp_path / "out"
    run_convert(models / name, out, "FP8_BLOCK", format=FORMATS[scales])
    found = _logits(_load(out))
    run_convert(out, tmp_path / "bf16", "BF16")
    assert torch.equal(found, _logits(_load(tmp_path / "bf16")))
    assert not torch.equal(found, _logits(_load(models / name)))

    shutil.copytree(out, tmp_path / "spoiled")
    tensors = load_file(out / "model.safetensors")
    scale = "model.layers.0.mlp.down_proj.weight_scale_inv"
    tensors[scale] = tensors[scale].roll(1, 1)
    save_file(tensors, tmp_path / "spoiled" / "model.safetensors", metadata={"format": "pt"})
    assert not torch.equal(found, _logits(_load(tmp_path / "spoiled")))


@pytest.mark.parametrize("scales", FORMATS)
def test_the_scales_are_what_the_config_says(scales, models, tmp_path):
    """ue8m0: transformers casts them to that dtype on a GPU, and loses nothing."""
    out = tmp_path / "out"
    run_convert(models / "llama", out, "FP8_BLOCK", format=FORMATS[scales])
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    theirs = FineGrainedFP8Config(**config)
    assert theirs.scale_fmt == ("ue8m0" if scales == "ue8m0" else "float")
    assert list(theirs.weight_block_size) == [128, 128]
    tensors = load_file(out / "model.safetensors")
    exact = []
    for name in tensors:
        if name.endswith("weight_scale_inv"):
            assert tensors[name].dtype == torch.float32
            power = tensors[name].to(torch.float8_e8m0fnu).float()
            exact.append(torch.equal(power, tensors[name]))
    assert len(exact) == 14
    assert all(exact) if scales == "ue8m0" else not any(exact)


@pytest.mark.parametrize("name", MODELS)
def test_each_linear_is_converted_or_left_out_as_we_did(name, models, tmp_path):
    """By their own matching of names, on every Linear of the model as it is before loading."""
    out = tmp_path / "out"
    run_convert(models / name, out, "FP8_BLOCK", format=FORMATS["f32"])
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    ignore = config["modules_to_not_convert"]
    tensors = load_file(out / "model.safetensors")
    wanted = {n.removesuffix(".weight_scale_inv") for n in tensors if n.endswith("_scale_inv")}
    model = MODELS[name]()
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    linears |= {n for n in wanted if ".experts." in n}  # one module of transformers, by name
    assert {n for n in linears if should_convert_module(n, ignore)} == wanted


def test_an_ignored_name_within_a_quantized_one():
    """mlp.gate as it is would leave out mlp.gate_proj, and a score any other score."""
    layer = "model.layers.0."
    modules = [layer + "mlp.gate_proj", layer + "mlp.up_proj", "model.inner.score"]
    ignore = ["lm_head", layer + "mlp.gate", "score"]
    scheme = FORMATS["f32"].concrete(SCHEMES["FP8_BLOCK"])
    config = FORMATS["f32"].config({scheme: modules}, ignore, {})["quantization_config"]
    written = config["modules_to_not_convert"]
    assert all(should_convert_module(n, written) for n in modules)
    assert not any(should_convert_module(n, written) for n in ignore)
    assert config["ignored_layers"] == ignore  # for vLLM and SGLang
    naive = [n for n in modules if not should_convert_module(n, ignore)]
    assert naive == [layer + "mlp.gate_proj", "model.inner.score"]


@pytest.mark.parametrize("scales", FORMATS)
def test_their_dequantizer_gives_our_values(scales, models, tmp_path):
    """compressed-tensors reads the format too, for itself; every bit of every element."""
    out = tmp_path / "out"
    run_convert(models / "moe", out, "FP8_BLOCK", format=FORMATS[scales])
    converter = FP8BlockDequantizer(targets=["re:.*_proj$"], dtype=torch.float32)
    theirs = converter.process(load_file(out / "model.safetensors"))
    with open_tensors(out) as ours:
        assert sorted(ours.names) == sorted(theirs)
        assert ours.stored
        for name in ours.stored:
            assert torch.equal(torch.from_numpy(ours[name]), theirs[name]), name


@pytest.mark.parametrize(("rows", "fails"), [(192, False), (257, True)])
def test_a_cpu_needs_whole_blocks(rows, fails, tmp_path):
    """transformers divides the rows among the blocks, wrongly and without a word if it can.

    We write the ragged block that kernels for GPUs, vLLM and compressed-tensors expect.
    """
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"intermediate_size": rows}))
    name = "model.layers.0.mlp.gate_proj.weight"
    with torch.no_grad():
        model.get_parameter(name)[:128] *= 8
    model.to(torch.bfloat16).save_pretrained(tmp_path / "in")
    run_convert(tmp_path / "in", tmp_path / "out", "FP8_BLOCK", format=FORMATS["f32"])
    if fails:
        with pytest.raises(RuntimeError):
            _load(tmp_path / "out")
        return
    theirs = _load(tmp_path / "out").get_parameter(name).float()
    with open_tensors(tmp_path / "out") as tensors:
        ours = torch.from_numpy(tensors[name])
    assert torch.allclose(theirs[:96], ours[:96], rtol=2.0**-8)
    assert (theirs - ours).norm() > 0.1 * ours.norm()
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    right = FP8BlockDequantizer(targets=["re:.*_proj$"], dtype=torch.float32).process(tensors)
    assert torch.equal(right[name], ours)
