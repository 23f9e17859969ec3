"""One conversion of a batch, as values that can be sent to where it is carried out."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from streamq.errors import StreamqError

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

    ``outputs``: destinations with keywords of ``streamq.api.options``. ``settings``: fields of
    ``streamq.converting.Settings`` but for its callbacks. All of it can be written as JSON.
    """

    src: str
    outputs: tuple[tuple[str, Mapping[str, Any]], ...]
    settings: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The inverse of ``Work(**...)``."""
        return asdict(self)


#: Called with what a conversion has done: bytes of the source, the name of a tensor; by any thread.
Progress = Callable[[int, str], None]


class Engine(Protocol):
    """Where conversions are carried out; called by as many threads as run at once."""

    def carry_out(
        self, work: Work, progress: Progress, notify: Callable[[str], None]
    ) -> list[dict[str, Any]]:
        """What ``carry_out`` of this module returns. Raises JobError, Stopped after ``stop``."""

    def stop(self) -> None:
        """End what runs as soon as possible; it can be gone on with later."""


def carry_out(
    work: Work, progress: Progress, notify: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Convert; of each output what ``convert --json`` prints, without single tensors."""
    from streamq.api import options
    from streamq.checkpoint import open_checkpoint
    from streamq.converting import Output, Settings, convert_all
    from streamq.planning import make_plan
    from streamq.show import summary_json

    settings = Settings(**work.settings, progress=progress, notify=notify)
    with open_checkpoint(work.src, spool=settings.spool, spool_dir=settings.spool_dir) as source:
        outputs = [
            Output(make_plan(source, options(**how)), Path(dst)) for dst, how in work.outputs
        ]
        summaries = convert_all(source, outputs, settings)
    made = [summary_json(o, s) for o, s in zip(outputs, summaries, strict=True)]
    return [{k: v for k, v in m.items() if k != "sqnr_db_by_tensor"} for m in made]


def failure_of(error: BaseException) -> JobError:
    """What went wrong, in a sentence."""
    if isinstance(error, StreamqError):
        text = str(error)
    elif isinstance(error, OSError):
        text = f"{error.filename or 'a file'}: {error.strerror}."
    elif isinstance(error, MemoryError):
        text = "memory ran out; give less --max-memory, or fewer --jobs."
    else:
        text = f"{type(error).__name__}: {error}. This is a bug in streamq; please report it."
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
