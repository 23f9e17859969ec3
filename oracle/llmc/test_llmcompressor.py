"""The bytes of ``--numerics weight`` are those of llm-compressor's model_free_ptq on a CPU.

The real tool runs beside ours, on llamas in which every layer holds another kind of input.
"""

import json
import re

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
# of blocks is ragged. None stands for the columns above.
MODULES = {
    "self_attn.q_proj": (128, 256), "self_attn.k_proj": (130, 256),
    "self_attn.v_proj": (37, 256), "self_attn.o_proj": (130, None),
    "mlp.gate_proj": (131, 256), "mlp.up_proj": (75, 256), "mlp.down_proj": (201, None),
}  # fmt: skip

# With both signs up to the largest values, max - min of a group, of which an asymmetric
# scale is made, overflows the dtype. test_what_is_left_out proves it of each weight.
OVERFLOWS = {"W4A16_ASYM": ("huge", "bits")}


def _ties(scheme, rng, rows, cols):
    """Values halfway between two codes, under scales that are powers of two."""
    if scheme.element == "int":
        low, high = scheme.code_range
        codes = np.arange(low, high + 1)
        first = [high + 0.5]
    else:
        e4m3 = np.arange(127, dtype=np.uint8).view(E4M3).astype(float)  # all that are finite
        values = e4m3 if scheme.element == "e4m3" else E2M1_VALUES
        codes = np.concatenate([-values[:0:-1], values])
        # An MX scale doubles from a mantissa of 1.75 on, which that of 448 is.
        first = [384 if scheme.name == "MXFP8A16" else values[-1]]
    halves = (codes[1:] + codes[:-1]) / 2
    if not scheme.symmetric:  # a span of 15; in the second the zero point is a tie as well
        first = [(-5, 10), (-3.5, 11.5)][rng.integers(2)]
        halves = halves[(halves > first[0]) & (halves < first[1])]
    w = rng.choice(halves, (rows, cols))
    for i, value in enumerate(first):  # what makes the scale a power of two, in any block
        w[:, i::16] = value
    if scheme.block[0] == 1:
        w *= 2.0 ** -(np.arange(rows)[:, None] % 4)
    if scheme.two_level:
        w[0, 0] = 10.5  # 2688 / 256: the global scale is a power of two as well
    return w


def _inputs(scheme, dtype, rng, rows, cols):
    """One weight of each kind, all finite."""
    info, shape, row = ml_dtypes.finfo(dtype), (rows, cols), np.arange(rows)[:, None]
    top, bottom, least = map(float, (info.max, info.smallest_normal, info.smallest_subnormal))
    x, sign = rng.standard_normal(shape), np.where(row % 2, -1.0, 1.0)
    part = rng.uniform(-1, 1, shape) * rng.uniform(0, 1, (rows, 1))
    steps = rng.integers(-(2**info.nmant) + 1, 2**info.nmant, shape)
    bits = rng.integers(0, 256, (rows, cols * info.bits // 8), np.uint8).view(dtype)
    extreme = (rng.random(shape) < 0.1) & (row % 3 == 0)
    reach = sign * top * 2.0 ** -rng.integers(0, 2 * info.maxexp - 4, (rows, 1))
    with np.errstate(invalid="ignore"):  # signalling NaNs
        made = {
            "gauss": x * rng.lognormal(0, 1.5, (rows, 1)) * 0.02,
            "zeros": np.copysign(0, x + 9 * (row % 3 - 1)),  # rows of -0, of both, of +0
            "subnormal": np.trunc(steps / 2.0 ** (row % (info.nmant + 1))) * least,
            "ties": _ties(scheme, rng, rows, cols),
            "tiny": x * bottom * 2.0 ** (row % 40 - 24),  # where scales underflow
            "large": part * top * 0.49,  # max - min just does not overflow
            "one_sided": abs(part) * reach,
            "far_from_0": (0.9 + abs(part) / 10) * reach,
            "huge": np.where(extreme, np.copysign(top, x), part * top),
            "bits": np.where(np.isfinite(bits), bits, dtype(-0.0)),
        }
    made = {kind: w.astype(dtype) for kind, w in made.items()}
    table = [w for kind, w in made.items() if kind not in OVERFLOWS.get(scheme.name, ())]
    made["mixed"] = np.stack(table)[np.arange(rows) % len(table), np.arange(rows)]
    return made


def _layers(name, dtype):
    """The weights of the layer of each kind, by module."""
    rng, layers = np.random.default_rng(0), {}
    for module, (rows, cols) in MODULES.items():
        made = _inputs(resolve(name), NUMPY[dtype], rng, rows, cols or SCHEMES[name])
        for kind, w in made.items():
            assert np.isfinite(w.astype(np.float32)).all(), kind
            layers.setdefault(kind, {})[module] = w
    return layers


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
            p, q = (data[n * size : (n + 1) * size][::-1].hex() for data in (x, y))
            at = [int(i) for i in np.unravel_index(n, a.shape)]
            return f"{name} {at}: ours 0x{p}, theirs 0x{q}"
    return None


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("name", SCHEMES)
def test_every_byte_is_equal(name, dtype, tmp_path):
    """Names, dtypes, shapes and bytes of all tensors, and what the config says of them."""
    layers = _layers(name, dtype)
    kinds = [kind for kind in layers if kind not in OVERFLOWS.get(name, ())]
    plain = {"model.embed_tokens": (16, 256), "model.norm": (256,), "lm_head": (16, 256)}
    tensors = {f"{m}.weight": np.ones(shape, NUMPY[dtype]) for m, shape in plain.items()}
    for i, kind in enumerate(kinds):
        tensors |= {f"model.layers.{i}.{m}.weight": w for m, w in layers[kind].items()}
    source = write_checkpoint(tmp_path / "in", tensors)
    run_convert(source, tmp_path / "ours", name, numerics="weight")
    ours, theirs = tensors_of(tmp_path / "ours"), _theirs(source, tmp_path / "theirs", name)
    assert sum(n.endswith("weight_scale") for n in theirs) == len(kinds) * len(MODULES)
    assert _first_difference(ours, theirs) is None, f"layers: {kinds}"

    a, b = (
        json.loads((tmp_path / out / "config.json").read_text())["quantization_config"]
        for out in ("ours", "theirs")
    )
    assert list(a["config_groups"].values()) == list(b["config_groups"].values())
    differ = {k for k in a.keys() | b.keys() if a.get(k) != b.get(k)}
    assert differ <= {"config_groups", "ignore", "version"}


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize(("name", "kind"), [(n, k) for n in OVERFLOWS for k in OVERFLOWS[n]])
def test_what_is_left_out(name, kind, dtype, tmp_path):
    """Each weight has a scale that is not finite: they write it, we name it and refuse."""
    for module, w in _layers(name, dtype)[kind].items():
        source = write_checkpoint(tmp_path / module / "in", {f"{module}.weight": w})
        theirs = _theirs(source, tmp_path / module / "theirs", name)
        info, data = theirs[f"{module}.weight_scale"]
        scale = np.frombuffer(data, NUMPY[dtype]).astype(np.float32).reshape(info.shape)
        refusal = f"{module}.weight': the scale of group .* is not finite"
        with pytest.raises(StreamqError, match=refusal) as raised:
            run_convert(source, tmp_path / module / "ours", name, numerics="weight")
        group, row = re.search(r"group (\d+) in row (\d+)", str(raised.value)).groups()
        assert not np.isfinite(scale[int(row), int(group)]), module
