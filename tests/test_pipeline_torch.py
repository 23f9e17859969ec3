"""The pipeline with torch and the Triton kernels in Triton's interpreter, and what torch lacks."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import write_checkpoint
from torch_backend import needs_triton

import streamq
from streamq.cli import cli
from streamq.converting import Settings
from streamq.errors import PlanError
from streamq.pipeline.find import has_gpu, open_devices

pytestmark = needs_triton

ROWS = [
    ("nvfp4", {}), ("nvfp4a16", {"numerics": "weight"}), ("mxfp8", {}), ("w8a8", {}),
    ("fp8_block", {"format": "fp8"}), ("w4a16", {"format": "gptq"}), ("w3a16_asym", {}),
]  # fmt: skip


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
def interpreted(source, tmp_path_factory):
    """What each row said, and the folder of their outputs."""
    out = tmp_path_factory.mktemp("out")
    done = subprocess.run(
        [sys.executable, "torch_pipeline.py", source, out, json.dumps(ROWS)],
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=Path(__file__).parent,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), out


@pytest.mark.parametrize("row", range(len(ROWS)), ids=["-".join([s, *h.values()]) for s, h in ROWS])
def test_the_bytes_are_those_of_the_cpu(row, source, interpreted, tmp_path):
    said, out = interpreted
    (scheme, how), settings = ROWS[row], Settings(sync=False)
    streamq.convert(source, tmp_path / "out", scheme, settings=settings, **how)
    backend, *remarks = said[row]
    for path in (tmp_path / "out").iterdir():
        assert (out / str(row) / path.name).read_bytes() == path.read_bytes(), said[row]
    assert backend.startswith("triton on cuda:")
    assert remarks
    assert all(re.match(r"cuda:[01] ran out of memory and went on with slabs", r) for r in remarks)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"init": lambda: raises("Torch not compiled with CUDA enabled")}, "built for the CPU al"),
        ({"device_count": lambda: 1}, "--device cuda:1: no such GPU; there is cuda:0."),
        (
            {"get_device_capability": lambda n: (7, 5)},
            "--device cuda:0: Card 0 has compute capability 7.5, the kernels need 8.0; use --dev",
        ),
    ],
    ids=["CPU build", "number", "capability"],
)
def test_a_gpu_that_cannot_be_used(wrong, message, monkeypatch):
    from streamq.pipeline import cuda

    there = {
        "init": lambda: None, "device_count": lambda: 2,
        "get_device_capability": lambda n: (9, 0), "get_device_name": lambda n: f"Card {n}",
    }  # fmt: skip
    torch = SimpleNamespace(
        cuda=SimpleNamespace(**there), __version__="2.13.0", version=SimpleNamespace(hip=None),
        device=lambda *a: a,
    )  # fmt: skip
    monkeypatch.setattr(cuda, "torch", torch)
    assert [d.name for d in open_devices(["cuda:0", "cuda:1"])] == ["cuda:0", "cuda:1"]
    for name, function in wrong.items():
        setattr(torch.cuda, name, function)
    with pytest.raises(PlanError) as e:
        open_devices(["cuda:0", "cuda:1"])
    assert message in str(e.value)
    assert str(e.value).endswith(".")


def raises(text):
    raise AssertionError(text)


def test_here_without_a_gpu(source, tmp_path):
    """Whatever torch is installed, a machine without a GPU gets one sentence."""
    if has_gpu():
        pytest.skip("this machine has a GPU")
    args = ["convert", str(source), str(tmp_path / "out"), "-s", "nvfp4", "--device", "cuda"]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: --device cuda: ")
    assert result.stderr.endswith("or use --device cpu.\n")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
