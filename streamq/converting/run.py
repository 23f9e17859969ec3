"""The threads of one run over a source."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from streamq.checkpoint import Checkpoint
from streamq.crew import Crew
from streamq.planning import Plan
from streamq.quality import Quality

from .boxes import Shard, ShardSink, Tally
from .jobs import AmaxPart, Job, QuantizePart, jobs_of
from .reads import as_they_lie, reads, with_released
from .rooms import Rooms, Space
from .scheduler import Scheduler
from .worker import Progress, Worker

if TYPE_CHECKING:
    from .fleet import Fleet


class Outlet(Protocol):
    """Takes complete shards off the disk. ``room``: bytes of them that may be there."""

    room: int

    def watch(self, gone: Callable[[str, BaseException | None], None]) -> None:
        """Have it told of each shard that is gone, or of the error because of which none will."""

    def holds(self, name: str) -> bool:
        """Whether a complete shard is on the disk."""

    def make_room(self, size: int) -> None:
        """Wait until there is room for a shard of ``size`` bytes."""


class Shards(Protocol):
    """Where the shards of an output go."""

    @property
    def outlet(self) -> Outlet | None:
        """What takes shards off the disk; without one all stay there."""

    @property
    def goes_on(self) -> bool:
        """Whether some of it is there from an earlier run."""

    def finished(self, name: str, size: int, units: set[str]) -> set[str]:
        """Which units of a shard are there."""

    def is_complete(self, name: str) -> bool:
        """Whether all of a shard is there."""

    def notes_of(self, name: str) -> list[dict[str, Any]]:
        """What was noted of its units that are there."""

    def shard(self, name: str, header: bytes, size: int) -> Shard:
        """Open a shard."""

    def close_shard(self, shard: Any) -> None:
        """Close it."""


class Fresh:
    """What has nothing from an earlier run, and keeps all that it gets."""

    goes_on = False
    outlet = None

    def finished(self, name: str, size: int, units: set[str]) -> set[str]:
        """Nothing is done before."""
        return set()

    def is_complete(self, name: str) -> bool:
        """Nothing is done before."""
        return False

    def notes_of(self, name: str) -> list[dict[str, Any]]:
        """Nothing is done before."""
        return []


class Target(Shards, Protocol):
    """Where an output goes: a Destination, or what compares it with one that is there."""

    def copy_file(self, source: Path, name: str, keep: bool = False) -> None:
        """Take a file of the source as it is; ``keep`` where it is large."""

    def write_text(self, name: str, pieces: Iterable[str]) -> None:
        """Take a text file."""

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Take a JSON object."""


class Run:
    """Carries out plans for one source; shards are numbered over all of them."""

    def __init__(
        self,
        source: Checkpoint,
        work: Sequence[tuple[Plan, Shards]],
        workers: int,
        progress: Progress,
        stats: bool,
        details: bool,
        fleet: Fleet | None = None,
    ) -> None:
        self._source = source
        self._workers = workers
        self._progress = progress
        self._fleet = fleet
        self._memory = max((plan.slab_memory for plan, _ in work), default=0)
        self._tallies = [Tally(Quality(details) if stats else None) for _ in work]
        self._shards = [
            (shard, destination, tally)
            for (plan, destination), tally in zip(work, self._tallies, strict=True)
            for shard in plan.shards
        ]
        self._idle: list[int] = []  # shards of which an earlier run has written all
        self.unmeasured = False  # whether one did that without measuring what weights lose
        self._lost: BaseException | None = None  # why shards cannot be brought away
        spaces = [Space(shard.size, i) for i, (plan, _) in enumerate(work) for shard in plan.shards]
        outlets = [destination.outlet for _, destination in work]
        rooms = Rooms(spaces, [outlet.room if outlet else None for outlet in outlets])
        self._scheduler = Scheduler((), len(self._shards), rooms)
        for i, outlet in enumerate(outlets):
            if outlet is not None:
                outlet.watch(partial(self._gone, {
                    shard.name: number for number, (shard, _, _) in enumerate(self._shards)
                    if spaces[number].owner == i
                }))  # fmt: skip
        jobs = list(jobs_of([plan.shards for plan, _ in work]))
        if any(destination.goes_on for _, destination in work):
            jobs = self._left_of(jobs)
        if source.remote is not None:
            jobs = as_they_lie(jobs)
            source.expect(map(reads, with_released(jobs)))
        self._scheduler.add(jobs)
        self._sinks: dict[int, ShardSink] = {}
        self._lock = threading.Lock()

    @property
    def measured(self) -> list[tuple[Quality | None, int]]:
        """Of each plan what its weights lost, and the number of scales that were rounded."""
        return [(tally.quality, tally.rounded) for tally in self._tallies]

    def run(self, load_kernels: Callable[[], ModuleType]) -> ModuleType:
        """Run to the end, or raise the first error after all threads have come home.

        What stays as it is gets copied while the kernels are loaded.
        """
        try:
            with Crew(self._workers, self._halt) as crew:
                self._crew = crew
                for number in self._idle:
                    crew.close(partial(self._close, number))
                crew.start(partial(self._work, kernels=None))
                kernels = load_kernels()
                crew.start(partial(self._work, kernels=kernels))
        finally:
            for sink in self._sinks.values():
                sink.shard.abandon()
        if self._lost is not None:
            raise self._lost
        return kernels

    def _halt(self) -> None:
        """Wake up whoever waits."""
        self._scheduler.stop()
        self._source.pace.stop()

    def _left_of(self, jobs: list[Job]) -> list[Job]:
        """What is to be done where an earlier run has begun."""
        second = _second_of(jobs)
        keys = _units(jobs, len(self._shards))
        done = []
        for (shard, destination, tally), units in zip(self._shards, keys, strict=True):
            done.append(destination.finished(shard.name, shard.size, units))
            notes = destination.notes_of(shard.name)
            for note in notes:
                tally.take(note)
            if shard.weights and tally.quality is not None:  # each unit has a note of it
                self.unmeasured |= sum(map(tally.is_whole, notes)) < len(done[-1])

        def wanted(number: int, key: str) -> bool:
            return key not in done[number]

        for parts in second.values():
            parts[:] = [part for part in parts if part.keep(wanted)]
        left = [job for job in jobs if job.keep(wanted)]
        busy = {number for job in left for number in job.shards}
        self._idle = [
            number
            for number, (shard, destination, _) in enumerate(self._shards)
            if number not in busy and not destination.is_complete(shard.name)
        ]
        for number, (shard, destination, _) in enumerate(self._shards):
            if done[number] and (outlet := destination.outlet):
                self._scheduler.occupied(number)
                if destination.is_complete(shard.name) and not outlet.holds(shard.name):
                    self._scheduler.freed(number)
        return left

    def _gone(self, numbers: dict[str, int], name: str, error: BaseException | None) -> None:
        """A shard is off the disk, or it and others cannot be brought away."""
        if error is not None:
            self._lost = error
            self._scheduler.stop()
        elif name in numbers:
            self._scheduler.freed(numbers[name])

    def _close(self, number: int) -> None:
        """Close a shard of which all is written."""
        opened = self._sink(number).shard
        with self._lock:
            del self._sinks[number]
        try:
            self._shards[number][1].close_shard(opened)
        except BaseException:
            opened.abandon()
            raise

    def _work(self, number: int, kernels: ModuleType | None) -> None:
        """One thread, until no job is left; until no copy is left without ``kernels``."""
        worker = self._hire(number, kernels)
        try:
            while (job := self._scheduler.next(number, copies_only=kernels is None)) is not None:
                with self._source.reading(partial(reads, job), self._crew.stop):
                    released = job.run(worker, self._sink)
                for shard in self._scheduler.done(job, released):
                    self._crew.close(partial(self._close, shard))
        finally:
            worker.close()

    def _hire(self, number: int, kernels: ModuleType | None) -> Worker:
        common = self._memory, self._crew.heed, self._progress
        if self._fleet is None or kernels is None:
            return Worker(self._source, kernels, *common)
        from .overlap import DeviceWorker

        return DeviceWorker(
            self._source, kernels, *common, self._fleet, self._fleet.device_of(number)
        )

    def _sink(self, number: int) -> ShardSink:
        with self._lock:
            if number not in self._sinks:
                shard, destination, tally = self._shards[number]
                opened = destination.shard(shard.name, shard.header, shard.size)
                self._sinks[number] = ShardSink(opened, tally)
            return self._sinks[number]


def _second_of(jobs: list[Job]) -> dict[int, list[QuantizePart]]:
    """What the jobs release later, once each."""
    return {id(job.then): job.then for job in jobs if isinstance(job, AmaxPart)}


def units_of(plans: Sequence[Plan]) -> list[set[str]]:
    """The keys of the units of each shard, over all plans."""
    return _units(list(jobs_of([plan.shards for plan in plans])), sum(len(p.shards) for p in plans))


def _units(jobs: list[Job], count: int) -> list[set[str]]:
    """Those of jobs for ``count`` shards."""
    first = [job for job in jobs if not isinstance(job, AmaxPart)]
    keys: list[set[str]] = [set() for _ in range(count)]
    for job in chain(first, *_second_of(jobs).values()):
        for number, key in job.units():
            keys[number].add(key)
    return keys
