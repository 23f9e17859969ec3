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
from streamq.tensors import DTYPES
from streamq.writer import ShardWriter

from .slabs import Segment
from .worker import Worker

#: Source bytes of one job: small enough that workers finish together.
JOB = 64 << 20


@dataclass(slots=True)
class Batch:
    """Whole steps, done by one worker from amax to codes."""

    shard: int
    steps: list[Step]

    def run(self, worker: Worker, writer: ShardWriter) -> list[Job]:
        """Quantize all steps of the batch."""
        scheme = self.steps[0].scheme
        members = [m for step in self.steps for m in step.members]
        members.sort(key=lambda m: (m.source.file, m.source.start))
        segments = [Segment(m, 0, m.source.shape[0]) for m in members]
        outer: dict[str, np.float32] = {}
        if scheme.needs_amax:
            outer = _outer(self.steps, worker.amax(segments), worker)
        worker.quantize(segments, scheme, outer, writer)
        return []


@dataclass(slots=True)
class LargeStep:
    """A step that several workers share, between its two passes."""

    step: Step
    waiting: int
    amax: dict[str, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, found: dict[str, float]) -> bool:
        """Take in one part's maxima; True for the last part."""
        with self.lock:
            for name, value in found.items():
                self.amax[name] = max(value, self.amax.get(name, 0.0))
            self.waiting -= 1
            return self.waiting == 0


@dataclass(slots=True)
class AmaxPart:
    """First pass over some rows of a large step; the last one releases the second pass."""

    shard: int
    segments: list[Segment]
    large: LargeStep
    then: list[QuantizePart]

    def run(self, worker: Worker, writer: ShardWriter) -> list[Job]:
        """Find the maxima; returns the second pass when all are known."""
        if not self.large.add(worker.amax(self.segments)):
            return []
        outer = _outer([self.large.step], self.large.amax, worker)
        for part in self.then:
            part.outer = outer
        return list(self.then)


@dataclass(slots=True)
class QuantizePart:
    """Some rows of a large step."""

    shard: int
    segments: list[Segment]
    scheme: Scheme
    outer: dict[str, np.float32] = field(default_factory=dict)

    def run(self, worker: Worker, writer: ShardWriter) -> list[Job]:
        """Quantize the rows."""
        worker.quantize(self.segments, self.scheme, self.outer, writer)
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
        if step.nbytes > JOB:
            yield from _large(number, step)
            continue
        if batch and filled + step.nbytes > JOB:
            yield Batch(number, batch)
            batch, filled = [], 0
        batch.append(step)
        filled += step.nbytes
    if batch:
        yield Batch(number, batch)


def _large(number: int, step: Step) -> Iterator[Job]:
    parts = [QuantizePart(number, [s], step.scheme) for m in step.members for s in _cut(m)]
    if not step.scheme.needs_amax:
        yield from parts
        return
    large = LargeStep(step, len(parts))
    for part in parts:
        yield AmaxPart(number, part.segments, large, parts)


def _cut(member: Member) -> Iterator[Segment]:
    """Rows of a large weight, about JOB bytes at a time."""
    rows, cols = member.source.shape
    step = member.layout.row_step
    height = max(step, JOB // (cols * DTYPES[member.source.dtype].itemsize) // step * step)
    for first in range(0, rows, height):
        yield Segment(member, first, min(rows, first + height))


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


def _outer(steps: list[Step], amax: dict[str, float], worker: Worker) -> dict[str, np.float32]:
    """One scale for each group, by the name of every member."""
    found: dict[str, np.float32] = {}
    for dtype in {step.members[0].source.dtype for step in steps}:
        same = [step for step in steps if step.members[0].source.dtype == dtype]
        tops = [max([amax[m.source.name] for m in step.members]) for step in same]
        for step, scale in zip(same, worker.outer(tops, steps[0].scheme, dtype), strict=True):
            found.update((m.source.name, scale) for m in step.members)
    return found


class Scheduler:
    """Hands out jobs; knows when a shard has none left."""

    def __init__(self, shards: list[ShardPlan]) -> None:
        self._ready = [deque(jobs_of(i, s)) for i, s in enumerate(shards)]
        self._left = [len(r) for r in self._ready]
        self._homes: dict[int, int] = {}
        self._changed = threading.Condition()
        self._stopped = False

    def next(self, worker: int) -> Job | None:
        """The next job for a worker, waiting for one if need be; None at the end."""
        with self._changed:
            while not self._stopped and any(self._left):
                home = self._homes.get(worker, -1)
                if home < 0 or not self._ready[home]:
                    home = self._choose(worker)
                if home >= 0:
                    self._homes[worker] = home
                    return self._ready[home].popleft()
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

    def _choose(self, worker: int) -> int:
        """A shard with work: the first that nobody is at, else the one with the most jobs."""
        taken = {home for w, home in self._homes.items() if w != worker}
        open_shards = [i for i, ready in enumerate(self._ready) if ready]
        free = [i for i in open_shards if i not in taken]
        if free:
            return free[0]
        return max(open_shards, key=lambda i: len(self._ready[i]), default=-1)
