"""Group compression as DB-GPT and FastChat compute it, against a second implementation."""

import itertools
import json
import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import run_convert, tensors_of, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from streamq.kernels import cpu, reference

from streamq.checkpoint import open_checkpoint
from streamq.cli import cli
from streamq.errors import CheckpointError, NonFiniteError, PlanError
from streamq.formats import named
from streamq.schemes import ALL, BYTES, Packing, resolve
from streamq.stored import find_stored, open_tensors
from streamq.verifying import verify

F32 = np.float32
DTYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}
BACKENDS = {"reference": reference, "cpu": cpu}
KINDS = {
    "normal": lambda rng, shape: rng.standard_normal(shape) * 0.02,
    "halves": lambda rng, shape: rng.integers(-3, 4, shape) * 0.5 * rng.choice([1, -1], shape),
    "constant": lambda rng, shape: np.full(shape, rng.choice([-0.3, 0.0, 0.7])),
    "wide": lambda rng, shape: rng.standard_normal(shape) * 2.0 ** rng.integers(-149, 4, shape),
}


def values_of(kind, shape, dtype, seed):
    return KINDS[kind](np.random.default_rng(seed), shape).astype(dtype)


# --- the rule once more, element by element, from its formulas -------------------------------


def nearest(x):
    """Half to even, by the integers on both sides."""
    low = math.floor(x)
    if x - low == 0.5:
        return low + low % 2
    return low + (x - low > 0.5)


def compress_group(x, bits, size, symmetric):
    """Codes as FastChat counts them, scale, minimum and values of one group of f32 scalars."""
    filled = [*x, *[F32(0)] * (size - len(x))]
    if symmetric:
        top, low = F32(2 ** (bits - 1) - 1), F32(0)
        span = max(abs(v) for v in filled)
    else:
        top, low = F32(2**bits - 1), min(filled)
        span = F32(max(filled) - low)
    with np.errstate(over="ignore"):
        scale = F32(F32(F32(1) / span) * top) if span != 0 else F32(np.inf)
    scale = F32(1) if np.isinf(scale) else scale
    least = -float(top) if symmetric else 0.0
    codes = []
    for v in x:
        product = F32(F32(v - low) * scale) if not symmetric else F32(v * scale)
        codes.append(nearest(min(max(float(product), least), float(top))))
    values = [F32(F32(c) / scale) if symmetric else F32(F32(F32(c) / scale) + low) for c in codes]
    return codes, scale, low, values


def compress(x, bits, size, dim, symmetric):
    """The same for an array of any dimensions, groups along ``dim``; scales have them on it."""
    x = x.astype(F32)
    length = x.shape[dim]
    size = length if size == ALL else size
    count = -(-length // size)
    blocks = (*x.shape[:dim], count, *x.shape[dim + 1 :])
    codes, values = np.zeros(x.shape, int), np.zeros(x.shape, F32)
    scale, low = np.zeros(blocks, F32), np.zeros(blocks, F32)
    others = [range(1) if axis == dim else range(n) for axis, n in enumerate(x.shape)]
    for at in itertools.product(*others):
        for g in range(count):
            spot = [*at]
            spot[dim] = slice(g * size, min(length, (g + 1) * size))
            here = [*at]
            here[dim] = g
            made = compress_group(list(x[tuple(spot)]), bits, size, symmetric)
            codes[tuple(spot)], values[tuple(spot)] = made[0], made[3]
            scale[tuple(here)], low[tuple(here)] = made[1], made[2] + F32(0)
    return codes, scale, low, values


def test_the_second_implementation_by_hand():
    """-1..1 in 8 bits: 127 / 1; 5 bits of 0..31 are themselves; a tail has a 0 in its range."""
    codes, scale, _, values = compress_group([F32(-1), F32(0.5), F32(0.25)], 8, 3, True)
    assert (codes, scale) == ([-127, 64, 32], 127)  # 63.5 and 31.75
    assert values[0] == -1
    codes, scale, low, _ = compress_group([F32(3), F32(34)], 5, 2, False)
    assert (codes, scale, low) == ([0, 31], 1, 3)
    codes, scale, low, _ = compress_group([F32(31)], 5, 2, False)
    assert (codes, scale, low) == ([31], 1, 0)
    _, scale, _, _ = compress_group([F32(3)], 8, 1, True)
    assert scale == F32(42.333336) != F32(127) / F32(3)  # as torch has it for 127 / tensor
    assert [nearest(x) for x in (-2.5, -1.5, -0.5, 0.5, 1.5, 2.4)] == [-2, -2, 0, 0, 2, 2]


# --- kernels -----------------------------------------------------------------------------------


def scheme_of(bits, size, dim, symmetric, shape=()):
    """The scheme of a tensor; sizes that no option gives are put in by hand."""
    preset = replace(resolve(f"W{bits}A16" + ("" if symmetric else "_ASYM")), block=(1, size))
    return named("group", group_dim=dim).concrete(preset).folded(shape)


cases = st.fixed_dictionaries({
    "bits": st.integers(2, 8),
    "size": st.sampled_from([ALL, 2, 3, 5, 8, 16]),
    "dim": st.integers(0, 1),
    "symmetric": st.booleans(),
})  # fmt: skip
shapes = st.one_of(
    st.tuples(st.integers(1, 20), st.integers(1, 40)),
    st.lists(st.integers(1, 7), min_size=3, max_size=5).map(tuple),
)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    case=cases, shape=shapes, kind=st.sampled_from(list(KINDS)),
    dtype=st.sampled_from(list(DTYPES)), seed=st.integers(0, 2**32 - 1), packed=st.booleans(),
)  # fmt: skip
def test_kernels_follow_the_rule(backend, case, shape, kind, dtype, seed, packed):
    x = values_of(kind, shape, DTYPES[dtype], seed)
    scheme = scheme_of(**case, shape=shape)
    matrix = x.reshape(shape[0], -1)
    packing = Packing("words", case["bits"]) if packed else BYTES
    q = BACKENDS[backend].quantize(matrix, scheme, packing)
    codes, scale, low, values = compress(x, **case)
    offset = 0 if case["symmetric"] else 1 << (case["bits"] - 1)
    got = reference.unpack(q.codes, packing, matrix.shape[1], signed=True)
    assert np.array_equal(got.reshape(shape).astype(int) + offset, codes)
    assert q.scale.shape == scheme.scale_shape(*matrix.shape)
    assert q.scale.tobytes() == scale.tobytes()
    assert q.bias is None if case["symmetric"] else q.bias.tobytes() == low.tobytes()
    unpacked = type(q)(got, q.scale, bias=q.bias)
    back = BACKENDS[backend].dequantize(unpacked, scheme)
    assert np.array_equal(back.reshape(shape), values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_f32_cannot_hold_is_refused_with_its_place(backend, dim, symmetric):
    scheme = scheme_of(8, 16, dim, symmetric)
    x = np.ones((70, 48), F32)
    x[65, 33] = np.nan
    with pytest.raises(NonFiniteError, match="weight at row 65, column 33 "):
        BACKENDS[backend].quantize(x, scheme)
    x[65, 33], x[66, 33], x[65, 34] = 3e38, -3e38, -3e38
    if symmetric:
        assert np.isfinite(BACKENDS[backend].quantize(x, scheme).scale).all()
        return
    place = "row 64, column 33 " if dim == 0 else "row 65, column 2 "
    with pytest.raises(NonFiniteError, match=f"scale at {place}"):
        BACKENDS[backend].quantize(x, scheme)


def test_a_minimum_of_minus_0_is_stored_as_0():
    x = np.array([[0.0, -0.0, 1.0, -0.0]], F32)
    for backend, dim in itertools.product(BACKENDS.values(), (0, 1)):
        q = backend.quantize(x, scheme_of(4, 4, dim, False))
        assert not np.signbit(q.bias[..., :1]).any()


@given(case=cases, shape=shapes, seed=st.integers(0, 2**32 - 1))
def test_energies_are_those_of_the_values(case, shape, seed):
    x = values_of("normal", shape, DTYPES["bf16"], seed).reshape(shape[0], -1)
    scheme = scheme_of(**case, shape=shape)
    packing = Packing("words", case["bits"])
    values = reference.dequantize(reference.quantize(x, scheme), scheme).astype("f8")
    for p in (packing, BYTES):
        got = cpu.energies(x, cpu.quantize(x, scheme, p), scheme, p, None)
        assert np.allclose(got[:, 0], np.square(x.astype("f8")).sum(1))
        assert np.allclose(got[:, 1], np.square(x.astype("f8") - values).sum(1))


# --- checkpoints -------------------------------------------------------------------------------

MODEL = {
    "model.layers.0.self_attn.q_proj.weight": (48, 100),
    "model.layers.0.self_attn.k_proj.weight": (24, 100),
    "model.layers.0.self_attn.v_proj.weight": (24, 100),
    "model.layers.0.mlp.down_proj.weight": (100, 72),
    "model.layers.0.mixer.conv.weight": (6, 20, 3, 3),
    "model.layers.0.mlp.experts.gate.weight": (3, 10, 12),
}
STACKS = tuple(n for n, shape in MODEL.items() if len(shape) > 2)


def model(dtype="bf16"):
    tensors = {n: values_of("normal", shape, DTYPES[dtype], i)
               for i, (n, shape) in enumerate(MODEL.items())}  # fmt: skip
    return tensors | {"model.norm.weight": np.ones(100, DTYPES[dtype])}


def options(bits, dim, symmetric, only=("*",)):
    return {
        "scheme": f"W{bits}A16" + ("" if symmetric else "_ASYM"), "group_size": 16,
        "format": named("group", group_dim=dim), "only": only,
    }  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    config = {"model_type": "llama", "num_hidden_layers": 1, "dtype": "bfloat16"}
    return write_checkpoint(tmp_path_factory.mktemp("source"), model(), config)


def check(folder, source, bits, dim, symmetric, dtype="bf16"):
    """Every quantized weight of ``folder`` has the values of the second implementation."""
    with open_checkpoint(folder) as out, open_checkpoint(source) as src:
        assert verify(folder).failures == []
        assert verify(folder, src).failures == []
        assert len(find_stored(out)) == len(MODEL)
    with open_tensors(folder) as tensors:
        for name, x in model(dtype).items():
            wanted = x
            if name in MODEL:
                wanted = compress(x, bits, 16, dim, symmetric)[3]
            assert tensors[name].shape == x.shape
            assert np.array_equal(tensors[name], wanted), name


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_conversion_follows_the_rule_and_is_read_again(bits, dim, symmetric, source, tmp_path):
    plan = run_convert(source, tmp_path / "out", **options(bits, dim, symmetric), workers=2)
    assert plan.config["quantization_config"] == {
        "quant_method": "group", "bits": bits, "group_size": 16, "group_dim": dim,
        "symmetric": symmetric, "modules_to_not_convert": [],
    }  # fmt: skip
    check(tmp_path / "out", source, bits, dim, symmetric)


@pytest.mark.parametrize("dtype", ["f16", "f32"])
@pytest.mark.parametrize("dim", [0, 1])
def test_other_dtypes_in_many_shards(dtype, dim, tmp_path):
    src = write_checkpoint(tmp_path / "in", model(dtype), {"model_type": "llama"})
    run_convert(src, tmp_path / "out", **options(5, dim, False), shard_size=1)
    with open_checkpoint(tmp_path / "out") as c:
        assert len(c.files) > 3
    check(tmp_path / "out", src, 5, dim, False, dtype)


def test_whole_columns_that_lie_behind_each_other(tmp_path):
    """Groups of a whole axis: matrices of equal width must not be seen as one."""
    tensors = {f"m.{i}.o_proj.weight": values_of("normal", (8 * i + 4, 24), F32, i) for i in (0, 1)}
    src = write_checkpoint(tmp_path / "in", tensors, {"model_type": "llama"})
    for dim in (0, 1):
        out = tmp_path / str(dim)
        fmt = named("group", group_dim=dim)
        run_convert(src, out, "W4A16_ASYM", group_size=-1, format=fmt)
        with open_tensors(out) as got:
            for name, x in tensors.items():
                assert np.array_equal(got[name], compress(x, 4, ALL, dim, False)[3])


def test_what_the_file_says(source, tmp_path):
    """Names, dtypes and shapes, and the shapes and paddings in __metadata__."""
    run_convert(source, tmp_path / "s8", **options(8, 1, True))
    run_convert(source, tmp_path / "a8", **options(8, 0, False))
    run_convert(source, tmp_path / "a3", **options(3, 1, False))
    conv = "model.layers.0.mixer.conv."
    for folder, wanted, pad in (
        ("s8", {"weight": ("I8", (6, 180)), "weight_scale": ("F32", (6, 18))}, 12),
        ("a8", {"weight": ("U8", (6, 180)), "weight_scale": ("F32", (1, 180)),
                "weight_min": ("F32", (1, 180))}, 10),
        ("a3", {"weight_packed": ("I32", (6, 17)), "weight_scale": ("F32", (6, 18)),
                "weight_min": ("F32", (6, 18))}, 12),
    ):  # fmt: skip
        out = tensors_of(tmp_path / folder)
        found = {n.removeprefix(conv): (t.dtype, t.shape) for n, (t, _) in out.items() if conv in n}
        assert found == wanted
        with open_checkpoint(tmp_path / folder) as c:
            said = c.metadata["model.safetensors"]
        assert said["format"] == "pt"
        assert said[f"group:{conv}weight"] == f"shape=6,20,3,3;pad={pad}"
        assert len(said) == 1 + len(MODEL)
    q = tensors_of(tmp_path / "a8")["model.layers.0.mlp.down_proj.weight"][1]
    codes = compress(model()["model.layers.0.mlp.down_proj.weight"], 8, 16, 0, False)[0]
    assert np.array_equal(np.frombuffer(q, np.uint8).reshape(codes.shape), codes)


def test_what_has_more_dimensions_is_left_unless_it_is_named(source, tmp_path):
    kw = {k: v for k, v in options(8, 1, True).items() if k != "only"}
    run_convert(source, tmp_path / "out", **kw)
    out, raw = tensors_of(tmp_path / "out"), tensors_of(source)
    for name in STACKS:
        assert out[name][1] == raw[name][1]
    plan = run_convert(source, tmp_path / "one", **options(8, 1, True, only=("*.conv",)))
    assert "mlp.down_proj" in " ".join(plan.config["quantization_config"]["modules_to_not_convert"])
    with open_checkpoint(tmp_path / "one") as c:
        assert list(find_stored(c)) == ["model.layers.0.mixer.conv.weight"]


@pytest.mark.parametrize("dim", [0, 1])
def test_from_it_to_floats_and_other_formats(dim, source, tmp_path):
    src = tmp_path / "group"
    run_convert(source, src, **options(4, dim, False))
    run_convert(src, tmp_path / "f32", "F32")
    with open_tensors(src) as wanted:
        got = tensors_of(tmp_path / "f32")
        assert sorted(got) == sorted(wanted.names)
        for name in MODEL:
            assert (got[name][0].dtype, got[name][0].shape) == ("F32", MODEL[name])
            assert got[name][1] == wanted[name].tobytes()
    with pytest.raises(PlanError, match=r"quantized to W4A16_ASYM, which .* cannot hold; --requan"):
        run_convert(src, tmp_path / "ct", "W4A16_ASYM", group_size=-1)
    run_convert(src, tmp_path / "ct", "W8A8", requantize=True)
    with open_tensors(tmp_path / "ct") as got, open_tensors(src) as wanted:
        assert sorted(set(MODEL) - set(got.stored)) == sorted(STACKS)
        for name in MODEL:
            error = np.abs(got[name].astype("f4") - wanted[name])
            assert got[name].shape == MODEL[name]
            assert error.max() <= np.abs(wanted[name]).max() / 200  # 1/2 step, a bf16 scale


@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM", "W8A16"])
def test_a_scheme_of_the_same_name_has_other_numbers(name, tmp_path):
    """Codes of an inverse scale are never written for those of a scale, nor the other way."""
    x = {"m.o_proj.weight": values_of("normal", (8, 64), F32, 0)}
    src = write_checkpoint(tmp_path / "in", x, {"model_type": "llama"})
    fmt = named("group")
    for kw, other in (({"format": fmt}, {}), ({}, {"format": fmt})):
        folder = tmp_path / f"made{len(other)}"
        run_convert(src, folder, name, group_size=32, **kw)
        with pytest.raises(PlanError, match="cannot hold; --requantize converts it from its"):
            run_convert(folder, tmp_path / "out", name, group_size=32, **other)
        run_convert(folder, tmp_path / f"out{len(other)}", name, group_size=32, requantize=True,
                    **other)  # fmt: skip
        with open_tensors(tmp_path / f"out{len(other)}") as t:
            values = t["m.o_proj.weight"]
        noise = np.square(values - x["m.o_proj.weight"]).sum() / np.square(values).sum()
        assert noise < 0.05


def test_it_is_copied_with_its_notes(source, tmp_path):
    src = tmp_path / "group"
    run_convert(source, src, **options(4, 1, True))
    assert run_convert(src, tmp_path / "same", **options(4, 1, True)).verbatim
    run_convert(src, tmp_path / "shards", **options(4, 1, True), shard_size=1)
    check(tmp_path / "shards", source, 4, 1, True)
    run_convert(src, tmp_path / "unnamed", **options(4, 1, True, only=()), shard_size=1 << 20)
    check(tmp_path / "unnamed", source, 4, 1, True)
    run_convert(src, tmp_path / "other", **options(8, 0, False), requantize=True)
    with open_tensors(src) as before, open_tensors(tmp_path / "other") as after:
        for name in MODEL:
            assert np.array_equal(after[name], compress(before[name], 8, 16, 0, False)[3])


def rewritten(folder, change):
    """The header of the only shard, changed."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


KEY = "group:model.layers.0.mixer.conv.weight"


@pytest.mark.parametrize(
    "note",
    [None, "", "shape=6,20,3,3", "shape=6,20,3,3;pad=0", "shape=6,0;pad=0", "shape=6;pad=12",
     "shape=6,20,3,3;pad=12 ", "shape=06,20,3,3;pad=12"],
)  # fmt: skip
def test_a_note_that_is_lost_or_wrong_is_refused(note, source, tmp_path):
    run_convert(source, tmp_path / "out", **options(4, 1, True))

    def change(header):
        del header["__metadata__"][KEY]
        if note is not None:
            header["__metadata__"][KEY] = note

    rewritten(tmp_path / "out", change)
    with pytest.raises(CheckpointError, match=r"mixer\.conv\.weight': __metadata__ says"):
        open_tensors(tmp_path / "out")


def test_a_note_of_another_shape_is_refused(source, tmp_path):
    run_convert(source, tmp_path / "out", **options(4, 1, True))
    rewritten(tmp_path / "out", lambda h: h["__metadata__"].update({KEY: "shape=6,20,9,3;pad=12"}))
    with pytest.raises(CheckpointError, match=r"weight_packed' is I32 \[6, 23\], W4A16 has I32"):
        open_tensors(tmp_path / "out")


@pytest.mark.parametrize("part", ["weight_scale", "weight_min", "weight"])
def test_verify_finds_what_is_one_off(part, source, tmp_path):
    """A scale of a neighbour, a minimum one step up, a code one up."""
    out = tmp_path / "out"
    run_convert(source, out, **options(8, 1, False))
    t, data = tensors_of(out)[f"model.layers.0.mixer.conv.{part}"]
    if part == "weight":
        changed = np.frombuffer(data, np.uint8).copy()
        changed[77] += 1 if changed[77] < 255 else -1
    else:
        changed = np.frombuffer(data, F32).copy()
        if part == "weight_scale":
            changed = np.roll(changed, 1)
        else:
            changed[5] += np.spacing(changed[5]) * 2**18
    raw = bytearray((out / t.file).read_bytes())
    raw[t.start : t.end] = changed.tobytes()
    (out / t.file).write_bytes(raw)
    with open_checkpoint(source) as src:
        (failure,) = verify(out, src).failures
    assert "conv.weight" in failure
    assert "more than half a code step away" in failure


def test_a_minimum_that_is_not_finite_is_found(source, tmp_path):
    out = tmp_path / "out"
    run_convert(source, out, **options(8, 1, False))
    t, _ = tensors_of(out)["model.layers.0.mixer.conv.weight_min"]
    raw = bytearray((out / t.file).read_bytes())
    raw[t.start + 4 : t.start + 8] = np.float32(np.nan).tobytes()
    (out / t.file).write_bytes(raw)
    assert verify(out).failures == [f"{t.name!r} is nan at row 0, column 1"]


def test_what_is_not_finite_is_told_with_its_tensor(tmp_path):
    x = np.ones((4, 6, 2), F32)
    x[2, 3, 1] = np.inf
    src = write_checkpoint(tmp_path / "in", {"m.conv.weight": x}, {"model_type": "llama"})
    with pytest.raises(Exception, match=r"'m.conv.weight' .* row 2, column 7 is NaN or Inf"):
        run_convert(src, tmp_path / "out", **options(8, 1, True))


def test_options_that_do_not_fit_are_refused(source, tmp_path):
    for wrong, kw in (
        ("holds W8A16, W2A16|cannot hold FP8_BLOCK", {"scheme": "FP8_BLOCK", "group_size": None}),
        ("--numerics weight does not apply to the format group", {"numerics": "weight"}),
    ):
        with pytest.raises(PlanError, match=wrong):
            run_convert(source, tmp_path / "out", **{**options(8, 1, True), **kw})
    with pytest.raises(PlanError, match="--group-dim must be 0 or 1, got 2"):
        named("group", group_dim=2)
    with pytest.raises(PlanError, match="--group-dim does not apply to the format awq"):
        named("awq", group_dim=0)
    with pytest.raises(PlanError, match="--scales search does not apply to the format group"):
        named("group").concrete(replace(resolve("W8A16"), scales="search"))


@pytest.mark.parametrize(
    "change",
    [{"bits": 9}, {"bits": True}, {"group_size": 0}, {"group_dim": 2}, {"symmetric": "yes"}],
)
def test_a_config_that_is_not_known_is_refused(change, source, tmp_path):
    run_convert(source, tmp_path / "out", **options(8, 1, True))
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"group compression to .* is not known here"):
        open_tensors(tmp_path / "out")


def test_the_defaults_are_those_of_fastchat():
    scheme_of, ignore = named("group").rules({"quantization_config": {"quant_method": "group"}})
    scheme = scheme_of("m")
    assert (scheme.bits, scheme.block, scheme.symmetric, ignore) == (8, (1, 256), True, [])


def test_the_command_line(source, tmp_path):
    out = str(tmp_path / "out")
    args = ["convert", str(source), out, "-s", "w3a16_asym", "-f", "group", "--group-size", "16",
            "--group-dim", "0", "--only", "*", "--stats", "--no-sync"]  # fmt: skip
    assert CliRunner().invoke(cli, args, catch_exceptions=False).exit_code == 0
    check(tmp_path / "out", source, 3, 0, False)
    said = CliRunner().invoke(cli, ["verify", out, "--source", str(source)])
    assert "every byte is what the source converts to" in said.output
    args = ["plan", str(source), "-s", "w8a16", "--group-dim", "0"]
    assert CliRunner().invoke(cli, args).exit_code == 1
