"""Every format x scheme: what it lays out, packs, reads back and converts to and from."""

import itertools
import re
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from helpers import run_convert, tensors_of, write_checkpoint
from streamq.kernels.reference import dequantize, outer_scale, quantize

from streamq.checkpoint import open_checkpoint
from streamq.errors import PlanError
from streamq.formats import FORMATS, default_format, named
from streamq.schemes import ALL, PLAIN, SCHEMES, resolve
from streamq.stored import find_stored, open_tensors, read_rows
from streamq.tensors import DTYPES
from streamq.verifying import verify

ROWS, COLS = 64, 512
#: Of experts, which this model has none of; tests/test_format_ascend.py.
EXPERTS = (("ascend", "W4A8"),)
PAIRS = [(f.name, s) for f in FORMATS.values() if not f.stacks for s in f.presets
         if s not in PLAIN and (f.name, s) not in EXPERTS]  # fmt: skip
WHOLE_ROWS = (("gpt-fast", "W8A16"), ("ascend", "W8A16"))
#: Formats whose f32 and f16 scales of one preset are not the same numbers.
ROUNDED = [("ascend", "gptq"), ("ascend", "gptq_v2")]


def group_of(fmt, preset):
    """The group size a pair is tried with; None for schemes that have none."""
    scheme = resolve(preset)
    if scheme.element != "int" or scheme.block[1] == ALL:
        return None
    return ALL if (fmt, preset) in WHOLE_ROWS else 64


def concrete(fmt, preset):
    return FORMATS[fmt].concrete(resolve(preset, group_of(fmt, preset)))


def weight(seed=0, rows=ROWS, cols=COLS, dtype=ml_dtypes.bfloat16):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, cols)) * 0.02 * (1 + np.arange(rows)[:, None])).astype(dtype)


MODEL = {
    "model.embed_tokens.weight": (32, COLS),
    "model.layers.0.self_attn.q_proj.weight": (ROWS, COLS),
    "model.layers.0.self_attn.k_proj.weight": (ROWS // 2, COLS),
    "model.layers.0.self_attn.v_proj.weight": (ROWS // 2, COLS),
    "model.layers.0.self_attn.o_proj.weight": (COLS, ROWS * 8),
    "model.layers.0.mlp.gate_proj.weight": (2 * COLS, COLS),
    "model.layers.0.mlp.up_proj.weight": (2 * COLS, COLS),
    "lm_head.weight": (32, COLS),
}
QUANTIZED = [n for n in MODEL if "_proj" in n]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    tensors = {n: weight(i, *shape) for i, (n, shape) in enumerate(MODEL.items())}
    tensors["model.norm.weight"] = np.ones(COLS, ml_dtypes.bfloat16)
    names = list(tensors)
    config = {"model_type": "llama", "num_hidden_layers": 1, "dtype": "bfloat16"}
    shards = [names[:3], names[3:]]
    return write_checkpoint(tmp_path_factory.mktemp("source"), tensors, config, shards)


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """A function from a format and a preset to an output, made once."""
    known = {}

    def make(fmt, preset):
        if (fmt, preset) not in known:
            dst = tmp_path_factory.mktemp("made") / f"{fmt}-{preset}"
            group = group_of(fmt, preset)
            run_convert(source, dst, preset, format=FORMATS[fmt], group_size=group)
            known[fmt, preset] = dst
        return known[fmt, preset]

    return make


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize(("fmt", "preset"), PAIRS)
def test_unpack_inverts_pack_and_layout_says_what_is_packed(fmt, preset):
    f, scheme, x = FORMATS[fmt], concrete(fmt, preset), weight()
    outer = None
    if scheme.needs_amax:
        top = np.full(ROWS, np.abs(x.astype("f4")).max(), np.float32)
        outer = outer_scale(top, scheme, x.dtype, "f32")
    q = quantize(x, scheme, outer=outer)
    layout = f.layout(ROWS, COLS, "BF16", scheme)
    arrays = {}
    for e in layout.entries:
        dtype = DTYPES[e.dtype].numpy
        if e.role == "constant":
            assert len(e.value) == e.size
            continue
        packed = f.pack_global(outer[:1], x.dtype) if e.role == "global_scale" else f.pack(
            e.role, q, layout, scheme
        )  # fmt: skip
        assert packed.nbytes == e.size == dtype.itemsize * np.prod(e.shape, dtype=int), e.suffix
        arrays[e.role] = np.frombuffer(packed.tobytes(), dtype).reshape(e.shape)
    back = f.unpack(arrays, layout, scheme)
    assert back.codes.tobytes() == q.codes.tobytes()
    assert back.scale.tobytes() == q.scale.tobytes()
    assert back.codes.shape == q.codes.shape
    if q.zero_point is not None:
        assert np.array_equal(back.zero_point, q.zero_point)
    if scheme.two_level:
        assert back.global_scale[0] == outer[0]


@pytest.mark.parametrize(("fmt", "preset"), PAIRS)
def test_a_conversion_is_the_reference_and_verifies(fmt, preset, source, made):
    out, scheme = made(fmt, preset), concrete(fmt, preset)
    report = verify(out)
    assert (report.failures, report.quantized) == ([], len(QUANTIZED))
    with open_checkpoint(source) as c:
        assert verify(out, c).failures == []
    fused = [[QUANTIZED[0], QUANTIZED[1], QUANTIZED[2]], [QUANTIZED[3]], QUANTIZED[4:]]
    raw = {n: weight(i, *shape) for i, (n, shape) in enumerate(MODEL.items())}
    with open_checkpoint(out) as c:
        stored = find_stored(c)
        assert sorted(stored) == sorted(QUANTIZED)
        for group in fused:
            top = max(float(np.abs(raw[n].astype("f4")).max()) for n in group)
            for name in group:
                outer = None
                if scheme.needs_amax:
                    tops = np.full(len(raw[name]), top, np.float32)
                    outer = outer_scale(tops, scheme, raw[name].dtype, "f32")
                want = quantize(raw[name], scheme, outer=outer)
                got = read_rows(c, stored[name], 0, len(raw[name]))
                assert got.codes.tobytes() == want.codes.tobytes(), name
                assert got.scale.tobytes() == want.scale.tobytes(), name
                if want.zero_point is not None:
                    assert np.array_equal(got.zero_point, want.zero_point)


@pytest.mark.parametrize(("fmt", "preset"), PAIRS)
def test_back_to_floats(fmt, preset, source, made, tmp_path):
    """-s f32 writes the very values that codes and scales stand for; the rest is untouched."""
    run_convert(made(fmt, preset), tmp_path / "f32", "F32")
    before, raw = tensors_of(tmp_path / "f32"), tensors_of(source)
    assert sorted(before) == sorted(raw)
    with open_tensors(made(fmt, preset)) as tensors:
        for name, (t, data) in before.items():
            if name not in QUANTIZED:
                assert data == raw[name][1]
                continue
            assert t.dtype == "F32"
            assert data == tensors[name].tobytes()
            x = np.frombuffer(raw[name][1], ml_dtypes.bfloat16).astype("f8")
            noise = np.square(x - np.frombuffer(data, "f4")).sum() / np.square(x).sum()
            assert noise < {2: 0.6, 3: 0.1}.get(resolve(preset).bits, 0.03)
    assert verify(tmp_path / "f32").failures == []


@pytest.mark.parametrize(("fmt", "preset"), PAIRS)
def test_what_is_there_already_is_copied(fmt, preset, made, tmp_path):
    group = group_of(fmt, preset)
    src = made(fmt, preset)
    plan = run_convert(src, tmp_path / "again", preset, format=FORMATS[fmt], group_size=group)
    assert plan.verbatim
    assert files(tmp_path / "again") == files(src)


def same_numbers():
    """Pairs of formats that hold one preset in the same numbers."""
    for preset in SCHEMES:
        holders = [f for f, s in PAIRS if s == preset]
        for a, b in itertools.permutations(holders, 2):
            alike = concrete(a, preset).numbers == concrete(b, preset).numbers
            if alike and (a, b) not in ROUNDED:
                yield a, b, preset


def exact_values(checkpoint, s):
    """Values without the rounding of a bias to the dtype of the scales, which may have changed."""
    return dequantize(replace(read_rows(checkpoint, s, 0, s.layout.rows), bias=None), s.scheme)


@pytest.mark.parametrize(("a", "b", "preset"), list(same_numbers()))
def test_repacking_keeps_codes_and_comes_back(a, b, preset, made, tmp_path):
    """From a to b and back; scales only where both dtypes hold them."""
    group = group_of(b, preset)
    run_convert(made(a, preset), tmp_path / "b", preset, format=FORMATS[b], group_size=group)
    assert verify(tmp_path / "b").failures == []
    with open_checkpoint(made(a, preset)) as c, open_checkpoint(tmp_path / "b") as d:
        one, two = find_stored(c), find_stored(d)
        assert sorted(one) == sorted(two)
        for name, s in one.items():
            p = read_rows(c, s, 0, s.layout.rows)
            q = read_rows(d, two[name], 0, s.layout.rows)
            assert p.codes.tobytes() == q.codes.tobytes(), name
            assert np.array_equal(p.scale.astype("f4"), q.scale.astype("f4")), name
            if p.global_scale is not None:
                assert p.global_scale[0] == q.global_scale[0]
    group = group_of(a, preset)
    run_convert(tmp_path / "b", tmp_path / "a", preset, format=FORMATS[a], group_size=group)
    with open_checkpoint(made(a, preset)) as c, open_checkpoint(tmp_path / "a") as d:
        one, two = find_stored(c), find_stored(d)
        assert sorted(two) == sorted(QUANTIZED)
        for name in QUANTIZED:
            assert np.array_equal(exact_values(c, one[name]), exact_values(d, two[name])), name


def test_an_illegal_combination_names_the_legal_ones():
    for fmt, f in FORMATS.items():
        for preset in SCHEMES:
            if preset in f.presets:
                continue
            with pytest.raises(PlanError, match=f"{fmt} cannot hold {preset}; it holds") as e:
                f.concrete(SCHEMES[preset])
            assert all(p in str(e.value) for p in f.presets)


def test_every_scheme_has_a_default_format():
    for scheme in SCHEMES.values():
        assert default_format(scheme).name == "compressed-tensors"
    assert {default_format(s).name for s in PLAIN.values()} == {"plain"}


def test_an_unknown_format_or_option_is_refused():
    with pytest.raises(PlanError, match=r"unknown format 'ggml': known formats are compressed"):
        named("ggml")
    with pytest.raises(PlanError, match="--scale-fmt does not apply to the format awq"):
        named("awq", scale_fmt="ue8m0")


def test_scales_that_f16_cannot_hold_are_refused_by_name(tmp_path):
    x = weight()
    x[5] = (x[5].astype("f4") * 1e8).astype(x.dtype)
    config = {"model_type": "llama"}
    src = write_checkpoint(tmp_path / "in", {"m.o_proj.weight": x}, config)
    run_convert(src, tmp_path / "ct", "W4A16_ASYM")
    with pytest.raises(Exception, match=r"'m.o_proj.weight': a scale is beyond the range of F16"):
        run_convert(tmp_path / "ct", tmp_path / "awq", "W4A16_ASYM", format=FORMATS["awq"])
    assert not (tmp_path / "awq").exists()


def test_requantizing_is_what_quantizing_the_values_gives(source, made, tmp_path):
    src = made("compressed-tensors", "W8A8")
    with pytest.raises(PlanError, match=r"quantized to W8A8 already; --requantize"):
        run_convert(src, tmp_path / "out", "NVFP4A16")
    run_convert(src, tmp_path / "out", "NVFP4A16", requantize=True)
    run_convert(src, tmp_path / "f32", "F32")
    run_convert(tmp_path / "f32", tmp_path / "two", "NVFP4A16")
    one, two = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "two")
    assert {n: d for n, (_, d) in one.items()} == {n: d for n, (_, d) in two.items()}


def test_what_is_quantized_already_is_kept_beside_the_new(source, tmp_path):
    run_convert(source, tmp_path / "some", "W8A8", only=("*mlp*",))
    with pytest.raises(PlanError, match="--only takes what the source left out"):
        run_convert(tmp_path / "some", tmp_path / "none", "FP8_BLOCK", ignore=("*o_proj",))
    plan = run_convert(
        tmp_path / "some", tmp_path / "all", "FP8_BLOCK", ignore=("*o_proj",), only=("*",)
    )
    assert "2 weights stay quantized to W8A8" in plan.notes
    report = verify(tmp_path / "all")
    assert (report.failures, report.quantized) == ([], 5)
    assert set(report.scheme.split(", ")) == {"W8A8", "FP8_BLOCK"}
    some, out = tensors_of(tmp_path / "some"), tensors_of(tmp_path / "all")
    for name, (_, data) in some.items():
        if ".mlp." in name or "o_proj" in name:
            assert out[name][1] == data
    groups = plan.config["quantization_config"]["config_groups"].values()
    targets = [t for g in groups for t in g["targets"]]
    assert len(targets) == len({n.removesuffix(".weight") for n in QUANTIZED
                                if "o_proj" not in n})  # fmt: skip
    with pytest.raises(PlanError, match=r"awq (holds one scheme|cannot hold)"):
        run_convert(tmp_path / "some", tmp_path / "awq", "W4A16_ASYM", format=FORMATS["awq"])


def test_scales_are_searched_in_any_format(source, tmp_path):
    scheme = replace(SCHEMES["W4A16_ASYM"], scales="search")
    assert FORMATS["awq"].concrete(scheme).scales == "search"


def test_mxfp4_becomes_nvfp4_without_loss_where_exponents_allow(tmp_path):
    rng = np.random.default_rng(5)
    x = {n: rng.standard_normal((64, 256)).astype("f4") for n in ("q", "k", "v", "o")}
    x["q"] *= np.exp2(rng.integers(-8, 1, (64, 1)))  # as far apart as NVFP4 can hold, with k and v
    x["k"] *= np.float32(2.0**-3)
    x["o"][3, 32:64] = 0
    tensors = {f"m.{n}_proj.weight": w.astype(ml_dtypes.bfloat16) for n, w in x.items()}
    src = write_checkpoint(tmp_path / "in", tensors, {"model_type": "llama"})
    run_convert(src, tmp_path / "mx", "MXFP4A16")
    plan = run_convert(tmp_path / "mx", tmp_path / "nv", "NVFP4")
    assert "4 weights go from MXFP4 to NVFP4 without loss" in plan.notes
    assert verify(tmp_path / "nv").failures == []
    with open_tensors(tmp_path / "mx") as a, open_tensors(tmp_path / "nv") as b:
        for name in tensors:
            assert np.array_equal(a[name], b[name]), name
    x["v"][0] *= 2.0**-40
    tensors = {f"m.{n}_proj.weight": w.astype(ml_dtypes.bfloat16) for n, w in x.items()}
    src = write_checkpoint(tmp_path / "far", tensors, {"model_type": "llama"})
    run_convert(src, tmp_path / "mx2", "MXFP4A16")
    plan = run_convert(tmp_path / "mx2", tmp_path / "both", "NVFP4A16")
    assert "3 weights stay quantized to MXFP4A16" in plan.notes
    assert verify(tmp_path / "both").failures == []
    plan = run_convert(tmp_path / "mx2", tmp_path / "nv2", "NVFP4A16", requantize=True)
    assert any(
        re.search(r"m.[qkv]_proj.weight' .1 such groups. are more than 17", n) for n in plan.notes
    )
    assert verify(tmp_path / "nv2").failures == []


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (("compressed-tensors", "NVFP4A16"), ("modelopt", "NVFP4A16")),
        (("compressed-tensors", "W4A16_ASYM"), ("awq", "W4A16_ASYM")),
        (("fp8", "FP8_BLOCK"), ("plain", "F32")),
        (("compressed-tensors", "W8A8"), ("compressed-tensors", "FP8_BLOCK")),
    ],
)
def test_verify_with_a_quantized_source(first, then, made, tmp_path):
    src, (fmt, preset) = made(*first), then
    group = group_of(fmt, preset) if preset in SCHEMES else None
    out = tmp_path / "out"
    run_convert(src, out, preset, format=FORMATS[fmt], group_size=group, requantize=True)
    with open_checkpoint(src) as c:
        assert verify(out, c).failures == []
    other = tmp_path / "other"
    run_convert(src, other, "F32")
    with open_checkpoint(other) as c:
        target = max((t for t in c.tensors.values() if t.name in QUANTIZED), key=lambda t: t.nbytes)
    path = other / target.file
    raw = bytearray(path.read_bytes())
    raw[target.start : target.start + 4] = np.float32(1e3).tobytes()
    path.write_bytes(raw)
    with open_checkpoint(other) as c:
        (failure,) = verify(out, c).failures
    assert target.name in failure
