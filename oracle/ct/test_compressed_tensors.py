"""What compressed-tensors and transformers make of our output is what we say it is.

They are the reference: their decompression against our unpack and dequantize, their
compression against our bytes, their presets against our config, and the model that
transformers loads against the source model with our values in it. All of it on a CPU.
"""

import json
import re

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.compressors.mx_utils import decompress_mx_scale
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import (
    QuantizationConfig,
    apply_quantization_config,
    preset_name_to_scheme,
)
from helpers import run_convert, write_checkpoint
from safetensors.torch import load_file
from streamq.kernels.reference import dequantize
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from streamq.checkpoint import open_checkpoint
from streamq.schemes import SCHEMES, resolve
from streamq.stored import find_stored, read_rows


def _preset(name, targets):
    """Their preset; of asymmetric integers they name the 4-bit one only."""
    if name.endswith("_ASYM"):
        preset = preset_name_to_scheme("W4A16_ASYM", targets)
        preset.weights.num_bits = resolve(name).bits
        return preset
    return preset_name_to_scheme(name, targets)


TORCH = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
NUMPY = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Magnitudes near both ends of a dtype: large ones whose values stay finite (2 bits round
# an amax up by a third, the span of an asymmetric group is twice it), tiny ones whose
# scales are subnormal or underflow.
EXTREMES = {"bf16": (1e38, 1e-39), "f16": (3e4, 1e-7), "f32": (1e38, 1e-42)}

# Rows that are no multiple of 8 or 128, so that packed zero points end within a word and
# the last FP8 block is ragged. `wild` has the extremes, away from the others because an
# NVFP4 global scale is shared: it would round all their rows to zero.
SHAPES = {
    "model.layers.0.self_attn.q_proj": (130, 256),
    "model.layers.0.self_attn.k_proj": (37, 256),
    "model.layers.0.self_attn.v_proj": (37, 256),
    "model.layers.0.mlp.down_proj": (200, 384),
    "model.layers.0.mlp.wild": (40, 256),
    "model.layers.0.mlp.zero": (3, 128),
}


def _weights(dtype, cols):
    rng = np.random.default_rng(0)
    large, tiny = EXTREMES[dtype]
    made = {}
    for module, (rows, default) in SHAPES.items():
        n = cols or default
        w = rng.standard_normal((rows, n)) * rng.lognormal(0, 1, (rows, 1)) * 0.02
        w[0] = 0
        w[1, : n // 2] = 0
        w[2, 3] *= 1000
        if rows > 8:
            w[3], w[4] = abs(w[3]), -abs(w[4])  # one-sided: the zero point is at an end
            w[5] = np.resize(np.arange(-14, 15) / 2, n)  # ties
        if module.endswith("wild"):
            w[6:12] *= (large / abs(w[6:12]).max(1))[:, None]
            w[12:18] *= (tiny / abs(w[12:18]).max(1))[:, None]
        if module.endswith("zero"):
            w[:] = 0
        made[module + ".weight"] = w.astype(NUMPY[dtype])
    return made


def _convert(folder, name, dtype, group_size=None, cols=None, **kw):
    """Source folder, output folder, and their parse of our quantization_config."""
    source = write_checkpoint(folder / "in", _weights(dtype, cols))
    run_convert(source, folder / "out", name, group_size=group_size, **kw)
    return source, folder / "out", _parsed(folder / "out")


def _parsed(out):
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    return QuantizationConfig.model_validate(config)


def _group(config):
    (scheme,) = config.config_groups.values()
    return scheme, BaseCompressor.get_value_from_registry(scheme.format)


def _ours(out):
    """Codes and scales of each module, by our reading."""
    with open_checkpoint(out) as c:
        return {s.module: read_rows(c, s, 0, s.layout.rows) for s in find_stored(c).values()}


def _state_dicts(out):
    """The tensors of each module under their local names, as compressors take them."""
    made = {module: {} for module in SHAPES}
    for name, tensor in load_file(out / "model.safetensors").items():
        module, _, local = name.rpartition(".")
        made[module][local] = tensor
    return made


def _same_bits(a, b):
    """Stricter than torch.equal: -0 is not 0."""
    kind = BITS[b.element_size()]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(kind), b.view(kind))


CASES = [
    *[(name, dtype, None, None) for dtype in NUMPY for name in SCHEMES],
    # Columns that are no multiple of 128: rows end within a word, blocks are ragged.
    *[(f"W{b}A16", "bf16", g, 3 * g) for b in range(2, 9) for g in (8, 40)],
    *[("W4A16_ASYM", dtype, g, 3 * g) for dtype in NUMPY for g in (8, 40)],
    *[(name, "bf16", None, 77) for name in ("FP8_DYNAMIC", "W8A8")],
    *[("FP8_BLOCK", dtype, None, 200) for dtype in NUMPY],
    *[(name, "bf16", None, 48) for name in ("NVFP4A16", "NVFP4")],
    *[(name, "bf16", None, 96) for name in ("MXFP4A16", "MXFP4", "MXFP8A16", "MXFP8")],
]


@pytest.mark.parametrize(("name", "dtype", "group_size", "cols"), CASES)
def test_their_decompression_gives_our_values(name, dtype, group_size, cols, tmp_path):
    """Every bit of every element, in the dtype that they return.

    No care for the order of roundings is needed: they multiply the code with the scale in
    the dtype of the scale, which is one rounding of a product that f32 holds exactly (8
    bits of code and at most 11 of scale), and ours is that product. An f32 scale is the
    same f32 product, and for NVFP4 they divide by the global scale in f32 first, as we do.
    """
    scheme = resolve(name, group_size)
    _, out, config = _convert(tmp_path, name, dtype, group_size, cols)
    theirs, compressor = _group(config)
    quantized, states = _ours(out), _state_dicts(out)
    assert quantized.keys() == SHAPES.keys()
    for module, q in quantized.items():
        state = compressor.decompress(states[module], theirs)
        values = torch.from_numpy(dequantize(q, scheme)).to(state["weight"].dtype)
        assert values.isfinite().all(), module
        assert _same_bits(values, state["weight"]), module
        if q.zero_point is not None:
            assert _same_bits(torch.from_numpy(q.zero_point), state["weight_zero_point"]), module
        if "weight_shape" in states[module]:
            packed, shape = (states[module][k] for k in ("weight_packed", "weight_shape"))
            codes = unpack_from_int32(packed, scheme.bits, shape)
            assert _same_bits(torch.from_numpy(q.codes), codes), module


@pytest.mark.parametrize(("name", "dtype", "group_size", "cols"), CASES)
def test_their_compression_with_our_scales_gives_our_bytes(name, dtype, group_size, cols, tmp_path):
    """Names, dtypes, shapes and bytes of every tensor of a module.

    Under ``numerics="weight"``, because they divide in the dtype of the weight. The scales
    go in as they have them before they store them: floats, in the dtype of the weight.
    """
    source, out, config = _convert(tmp_path, name, dtype, group_size, cols, numerics="weight")
    theirs, compressor = _group(config)
    quantized = _ours(out)
    weights = load_file(source / "model.safetensors")
    for module, wanted in _state_dicts(out).items():
        weight = weights[module + ".weight"]
        state = {k: v for k, v in wanted.items() if k not in ("weight", "weight_packed")}
        state["weight"] = weight
        if theirs.weights.scale_dtype == torch.uint8:
            state["weight_scale"] = decompress_mx_scale(state["weight_scale"])
        state["weight_scale"] = state["weight_scale"].to(weight.dtype)
        if quantized[module].zero_point is not None:
            state["weight_zero_point"] = torch.from_numpy(quantized[module].zero_point)
        made = compressor.compress(state, theirs)
        assert made.keys() == wanted.keys(), module
        assert [k for k in made if not _same_bits(made[k], wanted[k])] == [], module


# What of a preset decides numbers, as they dump it: the zp_dtype of a symmetric scheme is
# None there, because they never write it.
FIELDS = (
    "num_bits", "type", "strategy", "group_size", "block_structure", "symmetric", "dynamic",
    "scale_dtype", "zp_dtype", "actorder",
)  # fmt: skip

# Where we write another format than they would choose for the preset, which here is
# int-quantized with a byte per code: pack-quantized holds the same codes in half of that.
OTHER_FORMAT = {"W4A8": "pack-quantized", "W4AFP8": "pack-quantized"}


@pytest.mark.parametrize("name", SCHEMES)
def test_the_config_is_their_preset(name, tmp_path):
    """In all that decides numbers, and in the format but for the table above."""
    _, _, config = _convert(tmp_path, name, "bf16")
    (ours, _), preset = _group(config), _preset(name, ["Linear"])
    assert (config.quant_method, config.quantization_status) == ("compressed-tensors", "compressed")
    assert ours.targets == preset.targets
    for part in ("weights", "input_activations", "output_activations"):
        a, b = ((s.model_dump()[part] or {}) for s in (ours, preset))
        assert {k: a.get(k) for k in FIELDS} == {k: b.get(k) for k in FIELDS}, part
    chosen = infer_module_format(torch.nn.Linear, preset).value
    assert ours.format == config.format == OTHER_FORMAT.get(name, chosen)
    assert (name in OTHER_FORMAT) == (ours.format != chosen)


# --- transformers ----------------------------------------------------------------------

TOKENS = torch.arange(96).reshape(2, 48) * 7 % 64

# Bounds of the mean |difference| of log-probabilities that quantizing the inputs makes, by
# their bits. The log-probabilities lie 0.26 around their mean; 8 bits move them by 0.004
# (int) to 0.011 (e4m3), the 4 of e2m1 by 0.04 to 0.05. What is computed is compared to the
# bit; this only shows that the config asks for something sensible.
DRIFT = {8: 0.03, 4: 0.1}


# Schemes whose weights compressed-tensors decompresses to bf16, whatever the model is in, so
# that a model in another dtype loads and then fails in its first matmul. Loaded in bf16 it runs.
BF16_ONLY = ("NVFP4A16", "NVFP4", "MXFP4A16", "MXFP4", "MXFP8A16", "MXFP8")
FAILS_WITH = {
    "f16": "expected m1 and m2 to have the same dtype, but got: c10::Half != c10::BFloat16",
    "f32": "expected m1 and m2 to have the same dtype, but got: float != c10::BFloat16",
}


@pytest.fixture(scope="session")
def llamas(tmp_path_factory):
    """A random model in each dtype, as transformers saves it."""
    folder = tmp_path_factory.mktemp("llamas")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for dtype in ("f32", "f16", "bf16"):
        model.to(TORCH[dtype]).save_pretrained(folder / dtype)
    return folder


@torch.no_grad()
def _logits(model):
    return model.eval()(TOKENS).logits.float()


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("name", SCHEMES)
def test_transformers_computes_with_our_values(name, dtype, llamas, tmp_path):
    """The same logits, to the bit, as the source model with our values and their preset.

    Both run the same operations in the same order and dtype, so nothing may differ. Every
    scheme loads: without kernels for a device transformers decompresses at the first
    forward, and quantizes the inputs of a layer to floats that stand for codes.
    """
    scheme, source, out, runs_in = resolve(name), llamas / dtype, tmp_path / "out", TORCH[dtype]
    run_convert(source, out, name)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert {k: v for k, v in info.items() if v} == {}
    assert model.dtype == runs_in
    if name in BF16_ONLY and dtype != "bf16":
        with pytest.raises(RuntimeError, match=re.escape(FAILS_WITH[dtype])):
            _logits(model)
        runs_in = torch.bfloat16
        model = AutoModelForCausalLM.from_pretrained(out, dtype=runs_in)
    found = _logits(model)

    reference = AutoModelForCausalLM.from_pretrained(source, dtype=runs_in)
    quantized = _ours(out)
    assert len(quantized) == 14
    for module, q in quantized.items():
        ours = torch.from_numpy(dequantize(q, scheme)).to(runs_in)
        assert _same_bits(model.get_submodule(module).weight.detach(), ours), module
        reference.get_submodule(module).weight.data = ours
    plain = _logits(reference)
    if scheme.activation is None:
        assert torch.equal(found, plain)
        return

    # Their preset on the inputs alone, not what they read from our config.
    preset = _preset(name, ["Linear"])
    preset.weights = None
    inputs = QuantizationConfig(
        config_groups={"inputs": preset}, ignore=["lm_head"], quantization_status="frozen"
    )
    apply_quantization_config(reference, inputs, show_progress=False)
    for module in quantized if scheme.activation.local else ():
        reference.get_submodule(module).input_global_scale.data.fill_(1)  # as we write it
    assert torch.equal(found, _logits(reference))
    drift = (found.log_softmax(-1) - plain.log_softmax(-1)).abs().mean()
    assert 0 < drift < DRIFT[scheme.activation.bits]
