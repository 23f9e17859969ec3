"""Decoding a compressed directory: into files, or only to see that all of it is right."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from streamq.errors import CheckpointError
from streamq.nz.tiles import HEIGHT
from streamq.verifying import Report
from streamq.writer import Destination, ShardWriter, check_destination

from .blocks import Part, decode, parts_of, units_within
from .crc import Sum, of_array
from .opened import Opened, OpenFile
from .ordered import in_order
from .run import HELD, workers_for
from .types import Array, Progress

#: Where a part goes once it is decoded.
Sink = Callable[[Part, Array], None]


class _Found(NamedTuple):
    """What decoding a part found: sums of its bytes and of its stream, or what is wrong."""

    part: Part
    crc: int = 0
    nbytes: int = 0
    stored_crc: int = 0
    stored: int = 0
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What a decompression did."""

    tensors: int
    bytes_out: int
    seconds: float
    workers: int


def decompress(
    opened: Opened, dst: str | os.PathLike[str], *,
    workers: int, max_memory: int, sync: bool = True, overwrite: bool = False,
    progress: Progress | None = None,
) -> Unpacked:  # fmt: skip
    """Write the checkpoint that was compressed, file by file as it was, to the directory ``dst``.

    Every check sum is compared. Raises StreamqError, naming what is damaged; ``dst`` is then as it
    was, and a note on the exception says what stays.
    """
    began = time.perf_counter()
    check_destination(Path(dst), disk_needed(opened), overwrite)
    if damaged := opened.damaged():
        raise CheckpointError(f"{opened.root}: {damaged[0]}.")
    for name in opened.files:  # before a byte is written
        with closing(OpenFile(opened, name)) as source:
            _within(source, workers, max_memory)
    target = Destination(Path(dst), overwrite, sync)
    tensors = 0
    try:
        target.begin()
        with ThreadPoolExecutor(1, "close") as closer:
            closed: list[Future[None]] = []
            for name, file in opened.files.items():
                with closing(OpenFile(opened, name)) as source:
                    writer = target.shard(name, source.header, file.original_bytes)
                    try:
                        sink = partial(_write, writer)
                        walk = _walk(source, workers, max_memory, sink, progress)
                        with closing(walk) as faults:
                            for fault in faults:
                                raise CheckpointError(f"{name}: {fault}.")
                    except BaseException:
                        closer.shutdown()
                        writer.abandon()
                        raise
                    tensors += len(source.items)
                closed.append(closer.submit(target.close_shard, writer))
            for future in closed:
                future.result()
        manifest = opened.manifest
        for name in manifest.files:
            if name not in manifest.restore and name not in manifest.made:
                target.copy_file(opened.root / name, name)
        for name, text in manifest.restore.items():
            target.write_text(name, [text])
        target.commit()
    except BaseException as e:
        if target.begun and target.partial.exists():
            e.add_note(
                f"{target.dst} was not written; {target.partial} stays, the next run replaces it."
            )
        raise
    finally:
        target.close()
    return Unpacked(tensors, opened.bytes_in, time.perf_counter() - began, workers)


def disk_needed(opened: Opened) -> int:
    """Bytes on disk of what decompressing gives."""
    names = opened.manifest.files
    others = sum((opened.root / n).stat().st_size for n in names if (opened.root / n).is_file())
    return opened.bytes_in + others + sum(map(len, opened.manifest.restore.values()))


def verify(
    path: str | os.PathLike[str], *, workers: int, max_memory: int, progress: Progress | None = None
) -> Report:
    """Decode every tensor of a compressed directory and compare every check sum.

    Raises CheckpointError only where there is no such directory; findings are in the report.
    """
    report = Report()
    if not Path(path).is_dir():
        raise CheckpointError(f"{path}: no such directory.")
    try:
        opened = Opened(path)
    except CheckpointError as e:
        report.failures.append(str(e))
        return report
    report.scheme = str(opened.how.get("kind"))
    report.failures += opened.damaged()
    for name in opened.files:
        try:
            source = OpenFile(opened, name)
        except CheckpointError as e:
            report.failures.append(str(e))
            continue
        with closing(source):
            report.tensors += len(source.items)
            report.quantized += sum(item.coding != "raw" for item in source.items)
            walk = _walk(source, workers, max_memory, lambda part, block: None, progress)
            report.failures += [f"{name}: {fault}" for fault in walk]
    return report


def _walk(
    source: OpenFile, workers: int, max_memory: int, sink: Sink, progress: Progress | None
) -> Generator[str, None, None]:
    """Decode all parts of a file; yields what is wrong, at most once a tensor."""
    workers = _within(source, workers, max_memory)
    budget = max_memory // (HELD * workers)
    crc, stored, bad = Sum(), Sum(), ""
    with closing(in_order(_tasks(source, budget, sink), workers)) as results:
        for found, last, beside in results:
            item = found.part.item
            bad = bad or found.fault
            crc.add(found.crc, found.nbytes)
            stored.add(found.stored_crc, found.stored)
            if progress is not None:
                progress(found.nbytes, item.name)
            if not last:
                continue
            sums = source.file.tensors[item.name]
            stored.add(zlib.crc32(beside), len(beside))
            if not bad and (crc.crc, stored.crc) != (sums.crc32, sums.stored_crc32):
                bad = f"tensor {item.name!r} does not have its check sum; it is damaged"
            if bad:
                yield bad
            crc, stored, bad = Sum(), Sum(), ""


def _within(source: OpenFile, workers: int, max_memory: int) -> int:
    """As many workers as memory has room for. Raises PlanError where it has for none."""
    return workers_for(source.items, workers, max_memory, "what they are made of")


def _tasks(
    source: OpenFile, budget: int, sink: Sink
) -> Iterator[Callable[[], tuple[_Found, bool, bytes]]]:
    """For each part: what is found, whether it is the last of its tensor, what is beside that."""
    for item in source.items:
        spans, beside = None, b""
        if item.coding != "raw":
            try:
                spans, beside = source.spans(item)
            except CheckpointError as e:
                fault = _Found(Part(item, 0, 0), fault=str(e).removesuffix("."))
                yield partial(_told, fault)
                continue
        parts = list(parts_of(item, budget)) if item.nbytes else [Part(item, 0, 0)]
        for part in parts:
            yield partial(_decoded, source, part, spans, sink, part is parts[-1], beside)


def _told(found: _Found) -> tuple[_Found, bool, bytes]:
    return found, True, b""


def _decoded(
    source: OpenFile, part: Part, spans: Array | None, sink: Sink, last: bool, beside: bytes
) -> tuple[_Found, bool, bytes]:
    item = part.item
    t = source.stored(item)
    try:
        if spans is None:
            stream = source.read(t.start + part.first, t.start + part.stop)
            entries = np.empty((0, 3), np.int64)
        else:
            here = spans[units_within(part)]
            begin, end = int(here[0, 0]), int(here[-1, 0] + here[-1, 1])
            stream = source.read(t.start + begin, t.start + end)
            entries = here - np.array([begin, 0, 0])
        block, crc, nbytes = decode(part, stream, entries)
    except CheckpointError as e:
        fault = f"tensor {item.name!r}: {str(e).removesuffix('.')}"
        return _Found(part, fault=fault), last, b""
    sink(part, block)
    return _Found(part, crc, nbytes, of_array(stream), stream.nbytes), last, beside


def _write(writer: ShardWriter, part: Part, block: Array) -> None:
    """Write a part to where it was in the original."""
    item, tiling = part.item, part.item.tiling
    unit = writer.unit()
    if tiling is None:
        unit.put(item.start + part.first, block.data)
    elif not tiling.transpose:
        unit.put(item.start + part.first * HEIGHT * tiling.row_bytes, block.data)
    elif block.shape[1] == (row := item.shape[1] * item.itemsize):
        unit.put(item.start, block.reshape(-1).data)
    else:
        start = item.start + part.first * HEIGHT * item.itemsize
        for i, columns in enumerate(block):
            unit.put(start + i * row, columns.data)
    unit.done()
