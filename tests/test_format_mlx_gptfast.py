"""MLX and gpt-fast: bytes by their owners' rules, written here again, and what is refused."""

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from helpers import run_convert, tensors_of, write_checkpoint
from streamq.kernels import cpu, reference

from streamq.checkpoint import open_checkpoint
from streamq.errors import CheckpointError, PlanError, StreamqError
from streamq.formats import FORMATS, format_of
from streamq.formats.mlx import BITS
from streamq.schemes import ALL, SCHEMES, Quantized, resolve
from streamq.stored import find_stored, open_tensors, read_rows
from streamq.verifying import verify

MLX, GPT_FAST = FORMATS["mlx"], FORMATS["gpt-fast"]
BF16 = ml_dtypes.bfloat16
NAME = "model.layers.0.mlp.down_proj"
HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
FLOATS = {"BF16": BF16, "F16": np.float16, "F32": np.float32}


def matrix(rows=24, cols=256, dtype=BF16, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, cols)) * 0.02 + rng.standard_normal((rows, 1)) / 50).astype(
        dtype
    )


def model(folder, dtype=BF16, **more):
    tensors = {NAME + ".weight": matrix(dtype=dtype), EMBEDDING + ".weight": matrix(dtype=dtype)}
    return write_checkpoint(folder, {**tensors, HEAD + ".weight": matrix(dtype=dtype), **more})


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def number(codes, bits):
    """A row of codes as one number: the first in the lowest bits."""
    return sum(code << (i * bits) for i, code in enumerate(codes))


# --- MLX: what is written ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("preset", [p for p in MLX.presets if p.startswith("W")])
def test_affine_tensors(preset, group, dtype, tmp_path):
    src = model(tmp_path / "in", FLOATS[dtype])
    run_convert(src, tmp_path / "out", preset, group_size=group, format=MLX)
    out = tensors_of(tmp_path / "out")
    scheme = resolve(preset, group)
    bits, half = scheme.bits, 1 << (scheme.bits - 1)
    q = reference.quantize(matrix(dtype=FLOATS[dtype]), scheme)
    words, scales, biases = (out[f"{NAME}.{part}"] for part in ("weight", "scales", "biases"))
    assert (words[0].dtype, words[0].shape) == ("U32", (24, 256 * bits // 32))
    for tensor, _ in (scales, biases):
        assert (tensor.dtype, tensor.shape) == (dtype, (24, 256 // group))
    assert scales[1] == q.scale.tobytes()
    size = len(words[1]) // 24
    for row, codes in enumerate(q.codes):
        stored = int.from_bytes(words[1][row * size : (row + 1) * size], "little")
        assert stored == number([int(code) + half for code in codes], bits)
    zero = (
        np.full(q.scale.shape, half) if q.zero_point is None else q.zero_point.astype("i8") + half
    )
    bias = np.frombuffer(biases[1], FLOATS[dtype]).reshape(q.scale.shape)
    assert np.array_equal(bias, (-zero * q.scale.astype("f8")).astype("f4").astype(FLOATS[dtype]))


def test_mx_and_nvfp4_tensors(tmp_path):
    src = model(tmp_path / "in")
    for preset, shape, per_row in (
        ("MXFP4A16", (24, 32), 8), ("MXFP8A16", (24, 64), 8), ("NVFP4A16", (24, 32), 16),
    ):  # fmt: skip
        run_convert(src, tmp_path / preset, preset, format=MLX)
        out = tensors_of(tmp_path / preset)
        q = reference.quantize(matrix(), replace(SCHEMES[preset], two_level=False))
        (codes, data), (scales, scale_data) = out[NAME + ".weight"], out[NAME + ".scales"]
        assert (codes.dtype, codes.shape) == ("U32", shape)
        assert (scales.dtype, scales.shape) == ("U8", (24, per_row))
        assert scale_data == q.scale.tobytes()
        raw = q.codes.view(np.uint8)
        if preset != "MXFP8A16":
            raw = raw[:, 0::2] | raw[:, 1::2] << 4
        assert data == raw.tobytes()
        assert {n for n in out if n.startswith(NAME)} == {codes.name, scales.name}


def test_the_config(tmp_path):
    run_convert(model(tmp_path / "in"), tmp_path / "out", "W4A16_ASYM", group_size=64, format=MLX)
    config = config_of(tmp_path / "out")
    wanted = {"group_size": 64, "bits": 4, "mode": "affine", HEAD: False, EMBEDDING: False}
    assert config["quantization"] == config["quantization_config"] == wanted
    run_convert(model(tmp_path / "in8"), tmp_path / "out8", "W8A16", format=MLX)
    config = config_of(tmp_path / "out8")
    wanted |= {"group_size": 128, "bits": 8}
    assert config["quantization"] == wanted
    assert config["quantization_config"] == wanted | {"symmetric": True}
    run_convert(model(tmp_path / "in4"), tmp_path / "out4", "NVFP4A16", format=MLX)
    wanted |= {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    assert config_of(tmp_path / "out4")["quantization"] == wanted


def test_two_schemes_in_one_checkpoint(tmp_path):
    other = {"model.layers.1.mlp.down_proj.weight": matrix(seed=1),
             "model.layers.2.mlp.down_proj.weight": matrix(seed=2)}  # fmt: skip
    src = model(tmp_path / "in", **other)
    run_convert(src, tmp_path / "some", "W8A16", only=(NAME,), format=MLX)
    run_convert(tmp_path / "some", tmp_path / "all", "MXFP4A16", only=("*",), format=MLX)
    config = config_of(tmp_path / "all")
    assert config["quantization"] == {
        "group_size": 32, "bits": 4, "mode": "mxfp4", HEAD: False, EMBEDDING: False,
        NAME: {"group_size": 128, "bits": 8, "mode": "affine"},
    }  # fmt: skip
    assert config["quantization_config"][NAME]["symmetric"] is True
    report = verify(tmp_path / "all")
    assert (report.failures, report.quantized) == ([], 3)
    assert set(report.scheme.split(", ")) == {"W8A16", "MXFP4A16"}


def test_verify_sees_a_zero_point_off_by_one(tmp_path):
    src = write_checkpoint(tmp_path / "in", {NAME + ".weight": matrix()})
    run_convert(src, tmp_path / "out", "W4A16_ASYM", format=MLX)
    path = tmp_path / "out" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    with open_checkpoint(tmp_path / "out") as c:
        scales, biases = (c.tensors[f"{NAME}.{part}"] for part in ("scales", "biases"))
    scale = np.frombuffer(raw, BF16, 1, scales.start + 2 * 20)
    bias = np.frombuffer(raw, BF16, 1, biases.start + 2 * 20)
    raw[biases.start + 40 : biases.start + 42] = (bias + scale).tobytes()
    path.write_bytes(raw)
    with open_checkpoint(src) as source:
        (failure,) = verify(tmp_path / "out", source).failures
    assert f"'{NAME}.weight' at row 10, column 0" in failure


@pytest.mark.parametrize("group", [8, 40, 256, ALL])
def test_groups_that_mlx_has_no_kernel_for(group, tmp_path):
    with pytest.raises(PlanError, match="mlx needs a --group-size of 32, 64 or 128"):
        run_convert(model(tmp_path / "in"), tmp_path / "out", "W4A16", group_size=group, format=MLX)


def test_a_bias_beyond_its_dtype_names_the_tensor(tmp_path):
    x = matrix(dtype=np.float16)
    x[5, 200] = 6e4
    src = write_checkpoint(tmp_path / "in", {NAME + ".weight": x})
    with pytest.raises(StreamqError, match=f"'{NAME}.weight': the bias of group 1 in row 5 is not"):
        run_convert(src, tmp_path / "out", "W2A16", format=MLX)
    assert not (tmp_path / "out").exists()


# --- MLX: what is read -------------------------------------------------------------------


def foreign(folder, bits, group=32, dtype=BF16, seed=0, config=None, **change):
    """As mlx-lm writes: embedding and head too, scales of either sign, any float as bias."""
    rng = np.random.default_rng(seed)
    tensors, values = {}, {}
    for module in (NAME, EMBEDDING, HEAD):
        codes = rng.integers(0, 1 << bits, (24, 256))
        scales = rng.standard_normal((24, 256 // group)).astype(dtype)
        biases = rng.standard_normal((24, 256 // group)).astype(dtype) * dtype(9)
        raw = b"".join(number(row, bits).to_bytes(32 * bits, "little") for row in codes.tolist())
        tensors[module + ".weight"] = np.frombuffer(raw, "<u4").reshape(24, -1)
        tensors[module + ".scales"], tensors[module + ".biases"] = scales, biases
        s, b = (np.repeat(a.astype("f4"), group, 1) for a in (scales, biases))
        values[module + ".weight"] = (codes.astype("f4") * s).astype("f4") + b
    tensors = {n: t for n, t in (tensors | change).items() if t is not None}
    quantization = {"group_size": group, "bits": bits, **(config or {})}
    config = {"model_type": "llama", "quantization": quantization}
    return write_checkpoint(folder, tensors, config), values


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", BITS)
def test_any_scale_and_bias_is_read(bits, dtype, tmp_path):
    src, values = foreign(tmp_path / "in", bits, dtype=FLOATS[dtype])
    with open_tensors(src) as tensors:
        assert tensors.stored.keys() == values.keys()
        for name, wanted in values.items():
            assert np.array_equal(tensors[name], wanted), name
    run_convert(src, tmp_path / "f32", "F32")
    out = tensors_of(tmp_path / "f32")
    assert {n: d for n, (_, d) in out.items()} == {n: v.tobytes() for n, v in values.items()}
    assert "quantization" not in config_of(tmp_path / "f32")
    run_convert(src, tmp_path / "bf16", "BF16")
    assert tensors_of(tmp_path / "bf16")[NAME + ".weight"][1] == (
        values[NAME + ".weight"].astype(BF16).tobytes()
    )


def test_a_float_bias_is_not_repacked(tmp_path):
    src, _ = foreign(tmp_path / "in", 4)
    for fmt in ("compressed-tensors", "awq"):
        with pytest.raises(StreamqError, match="has a bias that is no zero point times its scale"):
            run_convert(src, tmp_path / fmt, "W4A16_ASYM", group_size=32, format=FORMATS[fmt])
    plan = run_convert(src, tmp_path / "out", "W4A16_ASYM", group_size=32, format=MLX)
    assert plan.verbatim


def test_a_quantized_embedding_is_brought_back_for_other_loaders(tmp_path):
    src, values = foreign(tmp_path / "in", 4)
    run_convert(src, tmp_path / "out", "W8A8", requantize=True)
    assert verify(tmp_path / "out").failures == []
    out = tensors_of(tmp_path / "out")
    assert NAME + ".weight_scale" in out
    for name in (EMBEDDING + ".weight", HEAD + ".weight"):
        assert out[name][1] == values[name].astype(BF16).tobytes()


def test_zero_points_come_back_as_they_were(tmp_path):
    """Every one of 2 to 6 bits, with scales of all mantissas, in all dtypes."""
    for bits in (2, 3, 4, 5, 6):
        scheme = resolve(f"W{bits}A16_ASYM", 32)
        for dtype in FLOATS.values():
            scale = np.geomspace(1, 2, 300).astype(dtype)[:, None].repeat(1 << bits, 1)
            half = 1 << (bits - 1)
            zero = np.broadcast_to(np.arange(-half, half, dtype="i1"), scale.shape)
            q = Quantized(np.zeros((300, 32 << bits), "i1"), scale, zero)
            layout = MLX.layout(300, 32 << bits, "F32", scheme)
            arrays = {"codes": reference.pack(q.codes, layout.packing), "scale": scale,
                      "bias": MLX.pack("bias", q, layout, scheme)}  # fmt: skip
            assert np.array_equal(MLX.unpack(arrays, layout, scheme).zero_point, zero)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (6, 64), (8, 128)])
def test_kernels_agree_on_biases(bits, group):
    rng = np.random.default_rng(0)
    scheme = resolve(f"W{bits}A16_ASYM", group)
    half = 1 << (bits - 1)
    codes = rng.integers(-half, half, (7, 256)).astype(np.int8)
    scale, bias = (rng.standard_normal((7, 256 // group)).astype("f4") for _ in range(2))
    q = Quantized(codes, scale, bias=bias)
    assert np.array_equal(cpu.dequantize(q, scheme), reference.dequantize(q, scheme))


def test_without_our_mark_codes_are_asymmetric(tmp_path):
    """As after mlx-lm saved it again: equal values, and zero points of 0."""
    run_convert(model(tmp_path / "in"), tmp_path / "out", "W4A16", format=MLX)
    with open_tensors(tmp_path / "out") as tensors:
        before = tensors[NAME + ".weight"]
    config = config_of(tmp_path / "out")
    config["quantization_config"] = config["quantization"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with open_checkpoint(tmp_path / "out") as c:
        s = find_stored(c)[NAME + ".weight"]
        q = read_rows(c, s, 0, 24)
    assert s.scheme == SCHEMES["W4A16_ASYM"]
    assert not q.zero_point.any()
    assert np.array_equal(reference.dequantize(q, s.scheme), before)
    run_convert(tmp_path / "out", tmp_path / "ct", "W4A16_ASYM")
    assert verify(tmp_path / "ct").failures == []


def test_biases_that_are_not_symmetric_as_said(tmp_path):
    src, _ = foreign(tmp_path / "in", 4)
    config = config_of(src)
    config["quantization_config"] = config["quantization"] | {"symmetric": True}
    (src / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"weight': its biases are not those of symmetric"):
        run_convert(src, tmp_path / "out", "BF16")


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({"bits": 7}, {}, "the mode 'affine' of mlx with 7 bits and groups of 32 is not known"),
        ({"group_size": 16}, {}, "with 4 bits and groups of 16 is not known"),
        ({"mode": "mxfp6"}, {}, "the mode 'mxfp6' of mlx"),
        ({"mode": "nvfp4"}, {}, "the mode 'nvfp4' of mlx with 4 bits and groups of 32"),
        ({NAME: False}, {}, f"'{NAME}' is quantized, but config.json ignores it"),
        ({"bits": 3}, {}, r"biases' is BF16 \[24, 8\], W3A16_ASYM has BF16 \[24, 11\]"),
        ({"group_size": 64}, {}, r"biases' is BF16 \[24, 8\], W4A16_ASYM has BF16 \[24, 4\]"),
        ({}, {NAME + ".biases": None}, rf"'{NAME}.biases' is absent"),
        ({}, {NAME + ".scales": None}, f"'{NAME}' has biases, weight: no weight of two"),
        ({}, {NAME + ".weight": np.zeros((2, 24, 32), "u4")}, "not the same number of experts"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(config, change, message, tmp_path):
    src, _ = foreign(tmp_path / "in", 4, config=config, **change)
    with pytest.raises(CheckpointError, match=message):
        run_convert(src, tmp_path / "out", "BF16")


def test_a_config_without_quantization(tmp_path):
    """Only quantization_config, which the Hub looks at; and others' are not taken for MLX's."""
    src, values = foreign(tmp_path / "in", 4)
    config = config_of(src)
    config["quantization_config"] = config.pop("quantization")
    (src / "config.json").write_text(json.dumps(config))
    with open_tensors(src) as tensors:
        assert np.array_equal(tensors[HEAD + ".weight"], values[HEAD + ".weight"])
    other = {"quant_method": "awq", "bits": 4, "group_size": 128}
    assert format_of({"quantization_config": other}).name == "awq"


# --- gpt-fast ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group", [None, ALL])
def test_gpt_fast_tensors(group, dtype, tmp_path):
    x = matrix(dtype=FLOATS[dtype])
    x[3] = 0
    src = write_checkpoint(tmp_path / "in", {NAME + ".weight": x, HEAD + ".weight": x})
    run_convert(src, tmp_path / "out", "W8A16", group_size=group, format=GPT_FAST)
    out = tensors_of(tmp_path / "out")
    w = x.astype("f4")
    scale = np.maximum(np.abs(w).max(1) / np.float32(127.5), np.finfo("f4").eps)
    codes = np.clip(np.rint(w / scale[:, None]), -128, 127).astype("i1")
    (weight, data), (scales, scale_data) = out[NAME + ".weight"], out[NAME + ".scales"]
    assert (weight.dtype, weight.shape, data) == ("I8", (24, 256), codes.tobytes())
    assert (scales.dtype, scales.shape) == (dtype, (24,))
    assert scale_data == scale.astype(FLOATS[dtype]).tobytes()
    assert config_of(tmp_path / "out")["quantization_config"] == {
        "quant_method": "gpt-fast", "bits": 8, "group_size": -1, "modules_to_not_convert": [HEAD],
    }  # fmt: skip
    with open_checkpoint(src) as source:
        assert verify(tmp_path / "out", source).failures == []


def test_gpt_fast_has_a_scale_a_row(tmp_path):
    src = model(tmp_path / "in")
    with pytest.raises(PlanError, match="one scale a row; leave out --group-size"):
        run_convert(src, tmp_path / "out", "W8A16", group_size=64, format=GPT_FAST)


@pytest.mark.parametrize("change", [{"bits": 4}, {"group_size": 32}])
def test_other_modes_of_gpt_fast_are_refused(change, tmp_path):
    run_convert(model(tmp_path / "in"), tmp_path / "out", "W8A16", format=GPT_FAST)
    config = config_of(tmp_path / "out")
    config["quantization_config"] |= change
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="gpt-fast of other than 8 bits"):
        run_convert(tmp_path / "out", tmp_path / "again", "BF16")


def test_gpt_fast_repacks_to_channels(tmp_path):
    run_convert(model(tmp_path / "in"), tmp_path / "out", "W8A16", format=GPT_FAST)
    run_convert(tmp_path / "out", tmp_path / "ct", "W8A16", group_size=ALL)
    with open_tensors(tmp_path / "out") as a, open_tensors(tmp_path / "ct") as b:
        assert np.array_equal(a[NAME + ".weight"], b[NAME + ".weight"])
