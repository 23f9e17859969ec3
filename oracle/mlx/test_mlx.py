"""What mlx and mlx-lm make of our MLX and AWQ outputs is what we say it is, and back.

mlx-lm loads our outputs of a small random llama and computes with them what it computes
with our dequantized weights; its own quantized checkpoints have the values we read. On a
CPU, and in f32, where mlx computes a value as we do: the product rounded, then the sum.
"""

import json
import shutil

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from helpers import run_convert
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from streamq.kernels.reference import dequantize

from streamq.checkpoint import open_checkpoint
from streamq.errors import StreamqError
from streamq.formats import FORMATS
from streamq.formats.mlx import BITS, GROUPS
from streamq.schemes import resolve
from streamq.stored import find_stored, open_tensors, read_rows

DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}
NUMPY = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
VOCAB = 512
TOKENS = mx.array(np.arange(96).reshape(2, 48) * 7 % VOCAB)
CONFIG = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
AFFINE = [
    *[(f"W{b}A16_ASYM", g) for b in BITS if b != 8 for g in GROUPS],
    *[(f"W{b}A16", g) for b in BITS for g in GROUPS],
]
OTHERS = [("MXFP4A16", None), ("MXFP8A16", None), ("NVFP4A16", None)]
MODES = {"MXFP4A16": "mxfp4", "MXFP8A16": "mxfp8", "NVFP4A16": "nvfp4"}

# Bounds of the largest difference of logits, which spread by 1.5: affine weights give the same
# to the bit, the other modes are summed in another order, which makes 0.0001.
CLOSE = {"affine": 1e-5, "mxfp4": 3e-4, "mxfp8": 3e-4, "nvfp4": 3e-4}
# One step of the zero point or of the scale, in one row of one projection of fourteen, is 0.01.
SEEN = 5e-3


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    """A random model in each dtype, whose rows differ in size and in their mean."""
    folder = tmp_path_factory.mktemp("llamas")
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(CONFIG))
    for _, module in model.named_modules():
        if isinstance(module, nn.Linear):
            rows, cols = module.weight.shape
            size = mx.exp(mx.random.normal((rows, 1)) / 2)
            module.weight = (mx.random.normal((rows, cols)) + mx.random.normal((rows, 1))) * (
                size / cols**0.5
            )
    for dtype, kind in DTYPES.items():
        model.set_dtype(kind)
        save_model(folder / dtype, model)
        (folder / dtype / "config.json").write_text(json.dumps(CONFIG | {"torch_dtype": dtype}))
    return folder


def _loaded(folder, **values):
    """The model that mlx-lm loads, in f32; ``values`` are weights that are put in place."""
    model, _ = load_model(folder)
    model.load_weights([(name, mx.array(w)) for name, w in values.items()], strict=False)
    model.set_dtype(mx.float32)
    return model


def _logits(model):
    return np.array(model(TOKENS))


def _apart(a, b):
    assert a.shape == b.shape == (*TOKENS.shape, VOCAB)
    assert np.isfinite(a).all()
    assert np.isfinite(b).all()
    assert 1 < a.std() < 10
    return np.abs(a - b).max()


def _codes_of(folder):
    """Codes, scales and what else there is of each module, by our reading."""
    with open_checkpoint(folder) as c:
        return {s.module: (read_rows(c, s, 0, s.layout.rows), s.scheme)
                for s in find_stored(c).values()}  # fmt: skip


def _values_of(folder):
    with open_tensors(folder) as t:
        return {name: t[name] for name in t.stored}


def _same_bits(a, b):
    """Stricter than equal: -0 is not 0."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("preset", "group"), AFFINE + OTHERS)
def test_mlx_lm_computes_with_our_values(preset, group, dtype, llamas, tmp_path):
    """And quantizes the modules that we quantized, in the mode that we said."""
    out = tmp_path / "out"
    run_convert(llamas / dtype, out, preset, group_size=group, format=FORMATS["mlx"])
    model = _loaded(out)
    scheme = FORMATS["mlx"].concrete(next(iter(_codes_of(out).values()))[1])
    made = {name: m for name, m in model.named_modules() if hasattr(m, "bits")}
    values = _values_of(out)
    assert {name + ".weight" for name in made} == values.keys()
    assert len(made) == 14  # neither embedding nor output head
    for m in made.values():
        assert isinstance(m, nn.QuantizedLinear)
        said = (m.bits, m.group_size, m.mode)
        assert said == (scheme.bits, scheme.block[1], MODES.get(preset, "affine"))
    found, close = _logits(model), CLOSE[MODES.get(preset, "affine")]
    assert _apart(found, _logits(_loaded(llamas / dtype, **values))) < close

    # The bound is tight enough to see scales of the row before, and one step in one row.
    m = made["model.layers.1.self_attn.o_proj"]
    for part in {"scales", "biases"} & m.keys():
        right = m[part]
        one = np.array(right)
        one[7] += np.array(m.scales)[7] if part == "biases" else one[7].dtype.type(1)
        for wrong in (mx.roll(right, 1, 0), mx.array(one)):
            m[part] = wrong
            assert _apart(found, _logits(model)) > SEEN
        m[part] = right


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("preset", "group"), AFFINE + OTHERS)
def test_mx_dequantize_gives_our_values(preset, group, dtype, llamas, tmp_path):
    """Every bit, with scales and biases in f32; in 16 bits mlx rounds product and sum to them."""
    out = tmp_path / "out"
    run_convert(llamas / dtype, out, preset, group_size=group, format=FORMATS["mlx"])
    tensors = mx.load(str(out / "model.safetensors"))
    for module, (q, scheme) in _codes_of(out).items():
        w, s, b = (tensors.get(f"{module}.{part}") for part in ("weight", "scales", "biases"))
        ours = dequantize(q, scheme)
        how = {"group_size": scheme.block[1], "bits": scheme.bits}
        if b is None:
            for kind in DTYPES:
                theirs = mx.dequantize(w, s, mode=MODES[preset], dtype=DTYPES[kind], **how)
                theirs = np.array(theirs.astype(mx.float32))
                assert _same_bits(theirs, ours.astype(NUMPY[kind]).astype("f4")), (module, kind)
            continue
        f32 = mx.dequantize(w, s.astype(mx.float32), b.astype(mx.float32), **how)
        assert _same_bits(np.array(f32), ours), module
        theirs = np.array(mx.dequantize(w, s, b, **how).astype(mx.float32))
        kind = NUMPY[dtype]
        block = scheme.block[1]
        code = q.codes.astype("f4") + (1 << scheme.bits - 1)
        product = (code * q.scale.astype("f4").repeat(block, 1)).astype(kind).astype("f4")
        rounded = (product + q.bias.repeat(block, 1)).astype(kind).astype("f4")
        assert np.array_equal(theirs, rounded), module


@pytest.mark.parametrize("bits", BITS)
def test_mlx_packs_codes_as_we_read_them(bits):
    """Its own quantization: codes that are known, read back with its scales and biases."""
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (16, 128)).astype("f4")
    codes[:, ::32], codes[:, 1::32] = 0, (1 << bits) - 1
    w, s, b = mx.quantize(mx.array(codes), 32, bits)
    fmt, scheme = FORMATS["mlx"], resolve(f"W{bits}A16_ASYM", 32)
    layout = fmt.layout(16, 128, "F32", scheme)
    arrays = {"codes": np.array(w), "scale": np.array(s), "bias": np.array(b)}
    q = fmt.unpack(arrays, layout, scheme)
    assert np.array_equal(dequantize(q, scheme), codes)


# --- what mlx-lm writes ------------------------------------------------------------------

THEIRS = [
    *[("affine", b, g) for b in BITS for g in GROUPS],
    ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16),
]  # fmt: skip


def _written_by_mlx_lm(source, folder, mode, bits, group, predicate=None):
    """As ``mlx_lm.convert -q`` does it, which wants a tokenizer too."""
    model, config = load_model(source)
    model, config = quantize_model(model, config, group, bits, mode, quant_predicate=predicate)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("mode", "bits", "group"), THEIRS)
def test_their_checkpoints_have_the_values_we_read(mode, bits, group, dtype, llamas, tmp_path):
    """Embedding and head too; back in f32 mlx-lm computes the same."""
    src = _written_by_mlx_lm(llamas / dtype, tmp_path / "in", mode, bits, group)
    values = _values_of(src)
    assert len(values) == 16
    tensors = mx.load(str(src / "model.safetensors"))
    for name, ours in values.items():
        module = name.removesuffix(".weight")
        w, s, b = (tensors.get(f"{module}.{part}") for part in ("weight", "scales", "biases"))
        if b is not None:
            s, b = s.astype(mx.float32), b.astype(mx.float32)
        theirs = mx.dequantize(w, s, b, group, bits, mode, dtype=mx.float32)
        assert _same_bits(np.array(theirs), ours), name
    run_convert(src, tmp_path / "out", "F32")
    back = _loaded(tmp_path / "out")
    names = {name for name, _ in tree_flatten(back.parameters())}
    assert not any("scales" in name for name in names)
    assert values.keys() <= names
    assert _apart(_logits(_loaded(src)), _logits(back)) < CLOSE[mode]


def test_modules_with_parameters_of_their_own(llamas, tmp_path):
    """Mixed bits and modules left out, as mlx-lm's recipes write them."""

    def predicate(path, module):
        if "down_proj" in path:
            return {"group_size": 64, "bits": 6, "mode": "affine"}
        if "v_proj" in path:
            return {"group_size": 32, "bits": 8, "mode": "mxfp8"}
        return "gate_proj" not in path and "lm_head" not in path

    src = _written_by_mlx_lm(llamas / "bfloat16", tmp_path / "in", "affine", 4, 32, predicate)
    run_convert(src, tmp_path / "out", "F32")
    assert len(_values_of(src)) == 13
    assert _apart(_logits(_loaded(src)), _logits(_loaded(tmp_path / "out"))) < CLOSE["mxfp8"]


def test_biases_that_are_no_zero_points_are_not_repacked(llamas, tmp_path):
    """Nothing is written then."""
    src = _written_by_mlx_lm(llamas / "bfloat16", tmp_path / "in", "affine", 4, 64)
    with pytest.raises(StreamqError, match="has a bias that is no zero point times its scale"):
        run_convert(src, tmp_path / "out", "W4A16_ASYM", group_size=64,
                    format=FORMATS["compressed-tensors"])  # fmt: skip
    assert not (tmp_path / "out").exists()


# --- other formats that mlx-lm loads -------------------------------------------------------


@pytest.mark.parametrize("group", [32, 64, 128])
def test_mlx_lm_loads_awq(group, llamas, tmp_path):
    """It turns zero points into biases, rounded to f16; with them it computes our values."""
    out = tmp_path / "out"
    run_convert(llamas / "float16", out, "W4A16_ASYM", group_size=group, format=FORMATS["awq"])
    model = _loaded(out)
    values, exact = {}, {}
    for module, (q, scheme) in _codes_of(out).items():
        zero = q.zero_point.astype("f4") + 8
        bias = (-zero * q.scale.astype("f4")).astype(np.float16).astype("f4")
        code = q.codes.astype("f4") + 8
        values[module + ".weight"] = code * q.scale.astype("f4").repeat(group, 1) + bias.repeat(
            group, 1
        )
        exact[module + ".weight"] = dequantize(q, scheme)
    assert len(values) == 14
    found = _logits(model)
    assert _apart(found, _logits(_loaded(llamas / "float16", **values))) < CLOSE["affine"]
    plain = _logits(_loaded(llamas / "float16", **exact))
    assert np.abs(_log_softmax(found) - _log_softmax(plain)).mean() < 0.005


def _log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_a_repacked_checkpoint_loads(llamas, tmp_path):
    """compressed-tensors to MLX: the same codes."""
    run_convert(llamas / "bfloat16", tmp_path / "ct", "W4A16_ASYM", group_size=64)
    run_convert(tmp_path / "ct", tmp_path / "mlx", "W4A16_ASYM", group_size=64,
                format=FORMATS["mlx"])  # fmt: skip
    run_convert(llamas / "bfloat16", tmp_path / "direct", "W4A16_ASYM", group_size=64,
                format=FORMATS["mlx"])  # fmt: skip
    one, two = (mx.load(str(tmp_path / f / "model.safetensors")) for f in ("mlx", "direct"))
    assert one.keys() == two.keys()
    assert all(mx.array_equal(one[name], two[name]) for name in one)
    shutil.rmtree(tmp_path / "ct")
    assert _apart(_logits(_loaded(tmp_path / "mlx")), _logits(_loaded(tmp_path / "direct"))) == 0
