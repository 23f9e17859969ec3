"""The Ray engine over a stand-in for Ray: same bytes as here, whatever is lost on the way."""

import json
import os
import pickle
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from batches import NAMES, OUT, Here, write_source
from click.testing import CliRunner
from fake_ray import LATE, FakeRay, NodeDiedError
from small_units import contents, small_units, write_small
from straddling import ROWS, straddling
from test_hub_destinations import hub  # noqa: F401

import streamq
from streamq.batch import How, State, read_jobs, run
from streamq.batch.watching import watching
from streamq.cli import cli
from streamq.converting import Settings, Upload
from streamq.engines import tasks
from streamq.errors import PlanError, StreamqError, WriteError
from streamq.trust import FileSum
from streamq.writer import Destination

LOST = NodeDiedError("Node Died. Task failed.\nMore of it.")


@pytest.fixture
def ray(monkeypatch):
    fake = FakeRay(0, 1, 1, 1)
    monkeypatch.setitem(sys.modules, "ray", fake)
    return fake


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("engines") / "in")


@pytest.fixture(scope="module")
def wanted(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("wanted") / "out"
    streamq.convert(source, out, "nvfp4")
    return contents(out)


def convert(source, out, engine="ray", scheme="nvfp4", how=Settings()):  # noqa: B008
    return streamq.convert(source, out, scheme, engine=engine, settings=how)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_bytes_are_those_of_a_local_run(row, ray, tmp_path):
    src = straddling(tmp_path / "in", row.family)
    streamq.convert(src, tmp_path / "local", row.scheme, **row.more)
    summary = streamq.convert(src, tmp_path / "ray", row.scheme, engine="ray", **row.more)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    shards = len([*(tmp_path / "ray").glob("*.safetensors")])
    assert summary.remarks == (f"Ray: {shards} tasks on 1 nodes",)
    assert streamq.verify(tmp_path / "ray", src).failures == []
    assert not (tmp_path / "ray.partial").exists()


def test_lost_tasks_are_done_again(ray, source, wanted, tmp_path):
    ray.fates = iter([LOST, None, LATE, LATE, LOST])
    said = []
    summary = convert(source, tmp_path / "out", how=Settings(notify=said.append))
    assert contents(tmp_path / "out") == wanted
    assert summary.remarks == (
        "Ray: 3 tasks on 1 nodes; 4 more were lost with their worker or node, and done again",
    )
    assert len([line for line in said if "is done again" in line]) == 4
    assert len(ray.begun) == 7


def test_no_two_attempts_share_a_folder(ray, source, wanted, tmp_path, monkeypatch):
    """One that was given up may be at work still."""
    folders = []
    real = tasks.make

    def make(order, number, name, attempt):
        folders.append(order.folders[number] / attempt)
        return real(order, number, name, attempt)

    monkeypatch.setattr(tasks, "make", make)
    ray.fates = iter([LATE] * 5)
    convert(source, tmp_path / "out")
    convert(source, tmp_path / "out", how=Settings(overwrite=True))
    assert contents(tmp_path / "out") == wanted
    assert len(folders) == len(set(folders)) == 11


def test_a_shard_that_is_always_lost(ray, source, wanted, tmp_path):
    ray.fates = iter([None, *[LOST] * tasks.TRIES * 2])
    with pytest.raises(StreamqError, match=r"was lost 4 times .*: Node Died\. Task failed\.") as e:
        convert(source, tmp_path / "out")
    assert "the same command goes on from there" in e.value.__notes__[0]
    assert len(ray.cancelled) == 1  # a connection of ours would end them with it
    assert not (tmp_path / "out").exists()
    ray.fates = iter(())
    assert convert(source, tmp_path / "out").resumed > 0
    assert contents(tmp_path / "out") == wanted


@pytest.mark.parametrize("first", ["local", "ray"])
@pytest.mark.parametrize("second", ["local", "ray"])
def test_either_engine_goes_on_where_the_other_stopped(
    first, second, ray, source, wanted, tmp_path, monkeypatch
):
    small_units(monkeypatch.setattr)
    done, calls = [], []

    def stop(n, name):
        calls.append(name)
        if len(calls) == (14 if first == "local" else 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", first, how=Settings(workers=1, progress=stop))
    assert not (tmp_path / "out").exists()
    journal = (tmp_path / "out.partial" / "journal").read_text()
    assert '"file"' in journal
    how = Settings(workers=1, notify=done.append)
    summary = convert(source, tmp_path / "out", second, how=how)
    assert "resuming" in done[0]
    assert summary.resumed > 0
    assert contents(tmp_path / "out") == wanted
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_run_left_of_attempts_goes(ray, source, wanted, tmp_path):
    def stop(n, name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", how=Settings(progress=stop))
    stray = tmp_path / "out.partial" / "attempts" / "other" / "0-x-0" / "model.safetensors.tmp"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"x")
    gone = []
    convert(source, tmp_path / "out", how=Settings(progress=lambda n, _: gone.append(stray)))
    assert gone
    assert not stray.exists()
    assert contents(tmp_path / "out") == wanted


def spoilt(source, folder):
    """A NaN in the last shard."""
    shutil.copytree(source, folder)
    path = max(folder.glob("*.safetensors"))
    raw = bytearray(path.read_bytes())
    raw[-2:] = np.array([np.nan], ml_dtypes.bfloat16).tobytes()
    path.write_bytes(raw)
    return folder


def test_an_error_in_a_task_is_one_sentence(ray, source, tmp_path):
    """And is not tried again."""
    src = spoilt(source, tmp_path / "in")
    result = CliRunner().invoke(
        cli, ["convert", str(src), str(tmp_path / "out"), "-s", "fp8_block", "--engine", "ray"]
    )
    assert result.exit_code == 1
    sentence, *notes = result.stderr.splitlines()
    assert re.fullmatch(r"Error: tensor '.*' in model-00003.*: row .* is NaN or Inf; .*", sentence)
    assert len(notes) == 1
    assert not (tmp_path / "out").exists()
    assert len(set(ray.begun)) == len(ray.begun)


def test_a_bug_in_a_task_comes_back_as_itself(ray, source, tmp_path, monkeypatch):
    def make(*args):
        raise KeyError("bug")

    monkeypatch.setattr(tasks, "make", make)
    with pytest.raises(KeyError, match="bug"):
        convert(source, tmp_path / "out")


def elsewhere(path):
    """Orders that name another source."""

    def asked(version, token, said, order):
        other = replace(pickle.loads(order), token="other", source=str(path))
        return version, token, said, pickle.dumps(other)

    return asked


NODES = {
    "other version": (lambda v, *rest: ("9.9", *rest), "streamq is 0.1.0 there and 9.9 here"),
    "no token": (
        lambda v, path, *rest: (v, path + "x", *rest),
        r"\(No such file .*\); build the output where nodes share storage",
    ),
    "other token": (
        lambda v, path, t, o: (v, path, "x", o),
        r"\(another file .*; build",
    ),
}


@pytest.mark.parametrize(("asked", "message"), NODES.values(), ids=NODES)
def test_nodes_that_do_not_see_the_same(asked, message, ray, source, tmp_path):
    ray.asked = asked
    with pytest.raises(PlanError, match=rf"^node host \(node1\) of the Ray cluster: .*{message}"):
        convert(source, tmp_path / "out")
    assert ray.begun == []
    assert not (tmp_path / "out").exists()


def test_nodes_that_see_another_source(ray, source, tmp_path):
    ray.asked = elsewhere(tmp_path / "nowhere")
    with pytest.raises(PlanError, match=r"node host .*/nowhere: no such file or directory"):
        convert(source, tmp_path / "out")
    other = spoilt(source, tmp_path / "other")
    ray.asked = elsewhere(other)
    with pytest.raises(PlanError, match=r"/other: is not what was planned for \(.* mtime_ns: .*\)"):
        convert(source, tmp_path / "out")
    assert ray.begun == []


def test_a_node_that_came_later_and_sees_another_source(ray, source, tmp_path, monkeypatch):
    real = tasks.make

    def make(order, *args):
        return real(replace(order, token="late", source=str(tmp_path / "nowhere")), *args)

    monkeypatch.setattr(tasks, "make", make)
    with pytest.raises(StreamqError, match=r"^node \S+: .*nowhere: no such file or directory\."):
        convert(source, tmp_path / "out")


def test_a_file_that_is_not_what_was_made(ray, source, tmp_path, monkeypatch):
    real = tasks.make

    def make(*args):
        made = real(*args)
        made.path.write_bytes(made.path.read_bytes()[:-1])
        return made

    monkeypatch.setattr(tasks, "make", make)
    with pytest.raises(WriteError, match=r"^model-\S+: .* is not what was written there; its stor"):
        convert(source, tmp_path / "out")


def test_measured_as_a_local_run_does_and_over_a_resume(ray, source, tmp_path):
    how = Settings(stats=True, details=True, workers=1)
    local = convert(source, tmp_path / "local", "local", how=how)
    made = []

    def stop(n, name):
        made.append(name)
        if len(made) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", how=replace(how, progress=stop))
    said = []
    summary = convert(source, tmp_path / "out", how=replace(how, notify=said.append))
    assert summary.quality.by_tensor() == pytest.approx(local.quality.by_tensor())
    assert summary.quality.errors_by_kind() == local.quality.errors_by_kind()
    assert not any("measured less" in line for line in said)
    made.clear()
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "some", how=Settings(progress=stop))
    convert(source, tmp_path / "some", how=replace(how, notify=said.append))
    assert any("measured less" in line for line in said)


def test_several_outputs(ray, source, wanted, tmp_path):
    outs = [tmp_path / "a", tmp_path / "b"]
    names = [f"nvfp4:{outs[0]}", f"fp8_block:{outs[1]}"]
    args = [x for name in names for x in ("--to", name)]
    result = CliRunner().invoke(cli, ["convert", str(source), *args, "--engine", "ray", "--json"])
    assert result.exit_code == 0, result.output
    assert [made["remarks"] for made in json.loads(result.stdout)] == [
        ["Ray: 6 tasks on 1 nodes"]
    ] * 2
    assert contents(outs[0]) == wanted
    convert(source, tmp_path / "c", "local", "fp8_block")
    assert contents(outs[1]) == contents(tmp_path / "c")


def test_a_source_that_is_what_is_wanted_needs_no_task(ray, source, tmp_path):
    result = CliRunner().invoke(
        cli, ["convert", str(source), str(tmp_path / "out"), "-s", "bf16", "--engine", "ray"]
    )
    assert result.exit_code == 0, result.output
    assert ray.begun == []


@pytest.mark.parametrize(
    ("cpus", "wanted", "found"),
    [
        ((1, 1, 1), None, 1),
        ((8, 8), None, 5),
        ((2, 64), None, 22),
        ((4, 2), 4, 4),
        ((96,), None, 32),
    ],
)
def test_workers_of_a_task(cpus, wanted, found, ray, source, tmp_path):
    """By default all CPUs have something to do: there are three tasks."""
    ray.cpus = cpus
    assert convert(source, tmp_path / "out", how=Settings(workers=wanted)).workers == found


REFUSED = {
    "workers": (Settings(workers=2), (1, 1), "--workers 2: the largest node .* has 1 CPUs"),
    "no node": (Settings(), (0,), "no node of the Ray cluster has a CPU"),
    "device": (Settings(device="cuda"), (1,), "--device cuda is for --engine local"),
}


@pytest.mark.parametrize(("how", "cpus", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_cluster_cannot_do(how, cpus, message, ray, source, tmp_path):
    ray.cpus = cpus
    with pytest.raises(PlanError, match=message):
        convert(source, tmp_path / "out", how=how)
    assert [*tmp_path.iterdir()] == []


def test_nodes_that_are_all_gone_are_waited_for(ray, source, wanted, tmp_path, monkeypatch):
    waits, said = [], []
    real = ray.wait

    def wait(refs, timeout):
        waits.append(timeout)
        ray.cpus = () if len(waits) == 1 else (1,)
        return ([], refs) if len(waits) == 1 else real(refs, timeout)

    monkeypatch.setattr(ray, "wait", wait)
    convert(source, tmp_path / "out", how=Settings(notify=said.append))
    assert "no node with 1 CPUs is left; waiting for one" in said
    assert contents(tmp_path / "out") == wanted


def test_without_ray(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    args = ["convert", str(source), str(tmp_path / "out"), "-s", "nvfp4", "--engine", "ray:auto"]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: --engine ray needs Ray, here and on every node: pip install 'streamq[ray]'.\n"
    )


@pytest.mark.parametrize(
    ("name", "environment", "last"),
    [
        ("ray:127.0.0.1:9", "", ""),
        ("ray:ray://127.0.0.1:9", "", ""),
        ("ray", "127.0.0.1:9", ""),
        ("ray:auto", "127.0.0.1:9", "no"),
        ("ray:auto", "", "127.0.0.1:9"),
    ],
)
def test_an_address_where_no_cluster_is(
    name, environment, last, ray, source, tmp_path, monkeypatch
):
    """Ray itself waits there for minutes; it is not asked."""
    monkeypatch.setenv("RAY_ADDRESS", environment)
    monkeypatch.setattr("streamq.engines.ray.LAST", tmp_path / "last")
    if last:
        (tmp_path / "last").write_text(last)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    result = CliRunner().invoke(
        cli, ["convert", str(source), str(tmp_path / "out"), "-s", "nvfp4", "--engine", name]
    )
    assert result.exit_code == 1
    more = (
        f"; {tmp_path / 'last'} names it, `ray stop` forgets it" if not environment and last else ""
    )
    assert result.stderr == (
        f"Error: --engine {name}: no Ray cluster answers (127.0.0.1:9: Connection refused{more}).\n"
    )


def test_a_cluster_of_ours_does_not_report_its_use(ray, source, tmp_path, monkeypatch):
    """Ray would, to its makers, and no command asks for that."""
    monkeypatch.setattr("streamq.engines.ray.LAST", tmp_path / "last")
    monkeypatch.setattr("os.environ", {"PATH": os.environ["PATH"]})
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    found = []

    def init(*args, **kw):
        found.append(os.environ["RAY_USAGE_STATS_ENABLED"])
        raise ConnectionError("none")

    monkeypatch.setattr(ray, "init", init, raising=False)
    with pytest.raises(PlanError, match=r"no Ray cluster answers \(none\)"):
        convert(source, tmp_path / "out")
    assert found == ["0"]


@pytest.mark.parametrize("name", ["", "Ray", "ray:", "rayon", "dask", "local:1"])
def test_names_that_are_no_engine(name, source, tmp_path):
    args = ["convert", str(source), str(tmp_path / "out"), "-s", "nvfp4", "--engine", name]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 2
    assert "is no engine" in result.stderr


def test_accept_takes_the_place_of_a_part(tmp_path):
    """What this process has begun of a shard must not get into the output."""
    target = Destination(tmp_path / "out", False, True)
    target.begin({"x": 1})
    part = target.shard("a", b"head", 8)
    part.abandon()
    path = target.attempts / "a"
    path.parent.mkdir()
    path.write_bytes(b"headdata")
    target.accept(path, "a", b"head", 8, FileSum(8, [0]), [])
    target.commit()
    target.close()
    assert contents(tmp_path / "out") == {"a": b"headdata"}


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_from_the_hub_to_the_hub(ray, hub, source, tmp_path):  # noqa: F811
    """Nodes fetch the commit that was planned for; this process uploads what they have made."""
    hub.commit_folder("acme/in", source)
    convert("hf://acme/in", tmp_path / "local", "local")
    wanted = contents(tmp_path / "local")
    shards = [data for name, data in wanted.items() if name.endswith(".safetensors")]
    held = []

    def room(n, name):
        made = (tmp_path / "work").rglob("*.safetensors")
        held.append(sum(p.stat().st_size for p in made))

    def push(*args):
        hub.commit("acme/in", {"config.json": b"{}"})
        return args

    upload = Upload(work_dir=tmp_path / "work", max_disk=max(map(len, shards)))
    ray.fates, ray.asked = iter([None, LATE]), push
    summary = convert("hf://acme/in", "hf://acme/out", how=Settings(upload=upload, progress=room))
    assert summary.remarks[0].startswith("Ray: 3 tasks on 1 nodes; 1 more")
    assert summary.downloaded > sum(p.stat().st_size for p in source.glob("*.safetensors")) / 2
    found = hub.uploads.files("acme/out", "main")
    assert {name: found[name] for name in wanted} == wanted
    assert max(held) <= max(map(len, shards))


def test_batches(ray, tmp_path, monkeypatch):
    """Threads are those of a task, whatever this machine has; bytes are those of a local batch."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(NAMES[:2]):
        write_source(tmp_path / name, seed)
    ray.cpus = (4, 4)
    jobs = read_jobs("lines", list(NAMES[:2]), {"out": OUT, "schemes": ("nvfp4a16",)}).jobs
    here, state = Here(), State(tmp_path / "state")
    how = How(settings=Settings(workers=3), engine="ray")
    with watching(2, True, False) as watch:
        found = run(jobs, how, here, state, watch)
    state.close()
    assert [o.said["remarks"] for o in found] == [["Ray: 2 tasks on 1 nodes"]] * 2
    assert {work.settings["workers"] for work in here.works} == {3}
    for name in NAMES[:2]:
        convert(name, tmp_path / "local" / name, "local", "nvfp4a16")
        made = contents(Path(OUT.format(org="org", name=name[4:], scheme="nvfp4a16")))
        assert made == contents(tmp_path / "local" / name)
