"""gptqmodel and transformers make of our AWQ and GPTQ what we say it is, and we of theirs.

gptqmodel's dequantized weights against ours to the bit, and the logits of models that it
and transformers load against those of the source model with our values in it.
"""

import json
import os
import shutil

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # nothing is run often enough to pay for a compiler

import pytest
import torch
from gptqmodel import BACKEND, GPTQModel
from helpers import run_convert
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from streamq.formats import FORMATS
from streamq.stored import open_tensors

VOCAB = 512
TOKENS = torch.arange(96).reshape(2, 48) * 7 % VOCAB

# Bound of the mean |difference| of log-probabilities, which spread by 0.32: 0.0001, as the
# products are summed in another order in f16. One projection of fourteen makes 0.018 with the
# scales of the rows before, and 0.009 with zero points that are off by one.
BOUND = 0.0003

CASES = [
    ("awq", "W4A16_ASYM", 32),
    ("awq", "W4A16_ASYM", 128),
    ("gptq", "W4A16", 128),
    ("gptq", "W4A16", -1),
    ("gptq", "W8A16", 32),
    ("gptq_v2", "W4A16", 64),
    ("gptq_v2", "W8A16", -1),
    ("gptq_v2", "W4A16_ASYM", 128),
    ("gptq_v2", "W4A16_ASYM", -1),
    ("gptq_v2", "W8A16_ASYM", 128),
]


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A random model whose rows differ in size, with the tokenizer that gptqmodel wants."""
    folder = tmp_path_factory.mktemp("llama") / "f16"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight *= torch.randn(module.out_features, 1).mul(0.5).exp()
    model.to(torch.float16).save_pretrained(folder)
    words = {f"t{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="t1", pad_token="t2"
    ).save_pretrained(folder)
    return folder


def _gptqmodel(folder):
    awq = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    backend = BACKEND.AWQ_TORCH if awq == "awq" else BACKEND.GPTQ_TORCH
    return GPTQModel.load(str(folder), backend=backend, device="cpu", dtype=torch.float16).model


def _transformers(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)


@torch.no_grad()
def _logits(model):
    return model.eval()(TOKENS).logits.float()


def _ours(folder):
    """The weights of a checkpoint by their modules, as we read them."""
    with open_tensors(folder) as tensors:
        return {
            name.removesuffix(".weight"): torch.from_numpy(tensors[name]).half()
            for name in tensors.stored
        }


def _theirs(model, module):
    linear = model.get_submodule(module)
    if hasattr(linear, "dequantize_weight"):
        return linear.dequantize_weight().T
    x = torch.zeros(1, linear.in_features)
    return linear._dequantize_weight_for_inference(x, dtype=torch.float16).T


def _wanted(source, folder):
    """Logits of the source model with our values."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
    for module, weight in _ours(folder).items():
        model.get_submodule(module).weight.data = weight
    return _logits(model)


def _drift(source, folder, model):
    a, b = (x.log_softmax(-1) for x in (_wanted(source, folder), _logits(model)))
    return (a - b).abs().mean()


@pytest.mark.parametrize(("fmt", "name", "group_size"), CASES)
def test_gptqmodel_has_our_weights_and_logits(fmt, name, group_size, source, tmp_path):
    """Every bit of every weight, and the model as a whole."""
    out = tmp_path / "out"
    run_convert(source, out, name, format=FORMATS[fmt], group_size=group_size)
    model, weights = _gptqmodel(out), _ours(out)
    assert len(weights) == 14
    for module, weight in weights.items():
        assert torch.equal(_theirs(model, module), weight), module
    assert _drift(source, out, model) < BOUND


def _spoiled(folder, to, suffix, change):
    """A copy in which one tensor of one projection is another."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    name = f"model.layers.0.self_attn.q_proj.{suffix}"
    tensors[name] = change(tensors[name])
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("fmt", ["awq", "gptq_v2"])
@pytest.mark.parametrize(
    ("suffix", "change"),
    [("scales", lambda t: t.roll(1, 1)), ("qzeros", lambda t: t ^ 0x11111111)],
    ids=["scales of the row before", "zero points off by one"],
)
def test_the_bound_sees_what_is_wrong(fmt, suffix, change, source, tmp_path):
    """One projection of fourteen with the wrong scales or zero points."""
    out = tmp_path / "out"
    run_convert(source, out, "W4A16_ASYM", format=FORMATS[fmt])
    model = _gptqmodel(_spoiled(out, tmp_path / "spoiled", suffix, change))
    assert _drift(source, out, model) > BOUND


@pytest.mark.parametrize("ignore", [(), ("model.layers.1.mlp.*",)], ids=["all", "some left out"])
@pytest.mark.parametrize("load", [_gptqmodel, _transformers])
@pytest.mark.parametrize(
    ("fmt", "name"), [("awq", "W4A16_ASYM"), ("gptq", "W4A16"), ("gptq_v2", "W8A16_ASYM")]
)
def test_what_is_left_out_is_left_out_there_too(fmt, name, load, ignore, source, tmp_path):
    """A reader that takes such a module for quantized has random weights there."""
    out = tmp_path / "out"
    run_convert(source, out, name, format=FORMATS[fmt], ignore=ignore)
    assert _drift(source, out, load(out)) < BOUND


def _changed(folder, quantization, change):
    """The checkpoint with other tensors, by suffix, and another config."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= quantization
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    tensors = {n: change(n.rpartition(".")[2], t).contiguous() for n, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM", "W8A16_ASYM"])
def test_we_read_act_order_as_gptqmodel_does(name, source, tmp_path):
    """Columns whose groups lie anywhere, which we never write."""
    run_convert(source, tmp_path, name, format=FORMATS["gptq_v2"], group_size=32, overwrite=True)

    def permuted(suffix, t):
        return t[torch.randperm(len(t))] if suffix == "g_idx" else t

    _changed(tmp_path, {"desc_act": True}, permuted)
    model, weights = _gptqmodel(tmp_path), _ours(tmp_path)
    assert len(weights) == 14
    for module, weight in weights.items():
        assert torch.equal(_theirs(model, module), weight), module


@pytest.mark.parametrize(("name", "ones"), [("W4A16_ASYM", 0x11111111), ("W8A16_ASYM", 0x01010101)])
def test_we_read_asymmetric_version_1_as_gptqmodel_does(name, ones, source, tmp_path):
    """Words of zero points less one of each, with borrows, which we never write."""
    run_convert(source, tmp_path, name, format=FORMATS["gptq_v2"], overwrite=True)
    weights = _ours(tmp_path)

    def less(suffix, t):
        if suffix != "qzeros":
            return t
        t[0] = 0  # borrows all along
        return t - ones

    quantizer = {"meta": {"quantizer": ["gptqmodel:7.7.0"]}, "checkpoint_format": "gptq"}
    _changed(tmp_path, quantizer, less)
    model, read = _gptqmodel(tmp_path), _ours(tmp_path)
    assert any(not torch.equal(read[m], weights[m]) for m in weights)
    for module, weight in read.items():
        assert torch.equal(_theirs(model, module), weight), module
