"""The pipeline with torch on the CPU and the shim's kernels for NPUs, and what an NPU lacks."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from ascendc_shim import needs_compiler
from click.testing import CliRunner
from helpers import write_checkpoint
from streamq.kernels import ascendc
from streamq.kernels.ascendc import chips, loader

import streamq
from streamq.cli import cli
from streamq.converting import Settings

needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")

A2, LATER = "Ascend910B2", "Ascend950PR_9599"
NPU, CPU = "ascendc on npu:", "cpu (numba)"
DOWN = "model.layers.0.mlp.down_proj.weight"
MIXED = {"scheme": "w8a8", "rule": [{"pattern": "*.o_proj", "scheme": "w4a16"}]}

# What runs where: codes that lie one in a byte, or that the format packs, on the chips that
# have the scheme.
ROWS = [
    (A2, "w8a8", {}, [NPU]),
    (A2, "w8a8", {"numerics": "weight"}, [NPU]),
    (A2, "W8A8_DYNAMIC", {"format": "ascend"}, [NPU]),
    (A2, "w4a16", {"format": "ascend"}, [NPU]),
    (A2, "w4a16", {"format": "ascend", "group_size": 64}, [NPU]),
    (LATER, "fp8_dynamic", {}, [NPU]),
    (LATER, "fp8_block", {"format": "fp8"}, [NPU]),
    (LATER, "mxfp8", {}, [NPU]),
    (LATER, "W8A8_MXFP8", {"format": "ascend"}, [NPU]),
    (A2, None, {"recipe": MIXED}, [NPU, "3 weights to W4A16"]),
    ("Ascend310P3", "w8a8", {}, [CPU, "9 weights to W8A8"]),
    (A2, "fp8_dynamic", {}, [CPU, "9 weights to FP8_DYNAMIC"]),
    (LATER, "mxfp8", {"numerics": "weight"}, [CPU, "9 weights to MXFP8"]),
    (LATER, "nvfp4", {}, [CPU, "9 weights to NVFP4"]),
    (LATER, "w4a16", {}, [CPU, "9 weights to W4A16"]),
]


def name_of(row):
    chip, scheme, how, _ = row
    return "-".join([chip, scheme or "mixed", *(str(v) for k, v in how.items() if k != "recipe")])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    rng = np.random.default_rng(0)
    tensors = {
        f"model.layers.{n}.self_attn.{p}_proj.weight":
            (rng.standard_normal((256, 128)) * 0.02).astype(dtype)
        for n, dtype in enumerate((ml_dtypes.bfloat16, np.float16, np.float32)) for p in "qko"
    }  # fmt: skip
    return write_checkpoint(tmp_path_factory.mktemp("source") / "in", tensors)


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    x = np.ones((256, 128), ml_dtypes.bfloat16)
    x[200, 31] = np.nan
    return write_checkpoint(tmp_path_factory.mktemp("spoilt") / "in", {DOWN: x})


@pytest.fixture(scope="module")
def done(source, spoilt, tmp_path_factory):
    """What each row, the spoilt one and ``whole_tensor`` said, and the folder of the outputs."""
    out = tmp_path_factory.mktemp("out")
    rows = [(str(source), *row[:3]) for row in ROWS] + [(str(spoilt), A2, "w8a8", {})]
    done = subprocess.run(
        [sys.executable, "npu_pipeline.py", out, json.dumps(rows)],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), out


@needs_compiler
@needs_torch
@pytest.mark.parametrize("row", range(len(ROWS)), ids=map(name_of, ROWS))
def test_the_bytes_are_those_of_the_cpu(row, source, done, tmp_path):
    said, out = done
    (_, scheme, how, (ran, *left)), (backend, *remarks) = ROWS[row], said[row]
    streamq.convert(source, tmp_path / "out", scheme, settings=Settings(sync=False), **how)
    for path in (tmp_path / "out").iterdir():
        assert (out / str(row) / path.name).read_bytes() == path.read_bytes(), said[row]
    assert backend.startswith(ran)
    assert backend.endswith(CPU) == bool(left)
    fell = [r for r in remarks if "ran on" in r]
    assert fell == [f"{part} ran on {CPU}, for ascendc does not have it" for part in left]
    short = [r for r in remarks if r not in fell]
    assert bool(short) == (ran == NPU)
    assert all(re.match(r"npu:[01] ran out of memory and went on with slabs", r) for r in short)


@needs_compiler
@needs_torch
def test_a_weight_that_is_not_finite(done):
    (message,) = done[0][len(ROWS)]
    place = f"tensor '{DOWN}' in model.safetensors: row 200, column 31 is NaN"
    assert message.startswith(place)


@needs_compiler
@needs_torch
def test_a_scale_over_the_whole_tensor(done):
    """Which no format has for an NPU yet: the largest magnitudes, the codes, and a NaN."""
    assert done[0][len(ROWS) + 1 :] == [True, True, False]


def there(**npu):
    """torch with NPUs, as far as one is looked for."""
    found = {
        "is_available": lambda: True, "device_count": lambda: 2,
        "get_device_name": lambda n=0: A2,
    }  # fmt: skip
    return {"torch": SimpleNamespace(npu=SimpleNamespace(**found | npu)), "torch_npu": None}


NO_CANN = RuntimeError("Failed to load the backend extension: torch_npu. You can\ndisable it")


@pytest.mark.parametrize(
    ("have", "message"),
    [
        ({}, "npu: an NPU needs torch and torch_npu of the same version, and one cannot be impor"),
        ({"torch": NO_CANN}, "imported (Failed to load the backend extension: torch_npu. You can)"),
        ({"torch": None, "torch_npu": OSError("libhccl.so: no such file")}, "(libhccl.so: no suc"),
        (there(is_available=lambda: False), "npu: torch_npu finds no NPU: look whether npu-smi"),
        (there(get_device_name=lambda: "Ascend310"), "there are no kernels for the chip Ascend310"),
        (there(), "npu: /nowhere/k.so is not there: build the kernels for Atlas A2 (910B) with"),
    ],
    ids=["torch", "CANN", "its libraries", "NPU", "chip", "kernels"],
)
def test_what_is_missing_is_one_sentence(have, message, tmp_path, monkeypatch):
    def import_module(name):
        found = have.get(name, ImportError(f"No module named {name!r}"))
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(loader.importlib, "import_module", import_module)
    monkeypatch.setenv(loader.VARIABLE, "/nowhere/k.so")
    loader.open_device.cache_clear()
    refused(message, tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"device_count": lambda: 1}, "--device npu:1: no such NPU; there is npu:0."),
        (
            {"get_device_name": lambda n: (A2, LATER)[n]},
            f"--device npu:1: the chip is {LATER} and the kernels are those for Atlas A2 (910B); l",
        ),
    ],
    ids=["number", "chips"],
)
def test_an_npu_that_cannot_be_used(wrong, message, tmp_path, monkeypatch):
    opened = SimpleNamespace(torch=there(**wrong)["torch"], chip=chips.chip_of(A2), type="npu")
    monkeypatch.setattr(ascendc, "open_device", lambda: opened)
    opened.torch.device = lambda *a: a
    refused(message, tmp_path)


def refused(message, tmp_path):
    """By both commands, before anything is written."""
    source = write_checkpoint(tmp_path / "in", {DOWN: np.ones((8, 64), np.float16)})
    for command in ("plan", "convert"):
        args = [command, str(source), str(tmp_path / "out"), "-s", "w8a8"]
        result = CliRunner().invoke(cli, [*args, "--device", "npu:0,npu:1"])
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: --device npu")
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
        assert result.stderr.endswith(".\n")
    assert not (tmp_path / "out").exists()
