"""The threads of one run over a source."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from types import ModuleType
from typing import TYPE_CHECKING

from streamq.checkpoint import Checkpoint
from streamq.planning import Plan
from streamq.quality import Quality
from streamq.writer import Destination

from .boxes import Sink, Tally
from .scheduler import Scheduler
from .worker import Progress, Stopped, Worker

if TYPE_CHECKING:
    from .fleet import Fleet


class Run:
    """Carries out plans for one source; shards are numbered over all of them."""

    def __init__(
        self,
        source: Checkpoint,
        work: list[tuple[Plan, Destination]],
        workers: int,
        progress: Progress,
        stats: bool,
        fleet: Fleet | None = None,
    ) -> None:
        self._source = source
        self._workers = workers
        self._progress = progress
        self._fleet = fleet
        self._memory = max((plan.slab_memory for plan, _ in work), default=0)
        self._tallies = [Tally(Quality() if stats else None) for _ in work]
        self._shards = [
            (shard, destination, tally)
            for (plan, destination), tally in zip(work, self._tallies, strict=True)
            for shard in plan.shards
        ]
        self._scheduler = Scheduler([plan.shards for plan, _ in work])
        self._sinks: dict[int, Sink] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()

    @property
    def measured(self) -> list[tuple[Quality | None, int]]:
        """Of each plan what its weights lost, and the number of scales that were rounded."""
        return [(tally.quality, tally.rounded) for tally in self._tallies]

    def run(self, load_kernels: Callable[[], ModuleType]) -> ModuleType:
        """Run to the end, or raise the first error after all threads have come home.

        What stays as it is gets copied while the kernels are loaded.
        """
        # Closing a shard waits for the disk, so it has a thread of its own.
        with ThreadPoolExecutor(1, "close") as closer, ThreadPoolExecutor(self._workers) as pool:
            closing: list[Future[None]] = []

            def start(kernels: ModuleType | None) -> list[Future[None]]:
                threads = range(self._workers)
                return [pool.submit(self._work, i, kernels, closer, closing) for i in threads]

            futures = start(None)
            try:
                kernels = load_kernels()
                futures += start(kernels)
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                if not all(f.done() and f.exception() is None for f in futures):
                    self._stop.set()
                    self._scheduler.stop()
                    wait(futures)
            try:
                _raise_first(futures)
                wait(closing)
                _raise_first(closing)
            finally:
                for sink in self._sinks.values():
                    sink.writer.abandon()
        return kernels

    def _work(
        self,
        number: int,
        kernels: ModuleType | None,
        closer: ThreadPoolExecutor,
        closing: list[Future[None]],
    ) -> None:
        """One thread, until no job is left; until no copy is left without ``kernels``."""
        worker = self._hire(number, kernels)
        try:
            while (job := self._scheduler.next(number, copies_only=kernels is None)) is not None:
                released = job.run(worker, self._sink)
                for shard in self._scheduler.done(job, released):
                    with self._lock:
                        writer = self._sinks.pop(shard).writer
                    closing.append(closer.submit(writer.close))
        finally:
            worker.close()

    def _hire(self, number: int, kernels: ModuleType | None) -> Worker:
        common = self._memory, self._stop, self._progress
        if self._fleet is None or kernels is None:
            return Worker(self._source, kernels, *common)
        from .overlap import DeviceWorker

        return DeviceWorker(
            self._source, kernels, *common, self._fleet, self._fleet.device_of(number)
        )

    def _sink(self, number: int) -> Sink:
        with self._lock:
            if number not in self._sinks:
                shard, destination, tally = self._shards[number]
                writer = destination.shard(shard.name, shard.header, shard.size)
                self._sinks[number] = Sink(writer, tally)
            return self._sinks[number]


def _raise_first(futures: list[Future[None]]) -> None:
    """Raise what went wrong first; that others were stopped because of it says nothing."""
    errors = [e for f in futures if f.done() and (e := f.exception()) is not None]
    for error in errors:
        if not isinstance(error, Stopped):
            raise error
    if errors:
        raise errors[0]
