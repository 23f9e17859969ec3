"""ModelOpt and DeepSeek's fp8: their scales, their config, and the sources they come as."""

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import run_convert, tensors_of, write_checkpoint
from streamq.kernels.reference import dequantize, quantize

from streamq.checkpoint import open_checkpoint
from streamq.cli import cli
from streamq.errors import CheckpointError, PlanError
from streamq.formats import format_of, named
from streamq.formats.matching import clashing, with_head
from streamq.planning import Options, make_plan
from streamq.schemes import SCHEMES
from streamq.stored import open_tensors
from streamq.verifying import verify

BF16, E4M3, E8M0 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu
FLOATS = {"bf16": BF16, "f16": np.float16, "f32": np.float32}
MODELOPT, FP8, CT = named("modelopt"), named("fp8"), named("compressed-tensors")
POWERS = named("fp8", scale_fmt="ue8m0")
RANGE = np.float32(2688)
DOWN = "model.layers.0.mlp.down_proj"


def weight(seed=0, rows=256, cols=256, dtype=BF16):
    """Values whose 128x128 blocks and whose rows differ in size."""
    rng = np.random.default_rng(seed)
    size = rng.lognormal(-4, 1, (-(-rows // 128), -(-cols // 128)))
    size = size.repeat(128, 0).repeat(128, 1)[:rows, :cols]
    return (rng.standard_normal((rows, cols)) * size).astype(dtype)


def same_bytes(a, b):
    """Whether two checkpoints have the same tensors under the same names, to the bit."""
    one, two = tensors_of(a), tensors_of(b)
    shapes = [{n: (t.dtype, t.shape, raw) for n, (t, raw) in c.items()} for c in (one, two)]
    return shapes[0] == shapes[1]


def run(*args):
    return CliRunner().invoke(cli, [str(a) for a in args])


def refused(result, sentence):
    """Exit code 1 and one sentence."""
    import re

    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    assert re.search(f"^Error: .*{sentence}", line), line
    assert line.endswith(".")


# --- the global scale of NVFP4 ------------------------------------------------------------


def every(dtype):
    """All positive finite numbers of 16 bits, as f32."""
    values = np.arange(1, 1 << 15, dtype=np.uint16).view(dtype).astype(np.float32)
    return values[np.isfinite(values)]


@pytest.mark.parametrize("dtype", [BF16, np.float16], ids=["bf16", "f16"])
def test_every_short_amax_goes_there_and_back(dtype):
    """The multiplier is ModelOpt's own, and the divisor comes back to the bit."""
    amax = every(dtype)
    with np.errstate(over="ignore"):
        g = RANGE / amax
    amax, g = amax[np.isfinite(g)], g[np.isfinite(g)]
    assert len(g) > 31000
    stored = MODELOPT.pack_global(g, np.dtype(dtype))
    assert stored.dtype == np.float32
    assert np.array_equal(stored, amax / RANGE)
    assert np.array_equal(MODELOPT.unpack_global(stored), g)
    # The reciprocal, which is simpler, loses an eighth of them.
    assert 0.8 < np.mean(np.float32(1) / (np.float32(1) / g) == g) < 0.9


@pytest.mark.parametrize("dtype", [BF16, np.float16], ids=["bf16", "f16"])
def test_every_short_divisor_goes_there_and_back(dtype):
    """llm-compressor rounds the divisor itself to the weight's dtype."""
    g = every(dtype)
    g = g[(g > 2.0**-126) & (g < 2.0**126)]
    stored = MODELOPT.pack_global(g, np.dtype(dtype))
    assert np.array_equal(MODELOPT.unpack_global(stored), g)


def test_any_other_divisor_is_one_unit_away_at_most():
    g = np.exp(np.random.default_rng(0).uniform(-60, 60, 1 << 18)).astype(np.float32)
    back = MODELOPT.unpack_global(MODELOPT.pack_global(g, np.dtype("f4")))
    assert abs(back.view("i4") - g.view("i4")).max() == 1
    assert np.mean(back == g) > 0.85


@pytest.mark.parametrize("numerics", ["f32", "weight"])
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("preset", ["NVFP4", "NVFP4A16"])
def test_a_checkpoint_goes_there_and_back(preset, dtype, numerics, tmp_path):
    """compressed-tensors to ModelOpt and back: the same bytes, global scales included."""
    rng = np.random.default_rng(1)
    tensors = {
        f"model.layers.{i}.mlp.down_proj.weight": weight(i, 4, 32, FLOATS[dtype])
        * FLOATS[dtype](rng.lognormal(0, 2))
        for i in range(40)
    }
    src = write_checkpoint(tmp_path / "in", tensors)
    run_convert(src, tmp_path / "ct", preset, format=CT, numerics=numerics)
    run_convert(tmp_path / "ct", tmp_path / "modelopt", preset, format=MODELOPT)
    run_convert(tmp_path / "modelopt", tmp_path / "back", preset, format=CT)
    assert not same_bytes(tmp_path / "ct", tmp_path / "modelopt")
    assert same_bytes(tmp_path / "ct", tmp_path / "back")


def test_the_input_scale_is_the_reciprocal(tmp_path):
    src = write_checkpoint(tmp_path / "in", {DOWN + ".weight": weight()})
    run_convert(src, tmp_path / "ct", "NVFP4", format=CT, input_scale=24.0)
    run_convert(src, tmp_path / "modelopt", "NVFP4", format=MODELOPT, input_scale=24.0)
    divisor = tensors_of(tmp_path / "ct")[DOWN + ".input_global_scale"][1]
    info, multiplier = tensors_of(tmp_path / "modelopt")[DOWN + ".input_scale"]
    assert (info.dtype, info.shape) == ("F32", ())
    assert np.frombuffer(divisor, "f4")[0] == 24
    assert np.frombuffer(multiplier, "f4")[0] == np.float32(1) / np.float32(24)


def test_an_input_scale_of_the_source_is_kept(tmp_path):
    """Calibrated ones differ from weight to weight, and are not overwritten by the constant."""
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(6)]
    tensors = {name + ".weight": weight(i) for i, name in enumerate(names)}
    src = write_checkpoint(tmp_path / "in", tensors)
    run_convert(src, tmp_path / "ct", "NVFP4", format=CT)
    scales = np.float32([[0.5], [3], [24], [100], [2688], [7]])
    rewrite(tmp_path / "ct", lambda found: found.update(
        {name + ".input_global_scale": s for name, s in zip(names, scales, strict=True)}
    ))  # fmt: skip
    run_convert(tmp_path / "ct", tmp_path / "modelopt", "NVFP4", format=MODELOPT)
    made = tensors_of(tmp_path / "modelopt")
    for name, s in zip(names, scales, strict=True):
        assert made[name + ".input_scale"][1] == (np.float32(1) / s).tobytes()
    run_convert(tmp_path / "modelopt", tmp_path / "back", "NVFP4", format=CT)
    assert same_bytes(tmp_path / "ct", tmp_path / "back")


# --- names, shapes, config ----------------------------------------------------------------

SHAPES = {
    "NVFP4": {
        "weight": ("U8", (256, 128)), "weight_scale": ("F8_E4M3", (256, 16)),
        "weight_scale_2": ("F32", ()), "input_scale": ("F32", ()),
    },
    "NVFP4A16": {
        "weight": ("U8", (256, 128)), "weight_scale": ("F8_E4M3", (256, 16)),
        "weight_scale_2": ("F32", ()),
    },
    "FP8_DYNAMIC": {"weight": ("F8_E4M3", (256, 256)), "weight_scale": ("F32", (256,))},
    "FP8_BLOCK": {"weight": ("F8_E4M3", (256, 256)), "weight_scale": ("F32", (2, 1, 2, 1))},
    "MXFP8": {"weight": ("F8_E4M3", (256, 256)), "weight_scale": ("U8", (256, 8))},
}  # fmt: skip
ALGOS = {
    "NVFP4": ("NVFP4", 16), "NVFP4A16": ("W4A16_NVFP4", 16), "MXFP8": ("MXFP8", 32),
    "FP8_DYNAMIC": ("FP8_PER_CHANNEL_PER_TOKEN", None), "FP8_BLOCK": ("fp8_pb_wo", None),
}  # fmt: skip


@pytest.mark.parametrize("preset", SHAPES)
def test_modelopt_writes_what_vllm_registers(preset, tmp_path):
    src = write_checkpoint(tmp_path / "in", {DOWN + ".weight": weight()})
    plan = run_convert(src, tmp_path / "out", preset, format=MODELOPT)
    found = {n.rpartition(".")[2]: (t.dtype, t.shape)
             for n, (t, _) in tensors_of(tmp_path / "out").items()}  # fmt: skip
    assert found == SHAPES[preset]
    flat = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    older = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    assert older == plan.files["hf_quant_config.json"]
    algo, size = ALGOS[preset]
    assert older["producer"]["name"] == "modelopt"
    assert older["quantization"] == {
        "quant_algo": algo, "kv_cache_quant_algo": None, "group_size": size,
        "exclude_modules": ["lm_head"],
    }  # fmt: skip
    assert (flat["quant_method"], flat["quant_algo"]) == ("modelopt", algo)
    assert (flat["ignore"], flat.get("group_size")) == (["lm_head"], size)
    weights_only = preset in ("NVFP4A16", "FP8_BLOCK")
    assert (flat["config_groups"]["group_0"]["input_activations"] is None) == weights_only


def test_modelopt_needs_whole_blocks_along_the_columns(tmp_path):
    src = write_checkpoint(tmp_path / "in", {DOWN + ".weight": weight(cols=200)})
    refused(
        run("convert", src, tmp_path / "out", "-s", "fp8_block", "-f", "modelopt"),
        rf"'{DOWN}.weight' of shape \[256, 200\].*multiple of 128; leave it with --ignore",
    )
    run_convert(src, tmp_path / "fp8", "FP8_BLOCK", format=FP8)
    refused(
        run("convert", tmp_path / "fp8", tmp_path / "out", "-s", "fp8_block", "-f", "modelopt"),
        rf"'{DOWN}.weight'.*multiple of 128",
    )


def test_a_scale_by_row_needs_no_memory_by_row(tmp_path):
    """Many rows, one scale each, in a tensor of one dimension."""
    x = np.zeros((150_000, 32), BF16)
    src = write_checkpoint(tmp_path / "in", {DOWN + ".weight": x})
    sizes = []
    for fmt in (CT, MODELOPT):
        with open_checkpoint(src) as c:
            scheme = SCHEMES["FP8_DYNAMIC"]
            sizes.append(make_plan(c, Options(scheme, format=fmt)).slab_memory)
    assert sizes[1] < 1.1 * sizes[0]


def test_names_within_names():
    layers = [f"model.layers.{i}.mlp." for i in range(12)]
    quantized = [layer + p for layer in layers[:1] for p in ("gate_proj", "up_proj")]
    ignore = [layer + "gate" for layer in layers] + ["model.layers.1.mlp.up_proj"]
    assert clashing(ignore, quantized) == {"model.layers.0.mlp.gate"}
    assert with_head(["b", "a"], quantized) == ["a", "b", "lm_head"]
    assert with_head(["a"], ["model.lm_head"]) == ["a"]


@pytest.mark.parametrize("fmt", [MODELOPT, FP8])
def test_a_router_beside_a_dense_layer_of_its_name(fmt, tmp_path):
    """Left out, read back as left out, and the layer whose name it starts is not."""
    layer = "model.layers.0.mlp."
    tensors = {layer + f"{p}_proj.weight": weight(i) for i, p in enumerate(("gate", "up"))}
    tensors[layer + "gate.weight"] = weight(2, 8)
    src = write_checkpoint(tmp_path / "in", tensors)
    run_convert(src, tmp_path / "out", "FP8_BLOCK", format=fmt)
    q = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    if fmt is MODELOPT:
        assert q["ignore"] == ["lm_head", layer + "gat[e]"]
    else:
        assert q["modules_to_not_convert"] == ["lm_head", layer + "gate$"]
        assert q["ignored_layers"] == ["lm_head", layer + "gate"]
    with open_checkpoint(src) as c:
        report = verify(tmp_path / "out", c)
    assert (report.failures, report.quantized) == ([], 2)
    rules, _ = fmt.rules({"quantization_config": q})
    assert rules(layer + "gate") is None
    assert rules(layer + "gate_proj") == fmt.concrete(SCHEMES["FP8_BLOCK"])


# --- ue8m0 ----------------------------------------------------------------------------------


def test_ue8m0_rounds_scales_up_to_powers_of_two(tmp_path):
    x = weight()
    src = write_checkpoint(tmp_path / "in", {DOWN + ".weight": x})
    result = run("convert", src, tmp_path / "out", "-s", "fp8_block", "-f", "fp8",
                 "--scale-fmt", "ue8m0")  # fmt: skip
    assert result.exit_code == 0, result.output
    q = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert q == {
        "activation_scheme": "dynamic", "fmt": "e4m3", "modules_to_not_convert": ["lm_head"],
        "quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128],
    }  # fmt: skip
    info, raw = tensors_of(tmp_path / "out")[DOWN + ".weight_scale_inv"]
    assert (info.dtype, info.shape) == ("F32", (2, 2))
    scale = np.frombuffer(raw, "f4").reshape(2, 2)
    exact = quantize(x, FP8.concrete(SCHEMES["FP8_BLOCK"])).scale
    assert np.array_equal(scale, np.exp2(np.ceil(np.log2(exact))))
    assert (exact < scale).all()
    run_convert(src, tmp_path / "api", "FP8_BLOCK", format=POWERS)
    assert same_bytes(tmp_path / "out", tmp_path / "api")
    with open_checkpoint(src) as c:
        assert verify(tmp_path / "out", c).failures == []


def test_ue8m0_is_not_promised_of_other_scales(tmp_path):
    """A loader would round them; the other way they are scales like any."""
    src = write_checkpoint(tmp_path / "in", {DOWN + ".weight": weight()})
    run_convert(src, tmp_path / "f32", "FP8_BLOCK", format=FP8)
    args = ("convert", tmp_path / "f32", tmp_path / "powers", "-s", "fp8_block", "-f", "fp8",
            "--scale-fmt", "ue8m0")  # fmt: skip
    refused(run(*args), "--requantize")
    assert run(*args, "--requantize").exit_code == 0
    run_convert(src, tmp_path / "again", "FP8_BLOCK", format=POWERS)
    plan = run_convert(tmp_path / "again", tmp_path / "copy", "FP8_BLOCK", format=POWERS)
    assert plan.verbatim
    run_convert(tmp_path / "again", tmp_path / "plain", "FP8_BLOCK", format=FP8)
    assert same_bytes(tmp_path / "again", tmp_path / "plain")
    assert "scale_fmt" not in (tmp_path / "plain" / "config.json").read_text()


def test_scale_fmt_belongs_to_fp8(tmp_path):
    src = write_checkpoint(tmp_path / "in", {DOWN + ".weight": weight()})
    out = tmp_path / "out"
    alone = run("convert", src, out, "-s", "fp8_block", "--scale-fmt", "ue8m0")
    refused(alone, "--scale-fmt")
    other = run("convert", src, out, "-s", "fp8_block", "-f", "modelopt", "--scale-fmt", "ue8m0")
    refused(other, "--scale-fmt does not apply to the format modelopt")
    assert run("convert", src, out, "-s", "nvfp4", "--scale-fmt", "float").exit_code == 2
    with pytest.raises(PlanError, match="--scale-fmt is ue8m0 or left out"):
        named("fp8", scale_fmt="e5m3")


# --- sources of others ----------------------------------------------------------------------

FP8_CONFIG = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
    "weight_block_size": [128, 128],
}  # fmt: skip


def coded(x, block=(128, 128), powers=False):
    """Codes and f32 scales of a weight, by the reference, and the values they stand for."""
    scheme = replace(
        SCHEMES["FP8_BLOCK"], scale="f32", block=block, power_of_two=powers, activation=None
    )
    q = quantize(x, scheme)
    return q.codes, q.scale, dequantize(q, scheme)


def deepseek(folder, quantization=None, scale=lambda s: s, nested=False, **kw):
    """A checkpoint as DeepSeek's, the scale of one weight in another shard than its codes."""
    tensors, values = {}, {}
    for i, name in enumerate(("gate", "up", "down")):
        module = f"model.layers.0.mlp.{name}_proj"
        codes, scales, values[module + ".weight"] = coded(weight(i, 320 - 64 * (i < 2)), **kw)
        tensors[module + ".weight"] = codes
        tensors[module + ".weight_scale_inv"] = scale(scales)
    tensors["model.norm.weight"] = np.ones(256, BF16)
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 1, "torch_dtype": "bfloat16"}
    quantization = FP8_CONFIG | (quantization or {})
    if nested:
        config["text_config"] = {"quantization_config": quantization}
    else:
        config["quantization_config"] = quantization
    shards = [list(tensors)[:5], list(tensors)[5:]]
    return write_checkpoint(folder, tensors, config, shards), values


SOURCES = {
    "f32": {},
    "bf16": {"scale": lambda s: s.astype(BF16)},
    "f32 powers": {"powers": True, "quantization": {"scale_fmt": "ue8m0"}},
    "e8m0": {"powers": True, "scale": lambda s: s.astype(E8M0)},
    "u8": {"powers": True, "scale": lambda s: s.astype(E8M0).view(np.uint8)},
    "64x32": {"block": (64, 32), "quantization": {"weight_block_size": [64, 32]}},
    "text_config": {"nested": True},
    "ignore": {"quantization": {"modules_to_not_convert": ["lm_head", "mlp.gate"]}},
}


@pytest.mark.parametrize("kind", SOURCES)
def test_fp8_of_others_is_read(kind, tmp_path):
    src, values = deepseek(tmp_path / "in", **SOURCES[kind])
    with open_tensors(src) as found:
        assert sorted(found.names) == sorted([*values, "model.norm.weight"])
        for name, wanted in values.items():
            if kind == "bf16":
                assert np.allclose(found[name], wanted, rtol=2.0**-8, atol=0)
                values[name] = found[name]
            else:
                assert np.array_equal(found[name], wanted)
    run_convert(src, tmp_path / "bf16", "BF16")
    for name, (_, raw) in tensors_of(tmp_path / "bf16").items():
        if name in values:
            assert raw == values[name].astype(BF16).tobytes()
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert "quantization_config" not in config
    assert "quantization_config" not in config.get("text_config", {})

    if kind == "64x32":
        refused(run("convert", src, tmp_path / "ct", "-s", "fp8_block"), "--requantize")
        return
    run_convert(src, tmp_path / "ct", "FP8_BLOCK")
    with open_tensors(tmp_path / "ct") as found:
        assert all(np.array_equal(found[name], wanted) for name, wanted in values.items())
    assert run_convert(src, tmp_path / "copy", "FP8_BLOCK", format=FP8).verbatim == (
        kind in ("f32", "text_config", "ignore")
    )
    assert verify(tmp_path / "copy").failures == []
    with open_tensors(tmp_path / "copy") as found:
        assert all(np.array_equal(found[name], wanted) for name, wanted in values.items())


def rewrite(folder, change):
    """Change the tensors of a checkpoint of one shard."""
    tensors = {}
    for name, (t, raw) in tensors_of(folder).items():
        dtype = {"F8_E4M3": E4M3, "F32": np.float32, "U8": np.uint8, "BF16": BF16}[t.dtype]
        tensors[name] = np.frombuffer(raw, dtype).reshape(t.shape)
    change(tensors)
    config = json.loads((folder / "config.json").read_text())
    write_checkpoint(folder, tensors, config)


def put(suffix, make):
    def change(tensors):
        name = f"{DOWN}.{suffix}"
        tensors[name] = make(tensors[name])

    return change


def drop(suffix):
    return lambda tensors: tensors.pop(f"{DOWN}.{suffix}")


# format, preset: what is done to the tensors, what the sentence says
SPOILT = {
    "no scale": ("fp8", "FP8_BLOCK", drop("weight_scale_inv"),
                 f"'{DOWN}.weight' in model.safetensors is F8_E4M3 and has no weight_scale_inv"),
    "scale of another shape": (
        "fp8", "FP8_BLOCK", put("weight_scale_inv", lambda s: s[:, :1].copy()),
        rf"'{DOWN}.weight_scale_inv' is F32 \[2, 1\], FP8_BLOCK has F32 \[2, 2\]"),
    "no codes": ("fp8", "FP8_BLOCK", drop("weight"), f"'{DOWN}' has weight_scale_inv"),
    "codes of another dtype": ("fp8", "FP8_BLOCK", put("weight", lambda w: w.astype(BF16)),
                               rf"'{DOWN}.weight' is BF16 \[256, 256\]"),
    "no block scale": ("modelopt", "NVFP4", drop("weight_scale"), f"'{DOWN}' has input_scale"),
    "no global scale": ("modelopt", "NVFP4", drop("weight_scale_2"),
                        f"'{DOWN}.weight_scale_2' is absent, NVFP4 has F32"),
    "no input scale": ("modelopt", "NVFP4", drop("input_scale"),
                       f"'{DOWN}.input_scale' is absent, NVFP4 has F32"),
    "scale in two dimensions": (
        "modelopt", "FP8_DYNAMIC", put("weight_scale", lambda s: s.reshape(-1, 1)),
        rf"'{DOWN}.weight_scale' is F32 \[256, 1\], FP8_DYNAMIC has F32 \[256\]"),
    "blocks in two dimensions": (
        "modelopt", "FP8_BLOCK", put("weight_scale", lambda s: s.reshape(2, 2)),
        rf"'{DOWN}.weight_scale' is F32 \[2, 2\], FP8_BLOCK has F32 \[2, 1, 2, 1\]"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPOILT)
def test_tensors_that_do_not_fit_are_named(kind, tmp_path):
    fmt, preset, change, sentence = SPOILT[kind]
    src = write_checkpoint(tmp_path / "in", {DOWN + ".weight": weight()})
    run_convert(src, tmp_path / "made", preset, format=named(fmt))
    rewrite(tmp_path / "made", change)
    refused(run("convert", tmp_path / "made", tmp_path / "out", "-s", "bf16"), sentence)
    assert not (tmp_path / "out").exists()


# what quantization_config says, what the sentence says
UNKNOWN = {
    "method": ({"quant_method": "fp9"}, "the quantization 'fp9' is none that streamq reads"),
    "static": ({"activation_scheme": "static"}, "static scales of the activations"),
    "whole tensor": ({"weight_block_size": None}, "one scale for a whole tensor"),
    "block": ({"weight_block_size": [128]}, r"weight_block_size .* is \[128\], not two sizes"),
    "codes": ({"fmt": "e5m2"}, "fp8 with the fmt 'e5m2' is not known"),
    "names": ({"modules_to_not_convert": "lm_head"}, "must be a list of names"),
    "ModelOpt's static FP8": ({"quant_method": "modelopt", "quant_algo": "FP8"},
                              "the ModelOpt quant_algo 'FP8', which has one static scale"),
    "ModelOpt's other": ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"},
                         "the ModelOpt quant_algo 'NVFP4_AWQ' is none that streamq reads"),
    "a ModelOpt layer": (
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION",
         "quantized_layers": {DOWN: {"quant_algo": "FP8"}}},
        f"'{DOWN}': the ModelOpt quant_algo 'FP8'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_is_not_known_is_refused(kind, tmp_path):
    said, sentence = UNKNOWN[kind]
    codes, scale, _ = coded(weight())
    tensors = {DOWN + ".weight": codes, DOWN + ".weight_scale": scale}
    config = {"model_type": "llama", "quantization_config": FP8_CONFIG | said}
    src = write_checkpoint(tmp_path / "in", tensors, config)
    refused(run("convert", src, tmp_path / "out", "-s", "bf16"), sentence)


def test_modelopt_of_others_is_read(tmp_path):
    """Weights only by its groups, the older spelling, wildcards, one algorithm per layer."""
    nvfp4, weights = ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, {"num_bits": 4})
    groups = {"group_0": {"weights": weights, "input_activations": None}}
    older = {"quant_method": "modelopt_fp4", "quantization": {
        "quant_algo": "W4A16_NVFP4", "exclude_modules": ["lm_head", "*.self_attn*"]}}  # fmt: skip
    mixed = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {
        DOWN: {"quant_algo": "NVFP4", "group_size": 16}, "b": {"quant_algo": "FP8"},
        "c": {"quant_algo": "FP8_PB_WO"}}}  # fmt: skip

    def rules_of(q):
        config = {"quantization_config": q}
        assert format_of(config) is MODELOPT
        return MODELOPT.rules(config)[0]

    assert rules_of(nvfp4)(DOWN) == SCHEMES["NVFP4"]
    assert rules_of(nvfp4 | {"config_groups": groups})(DOWN) == SCHEMES["NVFP4A16"]
    assert rules_of(older)(DOWN) == SCHEMES["NVFP4A16"]
    assert rules_of(older)("lm_head") is None
    assert rules_of(older)("model.layers.1.self_attn.q_proj") is None
    scheme_of = rules_of(mixed)
    assert scheme_of(DOWN) == SCHEMES["NVFP4"]
    assert scheme_of("c") == MODELOPT.concrete(SCHEMES["FP8_BLOCK"])
    assert scheme_of("lm_head") is None
    with pytest.raises(CheckpointError, match=r"'b': the ModelOpt quant_algo 'FP8', which"):
        scheme_of("b")
