"""compressed-tensors resolves our mixed configs as planned, and our rules are its rules."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.lifecycle.apply import apply_quantization_config
from compressed_tensors.utils.match import is_match, match_targets
from mixed import configs
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.compressed_tensors import get_experts_scheme

from streamq import api
from streamq.verifying.readers import Readers

CASES = {name: (config, modules) for name, config, modules in configs()}


def _model(modules):
    """A model of small Linears under these names, that does not compute anything."""
    root = torch.nn.Module()
    for name in modules:
        *parents, leaf = name.split(".")
        at = root
        for part in parents:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = getattr(at, part)
        at.add_module(leaf, torch.nn.Linear(128, 128, bias=False, device="meta"))
    return root


@pytest.mark.parametrize("name", CASES)
def test_every_module_gets_the_scheme_of_the_plan(name):
    """By their own function, that transformers calls on a model before it loads weights."""
    config, modules = CASES[name]
    theirs = QuantizationConfig.model_validate(config["quantization_config"])
    model = _model(modules)
    apply_quantization_config(model, theirs, show_progress=False)
    readers = Readers(config["quantization_config"])
    for module, scheme in modules.items():
        found = getattr(model.get_submodule(module), "quantization_scheme", None)
        group = readers.transformers(module)
        assert (found is None) == (scheme is None) == (group is None), module
        if found is not None:
            assert found.weights.num_bits == scheme.bits, module
            assert found.weights == theirs.config_groups[group].weights, module


@pytest.mark.parametrize(
    "targets",
    [
        ["Linear"],
        ["re:.*q_proj$", "a.0.q_proj", "Linear"],
        ["re:a.*", "re:.*o_proj"],
        ["Module", "re:.*o_proj"],
        ["re:.*[qk]_proj", "re:.*q_proj", "Linear"],
    ],
)
@pytest.mark.parametrize("ignore", [[], ["a.0.o_proj"], ["re:.*v"], ["Linear"], ["re:a\\.1"]])
def test_our_rules_are_theirs_where_targets_overlap(targets, ignore):
    """Each target in a group of its own, in the order of the file."""
    group = {"weights": None, "input_activations": None}
    groups = {t: {**group, "targets": [t]} for t in targets}
    readers = Readers({"config_groups": groups, "ignore": ignore})
    linear = torch.nn.Linear(1, 1)
    for module in (f"{a}.{i}.{p}_proj" for a in "ab" for i in range(2) for p in "qkvo"):
        theirs = None
        if is_match(module, linear, targets, ignore):
            theirs = match_targets(module, linear, targets)[0]
        assert readers.transformers(module) == theirs, module


@pytest.mark.parametrize("name", [n for n in CASES if "moe-kind" in n or "mla-kind" in n])
def test_the_group_that_transformers_takes_for_fused_experts(name):
    """The one that has them on disk, where all have one scheme."""
    config, modules = CASES[name]
    theirs = QuantizationConfig.model_validate(config["quantization_config"])
    found = get_experts_scheme(theirs)
    ours = Readers(config["quantization_config"]).transformers_experts
    assert found is theirs.config_groups[ours]
    schemes = {scheme for module, scheme in modules.items() if ".experts." in module}
    if None not in schemes:
        assert {found.weights.num_bits} == {scheme.bits for scheme in schemes}


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """A random model with experts, as transformers saves it."""
    torch.manual_seed(0)
    made = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=64, hidden_size=128, moe_intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=4,
            num_experts_per_tok=2, tie_word_embeddings=False, mlp_only_layers=[],
        )
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("moe") / "in"
    made.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("experts", "attention"),
    [("w4a16", "w8a16"), ("w8a16", "w4a16"), ("fp8_dynamic", "w4a16"), ("w4a16", "keep")],
)
def test_transformers_computes_with_the_values_of_mixed_experts(experts, attention, moe, tmp_path):
    """To the bit what it makes of the same values in bf16; it fuses the experts as it loads."""
    recipe = {
        "rule": [{"pattern": "*.mlp.experts.*", "scheme": experts},
                 {"pattern": "*.self_attn.*", "scheme": attention}],
    }  # fmt: skip
    api.convert(moe, tmp_path / "out", recipe=recipe)
    api.convert(tmp_path / "out", tmp_path / "bf16", "bf16")
    logits = []
    for folder in (tmp_path / "out", tmp_path / "bf16"):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, output_loading_info=True
        )
        assert {k: v for k, v in info.items() if v} == {}
        with torch.no_grad():
            logits.append(model.eval()(torch.arange(32).reshape(2, 16)).logits)
    assert torch.equal(*logits)
