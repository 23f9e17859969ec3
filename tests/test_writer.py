"""Shards that land in any order, a directory that lands all at once, and their fall-backs."""

import errno
import os
import zlib

import ml_dtypes
import numpy as np
import pytest
from helpers import run_convert, tensors_of, write_checkpoint

from streamq.errors import WriteError
from streamq.trust import FileSum
from streamq.writer import Destination, ShardWriter, build_header, check_destination
from streamq.writer import shard as shard_module
from streamq.writer.disk import SyncPool

HEADER = build_header([(["a"], "U8", [(4,)], [0], np.array([0]), np.array([4]))])
SIZE = len(HEADER) + 4


def failing(code):
    def call(*args):
        raise OSError(code, os.strerror(code))

    return call


@pytest.fixture
def source(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "m.o_proj.weight": (rng.standard_normal((256, 512)) * 0.02).astype(ml_dtypes.bfloat16),
        "model.embed_tokens.weight": np.ones((300, 77), ml_dtypes.bfloat16),
    }
    return write_checkpoint(tmp_path / "in", tensors)


@pytest.mark.parametrize("how", ["missing", errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_preallocation_the_same_is_written(how, source, tmp_path, monkeypatch):
    run_convert(source, tmp_path / "usual", "nvfp4a16")
    if how == "missing":
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", failing(how))
    run_convert(source, tmp_path / "plain", "nvfp4a16")
    usual, plain = (
        [(p.name, p.read_bytes()) for p in sorted((tmp_path / d).iterdir())]
        for d in ("usual", "plain")
    )
    assert usual == plain


@pytest.mark.parametrize(
    ("place", "call", "code"),
    [(os, "posix_fallocate", errno.ENOSPC), (shard_module, "write_all", errno.EIO)],
)
def test_an_error_of_the_disk_names_the_shard(place, call, code, source, tmp_path, monkeypatch):
    monkeypatch.setattr(place, call, failing(code))
    words = "no space left" if code == errno.ENOSPC else os.strerror(code)
    with pytest.raises(WriteError, match=f"model.safetensors: .*{words}") as e:
        run_convert(source, tmp_path / "out", "nvfp4a16")
    assert not (tmp_path / "out").exists()
    assert "out.partial stays, the same command goes on from there" in e.value.__notes__[0]


def test_an_error_of_a_flush_is_not_lost(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_module, "SYNC_EVERY", 1)
    monkeypatch.setattr(os, "fdatasync", failing(errno.EIO))
    with pytest.raises(WriteError, match=r"model\.safetensors: "):
        run_convert(source, tmp_path / "out", "nvfp4a16", sync=True)
    assert not (tmp_path / "out").exists()


def test_what_is_read_back_is_compared_with_the_plan(tmp_path):
    writer = ShardWriter(tmp_path, "x.safetensors", HEADER, SIZE, SyncPool(False))
    writer.put(len(HEADER), b"abcd")
    with (tmp_path / "x.safetensors.tmp").open("r+b") as f:
        f.write(b"\x01")
    with pytest.raises(WriteError, match="read back is not what was written"):
        writer.close()
    assert not (tmp_path / "x.safetensors").exists()


def test_a_hole_is_refused(tmp_path):
    writer = ShardWriter(tmp_path, "x.safetensors", HEADER, SIZE, SyncPool(False))
    writer.put(len(HEADER), b"abc")
    with pytest.raises(WriteError, match=f"{SIZE - 1} of {SIZE} bytes were written; this is a bug"):
        writer.close()
    assert not (tmp_path / "x.safetensors").exists()


def test_everything_is_flushed_before_it_gets_its_name(source, tmp_path, monkeypatch):
    log = []
    real = {name: getattr(os, name) for name in ("fsync", "rename")}

    def fsync(fd):
        log.append(("fsync", os.readlink(f"/proc/self/fd/{fd}").rpartition("/")[2]))
        real["fsync"](fd)

    def rename(a, b):
        log.append(("rename", os.path.basename(b)))
        real["rename"](a, b)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    run_convert(source, tmp_path / "out", "nvfp4a16", sync=True)
    wanted = [
        ("fsync", "model.safetensors.tmp"), ("rename", "model.safetensors"),
        ("fsync", "config.json"), ("fsync", "streamq.json"), ("fsync", "output"), ("rename", "out"),
    ]  # fmt: skip
    last = {entry: i for i, entry in enumerate(log)}
    assert sorted(wanted, key=last.__getitem__) == wanted
    log.clear()
    run_convert(source, tmp_path / "out2", "nvfp4a16", sync=False)
    assert {kind for kind, _ in log} == {"rename"}


def test_overwrite_replaces_at_the_end_only(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run_convert(source, out, "nvfp4a16")
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(WriteError, match=r"already exists.*--overwrite"):
        run_convert(source, out, "w4a16")
    with monkeypatch.context() as m:
        m.setattr(os, "pwrite", failing(errno.EIO))
        with pytest.raises(WriteError):
            run_convert(source, out, "w4a16", overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before
    (out / "stale.txt").write_text("")
    run_convert(source, out, "w4a16", overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]
    assert "m.o_proj.weight_shape" in tensors_of(out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_a_destination_that_appears_meanwhile_is_not_touched(tmp_path):
    destination = Destination(tmp_path / "out", overwrite=False, sync=False)
    destination.begin()
    (tmp_path / "out").mkdir()
    with pytest.raises(WriteError, match=r"appeared while converting; the result is in .*partial"):
        destination.commit()


def test_an_interrupted_run_is_replaced(source, tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "junk").write_text("")
    run_convert(source, tmp_path / "out", "nvfp4a16")
    assert not partial.exists()
    assert not (tmp_path / "out" / "junk").exists()


def test_too_little_space_is_known_before(tmp_path):
    with pytest.raises(WriteError, match=r"needs 1000000.0 GB, the disk has .* free"):
        check_destination(tmp_path / "out", 10**15, overwrite=False)


def test_pieces_in_any_order_make_the_same_file(tmp_path):
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        name = f"{order[0]}.safetensors"
        writer = ShardWriter(tmp_path, name, HEADER, SIZE, SyncPool(False))
        for i in order:
            unit = writer.unit(str(i))
            (unit.put if i % 2 else unit.put_small)(len(HEADER) + i, b"abcd"[i : i + 1])
            unit.done()
        assert writer.close() == FileSum(SIZE, [zlib.crc32(HEADER + b"abcd")])
    assert (tmp_path / "0.safetensors").read_bytes() == HEADER + b"abcd"
    assert (tmp_path / "3.safetensors").read_bytes() == HEADER + b"abcd"
