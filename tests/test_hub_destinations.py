"""Outputs on the Hub: byte for byte what a local run writes, whatever the way there is like."""

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import write_checkpoint
from hub_stand_in import HubStandIn, failing, stalling
from hub_uploads import Uploads
from huggingface_hub import ModelCard, close_session
from xet_stand_in import Xet

import streamq
from streamq.cli import cli
from streamq.converting import Settings, Upload
from streamq.errors import AddressError, HubError, StreamqError
from streamq.hub.card import card_text, metadata_of

# huggingface_hub gives files to its HTTP library in a way that one will drop some day.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "acme/tiny-fp8"
DST = f"hf://{REPO}"
SHARDS = 6
#: Files of a branch that are no files of the output.
OWN = {".gitattributes", "README.md"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Six shards of about 36 kB, some of it to be copied."""
    rng = np.random.default_rng(1)
    tensors, shards = {}, []
    for i in range(SHARDS):
        block = {
            f"model.layers.{i}.mlp.down_proj.weight": rng.standard_normal((128, 128), np.float32),
            f"model.layers.{i}.input_layernorm.weight": rng.standard_normal(1024, np.float32),
        }
        tensors |= block
        shards.append(list(block))
    config = {"model_type": "llama", "num_hidden_layers": SHARDS}
    folder = write_checkpoint(tmp_path_factory.mktemp("source") / "tiny", tensors, config, shards)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


def contents(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


@pytest.fixture(scope="module")
def wanted(source, tmp_path_factory):
    """What a local run writes."""
    out = tmp_path_factory.mktemp("wanted") / "out"
    streamq.convert(source, out, "fp8_dynamic", settings=Settings(sync=False))
    return contents(out)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub where acme is logged in, and no time is lost by waiting."""
    with HubStandIn() as stand_in:
        stand_in.uploads = Uploads(stand_in)
        for name, value in {
            "HF_ENDPOINT": stand_in.url, "HF_TOKEN": "acme", "HF_HOME": str(tmp_path / "hf"),
            "HF_XET_CLIENT_RETRY_BASE_DELAY": "20ms",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
        quick = SimpleNamespace(sleep=lambda s, sleep=time.sleep: sleep(min(s, 0.02)))
        monkeypatch.setattr("huggingface_hub.utils._http.time", quick)
        monkeypatch.setattr("streamq.hub.client.FIRST", 0.01)
        monkeypatch.setattr("streamq.hub.client.LONGEST", 0.05)
        close_session()
        yield stand_in
        close_session()


@pytest.fixture
def work(tmp_path):
    return tmp_path / "work"


def convert(source, work, dst=DST, overwrite=False, notify=None, **upload):
    how = Settings(
        workers=2, sync=False, overwrite=overwrite, notify=notify,
        upload=Upload(work_dir=work, **upload),
    )  # fmt: skip
    return streamq.convert(source, dst, "fp8_dynamic", settings=how)


def output_of(hub, revision="main", repo=REPO):
    files = hub.uploads.files(repo, revision)
    return {name: data for name, data in files.items() if name not in OWN}


def is_empty(work):
    return not work.exists() or not [p for p in work.rglob("*") if p.is_file()]


# --- the bytes ----------------------------------------------------------------------------


def broken_put(times):
    """The connection breaks while a file goes up."""
    left = [times]

    def fault(x):
        if x.command != "PUT" or not left[0]:
            return False
        left[0] -= 1
        x.rfile.read(100)
        x.close_connection = True
        x.connection.shutdown(2)
        return True

    return fault


PUT = "cdn/upload/.*"
FAULTS = {
    "none": [],
    "5% fail": [lambda: failing(0.05, seed=5)],
    "20% fail": [lambda: failing(0.2, seed=7)],
    "429 for files": [lambda: failing(status=429, where=PUT, times=2, Retry_After="1")],
    "429 for the batch": [
        lambda: failing(status=429, where="hub/.*/batch", times=2, Retry_After="1")
    ],
    "429 for the commit": [
        lambda: failing(status=429, where="hub/.*/commit/main", times=2, Retry_After="1")
    ],
    "500 for the commit": [lambda: failing(status=500, where="hub/.*/commit/main", times=1)],
    "stalled": [lambda: stalling(1.5, where=PUT, times=2)],
    "broken": [lambda: broken_put(2)],
    "expired": [lambda: failing(status=403, where=PUT, times=2)],
    "unverified": [lambda: failing(status=503, where="hub/.*/verify", times=2)],
}


IN_PARTS = ("none", "5% fail", "stalled", "broken", "expired")


@pytest.mark.parametrize(
    ("faults", "parts"), [*((f, False) for f in FAULTS), *((f, True) for f in IN_PARTS)]
)
def test_bytes_are_those_of_a_local_run(hub, source, wanted, work, faults, parts, monkeypatch):
    monkeypatch.setattr("streamq.hub.files.TIMEOUT", 0.5)
    if parts:
        hub.uploads.part = 10_000
    hub.faults = [make() for make in FAULTS[faults]]
    summary = convert(source, work)
    hub.faults = []
    assert output_of(hub) == wanted
    assert len(hub.uploads.messages) == 1
    assert summary.committed.url == f"{hub.url}/{REPO}/commit/{hub.repos[REPO].branches['main']}"
    assert len(hub.uploads.uploaded) == SHARDS
    assert is_empty(work)


@pytest.mark.parametrize("known", [True, False], ids=["", "a Hub without it"])
def test_over_xet(hub, source, wanted, work, known, monkeypatch):
    """As the Hub has it by default; without ``hf_xet`` installed it goes over LFS here, too."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    xet = Xet(hub.uploads) if known else None
    convert(source, work)
    assert output_of(hub) == wanted
    assert len(hub.uploads.messages) == 1
    if importlib.util.find_spec("hf_xet"):
        assert (hub.uploads.put == 0) == known
        assert xet is None or xet.received > 0


def test_over_xet_where_requests_fail(hub, source, wanted, work, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    xet = Xet(hub.uploads)
    hub.faults = [
        failing(where="cdn/v1/xorbs/.*", times=2), failing(where="cdn/v1/shards", times=2),
        failing(0.05, seed=1),
    ]  # fmt: skip
    convert(source, work)
    assert output_of(hub) == wanted
    assert xet.received or not importlib.util.find_spec("hf_xet")


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, source, wanted, work):
    hub.uploads.hide_commits = 1
    summary = convert(source, work)
    assert output_of(hub) == wanted
    assert len(hub.uploads.messages) == 1
    assert summary.committed.url.endswith(hub.repos[REPO].branches["main"])


def test_an_error_that_stays_is_told_and_the_same_command_goes_on(
    hub, source, wanted, work, monkeypatch
):
    monkeypatch.setattr("streamq.hub.client.TRIES", 2)
    hub.faults = [failing(status=500, where=PUT)]
    with pytest.raises(HubError, match=r"acme/tiny-fp8: model-0000.*answered 500") as caught:
        convert(source, work)
    assert "the same command goes on" in caught.value.__notes__[0]
    hub.faults = []
    convert(source, work)
    assert output_of(hub) == wanted


def test_storage_that_fails_is_given_up(hub, source, work):
    """huggingface_hub tries a file 6 times, and that 6 times over; not 5 times that again."""
    hub.faults = [failing(status=500, where=PUT)]
    with pytest.raises(StreamqError, match="the Hub answered 500"):
        convert(source, work)
    tries = Counter(r.path for r in hub.log if r.method == "PUT")
    assert 1 < max(tries.values()) <= 36


def test_the_work_folder_is_not_in_the_source(hub, source):
    args = ["convert", str(source), DST, "-s", "fp8_dynamic", "--work-dir", str(source)]
    ran = CliRunner().invoke(cli, args)
    assert ran.exit_code == 1
    assert "overlaps the source" in ran.output


def test_several_outputs(hub, source, wanted, work, tmp_path):
    local = tmp_path / "local"
    wants = f"fp8_dynamic:{DST}", f"nvfp4a16:{local}", "w8a16:hf://acme/tiny-w8"
    args = ["convert", source, "--work-dir", work, "--max-disk", "40KB"]
    args += [word for to in wants for word in ("--to", to)]
    ran = CliRunner().invoke(cli, list(map(str, args)))
    assert ran.exit_code == 0, ran.output
    assert output_of(hub) == wanted
    alone = tmp_path / "alone"
    streamq.convert(source, alone, "w8a16", settings=Settings(sync=False))
    assert output_of(hub, repo="acme/tiny-w8") == contents(alone)
    assert streamq.verify(local).failures == []
    assert is_empty(work)


def test_a_source_that_is_what_is_wanted_is_copied(hub, source, work, tmp_path):
    done = tmp_path / "done"
    streamq.convert(source, done, "fp8_dynamic", settings=Settings(sync=False))
    (done / "README.md").write_text("---\nlicense: mit\n---\n# Somebody's words\n")
    again = tmp_path / "again"
    streamq.convert(done, again, "fp8_dynamic", settings=Settings(sync=False))
    convert(done, work)
    found, local = output_of(hub), contents(again)
    del local["README.md"], local["streamq.json"], found["streamq.json"]
    assert found == local
    card = hub.uploads.files(REPO)["README.md"].decode()
    assert "license: mit" in card
    assert "- fp8_dynamic\n" in card
    assert "Somebody" not in card


@pytest.mark.parametrize("faults", [None, failing(0.05, seed=3)], ids=["", "5% fail"])
def test_from_the_hub_to_the_hub(hub, source, wanted, work, tmp_path, faults):
    hub.commit_folder("them/model", source)
    hub.faults = [faults] if faults else []
    convert("hf://them/model", work)
    hub.faults = []
    streamq.convert("hf://them/model", tmp_path / "out", "fp8_dynamic")
    assert output_of(hub) == contents(tmp_path / "out")
    assert {n: d for n, d in output_of(hub).items() if n != "streamq.json"} == {
        n: d for n, d in wanted.items() if n != "streamq.json"
    }
    card = huggingface_hub.ModelCard(hub.uploads.files(REPO)["README.md"].decode())
    assert card.data.base_model == "them/model"


def test_a_source_on_the_hub_is_copied(hub, source, wanted, work, tmp_path):
    hub.commit("them/fp8", {n: d for n, d in wanted.items() if n != "streamq.json"})
    convert("hf://them/fp8", work, max_disk=30_000)
    names = wanted.keys() - {"streamq.json"}
    assert {name: output_of(hub)[name] for name in names} == {n: wanted[n] for n in names}


def test_a_repository_is_replaced_by_what_it_is_converted_to(hub, source, wanted, work):
    hub.commit_folder(REPO, source)
    convert(DST, work, overwrite=True)
    assert {n: d for n, d in output_of(hub).items() if n != "streamq.json"} == {
        n: d for n, d in wanted.items() if n != "streamq.json"
    }
    assert b"base_model: " + REPO.encode() in hub.uploads.files(REPO)["README.md"]


def test_a_report_of_an_output_on_the_hub(hub, source, work, tmp_path):
    page = tmp_path / "report.json"
    args = ["convert", source, DST, "-s", "fp8_dynamic", "--work-dir", work, "--report", page]
    ran = CliRunner().invoke(cli, list(map(str, args)))
    assert ran.exit_code == 0, ran.output
    assert json.loads(page.read_text())["total"]["sqnr_db"] > 20
    assert "What the weights lost" in hub.uploads.files(REPO)["README.md"].decode()


def test_what_is_on_the_hub_is_downloaded_to_be_verified():
    with pytest.raises(StreamqError, match=f"{DST}: only directories are verified; `hf download`"):
        streamq.verify(DST)


@pytest.mark.parametrize("verb", ["reindex", "compress"])
def test_other_commands_write_to_directories(hub, source, verb):
    ran = CliRunner().invoke(cli, [verb, str(source), DST])
    assert ran.exit_code == 2
    assert "only `streamq convert` writes to the Hub" in ran.output
    assert not Path("hf:").exists()


def test_what_was_downloaded_verifies(hub, source, work, tmp_path):
    convert(source, work)
    for name, data in hub.uploads.files(REPO).items():
        path = tmp_path / "down" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    report = streamq.verify(tmp_path / "down", source)
    assert report.failures == []


# --- branches, pull requests, what is there ---------------------------------------------------


def test_the_branch_moves(hub, source, wanted, work):
    hub.commit(REPO, {".gitattributes": b""})

    def move(x):
        if "/commit/" in x.path:
            hub.commit(REPO, {"notes.txt": b"mine"}, keep=True)
            hub.faults.clear()
        return False

    hub.faults = [move]
    with pytest.raises(HubError, match=r"moved on from .* run the same command again"):
        convert(source, work)
    before = hub.uploads.put
    convert(source, work)
    assert hub.uploads.put == before
    assert output_of(hub) == {**wanted, "notes.txt": b"mine"}


def test_overwrite_deletes_what_is_stale_in_the_same_commit(hub, source, wanted, work):
    hub.commit(REPO, {
        "model-00001-of-00009.safetensors": b"old", "model.safetensors.index.json": b"old",
        "pytorch_model.bin": b"old", "hf_quant_config.json": b"old", "LICENSE": b"kept",
        "README.md": b"old",
    })  # fmt: skip
    with pytest.raises(HubError, match="already; choose another repository or --branch, or --over"):
        convert(source, work)
    assert is_empty(work)
    convert(source, work, overwrite=True)
    assert output_of(hub) == {**wanted, "LICENSE": b"kept"}
    assert hub.uploads.files(REPO)["README.md"] != b"old"
    assert len(hub.uploads.messages) == 1


@pytest.mark.parametrize("ignored", ["*-00003-*", "tokenizer.json"])
def test_what_git_is_to_ignore_is_not_left_out(hub, source, wanted, work, ignored):
    hub.commit(REPO, {".gitignore": ignored.encode()})
    before = dict(hub.repos[REPO].branches)
    with pytest.raises(StreamqError, match=r"its \.gitignore leaves out"):
        convert(source, work)
    assert hub.repos[REPO].branches == before
    hub.commit(REPO, {".gitignore": b"*.log"})
    convert(source, work)
    files = output_of(hub)
    del files[".gitignore"]
    assert files == wanted


def test_a_pull_request(hub, source, wanted, work):
    hub.commit(REPO, {".gitattributes": b"x"})
    hub.uploads.hide_commits = 1
    summary = convert(source, work, create_pr=True)
    assert output_of(hub) == {}
    assert output_of(hub, "refs/pr/1") == wanted
    assert summary.committed.url == f"{hub.url}/{REPO}/discussions/1"
    assert len(hub.uploads.messages) == 1


def test_a_pull_request_to_somebody_else(hub, source, wanted, work):
    hub.commit("other/model", {".gitattributes": b"x"})
    convert(source, work, "hf://other/model", create_pr=True)
    assert output_of(hub, "refs/pr/1", "other/model") == wanted


@pytest.mark.parametrize("exists", [False, True])
def test_a_branch(hub, source, wanted, work, exists):
    hub.commit(REPO, {"model.safetensors": b"of main", "README.md": b"of main"})
    if exists:  # as a run that was killed just before its commit leaves it
        hub.repos[REPO].branches["fp8"] = hub.repos[REPO].branches["main"]
    convert(source, work, branch="fp8")
    assert output_of(hub, "fp8") == wanted
    assert hub.uploads.files(REPO)["model.safetensors"] == b"of main"


def test_a_private_repository(hub, source, work):
    convert(source, work, private=True)
    assert hub.repos[REPO].private


# --- refused before the first byte -------------------------------------------------------------


def theirs(hub):
    hub.commit("other/model", {".gitattributes": b"x"})


def public(hub):
    hub.commit(REPO, {".gitattributes": b"x"})


def with_card(hub):
    hub.commit(REPO, {"README.md": b"# Words"})


REFUSED = {
    "no token": ("", None, {}, "acme/tiny-fp8: this needs a login"),
    "a read token": ("read-acme", None, {}, "'token of acme' may only read"),
    "another name": ("bob", None, {}, "this login cannot make one for 'acme'"),
    "no right to write": ("acme", theirs, {"dst": "hf://other/model"}, "the Hub refused: you don"),
    "public": ("acme", public, {"private": True}, "is public; make it private"),
    "a card": ("acme", with_card, {}, "has README.md already"),
    "a request to nothing": ("acme", None, {"create_pr": True}, "a pull request needs"),
    "a branch of a request": (
        "acme", public, {"create_pr": True, "branch": "no"}, "a pull request needs"
    ),
    "little disk": ("acme", None, {"max_disk": 1000}, "--max-disk of 1.00 kB is too little"),
    "a name git refuses": ("acme", None, {"branch": "a b"}, "no branch of such a name"),
    "a request that is not there": ("acme", public, {"branch": "refs/pr/9"}, "check --branch"),
    "no model": ("acme", None, {"base_model": "a model"}, "'a model': is not org/repo"),
    "a folder": ("acme", None, {"dst": f"{DST}/sub"}, "leave out 'sub'"),
    "a revision": ("acme", None, {"dst": f"{DST}@dev"}, "give the branch with --branch dev"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_first_byte(hub, source, work, case, monkeypatch):
    token, prepare, how, message = REFUSED[case]
    monkeypatch.setenv("HF_TOKEN", token)
    if prepare:
        prepare(hub)
    repos = set(hub.repos)
    with pytest.raises(StreamqError) as caught:
        convert(source, work, **how)
    assert message in str(caught.value)
    assert set(hub.repos) == repos
    assert hub.uploads.put == 0
    assert not work.exists()


@pytest.mark.parametrize(
    "option", [["--private"], ["--branch", "x"], ["--create-pr"], ["--max-disk", "1GB"]]
)
def test_options_of_the_hub_need_a_destination_there(source, tmp_path, option):
    args = ["convert", str(source), str(tmp_path / "out"), "-s", "fp8_dynamic", *option]
    ran = CliRunner().invoke(cli, args)
    assert ran.exit_code == AddressError.exit_code == 2
    assert f"{option[0]} is for destinations on the Hub" in ran.output


def test_a_full_disk_is_seen_before(hub, source, work, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(StreamqError, match=r"needs .* on their way to hf://acme/tiny-fp8"):
        convert(source, work)
    assert not work.exists()


# --- kills --------------------------------------------------------------------------------------


def started(source, work, xet=False):
    code = "from streamq.cli import main; main()"
    args = ["convert", source, DST, "-s", "fp8_dynamic", "--work-dir", work, "-j", "1"]
    env = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    env |= {} if xet else {"HF_HUB_DISABLE_XET": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)], env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


class Killing:
    """A fault: the process is killed when a request of a kind comes for the ``number``-th time."""

    def __init__(self, number, matches=lambda x: True):
        self._left, self._matches = number, matches
        self._lock, self._started = threading.Lock(), threading.Event()

    def run(self, *arguments):
        """The end of a process that this is to kill."""
        child = started(*arguments)
        self._pid = child.pid
        self._started.set()
        said, _ = child.communicate()
        return child.returncode, said

    def __call__(self, x):
        with self._lock:
            self._left -= self._matches(x)
            if self._left or not self._matches(x):
                return False
        self._started.wait()
        os.kill(self._pid, signal.SIGKILL)
        x.body()
        x.close_connection = True
        return True


KILLS = {  # at which request, and whether the Hub forgets what is not committed
    "in the first file": (1, lambda x: x.command == "PUT", False),
    "in the fourth file": (4, lambda x: x.command == "PUT", False),
    "in the fourth file, forgotten": (4, lambda x: x.command == "PUT", True),
    "at the verification of a file": (3, lambda x: x.path.endswith("/verify"), False),
    "before the commit": (1, lambda x: "/commit/" in x.path, False),
    "before the commit, forgotten": (1, lambda x: "/commit/" in x.path, True),
}


@pytest.mark.parametrize("where", KILLS)
def test_killed(hub, source, wanted, work, where):
    """No shard that was stored is made or goes up again, unless the Hub has lost it."""
    number, matches, forgets = KILLS[where]
    hub.faults = [fault := Killing(number, matches)]
    assert fault.run(source, work)[0] == -signal.SIGKILL
    assert REPO in hub.repos
    assert hub.uploads.messages == []
    hub.faults = []
    before = list(hub.uploads.uploaded)
    if forgets:
        hub.uploads.forget(REPO)
    said = []
    convert(source, work, notify=said.append)
    assert output_of(hub) == wanted
    assert is_empty(work)
    twice = len(hub.uploads.uploaded) - len(set(hub.uploads.uploaded))
    assert twice == (len(before) if forgets else 0)
    assert "resuming hf://acme/tiny-fp8: " in "".join(said) or number == 1


def test_killed_again_and_again(hub, source, wanted, work, pytestconfig):
    """At any request, while 5% of them fail, until a run gets through."""
    soak = pytestconfig.getoption("--hypothesis-profile") == "soak"
    for seed in range(40 if soak else 1):
        chance, kills = random.Random(seed), 0
        for of in (hub.repos, hub.uploads.objects):
            of.pop(REPO, None)
        hub.uploads.messages.clear()
        code = -signal.SIGKILL
        while code == -signal.SIGKILL:
            fault = Killing(chance.randint(3, 40))
            hub.faults = [fault, failing(0.05, seed=seed + kills)]
            code, said = fault.run(source, work)
            kills += code == -signal.SIGKILL
        assert code == 0, f"{seed}, {kills} kills:\n{said}"
        assert output_of(hub) == wanted, seed
        assert len(hub.uploads.messages) == 1, seed
        assert is_empty(work), seed


def test_killed_behind_the_commit(hub, source, wanted, work):
    """The commit is there, the work folder as well: nothing is made once more."""

    def behind(x):
        if "/commit/" in x.path:
            hub.faults.clear()
            hub.uploads._commit(x, REPO, "main")
            os.kill(child.pid, signal.SIGKILL)
            return True
        return False

    hub.faults = [behind]
    child = started(source, work)
    child.communicate()
    assert output_of(hub) == wanted
    child = started(source, work)
    said, _ = child.communicate()
    assert child.returncode == 0, said
    assert len(hub.uploads.messages) == 1
    assert output_of(hub) == wanted
    assert is_empty(work)


@pytest.mark.parametrize("over_xet", [False, True])
def test_interrupted(hub, source, wanted, work, over_xet):
    """Ctrl-C while files go up: nobody waits for them, and the same command goes on."""
    stalled, ended, waited = threading.Event(), threading.Event(), []
    if over_xet:
        Xet(hub.uploads)

    def stall(x):
        if x.command == "PUT" or "/xorbs/" in x.path:
            stalled.set()
            waited.append(not ended.wait(60))
        return False

    hub.faults = [stall]
    child = started(source, work, over_xet)
    assert stalled.wait(60)
    child.send_signal(signal.SIGINT)
    said, _ = child.communicate()
    ended.set()
    assert not any(waited)
    assert child.returncode == 130
    assert "the same command goes on" in said
    hub.faults = []
    convert(source, work)
    assert output_of(hub) == wanted


# --- disk ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_the_disk_holds_no_more_than_asked_for(hub, source, wanted, work, shards):
    """Looked at when a file is opened, the only moment when more is taken."""
    size = max(len(data) for name, data in wanted.items() if name.endswith(".safetensors"))
    peak = 0
    opened = os.posix_fallocate

    def allocate(fd, offset, length):
        nonlocal peak
        opened(fd, offset, length)
        there = [p.stat().st_size for p in work.rglob("*.safetensors*") if "index" not in p.name]
        peak = max(peak, sum(there))

    hub.faults = [stalling(0.05, where=PUT)]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(os, "posix_fallocate", allocate)
        convert(source, work, max_disk=shards * size)
    assert output_of(hub) == wanted
    assert (shards - 1) * size < peak <= shards * size


# --- the card -----------------------------------------------------------------------------------


def test_the_card(hub, source, work, tmp_path):
    own = tmp_path / "own model"
    shutil.copytree(source, own)
    (own / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage:\n- en\n- de\npipeline_tag: text-generation\n"
        "tags: [theirs]\nextra_gated_prompt: no\n---\n# Their words\n"
    )
    args = ["convert", own, DST, "-s", "fp8_dynamic", "--work-dir", work, "--stats", "-j", "2",
            "--base-model", "them/model", "--ignore", "*layers.0*"]  # fmt: skip
    ran = CliRunner().invoke(cli, list(map(str, args)))
    assert ran.exit_code == 0, ran.output
    text = hub.uploads.files(REPO)["README.md"].decode()
    card = huggingface_hub.ModelCard(text)
    assert card.data.to_dict() == {
        "base_model": "them/model", "base_model_relation": "quantized",
        "language": ["en", "de"], "license": "apache-2.0", "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["streamq", "quantized", "compressed-tensors", "fp8_dynamic", "8-bit"],
    }  # fmt: skip
    for part in (
        "# tiny-fp8", "[them/model](https://huggingface.co/them/model)", "| FP8_DYNAMIC |",
        "| mlp.down_proj | 5 |", " dB |", f"vllm serve {REPO}", "streamq verify",
        "streamq convert 'own model' hf://acme/tiny-fp8 --scheme fp8_dynamic "
        "--ignore '*layers.0*'",
    ):  # fmt: skip
        assert part in card.text, part
    for secret in (str(tmp_path), "Their words", "theirs", os.environ["HF_ENDPOINT"], "-j"):
        assert secret not in text


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("language:\n- no\n- da\nlicense: mit", {"language": ["no", "da"], "license": "mit"}),
        ("language: no", {"language": "no"}),
        ("language: 3\nlicense: [{a: b}]\npipeline_tag: fill-mask", {"pipeline_tag": "fill-mask"}),
        ("license: []\nlicense_name: 2020-01-01", {}),
        ("- no card", {}),
    ],
)
def test_what_a_card_carries_over(said, kept):
    text = card_text("a/b", [], "transformers", metadata_of(f"---\n{said}\n---\n"), "")
    there = ModelCard(text).data.to_dict()
    assert {key: there.get(key) for key in kept} == kept
    assert metadata_of(text) == kept


def test_the_hub_says_why_it_refuses_a_card(hub, source, work, tmp_path):
    src = tmp_path / "in"
    shutil.copytree(source, src)
    (src / "README.md").write_text("---\nlicense: none\n---\n")
    with pytest.raises(HubError, match=r'refuses the model card: "license" must be one of\. Lic'):
        convert(src, work)
    assert not hub.repos
    assert not [*work.glob("*")]


def test_cards_are_reproducible(hub, source, work):
    convert(source, work)
    convert(source, work, "hf://acme/other")
    a, b = hub.uploads.files(REPO)["README.md"], hub.uploads.files("acme/other")["README.md"]
    assert a.replace(b"tiny-fp8", b"other") == b


def test_the_model_is_named_by_its_config(hub, source, work, tmp_path):
    named = tmp_path / "named"
    shutil.copytree(source, named)
    config = (named / "config.json").read_text()
    (named / "config.json").write_text(config.replace("{", '{"_name_or_path": "them/m", ', 1))
    convert(named, work)
    assert b"base_model: them/m\n" in hub.uploads.files(REPO)["README.md"]


def test_what_is_not_the_hubs_is_a_path(tmp_path, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    streamq.convert(source, "hf:", "fp8_dynamic", settings=Settings(sync=False))
    assert Path("hf:/streamq.json").exists()
