"""What loaders make of a checkpoint: each rule finds its fault, and nothing in a clean one."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import run_convert, write_checkpoint
from tampering import (
    GLOBAL,
    INDEX,
    NORM,
    OUT,
    Q,
    Raw,
    add,
    config,
    drop,
    in_json,
    index,
    shards,
    times,
    weights,
)

from streamq.cli import cli
from streamq.formats import named
from streamq.verifying import verify
from streamq.verifying.lint import RULES

K = "model.layers.0.self_attn.k_proj"
UP = "model.layers.0.mlp.experts.0.up_proj"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SIZES = {
    "self_attn.q_proj": (128, 128), "self_attn.k_proj": (128, 128), "self_attn.v_proj": (128, 128),
    "self_attn.o_proj": (128, 128), "mlp.gate_proj": (256, 128), "mlp.up_proj": (256, 128),
    "mlp.down_proj": (128, 256),
}  # fmt: skip
EXPERTS = {f"mlp.experts.{i}.{p}_proj": (128, 128) for i in (0, 1) for p in ("gate", "up", "down")}
#: Kinds of clean checkpoints: scheme, format, whether a mixture of experts.
KINDS = {
    "ct": ("NVFP4", "compressed-tensors", False),
    "ct-moe": ("NVFP4", "compressed-tensors", True),
    "ct-mxfp8": ("MXFP8", "compressed-tensors", False),
    "ct-w4": ("W4A16", "compressed-tensors", False),
    "ct-w5": ("W5A16", "compressed-tensors", False),
    "ct-block": ("FP8_BLOCK", "compressed-tensors", False),
    "mo": ("NVFP4", "modelopt", False),
    "mo-moe": ("NVFP4", "modelopt", True),
    "fp8": ("FP8_BLOCK", "fp8", False),
    "awq": ("W4A16_ASYM", "awq", False),
    "gptq": ("W4A16", "gptq", False),
    "gptq_v2": ("W4A16_ASYM", "gptq_v2", False),
}


def write(folder, moe=False, rows=None, **said):
    rng = np.random.default_rng(0)
    sizes = {f"model.layers.0.{n}": s for n, s in (SIZES | (EXPERTS if moe else {})).items()}
    sizes |= {"model.embed_tokens": (32, 128), "lm_head": (32, 128)} | (rows or {})
    tensors = {f"{n}.weight": rng.standard_normal(s) * 0.05 for n, s in sizes.items()}
    tensors[NORM] = np.ones(128)
    made = {n: t.astype(ml_dtypes.bfloat16) for n, t in tensors.items()}
    about = {"model_type": "qwen3_moe" if moe else "llama", "num_hidden_layers": 1,
             "num_key_value_heads": 4, "architectures": ["LlamaForCausalLM"],
             "tie_word_embeddings": False, **said}  # fmt: skip
    return write_checkpoint(folder, made, about, [list(made)[:4], list(made)[4:]])


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A function from a kind to a checkpoint of it, made once."""
    made = {}

    def make(kind):
        if kind not in made:
            scheme, fmt, moe = KINDS[kind]
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = folder / "out"
            size = 128 if fmt.startswith(("awq", "gptq")) else None
            run_convert(write(folder / "in", moe), made[kind], scheme, group_size=size,
                        format=named(fmt))  # fmt: skip
        return made[kind]

    return make


def args(key, value):
    """A key of the weights of the config group."""
    return weights(**{key: value})


def top(**said):
    return in_json("config.json", lambda c: c.update(said))


def quantized(**said):
    return config(lambda q: q.update(said))


def beside(change):
    return in_json("hf_quant_config.json", lambda c: change(c["quantization"]))


def unmark(folder):
    """A first shard without ``__metadata__``."""
    path = min(folder.glob("*.safetensors"))
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    del header["__metadata__"]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def scale_of(name, *values):
    return add(name, "F32", [len(values)], np.float32(values).tobytes())


def retie(change):
    """Tie the head to the embedding, with a head that ``change`` makes of it, or none."""

    def tamper(folder):
        top(tie_word_embeddings=True)(folder)
        with shards(folder) as files:
            embedding = next(t[EMBEDDING] for t in files.values() if EMBEDDING in t)
            for tensors in files.values():
                if HEAD in tensors:
                    tensors[HEAD] = Raw(*embedding[:2], change(embedding.data))

    return tamper


def rename_shards(folder):
    """Another name for the only file, as some tools give it."""
    with shards(folder) as files:
        first, *rest = files
        for other in rest:
            files[first] |= files.pop(other)
            (folder / other).unlink()
    (folder / INDEX).unlink()
    (folder / first).rename(folder / "weights.safetensors")


class Row(NamedTuple):
    rule: str
    kind: str
    change: object
    #: Part of what the finding says.
    names: str


MO_GLOBAL, MO_INPUT = ".weight_scale_2", ".input_scale"
HALF = np.float32(1.5)
ROWS = [Row(*row) for row in [
    ("fused-global-scale", "ct", times(K + GLOBAL, np.float32, HALF), K),
    ("fused-global-scale-experts", "ct-moe", times(UP + GLOBAL, np.float32, HALF), UP),
    ("fused-global-scale-experts", "mo-moe", times(UP + MO_GLOBAL, np.float32, HALF), UP),
    ("fused-weight-scale-2", "mo", times(K + MO_GLOBAL, np.float32, HALF), K),
    ("sglang-fused-global-scale", "ct", times(K + GLOBAL, np.float32, HALF), K),
    ("sglang-fused-global-scale", "mo", times(K + MO_GLOBAL, np.float32, HALF), K),
    ("sglang-fused-global-scale-experts", "mo-moe", times(UP + MO_GLOBAL, np.float32, HALF), UP),
    ("trtllm-weight-scale-2", "mo", times(K + MO_GLOBAL, np.float32, HALF), K),
    ("trtllm-weight-scale-2", "mo-moe", times(UP + MO_GLOBAL, np.float32, HALF), UP),
    ("fused-input-scale", "ct", times(K + ".input_global_scale", np.float32, HALF), K),
    ("fused-input-scale", "mo-moe", times(UP + MO_INPUT, np.float32, HALF), UP),
    ("trtllm-input-scale", "mo", times(K + MO_INPUT, np.float32, HALF), K),
    ("no-global-scale", "ct", drop(OUT + GLOBAL), OUT),
    ("no-global-scale", "mo", drop(OUT + MO_GLOBAL), OUT),
    ("sglang-no-global-scale", "ct", drop(OUT + GLOBAL), OUT),
    ("no-input-scale", "ct", drop(OUT + ".input_global_scale"), OUT),
    ("no-kv-scale", "ct", quantized(kv_cache_scheme={"num_bits": 8}), "no k_scale"),
    ("no-kv-scale", "mo", beside(lambda q: q.update(kv_cache_quant_algo="FP8")), "no k_scale"),
    ("half-kv-scale", "ct", scale_of("model.layers.0.self_attn.v_scale", 1.0), "self_attn"),
    ("odd-kv-scale", "ct", scale_of("model.layers.0.self_attn.k_scale", -1.0), "k_scale"),
    ("wide-kv-scale", "mo", scale_of("model.layers.0.self_attn.k_proj.k_scale", 1, 1), "k_scale"),
    ("unknown-arguments", "ct", args("scale_shift", 1), "group_0.weights.scale_shift"),
    ("unknown-keys", "ct",
     config(lambda q: q["config_groups"]["group_0"].update(note="x")), "group_0.note"),
    ("unknown-keys", "ct", quantized(kv_cache_scheme={"bits": 8}), "kv_cache_scheme.bits"),
    ("mxfp8-scale-dtype", "ct-mxfp8", args("scale_dtype", None), "group_0.weights"),
    ("group-actorder", "ct-w4", args("actorder", "group"), "group_0.weights"),
    ("sglang-bits", "ct-w5", lambda folder: None, Q),
    ("gptq-types", "gptq_v2", lambda folder: None, Q),
    ("scales-in-f16", "awq", top(dtype="bfloat16"), Q),
    ("transformers-experts", "ct-moe", lambda folder: None, "experts.0.gate_proj"),
    ("ignored-within", "mo", config(lambda q: q["ignore"].append("mlp.down")), "mlp.down_proj"),
    ("ignored-within", "mo", config(lambda q: q["ignore"].append("*.qkv_pro?")), Q),
    ("sglang-ignored-within", "mo",
     config(lambda q: q["ignore"].append("mlp.down")), "mlp.down_proj"),
    ("trtllm-excluded", "mo", beside(lambda q: q["exclude_modules"].append("*.o_proj")), OUT),
    ("two-algorithms", "mo", beside(lambda q: q.update(quant_algo="FP8")), "FP8 and NVFP4"),
    ("no-hf-quant-config", "mo",
     lambda folder: (folder / "hf_quant_config.json").unlink(), "hf_quant_config.json"),
    ("ignored-by-ends", "fp8",
     config(lambda q: q["modules_to_not_convert"].append("model.layers.0.mlp.do")), "down_proj"),
    ("unknown-method", "ct", quantized(quant_method="hqq"), "hqq"),
    ("no-format", "ct", unmark, "model-00001-of-00002.safetensors"),
    ("index-lost-files", "ct",
     index(lambda i: i["weight_map"].update(ghost="lost.safetensors")), "lost.safetensors"),
    ("index-ghosts", "ct", index(lambda i: i["weight_map"].update(
        ghost="model-00001-of-00002.safetensors")), "ghost"),
    ("index-unnamed-files", "ct",
     lambda folder: shutil.copy(min(folder.glob("*.safetensors")), folder / "x.safetensors"),
     "x.safetensors"),
    ("index-metadata", "ct", index(lambda i: i.pop("metadata")), INDEX),
    ("unfound", "ct", rename_shards, "weights.safetensors"),
    ("consolidated", "ct",
     lambda folder: shutil.copy(min(folder.glob("*.safetensors")),
                                folder / "consolidated.safetensors"), "consolidated.safetensors"),
    ("tied-and-different", "ct", retie(lambda old: bytes(len(old))), HEAD),
    ("tied-twice", "ct", retie(lambda old: old), HEAD),
    ("no-head", "ct", drop(HEAD), HEAD),
]]  # fmt: skip


def rules_in(folder):
    return {f.rule: f for f in verify(folder).findings}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.rule}, {row.kind}")
def test_a_rule_finds_its_fault(row, clean, tmp_path):
    out = shutil.copytree(clean(row.kind), tmp_path / "out")
    row.change(out)
    report = verify(out)
    found = {f.rule: f for f in report.findings}[row.rule]
    (rule,) = (r for r in RULES if r.name == row.rule)
    assert any(row.names in name for name in found.names)
    assert found.text.startswith(f"{rule.loader} {rule.says}: '")
    assert "\n" not in found.text
    assert found.text in (report.failures if rule.severity == "error" else report.warnings)


#: What loaders do not like of checkpoints that are in order.
LIMITS = {
    "ct-moe": {"transformers-experts"}, "mo-moe": {"transformers-experts"},
    "ct-w5": {"sglang-bits"}, "gptq_v2": {"gptq-types"},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_no_rule_finds_anything_in_a_clean_checkpoint(kind, clean):
    report = verify(clean(kind))
    assert (report.failures, {f.rule for f in report.findings}) == ([], LIMITS.get(kind, set()))


def test_the_documentation_has_each_rule():
    text = (Path(__file__).parent.parent / "docs" / "loaders.md").read_text()
    for r in RULES:
        formats = ", ".join(r.formats) or "all"
        assert f"| {r.name} | {r.loader} | {r.severity} | {formats} | {r.says} |\n" in text


def test_each_rule_has_a_row_and_a_name_of_its_own():
    names = [r.name for r in RULES]
    assert len(set(names)) == len(names)
    assert {row.rule for row in ROWS} | {"merged-blocks"} == set(names)


@pytest.mark.parametrize(("rows", "found"), [(100, True), (128, False)])
def test_blocks_that_merged_rows_would_part(rows, found, tmp_path):
    """All members but the last need whole blocks: q is the first, and v the last."""
    odd = {"model.layers.0.self_attn.q_proj": (rows, 128),
           "model.layers.0.self_attn.v_proj": (100, 128)}  # fmt: skip
    run_convert(write(tmp_path / "in", rows=odd), tmp_path / "out", "FP8_BLOCK")
    findings = rules_in(tmp_path / "out")
    assert ("merged-blocks" in findings) is found
    if found:
        assert findings["merged-blocks"].names == [Q]


def test_an_embedding_of_another_shape_is_not_tied(clean, tmp_path):
    """Such as that of a speech decoder, which comes first."""
    out = shutil.copytree(clean("ct"), tmp_path / "out")
    retie(lambda old: old)(out)
    add("audio.embed_tokens.weight", "BF16", [4, 4], bytes(32))(out)
    assert {"tied-twice", "tied-and-different"} & rules_in(out).keys() == {"tied-twice"}


def test_faults_are_counted_and_the_first_are_named(clean, tmp_path):
    out = shutil.copytree(clean("ct"), tmp_path / "out")
    for leaf in ("k", "v"):
        times(f"model.layers.0.self_attn.{leaf}_proj{GLOBAL}", np.float32, HALF)(out)
    times(f"model.layers.0.mlp.up_proj{GLOBAL}", np.float32, HALF)(out)
    assert len(rules_in(out)["fused-global-scale"].names) == 3
    config(lambda q: q["config_groups"]["group_0"].update({f"x{i}": 1 for i in range(5)}))(out)
    assert rules_in(out)["unknown-keys"].text.endswith("'group_0.x2' and 2 more")


def test_warnings_are_shown_and_do_not_fail(clean):
    result = CliRunner().invoke(cli, ["verify", str(clean("ct-moe"))])
    assert result.exit_code == 0
    assert "warning: transformers 5.17 loads quantized experts" in result.stdout
    said = json.loads(CliRunner().invoke(cli, ["verify", str(clean("ct-moe")), "--json"]).stdout)
    assert said["ok"] is True
    assert [f["rule"] for f in said["loaders"]] == ["transformers-experts"]
    assert len(said["loaders"][0]["names"]) == len(EXPERTS)


def test_faults_fail(clean, tmp_path):
    out = shutil.copytree(clean("mo"), tmp_path / "out")
    times(K + MO_GLOBAL, np.float32, HALF)(out)
    result = CliRunner().invoke(cli, ["verify", str(out)])
    assert result.exit_code == 3
    assert "failed: TensorRT-LLM (00bbf71e) refuses fused layers" in result.stderr


def test_check_tp_warns_as_the_plan_does(clean, tmp_path):
    args = ["--check-tp", "2,4"]
    said = CliRunner().invoke(cli, ["verify", str(clean("ct-block")), *args])
    src = write(tmp_path / "in")
    planned = CliRunner().invoke(cli, ["plan", str(src), "-s", "fp8_block", *args])
    lines = [line for line in said.stdout.splitlines() if "--check-tp" in line]
    assert said.exit_code == 0
    assert len(lines) == 11
    assert lines == [line for line in planned.stdout.splitlines() if "--check-tp" in line]


def test_what_streamq_cannot_read_is_linted_by_names(clean, tmp_path):
    out = shutil.copytree(clean("ct"), tmp_path / "out")
    quantized(quant_method="hqq")(out)
    retie(lambda old: bytes(len(old)))(out)
    assert {"unknown-method", "tied-and-different"} <= rules_in(out).keys()
