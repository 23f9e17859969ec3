"""Every byte of an output against the checksums in its streamq.json, at the speed of the disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from streamq.checkpoint import Checkpoint
from streamq.errors import CheckpointError
from streamq.trust import BLOCK, RECORD, FileSum, Record, block_sum, parse_record

from .report import Report


class Damage(NamedTuple):
    """Bytes of a file that are not what was written."""

    file: str
    start: int
    end: int


def read_record(folder: Path, report: Report) -> Record | None:
    """streamq.json, None where there is none, or where it is damaged and the report says so."""
    try:
        return parse_record((folder / RECORD).read_bytes())
    except FileNotFoundError:
        return None
    except OSError as e:
        report.failures.append(f"{RECORD}: cannot be read: {e.strerror}.")
    except CheckpointError as e:
        report.failures.append(str(e))
    return None


def check_files(folder: Path, record: Record, workers: int, report: Report) -> list[Damage]:
    """Compare sizes and checksums of all files; whole blocks that differ are returned."""
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda item: _check(folder, *item), _pieces(record))
        damages = []
        for failure, damage in chain.from_iterable(found):
            if failure and failure not in report.failures:
                report.failures.append(failure)
            if damage:
                damages.append(damage)
    report.failures += [f"{path.name}: is not in {RECORD}"
                        for path in sorted(folder.glob("*.safetensors"))
                        if path.name not in record.files]  # fmt: skip
    report.files = len(record.files)
    return damages


def _pieces(record: Record) -> Iterator[tuple[str, FileSum, range | None]]:
    """Some blocks of a file for a thread, or None for all of it in order."""
    for name, said in record.files.items():
        count = len(said.crc32)
        for first in range(0, max(1, count), 16):
            yield name, said, range(first, min(first + 16, count))
        if said.sha256 is not None:
            yield name, said, None


def _check(
    folder: Path, name: str, said: FileSum, blocks: range | None
) -> list[tuple[str | None, Damage | None]]:
    """What is wrong: sentences, or blocks."""
    try:
        with (folder / name).open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size != said.size:
                return [(f"{name}: has {size} bytes, {said.size} were written", None)]
            if blocks is None:
                found = hashlib.file_digest(file, "sha256").hexdigest()
                return [] if found == said.sha256 else [(f"{name}: its sha256 differs", None)]
            return [
                (None, Damage(name, i * BLOCK, min((i + 1) * BLOCK, size)))
                for i in blocks
                if block_sum(file.fileno(), i, size) != said.crc32[i]
            ]
    except OSError as e:
        return [(f"{name}: cannot be read: {e.strerror}", None)]


def describe(damages: list[Damage], checkpoint: Checkpoint | None) -> list[str]:
    """Sentences that name what lies in damaged blocks, as far as headers can be read."""
    said = []
    for file, start, end in _joined(damages):
        names = []
        if checkpoint is not None:
            names = [t.name for t in checkpoint.tensors.values()
                     if t.file == file and t.start < end and start < t.end]  # fmt: skip
        where = ""
        if names:
            more = f" and {len(names) - 1} more" if names[1:] else ""
            where = f" ({names[0]!r}{more})"
        said.append(f"{file}: bytes {start} to {end}{where} are not what was written")
    return said


def _joined(damages: list[Damage]) -> list[Damage]:
    """Neighbouring blocks as one."""
    found: list[Damage] = []
    for d in damages:
        if found and (found[-1].file, found[-1].end) == (d.file, d.start):
            found[-1] = found[-1]._replace(end=d.end)
        else:
            found.append(d)
    return found
