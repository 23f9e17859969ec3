"""Inputs that were once interesting to the fuzzer: what they are answered with is one sentence."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORPUS = ROOT / "tests" / "corpus"


@pytest.fixture(scope="module")
def targets():
    spec = importlib.util.spec_from_file_location("targets", ROOT / "fuzz" / "targets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TARGETS


FILES = sorted(CORPUS.glob("*/*"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_an_input_of_the_corpus_is_answered(path, targets):
    targets[path.parent.name](path.read_bytes())


def test_each_target_has_a_small_corpus(targets):
    assert {p.parent.name for p in FILES} == set(targets)
    assert sum(p.stat().st_size for p in FILES) < 1 << 20
