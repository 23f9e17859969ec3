"""Compiled kernels are found where they lie, and not where they are stale or damaged."""

import importlib.util
import os
import shutil

import numpy as np
import pytest

from streamq import compiled
from streamq.converting.threads import _tell_of_compiling

SOURCE = """
from streamq.compiled import jit

@jit
def double(x):
    return x + x

def scaled(k):
    @jit
    def by(x):
        return x * k
    return by
"""


class Kernels:
    """A folder of kernels, and what happened to them since it was asked last."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(parents=True)
        (folder / "kernels.py").write_text(SOURCE)
        (folder / "beside.py").write_text("ONE = 1\n")

    def run(self):
        """Import anew and call; numbers of kernels that were loaded and compiled."""
        compiled._stamp.cache_clear()
        spec = importlib.util.spec_from_file_location("kernels", self.folder / "kernels.py")
        module = importlib.util.module_from_spec(spec)
        before = compiled.COUNTS.loaded, compiled.COUNTS.compiled
        spec.loader.exec_module(module)
        assert module.double(np.float32(2)) == 4
        assert module.scaled(3)(2) == 6
        assert module.scaled(5)(2) == 10
        return compiled.COUNTS.loaded - before[0], compiled.COUNTS.compiled - before[1]

    def files(self, folder=None):
        return sorted((folder or self.folder / "__pycache__").rglob("*" + compiled.SUFFIX))


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("numba.config.CACHE_DIR", "")
    return Kernels(tmp_path / "a" / "kernels")


def test_they_are_compiled_once(kernels):
    assert kernels.run() == (0, 3)
    assert len(kernels.files()) == 3
    assert kernels.run() == (3, 0)
    assert {p.stat().st_mode & 0o777 for p in kernels.files()} == {0o644}


def test_they_may_be_moved_and_dated_anew(kernels, tmp_path):
    kernels.run()
    shutil.move(kernels.folder, tmp_path / "elsewhere")
    kernels.folder = tmp_path / "elsewhere"
    for path in kernels.folder.rglob("*"):
        os.utime(path, (0, 0))
    assert kernels.run() == (3, 0)


def test_a_change_of_any_file_beside_them_makes_them_stale(kernels):
    kernels.run()
    (kernels.folder / "beside.py").write_text("ONE = 2\n")
    assert kernels.run() == (0, 3)
    assert len(kernels.files()) == 3  # over the old ones


DAMAGE = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-1],
    "a bit": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "of another stamp": lambda data: bytes(32) + data[32:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_ones_are_compiled_again(damage, kernels):
    kernels.run()
    for path in kernels.files():
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    assert kernels.run() == (0, 3)
    assert kernels.run() == (3, 0)


def test_another_cpu_compiles_its_own(kernels, monkeypatch):
    kernels.run()
    magic = "numba.core.codegen.CPUCodegen.magic_tuple"
    monkeypatch.setattr(magic, lambda self: ("another", "cpu", ""))
    assert kernels.run() == (0, 3)
    assert len(kernels.files()) == 6


def test_places_in_their_order(kernels, tmp_path, monkeypatch):
    shared = tmp_path / "shared"
    monkeypatch.setattr("numba.config.CACHE_DIR", str(shared))
    assert [str(p.relative_to(tmp_path)) for p in compiled.places(kernels.folder)] == [
        "shared/streamq/kernels", "a/kernels/__pycache__", "home/streamq/kernels/kernels",
    ]  # fmt: skip
    kernels.run()
    assert len(kernels.files(shared)) == 3
    monkeypatch.setattr("numba.config.CACHE_DIR", "")
    assert kernels.run() == (0, 3)
    shutil.rmtree(kernels.folder / "__pycache__")
    (kernels.folder / "__pycache__").write_text("")  # no directory can be made here
    assert kernels.run() == (0, 3)
    assert len(kernels.files(tmp_path / "home")) == 3
    assert kernels.run() == (3, 0)


def test_without_a_home(kernels, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # what it does without one
    assert [p.name for p in compiled.places(kernels.folder)] == ["__pycache__"]


def test_a_home_that_may_not_be_looked_into(kernels, monkeypatch):
    """As of a container whose user is not the one that HOME is of."""
    closed = os.environ["XDG_CACHE_HOME"]
    look, may = os.stat, os.access

    def stat(path, *args, **kw):
        if str(path).startswith(f"{closed}/"):
            raise PermissionError(13, "Permission denied", str(path))
        return look(path, *args, **kw)

    shutil.rmtree(kernels.folder / "__pycache__", ignore_errors=True)
    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.setattr(os, "access", lambda path, how: str(path) == "/" and may(path, how))
    assert compiled.home(kernels.folder) is None


def test_only_in(kernels, tmp_path):
    kernels.run()
    with compiled.only_in(tmp_path / "shipped"):
        assert kernels.run() == (0, 3)
        assert kernels.run() == (3, 0)
    assert len(kernels.files(tmp_path / "shipped")) == 3


def test_what_cannot_be_kept_runs_all_the_same(kernels, monkeypatch):
    def full(*args, **kw):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkstemp", full)
    kept = compiled.COUNTS.kept
    assert kernels.run() == (0, 3)
    assert compiled.COUNTS.kept == kept
    monkeypatch.undo()
    monkeypatch.setattr(os, "replace", full)
    assert kernels.run()[1] == 3
    assert [p for p in kernels.folder.rglob("*") if p.suffix not in (".py", ".pyc", "")] == []


@pytest.mark.parametrize(
    ("count", "place", "sentence"),
    [(0, "x", ""), (1, "x", "for this machine, once"), (1, None, "for this run alone")],
)
def test_what_a_slow_start_is_explained_by(count, place, sentence, monkeypatch):
    monkeypatch.setattr(compiled.COUNTS, "compiled", count)
    monkeypatch.setattr(compiled, "home", lambda folder: place)
    said = []
    _tell_of_compiling(said.append)
    assert len(said) == (sentence != "")
    assert all(sentence in line for line in said)
