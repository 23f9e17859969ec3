"""Models of many families as transformers makes and saves them: we convert, it computes.

What it loads must give the logits of the source model with our values in it. What it cannot
load (experts that its own checkpoints have in one tensor, quantized one by one, which vLLM
reads) is put together again here, by its own modules' layouts, and must compute nearly what
the source does: experts that are cut the wrong way compute something else.
"""

import shutil

import pytest
import torch
from helpers import run_convert
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Mxfp4Config

from streamq.checkpoint import open_checkpoint
from streamq.formats import FORMATS
from streamq.stored import open_tensors
from streamq.verifying import verify

TOKENS = torch.arange(96).reshape(2, 48) * 7 % 64
SIZES = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
# Every token goes to all experts, so that a rounded router changes no choice.
MOE = {"moe_intermediate_size": 96, "num_experts": 4, "num_experts_per_tok": 4}
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
SHARED = {"shared_expert_intermediate_size": 96}
DEEPSEEK = {
    "moe_intermediate_size": 96, "n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 4, "intermediate_size": 96}
MODELS = {
    "llama": {}, "qwen3": {}, "phi3": {}, "gemma3_text": {"sliding_window": 16},
    "qwen3_moe": MOE, "mixtral": LOCAL, "minimax_m2": LOCAL,
    "deepseek_v3": {
        **DEEPSEEK, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32, "v_head_dim": 32, "num_key_value_heads": 4,
    },
    "glm4_moe": DEEPSEEK, "qwen3_5_text": LINEAR,
    "qwen3_next": {**MOE, **LINEAR, **SHARED},
    "qwen3_5_moe_text": {**MOE, **LINEAR, **SHARED},
    "llama4_text": {
        **LOCAL, "intermediate_size_mlp": 192, "interleave_moe_layer_step": 2,
        "attention_chunk_size": 32,
    },
    "gemma4_text": {
        "moe_intermediate_size": 96, "num_experts": 4, "top_k_experts": 4,
        "enable_moe_block": True, "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": 64, "global_head_dim": 32, "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "granitemoe": LOCAL,
    "gpt_oss": {**LOCAL, "sliding_window": 16},
}  # fmt: skip
#: Their checkpoints have experts in one tensor, and transformers has no converter from others.
STACKED = {"llama4_text": True, "gemma4_text": False, "granitemoe": False}  # transposed
LOADED = [name for name in MODELS if name not in STACKED and name != "gpt_oss"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Random models whose rows differ in size, as transformers saves them."""
    folder = tmp_path_factory.mktemp("models")
    for name, more in MODELS.items():
        torch.manual_seed(0)
        sizes = SIZES if name != "phi3" else {k: v for k, v in SIZES.items() if k != "head_dim"}
        made = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**{**sizes, **more}))
        with torch.no_grad():
            for key, p in made.named_parameters():
                if p.ndim > 1:
                    rows = torch.randn(*p.shape[:-1], 1).mul(0.5).exp()
                    p.copy_(torch.randn(p.shape) * 0.08 * rows)
                elif key.endswith(("bias", "sinks")):
                    p.normal_(0, 0.02)
        made.to(torch.bfloat16).save_pretrained(folder / name)
    return folder


def _load(folder, **how):
    made, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True, **how
    )
    assert {k: v for k, v in info.items() if v} == {}
    return made


@torch.no_grad()
def _logits(made):
    return made.eval()(TOKENS).logits.float()


def _distance(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def _ours(source, out, folder, transposed=False):
    """A plain checkpoint like the source with our values; experts go back where they were."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    with open_tensors(out) as quantized:
        names = set(quantized.names)

        def values(name):
            return torch.from_numpy(quantized[name].astype("f4")).to(torch.bfloat16)

        for name, x in tensors.items():
            if name in names:
                if x.is_floating_point() and name in quantized.stored:
                    tensors[name] = values(name)
                continue
            parent, _, leaf = name.removesuffix(".weight").rpartition(".")
            parent = parent if parent.endswith(".experts") else parent + ".experts"
            down = leaf in ("down_proj", "output_linear")
            experts = [
                torch.cat([values(f"{parent}.{e}.{p}.weight")
                           for p in (("down_proj",) if down else ("gate_proj", "up_proj"))])
                for e in range(4)
            ]  # fmt: skip
            stack = torch.stack(experts)
            tensors[name] = (stack.transpose(1, 2) if transposed else stack).contiguous()
            assert tensors[name].shape == x.shape
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _convert(source, out, scheme, **options):
    plan = run_convert(source, out, scheme, **options)
    with open_checkpoint(source) as c:
        assert verify(out, c).failures == []
    return plan


@pytest.mark.parametrize("name", LOADED)
def test_transformers_computes_with_our_values(name, models, tmp_path):
    """W4A16, of experts too: the logits of the source with our values."""
    source, out = models / name, tmp_path / "out"
    _convert(source, out, "W4A16", group_size=32)
    wanted = _logits(_load(_ours(source, out, tmp_path / "ours")))
    assert _distance(_logits(_load(out)), wanted) < 0.005
    assert 0.01 < _distance(wanted, _logits(_load(source))) < 0.6


@pytest.mark.parametrize("name", LOADED)
def test_fp8_is_near_its_weights(name, models, tmp_path):
    """FP8_DYNAMIC: what it loads differs by the activations it rounds and by no weight."""
    source, out = models / name, tmp_path / "out"
    _convert(source, out, "FP8_DYNAMIC")
    wanted = _logits(_load(_ours(source, out, tmp_path / "ours")))
    assert _distance(_logits(_load(out)), wanted) < 0.25


@pytest.mark.parametrize(
    ("scheme", "bound"), [("NVFP4A16", 0.75), ("W4A16", 0.75), ("W8A16", 0.12)]
)
@pytest.mark.parametrize("name", [*STACKED, *LOADED])
def test_our_values_compute_nearly_what_the_source_does(name, scheme, bound, models, tmp_path):
    """The logits of the source, as near as so many bits allow."""
    source, out = models / name, tmp_path / "out"
    _convert(source, out, scheme, group_size=None if scheme == "NVFP4A16" else 32)
    ours = _ours(source, out, tmp_path / "ours", STACKED.get(name, False))
    lost = _distance(_logits(_load(ours)), _logits(_load(source)))
    assert 0.001 < lost < bound


@pytest.mark.parametrize("name", STACKED)
def test_experts_that_are_cut_otherwise_show(name, models, tmp_path):
    """That the bound above tells: gate and up exchanged compute something else."""
    source, out = models / name, tmp_path / "out"
    _convert(source, out, "W8A16", group_size=32)
    ours = _ours(source, out, tmp_path / "ours", STACKED[name])
    tensors = load_file(ours / "model.safetensors")
    for key, x in tensors.items():
        if key.endswith(("gate_up_proj", "input_linear.weight")):
            tensors[key] = x.roll(x.shape[2 if STACKED[name] else 1] // 2,
                                  2 if STACKED[name] else 1).contiguous()  # fmt: skip
    save_file(tensors, ours / "model.safetensors", metadata={"format": "pt"})
    assert _distance(_logits(_load(ours)), _logits(_load(source))) > 0.2


def test_gpt_oss_computes_with_our_values(models, tmp_path):
    """Its own MXFP4, to the bit."""
    source, out = models / "gpt_oss", tmp_path / "out"
    _convert(source, out, "MXFP4A16", format=FORMATS["gpt-oss"])
    run_convert(out, tmp_path / "plain", "BF16")
    found = _logits(_load(out, quantization_config=Mxfp4Config(dequantize=True)))
    assert torch.equal(found, _logits(_load(tmp_path / "plain")))
    assert 0.01 < _distance(found, _logits(_load(source))) < 0.6
