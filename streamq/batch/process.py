"""Each conversion in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import IO, Any

from streamq.checkpoint.spool import spool_folder
from streamq.errors import Stopped
from streamq.hub import is_hub

from .work import JobError, Progress, Work


class Processes:
    """What breaks one conversion breaks no other: memory that runs out, a driver that crashes.

    A process that is killed is one failed job, and says what it was killed by. All of them end
    with this one, by the end of their standard input. See docs/batch.md for what it costs.
    """

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def carry_out(
        self, work: Work, progress: Progress, notify: Callable[[str], None]
    ) -> list[dict[str, Any]]:
        """See ``Engine``."""
        with tempfile.TemporaryFile() as errors, _spool_of(work) as work:
            child = self._start(errors)
            try:
                return self._listen(child, work, errors, progress, notify)
            finally:
                child.kill()
                with suppress(BrokenPipeError):
                    child.communicate()
                with self._lock:
                    self._running.discard(child)

    def stop(self) -> None:
        """See ``Engine``."""
        with self._lock:
            self._stopped = True
            for child in self._running:
                child.kill()

    def _start(self, errors: IO[bytes]) -> subprocess.Popen[bytes]:
        # A group of its own: Ctrl-C is for this process, which says what becomes of the others.
        # -P: no file of the working directory passes for a module. What is imported here is
        # imported there, however this process found it.
        path = os.pathsep.join(os.path.abspath(p) for p in sys.path)
        with self._lock:
            if self._stopped:
                raise Stopped
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "streamq.batch.child"], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, process_group=0,
                stderr=None if os.environ.get("STREAMQ_DEBUG") else errors,
                env={**os.environ, "PYTHONPATH": path},
            )  # fmt: skip
            self._running.add(child)
        return child

    def _listen(
        self, child: subprocess.Popen[bytes], work: Work, errors: IO[bytes], progress: Progress,
        notify: Callable[[str], None],
    ) -> list[dict[str, Any]]:  # fmt: skip
        assert child.stdin is not None
        assert child.stdout is not None
        with suppress(BrokenPipeError):
            child.stdin.write(json.dumps(work.to_json()).encode() + b"\n")
            child.stdin.flush()
        for line in child.stdout:
            if not line.endswith(b"\n"):
                break  # killed while it wrote
            match json.loads(line):
                case {"progress": [int(n), str(name)]}:
                    progress(n, name)
                case {"notify": str(text)}:
                    notify(text)
                case {"done": list(made)}:
                    return made
                case {"failed": str(text), "transient": bool(transient)}:
                    raise JobError(text, transient)
        code = child.wait()
        if self._stopped:
            raise Stopped
        raise JobError(_ending(code, errors), False)


@contextmanager
def _spool_of(work: Work) -> Iterator[Work]:
    """What a killed process has on disk of a source on the Hub goes with a directory for it."""
    if not is_hub(work.src):
        yield work
        return
    place = work.settings["spool_dir"] or spool_folder()
    with tempfile.TemporaryDirectory(
        prefix="streamq-batch-", dir=place, ignore_cleanup_errors=True
    ) as folder:
        yield replace(work, settings={**work.settings, "spool_dir": folder})


def _ending(code: int, errors: IO[bytes]) -> str:
    """Why a process ended without a word."""
    if code == -signal.SIGKILL:
        return (
            "the process of the conversion was killed (SIGKILL), as the system does when memory "
            "runs out; give less --max-memory, or fewer --jobs."
        )
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - 2000))
    said = errors.read().decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(said) if line.strip()), "")
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
    return f"the process of the conversion ended {how}" + (f": {last}" if last else ".")
