"""The command line as its users type it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import tensors_of, write_checkpoint

from streamq.checkpoint import open_checkpoint
from streamq.cli import cli
from streamq.families import Family
from streamq.formats import FORMATS
from streamq.schemes import SCHEMES

BF16 = ml_dtypes.bfloat16


def run(*args):
    return CliRunner().invoke(cli, [str(a) for a in args])


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Small, but with weights of more than one slab, of odd sizes, in three dtypes and shards."""
    rng = np.random.default_rng(0)
    tensors = {"model.embed_tokens.weight": (301, 512), "lm_head.weight": (301, 512)}
    for n in range(2):
        layer = f"model.layers.{n}."
        tensors |= {f"{layer}self_attn.{p}_proj.weight": (512, 512) for p in "qkvo"}
        tensors |= {f"{layer}mlp.{p}_proj.weight": (1536, 512) for p in ("gate", "up")}
        tensors |= {
            f"{layer}mlp.down_proj.weight": (512, 1536), f"{layer}input_layernorm.weight": (512,)
        }  # fmt: skip
    dtypes = {"layers.1.self_attn": np.float32, "layers.1.mlp": np.float16}
    made = {}
    for name, shape in tensors.items():
        dtype = next((d for part, d in dtypes.items() if part in name), BF16)
        made[name] = (rng.standard_normal(shape) * 0.02).astype(dtype)
    names = list(made)
    folder = tmp_path_factory.mktemp("source") / "in"
    shards = [names[:4], names[4:11], names[11:]]
    write_checkpoint(folder, made, shards=shards)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_help_needs_no_heavy_imports():
    code = (
        "import sys; from streamq.cli import cli\n"
        "try: cli(['--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "heavy = {'numpy', 'numba', 'rich', 'ml_dtypes', 'huggingface_hub', 'torch'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_conversion_needs_no_torch(source, tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['triton'] = None\n"
        "from streamq.cli import cli\n"
        f"cli(['convert', {str(source)!r}, {str(tmp_path / 'out')!r}, '-s', 'nvfp4', '-q'])\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_same_bytes_for_any_workers_and_memory(scheme, source, tmp_path):
    ways = {
        "one": ["-j", 1],
        "two": ["-j", 2],
        "seven": ["-j", 7, "--max-memory", "8MiB"],
        "no-sync": ["--no-sync"],
    }
    for way, options in ways.items():
        result = run("convert", source, tmp_path / way, "-s", scheme, "-q", *options)
        assert result.exit_code == 0, result.output
    first, *rest = (files(tmp_path / way) for way in ways)
    assert all(other == first for other in rest)
    assert first["tokenizer.json"] == b"{}"
    assert "model-00003-of-00003.safetensors" in first


def test_convert_tells_what_it_does(source, tmp_path):
    out = tmp_path / "out"
    result = run("convert", source, out, "--scheme", "NVFP4A16")
    assert result.exit_code == 0
    plan, needs, *_, summary = result.stdout.splitlines()
    assert "14 weights to NVFP4A16, 4 tensors as they are" in plan
    assert "peak memory" in needs
    assert "free" in needs
    assert summary.startswith(f"{out}: ")
    assert "GB/s of the source" in summary or "MB/s of the source" in summary
    assert "cpu (numba)" in summary
    assert run("convert", source, tmp_path / "b", "-s", "w4a16", "--quiet").output == ""


def test_plan_and_dry_run_print_the_same_and_write_nothing(source, tmp_path):
    a = run("plan", source, tmp_path / "out", "-s", "fp8_block")
    b = run("convert", source, tmp_path / "out", "-s", "fp8_block", "--dry-run")
    assert a.exit_code == b.exit_code == 0
    assert a.stdout == b.stdout
    assert list(tmp_path.iterdir()) == []
    for text in (
        "model.layers.*.mlp.gate_proj.weight", "1536 x 512", "output head", "embedding",
        "not a 2-D weight", "F16", "free", "x smaller",
    ):  # fmt: skip
        assert text in a.stdout


def test_plan_as_json_is_what_convert_does(source, tmp_path):
    plan = json.loads(run("plan", source, "-s", "w4a16_asym", "--json").stdout)
    done = json.loads(run("convert", source, tmp_path / "o", "-s", "w4a16_asym", "--json").stdout)
    assert plan["bytes_in"] == done["bytes_in"]
    assert plan["bytes_out"] == done["bytes_out"]
    sizes = {s["name"]: s["bytes"] for s in plan["shards"]}
    found = {p.name: p.stat().st_size for p in (tmp_path / "o").glob("*.safetensors")}
    assert sizes == found
    assert {t["name"] for t in plan["tensors"]} == tensors_of(source).keys()
    assert {t["reason"] for t in plan["tensors"] if t["scheme"] is None} == {
        "embedding", "output head", "not a 2-D weight"
    }  # fmt: skip


def test_inspect(source):
    text = run("inspect", source).stdout
    for part in (
        "llama, 18 tensors", "3 files, not quantized", "BF16 (16 bits)",
        "fused as qkv: model.layers.*.self_attn.{k_proj, q_proj, v_proj} x 2, 2 across shards",
    ):  # fmt: skip
        assert part in text
    info = json.loads(run("inspect", source, "--json").stdout)
    assert info["parameters"] == sum(t.numel for t, _ in tensors_of(source).values())
    assert info["dtypes"].keys() == {"BF16", "F16", "F32"}


def test_inspect_of_what_convert_wrote(source, tmp_path):
    run("convert", source, tmp_path / "o", "-s", "mxfp8", "-q")
    assert "quantized: compressed-tensors mxfp8-quantized" in run("inspect", tmp_path / "o").stdout


def test_verify(source, tmp_path):
    run("convert", source, tmp_path / "o", "-s", "w8a8", "-q")
    result = run("verify", tmp_path / "o", "--source", source)
    assert result.exit_code == 0
    assert "14 weights in W8A8" in result.stdout
    assert "every byte is what the source converts to" in result.stdout
    report = json.loads(run("verify", tmp_path / "o", "--source", source, "--json").stdout)
    assert report["ok"] is True
    assert len(report["sqnr_db_by_tensor"]) == 14


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp8", "fp8_block", "w3a16", "w4a16_asym"])
def test_stats_are_what_verify_finds(source, tmp_path, scheme):
    out = tmp_path / "o"
    made = json.loads(run("convert", source, out, "-s", scheme, "--stats", "--json").stdout)
    found = json.loads(run("verify", out, "--source", source, "--json").stdout)
    for key in ("sqnr_db", "sqnr_db_by_kind", "sqnr_db_by_tensor"):
        assert made[key] == pytest.approx(found[key], abs=1e-3)
    assert made["sqnr_db_by_kind"].keys() >= {"mlp.down_proj", "self_attn.q_proj"}
    shutil.rmtree(out)
    text = run("convert", source, out, "-s", scheme, "--stats").stdout
    assert f"weight SQNR {made['sqnr_db']:.2f} dB" in text
    assert text.count(" dB  model.") == 5


def test_only_ignore_and_group_size(source, tmp_path):
    result = run("convert", source, tmp_path / "o", "-s", "w4a16", "--group-size", 32,
                 "--only", "*.mlp.*", "--ignore", r"re:.*layers\.1\.", "-q")  # fmt: skip
    assert result.exit_code == 0
    out = tensors_of(tmp_path / "o")
    scales = {n: t.shape for n, (t, _) in out.items() if n.endswith("weight_scale")}
    assert scales == {
        "model.layers.0.mlp.gate_proj.weight_scale": (1536, 16),
        "model.layers.0.mlp.up_proj.weight_scale": (1536, 16),
        "model.layers.0.mlp.down_proj.weight_scale": (512, 48),
    }
    assert run("verify", tmp_path / "o", "--source", source).exit_code == 0


@pytest.mark.parametrize(("size", "limit"), [("2MB", 2_000_000), ("400k", 400_000), ("1", 1)])
def test_shard_size(size, limit, source, tmp_path):
    args = ("convert", source, tmp_path / "o", "-s", "nvfp4", "--shard-size", size, "-q")
    assert run(*args).exit_code == 0
    assert run("verify", tmp_path / "o", "--source", source).exit_code == 0
    for path in (tmp_path / "o").glob("*.safetensors"):
        with open_checkpoint(path) as c:
            groups = {Family({}).group_of(n.removesuffix(".weight_packed")) for n in c.tensors}
            modules = {n for n in c.tensors if n.endswith(("_packed", ".weight"))}
            alone = len(modules) == 1 or len(groups - {None}) == 1
            assert c.nbytes <= limit or alone, path.name


def test_a_single_file_without_config(tmp_path):
    src = write_checkpoint(tmp_path / "in", {"m.o_proj.weight": np.ones((32, 64), BF16)})
    (src / "config.json").unlink()
    result = run("convert", src / "model.safetensors", tmp_path / "out", "-s", "nvfp4a16")
    assert result.exit_code == 0
    assert "warning: the source has no config.json" in result.stdout
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(config) == ["quantization_config"]


USAGE = {
    "no scheme": ("convert", "in", "out"),
    "no destination": ("convert", "in", "--scheme", "nvfp4"),
    "bad size": ("convert", "in", "out", "-s", "nvfp4", "--max-memory", "lots"),
    "zero size": ("convert", "in", "out", "-s", "nvfp4", "--shard-size", "0"),
    "zero workers": ("convert", "in", "out", "-s", "nvfp4", "-j", "0"),
    "bad numerics": ("convert", "in", "out", "-s", "nvfp4", "--numerics", "f64"),
    "unknown option": ("plan", "in", "-s", "nvfp4", "--what"),
    "unknown command": ("quantise",),
}


@pytest.mark.parametrize("args", USAGE.values(), ids=USAGE)
def test_wrong_usage_exits_with_2(args):
    result = run(*args)
    assert result.exit_code == 2
    assert "Error" in result.stderr or "Usage" in result.stderr


@pytest.mark.parametrize("command", ["convert", "plan", "inspect", "verify"])
def test_every_option_has_help(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    (options,) = (cli.commands[command].params,)
    assert all(p.help for p in options if p.param_type_name == "option")


def test_progress_is_lines_where_there_is_no_terminal(source, tmp_path, monkeypatch):
    monkeypatch.setattr("streamq.progress.QUIET_INTERVAL", 0.0)
    result = run("convert", source, tmp_path / "o", "-s", "nvfp4")
    lines = [line for line in result.stderr.splitlines() if line.startswith("converting ")]
    assert lines
    assert "\x1b" not in result.stderr
    assert "s left, model." in lines[-1]


def test_progress_is_a_bar_in_a_terminal(source, tmp_path):
    import pty

    streamq = Path(sys.executable).with_name("streamq")
    main, child = pty.openpty()
    process = subprocess.Popen(
        [streamq, "convert", source, tmp_path / "o", "-s", "nvfp4"], stdout=child, stderr=child
    )
    os.close(child)
    shown = b""
    while True:
        try:
            piece = os.read(main, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(main)
    assert process.wait() == 0
    assert b"converting" in shown
    assert b"\x1b[" in shown


def test_formats_are_listed_with_their_schemes_and_the_default():
    text = run("formats").stdout
    made = json.loads(run("formats", "--json").stdout)
    assert [f["name"] for f in made] == list(FORMATS)
    for f in made:
        assert f["name"] in text
        assert f["schemes"] == list(FORMATS[f["name"]].presets)
    assert "Without --format: compressed-tensors; for BF16, F16, F32 plain." in text
