"""Repairs: what is wrong is set right, what is right stays, and it is told what that costs."""

import json
import re
import shutil
from math import isinf

import ascend_checkpoints as ascend
import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import run_convert, tensors_of, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from streamq.kernels.reference import quantize
from tampering import INDEX, drop, entry, first_shard, index, shards

import streamq
from streamq.checkpoint import open_checkpoint
from streamq.cli import cli
from streamq.errors import CheckpointError
from streamq.formats import named
from streamq.repairing import make_plan, open_broken
from streamq.repairing.scales import Member, common
from streamq.schemes import SCHEMES
from streamq.verifying import verify

E4M3 = ml_dtypes.float8_e4m3fn
LAYER = "model.layers.0."
SIZES = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64), "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96), "mlp.experts.0.gate_proj": (64, 64),
    "mlp.experts.0.up_proj": (64, 64), "mlp.experts.0.down_proj": (64, 64),
}  # fmt: skip
FORMATS = {"compressed-tensors": "weight_global_scale", "modelopt": "weight_scale_2"}


def weights():
    """Members of fused groups whose largest values differ, so that they want other scales."""
    rng = np.random.default_rng(0)
    spread = {"k_proj": 3.1, "v_proj": 0.4, "up_proj": 2.14}
    made = {}
    for name, shape in SIZES.items():
        factor = spread.get(name.rpartition(".")[2], 1.0)
        made[f"{LAYER}{name}.weight"] = rng.standard_normal(shape) * 0.05 * factor
    made["model.embed_tokens.weight"] = rng.standard_normal((32, 64))
    made["lm_head.weight"] = rng.standard_normal((32, 64))
    return {name: w.astype(ml_dtypes.bfloat16) for name, w in made.items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    made = weights()
    names = list(made)
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 1, "tie_word_embeddings": False}
    folder = tmp_path_factory.mktemp("source") / "in"
    return write_checkpoint(folder, made, config, [names[:5], names[5:]])


@pytest.fixture(scope="module")
def good(source, tmp_path_factory):
    """Clean checkpoints by format."""
    folder = tmp_path_factory.mktemp("good")
    for fmt in FORMATS:
        run_convert(source, folder / fmt, "NVFP4", format=named(fmt))
    return folder


def apart(folder, fmt):
    """Each weight quantized by itself, as tools do that know nothing of fused groups."""
    suffix = FORMATS[fmt]
    alone = {}
    for name, w in weights().items():
        if name.startswith(LAYER):
            w = w.astype(np.float32)
            g = np.full(len(w), 2688 / np.abs(w).max(), np.float32)
            q = quantize(w, SCHEMES["NVFP4"], outer=g)
            packed = (q.codes[:, 0::2] | (q.codes[:, 1::2] << 4)).astype(np.uint8)
            alone[name.removesuffix(".weight")] = (packed, q.scale, g[0])
    with shards(folder) as files:
        for tensors in files.values():
            for module, (packed, scale, g) in alone.items():
                codes = ".weight_packed" if fmt == "compressed-tensors" else ".weight"
                g = g if fmt == "compressed-tensors" else 1 / g
                for ending, value in ((codes, packed), (".weight_scale", scale),
                                      (f".{suffix}", g.astype(np.float32))):  # fmt: skip
                    if (name := module + ending) in tensors:
                        tensors[name] = tensors[name]._replace(data=value.tobytes())


@pytest.fixture(scope="module")
def bad(good, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    for fmt in FORMATS:
        shutil.copytree(good / fmt, folder / fmt)
        apart(folder / fmt, fmt)
    return folder


def run(*args):
    return CliRunner().invoke(cli, ["repair", *map(str, args)])


def values(folder):
    with streamq.open(folder) as tensors:
        return dict(tensors)


# --- global scales -----------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
def test_fused_groups_get_one_scale_and_verify(fmt, bad, source, tmp_path):
    assert any("repair" in f for f in verify(bad / fmt).failures)
    result = run(bad / fmt, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "repairs 3 fused groups with scales that differ" in result.stdout
    report = verify(tmp_path / "out")
    assert report.failures == []
    assert not [f for f in report.findings if f.severity == "error"]


@pytest.mark.parametrize("fmt", FORMATS)
def test_what_is_told_is_what_changed(fmt, bad, tmp_path):
    before = values(bad / fmt)
    result = run(bad / fmt, tmp_path / "out", "--json")
    said = json.loads(result.stdout)
    after = values(tmp_path / "out")
    fused = [module for group in said["groups"] for module in group["old"]]
    assert len(fused) == 7
    for group in said["groups"]:
        old = np.concatenate([before[f"{m}.weight"].ravel() for m in group["old"]])
        new = np.concatenate([after[f"{m}.weight"].ravel() for m in group["old"]])
        noise = np.square(new.astype(np.float64) - old).sum()
        sqnr = 10 * np.log10(np.square(old.astype(np.float64)).sum() / noise)
        assert sqnr == pytest.approx(group["sqnr"], abs=1e-3)
        assert sqnr > 28
        there = old != 0
        change = np.abs(new[there] / old[there] - 1).max()
        assert change == pytest.approx(group["change"], abs=1e-5)
    for name in before.keys() - {f"{m}.weight" for m in fused}:
        assert before[name].tobytes() == after[name].tobytes()


@pytest.mark.parametrize("fmt", FORMATS)
def test_codes_stay(fmt, bad, tmp_path):
    run(bad / fmt, tmp_path / "out")
    was, is_ = tensors_of(bad / fmt), tensors_of(tmp_path / "out")
    changed = {name for name in was if was[name][1] != is_[name][1]}
    assert was.keys() == is_.keys()
    assert {name.rpartition(".")[2] for name in changed} == {"weight_scale", FORMATS[fmt]}


@pytest.mark.parametrize("divisor", [True, False])
@pytest.mark.parametrize("octaves", [0, 1, 3, -2])
def test_powers_of_two_cost_nothing(octaves, divisor):
    energy = np.zeros(256)
    energy[np.arange(64, 100)] = 1.0
    stored = float(np.float32(33333.3 if divisor else 3e-5))
    one = 1 / stored if divisor else stored
    found = common([Member(one, energy), Member(one * 2.0**octaves, energy)], divisor)
    assert (isinf(found.sqnr), found.change) == (True, 0.0)


SCALES = st.lists(st.integers(8, 126), min_size=1, max_size=20, unique=True)


@given(st.lists(st.tuples(st.floats(1e-6, 1e-3), SCALES), min_size=2, max_size=4), st.booleans())
def test_no_global_scale_of_a_member_is_better(drawn, divisor):
    """Against each member's own, as loaders would take it, clipped where it must be."""
    members = []
    for multiplier, used in drawn:
        energy = np.zeros(256)
        energy[used] = np.arange(1, len(used) + 1)
        stored = float(np.float32(1 / multiplier if divisor else multiplier))
        members.append(Member(1 / stored if divisor else stored, energy))
    found = common(members, divisor)
    real = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float64)

    def noise(m, tables):
        return sum(
            float((x.energy * np.nan_to_num((t * m - real * x.multiplier)) ** 2).sum())
            for x, t in zip(members, tables, strict=True)
        )

    chosen = 1 / found.stored if divisor else found.stored
    mine = noise(chosen, [np.frombuffer(t, E4M3).astype(np.float64) for t in found.tables])
    for other in members:
        rounded = [
            np.clip(np.nan_to_num(real) * x.multiplier / other.multiplier, -448, 448)
            .astype(np.float32).astype(E4M3).astype(np.float64)
            for x in members
        ]  # fmt: skip
        # A scale is not zero.
        rounded = [np.where((t == 0) & (real > 0), 2.0**-9, t) for t in rounded]
        assert mine <= noise(other.multiplier, rounded) * (1 + 1e-6) + 1e-30
    for x, table in zip(members, found.tables, strict=True):
        scales = np.frombuffer(table, E4M3).astype(np.float32)[x.energy > 0]
        assert (np.isfinite(scales) & (scales > 0)).all()


def test_input_scales_get_the_widest_range(good, tmp_path):
    for fmt, suffix, want in (("compressed-tensors", "input_global_scale", 0.5),
                              ("modelopt", "input_scale", 1.0)):  # fmt: skip
        folder = shutil.copytree(good / fmt, tmp_path / fmt)
        name = f"{LAYER}self_attn.k_proj.{suffix}"
        entry(name, lambda old: old._replace(data=np.float32([0.5]).tobytes()))(folder)
        assert run(folder, tmp_path / f"{fmt}-out").exit_code == 0
        is_ = tensors_of(tmp_path / f"{fmt}-out")
        members = [f"{LAYER}self_attn.{m}_proj.{suffix}" for m in "qkv"]
        assert {float(np.frombuffer(is_[m][1], np.float32)[0]) for m in members} == {want}
        assert verify(tmp_path / f"{fmt}-out").failures == []


# --- files -------------------------------------------------------------------------------


def unmark(folder):
    path = min(folder.glob("*.safetensors"))
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header["__metadata__"] = {"made_by": "x"}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def one_file(folder):
    with shards(folder) as files:
        first, other = sorted(files)
        files[first] |= files.pop(other)
        (folder / other).unlink()
    (folder / INDEX).unlink()
    (folder / first).rename(folder / "weights.safetensors")


NORM, FIRST = "model.embed_tokens.weight", f"{LAYER}self_attn.q_proj.weight_scale"
BROKEN = {
    "no index": (lambda f: (f / INDEX).unlink(), f"2 shards without {INDEX}"),
    "index is not JSON": (lambda f: (f / INDEX).write_text("{"), "is not valid JSON"),
    "index is no object": (lambda f: (f / INDEX).write_text("[]"), "must hold a JSON object"),
    "wrong total_size": (index(lambda i: i["metadata"].update(total_size=1)), "total_size is 1"),
    "no metadata": (index(lambda i: i.pop("metadata")), "total_size is None"),
    "tensor in another file": (
        index(lambda i: i["weight_map"].update({NORM: i["weight_map"][FIRST]})),
        f"holds tensor '{NORM}', but it is in",
    ),
    "tensor not named": (index(lambda i: i["weight_map"].pop(NORM)), "the index does not name"),
    "tensor that is nowhere": (
        index(lambda i: i["weight_map"].update(ghost=i["weight_map"][NORM])),
        "the index names 'ghost', which no shard has",
    ),
    "no format": (unmark, '"format": "pt" is missing in model-00001-of-00002.safetensors'),
    "one file of another name": (one_file, "it becomes model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_mended(name, good, tmp_path):
    change, said = BROKEN[name]
    folder = shutil.copytree(good / "modelopt", tmp_path / "in")
    change(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    result = run(folder, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert said in result.stdout
    assert verify(tmp_path / "out").failures == []
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    was, is_ = tensors_of(good / "modelopt"), tensors_of(tmp_path / "out")
    assert {n: d for n, (_, d) in was.items()} == {n: d for n, (_, d) in is_.items()}
    assert not (tmp_path / "out.partial").exists()


def test_other_metadata_stays(good, tmp_path):
    folder = shutil.copytree(good / "modelopt", tmp_path / "in")
    unmark(folder)
    run(folder, tmp_path / "out")
    with open_checkpoint(tmp_path / "out") as c:
        assert c.metadata[c.files[0]] == {"format": "pt", "made_by": "x"}


BEYOND = {
    "shard missing by its name": (
        lambda f: [p.unlink() for p in (f / INDEX, max(f.glob("*.safetensors")))],
        "'model-00002-of-00002.safetensors' is missing from .*download it again",
    ),
    "shard missing by the index": (
        index(lambda i: i["weight_map"].update(ghost="lost.safetensors")),
        "'lost.safetensors' is missing from",
    ),
    "shard truncated": (first_shard(lambda old: old[:-7]), "it is truncated"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("["), "config.json"),
    "no directory": (shutil.rmtree, "no such directory"),
}


@pytest.mark.parametrize("name", BEYOND)
def test_what_nothing_can_repair_is_an_error(name, good, tmp_path):
    change, sentence = BEYOND[name]
    folder = shutil.copytree(good / "modelopt", tmp_path / "in")
    change(folder)
    result = run(folder, tmp_path / "out")
    assert result.exit_code == 1
    assert re.search(f"^Error: .*{sentence}", result.stderr)
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


def test_scales_that_cannot_be_looked_at_are_said(good, tmp_path):
    folder = shutil.copytree(good / "compressed-tensors", tmp_path / "in")
    drop(f"{LAYER}self_attn.q_proj.weight_scale")(folder)
    (folder / INDEX).unlink()
    result = run(folder, tmp_path / "out")
    assert result.exit_code == 0
    assert "warning: scales are not looked at, because 'model.layers.0" in result.stdout
    assert (tmp_path / "out" / INDEX).is_file()


@pytest.mark.parametrize("fmt", FORMATS)
def test_nothing_to_repair_writes_nothing(fmt, good, tmp_path):
    result = run(good / fmt, tmp_path / "out")
    assert (result.exit_code, result.stdout) == (0, f"{good / fmt}: nothing to repair\n")
    assert list(tmp_path.iterdir()) == []


def test_dry_run_tells_and_writes_nothing(bad, tmp_path):
    folder = bad / "modelopt"
    result = run(folder, "--dry-run")
    assert result.exit_code == 0
    assert "repairs 3 fused groups" in result.stdout
    assert re.search(r"SQNR \d\d\.\d dB, values change by \d+\.\d% at most", result.stdout)
    said = json.loads(run(folder, tmp_path / "out", "--dry-run", "--json").stdout)
    assert (said["dst"], len(said["groups"])) == (None, 3)
    assert list(tmp_path.iterdir()) == []


def test_a_destination_is_not_replaced_unasked(bad, tmp_path):
    (tmp_path / "out").mkdir()
    result = run(bad / "modelopt", tmp_path / "out")
    assert (result.exit_code, result.stderr.count("already exists")) == (1, 1)
    assert run(bad / "modelopt", tmp_path / "out", "--overwrite").exit_code == 0
    assert run(bad / "modelopt", bad / "modelopt" / "inside").exit_code == 1
    assert run(bad / "modelopt").exit_code == 2


def test_a_global_scale_that_is_none_is_refused(bad, tmp_path):
    folder = shutil.copytree(bad / "modelopt", tmp_path / "in")
    name = f"{LAYER}self_attn.k_proj.weight_scale_2"
    entry(name, lambda old: old._replace(data=np.float32([0.0]).tobytes()))(folder)
    source, wrong = open_broken(folder)
    with source, pytest.raises(CheckpointError, match=r"k_proj.weight_scale_2' is 0.0, which"):
        make_plan(source, wrong)


# --- the description of Ascend's checkpoints ------------------------------------------------


def test_missing_entries_of_a_description_are_added(tmp_path):
    write_checkpoint(tmp_path / "in", ascend.moe(), ascend.CONFIG)
    run_convert(tmp_path / "in", tmp_path / "good", "W8A8", format=ascend.ASCEND)
    said = ascend.description(tmp_path / "good")
    gone = [f"{ascend.GATE}.weight_scale", f"{LAYER}input_layernorm.weight"]
    broken = shutil.copytree(tmp_path / "good", tmp_path / "broken")
    text = json.dumps({k: v for k, v in said.items() if k not in gone})
    (broken / ascend.FILE).write_text(text)
    assert len([f for f in verify(broken).failures if "has no entry" in f]) == 2
    result = run(broken, tmp_path / "out")
    assert "repairs 2 missing entries of quant_model_description.json" in result.stdout
    assert ascend.description(tmp_path / "out") == said
    assert verify(tmp_path / "out").failures == []
    assert run(tmp_path / "good", tmp_path / "x").stdout.endswith("nothing to repair\n")


def test_types_that_nothing_tells_are_said(tmp_path):
    write_checkpoint(tmp_path / "in", ascend.moe(), ascend.CONFIG)
    run_convert(tmp_path / "in", tmp_path / "good", "W8A8", format=ascend.ASCEND)
    said = ascend.description(tmp_path / "good")
    left = {k: v for k, v in said.items() if not k.startswith(ascend.GATE)}
    (tmp_path / "good" / ascend.FILE).write_text(json.dumps(left))
    result = run(tmp_path / "good", "--dry-run")
    assert f"warning: the type of '{ascend.GATE}.weight" in result.stdout
