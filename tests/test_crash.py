"""Whatever happens to a conversion, DST is absent or complete, and the next run finishes it."""

import random
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from faults import KINDS, Crash, Layer, after_power_cut
from helpers import run_convert as convert_unrecorded
from small_units import contents, small_units, write_small

from streamq.errors import WriteError
from streamq.verifying import verify
from streamq.writer.disk import SyncPool

SCHEME = "nvfp4a16"
run_convert = partial(convert_unrecorded, record=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("crash") / "in")


@pytest.fixture(scope="module")
def wanted(source, tmp_path_factory):
    """The output of a run that nothing happens to."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    run_convert(source, out, SCHEME)
    assert verify(out).failures == []
    return contents(out)


@pytest.fixture(autouse=True)
def many_units(monkeypatch):
    small_units(monkeypatch.setattr)


def convert(source, out, sync=True):
    run_convert(source, out, SCHEME, sync=sync, workers=1)


def count_of_calls(source, out):
    with Layer(out.parent) as layer:
        convert(source, out)
    return layer.count


# --- a syscall fails --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_syscall_may_fail(kind, source, wanted, tmp_path, pytestconfig):
    """Of the kinds each takes its share of the calls; in the soak each takes all."""
    soak = pytestconfig.getoption("--hypothesis-profile") == "soak"
    (tmp_path / "count").mkdir()
    calls = count_of_calls(source, tmp_path / "count" / "out")
    assert calls > 60
    numbers = range(1, calls + 1) if soak else range(1 + KINDS.index(kind), calls + 1, len(KINDS))
    disturbed, expected = 0, Crash if kind == "crash" else WriteError
    for n in numbers:
        folder = tmp_path / str(n)
        folder.mkdir()
        out = folder / "out"
        try:
            with Layer(folder, n, kind):
                convert(source, out)
        except expected:
            disturbed += 1
        if out.exists():
            assert contents(out) == wanted, n
        else:
            convert(source, out)
            assert contents(out) == wanted, n
            assert [p.name for p in folder.iterdir()] == ["out"], n
        shutil.rmtree(folder)
    assert disturbed == 0 if kind == "short" else disturbed > 0.8 * len(numbers)


@pytest.mark.parametrize("moment", ["before", "between the renames", "after"])
def test_an_old_output_makes_way_at_the_end(moment, source, wanted, tmp_path):
    """It is there, or the new one is, or for a moment it waits in DST.partial."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    until = {
        "before": lambda: (tmp_path / "out.partial" / "output" / "streamq.json").exists(),
        "between the renames": lambda: not out.exists(),
        "after": lambda: (out / "config.json").exists(),
    }[moment]

    def overwrite():
        run_convert(source, out, SCHEME, sync=True, workers=1, overwrite=True)

    with pytest.raises(Crash), Layer(tmp_path, until=until):
        overwrite()
    if moment == "between the renames":
        assert not out.exists()
        assert [p.name for p in tmp_path.glob("out.partial/old-*/*")] == ["old"]
    else:
        assert contents(out) == ({"old": b"old"} if moment == "before" else wanted)
    overwrite()
    assert contents(out) == wanted
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_signals_interrupt_syscalls(source, wanted, tmp_path):
    """EINTR as the kernel gives it, every 0.2 ms."""
    hits = []
    before = signal.signal(signal.SIGALRM, lambda *_: hits.append(0))
    signal.setitimer(signal.ITIMER_REAL, 2e-4, 2e-4)
    try:
        convert(source, tmp_path / "out")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert contents(tmp_path / "out") == wanted
    assert hits


# --- the power goes ---------------------------------------------------------------------


def cut(source, wanted, tmp_path, seeds):
    """Power cuts at random moments of one run; bytes that the runs afterwards took for done."""
    (tmp_path / "run").mkdir()
    with Layer(tmp_path / "run") as layer:
        convert(source, tmp_path / "run" / "out")
    assert contents(tmp_path / "run" / "out") == wanted
    kept = 0
    for seed in seeds:
        folder = tmp_path / f"cut{seed}"
        folder.mkdir()
        after_power_cut(layer.log, tmp_path / "run", folder, random.Random(seed))
        out = folder / "out"
        if out.exists():
            assert contents(out) == wanted, seed
        else:
            journal = folder / "out.partial" / "journal"
            kept += journal.stat().st_size if journal.exists() else 0
            convert(source, out)
            assert contents(out) == wanted, seed
        shutil.rmtree(folder)
    return kept


def test_power_cuts(source, wanted, tmp_path, pytestconfig):
    soak = pytestconfig.getoption("--hypothesis-profile") == "soak"
    assert cut(source, wanted, tmp_path, range(3000 if soak else 60)) > 0


def test_power_cuts_are_noticed_where_nothing_is_flushed(source, wanted, tmp_path, monkeypatch):
    """That the test above would fail if the journal did not wait for the data."""
    monkeypatch.setattr(SyncPool, "data", lambda self, fd: None)
    with pytest.raises(AssertionError):
        cut(source, wanted, tmp_path, range(300))


# --- kills ------------------------------------------------------------------------------


def test_kills(tmp_path):
    """SIGKILL at random moments, formats in turn; ``make soak`` has 500."""
    script = Path(__file__).parent / "kills.py"
    run = subprocess.run(
        [sys.executable, script, "20", tmp_path], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "20 kills" in run.stdout
