"""Carry out a plan: copies by the kernel where it can, narrow lines through small buffers."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from streamq.checkpoint import CONFIG, Checkpoint, Span
from streamq.crew import Crew
from streamq.pace import FREE, Pace
from streamq.trust import VERSION, crc32, without_times
from streamq.writer import Destination, ShardWriter, Unit, check_destination

from .types import Copy, Gather, Piece, Plan, Shard, Summary, Task, Translate, Transpose

#: Told of bytes done, and of the tensor that they belong to.
Progress = Callable[[int, str], None]

INDEX = "model.safetensors.index.json"
#: Bytes of one copy: a worker hears of a stop, and two finish together.
COPY = 64 << 20
#: Largest buffers, in bytes. STRIP: rows of a transposed matrix; the more there are, the wider is
#: what is read of each column (1.0 GB/s with 8 MB, 1.6 with 32). GATHER: lines that are put
#: together, a few, so that they stay in the cache.
STRIP, GATHER = 32 << 20, 1 << 20
#: Lines are read with what is between them up to this many times their width.
SPAN = 8


def reindex(
    source: Checkpoint, plan: Plan, dst: str | os.PathLike[str], *,
    workers: int, max_memory: int, sync: bool = True, overwrite: bool = False,
    restart: bool = False, sha256: bool = False, progress: Progress | None = None,
    notify: Callable[[str], None] | None = None, limit_rate: int | None = None,
) -> Summary:  # fmt: skip
    """Write the checkpoint that ``plan`` describes to the directory ``dst``.

    Goes on where an earlier run with the same plan was interrupted, unless ``restart``.
    ``limit_rate``: bytes a second, read and written. Raises StreamqError; what is done then stays
    in ``dst.partial``, and a note on the exception says so.
    """
    began = time.perf_counter()
    check_destination(Path(dst), plan.disk_needed, overwrite)
    source.pace = Pace(limit_rate)
    target = Destination(Path(dst), overwrite, sync, sha256, source.pace)
    prints = source.fingerprint()
    made = {"streamq": VERSION, **plan.origin}
    headers = {shard.name: crc32(shard.header) for shard in plan.shards}
    try:
        target.begin({**made, "source": prints, "headers": headers}, restart)
        if source.remote is not None:  # what a task reads is in memory
            workers = max(1, min(workers, max_memory // COPY))
        strip = max(4096, min(STRIP, max_memory // (2 * workers)))
        run = _Run(source, plan.shards, target, strip, progress or (lambda n, name: None))
        if notify and (said := target.how_far([s.name for s in plan.shards], plan.bytes_out)):
            notify(said)
        run.run(workers)
        for name in plan.others:
            if name not in plan.files:
                target.copy_file(source.root / name, name)
        if len(plan.shards) > 1:
            target.write_text(INDEX, plan.index())
        for name, value in sorted(plan.files.items(), key=lambda item: item[0] == CONFIG):
            target.write_json(name, value)
        source.refuse_changed()
        target.commit({**made, "source": without_times(prints)})
    except BaseException as e:
        if target.begun and target.partial.exists():
            e.add_note(
                f"{target.dst} was not written; {target.partial} stays, the same command goes on "
                "from there."
            )
        raise
    finally:
        source.pace = FREE
        target.close()
    return Summary(plan.bytes_out, time.perf_counter() - began, workers)


class _Run:
    """The threads of one run. A worker stays with a shard, as two writers on one file wait."""

    def __init__(
        self, source: Checkpoint, shards: list[Shard], target: Destination, strip: int,
        progress: Progress,
    ) -> None:  # fmt: skip
        self._source, self._shards, self._target = source, shards, target
        self._strip, self._progress = strip, progress
        self._ready = [deque(self._left_of(shard)) for shard in shards]
        self._left = [max(1, len(tasks)) for tasks in self._ready]
        self._empty = deque(
            i for i, tasks in enumerate(self._ready)
            if not tasks and not target.is_complete(shards[i].name)
        )  # fmt: skip
        self._writers: dict[int, ShardWriter] = {}
        self._homes: dict[int, int] = {}
        self._lock = threading.Lock()

    def _left_of(self, shard: Shard) -> list[Task]:
        """What is to be done for a shard; an earlier run may have done some of it."""
        tasks = list(_pieces(shard.tasks))
        if not self._target.goes_on:
            return tasks
        done = self._target.finished(shard.name, shard.size, set(map(_key, tasks)))
        self._progress(self._target.bytes_of(shard.name), shard.name)
        return [task for task in tasks if _key(task) not in done]

    def run(self, workers: int) -> None:
        """Run to the end, or raise the first error after all threads have come home."""
        try:
            with Crew(workers, self._source.pace.stop) as crew:
                self._crew = crew
                crew.start(self._work)
        finally:
            for writer in self._writers.values():
                writer.abandon()

    def _work(self, number: int) -> None:
        """One thread, until no task is left."""
        while (found := self._next(number)) is not None:
            shard, task = found
            writer = self._writer(shard)
            if task is not None:
                unit = writer.unit(_key(task))
                with self._source.reading(partial(_reads, task), self._crew.stop):
                    self._do(task, unit)
                unit.done()
            with self._lock:
                self._left[shard] -= 1
                done = self._left[shard] == 0
                if done:
                    del self._writers[shard]
            if done:
                unit = writer.unit()
                for offset, value in self._shards[shard].values:
                    unit.put_small(offset, value)
                unit.done()
                self._crew.close(partial(self._close, writer))

    def _close(self, writer: ShardWriter) -> None:
        try:
            self._target.close_shard(writer)
        except BaseException:
            writer.abandon()
            raise

    def _next(self, worker: int) -> tuple[int, Task | None] | None:
        """A task of the worker's shard, or of one that nobody is at, or of that with the most."""
        with self._lock:
            if self._crew.stop.is_set():
                return None
            if self._empty:
                return self._empty.popleft(), None
            home = self._homes.get(worker, -1)
            if home < 0 or not self._ready[home]:
                taken = {h for w, h in self._homes.items() if w != worker}
                full = [i for i, tasks in enumerate(self._ready) if tasks]
                if not full:
                    return None
                free = [i for i in full if i not in taken]
                home = free[0] if free else max(full, key=lambda i: len(self._ready[i]))
                self._homes[worker] = home
            return home, self._ready[home].popleft()

    def _writer(self, number: int) -> ShardWriter:
        with self._lock:
            if number not in self._writers:
                shard = self._shards[number]
                self._writers[number] = self._target.shard(shard.name, shard.header, shard.size)
            return self._writers[number]

    def _do(self, task: Task, writer: Unit) -> None:
        self._crew.heed()
        if isinstance(task, Copy):
            read = self._source.reader(task.file)
            writer.copy_from(read, task.start, task.offset, task.nbytes)
            self._progress(task.nbytes, task.name)
        elif isinstance(task, Gather):
            self._gather(task, writer)
        elif isinstance(task, Translate):
            self._translate(task, writer)
        else:
            self._transpose(task, writer)

    def _gather(self, g: Gather, writer: Unit) -> None:
        """Put lines together, as many at a time as a buffer holds."""
        height = max(1, min(GATHER, self._strip // SPAN) // g.width)
        for first in range(0, g.lines, height):
            self._crew.heed()
            lines = min(height, g.lines - first)
            buffer = np.empty((lines, g.width), np.uint8)
            for p in g.pieces:
                self._read(p, first, buffer[:, p.at : p.at + p.width])
            writer.put(g.offset + first * g.width, buffer.reshape(-1).data)
            self._progress(buffer.nbytes, g.name)

    def _read(self, p: Piece, first: int, into: np.ndarray[Any, Any]) -> None:
        """Lines of a piece from ``first`` on, uint8 ``[lines, width]``."""
        lines, start = len(into), p.start + first * p.step
        if p.step > SPAN * p.width:
            line = np.empty(p.width, np.uint8)
            for i in range(lines):
                self._source.pread(p.file, start + i * p.step, line.data)
                into[i] = line
            return
        raw = np.empty((lines - 1) * p.step + p.width, np.uint8)
        self._source.pread(p.file, start, raw.data)
        into[:] = np.lib.stride_tricks.as_strided(raw, into.shape, (p.step, 1))

    def _translate(self, t: Translate, writer: Unit) -> None:
        """Write bytes through a table, some at a time."""
        for done in range(0, t.nbytes, GATHER):
            self._crew.heed()
            piece = bytearray(min(GATHER, t.nbytes - done))
            self._source.pread(t.file, t.start + done, memoryview(piece))
            writer.put(t.offset + done, memoryview(piece.translate(t.table)))
            self._progress(len(piece), t.name)

    def _transpose(self, t: Transpose, writer: Unit) -> None:
        """Write the rows of a matrix whose columns lie in lines, some at a time."""
        row = t.view.nbytes // t.view.rows
        height = max(1, self._strip // row)
        for first in range(0, t.view.rows, height):
            self._crew.heed()
            rows = t.view.read(self._source, first, min(height, t.view.rows - first))
            writer.put(t.offset + first * row, rows.reshape(-1).view(np.uint8).data)
            self._progress(rows.nbytes, t.name)


def _reads(task: Task) -> Iterator[Span]:
    """What a task reads, if it is no more than a copy; else it reads as it goes."""
    if isinstance(task, Copy | Translate):
        spans = [(task.file, task.start, task.start + task.nbytes)]
    elif isinstance(task, Gather):
        spans = [(p.file, p.start, p.start + (task.lines - 1) * p.step + p.width)
                 for p in task.pieces]  # fmt: skip
    else:
        spans = list(task.view.spans(0, task.view.rows))
    if sum(end - start for _, start, end in spans) <= COPY:
        yield from spans


def _key(task: Task) -> str:
    """What tells a task from all others of its shard that fill a byte."""
    return f"{task.offset} {task.name}"


def _pieces(tasks: list[Task]) -> Iterator[Task]:
    """Tasks with long copies in pieces."""
    for task in tasks:
        if not isinstance(task, Copy) or task.nbytes <= COPY:
            yield task
            continue
        for done in range(0, task.nbytes, COPY):
            n = min(COPY, task.nbytes - done)
            yield Copy(task.file, task.start + done, task.offset + done, n, task.name)
