"""Carry out a plan: one pass over the source, streams appended in the order of the plan.

How large a stream becomes is known when it is coded. Workers code parts of tensors; what they
made is written in order, each stream behind the one before, so no byte is written twice and
the output is the same for any number of workers. Of a tensor that shares the dictionary of a
call all parts are counted before one is coded, and the tensor is read twice; the next one is
counted meanwhile, so that no worker waits.
"""

from __future__ import annotations

import json
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from streamq.checkpoint import COMPRESSION, Checkpoint
from streamq.errors import PlanError
from streamq.nz.codec import dictionaries
from streamq.tensors import size_text
from streamq.writer import Destination, check_destination

from .blocks import Coded, Part, count, encode, parts_of, row_of_tiles
from .building import Building, Layer
from .crc import of_file
from .layout import Laid, lay_out
from .manifest import File, Manifest
from .ordered import in_order
from .rows import Reader
from .types import Array, Item, Plan, Progress, mode_of

#: Buffers of a worker for each byte of a part: what was read, its tiles, the stream twice while
#: pieces are joined, and two results that wait to be written.
HELD = 6


@dataclass(frozen=True, slots=True)
class Summary:
    """What a compression did, the layers in the order of the output."""

    layers: list[Layer]
    bytes_in: int
    bytes_out: int
    seconds: float
    workers: int


class _Stopped(Exception):
    """Another part of the tensor failed."""


def laid_out(plan: Plan) -> list[Laid]:
    """Where everything goes in each shard."""
    return [lay_out(shard) for shard in plan.shards]


def disk_needed(plan: Plan) -> int:
    """Bytes on disk if nothing shrinks, with the texts and an index (a rounded-up guess)."""
    names = sum(len(shard.items) for shard in plan.shards)
    texts = sum(map(len, [*plan.texts.values(), *plan.restore.values()]))
    return sum(laid.most for laid in laid_out(plan)) + plan.other_bytes + texts + 600 * names


def workers_within(plan: Plan, wanted: int, max_memory: int) -> int:
    """As many workers as memory has room for. Raises PlanError where it has for none."""
    items = (item for shard in plan.shards for item in shard.items)
    return workers_for(items, wanted, max_memory, "what is made of them")


def workers_for(items: Iterable[Item], wanted: int, max_memory: int, beside: str) -> int:
    """The same for some tensors; ``beside``: what is in memory beside rows of them, for people."""
    rows = [row_of_tiles(item.tiling) for item in items if item.tiling is not None]
    least = HELD * max(rows, default=1 << 16)
    if max_memory < least:
        raise PlanError(
            f"--max-memory {size_text(max_memory)} is too little: 128 rows of the largest matrix "
            f"and {beside} need {size_text(least)}."
        )
    return max(1, min(wanted, max_memory // least))


def compress(
    source: Checkpoint, plan: Plan, dst: str | os.PathLike[str], *,
    workers: int, max_memory: int, sync: bool = True, overwrite: bool = False,
    progress: Progress | None = None,
) -> Summary:  # fmt: skip
    """Write the compressed checkpoint that ``plan`` describes to the directory ``dst``.

    Raises StreamqError; what is incomplete then stays in ``dst.partial`` for the next run to
    replace, and a note on the exception says so.
    """
    began = time.perf_counter()
    workers = workers_within(plan, workers, max_memory)
    check_destination(Path(dst), disk_needed(plan), overwrite)
    target = Destination(Path(dst), overwrite, sync)
    try:
        target.begin()
        budget = max_memory // (HELD * workers)
        run = _Run(source, plan, target, budget, progress or (lambda n, name: None))
        files = run.run(workers)
        size = _finish(source, plan, target, run.index(), files)
        target.commit()
    except BaseException as e:
        if target.begun and target.partial.exists():
            e.add_note(
                f"{target.dst} was not written; {target.partial} stays, the next run replaces it."
            )
        raise
    finally:
        target.close()
    return Summary(run.layers, plan.bytes_in, size, time.perf_counter() - began, workers)


def _finish(
    source: Checkpoint, plan: Plan, target: Destination, index: str, files: dict[str, File]
) -> int:
    """All files but the shards; returns the bytes of the shards."""
    options = plan.options
    manifest = Manifest({
        "codec": options.codec, "kind": plan.kind, "transpose": options.transpose,
        "dictionary": options.dictionary if options.codec == "ascend" else None,
        "sparsity": options.keep, "tp": options.tp,
    }, files, restore=plan.restore)  # fmt: skip
    for name in plan.others:
        if name not in plan.texts and name not in plan.restore:
            target.copy_file(source.root / name, name)
            manifest.files[name] = of_file(target.output / name)
    texts = plan.texts if plan.index is None else {**plan.texts, plan.index: index}
    for name, text in texts.items():
        target.write_text(name, [text])
        manifest.files[name] = zlib.crc32(text.encode())
    manifest.made = [name for name in plan.texts if name not in plan.restore]
    target.write_text(COMPRESSION, [manifest.text()])
    return sum((target.output / name).stat().st_size for name in files)


#: A shard by number, with what was made of a part of one of its tensors.
Done = tuple[int, Part | None, Coded | None]
#: What a worker does: counts, or codes.
Task = Callable[[], Done | None]


def _nothing(number: int) -> Done:
    """A shard without tensors."""
    return number, None, None


class _Call:
    """The dictionaries of a tensor, from what its parts count."""

    def __init__(self, parts: int) -> None:
        self._left, self._failed = parts, False
        self._counts = np.zeros((2, 256), np.int64)
        self._lock = threading.Lock()
        self._whole = threading.Event()

    def count(self, part: Part, reader: Reader) -> None:
        """Count a part."""
        try:
            found = count(part, reader)
            with self._lock:
                self._counts += found
        except BaseException:
            self._failed = True
            raise
        finally:
            with self._lock:
                self._left -= 1
                if not self._left:
                    self._whole.set()

    def dictionaries(self) -> Array:
        """Wait for all parts: they were begun before whoever asks."""
        self._whole.wait()
        if self._failed:
            raise _Stopped
        return dictionaries(self._counts)


class _Run:
    """One run over a source."""

    def __init__(
        self, source: Checkpoint, plan: Plan, target: Destination, budget: int, progress: Progress
    ) -> None:
        self._reader = Reader(source)
        self._plan, self._target, self._budget, self._progress = plan, target, budget, progress
        self._laid = laid_out(plan)
        self.layers: list[Layer] = []
        self.files: list[Building] = []

    def run(self, workers: int) -> dict[str, File]:
        """Run to the end, or raise the first error after all threads have come home.

        Returns what is noted of each shard.
        """
        # Closing a shard waits for the disk, so it has a thread of its own.
        with ThreadPoolExecutor(1, "close") as closer:
            sealed: list[Future[File]] = []
            try:
                with closing(in_order(self._tasks(), workers)) as results:
                    for number, part, coded in filter(None, results):
                        file = self._file(number)
                        if part is not None and coded is not None:
                            self._take(file, part, coded)
                        if file.complete:
                            sealed.append(closer.submit(file.seal))
                        if sealed and sealed[-1].done():
                            sealed[-1].result()  # a full disk is told of at once
            except BaseException:
                closer.shutdown()
                for file in self.files:
                    file.abandon()
                raise
            names = [shard.name for shard in self._plan.shards]
            return dict(zip(names, [future.result() for future in sealed], strict=True))

    def _file(self, number: int) -> Building:
        """The shard, begun when its first part comes."""
        if number == len(self.files):
            shard = self._plan.shards[number]
            self.files.append(Building(self._target, shard, self._laid[number]))
        return self.files[number]

    def _take(self, file: Building, part: Part, coded: Coded) -> None:
        layer = file.take(part, coded)
        if layer is not None:
            self.layers.append(layer)
        self._progress(coded.nbytes, part.item.name)

    def _tasks(self) -> Iterator[Task]:
        """What is to be done, in order."""
        waiting: Iterator[Task] = iter(())
        for number, shard in enumerate(self._plan.shards):
            if not shard.items:
                waiting = chain(waiting, [partial(_nothing, number)])
            for item in shard.items:
                call = None
                if mode_of(item.coding) and self._plan.options.dictionary == "call":
                    call = _Call(sum(1 for _ in parts_of(item, self._budget)))
                    for part in parts_of(item, self._budget):
                        yield partial(call.count, part, self._reader)
                yield from waiting
                waiting = self._codings(number, item, call)
        yield from waiting

    def _codings(self, number: int, item: Item, call: _Call | None) -> Iterator[Task]:
        """The parts of a tensor; one that has no bytes has one part all the same."""
        parts = parts_of(item, self._budget) if item.nbytes else [Part(item, 0, 0)]
        return (partial(self._code, number, part, call) for part in parts)

    def _code(self, number: int, part: Part, call: _Call | None) -> Done:
        shared = call.dictionaries() if call is not None else None
        return number, part, encode(part, self._reader, shared)

    def index(self) -> str:
        """Text of the index, in the order of the data."""
        homes = {name: shard.name for shard, file in zip(self._plan.shards, self.files, strict=True)
                 for name in file.names()}  # fmt: skip
        total = sum(file.data_bytes for file in self.files)
        value = {"metadata": {"total_size": total}, "weight_map": homes}
        return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
