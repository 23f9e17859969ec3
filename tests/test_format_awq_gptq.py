"""AWQ and GPTQ against a plain writing of their owners' rules, number by number.

What every format must do is in test_formats.py.
"""

import json

import numpy as np
import pytest
from helpers import run_convert, tensors_of, write_checkpoint

from streamq.checkpoint import open_checkpoint
from streamq.errors import CheckpointError, PlanError, StreamqError
from streamq.formats import FORMATS, format_of
from streamq.formats.awq import zeros_width
from streamq.schemes import Quantized, resolve
from streamq.stored import find_stored, open_tensors
from streamq.tensors import DTYPES
from streamq.verifying import verify

RNG = np.random.default_rng(0)
OUT, IN, GROUP = 16, 64, 32
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def i32(words):
    """Python integers below 2^32 as int32."""
    return np.array(words, np.uint32).view(np.int32)


def packed(values, bits, order=None):
    """Each line of codes as words; ``order[i]`` of so many is at place i."""
    per = 32 // bits
    order = order or range(per)
    return [
        [sum(int(line[w + order[i]]) << (i * bits) for i in range(per))
         for w in range(0, len(line), per)]
        for line in values
    ]  # fmt: skip


def numbers(bits=4, rows=OUT, cols=IN, group=GROUP):
    """Unsigned codes ``[out, in]`` and zero points, scales f16 ``[out, groups]``."""
    codes = RNG.integers(0, 1 << bits, (rows, cols))
    zeros = RNG.integers(0, 1 << bits, (rows, cols // group))
    return codes, zeros, (RNG.random((rows, cols // group)) + 0.5).astype(np.float16)


def values(codes, zeros, scales, g_idx=None):
    g_idx = np.arange(codes.shape[1]) // GROUP if g_idx is None else g_idx
    return ((codes - zeros[:, g_idx]) * scales[:, g_idx].astype(np.float32)).astype(np.float32)


def awq_gemm(codes, zeros, scales):
    return {
        "qweight": i32(packed(codes.T, 4, AWQ_ORDER)),
        "qzeros": i32(packed(zeros.T, 4, AWQ_ORDER)),
        "scales": np.ascontiguousarray(scales.T),
    }


def awq_gemv(codes, zeros, scales, width):
    wide = [list(map(int, line)) + [0] * (8 * width - len(line)) for line in zeros]
    padded = np.zeros((len(scales), 8 * width), np.float16)
    padded[:, : scales.shape[1]] = scales
    return {"qweight": i32(packed(codes, 4)), "qzeros": i32(packed(wide, 4)), "scales": padded}


def gptq(codes, zeros, scales, bits, version, g_idx=None):
    less = sum(1 << at for at in range(0, 32, bits)) if version == 1 else 0
    words = packed(zeros.T, bits)
    return {
        "qweight": np.ascontiguousarray(i32(packed(codes, bits)).T),
        "qzeros": i32([[(w - less) % 2**32 for w in line] for line in words]),
        "scales": np.ascontiguousarray(scales.T),
        "g_idx": np.arange(codes.shape[1]).astype("i4") // GROUP if g_idx is None else g_idx,
    }


CASES = [
    ("awq", 4, True), ("awq_gemv", 4, True),
    *[("gptq", bits, False) for bits in (4, 8)],
    *[("gptq_v2", bits, asym) for bits in (4, 8) for asym in (False, True)],
]  # fmt: skip


def preset(bits, asym):
    return f"W{bits}A16" + "_ASYM" * asym


@pytest.mark.parametrize(("name", "bits", "asym"), CASES)
def test_packing_by_hand(name, bits, asym):
    codes, zeros, scales = numbers(bits)
    half = 1 << (bits - 1)
    if not asym:
        zeros[:] = half
    if name == "awq":
        wanted = awq_gemm(codes, zeros, scales)
    elif name == "awq_gemv":
        wanted = awq_gemv(codes, zeros, scales, 4)
    else:
        wanted = gptq(codes, zeros, scales, bits, 2 if name == "gptq_v2" else 1)
    fmt = FORMATS[name]
    scheme = fmt.concrete(resolve(preset(bits, asym), GROUP))
    layout = fmt.layout(OUT, IN, "BF16", scheme)
    assert {e.suffix for e in layout.entries} == wanted.keys()
    signed = (codes - half).astype(np.int8), scales, (zeros - half).astype(np.int8)
    q = Quantized(*signed) if asym else Quantized(*signed[:2])
    for e in layout.entries:
        want = wanted[e.suffix]
        assert (DTYPES[e.dtype].numpy, e.shape) == (want.dtype, want.shape)
        made = e.value if e.role == "constant" else fmt.pack(e.role, q, layout, scheme).tobytes()
        assert made == want.tobytes(), e.suffix


# --- whole files ---------------------------------------------------------------------------

M = "model.layers.0.self_attn.o_proj"


def checkpoint(folder, parts, quantization, module=M):
    config = {"model_type": "llama", "dtype": "float16", "quantization_config": quantization}
    return write_checkpoint(folder, {f"{module}.{k}": v for k, v in parts.items()}, config)


def awq_config(**more):
    return {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True,
            "version": "gemm", **more}  # fmt: skip


def gptq_config(**more):
    return {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False,
            "desc_act": False, **more}  # fmt: skip


def found_values(folder):
    with open_tensors(folder) as tensors:
        assert list(tensors.stored) == [M + ".weight"]
        return tensors[M + ".weight"]


@pytest.mark.parametrize(
    "more",
    [{}, {"version": "GEMM"}, {"zero_point": False}, {"modules_to_not_convert": None},
     {"modules_to_not_convert": ["lm_head", "visual"]}, {"version": None, "format": "gemm"}],
)  # fmt: skip
def test_awq_as_others_spell_it(more, tmp_path):
    parts = numbers()
    src = checkpoint(tmp_path / "in", awq_gemm(*parts), awq_config(**more))
    assert np.array_equal(found_values(src), values(*parts))
    assert verify(src).failures == []


@pytest.mark.parametrize("version", ["gemv", "GEMV"])
def test_awq_gemv_is_read_and_becomes_gemm(version, tmp_path):
    parts = numbers()
    src = checkpoint(tmp_path / "in", awq_gemv(*parts, 4), awq_config(version=version))
    assert np.array_equal(found_values(src), values(*parts))
    assert verify(src).failures == []  # padded scales are 0
    options = {"format": FORMATS["awq"], "group_size": GROUP}
    run_convert(src, tmp_path / "out", "W4A16_ASYM", **options)
    out = tensors_of(tmp_path / "out")
    for suffix, wanted in awq_gemm(*parts).items():
        assert out[f"{M}.{suffix}"][1] == wanted.tobytes()


@pytest.mark.parametrize(
    ("cols", "group", "width"),
    [(4096, 128, 4), (1152, 128, 2), (4096, 64, 8), (576, 64, 2), (4096, 32, 16), (32, 32, 4),
     (1056, 32, 8)],
)  # fmt: skip
def test_gemv_rounds_its_groups_up(cols, group, width):
    assert zeros_width(cols, group) == width


def test_awq_that_is_not_known(tmp_path):
    for more, message in [
        ({"version": "llm-awq"}, "AWQ of version 'llm-awq' is not known; gemm and gemv are"),
        ({"bits": 3}, "AWQ of 3 bits"),
        ({"group_size": -1}, "AWQ of group_size -1"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert .* list of names"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            found_values(checkpoint(tmp_path, awq_gemm(*numbers()), awq_config(**more)))
    parts = awq_gemm(*numbers())
    del parts["qzeros"]
    with pytest.raises(CheckpointError, match=r"o_proj.qzeros' is absent, W4A16_ASYM has I32"):
        found_values(checkpoint(tmp_path, parts, awq_config(zero_point=False)))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_version_1_borrows_across_codes_as_gptqmodel_does(bits, tmp_path):
    """A zero point of 0 becomes a word with a borrow, which adding the same word undoes."""
    codes, zeros, scales = numbers(bits)
    zeros[:, 0] = 0
    zeros[:: 32 // bits, 1] = 0
    parts = gptq(codes, zeros, scales, bits, 1)
    lone = sum(((1 << bits) - 1) << at for at in range(0, 32, bits))
    borrowed = i32([-sum(1 << at for at in range(0, 32, bits)) % 2**32])[0]
    assert (parts["qzeros"][0] == borrowed).all()
    assert borrowed != i32([lone])[0]  # not each code on its own
    src = checkpoint(tmp_path, parts, gptq_config(bits=bits))
    assert np.array_equal(found_values(src), values(codes, zeros, scales))
    parts["qzeros"] = gptq(codes, zeros, scales, bits, 2)["qzeros"]
    src = checkpoint(tmp_path, parts, gptq_config(bits=bits, checkpoint_format="gptq_v2"))
    assert np.array_equal(found_values(src), values(codes, zeros, scales))


@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_act_order_is_read_but_not_repacked(version, asym, tmp_path):
    rows = 24
    codes, zeros, scales = numbers(rows=rows)
    if not asym:
        zeros[:] = 8
    g_idx = RNG.permutation(IN).astype("i4") // GROUP
    named = "gptq" if version == 1 else "gptq_v2"
    config = gptq_config(desc_act=True, sym=not asym, checkpoint_format=named)
    parts = gptq(codes, zeros, scales, 4, version, g_idx)
    src = checkpoint(tmp_path / "in", parts, config)
    wanted = values(codes, zeros, scales, g_idx)
    assert np.array_equal(found_values(src), wanted)
    assert not np.array_equal(wanted, values(codes, zeros, scales))
    run_convert(src, tmp_path / "f32", "F32")
    assert tensors_of(tmp_path / "f32")[M + ".weight"][1] == wanted.tobytes()
    with open_checkpoint(tmp_path / "f32") as c:
        assert verify(src, c).failures == []

    name = preset(4, asym)
    for fmt in ("compressed-tensors", "gptq_v2"):
        with pytest.raises(PlanError, match=r"W4A16\w* \(act-order\).*; --requantize converts"):
            run_convert(src, tmp_path / "no", name, format=FORMATS[fmt], group_size=GROUP)
    run_convert(src, tmp_path / "again", name, format=FORMATS["gptq_v2"], group_size=GROUP,
                requantize=True)  # fmt: skip
    run_convert(tmp_path / "f32", tmp_path / "direct", name, format=FORMATS["gptq_v2"],
                group_size=GROUP)  # fmt: skip
    again, direct = tensors_of(tmp_path / "again"), tensors_of(tmp_path / "direct")
    assert {n: d for n, (_, d) in again.items()} == {n: d for n, (_, d) in direct.items()}


def test_a_group_per_row_has_no_order(tmp_path):
    codes, zeros, scales = numbers(group=IN)
    parts = gptq(codes, zeros, scales, 4, 2) | {"g_idx": np.zeros(IN, "i4")}
    more = {"group_size": -1, "desc_act": True, "checkpoint_format": "gptq_v2"}
    src = checkpoint(tmp_path / "in", parts, gptq_config(**more))
    with open_checkpoint(src) as c:
        assert [s.scheme.name for s in find_stored(c).values()] == ["W4A16_ASYM"]
    wanted = ((codes - zeros) * scales.astype("f4")).astype("f4")
    assert np.array_equal(found_values(src), wanted)
    run_convert(src, tmp_path / "ct", "W4A16_ASYM", group_size=-1)
    assert np.array_equal(found_values(tmp_path / "ct"), wanted)


def spoil(part, change):
    def spoiled():
        codes, zeros, scales = numbers()
        zeros[:] = 8
        parts = gptq(codes, zeros, scales, 4, 1)
        change(parts[part])
        return parts

    return spoiled


def turn(g_idx):
    g_idx[:] = g_idx[::-1]


def beyond(g_idx):
    g_idx[5] = 2


def shift(words):
    words[0, 0] += 1


@pytest.mark.parametrize(
    ("parts", "more", "message"),
    [
        (spoil("g_idx", turn), {}, "o_proj.weight': g_idx is not that of groups in order"),
        (spoil("g_idx", beyond), {"desc_act": True}, "o_proj.weight': g_idx must name one of 2"),
        (spoil("qzeros", shift), {"sym": True}, "o_proj.weight': qzeros of a symmetric .* for 8"),
        (spoil("qzeros", shift), {"bits": 3}, "GPTQ of 3 bits is not read"),
        (spoil("qzeros", shift), {"group_size": 0}, "GPTQ of group_size 0"),
        (spoil("qzeros", shift), {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is"),
        (spoil("qzeros", shift), {"dynamic": {"+:(": {}}}, r"the pattern '\+:\(' of dynamic"),
        (spoil("qzeros", shift), {"dynamic": []}, None),
        (spoil("qzeros", shift), {"dynamic": ["x"]}, "dynamic .* must be an object"),
        (spoil("qzeros", shift), {"modules_in_block_to_quantize": "x"}, "must be lists of names"),
        (spoil("qzeros", shift), {"modules_in_block_to_quantize": ["mlp"]}, "config.json ignores"),
        (spoil("qzeros", shift), {"dynamic": {"-:.*o_proj": {}}}, "config.json ignores"),
        (spoil("qzeros", shift), {"bits": 8}, r"o_proj.\w+' is I32 .*, W8A16_ASYM has"),
    ],
)
def test_gptq_that_is_not_as_it_says(parts, more, message, tmp_path):
    src = checkpoint(tmp_path, parts(), gptq_config(**more))
    if message is None:
        found_values(src)
        return
    with pytest.raises(CheckpointError, match=message):
        found_values(src)


def test_dynamic_rules_of_a_source(tmp_path):
    """The first that matches the beginning of a name; the others are as the config says."""
    dynamic = {"-:^model\\.layers\\.1\\..*": {}, "+:.*down_proj": {"bits": 8, "sym": True},
               ".*\\.up_proj$": {"group_size": 64}}  # fmt: skip
    config = {"quantization_config": gptq_config(dynamic=dynamic)}
    scheme_of, _ = format_of(config).rules(config)
    assert scheme_of("model.layers.1.mlp.down_proj") is None
    assert scheme_of("lm_head") is None
    found = [scheme_of(f"model.layers.0.mlp.{leaf}_proj") for leaf in ("down", "up", "gate")]
    assert [(s.name, s.block) for s in found] == [
        ("W8A16", (1, 32)), ("W4A16_ASYM", (1, 64)), ("W4A16_ASYM", (1, 32)),
    ]  # fmt: skip


# --- what is written -----------------------------------------------------------------------


def model(folder, layers=2, router=False):
    names = [f"model.layers.{i}.{m}" for i in range(layers) for m in ("mlp.up_proj", "mlp.gate")]
    names = [n for n in names if router or not n.endswith("gate")] + ["lm_head"]
    tensors = {n + ".weight": RNG.standard_normal((32, 128)).astype("f4") for n in names}
    config = {"model_type": "qwen3_moe" if router else "llama", "torch_dtype": "float32"}
    return write_checkpoint(folder, tensors, config)


def written(folder, fmt, name, **options):
    run_convert(folder, folder.parent / "out", name, format=FORMATS[fmt], **options)
    config = json.loads((folder.parent / "out" / "config.json").read_text())
    assert verify(folder.parent / "out").failures == []
    return config


def test_config_of_gptq(tmp_path):
    config = written(model(tmp_path / "in"), "gptq_v2", "W8A16_ASYM", group_size=-1)
    assert config["torch_dtype"] == "float16"
    assert "dtype" not in config
    assert config["quantization_config"] == {
        "quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": 8, "group_size": -1,
        "sym": False, "desc_act": False, "lm_head": False, "pack_dtype": "int32",
    }  # fmt: skip


def test_config_of_gptq_says_what_is_left_out(tmp_path):
    config = written(model(tmp_path / "in", router=True), "gptq", "W4A16")["quantization_config"]
    assert config["dynamic"] == {f"-:^model\\.layers\\.{i}\\.mlp\\.gate$": {} for i in (0, 1)}
    assert config["modules_in_block_to_quantize"] == [["mlp.up_proj"]]
    assert config["checkpoint_format"] == "gptq"


def test_config_of_gptq_where_one_layer_is_left_out(tmp_path):
    folder = model(tmp_path / "in")
    made = written(folder, "gptq", "W4A16", ignore=("model.layers.1.*",))["quantization_config"]
    assert made["dynamic"] == {"-:^model\\.layers\\.1\\.mlp\\.up_proj$": {}}
    assert made["modules_in_block_to_quantize"] == [["model.layers.0.mlp.up_proj"]]


def test_config_of_awq(tmp_path):
    config = written(model(tmp_path / "in"), "awq_gemv", "W4A16_ASYM")
    assert config["quantization_config"] == {
        "quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True,
        "version": "gemv", "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip


def test_config_of_awq_says_what_is_left_out_to_gptqmodel_too(tmp_path):
    config = written(model(tmp_path / "in", router=True), "awq", "W4A16_ASYM")
    gates = [f"model.layers.{i}.mlp.gate" for i in (0, 1)]
    assert config["quantization_config"]["modules_to_not_convert"] == ["lm_head", *gates]
    assert list(config["quantization_config"]["dynamic"]) == [
        f"-:^model\\.layers\\.{i}\\.mlp\\.gate$" for i in (0, 1)
    ]


@pytest.mark.parametrize(
    ("fmt", "name", "shape", "group", "message"),
    [
        ("awq", "W4A16_ASYM", (12, 128), None, r"shape \[12, 128\]: 12 rows are no multiple of 8"),
        ("awq", "W4A16_ASYM", (16, 96), None, "96 columns, not a multiple of the 1x128 block"),
        ("awq", "W4A16_ASYM", (16, 96), 48, "awq needs a group size that 32 divides"),
        ("awq", "W4A16_ASYM", (16, 96), -1, "awq needs a group size that 32 divides"),
        ("awq", "W4A16", (16, 128), None, "awq cannot hold W4A16; it holds W4A16_ASYM"),
        ("awq_gemv", "W4A16_ASYM", (16, 256), 256, "awq_gemv needs a group size of 32, 64 or 128"),
        ("gptq", "W4A16", (12, 128), None, r"shape \[12, 128\]: 12 rows are no multiple of 8"),
        ("gptq", "W8A16", (6, 128), None, "6 rows are no multiple of 4, which gptq needs"),
        ("gptq_v2", "W4A16", (16, 100), -1, "100 columns are no multiple of 8, which gptq_v2"),
        ("gptq", "W4A16", (16, 96), 48, "gptq needs a group size of 16, 32, .* got 48"),
        ("gptq", "W4A16_ASYM", (16, 128), None, "gptq cannot hold W4A16_ASYM; it holds W4A16, W8"),
    ],
)
def test_what_cannot_be_written_is_said_in_the_plan(fmt, name, shape, group, message, tmp_path):
    weight = RNG.standard_normal(shape).astype("f4")
    src = write_checkpoint(tmp_path / "in", {M + ".weight": weight})
    with pytest.raises(StreamqError, match=message):
        run_convert(src, tmp_path / "out", name, format=FORMATS[fmt], group_size=group)


def test_versions_of_gptq_differ_in_zeros_alone(tmp_path):
    src = model(tmp_path / "in")
    for fmt in ("gptq", "gptq_v2"):
        run_convert(src, tmp_path / fmt, "W4A16", format=FORMATS[fmt])
    one, two = tensors_of(tmp_path / "gptq"), tensors_of(tmp_path / "gptq_v2")
    assert one.keys() == two.keys()
    differ = {name.rpartition(".")[2] for name in one if one[name][1] != two[name][1]}
    assert differ == {"qzeros"}
    run_convert(tmp_path / "gptq", tmp_path / "again", "W4A16", format=FORMATS["gptq_v2"])
    assert tensors_of(tmp_path / "again") == two
