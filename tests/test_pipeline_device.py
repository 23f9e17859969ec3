"""Conversions on real GPUs: the bytes of the CPU's, within the memory they were given.

``make test-gpu``, as ``test_triton_device``.
"""

import ml_dtypes
import numpy as np
import pytest
from helpers import write_checkpoint
from test_pipeline import FORMATS, convert, files
from test_triton_device import UNABLE

from streamq.errors import StreamqError
from streamq.schemes import SCHEMES

pytestmark = pytest.mark.skipif(UNABLE is not None, reason=UNABLE or "")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """210 MB: many slabs under way in every thread, large steps, rows of odd lengths."""
    rng = np.random.default_rng(0)
    shapes = {f"model.layers.{n}.mlp.{p}_proj.weight": (4096, 2048)
              for n in range(3) for p in ("gate", "up")}  # fmt: skip
    shapes |= {f"model.layers.{n}.mlp.down_proj.weight": (2048, 4096) for n in range(3)}
    shapes |= {f"model.layers.3.mlp.experts.{e}.down_proj.weight": (96, 640) for e in range(64)}
    dtypes = {"layers.1.": np.float16, "layers.2.": np.float32}
    made = {}
    for name, shape in shapes.items():
        dtype = next((d for part, d in dtypes.items() if part in name), ml_dtypes.bfloat16)
        made[name] = (rng.standard_normal(shape, np.float32) * 0.02).astype(dtype)
    names = list(made)
    return write_checkpoint(
        tmp_path_factory.mktemp("gpu") / "in", made, shards=[names[:5], names[5:]]
    )


def everywhere():
    """All GPUs, as --device names them."""
    import torch

    return ",".join(f"cuda:{i}" for i in range(torch.cuda.device_count()))


@pytest.mark.parametrize(
    ("scheme", "how"), [(s, {}) for s in SCHEMES] + FORMATS,
    ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())),
)  # fmt: skip
def test_the_bytes_are_those_of_the_cpu(scheme, how, source, tmp_path):
    convert(source, tmp_path / "cpu", scheme, how=how)
    for number, device in enumerate({"cuda:0", everywhere()}):
        summary = convert(source, tmp_path / str(number), scheme, device, how, workers=8)
        assert files(tmp_path / str(number)) == files(tmp_path / "cpu")
        assert summary.backend.startswith("triton on cuda:0")


@pytest.mark.parametrize("memory", [64 << 20, 1 << 30])
def test_memory_is_what_was_allowed(memory, source, tmp_path):
    import torch

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    convert(source, tmp_path / "out", "nvfp4", "cuda", device_memory=memory, workers=8)
    assert torch.cuda.max_memory_allocated() - before <= memory
    assert torch.cuda.memory_allocated() == before


def test_a_device_that_runs_out_of_memory_goes_on(source, tmp_path):
    """torch itself refuses: it is allowed less than the slabs need."""
    import torch

    convert(source, tmp_path / "cpu", "fp8_block")
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((48 << 20) / total)
    try:
        summary = convert(source, tmp_path / "out", "fp8_block", "cuda", workers=4)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert files(tmp_path / "out") == files(tmp_path / "cpu")
    assert "ran out of memory and went on" in summary.remarks[0]


def test_a_weight_that_is_not_finite(tmp_path):
    x = np.ones((512, 1024), ml_dtypes.bfloat16)
    x[300, 7] = np.nan
    source = write_checkpoint(tmp_path / "in", {"model.layers.0.mlp.down_proj.weight": x})
    for scheme in ("nvfp4", "w4a16", "mxfp4"):
        with pytest.raises(StreamqError, match="row 300, column 7 is NaN or Inf"):
            convert(source, tmp_path / "out", scheme, "cuda")
