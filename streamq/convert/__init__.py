"""Carry out a plan: N workers, each with its own buffers; DST appears at the end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from streamq.checkpoint import CONFIG, Checkpoint
from streamq.plan import MAX_MEMORY, Plan
from streamq.quality import Quality
from streamq.schemes import BYTES
from streamq.writer import Destination, ShardWriter, check_destination

from .jobs import Job, Scheduler
from .worker import Stopped, Worker

INDEX = "model.safetensors.index.json"

Progress = Callable[[int, str], None]

#: Kernels that are in the cache on disk load in well under this; compiling takes longer.
SLOW_START = 0.7


@dataclass(frozen=True, slots=True)
class Summary:
    """What a conversion did; ``rounded`` scales of the source were not exact in the output."""

    bytes_in: int
    bytes_out: int
    seconds: float
    workers: int
    backend: str
    quality: Quality | None
    rounded: int


def default_workers() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def convert(
    source: Checkpoint,
    plan: Plan,
    dst: str | os.PathLike[str],
    *,
    workers: int | None = None,
    max_memory: int = MAX_MEMORY,
    sync: bool = True,
    overwrite: bool = False,
    stats: bool = False,
    progress: Progress | None = None,
    notify: Callable[[str], None] | None = None,
) -> Summary:
    """Write the checkpoint that ``plan`` describes to the directory ``dst``.

    ``workers``: threads (default: the processors). ``max_memory``: bytes of buffers of
    all workers. ``sync``: flush to disk before ``dst`` appears. ``stats``: measure
    what the weights lose. ``progress`` is called
    with bytes of the source done and the name of the tensor they belong to, from any
    thread; ``notify`` with sentences for people. The bytes written depend on the plan alone.

    Raises StreamqError; ``dst.partial`` then stays for the next run to replace, and a
    note on the exception says so.
    """
    began = time.perf_counter()
    target = Path(dst)
    workers = plan.workers_within(workers or default_workers(), max_memory)
    check_destination(target, plan.disk_needed, overwrite)
    destination = Destination(target, overwrite, sync)
    destination.begin()
    try:
        quality = Quality() if stats else None
        backend = "copied"
        run = _Run(source, plan, destination, workers, progress or (lambda n, name: None), quality)
        if plan.verbatim:
            _copy_files(source, destination, progress)
        else:
            backend = run.run(lambda: _load_kernels(plan, stats, notify)).NAME
            for name in plan.others:
                if name != CONFIG and name not in plan.files:
                    destination.copy_file(source.root / name, name)
            if len(plan.shards) > 1:
                destination.write_text(INDEX, plan.index())
            for name, value in {**plan.files, CONFIG: plan.config}.items():
                destination.write_json(name, value)
        destination.commit()
    except BaseException as e:
        e.add_note(
            f"{target} was not written; {destination.partial} stays, the next run replaces it."
        )
        raise
    finally:
        destination.sync.close()
    seconds = time.perf_counter() - began
    return Summary(plan.bytes_in, plan.bytes_out, seconds, workers, backend, quality, run.rounded)


def _copy_files(source: Checkpoint, destination: Destination, progress: Progress | None) -> None:
    """Copy a source that is already what is wanted, file by file."""
    index = [INDEX] if (source.root / INDEX).is_file() else []
    for name in [*source.others, *index, *source.files]:
        destination.copy_file(source.root / name, name)
        if progress and name in source.files:
            progress(sum(t.nbytes for t in source.tensors.values() if t.file == name), name)


def _load_kernels(plan: Plan, stats: bool, notify: Callable[[str], None] | None) -> ModuleType:
    """Compile the kernels, or load them from the cache, before any thread needs them.

    Imported here and not above: numba takes 0.2 s, in which other threads already copy.
    """
    text = "compiling the CPU kernels for this machine, once; later runs load them from the cache"
    timer = threading.Timer(SLOW_START, lambda: notify(text) if notify else None)
    timer.daemon = True
    timer.start()
    try:
        from streamq.kernels import cpu

        for scheme, packing, dtype in {
            (w.scheme, layout.packing if layout.entry("codes").direct else BYTES, w.numpy)
            for shard in plan.shards for w in shard.weights for layout in w.layouts
            if w.target.origin != "codes" and not w.scheme.is_float
        }:  # fmt: skip
            cpu.warm_up(scheme, packing, dtype, plan.options.numerics, stats)
    finally:
        timer.cancel()
    return cpu


class _Run:
    """The threads of one conversion."""

    def __init__(
        self,
        source: Checkpoint,
        plan: Plan,
        destination: Destination,
        workers: int,
        progress: Progress,
        quality: Quality | None,
    ) -> None:
        self._source = source
        self._plan = plan
        self._destination = destination
        self._workers = workers
        self._progress = progress
        self._quality = quality
        self._scheduler = Scheduler(plan.shards)
        self._writers: dict[int, ShardWriter] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.rounded = 0

    def _count_rounded(self, count: int) -> None:
        with self._lock:
            self.rounded += count

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
                for writer in self._writers.values():
                    writer.abandon()
        return kernels

    def _work(
        self,
        number: int,
        kernels: ModuleType | None,
        closer: ThreadPoolExecutor,
        closing: list[Future[None]],
    ) -> None:
        """One thread, until no job is left; until no copy is left without ``kernels``."""
        worker = Worker(
            self._source, kernels, self._plan.options.numerics, self._plan.slab_memory,
            self._stop, self._progress, self._quality, self._count_rounded,
        )  # fmt: skip
        while (job := self._scheduler.next(number, copies_only=kernels is None)) is not None:
            writer = self._writer(job)
            released = job.run(worker, writer)
            if self._scheduler.done(job, released):
                with self._lock:
                    del self._writers[job.shard]
                closing.append(closer.submit(writer.close))

    def _writer(self, job: Job) -> ShardWriter:
        with self._lock:
            writer = self._writers.get(job.shard)
            if writer is None:
                shard = self._plan.shards[job.shard]
                writer = self._destination.shard(shard.name, shard.header, shard.size)
                self._writers[job.shard] = writer
            return writer


def _raise_first(futures: list[Future[None]]) -> None:
    """Raise what went wrong first; that others were stopped because of it says nothing."""
    errors = [e for f in futures if f.done() and (e := f.exception()) is not None]
    for error in errors:
        if not isinstance(error, Stopped):
            raise error
    if errors:
        raise errors[0]
