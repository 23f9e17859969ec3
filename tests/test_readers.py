"""Targets of mixed configs, and what each reader makes of them; oracle/ runs the readers' code."""

import json

import pytest
from mixed import FUSED, configs, layers_of
from test_recipe import dense, mla, moe, rules

from streamq import api
from streamq.formats import FORMATS
from streamq.schemes import SCHEMES
from streamq.verifying import verify
from streamq.verifying.readers import Readers, Split

CASES = {name: (config, modules) for name, config, modules in configs()}
W4, W8, FP8 = (SCHEMES[n] for n in ("W4A16", "W8A16", "FP8_DYNAMIC"))


def quantization(schemes, ignore=()):
    config = FORMATS["compressed-tensors"].config(schemes, list(ignore), {})
    return config["quantization_config"]


@pytest.mark.parametrize("name", CASES)
def test_every_reader_resolves_as_planned(name):
    config, modules = CASES[name]
    readers = Readers(config["quantization_config"])
    groups = config["quantization_config"]["config_groups"]
    for module, scheme in modules.items():
        group = readers.transformers(module)
        found = groups[group]["weights"]["num_bits"] if group else None
        assert found == (scheme.bits if scheme else None), module
    for layer, members in layers_of(modules).items():
        if layer.endswith(".experts"):
            group = readers.vllm_experts(layer, ["gate_proj", "up_proj", "down_proj"])
        else:
            group = readers.vllm(layer, "ParallelLMHead" if "lm_head" in layer else "Linear", FUSED)
        found = groups[group]["weights"]["num_bits"] if group else None
        scheme = modules[members[0]]
        assert found == (scheme.bits if scheme else None), layer


@pytest.mark.parametrize("name", [n for n in CASES if "-one" not in n])
def test_targets_are_disjoint(name):
    """No module is named by two groups, and none that is ignored by any."""
    config, modules = CASES[name]
    groups = config["quantization_config"]["config_groups"]
    if len(groups) == 1:
        pytest.skip("Linear, but what is ignored")
    apart = [Readers({"config_groups": {g: groups[g]}, "ignore": []}) for g in groups]
    for module, scheme in modules.items():
        named = [r for r in apart if r.transformers(module)]
        assert len(named) == (scheme is not None), module


def test_a_hundred_thousand_experts_are_a_few_patterns():
    layers, parts = range(60), ("gate_proj", "up_proj", "down_proj")
    experts = [f"model.layers.{i}.mlp.experts.{e}.{p}" for i in layers for e in range(256)
               for p in parts]  # fmt: skip
    attention = [f"model.layers.{i}.self_attn.{p}_proj" for i in layers for p in "qkvo"]
    q = quantization({W4: experts, FP8: attention}, ["lm_head"])
    assert q["config_groups"]["group_0"]["targets"] == [
        r"re:.*\.down_proj$", r"re:.*\.experts$", r"re:.*\.gate_proj$", r"re:.*\.up_proj$",
    ]  # fmt: skip
    assert len(q["config_groups"]["group_1"]["targets"]) == 4
    q = quantization({FP8: attention}, [*experts, "lm_head"])
    assert q["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert q["ignore"] == [
        "lm_head", r"re:.*\.down_proj$", r"re:.*\.experts$", r"re:.*\.gate_proj$",
        r"re:.*\.up_proj$",
    ]  # fmt: skip


def test_layers_that_differ_are_numbered():
    down = [f"model.layers.{i}.mlp.down_proj" for i in range(12)]
    q = quantization({W4: down[2:11], W8: down[:2] + down[11:]})
    assert [g["targets"] for g in q["config_groups"].values()] == [
        [r"re:.*\.layers\.(?:2|3|4|5|6|7|8|9|10)\.mlp\.down_proj$"],
        [r"re:.*\.layers\.(?:0|1|11)\.mlp\.down_proj$"],
    ]  # fmt: skip


def test_experts_that_stay_in_one_tensor_are_ignored_by_the_names_that_vllm_asks_for():
    q = quantization({W4: ["m.layers.0.self_attn.o_proj"]}, ["m.layers.0.mlp.experts.gate_up_proj"])
    assert q["ignore"] == ["lm_head", r"re:.*\.mlp\.experts\..*"]
    assert Readers(q).vllm_experts("m.layers.0.mlp.experts", ["gate_proj", "down_proj"]) is None


def test_searched_and_plain_scales_are_one_group_and_the_head_is_named():
    from dataclasses import replace

    q = quantization({W4: ["a.0.x"], replace(W4, scales="search"): ["lm_head", "a.1.x"]})
    assert [g["targets"] for g in q["config_groups"].values()] == [["Linear", "lm_head"]]
    assert Readers(q).vllm("lm_head", "ParallelLMHead", {}) == "group_0"


def test_the_group_of_routed_experts_comes_first():
    """transformers takes the first whose regexes say experts, shared ones or not."""
    shared = [f"m.layers.{i}.mlp.shared_experts.down_proj" for i in range(2)]
    routed = [f"m.layers.{i}.mlp.experts.{e}.down_proj" for i in range(2) for e in range(2)]
    q = quantization({FP8: shared, W4: routed})
    assert q["config_groups"][Readers(q).transformers_experts]["weights"]["num_bits"] == 4


# --- what verify finds ------------------------------------------------------------------


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    recipe = rules(("*.experts.*", "w4a16"), ("*.self_attn.*", "fp8_dynamic"), ("*", "w8a16"))
    for name, make in (("dense", dense), ("moe", moe), ("mla", mla)):
        api.convert(make(folder / name), folder / f"{name}-out", recipe=recipe)
        assert verify(folder / f"{name}-out").failures == []
    return folder


def failures(outputs, name, change, tmp_path):
    """Of an output with another quantization_config; tensors are not touched."""
    out = tmp_path / "out"
    out.mkdir()
    for path in (outputs / f"{name}-out").iterdir():
        if path.name == "streamq.json":  # would tell that config.json is another
            continue
        (out / path.name).write_bytes(path.read_bytes())
    config = json.loads((out / "config.json").read_text())
    change(config["quantization_config"])
    (out / "config.json").write_text(json.dumps(config))
    return verify(out).failures


def test_a_regex_that_takes_a_fused_name_is_found(outputs, tmp_path):
    """vLLM tries regexes on the name of the fused layer before those of its parts."""

    def change(q):
        groups = q["config_groups"]
        wide = next(g for g in groups.values() if g["weights"]["num_bits"] == 8
                    and g["weights"]["type"] == "int")  # fmt: skip
        first = {**wide, "targets": ["re:.*self_attn.qkv_proj$"]}
        q["config_groups"] = {"odd": first, **groups}

    found = failures(outputs, "dense", change, tmp_path)
    assert sorted(found) == [
        f"vLLM takes 'model.layers.{i}.self_attn.{p}_proj' for W8A16, it is FP8_DYNAMIC"
        for i in range(2) for p in "kqv"
    ]  # fmt: skip


def test_targets_that_overlap_are_found(outputs, tmp_path):
    """The order of the file gives one scheme, exact names first another."""

    def change(q):
        groups = sorted(q["config_groups"].items(), key=lambda g: g[1]["weights"]["type"])
        groups[-1][1]["targets"].append("model.layers.0.self_attn.o_proj")
        q["config_groups"] = dict(groups)

    assert failures(outputs, "dense", change, tmp_path) == [
        "transformers takes 'model.layers.0.self_attn.o_proj' for W8A16, it is FP8_DYNAMIC"
    ]


def test_a_group_ignored_in_part_is_refused_by_vllm():
    q = quantization({W4: [f"a.0.{p}_proj" for p in "qkv"], W8: ["a.0.o_proj"]}, ["a.0.k_proj"])
    with pytest.raises(Split, match="ignored in part"):
        Readers(q).vllm("a.0.qkv_proj", "Linear", FUSED)


def test_experts_in_two_schemes_are_found(tmp_path):
    recipe = rules(("*.down_proj", "w8a16"), scheme="w4a16")
    api.convert(moe(tmp_path / "in"), tmp_path / "out", recipe=recipe)
    found = verify(tmp_path / "out").failures
    assert len(found) == 2
    assert found[0].startswith(
        "vLLM refuses 'model.layers.0.mlp.experts', which has projections in"
    )
    assert "gate_proj' is W4A16" in found[0]
    assert "down_proj' is W8A16" in found[0]
