"""What became of the jobs of a batch, in a file that outlives every way for a process to end.

A journal of JSON lines, each with a checksum and on disk before anything builds upon it; the last
one of a job counts. Jobs are told by their destinations.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from streamq.errors import PlanError, WriteError
from streamq.hub import is_hub
from streamq.trust import RECORD, Journal, crc32, read_journal
from streamq.writer import HubPlace, Upload, place_of
from streamq.writer.disk import SyncPool, naming

from .jobs import Job

_FIRST = {"streamq": "batch", "version": 1}
_TEXT = json.dumps(_FIRST, separators=(",", ":")).encode()
#: The first line, as a journal spells it.
_LINE = b"%08x %s\n" % (crc32(_TEXT), _TEXT)


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a job from earlier runs.

    ``asked``: what was asked for, ``source``: as it was then, both as ``Job`` and ``fingerprint``
    say them, hashed; ``source`` is None on the Hub. ``record``: see ``record_of``, of a job that
    has begun that of the output it replaces; None for one that is done on the Hub.
    ``result``: what the conversion said in the end.
    """

    state: Literal["begun", "done", "failed"]
    asked: str
    source: str | None
    record: str | None
    result: Mapping[str, Any]


class State:
    """The state of a batch; locked while it is open.

    ``dry``: the file is only read, what is noted is not written. Raises PlanError where the file is
    something else, WriteError where another batch has it or it cannot be written.
    """

    def __init__(self, path: Path, dry: bool = False) -> None:
        self._path, self._fd = path, -1
        self._journal: Journal | None = None
        with naming(str(path)):
            if not dry:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                _lock(self._fd, path)
            records, good = read_journal(path)
            if not records and path.exists() and not _LINE.startswith(path.read_bytes()):
                raise PlanError(f"{path}: is no state of a batch; give another --state.")
            if records and records[0] != _FIRST:
                raise PlanError(f"{path}: is the state of another version; give another --state.")
            if not dry:
                self._journal = Journal(path, good)
                if not records:
                    self._journal.append(_FIRST, durable=True)
                    SyncPool(True).path(path.parent)
        self._known = {r["dst"]: r for r in records[1:]}

    def of(self, job: Job) -> Known | None:
        """What is known of a job; None for a new one."""
        said = self._known.get(job.key)
        return None if said is None else Known(**{k: v for k, v in said.items() if k != "dst"})

    def note(self, job: Job, known: Known) -> None:
        """Write down what became of a job; on disk on return. Raises WriteError."""
        said = {"dst": job.key, **{k: getattr(known, k) for k in Known.__slots__}}
        if self._journal is not None:
            with naming(str(self._path)):
                self._journal.append(said, durable=True)
        self._known[job.key] = said

    def close(self) -> None:
        """Close the file and let go of it."""
        if self._journal is not None:
            self._journal.close()
            os.close(self._fd)


def _lock(fd: int, path: Path) -> None:
    """The kernel lets go of it when a process ends. Some file systems have no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise WriteError(
            f"{path}: another batch is at work with it; wait for it, or give another --state."
        ) from None
    except OSError:
        return


def asked_of(job: Job) -> str:
    """A hash of the source's name and what decides the output; recipes by what is in them.

    Raises PlanError for a recipe that cannot be read.
    """
    how = {
        k: v for k, v in job.how.items()
        if k != "check_tp" and v not in (None, ()) and v is not False
    }  # fmt: skip
    if "recipe" in how:
        try:
            raw = Path(how["recipe"]).read_bytes()
        except OSError as e:
            raise PlanError(f"the recipe {how['recipe']} cannot be read: {e.strerror}.") from None
        how["recipe"] = hashlib.sha256(raw).hexdigest()
    src = job.src if is_hub(job.src) else os.path.realpath(job.src)
    return hash_of([src, how])


def hash_of(value: Any) -> str:
    """Of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def record_of(job: Job, upload: Upload) -> str | None:
    """What tells one output from another: of its streamq.json the checksum, or the id on the Hub.

    None where there is none. Raises HubError.
    """
    place = place_of(job.dst, upload)
    if isinstance(place, HubPlace):
        found = place.branch.look(place.branch.branch)
        return None if found is None else found.files.get(RECORD)
    with contextlib.suppress(OSError):
        return f"{crc32((place / RECORD).read_bytes()):08x}"
    return None
