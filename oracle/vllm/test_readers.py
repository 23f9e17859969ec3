"""vLLM resolves our mixed configs as planned, fused layers and experts too; our rules are its."""

import copy
import sys

import pytest
import torch

sys.modules |= dict.fromkeys(("torchaudio", "torchcodec", "torchvision"))  # as in test_vllm.py

from mixed import FUSED, configs, layers_of  # noqa: E402
from test_vllm import _transformers, _vllm, source  # noqa: E402, F401
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (  # noqa: E402
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.compressed_tensors.utils import (  # noqa: E402
    find_matched_target,
    should_ignore_layer,
)

from streamq import api  # noqa: E402
from streamq.verifying.readers import Readers, Split  # noqa: E402

CASES = {name: (config, modules) for name, config, modules in configs()}


def _layer(cls):
    """An object of a class of this name, which is all that is looked at."""
    return type(cls, (torch.nn.Module,), {})()


LAYERS = {"Linear": "ColumnParallelLinear", "RoutedExperts": "RoutedExperts"}


def _theirs(config):
    made = CompressedTensorsConfig.from_config(copy.deepcopy(config["quantization_config"]))
    made.packed_modules_mapping = FUSED
    return made


@pytest.mark.parametrize("name", CASES)
def test_every_layer_gets_the_scheme_of_the_plan(name):
    """Also the layers that it makes of several modules."""
    config, modules = CASES[name]
    theirs, readers = _theirs(config), Readers(config["quantization_config"])
    experts = _layer("RoutedExperts")
    for layer, members in layers_of(modules).items():
        wanted = {modules[m] for m in members}
        assert len(wanted) == 1
        scheme = wanted.pop()
        if layer.endswith(".experts"):
            theirs._add_fused_moe_to_target_scheme_map()
            leaves = [f"{p}_proj" for p in ("gate", "up", "down")]
            found = [theirs.get_scheme_dict(experts, f"{layer}.0.{leaf}") for leaf in leaves]
            assert found[0] == found[1] == found[2]
            found, ours = found[0], readers.vllm_experts(layer, leaves)
        else:
            cls = "ParallelLMHead" if layer == "lm_head" else "QKVParallelLinear"
            found = theirs.get_scheme_dict(_layer(cls), layer)
            ours = readers.vllm(layer, cls, FUSED)
        if layer == "lm_head" and scheme is not None and found is None:
            pytest.fail("a head that is quantized is not named")
        assert (found is None) == (scheme is None) == (ours is None), layer
        if found is not None:
            assert found["weights"].num_bits == scheme.bits, layer
            group = config["quantization_config"]["config_groups"][ours]
            assert found["weights"].num_bits == group["weights"]["num_bits"]
            assert found["format"] == group["format"]


TARGETS = [
    ["Linear"],
    ["re:.*q_proj$", "a.0.q_proj", "Linear"],
    ["re:.*v_proj$"],
    ["a.0.q_proj", "a.0.k_proj", "a.0.v_proj", "re:a.*gate_proj"],
    ["re:.*\\.q_proj$", "re:.*\\.[kv]_proj$", "re:.*up_proj"],
    ["re:.*Linear", "RoutedExperts"],
]
IGNORE = [[], ["a.0.o_proj"], ["a.0.q_proj"], ["re:.*\\.[qkv]_proj"], ["re:.*up_proj$"],
          ["a.0.qkv_proj"]]  # fmt: skip


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("ignore", IGNORE)
def test_our_rules_are_theirs_where_targets_overlap(targets, ignore):
    """Each target in a group of its own; layers that are refused are refused by both."""
    group = {"weights": None, "input_activations": None}
    groups = {t: {**group, "targets": [t]} for t in targets}
    readers = Readers({"config_groups": groups, "ignore": ignore})
    for layer in ("a.0.qkv_proj", "a.1.qkv_proj", "a.0.o_proj", "b.0.gate_up_proj", "lm_head"):
        for cls in ("QKVParallelLinear", "ParallelLMHead", "VocabParallelEmbedding"):
            try:
                found = None
                if not should_ignore_layer(layer, ignore, FUSED):
                    found = find_matched_target(layer, _layer(cls), targets, FUSED)
            except ValueError:
                with pytest.raises(Split):
                    readers.vllm(layer, cls, FUSED)
                continue
            assert readers.vllm(layer, cls, FUSED) == found, (layer, cls)


def test_vllm_runs_a_mixed_model_as_transformers_does(source, tmp_path):  # noqa: F811
    """Three schemes, one of them in one layer only; the bound is that of FP8_DYNAMIC alone."""
    recipe = {
        "scheme": "w4a16",
        "rule": [{"pattern": "*.self_attn.*", "scheme": "fp8_dynamic"},
                 {"pattern": "model.layers.1.mlp.down_proj", "scheme": "w8a8"}],
    }  # fmt: skip
    api.convert(source, tmp_path / "out", recipe=recipe)
    tokens, found = _vllm(tmp_path / "out")
    assert abs(found - _transformers(tmp_path / "out", tokens)).mean() < 0.02
    apart = abs(found - _transformers(source, tokens)).mean()
    assert apart > 0.02  # it is not the model as it was
