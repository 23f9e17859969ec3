"""transformers loads our gpt-oss checkpoints and computes with the values that we mean.

On a CPU it dequantizes to bf16 while it loads, so logits are compared to the bit.
"""

import json
import re
import shutil
from itertools import product

import ml_dtypes
import numpy as np
import pytest
import torch
from helpers import run_convert, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.quantizers.quantizers_utils import should_convert_module

from streamq.formats import FORMATS
from streamq.stored import open_tensors
from streamq.verifying import verify

HIDDEN, INTER, EXPERTS, LAYERS = 64, 96, 4, 2
TOKENS = torch.arange(96).reshape(2, 48) * 7 % 64
PROJECTIONS = {"gate_up_proj": (2 * INTER, HIDDEN), "down_proj": (HIDDEN, INTER)}
STACKS = [f"model.layers.{i}.mlp.experts.{p}" for i, p in product(range(LAYERS), PROJECTIONS)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model whose experts, rows and blocks differ in size, as transformers saves it."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    made = GptOssForCausalLM(
        GptOssConfig(
            vocab_size=64, hidden_size=HIDDEN, intermediate_size=INTER, num_hidden_layers=LAYERS,
            num_local_experts=EXPERTS, num_experts_per_tok=2, head_dim=16, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=16, max_position_embeddings=64,
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name in STACKS:
                count, cols, rows = p.shape
                blocks = torch.randn(count, cols // 32, rows).exp().repeat_interleave(32, 1)
                p.copy_(torch.randn(p.shape) * 0.05 * blocks)
            elif name.endswith(("bias", "sinks")):
                p.normal_(0, 0.02)
    made.to(torch.bfloat16).save_pretrained(folder / "in")
    run_convert(folder / "in", folder / "out", "MXFP4A16", format=FORMATS["gpt-oss"])
    run_convert(folder / "out", folder / "bf16", "BF16")
    return folder


def _load(folder, **how):
    made, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True, **how
    )
    assert {k: v for k, v in info.items() if v} == {}
    return made


def _load_packed(folder):
    return _load(folder, quantization_config=Mxfp4Config(dequantize=True))


@torch.no_grad()
def _logits(made):
    return made.eval()(TOKENS).logits.float()


def test_names_and_shapes_are_those_of_the_released_checkpoints(model):
    """openai/gpt-oss-20b: blocks ``[experts, out, in / 32, 16]``, scales without the 16.

    Biases and all that is no expert lie as they did.
    """
    before, after = (load_file(model / f / "model.safetensors") for f in ("in", "out"))
    for layer, (projection, (rows, cols)) in product(range(LAYERS), PROJECTIONS.items()):
        name = f"model.layers.{layer}.mlp.experts.{projection}"
        del before[name]
        for suffix, more in (("_blocks", (16,)), ("_scales", ())):
            t = after.pop(name + suffix)
            assert (t.dtype, t.shape) == (torch.uint8, (EXPERTS, rows, cols // 32, *more))
        bias = after[name + "_bias"]
        assert (bias.dtype, bias.shape) == (torch.bfloat16, (EXPERTS, rows))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in after)
    config = json.loads((model / "out" / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
            "lm_head",
        ],
    }  # fmt: skip
    assert verify(model / "out").failures == []


def test_their_names_to_leave_out_take_experts_alone(model):
    """By their own matching, on every module of the model that has a weight."""
    config = json.loads((model / "out" / "config.json").read_text())["quantization_config"]
    left = config["modules_to_not_convert"]
    made = _load(model / "in")
    wanted = {name.rpartition(".")[0] for name in STACKS}
    found = {n for n, m in made.named_modules() if type(m).__name__ == "GptOssExperts"}
    assert found == wanted
    assert all(should_convert_module(name, left) for name in found)


@pytest.mark.parametrize("load", [_load_packed, _load], ids=["dequantize", "as it is"])
def test_transformers_computes_with_our_values(load, model):
    """The same logits, to the bit, as from the plain model that we make of the checkpoint."""
    found = _logits(load(model / "out"))
    assert torch.equal(found, _logits(_load(model / "bf16")))
    lost = (found - _logits(_load(model / "in"))).abs().mean()
    assert 0.01 < lost / found.std() < 0.5


@pytest.mark.parametrize(
    ("suffix", "spoil"),
    [
        ("_scales", lambda t: t.roll(1, 1)),  # the scales of the row before
        ("_scales", lambda t: t.roll(1, 0)),  # of the expert before
        ("_blocks", lambda t: t >> 4 | t << 4),  # the odd column in the low nibble
        ("_blocks", lambda t: t.reshape(EXPERTS, 2, -1, *t.shape[2:]).transpose(1, 2)
                                .reshape(t.shape)),  # gate before up, not between
    ],
    ids=["rows", "experts", "nibbles", "gate and up"],
)  # fmt: skip
def test_what_is_spoilt_shows_in_the_logits(suffix, spoil, model, tmp_path):
    """In one projection of one layer, so that the test above would see it."""
    shutil.copytree(model / "out", tmp_path / "spoilt")
    tensors = load_file(model / "out" / "model.safetensors")
    name = "model.layers.1.mlp.experts.gate_up_proj" + suffix
    tensors[name] = spoil(tensors[name]).contiguous()
    save_file(tensors, tmp_path / "spoilt" / "model.safetensors", metadata={"format": "pt"})
    found, other = _logits(_load_packed(model / "out")), _logits(_load_packed(tmp_path / "spoilt"))
    assert (found - other).abs().mean() > 0.01 * found.std()


def _bits(t):
    return t.contiguous().view(torch.int16)


def _compare(out, bf16, stacks):
    packed, plain = (load_file(f / "model.safetensors") for f in (out, bf16))
    with open_tensors(out) as ours:
        for name in stacks:
            theirs = convert_moe_packed_tensors(packed[name + "_blocks"], packed[name + "_scales"])
            assert torch.equal(_bits(theirs), _bits(plain[name])), name
            values = torch.from_numpy(ours[name]).transpose(1, 2)
            assert torch.equal(_bits(theirs), _bits(values.to(torch.bfloat16))), name


def test_their_dequantizer_gives_our_values(model):
    """Every bit of every element, also as the plain checkpoint has them, ``[experts, in, out]``."""
    _compare(model / "out", model / "bf16", STACKS)


def test_their_dequantizer_gives_our_values_at_the_edges(tmp_path):
    """Blocks of zeros, of signed zeros, ties, tiny and huge ones."""
    rng = np.random.default_rng(1)
    name = "model.layers.0.mlp.experts.down_proj"
    x = rng.standard_normal((EXPERTS, 256, 64)).astype("f4")
    x *= np.exp2(rng.integers(-110, 120, (EXPERTS, 8, 1, 64)).repeat(32, 2).reshape(x.shape))
    x[0, :32], x[0, 32:64, ::2] = 0, -0.0
    x[1, :32] = rng.choice([-6, -3.5, -1.25, -0.25, 0.25, 0.75, 1.75, 2.5, 5, 6], (32, 64))
    x[2, :32] *= 2.0**-126 / np.abs(x[2, :32]).max()
    x[3, :32] *= 2.5e38 / np.abs(x[3, :32]).max()
    config = {"model_type": "gpt_oss", "dtype": "bfloat16", "num_hidden_layers": 1}
    source = write_checkpoint(tmp_path / "in", {name: x.astype(ml_dtypes.bfloat16)}, config)
    run_convert(source, tmp_path / "out", "MXFP4A16", format=FORMATS["gpt-oss"])
    run_convert(tmp_path / "out", tmp_path / "bf16", "BF16")
    scales = load_file(tmp_path / "out" / "model.safetensors")[name + "_scales"]
    assert scales.min() == 0
    assert scales.max() > 250
    _compare(tmp_path / "out", tmp_path / "bf16", [name])


def test_the_way_back_is_a_plain_model(model):
    """Under the names and shapes of the source, which transformers loads as any other."""
    config = json.loads((model / "bf16" / "config.json").read_text())
    assert not [key for key in config if re.search("quanti|compress", key)]
    before, after = (load_file(model / f / "model.safetensors") for f in ("in", "bf16"))
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {
        n: (t.dtype, t.shape) for n, t in after.items()
    }
    made = _load(model / "bf16")
    for name in STACKS:
        assert torch.equal(made.get_parameter(name), after[name])
        assert not torch.equal(before[name], after[name])
