"""What a compressed file holds, and where.

Header, then what has a known size, widest elements first so that each is aligned, then the
streams one behind the other. The header gets the room that it would need if nothing shrank:
offsets have at most as many digits then, and what is left over is spaces.
"""

from __future__ import annotations

from itertools import groupby
from math import prod
from typing import NamedTuple

import numpy as np

from streamq.checkpoint import MAX_HEADER
from streamq.errors import PlanError
from streamq.tensors import DTYPES
from streamq.writer import build_header, quoted

from .blocks import most_bytes, units_of
from .types import Item, Shard, mode_of


class Entry(NamedTuple):
    """A tensor of a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return prod(self.shape) * DTYPES[self.dtype].bits // 8


class Laid(NamedTuple):
    """``fixed``: what has a known size. ``starts``: its offsets in the file, by name.

    ``room``: bytes of the header. ``known``: where the first of ``streams`` begins. ``most``: bytes
    that the file has if nothing shrinks.
    """

    fixed: list[Entry]
    starts: dict[str, int]
    streams: list[Item]
    room: int
    known: int
    most: int


def beside(item: Item) -> tuple[str, str]:
    """The names of index and info of a weight that the sparse codec compressed."""
    base = item.name.removesuffix("weight")
    return f"{base}index", f"{base}info"


def lay_out(shard: Shard) -> Laid:
    """Where everything goes. Raises PlanError for names that would be there twice."""
    fixed = []
    for item in shard.items:
        if item.coding == "raw":
            fixed.append(Entry(item.name, item.dtype, item.shape))
        elif mode_of(item.coding):
            index, info = beside(item)
            fixed += [Entry(index, "I8", (8 * units_of(item),)), Entry(info, "I64", (5,))]
    fixed.sort(key=lambda e: -DTYPES[e.dtype].itemsize)
    streams = [item for item in shard.items if item.coding != "raw"]
    names = [*(e.name for e in fixed), *(item.name for item in streams)]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise PlanError(f"{twice!r} is in the source already, and compressing needs the name.")
    most = [stream_entry(item, most_bytes(item)) for item in streams]
    room = len(header_of([*fixed, *most], shard.metadata))
    if room - 8 > MAX_HEADER:
        raise PlanError(
            f"the header of {shard.name} would have {room - 8} bytes, the format allows "
            f"{MAX_HEADER}; use `streamq reindex --shard-size` first."
        )
    starts, at = {}, room
    for e in fixed:
        starts[e.name] = at
        at += e.nbytes
    return Laid(fixed, starts, streams, room, at, at + sum(e.nbytes for e in most))


def stream_entry(item: Item, nbytes: int) -> Entry:
    """A stream as a tensor."""
    return Entry(item.name, "I8" if mode_of(item.coding) else "U8", (nbytes,))


def header_of(entries: list[Entry], metadata: dict[str, str]) -> bytes:
    """The header of a file with these tensors in this order."""
    regions, at = [], 0
    for dtype, group in groupby(entries, lambda e: e.dtype):
        same = list(group)
        sizes = np.array([e.nbytes for e in same], np.int64)
        starts = at + np.cumsum(sizes) - sizes
        names = quoted([e.name for e in same])
        shapes = [e.shape for e in same]
        regions.append((names, dtype, shapes, [*range(len(same))], starts, sizes))
        at += int(sizes.sum())
    return build_header(regions, metadata)
