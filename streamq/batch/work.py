"""One conversion of a batch, as values that can be sent to where it is carried out."""

from __future__ import annotations

import errno
import os
import shlex
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

from streamq.api import options
from streamq.checkpoint import open_checkpoint
from streamq.converting import Output, Settings, Upload, convert_all
from streamq.engines import opened
from streamq.errors import StreamqError
from streamq.hub import is_hub
from streamq.planning import Plan, make_plan
from streamq.show import summary_json
from streamq.writer import place_of

#: Errors of files that pass: of network file systems and connections. EIO is what NFS and FUSE say
#: of a server that is away; a disk that is broken says it again, and only the retries are lost.
_PASSING = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET, errno.ECONNABORTED,
    errno.ECONNREFUSED, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
    errno.ENETRESET, errno.EPIPE, errno.EREMOTEIO,
}  # fmt: skip


class JobError(StreamqError):
    """A conversion of a batch failed; ``transient`` says whether it is worth another try."""

    def __init__(self, sentence: str, transient: bool) -> None:
        super().__init__(sentence)
        self.transient = transient


@dataclass(frozen=True, slots=True)
class Work:
    """A source with one output or several, read once.

    ``outputs``: destinations with keywords of ``streamq.api.options``. ``settings``: see
    ``settings_json``. ``engine``: where its shards are made. All of it can be written as JSON.
    """

    src: str
    outputs: tuple[tuple[str, Mapping[str, Any]], ...]
    settings: Mapping[str, Any]
    engine: str = "local"

    def to_json(self) -> dict[str, Any]:
        """The inverse of ``Work(**...)``."""
        return asdict(self)


#: Called with what a conversion has done: bytes of the source, the name of a tensor; by any thread.
Progress = Callable[[int, str], None]
#: Called with sentences for people.
Notify = Callable[[str], None]


class Engine(Protocol):
    """Where conversions are carried out; called by as many threads as run at once."""

    def carry_out(self, work: Work, progress: Progress, notify: Notify) -> list[dict[str, Any]]:
        """What ``carry_out`` of this module returns. Raises JobError, Stopped after ``stop``."""

    def stop(self) -> None:
        """End what runs as soon as possible; it can be gone on with later."""


def settings_json(settings: Settings) -> dict[str, Any]:
    """Settings without their callbacks, as JSON."""
    found = {f.name: getattr(settings, f.name) for f in fields(settings)}
    del found["progress"], found["notify"]
    upload = asdict(settings.upload)
    upload["work_dir"] = upload["work_dir"] and str(upload["work_dir"])
    folder = settings.spool_dir and str(settings.spool_dir)
    return {**found, "spool_dir": folder, "upload": upload}


def settings_of(said: Mapping[str, Any], progress: Progress, notify: Notify) -> Settings:
    """The inverse of ``settings_json``."""
    upload, folder = dict(said["upload"]), said["spool_dir"]
    upload["work_dir"] = upload["work_dir"] and Path(upload["work_dir"])
    return Settings(**{
        **said, "upload": Upload(**upload), "spool_dir": folder and Path(folder),
        "progress": progress, "notify": notify,
    })  # fmt: skip


def output_of(src: str, dst: str, how: Mapping[str, Any], plan: Plan, upload: Upload) -> Output:
    """A plan and the place of its output; the card of one on the Hub says how to make it again."""
    return Output(plan, place_of(dst, replace(upload, command=_command(src, dst, how))))


def carry_out(work: Work, progress: Progress, notify: Notify) -> list[dict[str, Any]]:
    """Convert; of each output what ``convert --json`` prints, without single tensors."""
    settings = settings_of(work.settings, progress, notify)
    with (
        opened(work.engine, work.src) as engine,
        open_checkpoint(work.src, spool=settings.spool, spool_dir=settings.spool_dir) as source,
    ):
        outputs = [
            output_of(work.src, dst, how, make_plan(source, options(**how)), settings.upload)
            for dst, how in work.outputs
        ]
        summaries = convert_all(source, outputs, settings, engine)
    made = [summary_json(o, s) for o, s in zip(outputs, summaries, strict=True)]
    return [{k: v for k, v in m.items() if k != "sqnr_db_by_tensor"} for m in made]


def _command(src: str, dst: str, how: Mapping[str, Any]) -> str:
    """What makes the same output, without what only this machine has."""
    words = ["streamq", "convert", src if is_hub(src) else Path(src).resolve().name, dst]
    for key, value in how.items():
        for one in value if isinstance(value, tuple) else [value]:
            if one is not None and one is not False and key != "check_tp":
                words.append("--" + key.replace("_", "-"))
                words += [] if one is True else [Path(one).name if key == "recipe" else str(one)]
    return shlex.join(words)


def failure_of(error: BaseException) -> JobError:
    """What went wrong, in a sentence."""
    if isinstance(error, StreamqError):
        text = str(error)
    elif isinstance(error, OSError):
        text = f"{error.filename or 'a file'}: {error.strerror}."
    elif isinstance(error, MemoryError):
        text = "memory ran out; give less --max-memory, or fewer --jobs."
    else:
        if os.environ.get("STREAMQ_DEBUG"):
            traceback.print_exception(error)
        text = (
            f"{type(error).__name__}: {error}. This is a bug in streamq; please report it with the "
            "output of the same command under STREAMQ_DEBUG=1."
        )
    return JobError(" ".join(text.split()), _is_transient(error))


def _is_transient(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, is one that passes."""
    while error is not None:
        if getattr(error, "transient", False):
            return True
        if isinstance(error, OSError) and error.errno in _PASSING:
            return True
        error = error.__cause__
    return False
