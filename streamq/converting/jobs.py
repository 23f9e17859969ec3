"""The work of one plan, or of several with one source, as jobs.

Jobs are independent of each other but for one thing: the rows of a large weight with a
global scale are quantized only after all of its group have been looked at.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain
from math import lcm
from typing import NamedTuple

import numpy as np

from streamq.planning import Copy, ShardPlan, Weights, slab_rows

from .boxes import ShardSink
from .slabs import Array, Stretch, stretches
from .worker import Worker

#: Source bytes of one job: small enough that workers finish together.
JOB = 64 << 20


#: Where the weights of a shard go, by its number over the shards of all outputs.
Sinks = Callable[[int], ShardSink]
#: Whether some work for a shard, by its number and the key of the work, is to be done.
Wanted = Callable[[int, str], bool]


class Share(NamedTuple):
    """Some weights of one shard: ``rows`` of them, in the order of the source."""

    shard: int
    weights: Weights
    rows: list[Stretch]

    @property
    def key(self) -> str:
        """What tells it from all others of its shard: the places that it fills there."""
        members = np.concatenate([r.members for r in self.rows])
        ends = np.concatenate([r.ends for r in self.rows])
        firsts = np.array([r.first for r in self.rows])
        digest = blake2b(digest_size=8)
        for column in (self.weights.starts[members], ends, firsts):
            digest.update(column.tobytes())
        return digest.hexdigest()

    def outer(self, worker: Worker) -> Array | None:
        """The scale above the blocks for each weight, from all rows of all its steps."""
        weights = self.weights
        if not weights.needs_amax:
            return None
        members = np.concatenate([r.members for r in self.rows])
        steps, step = np.unique(weights.steps[members], return_inverse=True)
        tops = np.zeros(len(steps), np.float32)
        np.maximum.at(tops, step, worker.amax(self.rows, len(step)))
        return worker.outer(tops, weights)[step]


@dataclass(slots=True)
class Batch:
    """Whole steps, done by one worker from amax to codes, for every output that has them."""

    shares: list[Share]

    @property
    def shards(self) -> list[int]:
        """The shards that are written to."""
        return [share.shard for share in self.shares]

    def run(self, worker: Worker, sinks: Sinks) -> list[Job]:
        """Quantize all steps of the batch; several outputs share what is read."""
        if len(self.shares) > 1:
            worker.hold([rows for share in self.shares for rows in share.rows])
        for share in self.shares:
            with sinks(share.shard).unit(share.key) as sink:
                worker.quantize(share.rows, share.outer(worker), sink)
        worker.release()
        return []

    def keep(self, wanted: Wanted) -> bool:
        """Leave out what is not wanted; False if that is all."""
        self.shares = [s for s in self.shares if wanted(s.shard, s.key)]
        return bool(self.shares)

    def units(self) -> list[tuple[int, str]]:
        """Shard and key of what it does."""
        return [(share.shard, share.key) for share in self.shares]


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

    shards: list[int]
    rows: Stretch
    large: LargeStep
    then: list[QuantizePart]

    def run(self, worker: Worker, sinks: Sinks) -> list[Job]:
        """Find the maximum; returns the second pass when all are known."""
        if not self.large.add(float(worker.amax([self.rows], 1)[0])):
            return []
        top = np.array([self.large.top], np.float32)
        for part in self.then:
            part.outer = [worker.outer(top, s.weights) if s.weights.needs_amax else None
                          for s in part.shares]  # fmt: skip
        return list(self.then)

    def keep(self, wanted: Wanted) -> bool:
        """False if nothing is left of the second pass, which was asked before."""
        self.shards = sorted({shard for part in self.then for shard in part.shards})
        return bool(self.then)


@dataclass(slots=True)
class QuantizePart:
    """Some rows of a large step, for every output that has it."""

    shares: list[Share]
    outer: list[Array | None]

    @property
    def shards(self) -> list[int]:
        """The shards that are written to."""
        return [share.shard for share in self.shares]

    def run(self, worker: Worker, sinks: Sinks) -> list[Job]:
        """Quantize the rows."""
        if len(self.shares) > 1:
            worker.hold([rows for share in self.shares for rows in share.rows])
        for share, outer in zip(self.shares, self.outer, strict=True):
            with sinks(share.shard).unit(share.key) as sink:
                worker.quantize(share.rows, outer, sink)
        worker.release()
        return []

    def keep(self, wanted: Wanted) -> bool:
        """Leave out what is not wanted; False if that is all."""
        self.shares = [s for s in self.shares if wanted(s.shard, s.key)]
        self.outer = [None] * len(self.shares)
        return bool(self.shares)

    def units(self) -> list[tuple[int, str]]:
        """Shard and key of what it does."""
        return [(share.shard, share.key) for share in self.shares]


@dataclass(slots=True)
class CopyRun:
    """Bytes that stay as they are, contiguous on both sides."""

    shard: int
    file: str
    start: int
    offset: int
    nbytes: int
    name: str

    @property
    def shards(self) -> list[int]:
        """The shard that is written to."""
        return [self.shard]

    def run(self, worker: Worker, sinks: Sinks) -> list[Job]:
        """Copy them."""
        with sinks(self.shard).unit(self.key) as sink:
            worker.copy(self.file, self.start, self.offset, self.nbytes, self.name, sink.writer)
        return []

    @property
    def key(self) -> str:
        """What tells it from all others of its shard."""
        return f"{self.offset}+{self.nbytes}"

    def keep(self, wanted: Wanted) -> bool:
        """False if it is not wanted."""
        return wanted(self.shard, self.key)

    def units(self) -> list[tuple[int, str]]:
        """Shard and key of what it does."""
        return [(self.shard, self.key)]


Job = Batch | AmaxPart | QuantizePart | CopyRun


def jobs_of(outputs: list[list[ShardPlan]]) -> Iterator[Job]:
    """All that has to be done first; large steps release more later.

    Shards are numbered over all outputs, in their order.
    """
    numbered = list(enumerate(chain.from_iterable(outputs)))
    for number, shard in numbered:
        yield from _copies(number, shard.copies)
    if len(outputs) == 1:
        for number, shard in numbered:
            for weights in shard.weights:
                yield from _jobs_of_weights(number, weights)
    else:
        yield from _shared_jobs(numbered)


def _jobs_of_weights(number: int, weights: Weights) -> Iterator[Job]:
    begins = np.flatnonzero(np.diff(weights.steps, prepend=-1))
    ends = np.append(begins[1:], len(weights.steps))
    sizes = np.add.reduceat(weights.column(lambda x: x.bytes_in), begins)
    for step in np.flatnonzero(sizes > JOB).tolist():
        yield from _large([(number, weights, np.arange(begins[step], ends[step]))])
    small = np.flatnonzero(sizes <= JOB)
    filled = np.cumsum(sizes[small])
    members = np.flatnonzero(np.repeat(sizes <= JOB, ends - begins))
    done = begun = taken = 0
    while begun < len(small):
        end = int(np.searchsorted(filled, done + JOB, "right"))
        count = int((ends - begins)[small[begun:end]].sum())
        yield Batch([_share(number, weights, members[taken : taken + count])])
        begun, done, taken = end, int(filled[end - 1]), taken + count


def _share(number: int, weights: Weights, members: Array) -> Share:
    order = np.lexsort(weights.places[members].T[::-1])
    return Share(number, weights, list(stretches(weights, members[order])))


#: A shard by its number, weights in it, and which of them.
Members = tuple[int, Weights, Array]


def _shared_jobs(shards: list[tuple[int, ShardPlan]]) -> Iterator[Job]:
    """Jobs of several outputs: each step is read once and becomes what each of them wants."""
    steps: dict[tuple[int, int], list[Members]] = {}  # by the place of its first weight
    for number, shard in shards:
        for weights in shard.weights:
            begins = np.flatnonzero(np.diff(weights.steps, prepend=-1))
            for members in np.split(np.arange(len(weights.steps)), begins[1:]):
                file, start = weights.places[members[0]].tolist()
                steps.setdefault((file, start), []).append((number, weights, members))
    batch: dict[tuple[int, int], Members] = {}
    filled = 0
    for _, parts in sorted(steps.items()):
        size = max(int(w.column(lambda x: x.bytes_in, members).sum()) for _, w, members in parts)
        if size > JOB:
            yield from _large(parts)
            continue
        if filled + size > JOB:
            yield Batch([_share(*part) for part in batch.values()])
            batch, filled = {}, 0
        filled += size
        for number, weights, members in parts:
            key = number, id(weights)
            before = batch[key][2] if key in batch else members[:0]
            batch[key] = number, weights, np.concatenate((before, members))
    if batch:
        yield Batch([_share(*part) for part in batch.values()])


def _large(parts: list[Members]) -> Iterator[Job]:
    """The jobs of one step, by pieces of its weights; outputs may have it in part."""
    pieces: dict[tuple[str, int], list[Share]] = {}
    for number, weights, members in parts:
        for m in members.tolist():
            height = lcm(*(w.row_step(row) for _, w, rows in parts for row in rows.tolist()))
            for rows in _cut(weights, m, height):
                key = weights.sources[m].name, rows.first
                pieces.setdefault(key, []).append(Share(number, weights, [rows]))
    later = []
    for shares in pieces.values():
        part = QuantizePart(shares, [None] * len(shares))
        if any(share.weights.needs_amax for share in shares):
            later.append(part)
        else:
            yield part
    large = LargeStep(len(later))
    shards = sorted({share.shard for part in later for share in part.shares})
    for part in later:
        rows = next(s.rows[0] for s in part.shares if s.weights.needs_amax)
        yield AmaxPart(shards, rows, large, later)


def _cut(weights: Weights, member: int, step: int) -> Iterator[Stretch]:
    """Rows of a large weight, about JOB bytes at a time."""
    layout = weights.layouts[weights.kind[member]]
    height = slab_rows(step, layout.bytes_in // layout.rows, JOB)
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
