"""Where every byte goes: shards, their order inside, their headers.

Inside a shard the tensors with the widest elements come first, so that each is aligned
to its element without gaps (the format allows none, and torch views need it); among
those of one width all codes, then all scales, each in source order. What a run of
neighbouring weights becomes is therefore one run of bytes per kind of output.
"""

from __future__ import annotations

from itertools import accumulate, groupby
from operator import attrgetter, itemgetter
from typing import NamedTuple

from streamq.formats import compressed_tensors as fmt
from streamq.formats.layout import Layout
from streamq.schemes import Scheme
from streamq.tensors import DTYPES, TensorInfo
from streamq.writer import build_header

from .choose import Kept, Weight
from .types import Copy, Member, Options, ShardPlan, Step, slab_rows


class _Item(NamedTuple):
    """What stays together in one shard: the weights of a step, or one tensor to copy."""

    position: int  # of its first member in the source
    file: str  # of the same
    tensors: list[TensorInfo]  # in the order of the source
    layouts: list[Layout]  # empty for a copy

    @property
    def bytes_out(self) -> int:
        if not self.layouts:
            return self.tensors[0].nbytes
        return sum([layout.bytes_out for layout in self.layouts])


def place(groups: list[list[Weight]], kept: list[Kept], options: Options) -> list[ShardPlan]:
    """Assign items to shards, name the shards, compute offsets and headers."""
    known: dict[tuple[tuple[int, ...], str], Layout] = {}

    def layout(t: TensorInfo) -> Layout:
        made = known.get((t.shape, t.dtype))
        if made is None:
            rows, cols = t.shape
            made = fmt.layout(rows, cols, t.dtype, options.scheme, options.input_scale)
            known[t.shape, t.dtype] = made
        return made

    items = [_Item(k.position, k.source.file, [k.source], []) for k in kept]
    for group in groups:
        first = group[0]
        tensors = [w.source for w in sorted(group, key=_POSITION)]
        items.append(_Item(first.position, first.source.file, tensors, list(map(layout, tensors))))
    items.sort(key=_BEGIN)
    parts = _split(items, options.shard_size)
    if len(parts) == 1:
        return [_lay_out("model.safetensors", parts[0], options.scheme)]
    return [
        _lay_out(f"model-{i:05d}-of-{len(parts):05d}.safetensors", part, options.scheme)
        for i, part in enumerate(parts, 1)
    ]


_POSITION = attrgetter("position")
_BEGIN = itemgetter(0)


def _split(items: list[_Item], shard_size: int | None) -> list[list[_Item]]:
    """As many shards as the source has, or shards of at most ``shard_size`` bytes."""
    if shard_size is None:
        return [list(part) for _, part in groupby(items, attrgetter("file"))]
    shards: list[list[_Item]] = []
    filled = 0
    for item in items:
        size = item.bytes_out
        if not shards or filled + size > shard_size:
            shards.append([])
            filled = 0
        filled += size
        shards[-1].append(item)
    return shards


class _Region(NamedTuple):
    """Output tensors of one kind, one behind the other: as lists, for speed."""

    order: tuple[int, int]  # widest elements first, then by slot
    names: list[str]
    dtype: str
    shapes: list[tuple[int, ...]]
    sizes: list[int]
    starts: list[int]  # relative to the first data byte, filled in when all are known


def _lay_out(name: str, items: list[_Item], scheme: Scheme) -> ShardPlan:
    """Offsets of one shard: first behind its first data byte, then behind its header."""
    quantized = [(t, k) for item in items for t, k in zip(item.tensors, item.layouts, strict=False)]
    copied = [item.tensors[0] for item in items if not item.layouts]
    # By the dtype of the weight, because that of the scales may follow it.
    classes = {
        dtype: [(t, layout) for t, layout in quantized if t.dtype == dtype]
        for dtype in dict.fromkeys([t.dtype for t, _ in quantized])
    }
    slots = {dtype: _regions_of(members) for dtype, members in classes.items()}
    copies = {
        dtype: _region(0, dtype, [t for t in copied if t.dtype == dtype])
        for dtype in dict.fromkeys([t.dtype for t in copied])
    }
    regions = [*copies.values(), *(region for one in slots.values() for region in one)]
    regions.sort(key=lambda region: region.order)
    at = 0
    for region in regions:
        offsets = list(accumulate(region.sizes, initial=at))
        at = offsets.pop()
        region.starts.extend(offsets)
    header = build_header((r.names, r.dtype, r.shapes, r.starts, r.sizes) for r in regions)
    base = len(header)
    names = [n for region in regions for n in region.names]
    shard = ShardPlan(name, names=names, header=header, size=base + at)
    places = {
        dtype: zip(*[[base + start for start in region.starts] for region in one], strict=True)
        for dtype, one in slots.items()
    }
    shard.steps = [
        Step(scheme, tuple([
            Member(t, layout, next(places[t.dtype]))
            for t, layout in zip(item.tensors, item.layouts, strict=True)
        ]))
        for item in items if item.layouts
    ]  # fmt: skip
    of_copies = {dtype: iter(region.starts) for dtype, region in copies.items()}
    shard.copies = [Copy(t, base + next(of_copies[t.dtype])) for t in copied]
    return shard


def _regions_of(members: list[tuple[TensorInfo, Layout]]) -> list[_Region]:
    """One region per entry of the layouts, in the order of the entries."""
    modules = [t.name.removesuffix("weight") for t, _ in members]
    regions = []
    for slot, head in enumerate(members[0][1].entries):
        entries = [layout.entries[slot] for _, layout in members]
        names = [module + head.suffix for module in modules]
        shapes, sizes = [e.shape for e in entries], [e.size for e in entries]
        order = (-DTYPES[head.dtype].itemsize, slot)
        regions.append(_Region(order, names, head.dtype, shapes, sizes, []))
    return regions


def _region(slot: int, dtype: str, tensors: list[TensorInfo]) -> _Region:
    order = (-DTYPES[dtype].itemsize, slot)
    shapes, sizes = [t.shape for t in tensors], [t.nbytes for t in tensors]
    return _Region(order, [t.name for t in tensors], dtype, shapes, sizes, [])


def slab_memory(shards: list[ShardPlan]) -> int:
    """Bytes of the buffers of one worker: its widest slab as read, widened to f32, and packed."""
    most = 0
    for layout, t in {
        (m.layout, m.source.shape[1], m.source.dtype): (m.layout, m.source)
        for shard in shards for step in shard.steps for m in step.members
    }.values():  # fmt: skip
        row_bytes = t.shape[1] * DTYPES[t.dtype].itemsize
        rows = slab_rows(layout, row_bytes)
        widened = 4 * t.shape[1] * rows if t.dtype == "F16" else 0
        packed = layout.packing.row_bytes(t.shape[1]) * rows
        scales = 8 * rows * sum(e.shape[-1] for e in layout.entries if e.role == "scale")
        most = max(most, row_bytes * rows + widened + packed + scales)
    return most
