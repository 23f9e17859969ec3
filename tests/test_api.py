"""The Python verbs, and several outputs from one pass."""

import json
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import write_checkpoint

import streamq
from streamq.checkpoint import Checkpoint
from streamq.cli import cli
from streamq.converting import jobs
from streamq.errors import PlanError, StreamqError

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture
def source(tmp_path):
    rng = np.random.default_rng(3)
    tensors = {
        f"model.layers.{n}.self_attn.{p}.weight":
            (rng.standard_normal((128, 256)) * 0.02).astype(ml_dtypes.bfloat16)
        for n in range(4) for p in NAMES
    }  # fmt: skip
    tensors["model.norm.weight"] = np.ones(256, ml_dtypes.bfloat16)
    names = list(tensors)
    config = {"model_type": "llama", "dtype": "bfloat16"}
    return write_checkpoint(tmp_path / "in", tensors, config, [names[:6], names[6:]])


def files(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def test_the_verbs(source, tmp_path):
    plan = streamq.plan(source, "w4a16", ignore=["*o_proj"])
    summary = streamq.convert(source, tmp_path / "out", "w4a16", ignore=["*o_proj"])
    assert (summary.bytes_in, summary.bytes_out) == (plan.bytes_in, plan.bytes_out)
    report = streamq.verify(tmp_path / "out", source)
    assert (report.failures, report.quantized, report.scheme) == ([], 12, "W4A16")
    with streamq.open(source) as before, streamq.open(tmp_path / "out") as after:
        assert sorted(before.names) == sorted(after.names)
        for name, x in after:
            y = before[name].astype("f4")
            assert (x.dtype == np.float32) == (name.split(".")[-2] in NAMES[:3])
            assert np.abs(x.astype("f4") - y).max() <= 0.1 * np.abs(y).max()
        with pytest.raises(KeyError):
            after["nothing"]


def test_importing_is_cheap():
    code = "import streamq, sys; print('numpy' in sys.modules, 'numba' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"scales": "magic"}, "--scales must be absmax or search, got 'magic'"),
        ({"numerics": "f64"}, "--numerics must be f32 or weight"),
        ({"input_scale": 0}, "--input-scale must be above zero"),
        ({"format": "gguf"}, "unknown format 'gguf'"),
        ({"scale_fmt": "ue8m0"}, "--scale-fmt needs a --format that has it"),
    ],
)
def test_bad_options_are_one_sentence(how, message, source):
    with pytest.raises(PlanError, match=message):
        streamq.plan(source, "w4a16", **how)


def test_an_overlap_is_refused(source):
    with pytest.raises(StreamqError, match="overlaps the source"):
        streamq.convert(source, source / "out", "w4a16")


TO = ["nvfp4", "w4a16", "fp8_block", "awq/w4a16_asym"]


def to(tmp_path, what=TO):
    return [arg for i, w in enumerate(what) for arg in ("--to", f"{w}:{tmp_path / str(i)}")]


@pytest.mark.parametrize(
    ("job", "passes"),
    [(jobs.JOB, 1), (1 << 17, 1.75), (1 << 12, 2)],
    ids=["one job", "some", "rows"],
)
def test_several_outputs_are_those_of_single_runs_and_read_once(
    job, passes, source, tmp_path, monkeypatch
):
    for i, what in enumerate(TO):
        fmt, _, scheme = what.rpartition("/")
        args = ["convert", str(source), str(tmp_path / f"single{i}"), "-s", scheme]
        result = CliRunner().invoke(cli, args + (["-f", fmt] if fmt else []))
        assert result.exit_code == 0, result.output
    monkeypatch.setattr(jobs, "JOB", job)
    read, plain = [0], Checkpoint.pread

    def counted(self, file, start, into):
        read[0] += len(into)
        plain(self, file, start, into)

    monkeypatch.setattr(Checkpoint, "pread", counted)
    result = CliRunner().invoke(cli, ["convert", str(source), *to(tmp_path)])
    assert result.exit_code == 0, result.output
    for i, _ in enumerate(TO):
        assert files(tmp_path / str(i)) == files(tmp_path / f"single{i}")
    # A step larger than a job has a pass of its own for its largest magnitude.
    assert read[0] == passes * 16 * 128 * 256 * 2


def test_several_outputs_in_words_and_json(source, tmp_path):
    result = CliRunner().invoke(cli, ["convert", str(source), *to(tmp_path), "--json"])
    made = json.loads(result.stdout)
    assert [m["scheme"] for m in made] == ["NVFP4", "W4A16", "FP8_BLOCK", "W4A16_ASYM"]
    assert [m["format"] for m in made][2:] == ["compressed-tensors", "awq"]
    planned = json.loads(
        CliRunner().invoke(cli, ["plan", str(source), *to(tmp_path), "--json"]).stdout
    )
    assert [p["bytes_out"] for p in planned] == [m["bytes_out"] for m in made]
    result = CliRunner().invoke(cli, ["plan", str(source), *to(tmp_path)])
    assert result.stdout.count("peak memory about") == len(TO)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["out", "--to", "w4a16:x"], "DST, --scheme, --recipe and targets go without"),
        (["--to", "w4a16"], r"'w4a16' is not \[FORMAT/\]SCHEME:DST"),
        (["--to", "w4a16:x", "--to", "w8a8:x"], "two outputs in one directory"),
        (["out"], "Missing option '--scheme'"),
        (["-s", "w4a16"], "Missing argument 'DST'"),
    ],
)
def test_wrong_usage(args, message, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, ["convert", str(source), *args])
    assert result.exit_code == 2
    assert re.search(message, " ".join(result.stderr.split()))


def test_one_failing_output_leaves_none(source, tmp_path):
    (tmp_path / "1").mkdir()
    result = CliRunner().invoke(cli, ["convert", str(source), *to(tmp_path)])
    assert result.exit_code == 1
    assert "already exists" in result.stderr
    assert not (tmp_path / "0").exists()
