"""Batches as tests run them: engines of this process, the command line, processes to kill."""

import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
from click.testing import CliRunner
from helpers import write_checkpoint
from small_units import contents

import streamq
from streamq.batch import How, JobError, State, carry_out, read_jobs, run
from streamq.batch import types as batch_types
from streamq.batch.watching import watching
from streamq.cli import cli
from streamq.converting import Settings

NAMES = ("org/a", "org/b", "two/c")
OUT = "out/{org}/{name}-{scheme}"


def write_source(folder, seed, rows=128):
    rng = np.random.default_rng(seed)
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)]
    made = {n: (rng.standard_normal((rows, 256)) * 0.02).astype(ml_dtypes.bfloat16) for n in names}
    return write_checkpoint(folder, made, shards=[[n] for n in names])


class Here:
    """An engine in this process. ``before`` is called with each work; it may raise."""

    def __init__(self, before=lambda work: None):
        self.before = before
        self.works = []
        self.most = self.now = 0
        self.lock = threading.Lock()

    @contextmanager
    def counted(self, work):
        with self.lock:
            self.works.append(work)
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            yield
        finally:
            with self.lock:
                self.now -= 1

    def carry_out(self, work, progress, notify):
        with self.counted(work):
            self.before(work)
            return carry_out(work, progress, notify)

    def stop(self):
        pass

    @property
    def sources(self):
        return [work.src for work in self.works]


def batch(engine=None, names=NAMES, schemes=("nvfp4a16",), out=OUT, settings=None, **how):
    """Outcomes of a batch of lines, by name of the source; several schemes in the order given."""
    jobs = read_jobs("lines", list(names), {"out": out, "schemes": schemes}).jobs
    state = State(Path("state"))
    settings = {"sync": False, "workers": 2} | (settings or {})
    try:
        with watching(len(jobs), True, False) as watch:
            return run(jobs, How(settings=Settings(**settings), **how), engine or Here(), state,
                       watch)  # fmt: skip
    finally:
        state.close()


def states(outcomes):
    return [o.state for o in outcomes]


def cli_run(*args, lines=NAMES):
    given = "".join(f"{line}\n" for line in lines)
    return CliRunner().invoke(cli, ["batch", *map(str, args)], input=given)


def start(*args, lines=NAMES, **kw):
    streamq = Path(sys.executable).with_name("streamq")
    child = subprocess.Popen(
        [streamq, "batch", *map(str, args)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw,
    )  # fmt: skip
    child.stdin.write("".join(f"{line}\n" for line in lines))
    child.stdin.close()
    child.stdin = None
    return child


def three_sources(tmp_path, monkeypatch):
    """A working directory with three sources; pauses between tries are short."""
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


def spoil(name, how):
    shard = next(Path(name).glob("model-00002*"))
    raw = bytearray(shard.read_bytes())
    if how == "weights":
        raw[-2:] = b"\xc0\x7f"  # NaN
    else:
        raw[:8] = b"\xff" * 8
    shard.write_bytes(raw)


class Flaky:
    """Raises what passes, so many times for org/b."""

    def __init__(self, times, transient=True):
        self.left, self.transient = times, transient

    def __call__(self, work):
        if work.src == "org/b" and self.left:
            self.left -= 1
            raise JobError("the Hub answered 503.", self.transient)
