"""Batches of repositories of the Hub."""

import json
import signal
import time
from pathlib import Path

import pytest
from batches import batch, cli_run, start, states, write_source
from hub_stand_in import HubStandIn
from hub_uploads import Uploads
from small_units import contents

import streamq
from streamq.batch import Processes
from streamq.batch import types as batch_types
from streamq.converting import Settings

NAMES = ("org/a", "org/b")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Two repositories; what is temporary has a directory of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tmp").mkdir()
    with HubStandIn() as hub:
        hub.uploads = Uploads(hub)
        for seed, name in enumerate(NAMES):
            hub.commit_folder(name, write_source(tmp_path / "sources" / name, seed, rows=4096))
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "me")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
        monkeypatch.setattr(batch_types, "FIRST", 0.01)
        yield hub


def is_right(name, scheme="nvfp4"):
    out = Path("single") / name
    streamq.convert(f"hf://{name}", out, scheme, settings=Settings(sync=False))
    return contents(out) == contents(Path(f"out/{name}-nvfp4"))


ARGS = ["-", "--scheme", "nvfp4", "--out", "out/{org}/{name}-nvfp4", "--jobs", "2"]


def test_names_on_standard_input(hub):
    result = cli_run(*ARGS, "--json", lines=NAMES)
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert {said["src"] for said in found} == {"hf://org/a", "hf://org/b"}
    assert all(said["bytes_downloaded"] >= said["bytes_in"] for said in found)
    assert list(Path("tmp").iterdir()) == []
    requests = len(hub.log)
    result = cli_run(*ARGS, lines=NAMES)
    assert result.stdout.count("done before") == 2
    assert len(hub.log) == requests
    assert all(map(is_right, NAMES))


def test_a_branch_that_moves_on_is_no_new_job(hub, tmp_path):
    cli_run(*ARGS, lines=NAMES)
    hub.commit_folder("org/a", write_source(tmp_path / "sources" / "new", 7))
    result = cli_run(*ARGS, "-s", "w4a16", "--out", "out/{org}/{name}-{scheme}", lines=NAMES)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("done before") == 2


def test_killed_and_gone_on_with(hub):
    slow = [True]

    def slowly(x):
        if slow[0] and x.where == "cdn" and x.headers.get("range"):
            time.sleep(0.3)
        return False

    hub.faults.append(slowly)
    child = start(*ARGS, "-q", lines=NAMES)
    while not list(Path().glob("out/org/*.partial/output/*")):
        assert child.poll() is None
        time.sleep(0.01)
    assert list(Path("tmp").iterdir())
    child.send_signal(signal.SIGKILL)
    child.communicate()
    slow[0] = False
    deadline = time.monotonic() + 20
    while list(Path("tmp").iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(Path("tmp").iterdir()) == []  # what the children had there
    result = cli_run(*ARGS, lines=NAMES)
    assert result.exit_code == 0, result.output
    assert all(map(is_right, NAMES))


@pytest.mark.parametrize("moment", ["plan", "convert"])
def test_too_many_requests(hub, moment):
    """A Hub that asks to wait for longer than a conversion does is asked again by the batch."""
    hits = []

    def fault(x):
        begun = list(Path().glob("out/org/b*.partial"))
        if not hits and ("org/b" in x.path or (begun and x.where == "cdn")):
            if moment == "convert" and not begun:
                return False
            hits.append(x.path)
            x.error(429, "", "slow down", Retry_After="400")
            return True
        return False

    hub.faults.append(fault)
    found = batch(Processes(), names=NAMES, schemes=("nvfp4",))
    assert states(found) == ["done", "done"]
    assert len(hits) == 1
    assert [o.tries for o in found] == [1, 2 if moment == "convert" else 1]


def test_a_repository_that_is_none(hub):
    found = batch(Processes(), names=(*NAMES, "org/c"), schemes=("nvfp4",))
    assert states(found) == ["not started", "not started", "failed"]
    assert "no such repository" in found[2].error
    assert not Path("out").exists()


def test_a_directory_wins_and_an_address_forces_the_hub(hub, tmp_path):
    write_source(tmp_path / "org" / "a", 5)
    found = batch(Processes(), names=("org/a",), schemes=("nvfp4",), out="here")
    assert states(found) == ["done"]
    assert hub.log == []
    found = batch(Processes(), names=("hf://org/a",), schemes=("nvfp4",), out="there")
    assert states(found) == ["done"]
    assert contents(Path("here")) != contents(Path("there"))


# --- outputs on the Hub -----------------------------------------------------------------------

TO_HUB = ["-", "--scheme", "nvfp4", "--out", "hf://me/{name}-nvfp4", "--private"]


def output_of(hub, repo):
    files = hub.uploads.files(repo, "main")
    return {
        name: data for name, data in files.items() if name not in (".gitattributes", "README.md")
    }


def test_outputs_on_the_hub(hub):
    result = cli_run(*TO_HUB, "--json", lines=NAMES)
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert {said["dst"] for said in found} == {"hf://me/a-nvfp4", "hf://me/b-nvfp4"}
    assert all("url" in said for said in found)
    for name in NAMES:
        streamq.convert(f"hf://{name}", f"single/{name}", "nvfp4", settings=Settings(sync=False))
        repo = f"me/{name[-1]}-nvfp4"
        assert output_of(hub, repo) == contents(Path("single") / name)
        assert hub.repos[repo].private
        card = hub.uploads.files(repo, "main")["README.md"].decode()
        assert f"streamq convert hf://{name} hf://{repo} --scheme nvfp4" in card
    requests = len(hub.log)
    result = cli_run(*TO_HUB, lines=NAMES)
    assert result.stdout.count("done before") == 2
    assert len(hub.log) == requests
    Path("streamq-batch.state").unlink()
    result = cli_run(*TO_HUB, lines=NAMES)
    assert result.exit_code == 1
    assert "me/a-nvfp4: has " in result.stderr


@pytest.mark.parametrize("line", ["begun", "nothing"])
def test_a_commit_that_was_not_noted(hub, line):
    """A kill between the commit and the note of it."""
    cli_run(*TO_HUB, lines=NAMES[:1])
    state = Path("streamq-batch.state")
    raw = state.read_bytes().splitlines(keepends=True)
    assert len(raw) == 3
    state.write_bytes(b"".join(raw[: 2 if line == "begun" else 1]))
    before = len(hub.uploads.uploaded)
    result = cli_run(*TO_HUB, lines=NAMES[:1])
    assert result.exit_code == (0 if line == "begun" else 1)
    assert len(hub.uploads.uploaded) == before
