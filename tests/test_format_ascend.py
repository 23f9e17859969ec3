"""Ascend's checkpoints: bytes and descriptions, and what no loader reads.

Reference calculations are in plain numpy, from the tables of msmodelslim and vllm-ascend.
"""

import json

import numpy as np
import pytest
from ascend_checkpoints import (
    ASCEND,
    BF16,
    CONFIG,
    CT,
    DOWN,
    FILE,
    GATE,
    LAYER,
    UP,
    Q,
    arrays_of,
    description,
    moe,
    refused,
    run,
    weight,
)
from family_checkpoints import FAMILIES
from helpers import run_convert, tensors_of, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from streamq.kernels.reference import dequantize, quantize

import streamq
from streamq.api import options
from streamq.checkpoint import open_checkpoint
from streamq.errors import PlanError
from streamq.planning import Options, make_plan
from streamq.recipe import load
from streamq.schemes import ALL, Quantized, resolve
from streamq.stored import find_stored, open_tensors, read_rows
from streamq.verifying import verify


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    tensors = moe()
    names = list(tensors)
    shards = [names[::2], names[1::2]]
    folder = write_checkpoint(tmp_path_factory.mktemp("ascend") / "in", tensors, CONFIG, shards)
    (folder / "tokenizer.model").write_bytes(b"pieces")
    return folder


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """A function from a preset and a group size to an output, made once."""
    known = {}

    def make(preset, group=None):
        if (preset, group) not in known:
            dst = tmp_path_factory.mktemp("made") / preset
            run_convert(source, dst, preset, format=ASCEND, group_size=group)
            known[preset, group] = dst
        return known[preset, group]

    return make


# --- tensors ------------------------------------------------------------------------------

#: By preset and group size: the type, and the tensors of a weight [128, 64], an expert's.
COLUMN = ("F32", (128, 1))
TENSORS = {
    ("W8A8", None): ("W8A8_DYNAMIC", {
        "weight": ("I8", (128, 64)), "weight_scale": COLUMN, "weight_offset": COLUMN}),
    ("W8A16", ALL): ("W8A16", {
        "weight": ("I8", (128, 64)), "weight_scale": COLUMN, "weight_offset": COLUMN}),
    ("W4A8", ALL): ("W4A8_DYNAMIC", {
        "weight": ("I8", (64, 64)), "weight_scale": COLUMN, "weight_offset": COLUMN,
        "scale_bias": ("F32", (128, 16))}),
    ("W4A16", ALL): ("W4A16", {
        "weight": ("I8", (128, 32)), "weight_scale": COLUMN, "weight_offset": COLUMN}),
    ("W4A16", 32): ("W4A16", {
        "weight": ("I8", (64, 64)), "weight_scale": ("F32", (128, 2)),
        "weight_offset": ("F32", (128, 2))}),
    ("MXFP8", None): ("W8A8_MXFP8", {
        "weight": ("F8_E4M3", (128, 64)), "weight_scale": ("U8", (128, 2))}),
    ("MXFP4", None): ("W4A4_MXFP4", {
        "weight": ("U8", (128, 32)), "weight_scale": ("U8", (128, 2))}),
    ("W4A8_MXFP", None): ("W4A8_MXFP", {
        "weight": ("U8", (128, 32)), "weight_scale": ("U8", (128, 2))}),
}  # fmt: skip
PAIRS = list(TENSORS)


@pytest.mark.parametrize(("preset", "group"), PAIRS)
def test_tensors_and_types(preset, group, source, made):
    """Every tensor has its type; config.json and the other files are as they were."""
    type_, wanted = TENSORS[preset, group]
    out = made(preset, group)
    tensors = tensors_of(out)
    found = {n.removeprefix(DOWN + "."): (t.dtype, t.shape) for n, (t, _) in tensors.items()
             if n.startswith(DOWN)}  # fmt: skip
    assert found == wanted
    said = description(out)
    size = 32 if "MX" in preset or group == 32 else 0
    head = {"model_quant_type": type_, "version": "1.0.0", "metadata": {}, "optional": {},
            "group_size": size}  # fmt: skip
    assert {k: said.pop(k) for k in head} == head
    assert said.pop("lm_head.weight") == "FLOAT"  # tied, but looked up
    assert said.keys() == tensors.keys()
    experts_only = preset == "W4A8"
    for name, own in said.items():
        linear = name.rpartition(".")[0].endswith("_proj")
        quantized = "experts" in name or (linear and not experts_only)
        assert own == (type_ if quantized else "FLOAT"), name
    config = json.loads((out / "config.json").read_text())
    assert config == CONFIG
    assert (out / "tokenizer.model").read_bytes() == b"pieces"


@pytest.mark.parametrize(("preset", "group"), PAIRS)
def test_what_is_written_verifies_and_comes_back(preset, group, source, made, tmp_path):
    """Alone, against its source, and as floats again."""
    out = made(preset, group)
    count = 6 if preset == "W4A8" else 10
    with open_checkpoint(source) as c:
        report = verify(out, c)
    assert (report.failures, report.quantized) == ([], count)
    result = run("convert", out, tmp_path / "bf16", "-q", "-s", "bf16")
    assert result.exit_code == 0, result.stderr
    back, before = tensors_of(tmp_path / "bf16"), tensors_of(source)
    assert back.keys() == before.keys()
    with open_tensors(out) as values:
        assert len(values.stored) == count
        for name, (t, raw) in back.items():
            want = values[name].astype(BF16).tobytes() if name in values.stored else before[name][1]
            assert (t.dtype, raw) == ("BF16", want), name
    assert not (tmp_path / "bf16" / FILE).exists()
    assert json.loads((tmp_path / "bf16" / "config.json").read_text()) == CONFIG
    plan = run_convert(out, tmp_path / "again", preset, format=ASCEND, group_size=group)
    assert plan.verbatim
    assert description(tmp_path / "again") == description(out)


def nibble(x):
    """The numbers of four bits in two's complement."""
    return np.where(x > 7, x.astype(int) - 16, x.astype(int))


def test_int8_is_narrow_and_its_scale_f32(made):
    raw, out = moe(), arrays_of(made("W8A8"))
    for name in (Q, DOWN):
        x = raw[name + ".weight"].astype("f4")
        scale = (np.abs(x).max(1, keepdims=True) / np.float32(127)).astype("f4")
        assert np.array_equal(out[name + ".weight_scale"], scale)
        assert np.array_equal(out[name + ".weight"], np.rint(x / scale))
        assert out[name + ".weight"].min() == -127 or out[name + ".weight"].max() == 127
        assert not out[name + ".weight_offset"].any()


@pytest.mark.parametrize("name", [GATE, UP, DOWN])
def test_w4a8_pairs_rows_and_sums_them(name, made):
    """Low nibble: the even row. scale_bias: 8 times the sum of the values of each part of a row."""
    x = moe()[name + ".weight"].astype("f4")
    out = arrays_of(made("W4A8", ALL))
    packed = out[name + ".weight"].view(np.uint8)
    codes = np.empty(x.shape, int)
    for pair in range(len(packed)):
        codes[2 * pair] = nibble(packed[pair] % 16)
        codes[2 * pair + 1] = nibble(packed[pair] // 16)
    scale = out[name + ".weight_scale"]
    top = np.abs(x).max(1, keepdims=True)
    assert np.array_equal(scale, (top / np.float32(7.5)).astype("f4"))
    assert np.array_equal(codes, np.clip(np.rint(x / scale), -8, 7))
    parts = 16 if name == DOWN else 1
    width = x.shape[1] // parts
    want = np.empty((len(x), parts))
    for row in range(len(x)):
        for part in range(parts):
            values = codes[row, part * width : (part + 1) * width] * np.float64(scale[row, 0])
            want[row, part] = 8 * values.sum()
    assert np.array_equal(out[name + ".scale_bias"], want.astype("f4"))
    # What vllm-ascend computes where a checkpoint has none, and what it adds the parts up to.
    of_loader = 8 * (codes.astype("f4") * scale).sum(1)
    assert np.allclose(out[name + ".scale_bias"].sum(1), of_loader, atol=1e-4)


@pytest.mark.parametrize("group", [ALL, 32])
def test_w4a16_packs_columns_or_rows(group, made):
    """By row: two columns a byte. In groups: two rows. The even one low."""
    x = moe()[Q + ".weight"]
    want = quantize(x, ASCEND.concrete(resolve("W4A16", group)))
    out = arrays_of(made("W4A16", group))
    packed = out[Q + ".weight"].view(np.uint8)
    low, high = nibble(packed % 16), nibble(packed // 16)
    axis = 2 if group == ALL else 1
    assert np.array_equal(np.stack([low, high], axis).reshape(128, 128), want.codes)
    assert np.array_equal(out[Q + ".weight_scale"], want.scale)
    assert np.abs(want.codes.astype(int)).max() == 8


@pytest.mark.parametrize("preset", ["MXFP4", "W4A8_MXFP", "MXFP8"])
def test_mx_is_what_compressed_tensors_has_under_other_names(preset, source, made, tmp_path):
    """Nibbles, exponents and all; W4A8_MXFP has the weights of MXFP4."""
    same = "MXFP4" if preset == "W4A8_MXFP" else preset
    run_convert(source, tmp_path / "ct", same, format=CT)
    ours, theirs = arrays_of(made(preset)), arrays_of(tmp_path / "ct")
    packed = "weight" if preset == "MXFP8" else "weight_packed"
    for name in (Q, DOWN):
        for a, b in (("weight", packed), ("weight_scale", "weight_scale")):
            one, two = ours[f"{name}.{a}"], theirs[f"{name}.{b}"]
            assert (one.dtype, one.tobytes()) == (two.dtype, two.tobytes())
    exponent = ours[Q + ".weight_scale"].astype(int) - 127
    top = np.abs(moe()[Q + ".weight"].astype("f4")).reshape(128, 4, 32).max(2)
    assert (
        np.abs(exponent - (np.floor(np.log2(top)) - (8 if preset == "MXFP8" else 2))) <= 1
    ).all()


@given(
    st.sampled_from([("W4A8", ALL), ("W4A16", ALL), ("W4A16", 32), ("W8A8", None)]),
    st.integers(1, 12), st.integers(1, 8), st.integers(0, 11), st.integers(0, 2**31),
)  # fmt: skip
def test_any_rows_come_back(kind, eights, blocks, first, seed):
    """Codes of some rows from the bytes of those rows alone, whatever the shape."""
    scheme = ASCEND.concrete(resolve(*kind))
    fmt, rng = ASCEND.of_module(GATE), np.random.default_rng(seed)
    rows, cols = 8 * eights, 32 * blocks
    layout = fmt.layout(rows, cols, "F32", scheme)
    lo, hi = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1)
    shape = scheme.scale_shape(rows, cols)
    q = Quantized(rng.integers(lo, hi, (rows, cols)).astype(np.int8), rng.random(shape, "f4") + 1)
    at = min(first // layout.row_step * layout.row_step, rows - layout.row_step)
    arrays = {}
    for e in layout.entries:
        whole = fmt.pack(e.role, q, layout, scheme)
        assert whole.nbytes == e.size
        arrays[e.role] = whole.reshape(e.shape)[at // e.rows :]
    back = fmt.unpack(arrays, layout, scheme)
    assert np.array_equal(back.codes, q.codes[at:])
    assert np.array_equal(back.scale, q.scale[at:])


def test_the_layout_is_what_pack_gives_for_a_repacked_row_too():
    """Codes of -128 and -8, which others use, are kept."""
    for preset, lo in (("W8A8", -128), ("W4A8", -8), ("W4A16", -8)):
        scheme = ASCEND.concrete(resolve(preset, None if preset == "W8A8" else ALL))
        fmt = ASCEND.of_module(DOWN)
        layout = fmt.layout(8, 32, "BF16", scheme)
        q = quantize(weight("x", 8, 32), scheme)
        q.codes[:] = lo
        arrays = {e.role: fmt.pack(e.role, q, layout, scheme) for e in layout.entries}
        for e in layout.entries:
            assert arrays[e.role].nbytes == e.size
            arrays[e.role] = arrays[e.role].reshape(e.shape)
        back = fmt.unpack(arrays, layout, scheme)
        assert np.array_equal(back.codes, q.codes)
        assert np.array_equal(back.scale, q.scale)


# --- families ---------------------------------------------------------------------------------

CONVERTED = [
    ("deepseek_v3", "W8A8"), ("deepseek_v3", "W4A8"), ("qwen3_5_moe", "W4A8"),
    ("qwen3_vl_moe", "MXFP4"), ("gemma4", "W8A8"), ("granitemoe", "W4A8"), ("aria", "MXFP8"),
    ("minimax_m2", "W4A8"), ("deepseek_v4", "W8A8"), ("phi3", "W8A16"), ("nemotron_h", "W4A16"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "preset"), CONVERTED)
def test_families(family, preset, tmp_path):
    """Each output verifies; experts of one tensor become what experts one by one do."""
    model = FAMILIES[family]()
    group = ALL if preset in ("W4A8", "W4A16", "W8A16") else None
    src = write_checkpoint(tmp_path / "in", model.tensors, model.config)
    run_convert(src, tmp_path / "out", preset, format=ASCEND, group_size=group)
    with open_checkpoint(src) as c:
        report = verify(tmp_path / "out", c)
    assert report.failures == []
    out = tensors_of(tmp_path / "out")
    assert description(tmp_path / "out").keys() >= out.keys()
    if not model.each:
        return
    assert all(len(t.shape) < 3 or not t.name.endswith("_proj") for t, _ in out.values())
    rest = {n: x for n, x in model.tensors.items() if n not in {s.name for s in model.stacks}}
    each = write_checkpoint(tmp_path / "each", rest | model.each, model.config)
    run_convert(each, tmp_path / "two", preset, format=ASCEND, group_size=group)
    two = tensors_of(tmp_path / "two")
    assert {n: raw for n, (_, raw) in out.items()} == {n: raw for n, (_, raw) in two.items()}
    assert description(tmp_path / "out") == description(tmp_path / "two")


def test_a_stack_that_stays_has_entries_of_expert_0(tmp_path):
    """vllm-ascend looks those up for the experts of a layer."""
    model = FAMILIES["qwen3_5_moe"]()
    src = write_checkpoint(tmp_path / "in", model.tensors, model.config)
    run_convert(src, tmp_path / "out", "W8A8", format=ASCEND, ignore=("*.experts.*",))
    said = description(tmp_path / "out")
    at = "model.language_model.layers.0.mlp.experts."
    names = ["gate_up_proj", "down_proj"] + [f"0.{p}_proj.weight" for p in ("gate", "up", "down")]
    assert {said[at + name] for name in names} == {"FLOAT"}
    assert verify(tmp_path / "out").failures == []


def test_types_may_differ_between_layers_that_are_not_fused(source, tmp_path):
    """Experts in four bits and the rest in eight, as DeepSeek's checkpoints for Ascend have it."""
    recipe = {"format": "ascend", "scheme": "W8A8_DYNAMIC",
              "rule": [{"pattern": "*.experts.*", "scheme": "W4A8_DYNAMIC"}]}  # fmt: skip
    streamq.convert(source, tmp_path / "out", recipe=recipe)
    said = description(tmp_path / "out")
    assert said[DOWN + ".scale_bias"] == said[GATE + ".weight"] == "W4A8_DYNAMIC"
    assert said[Q + ".weight"] == said[Q + ".weight_offset"] == "W8A8_DYNAMIC"
    assert (said["model_quant_type"], said["group_size"]) == ("W8A8_DYNAMIC", 0)
    with open_checkpoint(source) as c:
        assert verify(tmp_path / "out", c).failures == []
    # A third type for what is left, beside the two that are kept.
    streamq.convert(
        tmp_path / "out", tmp_path / "more", "w8a16", format="ascend", only=["*mlp.gate"]
    )


# --- names and options ------------------------------------------------------------------------

NAMES = [
    (("w8a8",), "ascend", "W8A8", ALL), (("int8",), "ascend", "W8A8", ALL),
    (("W8A8_DYNAMIC",), None, "W8A8", ALL), (("w8a8_mxfp8",), "ascend", "MXFP8", 32),
    (("w4a4_mxfp4",), None, "MXFP4", 32), (("mxfp4",), "ascend", "MXFP4", 32),
    (("w4a8_mxfp",), "ascend", "W4A8_MXFP", 32), (("w4a8_mxfp",), None, "W4A8_MXFP", 32),
    (("w4a8",), "ascend", "W4A8", ALL), (("w4a8_dynamic",), None, "W4A8", ALL),
    (("w8a16",), "ascend", "W8A16", ALL), (("w4a16",), "ascend", "W4A16", ALL),
    (("w4a16", 64), "ascend", "W4A16", 64),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "fmt", "preset", "size"), NAMES)
def test_names_of_ascend_mean_what_they_mean_there(asked, fmt, preset, size, source):
    """Whole rows where no group size is asked for; elsewhere W8A16 has groups of 128."""
    plan = streamq.plan(source, asked[0], format=fmt, group_size=(*asked, None)[1])
    scheme = plan.options.scheme
    assert (plan.options.format.name, scheme.name, scheme.block[1]) == ("ascend", preset, size)
    rule = {"scheme": asked[0], **({"group_size": asked[1]} if asked[1:] else {})}
    plan = streamq.plan(source, recipe={"format": "ascend", **rule})
    assert plan.options.recipe.scheme == scheme
    assert options("w8a16").scheme.block[1] == 128


def test_names_of_ascend_are_for_its_format(source, tmp_path):
    """W4A8 of compressed-tensors has groups of 128, W4A8_DYNAMIC does not."""
    for name in ("w4a8_dynamic", "W8A8_MXFP8"):
        refused(f"{name} is a name of the format ascend, not of compressed-tensors", "convert",
                source, tmp_path / "out", "-s", name, "-f", "compressed-tensors")  # fmt: skip


def test_a_recipe_of_its_own_making_reads_back(source, tmp_path):
    """Group sizes are written, as whole rows are what a recipe for Ascend means by none."""
    result = run("allocate", source, "--target-bits", "7.2", "-f", "ascend", "--candidates",
                 "w4a16:32,w8a16:-1", "-o", tmp_path / "recipe.toml")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    text = (tmp_path / "recipe.toml").read_text()
    recipe = load(tmp_path / "recipe.toml", group_of=lambda fmt: ALL)
    assert {(s.name, s.block[1]) for s in recipe.schemes} == {("W4A16", 32), ("W8A16", ALL)}
    assert "group_size = 32" in text
    assert "group_size = -1" in text


def test_more_than_one_scale_a_row_is_refused(source, tmp_path):
    for name in ("w8a16", "w4a8"):
        args = ("-s", name, "-f", "ascend", "--group-size", 64)
        refused("one scale for each row, not groups of 64; .* use --group-size -1", "convert",
                source, tmp_path / "out", *args)  # fmt: skip


PLAN = {
    "scales of W4A8_MXFP in pairs": (
        "W4A8_MXFP", {LAYER + "self_attn.o_proj": (64, 96)}, {},
        "'model.layers.0.self_attn.o_proj.weight'.* 96 columns .* of 64, as W4A8_MXFP"),
    "scales of experts in pairs": (
        "MXFP8", {DOWN: (64, 96)}, {}, "96 columns are no multiple of 64, as experts"),
    "rows that fill no words": ("W4A8", {DOWN: (60, 64)}, {}, "60 rows are no multiple of 8"),
    "rows that fill no words with up": ("W4A8", {GATE: (62, 64)}, {}, "62 rows .* of 4"),
    "columns that have no partner": ("W4A16", {Q: (64, 63)}, {}, "63 columns are odd"),
    "sums of uneven parts": ("W4A8", {DOWN: (64, 40)}, {}, "40 columns are no multiple of 16"),
    "a projection of another name": (
        "W4A8", {LAYER + "mlp.experts.0.fc9": (64, 64)}, {},
        "sums of rows for projections called up_proj"),
    "no experts": ("W4A8", {Q: (64, 64)}, {}, "nothing to quantize: .*1 x not an expert"),
    "experts in part": (
        "W8A8", {GATE: (64, 64), UP: (64, 64), GATE.replace("0.g", "1.g"): (64, 64),
                 UP.replace("0.u", "1.u"): (64, 64)},
        {"ignore": ("*experts.1*",)},
        "gate_proj' is W8A8_DYNAMIC and .*experts.1.gate_proj' is FLOAT.*one type"),
    "a name that begins another": (
        "W8A8", {LAYER + "mlp.proj": (64, 64), LAYER + "mlp.proj_in": (64, 64)},
        {"ignore": ("*proj_in",)}, "'model.layers.0.mlp.proj' is W8A8_DYNAMIC.*takes it for FLOAT"),
}  # fmt: skip


@pytest.mark.parametrize("case", PLAN)
def test_what_no_loader_reads_is_refused_in_the_plan(case, tmp_path):
    preset, shapes, how, message = PLAN[case]
    tensors = {name + ".weight": weight(name, *shape) for name, shape in shapes.items()}
    src = write_checkpoint(tmp_path / "in", tensors, CONFIG)
    group = ALL if preset in ("W4A8", "W4A16") else None
    with open_checkpoint(src) as c, pytest.raises(PlanError, match=message):
        make_plan(c, Options(resolve(preset, group), format=ASCEND, **how))


def test_a_linear_layer_pads_what_experts_do_not(tmp_path):
    src = write_checkpoint(tmp_path / "in", {Q + ".weight": weight("x", 64, 96)}, CONFIG)
    run_convert(src, tmp_path / "out", "MXFP8", format=ASCEND)
    assert tensors_of(tmp_path / "out")[Q + ".weight_scale"][0].shape == (64, 3)
    assert verify(tmp_path / "out").failures == []


@pytest.mark.parametrize(("one", "other", "message"), [
    ({"scheme": "mxfp8"}, {"scheme": "w4a8"}, "group_size is 32 .* beside W4A8_DYNAMIC"),
    ({"scheme": "mxfp8"}, {"scheme": "w4a16", "group_size": 64}, "groups of 64 .* and of 32 "),
    ({"scheme": "w4a16", "group_size": 32}, {"scheme": "w4a8"}, "beside W4A8_DYNAMIC"),
])  # fmt: skip
def test_one_group_size_for_all(one, other, message, source):
    """The file names one, which vllm-ascend gives to every type that has groups."""
    recipe = {"format": "ascend", **one, "rule": [{"pattern": "*.experts.*", **other}]}
    with pytest.raises(PlanError, match=message):
        streamq.plan(source, recipe=recipe)


def test_rows_that_have_no_partner(tmp_path):
    src = write_checkpoint(tmp_path / "in", {Q + ".weight": weight("x", 63, 64)}, CONFIG)
    how = Options(resolve("W4A16", 32), format=ASCEND)
    with open_checkpoint(src) as c, pytest.raises(PlanError, match="63 rows are odd"):
        make_plan(c, how)


def test_groups_of_another_format_are_not_taken_for_rows(source, tmp_path):
    """W8A16 in groups is no W8A16 here, and cannot stay beside another type."""
    run_convert(source, tmp_path / "ct", "W8A16", format=CT, group_size=32)
    with pytest.raises(PlanError, match="W8A16, which the format ascend cannot hold; --requantize"):
        run_convert(tmp_path / "ct", tmp_path / "out", "MXFP8", format=ASCEND)
    run_convert(tmp_path / "ct", tmp_path / "out", "MXFP8", format=ASCEND, requantize=True)
    assert verify(tmp_path / "out").failures == []


def test_what_only_mindie_loads_is_said(source, tmp_path):
    said = streamq.plan(source, "w4a16", format="ascend").warnings
    assert any("no W4A16 for linear layers" in line for line in said)
    assert any("no W4A16 for experts" in line for line in said)
    model = FAMILIES["mixtral"]()
    src = write_checkpoint(tmp_path / "in", model.tensors, model.config)
    (line,) = streamq.plan(src, "w8a8", format="ascend").warnings
    assert "does not know the experts of the model_type 'mixtral'" in line
    assert streamq.plan(source, "w8a8", format="ascend").warnings == []


# --- repacking --------------------------------------------------------------------------------

REPACKED = [
    ("W8A8", None, "W8A8", None), ("W8A16", ALL, "W8A16", ALL), ("W4A8", ALL, "W4A8", ALL),
    ("W4A16", ALL, "W4A16", ALL), ("W4A16", 32, "W4A16", 32), ("MXFP8", None, "MXFP8", None),
    ("MXFP4", None, "MXFP4", None), ("MXFP4", None, "W4A8_MXFP", None),
    ("MXFP4A16", None, "MXFP4", None),
]  # fmt: skip


@pytest.mark.parametrize(("theirs", "group", "preset", "size"), REPACKED)
def test_codes_of_compressed_tensors_stay(theirs, group, preset, size, source, tmp_path):
    """There and back: codes bit for bit, scales where both dtypes hold them."""
    only = ("*.experts.*",)
    run_convert(source, tmp_path / "ct", theirs, format=CT, group_size=group, only=only)
    run_convert(tmp_path / "ct", tmp_path / "out", preset, format=ASCEND, group_size=size)
    with open_checkpoint(tmp_path / "ct") as c:
        assert verify(tmp_path / "out", c).failures == []
    assert description(tmp_path / "out")[DOWN + ".weight"] == TENSORS[preset, size][0]
    back = "MXFP4" if preset == "W4A8_MXFP" else preset
    run_convert(tmp_path / "out", tmp_path / "back", back, format=CT, group_size=size)
    assert not (tmp_path / "back" / FILE).exists()
    folders = [tmp_path / n for n in ("ct", "out", "back")]
    found = []
    for folder in folders:
        with open_checkpoint(folder) as c:
            stored = find_stored(c)
            assert len(stored) == 6
            found.append({n: read_rows(c, s, 0, s.layout.rows) for n, s in stored.items()})
    for name, q in found[0].items():
        for other in found[1:]:
            assert other[name].codes.tobytes() == q.codes.tobytes(), name
            assert np.array_equal(other[name].scale.astype("f4"), q.scale.astype("f4")), name


# --- moving ---------------------------------------------------------------------------------------


def test_reindex_moves_and_does_not_rename(made, tmp_path):
    result = run("reindex", made("W8A8"), tmp_path / "out", "--shard-size", "20kB")
    assert result.exit_code == 0, result.stderr
    assert description(tmp_path / "out") == description(made("W8A8"))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG
    assert verify(tmp_path / "out").failures == []
    for option in (("--fuse",), ("--split",), ("--rename", "model=m")):
        refused("does not change; --fuse, --split and --rename", "reindex", made("W8A8"),
                tmp_path / "no", *option)  # fmt: skip


def test_inspect_tells_the_method(made):
    assert "quantized: ascend" in run("inspect", made("W8A8")).output


def test_values_are_those_of_the_reference(made):
    """What a reader gets is code times scale, whatever the bytes."""
    for preset, group in PAIRS:
        scheme = ASCEND.concrete(resolve(preset, group))
        with open_tensors(made(preset, group)) as tensors:
            want = dequantize(quantize(moe()[DOWN + ".weight"], scheme), scheme)
            assert np.array_equal(tensors[DOWN + ".weight"], want), preset
