"""Experts in the stacks that mlx-lm reads, from tensors of two and of three dimensions."""

import json

import ml_dtypes
import numpy as np
import pytest
from family_checkpoints import FAMILIES, E, H, I, draw
from helpers import run_convert, tensors_of, write_checkpoint
from streamq.kernels.reference import quantize

from streamq.checkpoint import open_checkpoint
from streamq.converting import Output, Settings, convert_all
from streamq.errors import CheckpointError, PlanError
from streamq.formats import FORMATS
from streamq.planning import Options, make_plan
from streamq.recipe import load
from streamq.schemes import resolve
from streamq.stored import find_stored, open_tensors, read_rows
from streamq.verifying import verify

MLX = FORMATS["mlx"]
MANY = 12  # the names of ten and more come before that of two
AT = "model.layers.0.mlp."
PARTS = ("gate_proj", "up_proj", "down_proj")


def convert(src, dst, scheme="W4A16_ASYM", **kw):
    return run_convert(src, dst, scheme, group_size=32, format=MLX, **kw)


def contents(folder):
    return {n: (t.dtype, t.shape, data) for n, (t, data) in tensors_of(folder).items()}


def failures(out, source):
    with open_checkpoint(source) as c:
        return verify(out, c).failures


def many():
    """A layer of experts, in the order of their names."""
    tensors = {f"{AT}experts.{e}.{p}.weight": draw(f"{e}{p}", *((H, I) if p[0] == "d" else (I, H)))
               for e in range(MANY) for p in PARTS}  # fmt: skip
    return {n: tensors[n] for n in sorted(tensors)}


@pytest.fixture
def source(tmp_path):
    return write_checkpoint(tmp_path / "in", many(), {"model_type": "qwen3_moe"})


def test_each_expert_has_its_place(source, tmp_path):
    convert(source, tmp_path / "out")
    with open_checkpoint(tmp_path / "out") as c:
        assert sorted(c.tensors) == sorted(
            f"{AT}switch_mlp.{p}.{s}" for p in PARTS for s in ("weight", "scales", "biases")
        )
        assert c.tensors[f"{AT}switch_mlp.up_proj.weight"].shape == (MANY, I, H // 8)
        assert c.tensors[f"{AT}switch_mlp.up_proj.scales"].shape == (MANY, I, H // 32)
        stored = find_stored(c)
        scheme = MLX.concrete(resolve("W4A16_ASYM", 32))
        for e in range(MANY):
            for p in PARTS:
                s = stored[f"{AT}switch_mlp.{p}.weight[#{e}]"]
                want = quantize(many()[f"{AT}experts.{e}.{p}.weight"], scheme)
                assert np.array_equal(read_rows(c, s, 0, s.layout.rows).codes, want.codes)
    assert failures(tmp_path / "out", source) == []


def test_experts_of_a_stack_in_several_files(tmp_path):
    names = list(many())
    src = write_checkpoint(tmp_path / "in", many(), {"model_type": "qwen3_moe"},
                           [names[:5], names[5:20], names[20:]])  # fmt: skip
    one = write_checkpoint(tmp_path / "one", many(), {"model_type": "qwen3_moe"})
    convert(src, tmp_path / "out")
    convert(one, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    convert(one, tmp_path / "shards", shard_size=20_000)
    assert contents(tmp_path / "shards") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["qwen3_5_moe", "qwen3_vl_moe", "granitemoe"])
@pytest.mark.parametrize("scheme", ["W4A16_ASYM", "MXFP4A16"])
def test_two_and_three_dimensions_give_the_same(name, scheme, tmp_path):
    made = FAMILIES[name]()
    src = write_checkpoint(tmp_path / "in", made.tensors, made.config)
    stacked = {s.name for s in made.stacks}
    tensors = {n: x for n, x in made.tensors.items() if n not in stacked}
    each = {n: np.ascontiguousarray(x) for n, x in made.each.items()}
    two = write_checkpoint(tmp_path / "two", tensors | each, made.config)
    for folder, to in ((src, "a"), (two, "b")):
        run_convert(folder, tmp_path / to, scheme, format=MLX,
                    group_size=32 if scheme[0] == "W" else None)  # fmt: skip
        assert failures(tmp_path / to, folder) == []
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert a == b
    assert not any(".experts." in n for n in a)
    parts = {"weight", "scales", "biases"} if scheme[0] == "W" else {"weight", "scales"}
    found = {n.rpartition(".")[2]: shape for n, (_, shape, _) in a.items() if "switch_mlp.up" in n}
    assert found.keys() == parts
    assert found["weight"] == (E, I, H // 8)


def test_mixtral_names_become_those_of_mlx_lm(tmp_path):
    made = FAMILIES["mixtral"]()
    src = write_checkpoint(tmp_path / "in", made.tensors, made.config)
    convert(src, tmp_path / "out")
    at = "model.layers.1.block_sparse_moe."
    with open_tensors(tmp_path / "out") as t:
        for w, p in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            values = t[f"{at}switch_mlp.{p}.weight"]
            for e in range(E):
                want = made.tensors[f"{at}experts.{e}.{w}.weight"].astype(np.float32)
                assert np.abs(values[e] - want).max() < 0.1 * np.abs(want).max()
    assert failures(tmp_path / "out", src) == []


def test_back_to_floats_and_again(source, tmp_path):
    convert(source, tmp_path / "out")
    run_convert(tmp_path / "out", tmp_path / "bf16", "bf16")
    back = tensors_of(tmp_path / "bf16")
    with open_tensors(tmp_path / "out") as t:
        assert sorted(t.names) == sorted(back)
        for name, (info, data) in back.items():
            assert (info.dtype, info.shape) == ("BF16", t[name].shape)
            assert data == t[name].astype(ml_dtypes.bfloat16).tobytes()
    assert failures(tmp_path / "bf16", tmp_path / "out") == []
    assert convert(tmp_path / "out", tmp_path / "again").verbatim


def test_stacks_as_a_source(source, tmp_path):
    """Of other stacks; a format that has none refuses them."""
    convert(source, tmp_path / "w8", "W8A16")
    convert(tmp_path / "w8", tmp_path / "w4", requantize=True)
    assert failures(tmp_path / "w4", tmp_path / "w8") == []
    shape = contents(tmp_path / "w4")[f"{AT}switch_mlp.up_proj.weight"][1]
    assert shape == (MANY, I, H // 8)
    with pytest.raises(PlanError, match=r"switch_mlp.*compressed-tensors cannot.*--format mlx"):
        run_convert(tmp_path / "w8", tmp_path / "ct", "W8A16", group_size=32)


def test_codes_of_another_format_are_kept(source, tmp_path):
    run_convert(source, tmp_path / "ct", "W4A16_ASYM", group_size=32)
    convert(tmp_path / "ct", tmp_path / "out")
    convert(source, tmp_path / "direct")
    assert contents(tmp_path / "out") == contents(tmp_path / "direct")
    assert failures(tmp_path / "out", tmp_path / "ct") == []


def test_slabs_do_not_show(source, tmp_path, monkeypatch):
    convert(source, tmp_path / "whole")
    monkeypatch.setattr("streamq.converting.slabs.SLAB", 1000)
    monkeypatch.setattr("streamq.converting.slabs.STORED_SLAB", 1000)
    monkeypatch.setattr("streamq.converting.jobs.JOB", 4000)
    convert(source, tmp_path / "rows", workers=3)
    assert contents(tmp_path / "whole") == contents(tmp_path / "rows")


@pytest.mark.parametrize("job", [4000, 64 << 20])
def test_beside_an_output_without_stacks(job, source, tmp_path, monkeypatch):
    monkeypatch.setattr("streamq.converting.jobs.JOB", job)
    with open_checkpoint(source) as c:
        plans = [make_plan(c, Options(resolve("W4A16_ASYM", 32), format=MLX)),
                 make_plan(c, Options(resolve("NVFP4A16")))]  # fmt: skip
        outputs = [Output(plan, tmp_path / f"out{i}") for i, plan in enumerate(plans)]
        convert_all(c, outputs, Settings(sync=False, workers=3))
    convert(source, tmp_path / "mlx")
    run_convert(source, tmp_path / "ct", "NVFP4A16")
    assert contents(tmp_path / "out0") == contents(tmp_path / "mlx")
    assert contents(tmp_path / "out1") == contents(tmp_path / "ct")


def test_stacks_that_stay_are_stacks_of_floats(source, tmp_path):
    convert(source, tmp_path / "out", ignore=("*.experts.*.down_proj",))
    name = f"{AT}switch_mlp.down_proj"
    x = np.stack([many()[f"{AT}experts.{e}.down_proj.weight"] for e in range(MANY)])
    assert contents(tmp_path / "out")[name + ".weight"] == ("BF16", x.shape, x.tobytes())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"][name] is False
    assert not any("experts" in key for key in config["quantization"])
    assert failures(tmp_path / "out", source) == []
    assert verify(tmp_path / "out").quantized == 2 * MANY
    _flip(tmp_path / "out", name + ".weight", 3 * H * I * 2 + 8)
    (failure,) = failures(tmp_path / "out", source)
    assert "experts" not in failure
    assert f"{name}.weight[#3]' differs" in failure


@pytest.mark.parametrize("part", ["weight", "biases"])
def test_verify_finds_a_wrong_expert(part, source, tmp_path):
    convert(source, tmp_path / "out")
    run_convert(tmp_path / "out", tmp_path / "bf16", "bf16")
    name = f"{AT}switch_mlp.gate_proj."
    size = tensors_of(tmp_path / "out")[name + part][0].nbytes // MANY
    _flip(tmp_path / "out", name + part, 11 * size + 1)
    (failure,) = failures(tmp_path / "out", source)
    assert f"{name}weight[#11]' at row 0" in failure
    failed = failures(tmp_path / "bf16", tmp_path / "out")
    assert len(failed) == 1
    assert f"{name}weight[#11]' at row 0" in failed[0]


def _flip(folder, name, at):
    with open_checkpoint(folder) as c:
        t = c.tensors[name]
    raw = bytearray((folder / t.file).read_bytes())
    raw[t.start + at] ^= 0x44
    (folder / t.file).write_bytes(raw)


def test_experts_in_several_schemes(source, tmp_path):
    """By projection, which mlx-lm reads, and its config names the stacks."""
    rules = [{"pattern": "*.down_proj", "scheme": "W6A16"}, {"pattern": "*", "scheme": "W4A16"}]
    recipe = load({"rule": [rule | {"group_size": 32} for rule in rules]})
    convert(source, tmp_path / "out", "W4A16", recipe=recipe)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    named = {key: entry["bits"] for key, entry in config.items() if isinstance(entry, dict)}
    assert named == {f"{AT}switch_mlp.down_proj": 6}
    assert failures(tmp_path / "out", source) == []


def test_stacks_in_part_are_refused(source, tmp_path):
    with pytest.raises(PlanError, match=r"3\.down_proj.*quantized and left .--ig.*switch_mlp"):
        convert(source, tmp_path / "out", ignore=("*.experts.3.*",))
    missing = {n: x for n, x in many().items() if ".3." not in n}
    src = write_checkpoint(tmp_path / "less", missing, {"model_type": "qwen3_moe"})
    with pytest.raises(PlanError, match=r"switch_mlp.*none has the number 3;"):
        convert(src, tmp_path / "out")
    other = many() | {f"{AT}experts.5.up_proj.weight": draw("x", I + 8, H)}
    src = write_checkpoint(tmp_path / "other", other, {"model_type": "qwen3_moe"})
    with pytest.raises(PlanError, match=r"5\.up_proj.*BF16 \[72, 128\].*switch_mlp\.up_proj"):
        convert(src, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_stacks_do_not_agree_in_their_number(source, tmp_path):
    convert(source, tmp_path / "out")
    tensors = {n: np.frombuffer(d, np.uint32 if t.dtype == "U32" else ml_dtypes.bfloat16).reshape(
                   t.shape) for n, (t, d) in tensors_of(tmp_path / "out").items()}  # fmt: skip
    tensors[f"{AT}switch_mlp.up_proj.scales"] = tensors[f"{AT}switch_mlp.up_proj.scales"][1:]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    bad = write_checkpoint(tmp_path / "bad", tensors, config)
    with pytest.raises(CheckpointError, match=r"up_proj.*has.*not the same number of experts"):
        open_tensors(bad)
