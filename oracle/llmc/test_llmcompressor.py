"""The bytes of ``--numerics weight`` are those of llm-compressor's model_free_ptq on a CPU.

The real tool runs beside ours, on llamas in which every layer holds another kind of input;
tests/test_llmcompressor.py holds hashes of other inputs and does without the tool.
"""

import json

import ml_dtypes
import numpy as np
import pytest
from helpers import run_convert, tensors_of, write_checkpoint
from llmcompressor import model_free_ptq
from streamq.kernels.reference import E2M1_VALUES, E4M3

from streamq.errors import StreamqError
from streamq.schemes import resolve
from streamq.tensors import DTYPES

NUMPY = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}

# The columns of o_proj and down_proj. FP8_BLOCK has whole blocks there: with others 0.14
# fails, because it saves a weight that is not contiguous.
SCHEMES = {
    "FP8_DYNAMIC": 77, "FP8_BLOCK": 384, "NVFP4A16": 144, "MXFP4A16": 96, "MXFP8A16": 96,
    "W4A16": 384, "W4A16_ASYM": 384, "W8A16": 384, "W8A8": 77, "W3A16": 384,
}  # fmt: skip

# Rows that are no multiple of 8 or 128: packed zero points end within a word, the last row
# of blocks is ragged. 0 columns stand for the width above.
MODULES = {
    "self_attn.q_proj": (128, 256),
    "self_attn.k_proj": (130, 256),
    "self_attn.v_proj": (37, 256),
    "self_attn.o_proj": (130, 0),
    "mlp.gate_proj": (131, 256),
    "mlp.up_proj": (75, 256),
    "mlp.down_proj": (201, 0),
}
KINDS = ("gauss", "zeros", "subnormal", "ties", "huge", "tiny", "one_sided", "bits", "mixed")

# Both signs near the largest value: max - min of a group, which an asymmetric scale is made
# of, overflows the dtype. test_what_is_left_out proves that nothing else is left out.
OVERFLOWS = {"W4A16_ASYM": ("huge", "bits")}


def _ties(scheme, rng, rows, cols):
    """Values halfway between two codes under a scale that is a power of two.

    Each 16 columns begin with what makes the scale so. That of NVFP4 needs a power of two
    in the global scale too, which its first element gives.
    """
    if scheme.element == "int":
        codes = np.arange(scheme.code_range[0], scheme.code_range[1] + 1)
    else:
        positive = E2M1_VALUES
        if scheme.element == "e4m3":
            positive = np.arange(127, dtype=np.uint8).view(E4M3).astype(float)
        codes = np.concatenate([-positive[:0:-1], positive])
    halves = (codes[1:] + codes[:-1]) / 2
    first = [scheme.bits == 8 and 127.5 or codes[-1] + 0.5]
    if scheme.element != "int":  # an MX scale is one more from a mantissa of 1.75 on
        first = [384 if scheme.scale == "e8m0" and scheme.bits == 8 else codes[-1]]
    if not scheme.symmetric:  # a span of 15; codes, or the zero point too, are halfway
        first = [[-5, 10], [-3.5, 11.5]][rng.integers(2)]
        halves = halves[(halves > first[0]) & (halves < first[1])]
    w = rng.choice(halves, (rows, cols))
    for i, value in enumerate(first):
        w[:, i::16] = value
    if scheme.block[0] == 1:
        w *= 2.0 ** -(np.arange(rows)[:, None] % 4)
    if scheme.two_level:
        w[0, 0] = 10.5
    return w


def _make(kind, scheme, dtype, rng, rows, cols):
    """One weight, finite in ``dtype``."""
    info = ml_dtypes.finfo(dtype)
    top, bottom = float(info.max), float(info.smallest_normal)
    row = np.arange(rows)[:, None]
    x = rng.standard_normal((rows, cols))
    near = rng.uniform(-1, 1, (rows, cols)) * rng.uniform(0, 1, (rows, 1))
    if kind == "gauss":
        w = x * rng.lognormal(0, 1.5, (rows, 1)) * 0.02
    elif kind == "zeros":
        w = np.copysign(0, x)
        w[rng.random(rows) < 0.3] = 0
        w[rng.random(rows) < 0.3] = -0.0
    elif kind == "subnormal":
        steps = rng.integers(-(2**info.nmant) + 1, 2**info.nmant, (rows, cols))
        w = np.trunc(steps / 2.0 ** (row % (info.nmant + 1))) * float(info.smallest_subnormal)
    elif kind == "ties":
        w = _ties(scheme, rng, rows, cols)
    elif kind == "huge":
        w = near * top
        w[::3, :: cols // 2], w[::3, 1 :: cols // 2] = top, -top
    elif kind == "tiny":  # around where amax divided by the largest code underflows
        w = x * bottom * 2.0 ** (row % 32 - 12)
    elif kind == "one_sided":
        w = abs(near) * top * 2.0 ** -rng.integers(0, 2 * info.maxexp - 4, (rows, 1))
        w[::4] = w[::4] / 4 + abs(w[::4]).max(1)[:, None] / 2  # far from 0
        w *= np.where(row % 2, -1.0, 1.0)
    elif kind == "bits":
        w = rng.integers(0, 256, (rows, cols * info.bits // 8), np.uint8).view(dtype)
        with np.errstate(invalid="ignore"):  # signalling NaNs
            return np.where(np.isfinite(w), w, dtype(-0.0))
    else:
        assert kind == "mixed"
        kinds = [k for k in KINDS[:-1] if k not in OVERFLOWS.get(scheme.name, ())]
        w = np.zeros((rows, cols), dtype)
        for i, k in enumerate(kinds):
            w[i :: len(kinds)] = _make(k, scheme, dtype, rng, rows, cols)[i :: len(kinds)]
    made = w.astype(dtype)
    assert np.isfinite(made.astype(np.float32)).all(), kind
    return made


def _checkpoint(folder, name, dtype, kinds):
    """A llama with a layer for each of ``kinds``."""
    rng, numpy = np.random.default_rng(0), NUMPY[dtype]
    tensors = {}
    for i, kind in enumerate(kinds):
        layer = f"model.layers.{i}."
        for module, (rows, cols) in MODULES.items():
            weight = _make(kind, resolve(name), numpy, rng, rows, cols or SCHEMES[name])
            tensors[f"{layer}{module}.weight"] = weight
        tensors[f"{layer}input_layernorm.weight"] = rng.standard_normal(256).astype(numpy)
    for module in ("model.embed_tokens", "lm_head"):
        tensors[f"{module}.weight"] = rng.standard_normal((16, 256)).astype(numpy)
    config = {"model_type": "llama", "num_hidden_layers": len(kinds)}
    return write_checkpoint(folder, tensors, config)


def _theirs(source, out, name):
    ignore = ("lm_head", "model.embed_tokens")
    model_free_ptq(source, out, scheme=name, ignore=ignore, max_workers=1, device="cpu")
    return tensors_of(out)


def _first_difference(ours, theirs):
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            return f"{name}: only {'ours' if name in ours else 'theirs'}"
        (a, x), (b, y) = ours[name], theirs[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return f"{name}: ours {a.dtype} {a.shape}, theirs {b.dtype} {b.shape}"
        if x != y:
            size = DTYPES[a.dtype].itemsize
            n = next(i for i in range(len(x)) if x[i] != y[i]) // size
            at, part = np.unravel_index(n, a.shape), slice(n * size, n * size + size)
            where = f"{name} {[int(i) for i in at]}"
            return f"{where}: ours 0x{x[part][::-1].hex()}, theirs 0x{y[part][::-1].hex()}"
    return None


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("name", SCHEMES)
def test_every_byte_is_equal(name, dtype, tmp_path):
    """Names, dtypes, shapes and bytes of all tensors, and what the config says of them."""
    kinds = [k for k in KINDS if k not in OVERFLOWS.get(name, ())]
    source = _checkpoint(tmp_path / "in", name, dtype, kinds)
    run_convert(source, tmp_path / "ours", name, numerics="weight")
    ours, theirs = tensors_of(tmp_path / "ours"), _theirs(source, tmp_path / "theirs", name)
    assert sum(n.endswith("weight_scale") for n in theirs) == len(kinds) * len(MODULES)
    difference = _first_difference(ours, theirs)
    assert difference is None, f"{difference} (layers: {kinds})"

    a, b = (
        json.loads((tmp_path / out / "config.json").read_text())["quantization_config"]
        for out in ("ours", "theirs")
    )
    (our_group,), (their_group,) = (c["config_groups"].values() for c in (a, b))
    assert our_group == their_group
    differ = {k for k in a.keys() | b.keys() if a.get(k) != b.get(k)}
    assert differ <= {"config_groups", "ignore", "version"}


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize(("name", "kind"), [(n, k) for n in OVERFLOWS for k in OVERFLOWS[n]])
def test_what_is_left_out(name, kind, dtype, tmp_path):
    """Each weight has a scale that is not finite: they write it, we refuse it."""
    source = _checkpoint(tmp_path / "in", name, dtype, [kind])
    theirs = _theirs(source, tmp_path / "theirs", name)
    for module in MODULES:
        tensor = f"model.layers.0.{module}.weight"
        scale = np.frombuffer(theirs[f"{tensor}_scale"][1], NUMPY[dtype]).astype(np.float32)
        assert not np.isfinite(scale).all(), module
        only = (tensor.removesuffix(".weight"),)
        if "self_attn" in module and "o_proj" not in module:
            only = ("model.layers.0.self_attn.[qkv]_proj",)  # fused, never in part
        with pytest.raises(StreamqError, match="scale of group .* is not finite"):
            run_convert(source, tmp_path / module, name, numerics="weight", only=only)
