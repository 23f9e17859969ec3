"""How a batch goes, on stderr: a row for each conversion in a terminal, else lines."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from streamq.progress import QUIET_INTERVAL
from streamq.show import outcome_line
from streamq.tensors import size_text

from .types import Outcome, Task

#: Says a line to people.
Say = Callable[[str], None]


class Lines:
    """Sentences, and now and then a line on how far all of it is.

    ``count``: jobs. ``say``: for what happens, ``alarm``: for failures.
    """

    def __init__(self, count: int, say: Say, alarm: Say) -> None:
        self._count, self._say, self._alarm = count, say, alarm
        self._ended = 0
        self._lock = threading.Lock()
        self._done: dict[Task, int] = {}
        self._last = time.monotonic()

    def begins(self, task: Task) -> None:
        """See ``Watch``."""
        with self._lock:
            self._done[task] = 0
        if task.tries == 1:
            for p in task.planned:
                self._say(f"{p.job.dst}: {p.scheme} of {task.src}, {size_text(p.bytes_in)}")
                for warning in p.warnings:
                    self._say(f"{p.job.dst}: warning: {warning}")

    def advances(self, task: Task, n: int, name: str) -> None:
        """See ``Watch``."""
        with self._lock:
            self._done[task] += n
            now = time.monotonic()
            if now - self._last < QUIET_INTERVAL:
                return
            self._last = now
            done = self._done[task]
        self._say(f"{task.src}: {size_text(done)} of {size_text(task.bytes_in)}, {name}")

    def says(self, src: str, line: str) -> None:
        """See ``Watch``."""
        self._say(f"{src}: {line}")

    def pauses(self, task: Task, error: str, seconds: float) -> None:
        """See ``Watch``."""
        self._alarm(f"{task.src}: {error} Again in {seconds:.0f} s.")

    def ends(self, outcome: Outcome) -> None:
        """See ``Watch``."""
        with self._lock:
            self._ended += 1
            ended = self._ended
        say = self._say if outcome.is_good else self._alarm
        say(f"[{ended}/{self._count}] {outcome_line(outcome.to_json())}")


class Bars(Lines):
    """Rows in a terminal, with the sentences above them."""

    def __init__(self, count: int, bars: Any, say: Say) -> None:
        super().__init__(count, say, say)
        self._bars = bars
        self._rows: dict[Task, Any] = {}
        self._all = bars.add_task("all jobs", total=count, tensor="", shown=f"0 of {count}")

    def begins(self, task: Task) -> None:
        """See ``Watch``."""
        super().begins(task)
        self._rows[task] = self._bars.add_task(task.src, total=task.bytes_in, tensor="", shown="")

    def advances(self, task: Task, n: int, name: str) -> None:
        """See ``Watch``."""
        row = self._rows[task]
        self._bars.update(row, advance=n, tensor=name)
        now = next(t for t in self._bars.tasks if t.id == row)
        speed = f", {size_text(now.speed)}/s" if now.speed else ""
        shown = f"{size_text(now.completed)} of {size_text(task.bytes_in)}{speed}"
        self._bars.update(row, shown=shown)

    def pauses(self, task: Task, error: str, seconds: float) -> None:
        """See ``Watch``."""
        super().pauses(task, error, seconds)
        self._bars.remove_task(self._rows.pop(task))

    def ends(self, outcome: Outcome) -> None:
        """See ``Watch``."""
        super().ends(outcome)
        self._bars.update(self._all, advance=1, shown=f"{self._ended} of {self._count}")
        for task in [t for t in self._rows if t.has(outcome.job)]:
            self._bars.remove_task(self._rows.pop(task))


class Json(Lines):
    """An object on standard output for each job as it ends, and nothing else."""

    def __init__(self) -> None:
        super().__init__(0, lambda line: None, lambda line: None)

    def ends(self, outcome: Outcome) -> None:
        """See ``Watch``."""
        with self._lock:
            print(json.dumps(outcome.to_json()), flush=True)


@contextmanager
def watching(count: int, quiet: bool, as_json: bool) -> Iterator[Lines]:
    """What fits: JSON if it is asked for, rows in a terminal, lines elsewhere."""
    if as_json:
        yield Json()
    elif quiet or not sys.stderr.isatty():
        yield Lines(count, (lambda line: None) if quiet else _print, _print)
    else:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True, highlight=False)
        with Progress(
            TextColumn("{task.description}", markup=False), BarColumn(),
            TextColumn("{task.fields[shown]}", markup=False), TimeRemainingColumn(),
            TextColumn("{task.fields[tensor]}", markup=False), console=console, transient=True,
        ) as bars:  # fmt: skip
            yield Bars(count, bars, lambda line: console.print(line, markup=False, soft_wrap=True))


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
