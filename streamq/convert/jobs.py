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

from streamq.plan import Copy, ShardPlan, Weights, slab_rows
from streamq.writer import ShardWriter

from .slabs import Array, Stretch, stretches
from .worker import Worker

#: Source bytes of one job: small enough that workers finish together.
JOB = 64 << 20


@dataclass(slots=True)
class Batch:
    """Whole steps of one dtype, done by one worker from amax to codes."""

    shard: int
    weights: Weights
    members: Array  # rows of ``weights``, in the order of the source

    def run(self, worker: Worker, writer: ShardWriter) -> list[Job]:
        """Quantize all steps of the batch."""
        weights, outer = self.weights, None
        work = list(stretches(weights, self.members))
        if weights.scheme.needs_amax:
            steps, step = np.unique(weights.steps[self.members], return_inverse=True)
            tops = np.zeros(len(steps), np.float32)
            np.maximum.at(tops, step, worker.amax(work, len(step)))
            outer = worker.outer(tops, weights)[step]
        worker.quantize(work, outer, writer)
        return []


@dataclass(slots=True)
class LargeStep:
    """A step that several workers share, between its two passes."""

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
        outer = worker.outer(np.array([self.large.top], np.float32), self.rows.weights)
        for part in self.then:
            part.outer = outer
        return list(self.then)


@dataclass(slots=True)
class QuantizePart:
    """Some rows of a large step."""

    shard: int
    rows: Stretch
    outer: Array | None = None

    def run(self, worker: Worker, writer: ShardWriter) -> list[Job]:
        """Quantize the rows."""
        worker.quantize([self.rows], self.outer, writer)
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
    for weights in shard.weights:
        yield from _jobs_of_weights(number, weights)


def _jobs_of_weights(number: int, weights: Weights) -> Iterator[Job]:
    begins = np.flatnonzero(np.diff(weights.steps, prepend=-1))
    ends = np.append(begins[1:], len(weights.steps))
    sizes = np.add.reduceat(weights.column(lambda x: x.bytes_in), begins)
    for step in np.flatnonzero(sizes > JOB).tolist():
        yield from _large(number, weights, range(begins[step], ends[step]))
    small = np.flatnonzero(sizes <= JOB)
    filled = np.cumsum(sizes[small])
    members = np.flatnonzero(np.repeat(sizes <= JOB, ends - begins))
    done = begun = taken = 0
    while begun < len(small):
        end = int(np.searchsorted(filled, done + JOB, "right"))
        count = int((ends - begins)[small[begun:end]].sum())
        batch = members[taken : taken + count]
        order = np.lexsort(weights.places[batch].T[::-1])
        yield Batch(number, weights, batch[order])
        begun, done, taken = end, int(filled[end - 1]), taken + count


def _large(number: int, weights: Weights, members: range) -> Iterator[Job]:
    parts = [QuantizePart(number, rows) for m in members for rows in _cut(weights, m)]
    if not weights.scheme.needs_amax:
        yield from parts
        return
    large = LargeStep(len(parts))
    for part in parts:
        yield AmaxPart(number, part.rows, large, parts)


def _cut(weights: Weights, member: int) -> Iterator[Stretch]:
    """Rows of a large weight, about JOB bytes at a time."""
    layout = weights.layouts[weights.kind[member]]
    height = slab_rows(weights.row_step(member), layout.bytes_in // layout.rows, JOB)
    for first in range(0, layout.rows, height):
        numel = (min(layout.rows, first + height) - first) * layout.cols
        yield Stretch(weights, np.array([member]), np.array([numel]), first)


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
