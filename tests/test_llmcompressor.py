"""Byte parity with llm-compressor 0.14's model_free_ptq under ``--numerics weight``.

The golden hashes were written by ``tests/golden/llmcompressor/make.py``, which runs the
real tool on the checkpoints beside it: dense llamas with planted edge cases.
"""

import hashlib
import json
from pathlib import Path

import pytest
from helpers import run_convert, tensors_of

GOLDEN = Path(__file__).parent / "golden" / "llmcompressor"
CASES = [
    (dtype, scheme)
    for dtype in ("bf16", "f16", "f32")
    for scheme in json.loads((GOLDEN / f"{dtype}.json").read_text())["schemes"]
]


@pytest.mark.parametrize(("dtype", "scheme"), CASES)
def test_every_tensor_is_equal(dtype, scheme, tmp_path):
    wanted = json.loads((GOLDEN / f"{dtype}.json").read_text())["schemes"][scheme]
    out = tmp_path / "out"
    run_convert(GOLDEN / dtype, out, scheme, numerics="weight")
    found = {
        name: {"dtype": t.dtype, "shape": list(t.shape), "sha256": hashlib.sha256(data).hexdigest()}
        for name, (t, data) in tensors_of(out).items()
    }
    expected = {
        name: {k: entry[k] for k in ("dtype", "shape", "sha256")}
        for name, entry in wanted["tensors"].items()
    }
    assert found.keys() == expected.keys()
    assert [n for n in found if found[n] != expected[n]] == []


@pytest.mark.parametrize(("dtype", "scheme"), CASES)
def test_the_config_says_the_same(dtype, scheme, tmp_path):
    wanted = json.loads((GOLDEN / f"{dtype}.json").read_text())["schemes"][scheme]
    run_convert(GOLDEN / dtype, tmp_path / "out", scheme)
    ours = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    theirs = wanted["quantization_config"]
    (our_group,), (their_group,) = (c["config_groups"].values() for c in (ours, theirs))
    assert our_group == their_group
    differ = {k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)}
    assert differ <= {"config_groups", "ignore", "version"}
