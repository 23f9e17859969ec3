"""Quantized checkpoints of others: read right, or refused in one sentence that names the tensor."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import tensors_of, write_checkpoint
from streamq.kernels.reference import dequantize, outer_scale, quantize

from streamq.cli import cli
from streamq.schemes import SCHEMES
from streamq.stored import open_tensors

BF16 = ml_dtypes.bfloat16
ROWS, COLS, GROUP = 64, 128, 32
LAYER = "model.layers.0."
Q, K, OUT, DOWN = (LAYER + p for p in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj",
                                       "mlp.down_proj"))  # fmt: skip


def run(*args):
    return CliRunner().invoke(cli, [*map(str, args)])


def convert(src, dst, *options):
    """A conversion that works, and an output that is what it says."""
    result = run("convert", src, dst, "-q", *options)
    assert result.exit_code == 0, result.stderr
    result = run("verify", dst, "--source", src, "-q")
    assert result.exit_code == 0, result.stderr


def refused(src, dst, message, *options):
    """Exit code 1 and one sentence, and nothing left."""
    result = run("convert", src, dst, "-q", *options)
    assert result.exit_code == 1, result.stderr or result.exception
    (sentence,) = result.stderr.splitlines()
    assert re.search(f"^Error: .*{message}", sentence), sentence
    assert sentence.endswith(".")
    assert "bug" not in sentence
    assert not dst.exists()


# --- INT4 as Kimi's checkpoints have it ----------------------------------------------------


def int4(seed, rows=ROWS, cols=COLS, shape_dtype=np.int32):
    """Tensors by suffix and the values they stand for; codes -7..7, the first column lowest."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-7, 8, (rows, cols))
    scale = (rng.random((rows, cols // GROUP)) * 0.01 + 0.001).astype(BF16)
    nibbles = (codes + 8).astype(np.uint32).reshape(rows, -1, 8)
    words = (nibbles << np.arange(0, 32, 4, dtype=np.uint32)).sum(2, dtype=np.uint32)
    tensors = {
        "weight_packed": words.view(np.int32),
        "weight_scale": scale,
        "weight_shape": np.array([rows, cols], shape_dtype),
    }
    return tensors, codes.astype("f4") * scale.astype("f4").repeat(GROUP, 1)


def plain(seed, rows=ROWS, cols=COLS):
    return (np.random.default_rng(seed).standard_normal((rows, cols)) * 0.02).astype(BF16)


def int_group(bits=4, size=GROUP, targets=("Linear",)):
    """A config group of integers, with observers that we do not write."""
    return {
        "input_activations": None, "output_activations": None, "targets": list(targets),
        "weights": {
            "actorder": None, "block_structure": None, "dynamic": False, "group_size": size,
            "num_bits": bits, "observer": "minmax", "observer_kwargs": {}, "strategy": "group",
            "symmetric": True, "type": "int",
        },
    }  # fmt: skip


def ct(*groups, **more):
    return {
        "config_groups": {f"group_{i}": g for i, g in enumerate(groups)},
        "format": "pack-quantized", "ignore": [], "kv_cache_scheme": None,
        "quant_method": "compressed-tensors", "quantization_status": "compressed", **more,
    }  # fmt: skip


KIMI = "language_model.model.layers."
KIMI_IGNORE = [
    "lm_head", "re:.*self_attn.*", "re:.*shared_experts.*",
    r"re:.*mlp\.(gate|up|gate_up|down)_proj.*", "re:vision_tower.*", "re:mm_projector.*",
]  # fmt: skip
EXPERTS = [f"{KIMI}1.mlp.experts.{e}.{p}_proj" for e in (0, 1) for p in ("gate", "up", "down")]
KIMI_PLAIN = [
    "language_model.model.embed_tokens", f"{KIMI}0.self_attn.q_a_proj",
    f"{KIMI}0.self_attn.kv_a_proj_with_mqa", f"{KIMI}0.mlp.gate_proj", f"{KIMI}0.mlp.up_proj",
    f"{KIMI}0.mlp.down_proj", f"{KIMI}1.mlp.gate", f"{KIMI}1.mlp.shared_experts.gate_proj",
    f"{KIMI}1.mlp.shared_experts.up_proj", "vision_tower.blocks.0.wqkv", "language_model.lm_head",
]  # fmt: skip


@pytest.fixture(params=[np.int32, np.int64], ids=["shape I32", "shape I64"])
def kimi(request, tmp_path):
    """Two routed experts in INT4, all else in bf16; the path, and the values of the experts."""
    tensors, values = {}, {}
    for i, name in enumerate(EXPERTS):
        parts, values[name + ".weight"] = int4(i, shape_dtype=request.param)
        tensors |= {f"{name}.{suffix}": array for suffix, array in parts.items()}
    tensors |= {f"{name}.weight": plain(i) for i, name in enumerate(KIMI_PLAIN)}
    tensors[f"{KIMI}1.mlp.gate.e_score_correction_bias"] = np.ones(2, "f4")
    text = {
        "model_type": "kimi_k2", "num_hidden_layers": 2, "dtype": "bfloat16",
        "quantization_config": ct(int_group(), ignore=KIMI_IGNORE),
    }  # fmt: skip
    config = {"model_type": "kimi_k25", "text_config": text, "dtype": "bfloat16"}
    names = sorted(tensors)
    shards = [names[::2], names[1::2]]  # codes here, scales there
    return write_checkpoint(tmp_path / "kimi", tensors, config, shards), values


def test_kimi_to_bf16(kimi, tmp_path):
    """The values of the codes; what was not quantized lies as it did; no word of a quantization."""
    source, values = kimi
    with open_tensors(source) as tensors:
        for name, want in values.items():
            assert np.array_equal(tensors[name], want)
    convert(source, tmp_path / "out", "-s", "bf16")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    left = {n for n in before if n.rpartition(".")[0] not in EXPERTS}
    assert after.keys() == left | values.keys()
    for name in left:
        assert after[name][1] == before[name][1]
    for name, want in values.items():
        assert after[name][0].dtype == "BF16"
        assert after[name][1] == want.astype(BF16).tobytes()
    assert "quantization" not in (tmp_path / "out" / "config.json").read_text()


def test_kimi_to_nvfp4(kimi, tmp_path):
    """From the values of the codes, gate and up of an expert under one global scale."""
    source, values = kimi
    refused(source, tmp_path / "out", "--requantize", "-s", "nvfp4a16")
    convert(source, tmp_path / "out", "-s", "nvfp4a16", "--requantize")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config["text_config"]
    ignore = config["quantization_config"]["ignore"]
    assert {n for n in KIMI_PLAIN if "embed" not in n} <= set(ignore)
    assert not set(EXPERTS) & set(ignore)
    scheme = SCHEMES["NVFP4A16"]
    out = tensors_of(tmp_path / "out")
    with open_tensors(tmp_path / "out") as found:
        assert found.stored.keys() == values.keys()
        for e in (0, 1):
            gate, up, down = (f"{KIMI}1.mlp.experts.{e}.{p}_proj" for p in ("gate", "up", "down"))
            for names in ((gate, up), (down,)):
                top = max(np.abs(values[n + ".weight"]).max() for n in names)
                for name in names:
                    x = values[name + ".weight"]
                    g = outer_scale(np.full(len(x), top, "f4"), scheme, np.dtype(BF16), "f32")
                    want = dequantize(quantize(x, scheme, outer=g), scheme)
                    assert np.array_equal(found[name + ".weight"], want), name
                    assert out[name + ".weight_global_scale"][1] == g[:1].tobytes()


def test_kimi_is_copied_or_repacked_where_it_can_be(kimi, tmp_path):
    """The same scheme again is a copy, and codes of -7..7 are codes of W4A16."""
    source, values = kimi
    done = run("convert", source, tmp_path / "same", "-s", "w4a16", "--group-size", "32")
    assert "copied as it is" in done.output
    for file in source.iterdir():
        assert (tmp_path / "same" / file.name).read_bytes() == file.read_bytes()
    convert(source, tmp_path / "gptq", "-s", "w4a16", "--group-size", "32", "-f", "gptq")
    with open_tensors(tmp_path / "gptq") as tensors:
        for name, want in values.items():
            close = np.abs(tensors[name] - want) <= np.abs(want) * 2.0**-11
            assert close.all()  # scales are f16 there


# --- sources that differ in one thing -------------------------------------------------------


def fp8(name, seed=0):
    """Tensors of a weight as DeepSeek has it, and its values."""
    q = quantize(plain(seed, 256, 256), SCHEMES["FP8_BLOCK"])
    scale = q.scale.astype("f4")
    values = q.codes.astype("f4") * scale.repeat(128, 0).repeat(128, 1)
    return {f"{name}.weight": q.codes, f"{name}.weight_scale_inv": scale}, values


FP8 = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
    "weight_block_size": [128, 128],
}  # fmt: skip


def model(quantization, tensors):
    """What ``write_checkpoint`` takes: tensors and config."""
    config = {"model_type": "llama", "num_hidden_layers": 1, "dtype": "bfloat16"}
    return tensors, config if quantization is None else config | {
        "quantization_config": quantization
    }


def parts(name, seed=0, **how):
    return {f"{name}.{suffix}": array for suffix, array in int4(seed, **how)[0].items()}


def test_fp8_with_scales_in_another_shard(tmp_path):
    first, a = fp8(Q, 1)
    second, b = fp8(K, 2)
    tensors, config = model(FP8, first | second | {"lm_head.weight": plain(0)})
    shards = [[n for n in tensors if "inv" in n], [n for n in tensors if "inv" not in n]]
    source = write_checkpoint(tmp_path / "in", tensors, config, shards)
    for scheme in ("bf16", "nvfp4a16"):
        convert(source, tmp_path / scheme, "-s", scheme, "--requantize")
    out = tensors_of(tmp_path / "bf16")
    assert out.keys() == {Q + ".weight", K + ".weight", "lm_head.weight"}
    for name, values in ((Q, a), (K, b)):
        assert out[name + ".weight"][1] == values.astype(BF16).tobytes()


def test_several_config_groups(tmp_path):
    """Each weight by the group that names it, exactly or by a regex."""
    eight = np.random.default_rng(1).integers(-128, 128, (ROWS, COLS)).astype(np.int8)
    row = np.full((ROWS, 1), 0.01, BF16)
    channel = int_group(8, None, [DOWN])
    channel["weights"]["strategy"] = "channel"
    channel["input_activations"] = {
        "num_bits": 8, "type": "int", "strategy": "token", "group_size": None,
        "block_structure": None, "symmetric": True, "dynamic": True,
    }  # fmt: skip
    quantization = ct(
        int_group(targets=["re:.*self_attn.*"]), channel, format="mixed-precision",
        ignore=["lm_head"],
    )  # fmt: skip
    more = {f"{DOWN}.weight": eight, f"{DOWN}.weight_scale": row, "lm_head.weight": plain(0)}
    source = write_checkpoint(tmp_path / "in", *model(quantization, parts(OUT, 3) | more))
    want = {OUT: int4(3)[1], DOWN: eight.astype("f4") * row.astype("f4")}
    with open_tensors(source) as tensors:
        assert {n: s.scheme.name for n, s in tensors.stored.items()} == {
            OUT + ".weight": "W4A16", DOWN + ".weight": "W8A8",
        }  # fmt: skip
        for name, values in want.items():
            assert np.array_equal(tensors[name + ".weight"], values)
    convert(source, tmp_path / "bf16", "-s", "bf16")
    out = tensors_of(tmp_path / "bf16")
    for name, values in want.items():
        assert out[name + ".weight"][1] == values.astype(BF16).tobytes()
    # One scheme is kept beside the other, or both become one.
    convert(source, tmp_path / "kept", "-s", "w4a16", "--group-size", "32")
    with open_tensors(tmp_path / "kept") as tensors:
        assert {s.scheme.name for s in tensors.stored.values()} == {"W4A16", "W8A8"}
    convert(source, tmp_path / "one", "-s", "nvfp4a16", "--requantize")
    with open_tensors(tmp_path / "one") as tensors:
        assert {s.scheme.name for s in tensors.stored.values()} == {"NVFP4A16"}
    refused(
        source, tmp_path / "gptq", f"'{DOWN}.weight' is quantized to W8A8.*gptq cannot hold",
        "-s", "w4a16", "--group-size", "32", "-f", "gptq",
    )  # fmt: skip


def without(tensors, *names):
    return {n: t for n, t in tensors.items() if n not in names}


def changed(tensors, name, array):
    return tensors | {name: array}


INT4 = ct(int_group())
INT8 = np.ones((ROWS, COLS), np.int8)
EXPERT = LAYER + "mlp.experts.down_proj"
HALF = parts(Q) | {K + ".weight": plain(1), DOWN + ".weight": plain(2)}
TO_W4 = ["-s", "w4a16", "--group-size", "32"]
TO_NVFP4 = ["-s", "nvfp4a16", "--requantize"]

# name: (quantization_config, tensors, what the sentence says); refused whatever is asked for
REFUSED = {
    "no scale": (INT4, without(parts(OUT), OUT + ".weight_scale"),
                 f"'{OUT}' has weight_packed, weight_shape: no .*weight_scale"),
    "no fp8 scale": (FP8, without(fp8(OUT)[0], OUT + ".weight_scale_inv"),
                     f"'{OUT}.weight' in .* is F8_E4M3 and has no weight_scale_inv"),
    "a scale of another shape": (
        INT4, changed(parts(OUT), OUT + ".weight_scale", np.ones((ROWS, 2), BF16)),
        rf"'{OUT}.weight_scale' is BF16 \[64, 2\], W4A16 has BF16 \[64, 4\]"),
    "a scale of one dimension": (
        INT4, changed(parts(OUT), OUT + ".weight_scale", np.ones(ROWS, BF16)),
        rf"'{OUT}.weight_scale' is BF16 \[64\], W4A16 has BF16 \[64, 4\]"),
    "a scale that is no float": (
        INT4, changed(parts(OUT), OUT + ".weight_scale", np.ones((ROWS, 4), np.int32)),
        f"'{OUT}.weight_scale' is I32, not a float"),
    "no codes": (INT4, without(parts(OUT), OUT + ".weight_packed"),
                 f"'{OUT}' has weight_scale, weight_shape: no weight of two dimensions"),
    "codes of one dimension": (
        INT4, changed(parts(OUT), OUT + ".weight_packed", np.ones(1024, np.int32)),
        f"'{OUT}' has .*weight_packed.*: no weight of two dimensions"),
    "codes of another dtype": (
        INT4, changed(parts(OUT), OUT + ".weight_packed", np.ones((ROWS, 16), np.uint8)),
        rf"'{OUT}.weight_packed' is U8 \[64, 16\], W4A16 has I32 \[64, 16\]"),
    "codes of another width": (
        INT4, changed(parts(OUT), OUT + ".weight_packed", np.ones((ROWS, 15), np.int32)),
        rf"'{OUT}.weight_packed' is I32 \[64, 15\], W4A16 has I32 \[64, 16\]"),
    "no shape": (INT4, without(parts(OUT), OUT + ".weight_shape"),
                 f"'{OUT}.weight_shape' is absent, not I64"),
    "a shape of floats": (INT4, changed(parts(OUT), OUT + ".weight_shape", np.ones(2, "f4")),
                          rf"'{OUT}.weight_shape' is F32 \[2\], not I64 \[2\]"),
    "a shape of other rows": (
        INT4, changed(parts(OUT), OUT + ".weight_shape", np.array([ROWS + 1, COLS])),
        f"'{OUT}': weight_shape says .65, 128., the codes have 64 rows"),
    "a shape of other columns": (
        INT4, changed(parts(OUT), OUT + ".weight_shape", np.array([ROWS, 2 * COLS])),
        f"'{OUT}.weight_(packed|scale)' is"),
    "a zero point too many": (
        INT4, changed(parts(OUT), OUT + ".weight_zero_point", np.ones((8, 4), np.int32)),
        rf"'{OUT}.weight_zero_point' is I32 \[8, 4\], W4A16 has absent"),
    "quantized, but ignored": (ct(int_group(), ignore=["re:.*o_proj"]), parts(OUT),
                               f"'{OUT}' is quantized, but config.json ignores it"),
    "quantized, but in no group": (ct(int_group(targets=[DOWN])), parts(OUT),
                                   f"'{OUT}' is quantized, but .* has no scheme for it"),
    "int8 without a scale": (ct(int_group(8)), {OUT + ".weight": INT8},
                             f"'{OUT}.weight' in .* is I8 and has no weight_scale"),
    "int8 without a config": (
        None, {OUT + ".weight": INT8, OUT + ".weight_scale": np.ones((ROWS, 1), BF16)},
        f"'{OUT}.weight_scale' belongs to a quantized weight.*no quantiz"),
    "int8 alone without a config": (None, {OUT + ".weight": INT8, DOWN + ".weight": plain(0)},
                                    f"'{OUT}.weight' in .* is I8 .*values are not known"),
    "fp8 alone without a config": (
        None, {OUT + ".weight": INT8.view(ml_dtypes.float8_e4m3fn), DOWN + ".weight": plain(0)},
        f"'{OUT}.weight' in .* is F8_E4M3 .*values are not known"),
    "packed without a config": (None, parts(OUT),
                                f"'{OUT}.weight_packed' belongs to a quantized weight.*has no"),
    "another format": (FP8, parts(OUT),
                       f"'{OUT}.weight_packed' belongs to a quantized weight.* the format fp8"),
    "codes of three dimensions": (
        INT4, changed(parts(OUT), OUT + ".weight_packed", np.ones((2, ROWS, 16), np.int32)),
        rf"'{OUT}.weight_packed' of shape \[2, 64, 16\] holds the experts of a layer"),
    "fp8 of three dimensions": (
        FP8, {OUT + ".weight": np.ones((2, 128, 128), ml_dtypes.float8_e4m3fn),
              OUT + ".weight_scale_inv": np.ones((2, 1, 1), "f4")},
        rf"'{OUT}.weight' of shape \[2, 128, 128\] holds the experts of a layer"),
    "groups in another order": (
        INT4, changed(parts(OUT), OUT + ".weight_g_idx", np.zeros(COLS, np.int32)),
        rf"'{OUT}.weight_g_idx' is I32 \[128\], W4A16 has absent"),
    "no rows": (INT4, changed(parts(OUT), OUT + ".weight_packed", np.ones((0, 16), np.int32)),
                rf"'{OUT}.weight_packed' of shape \[0, 16\] is empty"),
    "rows that do not fill a word": (
        {"quant_method": "awq", "version": "gemv"},
        {OUT + ".qweight": np.ones((1, 16), np.int32), OUT + ".qzeros": np.ones((1, 1), np.int32),
         OUT + ".scales": np.ones((1, 8), np.float16)},
        f"'{OUT}.qweight': 1 rows are no multiple of 8"),
    "rotated": (ct(int_group(), transform_config={"config_groups": {"u": {}}}), parts(OUT),
                "rotated as transform_config says"),
    "blocks of fewer experts": (
        {"quant_method": "mxfp4"},
        {EXPERT + "_blocks": np.ones((1, 32, 2, 16), np.uint8),
         EXPERT + "_scales": np.ones((2, 32, 2), np.uint8)},
        f"'{EXPERT}' has _blocks .*_scales .*: not the same number of experts"),
    "no experts": (
        {"quant_method": "mxfp4"},
        {EXPERT + "_blocks": np.ones((0, 32, 2, 16), np.uint8),
         EXPERT + "_scales": np.ones((0, 32, 2), np.uint8), DOWN + ".weight": plain(0)},
        f"'{EXPERT}' has .*: not the same number of experts"),
    "a group beyond 32 bits": (
        {"quant_method": "gptq", "group_size": 1 << 40},
        {OUT + ".qweight": np.ones((16, 64), np.int32), OUT + ".scales": np.ones((1, 64), "f2")},
        "GPTQ of group_size 1099511627776 is not known"),
    "a mode that is a list": (
        {"bits": 4, "group_size": 32, "mode": []},
        {OUT + ".weight": np.ones((64, 16), np.uint32), OUT + ".scales": np.ones((64, 4), BF16)},
        "the mode '..' of mlx"),
    "an unknown method": ({"quant_method": "bitsandbytes"}, parts(OUT),
                          "quantization 'bitsandbytes' is none that streamq reads: .*awq"),
    "no method": ({"bits": 4}, parts(OUT), "the quantization None is none that streamq reads"),
    "a list": ([{"quant_method": "awq"}], parts(OUT), "quantization_config must be an object"),
    "a string": ("awq", parts(OUT), "quantization_config must be an object"),
    "a number": (4, parts(OUT), "quantization_config must be an object"),
    "true": (True, parts(OUT), "quantization_config must be an object"),
    "a group that is a string": (ct("W4A16"), parts(OUT),
                                 "quantization_config has no config_groups"),
    "groups that are a list": (ct() | {"config_groups": [int_group()]}, parts(OUT),
                               "quantization_config has no config_groups"),
    "no groups": (ct(), parts(OUT), "quantization_config has no config_groups"),
    "targets that are a string": (ct(int_group() | {"targets": "Linear"}), parts(OUT),
                                  "targets of quantization_config must be a list of names"),
    "an ignore list of numbers": (ct(int_group(), ignore=[1]), parts(OUT),
                                  "ignore of quantization_config must be a list of names"),
    "a regex that is none": (ct(int_group(), ignore=["re:*"]), parts(OUT), "a pattern of quantiz"),
    "a scheme that is not known": (ct(int_group(9)), parts(OUT), "is none that streamq knows"),
    "a group size that is text": (ct(int_group(4, "32")), parts(OUT), "is none that streamq knows"),
    "weights that are a list": (ct(int_group() | {"weights": []}), parts(OUT),
                                "is none that streamq knows"),
}  # fmt: skip


@pytest.mark.parametrize("options", [["-s", "bf16"], TO_W4, TO_NVFP4], ids=["bf16", "kept", "re"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_source_that_is_not_as_it_says(case, options, tmp_path):
    quantization, tensors, message = REFUSED[case]
    source = write_checkpoint(tmp_path / "in", *model(quantization, tensors))
    refused(source, tmp_path / "out", message, *options)


def test_an_index_that_names_scales_that_no_shard_holds(tmp_path):
    """As published ones have done."""
    tensors, config = model(FP8, fp8(OUT)[0] | fp8(DOWN)[0])
    names = list(tensors)
    source = write_checkpoint(tmp_path / "in", tensors, config, [names[:2], names[2:]])
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    ghost = LAYER + "self_attn.v_proj.weight_scale_inv"
    index["weight_map"][ghost] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    refused(source, tmp_path / "out", f"holds tensor '{ghost}', but no shard has it", "-s", "bf16")


@pytest.mark.parametrize("options", [TO_NVFP4, TO_W4], ids=["requantized", "kept"])
def test_a_fused_group_that_is_quantized_in_part(options, tmp_path):
    """q in INT4 and k in bf16: loaders fuse them, and no scheme of one would be that of the other.

    Brought back to floats they are alike again.
    """
    source = write_checkpoint(tmp_path / "in", *model(ct(int_group(), ignore=[K, DOWN]), HALF))
    message = f"'{Q}.weight' is quantized .*and '{K}.weight' is not.*, but loaders fuse"
    refused(source, tmp_path / "out", message, *options)
    convert(source, tmp_path / "bf16", "-s", "bf16")
    convert(tmp_path / "bf16", tmp_path / "nvfp4", "-s", "nvfp4a16")
