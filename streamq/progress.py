"""How far a long run is: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from streamq.tensors import size_text

#: Seconds between two lines of progress where the output is not a terminal.
QUIET_INTERVAL = 10.0


@contextmanager
def progress(total: int, verb: str, quiet: bool) -> Iterator[Callable[[int, str], None]]:
    """A callback for bytes done; a bar in a terminal, a line now and then elsewhere."""
    if quiet:
        yield lambda n, name: None
    elif sys.stderr.isatty():
        with _bar(total, verb) as advance:
            yield advance
    else:
        yield _lines(total, verb)


@contextmanager
def _bar(total: int, verb: str) -> Iterator[Callable[[int, str], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )  # fmt: skip

    with Progress(
        TextColumn(verb), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[tensor]}", markup=False),
        console=Console(stderr=True), transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task(verb, total=total, tensor="")
        yield lambda n, name: bar.update(task, advance=n, tensor=name)


def _lines(total: int, verb: str) -> Callable[[int, str], None]:
    began = last = time.monotonic()
    done = 0
    lock = threading.Lock()

    def advance(n: int, name: str) -> None:
        nonlocal done, last
        with lock:
            done += n
            now = time.monotonic()
            if now - last < QUIET_INTERVAL:
                return
            last = now
        rate = done / (now - began)
        left = (total - done) / rate if rate else 0
        print(
            f"{verb} {size_text(done)} of {size_text(total)}, {size_text(rate)}/s, "
            f"{left:.0f} s left, {name}",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    return advance
