"""The work of a plan as jobs, and who does which.

A worker stays with one output file as long as that has work, because two writers on one
inode wait for each other (5.9 against 10.3 GB/s). Jobs are independent of each other but
for one thing: the rows of a large weight with a global scale are quantized only after
all of its group have been looked at.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from streamq.plan import Copy, Member, ShardPlan, Step
from streamq.schemes import Scheme
from streamq.writer import ShardWriter

from .slabs import Array, Stretch, stretches
from .worker import Worker

#: Source bytes of one job: small enough that workers finish together.
JOB = 64 << 20


@dataclass(slots=True)
class Batch:
    """Whole steps of one dtype, done by one worker from amax to codes."""

    shard: int
    scheme: Scheme
    stretches: list[Stretch]
    group: Array  # of each member: the number of its step

    def run(self, worker: Worker, writer: ShardWriter) -> list[Job]:
        """Quantize all steps of the batch."""
        outer = None
        if self.scheme.needs_amax:
            tops = np.zeros(self.group.max() + 1, np.float32)
            np.maximum.at(tops, self.group, worker.amax(self.stretches, len(self.group)))
            dtype = self.stretches[0].members[0].source.dtype
            outer = worker.outer(tops, self.scheme, dtype)[self.group]
        worker.quantize(self.stretches, self.scheme, outer, writer)
        return []


@dataclass(slots=True)
class LargeStep:
    """A step that several workers share, between its two passes."""

    step: Step
    waiting: int
    top: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, top: float) -> bool:
        """Take in one part's maximum; True for the last part."""
        with self.lock:
            self.top = max(top, self.top)
            self.waiting -= 1
            return self.waiting == 0


@dataclass(slots=True)
class AmaxPart:
    """First pass over some rows of a large step; the last one releases the second pass."""

    shard: int
    rows: Stretch
    large: LargeStep
    then: list[QuantizePart]

    def run(self, worker: Worker, writer: ShardWriter) -> list[Job]:
        """Find the maximum; returns the second pass when all are known."""
        if not self.large.add(float(worker.amax([self.rows], 1)[0])):
            return []
        tops = np.array([self.large.top], np.float32)
        source = self.large.step.members[0].source
        outer = worker.outer(tops, self.large.step.scheme, source.dtype)
        for part in self.then:
            part.outer = outer
        return list(self.then)


@dataclass(slots=True)
class QuantizePart:
    """Some rows of a large step."""

    shard: int
    rows: Stretch
    scheme: Scheme
    outer: Array | None = None

    def run(self, worker: Worker, writer: ShardWriter) -> list[Job]:
        """Quantize the rows."""
        worker.quantize([self.rows], self.scheme, self.outer, writer)
        return []


@dataclass(slots=True)
class CopyRun:
    """Bytes that stay as they are, contiguous on both sides."""

    shard: int
    file: str
    start: int
    offset: int
    nbytes: int
    name: str

    def run(self, worker: Worker, writer: ShardWriter) -> list[Job]:
        """Copy them."""
        worker.copy(self.file, self.start, self.offset, self.nbytes, self.name, writer)
        return []


Job = Batch | AmaxPart | QuantizePart | CopyRun


def jobs_of(number: int, shard: ShardPlan) -> Iterator[Job]:
    """All that has to be done first for one shard; large steps release more later."""
    yield from _copies(number, shard.copies)
    batch: list[Step] = []
    filled = 0
    for step in shard.steps:
        size = step.nbytes
        if size > JOB:
            yield from _large(number, step)
            continue
        if batch and (filled + size > JOB or step.dtype != batch[0].dtype):
            yield _batch(number, batch)
            batch, filled = [], 0
        batch.append(step)
        filled += size
    if batch:
        yield _batch(number, batch)


def _batch(number: int, steps: list[Step]) -> Batch:
    members = [(m, i) for i, step in enumerate(steps) for m in step.members]
    members.sort(key=lambda pair: (pair[0].source.file, pair[0].source.start))
    group = np.array([i for _, i in members])
    return Batch(number, steps[0].scheme, list(stretches([m for m, _ in members])), group)


def _large(number: int, step: Step) -> Iterator[Job]:
    parts = [QuantizePart(number, rows, step.scheme) for m in step.members for rows in _cut(m)]
    if not step.scheme.needs_amax:
        yield from parts
        return
    large = LargeStep(step, len(parts))
    for part in parts:
        yield AmaxPart(number, part.rows, large, parts)


def _cut(member: Member) -> Iterator[Stretch]:
    """Rows of a large weight, about JOB bytes at a time."""
    rows, cols = member.source.shape
    step = member.layout.row_step
    height = max(step, JOB // (member.layout.bytes_in // rows) // step * step)
    for first in range(0, rows, height):
        yield Stretch([member], 0, [(min(rows, first + height) - first) * cols], first)


def _copies(number: int, copies: list[Copy]) -> Iterator[Job]:
    run: CopyRun | None = None
    for t, offset in copies:
        if run and (
            (run.file, run.start + run.nbytes, run.offset + run.nbytes) == (t.file, t.start, offset)
            and run.nbytes + t.nbytes <= JOB
        ):
            run.nbytes += t.nbytes
            continue
        if run:
            yield run
        run = CopyRun(number, t.file, t.start, offset, t.nbytes, t.name)
    if run:
        yield run


class Scheduler:
    """Hands out jobs; knows when a shard has none left."""

    def __init__(self, shards: list[ShardPlan]) -> None:
        self._ready = [deque(jobs_of(i, s)) for i, s in enumerate(shards)]
        self._left = [len(r) for r in self._ready]
        self._homes: dict[int, int] = {}
        self._changed = threading.Condition()
        self._stopped = False

    def next(self, worker: int, copies_only: bool = False) -> Job | None:
        """The next job for a worker, waiting for one if need be; None at the end.

        With ``copies_only``, None as soon as no copy is left.
        """
        with self._changed:
            while not self._stopped and any(self._left):
                home = self._homes.get(worker, -1)
                if home < 0 or not self._has(home, copies_only):
                    home = self._choose(worker, copies_only)
                if home >= 0:
                    self._homes[worker] = home
                    return self._ready[home].popleft()
                if copies_only:
                    return None
                self._changed.wait()
            return None

    def done(self, job: Job, released: list[Job]) -> bool:
        """Note that a job is done and what it released; True if its shard is complete."""
        with self._changed:
            self._ready[job.shard].extendleft(reversed(released))
            self._left[job.shard] += len(released) - 1
            self._changed.notify_all()
            return self._left[job.shard] == 0

    def stop(self) -> None:
        """Let all workers come home."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _has(self, shard: int, copies_only: bool) -> bool:
        """Whether a shard has a job ready; its copies come first."""
        ready = self._ready[shard]
        return bool(ready) and not (copies_only and not isinstance(ready[0], CopyRun))

    def _choose(self, worker: int, copies_only: bool) -> int:
        """A shard with work: the first that nobody is at, else the one with the most jobs."""
        taken = {home for w, home in self._homes.items() if w != worker}
        open_shards = [i for i in range(len(self._ready)) if self._has(i, copies_only)]
        free = [i for i in open_shards if i not in taken]
        if free:
            return free[0]
        return max(open_shards, key=lambda i: len(self._ready[i]), default=-1)
