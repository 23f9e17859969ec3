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

from streamq.batch import How, State, carry_out, read_jobs, run
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
