"""The example: a trained model, before and after, in bits per byte of text."""

import importlib.util
import sys
from pathlib import Path

import pytest
from helpers import run_convert

from streamq.checkpoint import open_checkpoint

EXAMPLES = Path(__file__).parent.parent / "examples"
MODEL = EXAMPLES / "bytes-llama"


@pytest.fixture(scope="module")
def bits_per_byte():
    sys.path.insert(0, str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("bits", EXAMPLES / "bits_per_byte.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(EXAMPLES))
    return module.bits_per_byte


def test_it_is_small_and_a_fused_group_straddles_its_shards():
    with open_checkpoint(MODEL) as c:
        assert c.nbytes < 4_000_000
        homes = {c.tensors[f"model.layers.1.self_attn.{p}_proj.weight"].file for p in "qkv"}
        assert len(homes) == 2


@pytest.mark.parametrize(
    ("scheme", "most"), [("w8a16", 0.002), ("fp8_block", 0.01), ("w4a16", 0.1), ("nvfp4a16", 0.1)]
)
def test_quantizing_costs_little(scheme, most, bits_per_byte, tmp_path):
    before = bits_per_byte(MODEL)
    assert before < 2  # it has learned: bytes at random are 8
    run_convert(MODEL, tmp_path / "out", scheme)
    after = bits_per_byte(tmp_path / "out")
    assert 0 < abs(after - before) < most
