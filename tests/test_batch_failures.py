"""Failures in a batch: seen, tried again where that may help, held within budgets."""

import errno
import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from batches import (
    NAMES,
    OUT,
    Flaky,
    Here,
    batch,
    cli_run,
    is_right,
    spoil,
    states,
    three_sources,
    write_source,
)
from hypothesis import given
from hypothesis import strategies as st

from streamq.batch import Processes
from streamq.batch import types as batch_types
from streamq.batch.budget import Budget, Need, Space
from streamq.errors import PlanError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """See ``three_sources``."""
    return three_sources(tmp_path, monkeypatch)


# --- failures -----------------------------------------------------------------------------


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
