"""Where every byte goes: shards, their headers, and the copies that fill them.

Inside a shard the tensors with the widest elements come first, so that each is aligned to
its element, and otherwise they keep the order of the source. What lies one behind the other in
both is copied in one run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from streamq.checkpoint import MAX_HEADER
from streamq.errors import PlanError
from streamq.tensors import DTYPES
from streamq.views import View
from streamq.writer import build_header, quoted

from .types import Copy, Gather, Out, Shard, Task, Translate, Translated, Transpose

#: Narrower lines than this, in bytes, are put together in memory; wider ones are copied each.
WIDE = 64 << 10


class Placed(NamedTuple):
    """An output tensor under its final name."""

    name: str
    out: Out


def cuts_of(outs: list[Out], homes: list[int], shard_size: int | None) -> list[list[int]]:
    """The tensors of each shard, by number: as many as the source has, or of ``shard_size``."""
    order = sorted(range(len(outs)), key=homes.__getitem__)
    shards: list[list[int]] = []
    filled, at = 0, 0
    while at < len(order):
        home, end = homes[order[at]], at
        while end < len(order) and homes[order[end]] == home:
            end += 1
        unit = order[at:end]
        size = sum(outs[i].nbytes for i in unit)
        if shard_size is None:
            fresh = at == 0 or outs[homes[order[at - 1]]].file != outs[home].file
        else:
            fresh = at == 0 or filled + size > shard_size
        if fresh:
            shards.append([])
            filled = 0
        shards[-1] += unit
        filled, at = filled + size, end
    return shards


def lay_out(name: str, tensors: list[Placed], metadata: Mapping[str, str]) -> Shard:
    """Offsets, header and copies of one shard. Raises PlanError for a header that is too long."""
    order = sorted(tensors, key=lambda p: -DTYPES[p.out.dtype].itemsize)
    by_dtype: dict[str, list[Placed]] = {}
    for p in order:
        by_dtype.setdefault(p.out.dtype, []).append(p)
    regions, at = [], 0
    for dtype, placed in by_dtype.items():
        shapes = {shape: i for i, shape in enumerate(dict.fromkeys(p.out.shape for p in placed))}
        sizes = np.array([p.out.nbytes for p in placed], np.int64)
        starts = at + np.cumsum(sizes) - sizes
        kinds = [shapes[p.out.shape] for p in placed]
        names = quoted([p.name for p in placed])
        regions.append((names, dtype, list(shapes), kinds, starts, sizes))
        at += int(sizes.sum())
    header = build_header(regions, metadata)
    if len(header) - 8 > MAX_HEADER:
        raise PlanError(
            f"the header of {name} would have {len(header) - 8} bytes, the format allows "
            f"{MAX_HEADER}; use a smaller --shard-size."
        )
    placed = [p for same in by_dtype.values() for p in same]
    values: list[tuple[int, bytes]] = []
    tasks: list[Task] = []
    offset = len(header)
    for p in placed:
        if isinstance(p.out.content, bytes):
            values.append((offset, p.out.content))
        else:
            tasks += _tasks(p, offset)
        offset += p.out.nbytes
    return Shard(name, [p.name for p in placed], header, offset, list(_joined(tasks)), values)


def _tasks(p: Placed, offset: int) -> Iterator[Task]:
    """What fills a tensor at an offset of its shard."""
    content = p.out.content
    if isinstance(content, View):
        yield Transpose(offset, content, p.name)
        return
    if isinstance(content, Translated):
        o = p.out
        yield Translate(offset, o.file, o.start, o.nbytes, content.table, p.name)
        return
    assert not isinstance(content, bytes)
    narrow = [c for c in content if c.lines > 1 and c.width < WIDE]
    if narrow and len(narrow) == len(content) and narrow[0].stride > narrow[0].width:
        yield Gather(offset, narrow[0].lines, narrow[0].stride, content, p.name)
        return
    for c in content:
        if c.lines > 1 and c.width < WIDE and c.stride == c.width:
            piece = (c._replace(at=0),)
            yield Gather(offset + c.at, c.lines, c.width, piece, p.name)
            continue
        for line in range(c.lines):
            start, to = c.start + line * c.step, offset + c.at + line * c.stride
            yield Copy(c.file, start, to, c.width, p.name)


def _joined(tasks: list[Task]) -> Iterator[Task]:
    """Tasks with neighbouring copies as one."""
    last: Copy | None = None
    for task in tasks:
        if not isinstance(task, Copy):
            yield task
            continue
        if last is not None:
            n = last.nbytes
            if (task.file, task.start, task.offset) == (last.file, last.start + n, last.offset + n):
                last = last._replace(nbytes=n + task.nbytes)
                continue
            yield last
        last = task
    if last is not None:
        yield last


def metadata_of(
    pieces: Mapping[str, Mapping[str, str]], files: set[str], marker: str, notes: Mapping[str, str]
) -> dict[str, str]:
    """``__metadata__`` of a shard: that of the source files that tensors of it lie in.

    What begins with ``marker`` is about one weight each; ``notes`` are those of this shard.
    """
    found: dict[str, str] = {}
    for file, said in pieces.items():
        if file in files:
            found |= {k: v for k, v in said.items() if not (marker and k.startswith(marker))}
    return found | dict(notes)
