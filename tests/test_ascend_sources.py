"""Ascend's checkpoints as others wrote them: read right, refused by name, checked as loaders do."""

import json
import re

import numpy as np
import pytest
from ascend_checkpoints import (
    ASCEND,
    BF16,
    CONFIG,
    CT,
    DOWN,
    FILE,
    LAYER,
    UP,
    Q,
    arrays_of,
    description,
    moe,
    others,
    refused,
    run,
    weight,
    write,
)
from helpers import run_convert, tensors_of, write_checkpoint

from streamq.checkpoint import open_checkpoint
from streamq.errors import CheckpointError
from streamq.schemes import ALL
from streamq.stored import find_stored, open_tensors
from streamq.verifying import verify


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("ascend") / "in", moe(), CONFIG)


# --- sources of others --------------------------------------------------------------------------


def static(kind):
    """Tensors of a W8A8 weight and the values they stand for, as versions of msmodelslim wrote."""
    rng = np.random.default_rng(3)
    codes = rng.integers(-127, 128, (32, 64)).astype(np.int8)
    scale = rng.uniform(0.001, 0.01, (32, 1)).astype("f4")
    inputs = np.float32([0.03125])
    deq = (inputs * scale)[:, 0]
    wide = np.frombuffer(deq.tobytes(), np.int32).astype(np.int64)
    parts = {"weight": codes, "quant_bias": rng.integers(-9, 9, 32).astype(np.int32),
             "input_scale": inputs, "input_offset": np.float32([-3])}  # fmt: skip
    offset = np.zeros((32, 1), "f4")
    if kind == "older":  # scales in the dtype of the model
        scale = scale.astype(BF16)
        parts |= {"deq_scale": wide, "weight_scale": scale, "weight_offset": offset.astype(BF16),
                  "input_scale": inputs.astype(BF16), "input_offset": np.int8([-3])}  # fmt: skip
    elif kind == "mix":
        parts |= {"deq_scale": deq, "weight_scale": scale, "weight_offset": offset}
    else:
        parts |= {"deq_scale": deq if kind == "f32" else wide}
        scale = (deq / inputs)[:, None]
    return parts, codes, scale.astype("f4")


STATIC = [
    ("W8A8", "older"),
    ("W8A8", "f32"),
    ("W8A8", "i64"),
    ("W8A8S", "i64"),
    ("W8A8_MIX", "mix"),
]


@pytest.mark.parametrize(("type_", "kind"), STATIC)
def test_static_types_are_read(type_, kind, tmp_path):
    """Values, codes bit for bit in the dynamic type, and a word about what is lost."""
    parts, codes, scale = static(kind)
    src = write(tmp_path / "in", *others(type_, parts))
    assert verify(src).failures == []
    values = codes.astype("f4") * scale
    with open_tensors(src) as tensors:
        assert np.array_equal(tensors[Q + ".weight"], values)
    plan = run_convert(src, tmp_path / "out", "W8A8", format=ASCEND)
    assert "static scales of the activations of 1 weights are dropped" in plan.notes
    with open_checkpoint(src) as c:
        assert verify(tmp_path / "out", c).failures == []
    out = arrays_of(tmp_path / "out")
    assert np.array_equal(out[Q + ".weight"], codes)
    assert np.array_equal(out[Q + ".weight_scale"], scale)
    assert {n.rpartition(".")[2] for n in out if n.startswith(Q)} == {
        "weight", "weight_scale", "weight_offset"}  # fmt: skip
    said = description(tmp_path / "out")
    assert said[Q + ".weight"] == said["model_quant_type"] == "W8A8_DYNAMIC"
    plan = run_convert(src, tmp_path / "ct", "W8A8", format=CT)
    assert "static scales of the activations of 1 weights are dropped" in plan.notes
    assert np.array_equal(arrays_of(tmp_path / "ct")[Q + ".weight"], codes)
    run_convert(src, tmp_path / "bf16", "BF16")
    assert np.array_equal(arrays_of(tmp_path / "bf16")[Q + ".weight"], values.astype(BF16))


def test_static_types_and_those_of_the_kv_cache_stay_beside_others(tmp_path):
    """What is not converted keeps its tensors and its entries."""
    parts, _, _ = static("mix")
    tensors, said = others("W8A8_MIX", parts, {LAYER + "self_attn.k_proj.kv_cache_scale": "C8"},
                           {"kv_cache_type": "C8", "is_rot_used": True})  # fmt: skip
    tensors[LAYER + "self_attn.k_proj.kv_cache_scale"] = np.ones(4, "f4")
    tensors["model.layers.0.mlp.down_proj.weight"] = weight("d", 64, 64)
    said["model.layers.0.mlp.down_proj.weight"] = "FLOAT"
    src = write(tmp_path / "in", tensors, said)
    plan = run_convert(src, tmp_path / "out", "MXFP8", format=ASCEND, only=("*down_proj",))
    assert not any("dropped" in note for note in plan.notes)
    assert verify(tmp_path / "out").failures == []
    now = description(tmp_path / "out")
    assert {n: now[n] for n in said if n not in ("model_quant_type", "version")} == {
        n: "W8A8_MXFP8" if "down_proj" in n else t for n, t in said.items()
        if n not in ("model_quant_type", "version")}  # fmt: skip
    before, after = tensors_of(src), tensors_of(tmp_path / "out")
    assert all(after[n][1] == raw for n, (_, raw) in before.items() if "down_proj" not in n)


def dynamic(**changes):
    """Tensors of a W8A8_DYNAMIC weight."""
    rng = np.random.default_rng(4)
    parts = {"weight": rng.integers(-127, 128, (32, 64)).astype(np.int8),
             "weight_scale": rng.uniform(0.001, 0.01, (32, 1)).astype("f4"),
             "weight_offset": np.zeros((32, 1), "f4")}  # fmt: skip
    return {k: v for k, v in (parts | changes).items() if v is not None}


def test_older_files_dtypes_and_groups(tmp_path):
    """The type in the name of the file, scales of bf16, groups of int8."""
    group = {"weight_scale": np.full((32, 2), 0.5, BF16), "weight_offset": np.zeros((32, 2), BF16)}
    tensors, said = others("W8A16", dynamic(**group), head={"group_size": 32})
    config = CONFIG | {"quantize": "w8a16"}
    src = write(tmp_path / "in", tensors, said, config, "quant_model_description_w8a16.json")
    with open_tensors(src) as found:
        assert np.array_equal(found[Q + ".weight"], tensors[Q + ".weight"].astype("f4") / 2)
    assert verify(src).failures == []
    run_convert(src, tmp_path / "out", "BF16")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert "quantize" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_sparse_floats_are_floats(tmp_path):
    tensors, said = others("W16A16S", {"weight": weight("s", 32, 64)})
    src = write(tmp_path / "in", tensors, said)
    run_convert(src, tmp_path / "out", "F16")
    assert arrays_of(tmp_path / "out")[Q + ".weight"].dtype == np.float16


# --- damage ---------------------------------------------------------------------------------------

ONE = np.ones((32, 1), "f4")
#: name: type, tensors, changes of the description, what the sentence says; refused as a source.
UNREAD = {
    "no scale": ("W8A8_DYNAMIC", dynamic(weight_scale=None), {}, "no weight of two"),
    "no offset": ("W8A8_DYNAMIC", dynamic(weight_offset=None), {}, "weight_offset' is absent"),
    "an offset": ("W8A8_DYNAMIC", dynamic(weight_offset=ONE), {}, "weight_offset is not zero"),
    "codes of another dtype": (
        "W8A8_DYNAMIC", dynamic(weight=np.ones((32, 64), np.uint8)), {},
        r"weight' is U8 \[32, 64\], W8A8 has I8"),
    "a scale of another dtype": (
        "W8A8_DYNAMIC", dynamic(weight_scale=ONE.astype(np.int32)), {}, "weight_scale' is I32"),
    "a scale of another shape": (
        "W8A8_DYNAMIC", dynamic(weight_scale=np.ones((16, 1), "f4")), {},
        r"weight_(scale|offset)' is F32 \[(16|32), 1\]"),
    "a scale of one dimension": (
        "W8A8_DYNAMIC", dynamic(weight_scale=ONE[:, 0]), {}, r"weight_scale' is F32 \[32\]"),
    "codes of a type of floats": (
        "W8A8_MXFP8", dynamic(), {}, "weight' is I8|weight_(scale|offset)' is F32"),
    "int4 that is not packed": (
        "W4A8_DYNAMIC", dynamic(scale_bias=ONE), {}, "weight_scale' is F32|scale_bias' is F32"),
    "two scales above each other": (
        "W8A8_DYNAMIC", dynamic(weight_scale_second=ONE), {}, "weight_scale_second' is F32"),
    "a type of floats for codes": (
        "W8A8_DYNAMIC", dynamic(), {Q + ".weight": "FLOAT"}, f"{FILE} ignores it"),
    "no type for codes": ("W8A8_DYNAMIC", dynamic(), {Q + ".weight": None}, f"{FILE} ignores it"),
    "a type that is not known": ("W2A2_X", dynamic(), {}, "W2A2_X, none of the types"),
    "int4 before versions": ("W4A16", dynamic(), {"version": None}, "and there is no version"),
    "compressed codes": ("W8A8SC", dynamic(), {}, "W8A8SC, compressed.* streamq decompress first"),
    "rotated weights": (
        "W8A8_DYNAMIC", dynamic(), {"metadata": {"quarot": {}}}, "metadata.quarot says are not"),
    "a static type without its scales": (
        "W8A8", dynamic(), {}, "deq_scale|weight_offset' is F32|is absent"),
}  # fmt: skip


def changed(said, changes):
    return {k: v for k, v in (said | changes).items() if v is not None}


@pytest.mark.parametrize("case", UNREAD)
def test_damaged_sources_are_refused(case, tmp_path):
    """One sentence from converting, and exit code 3 or a sentence from verifying."""
    type_, parts, changes, message = UNREAD[case]
    tensors, said = others(type_, parts)
    src = write(tmp_path / "in", tensors, changed(said, changes))
    refused(message, "convert", src, tmp_path / "out", "-s", "bf16", "-q")
    assert not (tmp_path / "out").exists()
    result = run("verify", src, "-q")
    assert result.exit_code == 3, result.stderr
    assert not result.exception or isinstance(result.exception, SystemExit)


def test_two_descriptions_of_one_checkpoint_are_refused(tmp_path):
    src = write(tmp_path / "in", *others("W8A8_DYNAMIC", dynamic()),
                {**CONFIG, "quantization_config": {"quant_method": "fp8"}})  # fmt: skip
    args = ("convert", src, tmp_path / "out", "-s", "bf16")
    refused(f"{FILE} is there and config.json says .* 'fp8'", *args)
    config = json.loads((src / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "ascend"}
    (src / "config.json").write_text(json.dumps(config))
    assert verify(src).failures == []
    (src / FILE).unlink()
    refused(f"Ascend's types, and there is no {FILE}", *args)


PARTS = ("weight", "weight_scale", "weight_offset")
#: name: what becomes of the description of an output in W8A8, and the finding.
FINDINGS = {
    "a tensor without an entry": (
        {"model.embed_tokens.weight": None}, "'model.embed_tokens.weight' has no entry.* KeyError"),
    "a scale without an entry": (
        {Q + ".weight_offset": None}, "o_proj.weight_offset' has no entry"),
    "a weight without an entry": ({Q + ".weight": None}, "o_proj.weight' has no entry"),
    "a scale of another type": (
        {Q + ".weight_scale": "W8A16"}, "o_proj.weight_scale' is W8A16 .*o_proj.weight' is W8A8_"),
    "a fused layer of two types": (
        {f"{LAYER}self_attn.k_proj.{p}": "W8A16" for p in PARTS},
        r"_proj' is W8A\w+ and .*_proj' is W8A.* one type, because it fuses them \(qkv\)"),
    "experts of two types": (
        {f"{UP.replace('0.up', '1.up')}.{p}": "W8A16" for p in PARTS},
        r"experts.0.\w+' is W8A8_DYNAMIC and .*experts.1.up_proj' is W8A16"),
    "floats that are called quantized": (
        {LAYER + "mlp.gate.weight": "W8A8_DYNAMIC"}, "mlp.gate.weight' is not quantized"),
    "another group size": (
        {Q + ".weight": "W8A8_MXFP8", "group_size": 0}, "group_size is 0 .* needs 32"),
}  # fmt: skip


@pytest.mark.parametrize("case", FINDINGS)
def test_verify_reads_a_description_as_vllm_ascend_does(case, source, tmp_path):
    changes, message = FINDINGS[case]
    folder = tmp_path / "out"
    run_convert(source, folder, "W8A8", format=ASCEND)
    (folder / FILE).write_text(json.dumps(changed(description(folder), changes)))
    result = run("verify", folder, "-q")
    assert result.exit_code == 3, result.output
    assert re.search(message, result.stderr), result.stderr
    findings = verify(folder).failures
    assert any(re.search(message, line) for line in findings)


def test_verify_finds_experts_without_a_first(tmp_path):
    tensors, said = others("W8A8_DYNAMIC", dynamic(), name=DOWN.replace(".0.down", ".1.down"))
    src = write(tmp_path / "in", tensors, said)
    (finding,) = verify(src).failures
    assert "'model.layers.0.mlp.experts' has no expert 0" in finding


@pytest.mark.parametrize(("suffix", "message"), [
    ("scale_bias", "scale_bias is .* where it should be 8 times the sum of values"),
    ("weight_offset", "weight_offset' is not zero"),
    ("weight_scale", "more than half a code step away|scale_bias is"),
])  # fmt: skip
def test_verify_finds_numbers_that_are_wrong(suffix, message, source, tmp_path):
    """Sums that are not those of the codes too: the device adds them to every output."""
    out = tmp_path / "out"
    run_convert(source, out, "W4A8", format=ASCEND, group_size=ALL)
    with open_checkpoint(out) as c:
        t = c.tensors[f"{DOWN}.{suffix}"]
    raw = bytearray((out / t.file).read_bytes())
    raw[t.start : t.start + 4] = np.float32(0.5).tobytes()
    (out / t.file).write_bytes(raw)
    with open_checkpoint(source) as c:
        found = verify(out, c).failures
    assert any(re.search(message, line) for line in found), found
    if suffix != "weight_scale":
        assert any(re.search(message, line) for line in verify(out).failures)


def test_sums_that_others_add_up_in_f32_are_read(source, tmp_path):
    """torch's order of adding changes the last bits."""
    out = tmp_path / "out"
    run_convert(source, tmp_path / "ours", "W4A8", format=ASCEND, group_size=ALL)
    arrays = arrays_of(tmp_path / "ours")
    rng = np.random.default_rng(5)
    for name in list(arrays):
        if name.endswith("scale_bias"):
            arrays[name] = arrays[name] * (
                1 + rng.uniform(-1, 1, arrays[name].shape) * 2e-6
            ).astype("f4")
    write_checkpoint(out, arrays, CONFIG)
    (out / FILE).write_text((tmp_path / "ours" / FILE).read_text())
    assert verify(out).failures == []


def test_a_description_alone_is_not_enough(tmp_path):
    """A file that speaks of no tensor is named, not an empty model."""
    tensors, _ = others("W8A8_DYNAMIC", dynamic())
    src = write(tmp_path / "in", tensors, {"version": "1.0.0"})
    with open_checkpoint(src) as c, pytest.raises(CheckpointError, match="no tensor has an entry"):
        find_stored(c)
