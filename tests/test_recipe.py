"""Recipes: what rules name, what they may not do, and the ones that are shipped."""

import json
import sys
import tomllib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers import tensors_of, write_checkpoint

from streamq import api
from streamq.checkpoint import open_checkpoint
from streamq.cli import cli
from streamq.errors import PlanError
from streamq.recipe import KEEP, Rule, load, text_of
from streamq.schemes import SCHEMES
from streamq.verifying import verify

RECIPES = Path(__file__).parent.parent / "recipes"
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip


def checkpoint(folder, modules, model_type="llama", layers=2):
    rng = np.random.default_rng(0)
    tensors = {f"{m}.weight": (rng.standard_normal((128, 256)) * 0.02).astype(ml_dtypes.bfloat16)
               for m in modules}  # fmt: skip
    return write_checkpoint(
        folder, tensors, {"model_type": model_type, "num_hidden_layers": layers}
    )


def dense(folder, model_type="llama"):
    names = ["model.embed_tokens", "lm_head"]
    names += [f"model.layers.{i}.{m}" for i in range(2) for m in LINEARS]
    return checkpoint(folder, names, model_type)


def moe(folder, model_type="qwen3_moe", attention=LINEARS[:4], dense_layers=0, extra=0):
    names = ["model.embed_tokens", "lm_head"]
    for i in range(2 + extra):
        layer = f"model.layers.{i}."
        names += [layer + m for m in attention]
        if i < dense_layers:
            names += [f"{layer}mlp.{p}_proj" for p in ("gate", "up", "down")]
            continue
        names += [f"{layer}mlp.gate"]
        names += [f"{layer}mlp.experts.{e}.{p}_proj" for e in range(2)
                  for p in ("gate", "up", "down")]  # fmt: skip
        if dense_layers:
            names += [f"{layer}mlp.shared_experts.{p}_proj" for p in ("gate", "up", "down")]
    return checkpoint(folder, names, model_type)


def mla(folder):
    attention = [f"self_attn.{p}" for p in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa",
                                            "kv_b_proj", "o_proj")]  # fmt: skip
    return moe(folder, "deepseek_v3", attention, dense_layers=1, extra=1)


def schemes_of(plan):
    return {t.name.removesuffix(".weight"): w.scheme for s in plan.shards for w in s.weights
            for t in w.sources}  # fmt: skip


def rules(*pairs, **more):
    return {"rule": [{"pattern": p, "scheme": s} for p, s in pairs], **more}


def test_the_first_rule_that_names_a_module_counts(tmp_path):
    src = dense(tmp_path / "in")
    recipe = rules(
        ("model.layers.0.mlp.down_proj", "keep"), ("*.down_proj", "w8a16"),
        ("re:.*self_attn", "fp8_dynamic"), ("*.o_proj", "w4a16"), scheme="w4a16",
    )  # fmt: skip
    plan = api.plan(src, recipe=recipe)
    found = {name: s.name for name, s in schemes_of(plan).items()}
    assert "model.layers.0.mlp.down_proj" not in found
    assert found.pop("model.layers.1.mlp.down_proj") == "W8A16"
    assert {n.split(".")[3]: s for n, s in found.items()} == {
        "self_attn": "FP8_DYNAMIC", "mlp": "W4A16",
    }  # fmt: skip
    kept = {t.name: why for t, why in plan.unquantized}
    assert kept["model.layers.0.mlp.down_proj.weight"] == "rule 1 of the recipe"
    assert len(plan.warnings) == 1
    assert "rule 4 ('*.o_proj') is shadowed" in plan.warnings[0]
    assert "rule 3 ('re:.*self_attn')" in plan.warnings[0]
    assert plan.scheme_names == "W4A16, W8A16, FP8_DYNAMIC"


def test_what_no_rule_names_stays_without_a_scheme_for_the_rest(tmp_path):
    src = dense(tmp_path / "in")
    plan = api.plan(src, recipe=rules(("*.mlp.*", "w8a16")))
    assert set(schemes_of(plan).values()) == {SCHEMES["W8A16"]}
    assert "not in the recipe" in {why for _, why in plan.unquantized}
    assert len(schemes_of(api.plan(src, "w4a16", recipe=rules(("*.mlp.*", "w8a16"))))) == 14


def test_options_of_rules_and_of_the_command_line(tmp_path):
    src = dense(tmp_path / "in")
    recipe = {
        "scheme": "w4a16", "group_size": 64, "ignore": ["*.layers.1.*"],
        "rule": [{"pattern": "*.down_proj", "scheme": "w8a16", "group_size": 32,
                  "scales": "absmax"}],
    }  # fmt: skip
    found = schemes_of(api.plan(src, recipe=recipe, scales="search"))
    assert not any("layers.1" in name for name in found)
    down = found.pop("model.layers.0.mlp.down_proj")
    assert (down.block, down.scales) == ((1, 32), "absmax")
    assert {(s.block, s.scales) for s in found.values()} == {((1, 64), "search")}
    found = schemes_of(api.plan(src, "w4a16", group_size=128, recipe=recipe))
    assert found["model.layers.0.mlp.up_proj"].block == (1, 128)


@pytest.mark.parametrize(
    ("pattern", "taken"),
    [("lm_head", True), ("*lm_head", False), ("re:lm_head", False),
     ("model.layers.*.self_attn.kv_b_proj", True), ("*.kv_b_proj", False),
     ("model.*.kv_b_proj", False), ("model.layers.1.self_attn.kv_b_proj", True)],
)  # fmt: skip
def test_a_rule_overrides_the_table_where_it_spells_the_whole_name(pattern, taken, tmp_path):
    plan = api.plan(mla(tmp_path / "in"), recipe=rules((pattern, "w8a16"), ("*.o_proj", "w8a16")))
    named = {n for n in schemes_of(plan) if not n.endswith("o_proj")}
    assert bool(named) == taken
    assert bool(plan.warnings) != taken
    if not taken:
        assert "gives W8A16 to nothing but what stays as it is" in plan.warnings[0]


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (rules(("*.q_proj", "w8a16"), scheme="w4a16"),
         r"k_proj.weight' would be W4A16 by the scheme of all the rest and "
         r"'model.layers.0.self_attn.q_proj.weight' W8A16 by recipe rule 1 \('\*.q_proj'\)"),
        (rules(("*.q_proj", "w8a16"), ("*_proj", "w4a16")),
         r"W4A16 by recipe rule 2 \('\*_proj'\) and .* W8A16 by recipe rule 1"),
        (rules(("*.up_proj", "keep"), ("*", "w4a16")),
         r"gate_proj.weight' is quantized by recipe rule 2 .* and "
         r"'model.layers.0.mlp.up_proj.weight' is not \(rule 1 of the recipe\)"),
    ],
)  # fmt: skip
def test_a_recipe_that_splits_a_fused_group_names_modules_and_rules(recipe, said, tmp_path):
    with pytest.raises(PlanError, match=said):
        api.plan(dense(tmp_path / "in"), recipe=recipe)


def test_a_fused_group_of_ones_own(tmp_path):
    src = dense(tmp_path / "in")
    own = [{"name": "odd", "members": ["o_proj", "x_proj"]}]
    recipe = rules(("*.o_proj", "w8a16"), ("*", "w4a16"), group=own)
    assert schemes_of(api.plan(src, recipe=recipe))
    own[0]["members"] = ["o_proj", "q_proj"]
    with pytest.raises(PlanError, match=r"loaders fuse them \(odd\)"):
        api.plan(src, recipe=recipe)


def test_experts_of_a_layer_in_two_schemes_are_a_warning(tmp_path):
    recipe = rules(("*.down_proj", "w8a16"), scheme="w4a16")
    (warning,) = api.plan(moe(tmp_path / "in"), recipe=recipe).warnings
    assert "'model.layers.0.mlp.experts' has" in warning
    assert "vLLM loads the experts of a layer in one scheme" in warning
    recipe = rules(("*.1.mlp.experts.*", "w8a16"), scheme="w4a16")
    assert api.plan(moe(tmp_path / "in"), recipe=recipe).warnings == [
        "the experts of 'model.layers.0.mlp.experts' W4A16 and 'model.layers.1.mlp.experts' "
        "W8A16: transformers takes one scheme for those of all layers"
    ]


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"rules": []}, "recipe: unknown key 'rules'; known keys are scheme"),
        ({"scheme": 4}, "recipe: scheme must be a text, got 4"),
        ({"scheme": "w4a17"}, "recipe: scheme: unknown scheme 'w4a17': did you mean"),
        ({"scheme": "bf16"}, "'bf16' is no quantization; 'keep' leaves"),
        ({"scheme": "w4a16", "group_size": "64"}, "group_size must be a whole number, got '64'"),
        ({"scheme": "w4a16", "group_size": 7}, "recipe: group_size: it must be a multiple of 8"),
        ({"group_size": 64}, "recipe: group_size needs a scheme"),
        ({"ignore": [1]}, "recipe: ignore must be a text or a list of texts"),
        ({"rule": {"pattern": "*"}}, r"rule must be an array of tables, written \[\[rule\]\]"),
        ({"rule": [{"pattern": "*"}]}, "recipe, rule 1: scheme is missing"),
        ({"rule": [{"scheme": "w4a16"}]}, "recipe, rule 1: pattern is missing"),
        ({"rule": [{"pattern": "*", "scheme": "w4a16"}, {"pattern": "re:(", "scheme": "keep"}]},
         "recipe, rule 2: pattern: the pattern 're:\\('"),
        ({"rule": [{"pattern": "*", "scheme": "keep", "scales": "search"}]},
         "recipe, rule 1: scales does not apply to the scheme 'keep'"),
        ({"rule": [{"pattern": "*", "scheme": "nvfp4", "group_size": 32}]},
         "recipe, rule 1: group_size: group_size does not apply to NVFP4"),
        ({"rule": [{"pattern": "*", "scheme": "w4a16", "bits": 4}]},
         "recipe, rule 1: unknown key 'bits'; known keys are pattern, scheme"),
        ({"rule": [{"pattern": "*", "scheme": "w4a16", "scales": "best"}]},
         "scales must be absmax or search, got 'best'"),
        ({"group": [{"name": "x", "members": ["q_proj"]}]}, "group 1: members must be two or more"),
        ({"experts": [{"pattern": "*", "layout": "odd"}]}, "experts 1: layout must be plain or"),
        ({"ignore": ["*.x"]}, "the recipe gives nothing a scheme"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence_with_rule_and_key(recipe, said):
    with pytest.raises(PlanError, match=said) as e:
        api.options(recipe=recipe)
    assert str(e.value).endswith(".")


def test_files(tmp_path, monkeypatch):
    toml = tmp_path / "r.toml"
    toml.write_text('scheme = "w4a16"\n[[rule]]\npattern = ["*.down_proj"]\nscheme = "w8a16"\n')
    yaml = tmp_path / "r.yaml"
    yaml.write_text("scheme: w4a16\nrule:\n- {pattern: '*.down_proj', scheme: w8a16}\n")
    with pytest.raises(PlanError, match=r"recipe no\.toml cannot be read: No such file"):
        load("no.toml")
    (tmp_path / "bad.toml").write_text("scheme = ")
    with pytest.raises(PlanError, match=r"bad\.toml is not valid TOML"):
        load(tmp_path / "bad.toml")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(PlanError, match=r"needs PyYAML: pip install 'streamq\[yaml\]'"):
        load(yaml)
    monkeypatch.undo()
    pytest.importorskip("yaml")
    assert load(yaml) == load(toml) == load(tomllib.loads(toml.read_text()))
    yaml.write_text("- 1\n")
    with pytest.raises(PlanError, match="must be a table of keys"):
        load(yaml)
    yaml.write_text("a: [")
    with pytest.raises(PlanError, match="is not valid YAML"):
        load(yaml)


def test_a_recipe_is_written_as_it_is_read():
    recipe = load({
        "scheme": "w4a16", "group_size": 64, "format": "compressed-tensors",
        "rule": [{"pattern": ["a.*", 're:"b\\d"'], "scheme": "nvfp4a16", "scales": "search"},
                 {"pattern": "c", "scheme": "ignore"}],
    })  # fmt: skip
    assert load(tomllib.loads(text_of(recipe))) == recipe
    assert "ignore" in KEEP


def test_exact_names_among_many_patterns():
    rule = Rule(1, (*(f"m.{i}.x" for i in range(1000)), "y.*", "re:z"), SCHEMES["W4A16"])
    test = rule.test()
    assert [test(n) for n in ("m.7.x", "y.1", "zz", "m.x")] == [True, True, True, False]
    assert rule.label == "recipe rule 1 ('m.0.x' and 1001 more)"


@pytest.mark.parametrize(
    ("file", "make", "wanted"),
    [
        ("deepseek_v3-nvfp4-fp8", mla, {"experts": "NVFP4", "self_attn": "FP8_BLOCK",
                                        "shared_experts": "FP8_BLOCK", "mlp": "FP8_BLOCK"}),
        ("qwen3_moe-nvfp4-fp8", moe, {"experts": "NVFP4", "self_attn": "FP8_DYNAMIC"}),
        ("mxfp4-experts", moe, {"experts": "MXFP4A16"}),
        ("int4-int8-down", dense, {"self_attn": "W4A16", "mlp": "W4A16", "down_proj": "W8A16"}),
        ("int4-int8-down", moe, {"self_attn": "W4A16", "experts": "W4A16"}),
        ("edge", dense, {"self_attn": "W4A16", "mlp": "W4A16", "down_proj": "W8A16",
                         "lm_head": "W8A16"}),
    ],
)  # fmt: skip
def test_shipped_recipes_convert_and_every_reader_agrees(file, make, wanted, tmp_path):
    src = make(tmp_path / "in")
    recipe = RECIPES / f"{file}.toml"
    plan = api.plan(src, recipe=recipe)
    assert all("int4" in file and "rule" in w for w in plan.warnings)  # with experts, or without
    found = {}
    for name, scheme in schemes_of(plan).items():
        parts = [p for p in name.split(".") if p in wanted]
        found[parts[-1]] = scheme.name
    assert found == wanted
    api.convert(src, tmp_path / "out", recipe=recipe)
    with open_checkpoint(src) as source:
        report = verify(tmp_path / "out", source)
    assert report.failures == []
    assert set(report.scheme.split(", ")) == set(wanted.values())


def test_every_shipped_recipe_is_tested():
    marks = test_shipped_recipes_convert_and_every_reader_agrees.pytestmark
    assert {row[0] for row in marks[0].args[1]} == {p.stem for p in RECIPES.glob("*")}


def test_the_command_line(tmp_path, capsys):
    src = dense(tmp_path / "in")
    recipe = str(RECIPES / "int4-int8-down.toml")

    def run(*args):
        with pytest.raises(SystemExit) as e:
            cli([str(a) for a in args], prog_name="streamq")
        return e.value.code, capsys.readouterr()

    code, said = run("plan", src, "--recipe", recipe, "--json")
    plan = json.loads(said.out)
    assert (code, plan["scheme"]) == (0, "W4A16, W8A16")
    assert {t["scheme"] for t in plan["tensors"]} == {"W4A16", "W8A16", None}
    code, said = run("convert", src, tmp_path / "out", "--recipe", recipe, "--no-sync")
    assert code == 0
    assert "weights to W4A16, W8A16" in said.out
    assert run("plan", src)[0] == 2
    assert run("plan", src, "--to", "w4a16:x", "--recipe", recipe)[0] == 2
    code, said = run("plan", src, "--recipe", recipe, "--group-size", "64")
    assert (code, "--group-size is for --scheme" in said.err) == (1, True)
    code, said = run("plan", src, "--recipe", tmp_path / "none.toml")
    assert (code, "cannot be read" in said.err) == (1, True)


def test_bytes_are_those_of_each_scheme_alone(tmp_path):
    src = dense(tmp_path / "in")
    api.convert(src, tmp_path / "mixed", recipe=rules(("*.mlp.*", "nvfp4a16"), scheme="w4a16"))
    mixed = tensors_of(tmp_path / "mixed")
    for part, scheme in ((".mlp.", "nvfp4a16"), (".self_attn.", "w4a16")):
        api.convert(src, tmp_path / scheme, scheme)
        alone = tensors_of(tmp_path / scheme)
        names = [n for n in alone if part in n]
        assert len(names) > 10
        assert all(alone[n][1] == mixed[n][1] for n in names)


@pytest.mark.parametrize(
    ("scheme", "ranks", "said"),
    [
        ("fp8_block", 2, {"q_proj": "64 rows a rank would cut blocks of 128 rows", "o_proj": None}),
        ("fp8_block", 4, {"down_proj": "64 columns a rank would cut groups of 128"}),
        ("w4a16", 2, {"q_proj": None, "o_proj": None}),
        ("w4a16", 4, {"q_proj": None, "o_proj": "64 columns a rank would cut groups of 128"}),
        ("nvfp4a16", 32, {"down_proj": "8 columns a rank would cut groups of 16"}),
        ("w4a16_asym", 32, {"gate_proj": "4 rows a rank would cut words of 8 packed zero points"}),
        ("fp8_dynamic", 3, {"q_proj": "128 rows are not a multiple of 3",
                            "o_proj": "256 columns are not a multiple of 3"}),
        ("fp8_dynamic", 16, {"q_proj": None, "o_proj": None}),
    ],
)  # fmt: skip
def test_what_tensor_parallel_ranks_would_cut(scheme, ranks, said, tmp_path):
    plan = api.plan(dense(tmp_path / "in"), scheme, check_tp=[ranks])
    for leaf, why in said.items():
        found = [w for w in plan.warnings if f"{leaf}'" in w]
        assert len(found) == (why is not None)
        if why:
            assert found[0].startswith(f"--check-tp {ranks}: 'model.layers.*.")
            assert found[0].endswith(f"of shape [128, 256] (2 such weights): {why}")


def test_check_tp_on_the_command_line(tmp_path, capsys):
    src = dense(tmp_path / "in")
    for ranks, code in (("2,4", 0), ("2,x", 2), ("1", 2)):
        with pytest.raises(SystemExit) as e:
            cli(["plan", str(src), "-s", "fp8_block", "--check-tp", ranks], prog_name="streamq")
        assert e.value.code == code
    assert api.plan(src, "fp8_block").warnings == []


def test_ranks_beyond_the_heads_have_copies_of_keys_and_values(tmp_path):
    src = dense(tmp_path / "in")
    config = json.loads((src / "config.json").read_text()) | {"num_key_value_heads": 1}
    (src / "config.json").write_text(json.dumps(config))
    found = [w.split("'")[1].rpartition(".")[2] for w in api.plan(
        src, "fp8_block", check_tp=[2]).warnings]  # fmt: skip
    assert found == ["gate_proj", "up_proj", "q_proj"]


def test_a_layout_of_experts_of_ones_own(tmp_path):
    rng = np.random.default_rng(0)
    name, sizes = "model.layers.0.mlp.experts.", {"gate_up_proj": 256, "down_proj": 128}
    tensors = {name + p: (rng.standard_normal((2, rows, 128)) * 0.02).astype(ml_dtypes.bfloat16)
               for p, rows in sizes.items()}  # fmt: skip
    src = write_checkpoint(tmp_path / "in", tensors, {"model_type": "unheard_of"})
    with pytest.raises(PlanError, match="recipe"):
        api.plan(src, "w4a16")
    recipe = rules(
        ("*.experts.*", "w4a16"), experts=[{"pattern": "*.experts.*", "layout": "plain"}]
    )
    found = schemes_of(api.plan(src, recipe=recipe))
    assert set(found) == {f"{name}{e}.{p}_proj" for e in range(2) for p in ("gate", "up", "down")}
    api.convert(src, tmp_path / "out", recipe=recipe)
    assert verify(tmp_path / "out").failures == []
    recipe["experts"][0]["layout"] = "interleaved"
    api.convert(src, tmp_path / "other", recipe=recipe)
    one, two = (tensors_of(tmp_path / n)[f"{name}0.up_proj.weight_packed"][1]
                for n in ("out", "other"))  # fmt: skip
    assert one != two


def test_the_example_of_the_documentation_is_a_recipe():
    text = (RECIPES.parent / "docs" / "recipes.md").read_text()
    recipe = load(tomllib.loads(text.split("```toml\n")[1].split("```")[0]))
    assert [rule.scheme and rule.scheme.name for rule in recipe.rules] == ["NVFP4", "W8A16", None]
    assert {f"{p.name}" for p in RECIPES.glob("*")} == {
        line.split("|")[1].strip() for line in text.splitlines() if ".toml |" in line
    }
