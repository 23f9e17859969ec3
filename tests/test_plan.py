"""What is quantized, what is left and why, which weights share a scale, where they go."""

import json
import sys

import ml_dtypes
import numpy as np
import pytest
from helpers import run_convert, tensors_of, write_checkpoint

from streamq.checkpoint import open_checkpoint
from streamq.errors import PlanError, StreamqError
from streamq.families import FUSED_GROUPS, LEFT_ALONE, Family
from streamq.planning import Options, make_plan
from streamq.schemes import SCHEMES, resolve

BF16 = ml_dtypes.bfloat16


def weight(rows=128, cols=256, scale=1.0, seed=0):
    x = np.random.default_rng(seed).standard_normal((rows, cols)) * 0.02 * scale
    return x.astype(BF16)


def plan_of(folder, scheme="nvfp4a16", **options):
    with open_checkpoint(folder) as source:
        return make_plan(source, Options(resolve(scheme), **options))


def make(tmp_path, names, config=None, shape=(128, 256), shards=None):
    tensors = {n: weight(*shape, seed=i) for i, n in enumerate(names)}
    return write_checkpoint(tmp_path / "in", tensors, config, shards)


def steps_of(plan):
    """Module names of each step."""
    steps = {}
    for i, shard in enumerate(plan.shards):
        for weights in shard.weights:
            for t, step in zip(weights.sources, weights.steps.tolist(), strict=True):
                leaf = t.name.removesuffix(".weight").rpartition(".")[2]
                steps.setdefault((i, step), set()).add(leaf)
    return list(steps.values())


# --- families ---------------------------------------------------------------------------


@pytest.mark.parametrize("row", FUSED_GROUPS, ids=lambda g: f"{g.name}-{'-'.join(g.members)}")
def test_every_fused_group_shares_one_global_scale(row, tmp_path):
    parent = "model.layers.0.block"
    tensors = {
        f"{parent}.{m}.weight": weight(scale=2.0**i, seed=i) for i, m in enumerate(row.members)
    }
    config = {"model_type": row.model_types[0] if row.model_types else "unheard_of"}
    family = Family(config)
    members = [
        m for m in row.members if not family.left_alone(SCHEMES["NVFP4A16"])(f"{parent}.{m}")
    ]
    src = write_checkpoint(tmp_path / "in", tensors, config)
    if len(members) < 2:  # a model type for which one of them stays unquantized
        pytest.fail(f"{row} has no two members that are quantized")
    run_convert(src, tmp_path / "out", "nvfp4a16")
    out = tensors_of(tmp_path / "out")
    scales = {out[f"{parent}.{m}.weight_global_scale"][1] for m in members}
    assert len(scales) == 1
    top = max(np.abs(tensors[f"{parent}.{m}.weight"].astype(np.float32)).max() for m in members)
    assert np.frombuffer(scales.pop(), np.float32)[0] == np.float32(2688) / np.float32(top)


def test_no_name_is_in_two_general_groups():
    for model_type in {"", *(t for g in FUSED_GROUPS for t in g.model_types)}:
        groups = [g for g in FUSED_GROUPS if not g.model_types or model_type in g.model_types]
        own = [m for g in groups if g.model_types for m in g.members]
        general = [m for g in groups if not g.model_types for m in g.members]
        assert len(general) == len(set(general))
        assert len(own) == len(set(own))


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["mlp.experts.0.gate_proj", "mlp.experts.0.up_proj", "mlp.experts.1.gate_proj"],
         [{"gate_proj", "up_proj"}, {"gate_proj"}]),
        (["mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"], [{"gate_proj", "up_proj"}]),
        (["self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.q_b_proj"],
         [{"q_a_proj", "kv_a_proj_with_mqa"}, {"q_b_proj"}]),
        (["encoder_attn.k_proj", "encoder_attn.v_proj"], [{"k_proj", "v_proj"}]),
        (["self_attn.q_proj", "self_attn.k_proj"], [{"q_proj", "k_proj"}]),
        (["block_sparse_moe.experts.0.w1", "block_sparse_moe.experts.0.w2",
          "block_sparse_moe.experts.0.w3"], [{"w1", "w3"}, {"w2"}]),
        (["mlp.up_proj", "mlp.down_proj"], [{"up_proj"}, {"down_proj"}]),
    ],
    ids=["experts", "shared experts", "mla", "cross attention", "no v", "mixtral", "no gate"],
)  # fmt: skip
def test_groups_as_they_occur(names, steps, tmp_path):
    src = make(tmp_path, [f"model.layers.0.{n}.weight" for n in names])
    assert sorted(map(sorted, steps_of(plan_of(src)))) == sorted(map(sorted, steps))


@pytest.mark.parametrize("row", LEFT_ALONE, ids=lambda r: f"{r.reason}-{'-'.join(r.model_types)}")
def test_every_rule_leaves_something_alone(row):
    scheme = SCHEMES["NVFP4A16" if row.when == "fp4" else "W4A16"]
    family = Family({"model_type": row.model_types[0] if row.model_types else ""})
    for pattern in row.patterns:
        if pattern.startswith("<"):
            continue
        module = pattern.replace("[0-9]", "1").replace("*.", "model.layers.3.").replace("*", "")
        assert family.left_alone(scheme)(module), pattern


LEFT = [
    ("llama", "nvfp4a16", "lm_head", "output head"),
    ("llama", "nvfp4a16", "model.embed_tokens", "embedding"),
    ("llama", "nvfp4a16", "model.layers.0.mlp.gate_proj", None),
    ("qwen3_moe", "nvfp4a16", "model.layers.0.mlp.gate", "router"),
    ("qwen3_moe", "nvfp4a16", "model.layers.0.mlp.experts.3.gate_proj", None),
    ("deepseek_v3", "nvfp4a16", "model.layers.3.self_attn.kv_b_proj", "MLA kv_b"),
    ("deepseek_v3", "fp8_block", "model.layers.3.self_attn.kv_b_proj", None),
    ("deepseek_v3", "nvfp4a16", "model.layers.3.self_attn.q_a_proj", "MLA and MTP"),
    ("deepseek_v3", "fp8_dynamic", "model.layers.3.self_attn.q_a_proj", None),
    ("deepseek_v3", "nvfp4a16", "model.layers.61.mlp.experts.0.up_proj", "MLA and MTP"),
    ("deepseek_v3", "fp8_dynamic", "model.layers.61.mlp.experts.0.up_proj", None),
    ("llama4", "nvfp4a16", "language_model.model.layers.0.self_attn.q_proj", "attention"),
    ("llama4", "w4a16", "language_model.model.layers.0.self_attn.q_proj", None),
    ("falcon_mamba", "w4a16", "backbone.layers.0.mixer.in_proj", "mamba"),
    ("nemotron_h", "w4a16", "backbone.layers.0.mixer.in_proj", None),
    ("unheard_of", "w4a16", "vision_tower.blocks.0.mlp.fc1", "vision or audio tower"),
]


@pytest.mark.parametrize(("model_type", "scheme", "module", "why"), LEFT)
def test_what_is_left_alone(model_type, scheme, module, why):
    family = Family({"model_type": model_type, "text_config": {"num_hidden_layers": 61}})
    assert family.left_alone(resolve(scheme))(module) == why


def test_an_unknown_model_type_is_told(tmp_path):
    src = make(tmp_path, ["a.b.weight"], {"model_type": "unheard_of"})
    assert any("unheard_of: not known here" in n for n in plan_of(src).notes)
    src = make(tmp_path, ["a.b.weight"], {"model_type": "llama"})
    assert plan_of(src).notes == []


# --- choosing ---------------------------------------------------------------------------

NAMES = [f"model.layers.{i}.{m}.weight" for i in (0, 1) for m in ("mlp.down_proj", "attn.o_proj")]


@pytest.mark.parametrize(
    ("options", "quantized"),
    [
        ({}, NAMES),
        ({"ignore": ("*.o_proj",)}, [n for n in NAMES if "o_proj" not in n]),
        ({"ignore": (r"re:.*layers\.0\.",)}, [n for n in NAMES if ".1." in n]),
        ({"ignore": (NAMES[0],)}, NAMES[1:]),
        ({"only": ("*.o_proj",)}, [n for n in NAMES if "o_proj" in n]),
        ({"only": ("*.o_proj",), "ignore": ("model.layers.0.*",)}, NAMES[3:]),
    ],
)
def test_ignore_and_only(options, quantized, tmp_path):
    plan = plan_of(make(tmp_path, NAMES), **options)
    found = [t.name for s in plan.shards for w in s.weights for t in w.sources]
    assert sorted(found) == sorted(quantized)
    ignore = plan.config["quantization_config"]["ignore"]
    left = {n.removesuffix(".weight") for n in set(NAMES) - set(quantized)}
    assert ignore == sorted(left | {"lm_head"})  # a tied head has no tensor, but is a Linear


def test_a_pattern_that_matches_nothing_is_a_warning(tmp_path):
    plan = plan_of(make(tmp_path, NAMES), ignore=("*.oo_proj",))
    assert plan.warnings == ["--ignore '*.oo_proj' matches no tensor"]


REFUSED = {
    "expert stack": ({"m.experts.gate_up_proj": np.zeros((4, 64, 32), BF16)}, {}, "nvfp4a16", {},
                     "holds the experts of a layer in one.*--ignore"),
    "columns": ({"m.o_proj.weight": weight(4, 24)}, {}, "nvfp4a16", {},
                r"'m.o_proj.weight' of shape \[4, 24\] has 24 columns.*1x16 block of NVFP4A16"),
    "group": ({"m.o_proj.weight": weight(4, 192)}, {}, "w4a16", {}, "--group-size"),
    "half a group": ({"m.q_proj.weight": weight(), "m.k_proj.weight": weight()}, {}, "w4a16",
                     {"ignore": ("m.k_proj",)},
                     r"'m.q_proj.weight' is quantized and 'm.k_proj.weight' is not \(--ignore\)"),
    "a name twice": (
        {"m.o_proj.weight": weight(), "m.o_proj.weight_scale": np.ones(3, "f4")}, {}, "fp8_block",
        {}, "'m.o_proj.weight_scale' belongs to a quantized weight"),
    "two dtypes in a group": (
        {"m.q_proj.weight": weight(), "m.k_proj.weight": weight().astype("f4")}, {}, "w4a16", {},
        "'m.k_proj.weight' is F32 and 'm.q_proj.weight' is BF16, but loaders fuse them"),
    "nothing": ({"lm_head.weight": weight()}, {}, "w4a16", {}, "nothing to quantize.*output head"),
    "quantized source": ({"m.o_proj.weight": weight()},
                         {"quantization_config": {"quant_method": "bitsandbytes"}}, "w4a16", {},
                         "quantization 'bitsandbytes' is none that streamq reads"),
    "quantized inside": ({"m.o_proj.weight": weight()},
                         {"text_config": {"quantization_config": {"quant_method": "hqq"}}},
                         "w4a16", {}, "quantization 'hqq' is none that streamq reads"),
    "quantized silently": ({"m.o_proj.weight": np.zeros((128, 256), np.int8)}, {}, "w4a16", {},
                           "'m.o_proj.weight' in .* is I8 and has no weight_scale"),
    "bad regex": ({"m.o_proj.weight": weight()}, {}, "w4a16", {"ignore": ("re:(",)},
                  r"pattern 're:\(' is not a valid regex"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("tensors", "config", "scheme", "options", "message"), REFUSED.values(), ids=REFUSED
)
def test_what_cannot_be_done_is_one_sentence(tensors, config, scheme, options, message, tmp_path):
    src = write_checkpoint(tmp_path / "in", tensors, {"model_type": "llama", **config})
    with pytest.raises(StreamqError, match=message) as e:
        plan_of(src, scheme, **options)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("name", "group_size", "message"),
    [
        ("fp8", None, "calibration data.*FP8_DYNAMIC"),
        ("nvfp44", None, "unknown scheme 'nvfp44': did you mean NVFP4"),
        ("nvfp4", 32, "--group-size does not apply to NVFP4"),
        ("w8a8", 128, "--group-size does not apply to W8A8"),
        ("w4a16", 12, "multiple of 8.*got 12"),
    ],
)
def test_schemes_that_are_refused(name, group_size, message):
    with pytest.raises(PlanError, match=message):
        resolve(name, group_size)


def test_preset_names_take_any_case():
    assert resolve("nVfP4a16") is SCHEMES["NVFP4A16"]
    assert resolve("int8") is SCHEMES["W8A8"]


def test_ragged_fp8_blocks_inside_a_fused_group_are_a_warning(tmp_path):
    names = [f"m.{p}_proj.weight" for p in "qkv"]
    plan = plan_of(make(tmp_path, names, shape=(192, 256)), "fp8_block")
    assert "192 rows, not a multiple of 128, in a fused group" in plan.warnings[0]


def test_the_constant_input_scale_is_explained(tmp_path):
    src = make(tmp_path, ["m.o_proj.weight"], {"model_type": "llama"})
    (note,) = plan_of(src, "nvfp4").notes
    assert "+-2688 saturate" in note
    assert "NVFP4A16" in note
    (note,) = plan_of(src, "nvfp4", input_scale=2.0).notes
    assert "+-1344 saturate" in note


# --- placing ----------------------------------------------------------------------------


def test_a_group_goes_to_the_shard_of_its_first_member(tmp_path):
    q, k, v, o = (f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkvo")
    src = make(tmp_path, [k, v, o, q], shards=[[k], [v, o], [q]])
    plan = plan_of(src)
    homes = {t.name: s.name for s in plan.shards for w in s.weights for t in w.sources}
    # The last shard has nothing left and is gone.
    assert homes[q] == homes[k] == homes[v] == "model-00001-of-00002.safetensors"
    assert homes[o] == "model-00002-of-00002.safetensors"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_shards_hold_what_the_plan_says(scheme, tmp_path):
    names = [
        f"model.layers.{i}.mlp.{p}_proj.weight" for i in range(3) for p in ("gate", "up", "down")
    ]
    src = make(tmp_path, [*names, "model.embed_tokens.weight"])
    plan = run_convert(src, tmp_path / "out", scheme, shard_size=100_000)
    assert len(plan.shards) > 1
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    out = tensors_of(tmp_path / "out")
    assert index["weight_map"] == {name: t.file for name, (t, _) in out.items()}
    assert index["metadata"]["total_size"] == sum(len(data) for _, data in out.values())
    for shard in plan.shards:
        path = tmp_path / "out" / shard.name
        assert path.stat().st_size == shard.size
        assert path.read_bytes().startswith(shard.header)
        assert len(shard.header) % 8 == 0
    for t, _ in out.values():
        itemsize = {"F32": 4, "I32": 4, "I64": 8, "BF16": 2}.get(t.dtype, 1)
        assert t.start % itemsize == 0, t


def test_shard_size_is_a_limit_for_all_but_single_items(tmp_path):
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(9)]
    plan = plan_of(make(tmp_path, names), shard_size=50_000)
    data = [s.size - len(s.header) for s in plan.shards]
    assert max(data) <= 50_000
    assert sum(data) == plan.bytes_out - sum(len(s.header) for s in plan.shards)


def test_a_header_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["streamq.planning.place"], "MAX_HEADER", 1000)
    with pytest.raises(PlanError, match=r"would have .* bytes, the format allows 1000"):
        plan_of(make(tmp_path, NAMES))


def test_names_that_need_escapes(tmp_path):
    name = 'odd "name" \\ with\ttab \u00e9.weight'
    src = write_checkpoint(tmp_path / "in", {name: weight(), "b.weight": weight()})
    run_convert(src, tmp_path / "out", "fp8_dynamic", shard_size=1)
    out = tensors_of(tmp_path / "out")
    assert name in out
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == out.keys()
