"""What a batch is made of: how it runs, its tasks, what becomes of them, who is told."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from streamq.converting import Settings
from streamq.converting.jobs import JOB

from .budget import Need
from .jobs import Job
from .look import Planned
from .work import JobError

#: Seconds before the second try, doubled each time up to LONGEST. Half of it is chance, so that
#: jobs that failed together do not come back together.
FIRST, LONGEST = 2.0, 60.0


@dataclass(frozen=True, slots=True)
class How:
    """``jobs``: conversions at once. ``retries``: further tries of one where an error may pass.

    ``continue_on_error``: a failure does not keep other jobs from starting. ``max_disk``: bytes
    that outputs being written may take together. ``settings``: of all conversions together;
    threads and memory are shared out. ``engine``: the name of one; with ``ray`` threads and memory
    are those of each of its tasks.
    """

    jobs: int = 1
    retries: int = 3
    continue_on_error: bool = False
    max_disk: int | None = None
    settings: Settings = field(default_factory=Settings)
    engine: str = "local"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job. ``kept``: an earlier run has done it.

    ``said``: what the plan and the conversion said of it. ``tries``: how often it was begun.
    """

    job: Job
    state: Literal["done", "kept", "failed", "not started"]
    said: dict[str, Any]
    error: str | None = None
    tries: int = 0

    @property
    def is_good(self) -> bool:
        """Whether the output is there."""
        return self.state in ("done", "kept")

    def to_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        return {
            "src": self.job.src, "dst": self.job.dst, "state": self.state, "error": self.error,
            "tries": self.tries, **{k: v for k, v in self.said.items() if k != "dst"},
        }  # fmt: skip


class Task:
    """Jobs of one source that are carried out in one pass over it."""

    def __init__(self, planned: Sequence[Planned]) -> None:
        self.planned = list(planned)
        self.tries = 0
        self.not_before = 0.0
        self.error: JobError | None = None

    @property
    def src(self) -> str:
        """Their source."""
        return self.planned[0].job.src

    def has(self, job: Job) -> bool:
        """Whether a job is one of them."""
        return any(p.job is job for p in self.planned)

    @property
    def bytes_in(self) -> int:
        """Bytes of the source, once for each output, as conversions count what they have done."""
        return sum(p.bytes_in for p in self.planned)

    @property
    def need(self) -> Need:
        """What it takes to carry them out together."""
        held = max(JOB if len(self.planned) > 1 else 0, *(p.held for p in self.planned))
        memory = max(p.memory for p in self.planned) + held
        return Need(memory, tuple(space for p in self.planned for space in p.disk))


class Watch(Protocol):
    """Who is told how it goes, from any thread."""

    def begins(self, task: Task) -> None:
        """A conversion starts, or starts again."""

    def advances(self, task: Task, n: int, name: str) -> None:
        """It has done ``n`` bytes more of the source."""

    def says(self, src: str, line: str) -> None:
        """It has a sentence for people."""

    def pauses(self, task: Task, error: str, seconds: float) -> None:
        """It failed, and is tried again in so many seconds."""

    def ends(self, outcome: Outcome) -> None:
        """A job has come to its end."""


def pause_after(tries: int) -> float:
    """Seconds to wait after so many tries."""
    return min(LONGEST, FIRST * 2.0 ** (tries - 1)) * random.uniform(0.5, 1)
