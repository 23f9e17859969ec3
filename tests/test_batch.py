"""Batches: killed and gone on with, tried again, held within budgets; every failure is seen."""

import errno
import json
import os
import random
import re
import shutil
import signal
import time
from io import StringIO
from pathlib import Path

import pytest
from batches import NAMES, OUT, Here, batch, cli_run, start, states, write_source
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.progress import Progress, TextColumn
from small_units import contents

import streamq
from streamq.batch import How, JobError, Processes, State, read_jobs, run
from streamq.batch import types as batch_types
from streamq.batch.budget import Budget, Need, Space
from streamq.batch.state import Known
from streamq.batch.watching import Bars, watching
from streamq.cli import cli
from streamq.converting import Settings
from streamq.errors import PlanError, WriteError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A directory with three sources; pauses between tries are short."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(batch_types, "FIRST", 0.01)
    for seed, name in enumerate(NAMES):
        write_source(tmp_path / name, seed)
    return tmp_path


def wanted(name, scheme="nvfp4a16"):
    """What a conversion by itself writes."""
    out = Path("single") / name / scheme
    if not out.exists():
        streamq.convert(name, out, scheme, settings=Settings(sync=False))
    return contents(out)


def is_right(name, scheme="nvfp4a16"):
    return contents(Path(f"out/{name}-{scheme}")) == wanted(name, scheme)


# --- what is done -------------------------------------------------------------------------


def test_lines_on_standard_input(here):
    """The requirement as it is written, in processes; and the second run has nothing to do."""
    args = ["-", "--scheme", "nvfp4", "--out", "out/{org}/{name}-nvfp4"]
    result = cli_run(*args, lines=NAMES[:2])
    assert result.exit_code == 0, result.output
    assert is_right("org/a", "nvfp4")
    assert is_right("org/b", "nvfp4")
    assert result.stdout.count("NVFP4") == 2
    before = {p: p.stat().st_ino for p in Path("out").rglob("*")}
    again = cli_run(*args, lines=NAMES[:2])
    assert again.exit_code == 0
    assert again.stdout.count("done before") == 2
    assert before == {p: p.stat().st_ino for p in Path("out").rglob("*")}


def test_several_schemes_of_a_source_are_one_pass():
    engine = Here()
    found = batch(engine, schemes=("nvfp4a16", "fp8_block"), names=NAMES[:2])
    assert states(found) == ["done"] * 4
    assert engine.sources == ["org/a", "org/b"]
    assert all(is_right(n, s) for n in NAMES[:2] for s in ("nvfp4a16", "fp8_block"))
    shutil.rmtree("out/org/a-fp8_block")
    engine = Here()
    found = batch(engine, schemes=("nvfp4a16", "fp8_block"), names=NAMES[:2])
    assert states(found) == ["kept", "done", "kept", "kept"]
    assert [len(work.outputs) for work in engine.works] == [1]


def damage(folder):
    with (folder / "streamq.json").open("ab") as file:
        file.write(b" ")


def new_weights():
    shutil.rmtree("org/b")
    write_source(Path("org/b"), 9)


@pytest.mark.parametrize(
    ("change", "state", "said"),
    [
        (lambda: None, "kept", None),
        (lambda: shutil.rmtree("out/org/b-nvfp4a16"), "done", None),
        (new_weights, "failed", "is there, from another state of the source"),
        (lambda: damage(Path("out/org/b-nvfp4a16")), "failed", "is there, from another content"),
        (lambda: Path("state").unlink(), "failed", "no earlier run of this batch made it"),
    ],
    ids=["nothing", "output gone", "source changed", "output changed", "no state"],
)
def test_what_is_done_is_left_alone_as_long_as_it_is_that(change, state, said):
    batch()
    change()
    engine = Here()
    found = batch(engine, continue_on_error=True)[1]
    assert found.state == state
    assert engine.sources == (["org/b"] if state == "done" else [])
    if said:
        assert said in found.error
        found = batch(engine, settings={"overwrite": True}, continue_on_error=True)[1]
        assert found.state == "done"
        assert is_right("org/b")


def test_other_options_are_another_job():
    batch()
    how = {"out": OUT, "schemes": ("nvfp4a16",), "ignore": ("*layers.0*",)}
    jobs = read_jobs("lines", NAMES, how).jobs
    state = State(Path("state"))
    with watching(3, True, False) as watch:
        found = run(jobs, How(settings=Settings(overwrite=True)), Here(), state, watch)
    state.close()
    assert states(found) == ["done"] * 3
    assert not is_right("org/a")


def test_a_source_that_is_gone_after_it_was_done():
    path = str(Path("org/a").resolve())
    batch(names=[path], out="x-{scheme}")
    jobs = read_jobs("lines", [path], {"out": "x-{scheme}", "schemes": ("nvfp4a16",)}).jobs
    shutil.rmtree(path)
    state = State(Path("state"))
    with watching(1, True, False) as watch:
        (found,) = run(jobs, How(), Here(), state, watch)
    state.close()
    assert found.state == "kept"


# --- killed -------------------------------------------------------------------------------


def test_kills(here, pytestconfig):
    """SIGKILL of the batch, not of its children, at random moments until it gets through."""
    wanted_kills = 100 if pytestconfig.getoption("--hypothesis-profile") == "soak" else 4
    rng = random.Random(3)
    for seed, name in enumerate(NAMES):
        write_source(here / name, seed, rows=16_384)
    right = {name: wanted(name) for name in NAMES}
    kills = 0
    while kills < wanted_kills:
        done = {}
        while len(done) < len(NAMES):
            child = start("-", "-s", "nvfp4a16", "--out", OUT, "--jobs", 2, "-q")
            if kills < wanted_kills and rng.random() < 0.8:
                time.sleep(rng.uniform(0.4, 1.5))
                child.kill()
            said = child.communicate()[1]
            kills += child.returncode == -signal.SIGKILL
            assert child.returncode in (0, -signal.SIGKILL), said
            for name, inode in done.items():
                assert Path(f"out/{name}-nvfp4a16").stat().st_ino == inode, name
            for name in NAMES:
                if (folder := Path(f"out/{name}-nvfp4a16")).exists():
                    assert contents(folder) == right[name]
                    done[name] = folder.stat().st_ino
        child = start("-", "-s", "nvfp4a16", "--out", OUT, "--json")
        assert child.communicate()[0].count('"state": "kept"') == 3
        shutil.rmtree("out")
        Path("streamq-batch.state").unlink()


@pytest.mark.parametrize("line", ["begun", "nothing"])
def test_an_output_that_appeared_but_was_not_noted(line):
    """A kill between the rename of an output and the note of it."""
    batch(names=NAMES[:1])
    raw = Path("state").read_bytes().splitlines(keepends=True)
    assert len(raw) == 3
    Path("state").write_bytes(b"".join(raw[: 2 if line == "begun" else 1]) + raw[2][:20])
    engine = Here()
    (found,) = batch(engine, names=NAMES[:1])
    assert found.state == ("kept" if line == "begun" else "failed")
    assert engine.works == []


def test_an_old_output_is_not_taken_for_the_new_one():
    """Killed before the new one replaced it; both are of the same options."""
    batch(names=NAMES[:1])
    batch(names=NAMES[:1], settings={"overwrite": True})
    known = json.loads(Path("state").read_bytes().splitlines()[-1].partition(b" ")[2])
    state = State(Path("state"))
    (job,) = read_jobs("lines", NAMES[:1], {"out": OUT, "schemes": ("nvfp4a16",)}).jobs
    state.note(job, Known("begun", known["asked"], known["source"], known["record"], {}))
    state.close()
    engine = Here()
    batch(engine, names=NAMES[:1], settings={"overwrite": True})
    assert len(engine.works) == 1


def test_an_interrupt_leaves_nothing_behind(here):
    site = here / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os, time\n"
        "real = os.pwrite\n"
        "os.pwrite = lambda *args: time.sleep(1) or real(*args)\n"
    )
    args = ["-", "-s", "nvfp4a16", "--out", OUT, "-q"]
    child = start(*args, env={**os.environ, "PYTHONPATH": str(site)})
    while not list(Path().glob("out/org/*.partial/output/*")):
        time.sleep(0.01)
        assert child.poll() is None
    child.send_signal(signal.SIGINT)
    said = child.communicate()[1]
    assert child.returncode == 130
    assert "the same command goes on" in said
    found = cli_run(*args)
    assert found.exit_code == 0, found.output
    assert all(map(is_right, NAMES))
    assert not list(Path("out").glob("**/*.partial"))


# --- failures -----------------------------------------------------------------------------


def spoil(name, how):
    shard = next(Path(name).glob("model-00002*"))
    raw = bytearray(shard.read_bytes())
    if how == "weights":
        raw[-2:] = b"\xc0\x7f"  # NaN
    else:
        raw[:8] = b"\xff" * 8
    shard.write_bytes(raw)


@pytest.mark.parametrize(
    ("how", "go_on", "wanted"),
    [
        ("weights", False, ["done", "failed", "not started"]),
        ("weights", True, ["done", "failed", "done"]),
        ("header", False, ["not started", "failed", "not started"]),
        ("header", True, ["done", "failed", "done"]),
    ],
)
def test_one_job_of_three_fails(how, go_on, wanted):
    spoil("org/b", how)
    found = batch(continue_on_error=go_on)
    assert states(found) == wanted
    assert ("NaN" if how == "weights" else "header") in found[1].error
    assert Path("out/two/c-nvfp4a16").exists() == go_on
    shutil.rmtree("org/b")
    write_source(Path("org/b"), 1)
    found = batch(settings={"restart": True})
    assert {o.state for o in found} <= {"done", "kept"}
    assert all(map(is_right, NAMES))


def test_json_lines_and_the_exit_code():
    spoil("org/b", "weights")
    result = cli_run("-", "-s", "nvfp4a16", "--out", OUT, "--json", "--continue-on-error")
    assert result.exit_code == 1
    found = {said["src"]: said for said in map(json.loads, result.stdout.splitlines())}
    assert [found[name]["state"] for name in NAMES] == ["done", "failed", "done"]
    assert "NaN" in found["org/b"]["error"]
    assert found["org/a"]["bytes_out"] < found["org/a"]["bytes_in"]
    assert result.stderr == "Error: 1 of 3 jobs failed or did not start.\n"


class Flaky:
    """Raises what passes, so many times for org/b."""

    def __init__(self, times, transient=True):
        self.left, self.transient = times, transient

    def __call__(self, work):
        if work.src == "org/b" and self.left:
            self.left -= 1
            raise JobError("the Hub answered 503.", self.transient)


@pytest.mark.parametrize(
    ("fault", "retries", "wanted", "tries"),
    [
        (Flaky(2), 3, "done", 3),
        (Flaky(3), 3, "done", 4),
        (Flaky(4), 3, "failed", 4),
        (Flaky(1), 0, "failed", 1),
        (Flaky(1, False), 3, "failed", 1),
    ],
)
@pytest.mark.parametrize("jobs", [1, 3])
def test_only_what_may_pass_is_tried_again(fault, retries, wanted, tries, jobs):
    engine = Here(Flaky(fault.left, fault.transient))
    found = batch(engine, retries=retries, continue_on_error=True, jobs=jobs)
    assert states(found) == ["done", wanted, "done"]
    assert found[1].tries == tries
    assert engine.sources.count("org/b") == tries
    assert found[1].error is None or "503" in found[1].error


def test_what_a_first_try_has_done_is_not_discarded_by_the_second():
    engine = Here(Flaky(1))
    batch(engine, settings={"restart": True})
    assert [w.settings["restart"] for w in engine.works if w.src == "org/b"] == [True, False]


def test_others_run_while_one_waits_for_its_next_try(monkeypatch):
    monkeypatch.setattr(batch_types, "FIRST", 2.0)
    engine = Here(Flaky(1))
    batch(engine)
    assert engine.sources == ["org/a", "org/b", "two/c", "org/b"]


#: Code that runs in the process of a conversion before its first write, once.
FAULTS = {
    "stale": (f"raise OSError({errno.ESTALE}, 'Stale file handle')", None),
    "full": (f"raise OSError({errno.ENOSPC}, 'No space left on device')", "no space left"),
    "killed": ("os.kill(os.getpid(), 9)", "killed .SIGKILL., as the system does when memory"),
    "crash": ("os.abort()", "ended by SIGABRT"),
    "exit": ("os.write(2, b'bad thing\\n'); os._exit(7)", "ended with code 7: bad thing"),
    "memory": ("raise MemoryError", "memory ran out"),
    "bug": ("raise ValueError('x')", "ValueError: x. This is a bug in streamq"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_in_the_process_of_a_conversion(name, here, monkeypatch):
    code, sentence = FAULTS[name]
    site = here / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os\n"
        "real = os.pwrite\n"
        "def pwrite(fd, data, offset):\n"
        f"    if not os.path.exists({str(here / 'once')!r}):\n"
        f"        os.close(os.open({str(here / 'once')!r}, os.O_CREAT))\n"
        f"        {code}\n"
        "    return real(fd, data, offset)\n"
        "os.pwrite = pwrite\n"
    )
    monkeypatch.syspath_prepend(site)
    (found,) = batch(Processes(), names=NAMES[:1])
    assert Path("once").exists()
    assert (found.state, found.tries) == (("done", 2) if sentence is None else ("failed", 1))
    if sentence:
        assert re.search(sentence, found.error)
        (found,) = batch(Processes(), names=NAMES[:1])
    assert found.state == "done"
    assert is_right("org/a")


# --- budgets ------------------------------------------------------------------------------


def slowly(work):
    time.sleep(0.05)


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_never_more_at_once_than_asked_for(jobs):
    engine = Here(slowly)
    batch(engine, jobs=jobs, settings={"workers": 6, "max_memory": 60 << 20})
    assert engine.most == jobs
    first = engine.works[0].settings
    assert first["workers"] == 6 // jobs
    assert first["max_memory"] == (60 << 20) // jobs


def read_plan():
    result = cli_run("-", "-s", "nvfp4a16", "--out", OUT, "--dry-run", "--json", lines=NAMES[:1])
    return json.loads(result.stdout)


@pytest.mark.parametrize(("room", "most"), [(1.5, 1), (2.5, 2), (9, 3)])
def test_a_job_waits_for_disk(room, most):
    engine = Here(slowly)
    found = batch(engine, jobs=3, max_disk=int(room * read_plan()["disk_needed"]))
    assert states(found) == ["done"] * 3
    assert engine.most == most


def test_a_job_waits_for_memory():
    need = read_plan()["buffers"]
    engine = Here(slowly)
    batch(engine, jobs=3, settings={"max_memory": int(2.5 * need)})
    assert engine.most == 2


def test_what_can_never_fit_fails_before_anything_begins():
    write_source(Path("two/c"), 5, rows=1280)
    engine = Here()
    most = 3 * read_plan()["disk_needed"]
    found = batch(engine, max_disk=most)
    assert states(found) == ["not started", "not started", "failed"]
    assert "--max-disk is" in found[2].error
    assert engine.works == []
    found = batch(engine, max_disk=most, continue_on_error=True)
    assert states(found) == ["done", "done", "failed"]


def test_schemes_that_are_too_much_together_go_one_after_the_other():
    engine = Here()
    most = int(1.9 * read_plan()["disk_needed"])
    found = batch(engine, schemes=("nvfp4a16", "w4a16"), names=NAMES[:1], max_disk=most)
    assert states(found) == ["done"] * 2
    assert len(engine.works) == 2


def test_disks_that_do_not_hold_all_outputs(monkeypatch):
    usage = shutil.disk_usage("/")
    most = int(2.5 * read_plan()["disk_needed"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=most))
    engine = Here()
    with pytest.raises(PlanError, match=r"all outputs together: .* --continue-on-error"):
        batch(engine)
    assert engine.works == []
    result = cli_run("-", "-s", "nvfp4a16", "--out", OUT, "--dry-run")
    assert result.exit_code == 1
    assert "Error: all outputs together: " in result.stderr


def test_what_running_jobs_have_yet_to_write_is_not_free(monkeypatch):
    usage, most = shutil.disk_usage("/"), int(1.5 * read_plan()["disk_needed"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=most))
    engine = Here(slowly)
    assert states(batch(engine, jobs=3, continue_on_error=True)) == ["done"] * 3
    assert engine.most == 1


def test_what_running_jobs_have_written_is_not_counted_twice(monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    a, b = (Need(0, (Space(name, 8192, True),)) for name in "ab")
    budget = Budget(1, None)
    assert budget.take(a, 0)
    assert budget.take(b, 0) is None
    Path("a.partial").mkdir()
    with Path("a.partial/x").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 8192)
    assert budget.take(b, 0)


needs = st.tuples(st.integers(0, 40), st.integers(0, 40)).map(
    lambda n: Need(n[0], (Space("out", n[1], True),))
)


@given(st.lists(st.tuples(needs, st.integers(1, 60), st.booleans()), max_size=30))
def test_what_runs_is_within_the_budget(steps):
    budget, running = Budget(50, 50), []
    for need, share, end in steps:
        if end and running:
            budget.give_back(running.pop(0)[0])
        if (taken := budget.take(need, share)) is not None:
            running.append((*taken, need))
            assert need.memory <= taken[1]
        elif not running:
            assert need.memory > 50 or need.written > 50 or budget.lacks(need)
        assert sum(given for _, given, _ in running) <= 50
        assert sum(n.written for _, _, n in running) <= 50


# --- the state and what is printed ----------------------------------------------------------


@pytest.mark.parametrize("content", [b'{"a": 1}\n', b"x", b"00000000 {}\n"])
def test_a_file_that_is_no_state_stays_as_it_is(content):
    Path("state").write_bytes(content)
    with pytest.raises(PlanError, match="is no state of a batch"):
        State(Path("state"))
    assert Path("state").read_bytes() == content


def test_a_state_is_of_one_batch_at_a_time():
    state = State(Path("state"))
    with pytest.raises(WriteError, match="another batch is at work with it"):
        State(Path("state"))
    state.close()
    whole = Path("state").read_bytes()
    for n in range(len(whole)):
        Path("state").write_bytes(whole[:n])
        State(Path("state")).close()
        assert Path("state").read_bytes() == whole


def test_a_dry_run_writes_nothing():
    before = set(Path().rglob("*"))
    result = cli_run("-", "-s", "nvfp4a16,w4a16", "--out", OUT, "--dry-run")
    assert result.exit_code == 0, result.output
    assert all(f"out/{n}-{s}" in result.stdout for n in NAMES for s in ("nvfp4a16", "w4a16"))
    spoil("org/b", "header")
    result = cli_run("-", "-s", "nvfp4a16", "--out", OUT, "--dry-run", "--json")
    assert result.exit_code == 1
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [said["state"] for said in found] == ["planned", "failed", "planned"]
    assert set(Path().rglob("*")) == before


def test_a_file_of_jobs(here):
    Path("jobs.toml").write_text(
        f'out = "{OUT}"\nschemes = ["nvfp4a16", "fp8_block"]\njobs = 2\nworkers = 2\n'
        'sources = ["org/a"]\n[[source]]\nsrc = "two/c"\nschemes = ["w4a16"]\n'
    )
    result = CliRunner().invoke(cli, ["batch", "jobs.toml", "--stats", "--no-sync"])
    assert result.exit_code == 0, result.output
    assert result.stdout.count(" dB") == 3
    assert "[3/3] out/" in result.stderr
    assert is_right("two/c", "w4a16")
    assert is_right("org/a", "fp8_block")
    assert Path("jobs.toml.state").exists()
    assert not list(Path().glob("**/*.partial"))


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["-", "-s", "nvfp4"], 1, "no destination"),
        (["-", "--out", OUT], 1, "no scheme"),
        (["-", "--out", OUT, "-s", "nvfp4,,w4a16"], 2, "an empty name"),
        (["-", "--out", OUT, "-s", "nvfp4", "--jobs", "0"], 2, "--jobs"),
        (["none.toml", "--out", OUT, "-s", "nvfp4"], 1, "none.toml cannot be read"),
        (["-", "--out", OUT, "-s", "nvfp4", "--state", "org"], 1, "org: cannot be written"),
        (["-", "--out", OUT, "-s", "nvfp4", "--private"], 2, "--private is for destinations on"),
    ],
)
def test_wrong_usage(args, code, said):
    result = cli_run(*args)
    assert result.exit_code == code
    assert said in result.stderr
    assert "Traceback" not in result.output


def test_rows_in_a_terminal():
    out = StringIO()
    console = Console(file=out, force_terminal=True, width=200, highlight=False)
    jobs = read_jobs("lines", NAMES, {"out": OUT, "schemes": ("nvfp4a16",)}).jobs
    state = State(Path("state"))
    columns = TextColumn("{task.description}"), TextColumn("{task.fields[shown]}")
    with Progress(*columns, console=console, auto_refresh=False) as bars:
        watch = Bars(3, bars, lambda line: console.print(line, markup=False))
        found = run(jobs, How(jobs=2), Here(Flaky(1)), state, watch)
        assert [task.description for task in bars.tasks] == ["all jobs"]
        assert bars.tasks[0].completed == 3
    state.close()
    assert states(found) == ["done"] * 3
    assert "[3/3]" in out.getvalue()
    assert "503. Again in" in out.getvalue()
