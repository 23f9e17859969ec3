"""What goes wrong gives one sentence, the right exit code, and no destination."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import write_checkpoint

from streamq.cli import cli

BF16 = ml_dtypes.bfloat16
STREAMQ = str(Path(sys.executable).with_name("streamq"))
DOWN = "model.layers.1.mlp.down_proj.weight"
FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
INDEX = "model.safetensors.index.json"


def tensors():
    rng = np.random.default_rng(0)
    names = [
        f"model.layers.{i}.mlp.{p}_proj.weight" for i in (0, 1) for p in ("gate", "up", "down")
    ]
    return {n: (rng.standard_normal((256, 256)) * 0.02).astype(BF16) for n in names}


@pytest.fixture
def source(tmp_path):
    made = tensors()
    return write_checkpoint(tmp_path / "in", made, shards=[list(made)[:3], list(made)[3:]])


def put(value, row=200, col=131, dtype=BF16):
    def spoil(folder):
        made = {n: t.astype(dtype) for n, t in tensors().items()}
        made[DOWN][row, col] = value
        write_checkpoint(folder, made, shards=[list(made)[:3], list(made)[3:]])

    return spoil


def reshape(*shape):
    def spoil(folder):
        made = tensors()
        made[DOWN] = np.ones(shape, BF16)
        write_checkpoint(folder, made, shards=[list(made)[:3], list(made)[3:]])

    return spoil


def truncate(folder):
    os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 100)


def index_ghost(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["ghost.weight"] = FIRST
    (folder / INDEX).write_text(json.dumps(index))


def giant_header(folder):
    raw = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes((100_000_001).to_bytes(8, "little") + raw[8:])


PLACE = rf"{re.escape(DOWN)}.* in {SECOND}: row 200, column 131 is NaN or Inf"

# name: (how the source is spoilt, options, what the sentence says)
SPOILT = {
    "NaN in bf16": (put(np.nan), ["-s", "nvfp4"], PLACE),
    "Inf in bf16": (put(np.inf), ["-s", "nvfp4"], PLACE),
    "NaN in f16": (put(np.nan, dtype=np.float16), ["-s", "fp8_dynamic"], PLACE),
    "-Inf in f32": (put(-np.inf, dtype=np.float32), ["-s", "fp8_block"], PLACE),
    "NaN, integers": (put(np.nan), ["-s", "w4a16_asym"], PLACE),
    "NaN, MX": (put(np.nan), ["-s", "mxfp4"], PLACE),
    "NaN, int8": (put(np.nan), ["-s", "w8a8"], PLACE),
    "truncated shard": (truncate, ["-s", "nvfp4"], f"{SECOND}: .*truncated, download it again"),
    "missing shard": (
        lambda f: (f / SECOND).unlink(), ["-s", "nvfp4"], f"{SECOND}: named by the index but not",
    ),
    "absent tensor": (index_ghost, ["-s", "nvfp4"], "'ghost.weight', but no shard has it"),
    "header over the limit": (
        giant_header, ["-s", "nvfp4"], f"{SECOND}: its header claims 100000001 bytes",
    ),
    "block": (reshape(256, 250), ["-s", "nvfp4"], rf"{DOWN}.*\[256, 250\].*not a multiple.*1x16"),
    "group": (reshape(256, 192), ["-s", "w4a16"], rf"{DOWN}.*192 columns.*--group-size"),
    "stack": (reshape(2, 16, 16), ["-s", "nvfp4"], f"{DOWN}' of shape .* holds the experts"),
    "scheme": (lambda f: None, ["-s", "nvfp5"], "unknown scheme 'nvfp5': did you mean NVFP4"),
    "static": (lambda f: None, ["-s", "fp8"], "calibration data.*FP8_DYNAMIC"),
    "memory": (lambda f: None, ["-s", "nvfp4", "--max-memory", "10k"], "--max-memory .*too little"),
    "input scale": (lambda f: None, ["-s", "nvfp4", "--input-scale", "0"], "must be above zero"),
    "no source": (lambda f: shutil.rmtree(f), ["-s", "nvfp4"], "no such file or directory"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "options", "message"), SPOILT.values(), ids=SPOILT)
def test_a_bad_source_or_option(spoil, options, message, source, tmp_path):
    spoil(source)
    out = tmp_path / "out"
    result = CliRunner().invoke(cli, ["convert", str(source), str(out), "--quiet", *options])
    assert_failed(result.exit_code, result.stderr, message, out)


def assert_failed(code, stderr, message, out):
    assert code == 1, stderr
    sentence, *notes = stderr.splitlines()
    assert re.search(f"^Error: .*{message}", sentence), sentence
    assert sentence.endswith(".")
    assert all(".partial stays, the same command goes on from there" in note for note in notes)
    assert not out.exists()
    assert "Traceback" not in stderr


@pytest.mark.parametrize("shape", [(256,), (1, 256), (3, 256), (255, 256), (1, 16)])
def test_odd_shapes_that_are_fine(shape, source, tmp_path):
    reshape(*shape)(source)
    runner = CliRunner()
    for scheme in ("nvfp4", "fp8_block", "w8a8", "fp8_dynamic"):
        out = str(tmp_path / scheme)
        assert runner.invoke(cli, ["convert", str(source), out, "-s", scheme, "-q"]).exit_code == 0
        assert runner.invoke(cli, ["verify", out, "--source", str(source), "-q"]).exit_code == 0


@pytest.mark.parametrize("where", ["", "inside", ".."])
def test_a_destination_that_overlaps_the_source(where, source):
    out = source / where
    result = CliRunner().invoke(
        cli, ["convert", str(source), str(out), "-s", "nvfp4", "--overwrite"]
    )
    assert result.exit_code == 1
    assert "overlaps the source" in result.stderr
    assert (source / SECOND).exists()


def test_a_destination_that_exists(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("")
    args = ["convert", str(source), str(tmp_path / "out"), "-s", "nvfp4"]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 1
    assert "already exists; give another name, or --overwrite" in result.stderr
    assert (tmp_path / "out" / "precious").exists()
    assert CliRunner().invoke(cli, [*args, "--overwrite"]).exit_code == 0
    assert not (tmp_path / "out" / "precious").exists()


def test_a_bug_is_told_as_one_without_traceback(source, tmp_path, monkeypatch):
    monkeypatch.setattr("streamq.planning.make_plan", lambda *a: 1 / 0)
    args = ["convert", str(source), str(tmp_path / "out"), "-s", "nvfp4"]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 1
    assert "ZeroDivisionError" in result.stderr
    assert "a bug in streamq" in result.stderr
    monkeypatch.setenv("STREAMQ_DEBUG", "1")
    assert isinstance(CliRunner().invoke(cli, args).exception, ZeroDivisionError)


# --- file systems, in a mount namespace of their own -------------------------------------

NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
needs_namespaces = pytest.mark.skipif(
    subprocess.run([*NAMESPACE, "mount -t tmpfs none /mnt"], capture_output=True, check=False)
    .returncode != 0,
    reason="user and mount namespaces are not allowed here",
)  # fmt: skip


def on_tmpfs(options, command, folder):
    """Run a command where ``folder`` is a tmpfs; its exit code, stderr, and what is left there."""
    mount = f'mount -t tmpfs -o {options} none "$0"'
    script = f'{mount}; set +e; {command}; code=$?; ls "$0"; exit $code'
    return subprocess.run(
        [*NAMESPACE, script, str(folder)], capture_output=True, text=True, check=False
    )


@needs_namespaces
def test_a_full_disk_is_known_before(source, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    convert = f"{STREAMQ} convert {source} {disk}/out -s nvfp4 -q"
    result = on_tmpfs("size=100k", convert, disk)
    assert_failed(result.returncode, result.stderr, "needs .* the disk has .* free", disk / "out")
    assert result.stdout == ""


@needs_namespaces
def test_a_disk_that_fills_up_meanwhile(source, tmp_path):
    """The space is there when the plan looks, and gone when the second shard is made."""
    disk = tmp_path / "disk"
    disk.mkdir()
    code = (
        "import streamq.converting.places as c; from streamq.cli import main; import sys;"
        "c.check_destination = lambda *a: 0;"
        "import streamq.writer as w; w.check_destination = lambda *a: 10**9;"
        f"sys.argv = ['streamq', 'convert', '{source}', '{disk}/out', '-s', 'nvfp4', '-q']; main()"
    )
    result = on_tmpfs("size=150k", f'{sys.executable} -c "{code}"', disk)
    assert_failed(result.returncode, result.stderr, "no space left on the device", disk / "out")
    assert result.stdout.split() == ["out.partial"]


@needs_namespaces
def test_a_read_only_mount(source, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    convert = f"{STREAMQ} convert {source} {disk}/out -s nvfp4 -q"
    result = on_tmpfs("ro", convert, disk)
    assert_failed(result.returncode, result.stderr, "cannot be written to .read-only", disk / "out")


# --- interruptions -----------------------------------------------------------------------

SLOW = """
import sys, time
import streamq.converting
from streamq.cli import main
load = streamq.converting.threads.load_kernels
def slow(*args):
    kernels = load(*args)
    quick = kernels.quantize
    def quantize(*a, **k):
        print("working", flush=True)
        time.sleep(0.2)
        return quick(*a, **k)
    kernels.quantize = quantize
    return kernels
streamq.converting.threads.load_kernels = slow
sys.argv = ["streamq", *sys.argv[1:]]
main()
"""


def interrupted(source, out, how):
    """A conversion that is slow enough to be hit in the middle."""
    args = [sys.executable, "-c", SLOW, "convert", source, out, "-s", "nvfp4", "-q", "-j", "1"]
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "working\n"
    process.send_signal(how)
    _, stderr = process.communicate(timeout=30)
    return process.returncode, stderr


def test_ctrl_c(source, tmp_path):
    code, stderr = interrupted(source, tmp_path / "out", signal.SIGINT)
    assert code == 130
    assert stderr.splitlines()[0] == "Interrupted."
    assert "out.partial stays, the same command goes on from there" in stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "out").exists()


def test_a_run_after_a_kill_gives_what_an_undisturbed_one_gives(source, tmp_path):
    code, _ = interrupted(source, tmp_path / "out", signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists()
    for out in ("out", "undisturbed"):
        args = [STREAMQ, "convert", source, tmp_path / out, "-s", "nvfp4", "-q"]
        subprocess.run(args, check=True)
    assert not (tmp_path / "out.partial").exists()
    a, b = (
        {p.name: p.read_bytes() for p in (tmp_path / d).iterdir()} for d in ("out", "undisturbed")
    )
    assert a == b


def test_a_closed_pipe_is_no_traceback(source):
    """``streamq plan ... | head -1``"""
    process = subprocess.Popen(
        [STREAMQ, "plan", source, "-s", "nvfp4"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    time.sleep(0.1)
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    process.wait()
