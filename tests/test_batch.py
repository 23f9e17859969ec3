"""Batches: killed and gone on with, tried again, held within budgets; every failure is seen."""

import json
import os
import random
import shutil
import signal
import time
from io import StringIO
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
    start,
    states,
    three_sources,
    wanted,
    write_source,
)
from click.testing import CliRunner
from rich.console import Console
from rich.progress import Progress, TextColumn
from small_units import contents

from streamq.batch import How, State, read_jobs, run
from streamq.batch.state import Known
from streamq.batch.watching import Bars, watching
from streamq.cli import cli
from streamq.converting import Settings
from streamq.errors import PlanError, WriteError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """See ``three_sources``."""
    return three_sources(tmp_path, monkeypatch)


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
