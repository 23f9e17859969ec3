"""Resuming, streamq.json and its checksums, and verification by converting again."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tomllib
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from faults import Crash, Layer
from helpers import run_convert as convert_unrecorded
from hypothesis import given
from hypothesis import strategies as st
from small_units import OF_FORMATS, contents, small_units, write_small

import streamq
from streamq.checkpoint import open_checkpoint
from streamq.cli import cli
from streamq.converting import Settings
from streamq.errors import CheckpointError, WriteError
from streamq.formats import FORMATS
from streamq.planning import make_plan, spelled, unspelled
from streamq.trust import (
    BLOCK,
    VERSION,
    FileSum,
    Journal,
    Sums,
    parse_record,
    read_journal,
    record_text,
)
from streamq.verifying import verify
from streamq.writer import partial as partial_module

RECORD = "streamq.json"
run_convert = partial(convert_unrecorded, record=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("trust") / "in")


def check(dst, src):
    with open_checkpoint(src) as c:
        return verify(dst, c)


# --- sums -------------------------------------------------------------------------------


@given(st.data())
def test_sums_of_pieces_in_any_order_are_those_of_zlib(data):
    size = data.draw(st.sampled_from([1, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 77]))
    raw = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    cuts = sorted(data.draw(st.lists(st.integers(0, size), max_size=12)))
    pieces = list(zip([0, *cuts], [*cuts, size], strict=True))
    data.draw(st.randoms()).shuffle(pieces)
    parts = [Sums(size), Sums(size)]
    for i, (a, b) in enumerate(pieces):
        parts[i % 2].add(a, memoryview(raw[a:b]))
    parts[0].merge(Sums(size, parts[1].items()))
    wanted = [zlib.crc32(raw[at : at + BLOCK]) for at in range(0, size, BLOCK)]
    assert parts[0].all() == wanted


# --- the journal ------------------------------------------------------------------------


@pytest.mark.parametrize("left", range(45))
def test_a_torn_line_of_the_journal_is_dropped(left, tmp_path):
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.append({"a": 1})
    good = path.stat().st_size
    journal.append({"b": [2, 3]})
    journal.close()
    raw = path.read_bytes()
    path.write_bytes(raw[: min(good + left, len(raw) - 1)])
    assert read_journal(path) == ([{"a": 1}], good)
    journal = Journal(path, good)
    journal.append({"c": 4})
    journal.close()
    assert read_journal(path)[0] == [{"a": 1}, {"c": 4}]


def test_a_flipped_bit_ends_the_journal(tmp_path):
    path = tmp_path / "journal"
    journal = Journal(path)
    for i in range(3):
        journal.append({"n": i})
    journal.close()
    raw = bytearray(path.read_bytes())
    for at in range(len(raw) // 3, 2 * len(raw) // 3):
        for bit in range(8):
            raw[at] ^= 1 << bit
            path.write_bytes(raw)
            assert read_journal(path)[0] == [{"n": 0}]
            raw[at] ^= 1 << bit


# --- resuming ---------------------------------------------------------------------------


def interrupt(folder, do, records=1, outputs=1):
    """Do something until the process is gone, when the journal of each output has some records."""

    def far_enough():
        journals = [path.read_bytes() for path in folder.glob("*.partial/journal")]
        return len(journals) == outputs and all(raw.count(b"\n") >= records for raw in journals)

    with pytest.raises(Crash), Layer(folder, until=far_enough):
        do()


def test_resuming_says_from_where(source, tmp_path, monkeypatch):
    small_units(monkeypatch.setattr)
    args = ["convert", str(source), str(tmp_path / "out"), "-s", "nvfp4", "-j", "1"]
    interrupt(tmp_path, lambda: run_convert(source, tmp_path / "out", "nvfp4", sync=True), 3)
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 0, result.stderr
    said = re.search(r"resuming .*/out: [012] of 3 shards, (.*) kB of 208.0 kB done", result.stdout)
    assert said, result.stdout
    assert float(said[1]) > 17
    assert re.search(rf"{said[1]} kB of it before", result.stdout)
    run_convert(source, tmp_path / "again", "nvfp4")
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_what_is_done_is_not_done_again(source, tmp_path, monkeypatch):
    small_units(monkeypatch.setattr)
    out = tmp_path / "out"
    with Layer(tmp_path) as whole:
        run_convert(source, tmp_path / "whole", "nvfp4", sync=True, workers=1)
    interrupt(tmp_path, lambda: run_convert(source, out, "nvfp4", sync=True, workers=1), 5)
    with Layer(tmp_path) as rest:
        done = streamq.convert(source, out, "nvfp4", settings=Settings(workers=1)).resumed

    def written(layer):
        return sum(len(op.data) for op in layer.log if op.what == "write")

    assert done > 40_000
    headers_and_json = 20_000
    assert written(rest) < written(whole) - done + headers_and_json


OTHER = {
    "scheme": (["-s", "mxfp4"], r"options scheme name: 'NVFP4' there, 'MXFP4' here"),
    "format": (["-s", "nvfp4", "-f", "modelopt"], "options format name: 'compressed-tensors' th"),
    "ignore": (["-s", "nvfp4", "--ignore", "*o_proj"], r"options ignore: \[\] there"),
    "shards": (["-s", "nvfp4", "--shard-size", "50k"], "options shard_size: none there, 50000 h"),
    "source": (["-s", "nvfp4"], r"source model-00001-of-00003.safetensors mtime_ns: \d+ there"),
}


@pytest.mark.parametrize("what", OTHER)
def test_another_conversion_is_refused_and_restarted(what, tmp_path):
    source = write_small(tmp_path / "in")
    out = tmp_path / "out"
    interrupt(tmp_path, lambda: run_convert(source, out, "nvfp4"))
    options, message = OTHER[what]
    if what == "source":
        os.utime(source / "model-00001-of-00003.safetensors")
    args = ["convert", str(source), str(out), "-q", *options]
    before = contents(tmp_path / "out.partial")
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 1
    assert re.search(f"^Error: .*out.partial: holds an unfinished .*{message}", result.stderr)
    assert result.stderr.splitlines()[0].endswith("or discard it with --restart.")
    assert contents(tmp_path / "out.partial") == before
    result = CliRunner().invoke(cli, [*args, "--restart"])
    assert result.exit_code == 0, result.stderr
    assert check(out, source).failures == []


def test_another_version_is_refused(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupt(tmp_path, lambda: run_convert(source, out, "nvfp4"))
    monkeypatch.setattr("streamq.converting.origin.VERSION", "0.0.9")
    with pytest.raises(WriteError, match=f"streamq: '{VERSION}' there, '0.0.9' here"):
        run_convert(source, out, "nvfp4")


def test_several_outputs_resume(source, tmp_path, monkeypatch):
    small_units(monkeypatch.setattr)
    names = ["nvfp4", "w8a8", "gptq/w4a16"]
    dst = {name: str(tmp_path / name.replace("/", "-")) for name in names}
    args = ["convert", str(source), "-j", "1"]
    args += [part for name in names for part in ("--to", f"{name}:{dst[name]}")]

    def command():
        result = CliRunner().invoke(cli, args, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    interrupt(tmp_path, command, outputs=3)
    assert len(re.findall(r"^resuming ", command(), re.M)) == 3
    undisturbed = [arg.replace(str(tmp_path), str(tmp_path / "other")) for arg in args]
    (tmp_path / "other").mkdir()
    assert CliRunner().invoke(cli, undisturbed).exit_code == 0
    for folder in dst.values():
        assert contents(Path(folder)) == contents(tmp_path / "other" / Path(folder).name)


def test_one_of_several_outputs_resumes_alone(source, tmp_path, monkeypatch):
    """Units are cut in another way then; those that do not fit are done again."""
    small_units(monkeypatch.setattr)
    args = ["convert", str(source), "-q", "-j", "1", "--to", f"nvfp4:{tmp_path}/a", "--to",
            f"w8a8:{tmp_path}/b"]  # fmt: skip
    interrupt(tmp_path, lambda: CliRunner().invoke(cli, args, catch_exceptions=False), outputs=2)
    run_convert(source, tmp_path / "a", "nvfp4")
    run_convert(source, tmp_path / "whole", "nvfp4")
    assert contents(tmp_path / "a") == contents(tmp_path / "whole")


def test_stats_are_those_of_all_weights(source, tmp_path, monkeypatch):
    small_units(monkeypatch.setattr)

    def convert(out, stats=True, said=None):
        notify = None if said is None else said.append
        how = Settings(stats=stats, sync=False, workers=1, notify=notify)
        return streamq.convert(source, tmp_path / out, "nvfp4", settings=how)

    whole = convert("whole").quality.by_tensor()
    interrupt(tmp_path, lambda: convert("a"))
    resumed = convert("a")
    assert resumed.resumed > 0
    assert resumed.quality.by_tensor() == pytest.approx(whole)
    interrupt(tmp_path, lambda: convert("b", stats=False), 5)
    said = []
    assert set(convert("b", said=said).quality.by_tensor()) < set(whole)
    assert "an earlier run measured less" in " ".join(said)


def test_two_processes_at_once(source, tmp_path):
    code = (
        "import sys; from pathlib import Path; from streamq.writer import Destination;"
        "d = Destination(Path(sys.argv[1]), False, False); d.begin({}); print('there', flush=True);"
        "sys.stdin.read()"
    )
    out = str(tmp_path / "out")
    with subprocess.Popen(
        [sys.executable, "-c", code, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "there\n"
        for more in ([], ["--restart"]):
            args = ["convert", str(source), out, "-s", "nvfp4", "-q", *more]
            result = CliRunner().invoke(cli, args)
            assert result.exit_code == 1
            assert re.search("out.partial: another process is at work on it", result.stderr)
            assert len(result.stderr.splitlines()) == 1
        other.kill()
    args = ["convert", str(source), out, "-s", "nvfp4", "-q", "--restart"]
    assert CliRunner().invoke(cli, args).exit_code == 0


@pytest.mark.parametrize("sync", [True, False])
def test_after_a_restart_of_the_machine(sync, source, tmp_path, monkeypatch):
    """Without sync, what was journaled may not have reached the disk."""
    small_units(monkeypatch.setattr)
    out = tmp_path / "out"
    interrupt(tmp_path, lambda: run_convert(source, out, "nvfp4", sync=sync, workers=1))
    monkeypatch.setattr(partial_module, "_boot", lambda: "another")
    said = []
    how = Settings(notify=said.append, sync=sync)
    summary = streamq.convert(source, out, "nvfp4", settings=how)
    assert (summary.resumed > 0) == sync
    assert ("before this machine was started" in " ".join(said)) == (not sync)


def test_a_resumed_run_flushes_what_one_without_sync_left(source, tmp_path, monkeypatch):
    small_units(monkeypatch.setattr)
    out = tmp_path / "out"
    interrupt(tmp_path, lambda: run_convert(source, out, "nvfp4", sync=False, workers=1))
    with Layer(tmp_path) as layer:
        run_convert(source, out, "nvfp4", sync=True)
    flushed = {Path(op.path).name for op in layer.log if op.what == "flush"}
    assert {p.name.removesuffix(".tmp") for p in out.iterdir()} <= {
        name.removesuffix(".tmp") for name in flushed
    }


def test_a_verbatim_copy_resumes(source, tmp_path):
    made = tmp_path / "made"
    run_convert(source, made, "nvfp4")
    out = tmp_path / "out"
    interrupt(tmp_path, lambda: run_convert(made, out, "nvfp4"))
    done = (tmp_path / "out.partial" / "journal").read_text().count('"file"')
    assert 0 < done < 3
    with Layer(tmp_path) as layer:
        run_convert(made, out, "nvfp4")
    begun = {op.path for op in layer.log if op.what in ("create", "size")}
    assert sum(path.endswith(".safetensors") for path in begun) == 3 - done
    assert check(out, made).failures == []
    assert {k: v for k, v in contents(out).items() if k != RECORD} == {
        k: v for k, v in contents(made).items() if k != RECORD
    }


@pytest.mark.parametrize("how", [{}, {"fuse": True}, {"shard_size": 60_000}])
def test_reindexing_resumes(how, source, tmp_path):
    streamq.reindex(source, tmp_path / "whole", **how)
    interrupt(tmp_path, lambda: streamq.reindex(source, tmp_path / "out", **how))
    said = []
    streamq.reindex(source, tmp_path / "out", settings=Settings(notify=said.append), **how)
    assert re.search("resuming .*/out: ", said[0])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert verify(tmp_path / "out").failures == []
    assert parse_record((tmp_path / "out" / RECORD).read_bytes()).about["command"] == "reindex"


@pytest.mark.parametrize("sha256", [True, False])
def test_the_sha256_is_there_where_the_last_run_asked_for_it(sha256, source, tmp_path, monkeypatch):
    small_units(monkeypatch.setattr)

    def convert(out, wanted):
        streamq.convert(source, tmp_path / out, "nvfp4", settings=Settings(1, sha256=wanted))

    convert("whole", sha256)
    interrupt(tmp_path, lambda: convert("out", not sha256), 4)
    convert("out", sha256)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# --- streamq.json -----------------------------------------------------------------------


def test_the_version_is_that_of_the_package():
    root = Path(__file__).parent.parent
    assert tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"] == VERSION


def test_two_runs_write_the_same_directory(source, tmp_path):
    copied = shutil.copytree(source, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    for src, out, workers in ((source, "a", 1), (copied, "b", 3)):
        run_convert(src, tmp_path / out, "w4a16", workers=workers)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_record_speaks_of_all_files(source, tmp_path):
    (source / "tokenizer").mkdir(exist_ok=True)
    (source / "tokenizer" / "vocab.txt").write_text("a b c")
    (source / RECORD).write_text("that of the source is not copied")
    out = tmp_path / "out"
    streamq.convert(source, out, "nvfp4", settings=Settings(sha256=True))
    shutil.rmtree(source / "tokenizer")
    (source / RECORD).unlink()
    record = parse_record((out / RECORD).read_bytes())
    assert set(record.files) == set(contents(out)) - {RECORD}
    for name, raw in contents(out).items():
        if name != RECORD:
            assert record.files[name].crc32 == [zlib.crc32(raw)]
    names = sorted(record.files)
    lines = [f"{record.files[name].sha256}  {name}" for name in names]
    run = subprocess.run(["sha256sum", "-c"], input="\n".join(lines) + "\n", text=True, cwd=out,
                         capture_output=True, check=False)  # fmt: skip
    assert run.returncode == 0, run.stdout
    assert record.about["options"]["scheme"]["name"] == "NVFP4"
    assert "mtime" not in (out / RECORD).read_text()


@pytest.mark.parametrize(
    ("fmt", "scheme"), [(name, preset) for name, f in FORMATS.items() for preset in f.presets]
)
def test_options_come_back_from_a_record(fmt, scheme):
    how = {"fp8": {"scale_fmt": "ue8m0"}, "gpt-fast": {"gpt_fast_names": True},
           "group": {"group_dim": 0}}.get(fmt, {})  # fmt: skip
    from streamq.api import options

    asked = options(scheme, format=fmt, ignore=["*q_proj"], numerics="weight", shard_size=77, **how)
    concrete = asked.format.concrete(asked.scheme)
    for scheme_of in (asked.scheme, concrete):
        said = json.loads(json.dumps(spelled(_with_scheme(asked, scheme_of))))
        back = unspelled(said)
        assert json.loads(json.dumps(spelled(back))) == said
        assert back.scheme == scheme_of
        assert back.format.concrete(back.scheme) == concrete


def _with_scheme(options, scheme):
    from dataclasses import replace

    return replace(options, scheme=scheme)


def test_a_recipe_comes_back_from_a_record(source, tmp_path):
    recipe = {
        "scheme": "w4a16", "ignore": ["*down_proj"],
        "rule": [{"pattern": ["*gate_proj", "*up_proj"], "scheme": "w8a16"},
                 {"pattern": "*o_proj", "scheme": "keep"}],
        "group": [{"name": "mine", "members": ["a", "b"]}],
        "experts": [{"pattern": "*.w", "layout": "transposed", "parts": ["gate_proj"]}],
    }  # fmt: skip
    plan = streamq.plan(source, recipe=recipe)
    said = json.loads(json.dumps(spelled(plan.options)))
    with open_checkpoint(source) as c:
        again = make_plan(c, unspelled(said))
    assert again.options == plan.options
    assert [s.header for s in again.shards] == [s.header for s in plan.shards]


@pytest.mark.parametrize("change", [{}, {"scheme": None}, {"format": {"name": "gguf"}}])
def test_options_that_are_not_known_are_an_error(change, source):
    said = spelled(streamq.plan(source, "nvfp4").options)
    said = {**said, **change} if change else {}
    with pytest.raises(CheckpointError, match="options of a record"):
        unspelled(said)


@pytest.mark.parametrize("raw", [b"", b"{}", b'{\n  "crc32": "00000000"\n}\n', b"\xff"])
def test_what_is_no_record_is_an_error(raw):
    with pytest.raises(CheckpointError, match=r"streamq\.json: is not what was written"):
        parse_record(raw)


def test_a_record_with_a_good_checksum_may_still_be_none():
    good = record_text({}, {"a": FileSum(5, [1])})
    assert parse_record(good.encode()).files["a"].size == 5
    for bad in (record_text({}, {"a": FileSum(5, [1, 2])}),):
        with pytest.raises(CheckpointError, match="not a record of streamq"):
            parse_record(bad.encode())


# --- verification -----------------------------------------------------------------------


@pytest.mark.parametrize(("fmt", "scheme"), OF_FORMATS)
def test_a_flipped_bit_anywhere_is_found(fmt, scheme, tmp_path):
    """In every file, in every tensor, in headers."""
    source = write_small(tmp_path / "in", fmt)
    out = tmp_path / "out"
    streamq.convert(source, out, scheme, format=fmt)
    report = check(out, source)
    assert (report.failures, report.exact, report.inexact) == ([], True, None)
    assert report.files == len(contents(out)) - 1
    good = contents(out)
    places = [(name, at) for name, raw in good.items() for at in (0, len(raw) // 2, len(raw) - 1)]
    with open_checkpoint(out) as c:
        places += [(t.file, at) for t in c.tensors.values() for at in (t.start, t.end - 1)]
    rng = random.Random(1)
    for name, at in rng.sample(places, min(40, len(places))):
        raw = bytearray(good[name])
        raw[at] ^= 1 << rng.randrange(8)
        (out / name).write_bytes(raw)
        found = verify(out).failures
        assert any(failure.startswith(name) for failure in found), (name, at, found)
        (out / name).write_bytes(good[name])
    assert verify(out).failures == []


def test_damage_is_told_by_the_tensors_in_it(source, tmp_path):
    out = tmp_path / "out"
    run_convert(source, out, "w8a8")
    with open_checkpoint(out) as c:
        t = c.tensors["model.layers.1.mlp.down_proj.weight"]
    raw = bytearray((out / t.file).read_bytes())
    raw[t.start + 1234] ^= 4
    (out / t.file).write_bytes(raw)
    found = check(out, source)
    assert found.exact
    assert any(
        re.match(rf"{t.file}: bytes 0 to {len(raw)} \('.*' and \d+ more\) are not what was", f)
        for f in found.failures
    )
    name = "model.layers.1.mlp.down_proj.weight"
    assert f"{name!r} differs from what the source converts to at byte 1234" in found.failures


def sealed(out, change):
    """Change streamq.json, with its checksum."""
    record = parse_record((out / RECORD).read_bytes())
    change(record.about)
    (out / RECORD).write_text(record_text(record.about, record.files))


INEXACT = {
    "version": (lambda about: about.update(streamq="0.0.1"), "made by streamq 0.0.1, this is"),
    "source": (
        lambda about: about["source"]["config.json"].update(size=1), "the source is not the one",
    ),
    "options": (lambda about: about["options"].pop("only"), "cannot be planned again"),
}  # fmt: skip


@pytest.mark.parametrize("what", INEXACT)
def test_what_cannot_be_converted_again_is_checked_by_element(what, source, tmp_path):
    out = tmp_path / "out"
    run_convert(source, out, "nvfp4")
    change, message = INEXACT[what]
    sealed(out, change)
    report = check(out, source)
    assert (report.failures, report.exact) == ([], False)
    assert message in report.inexact
    result = CliRunner().invoke(cli, ["verify", str(out), "--source", str(source)])
    assert result.exit_code == 0
    assert message in result.stdout
    assert "every element within its bound" in result.stdout


def test_bits_that_keep_their_checksum_are_found_with_the_source(source, tmp_path):
    """A conversion that went wrong has good checksums; converting again tells."""
    out = tmp_path / "out"
    run_convert(source, out, "w8a8")
    name = "model-00002-of-00003.safetensors"
    raw = bytearray((out / name).read_bytes())
    raw[-9] ^= 1
    (out / name).write_bytes(raw)
    record = parse_record((out / RECORD).read_bytes())
    files = {**record.files, name: FileSum(len(raw), [zlib.crc32(raw)])}
    (out / RECORD).write_text(record_text(record.about, files))
    assert verify(out).failures == []
    (failure,) = check(out, source).failures
    assert "differs from what the source converts to at byte" in failure


def test_the_command_says_what_was_checked(source, tmp_path):
    out = tmp_path / "out"
    run_convert(source, out, "nvfp4")
    result = CliRunner().invoke(cli, ["verify", str(out), "--source", str(source)])
    assert result.exit_code == 0
    assert "the checksums of 5 files hold" in result.stdout
    assert "every byte is what the source converts to" in result.stdout
    found = json.loads(CliRunner().invoke(cli, ["verify", str(out), "--json"]).stdout)
    assert (found["ok"], found["files"], found["exact"]) == (True, 5, False)
    (out / RECORD).unlink()
    result = CliRunner().invoke(cli, ["verify", str(out)])
    assert "no streamq.json, so no checksums" in result.stdout
