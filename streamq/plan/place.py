"""Where every byte goes: shards, their order inside, their headers.

Inside a shard the tensors with the widest elements come first, so that each is aligned
to its element without gaps (the format allows none, and torch views need it); among
those of one width all codes, then all scales, each in source order. What a run of
neighbouring weights becomes is therefore one run of bytes per kind of output.
"""

from __future__ import annotations

from typing import NamedTuple

from streamq.checkpoint import Checkpoint
from streamq.formats import compressed_tensors as fmt
from streamq.formats.layout import Layout
from streamq.schemes import Scheme
from streamq.tensors import DTYPES, TensorInfo
from streamq.writer import build_header

from .choose import Weight
from .types import Copy, Member, Options, ShardPlan, Step, slab_rows

_WIDTH_OF = {tag: dtype.itemsize for tag, dtype in DTYPES.items()}
_Placed = tuple[str, str, tuple[int, ...], int, list[int], int]


class _Item(NamedTuple):
    """What stays together in one shard: the weights of a step, or one tensor to copy."""

    position: tuple[int, int]  # of its first member in the source: file, offset
    tensors: list[TensorInfo]
    layouts: list[Layout]  # empty for a copy

    @property
    def bytes_out(self) -> int:
        if not self.layouts:
            return self.tensors[0].nbytes
        return sum([layout.bytes_out for layout in self.layouts])


def place(
    source: Checkpoint, groups: list[list[Weight]], kept: list[TensorInfo], options: Options
) -> list[ShardPlan]:
    """Assign items to shards, name the shards, compute offsets and headers."""
    order = {file: i for i, file in enumerate(source.files)}

    def position(t: TensorInfo) -> tuple[int, int]:
        return order[t.file], t.start

    items = [_Item(position(t), [t], []) for t in kept]
    for group in groups:
        tensors = sorted((w.source for w in group), key=position)
        layouts = [
            fmt.layout(t.shape[0], t.shape[1], t.dtype, options.scheme, options.input_scale)
            for t in tensors
        ]
        items.append(_Item(position(group[0].source), tensors, layouts))
    items.sort(key=lambda item: item.position)
    parts = _split(items, options.shard_size)
    if len(parts) == 1:
        return [_lay_out("model.safetensors", parts[0], options.scheme)]
    return [
        _lay_out(f"model-{i:05d}-of-{len(parts):05d}.safetensors", part, options.scheme)
        for i, part in enumerate(parts, 1)
    ]


def _split(items: list[_Item], shard_size: int | None) -> list[list[_Item]]:
    """As many shards as the source has, or shards of at most ``shard_size`` bytes."""
    shards: list[list[_Item]] = []
    file, filled = -1, 0
    for item in items:
        size = 0 if shard_size is None else item.bytes_out
        if shard_size is None:
            begins = item.position[0] != file
            file = item.position[0]
        else:
            begins = not shards or filled + size > shard_size
        if begins:
            shards.append([])
            filled = 0
        filled += size
        shards[-1].append(item)
    return shards


def _lay_out(name: str, items: list[_Item], scheme: Scheme) -> ShardPlan:
    """Offsets of one shard: first behind its first data byte, then behind its header."""
    # What goes where, by the width of its elements and its slot in the layout: (tensor,
    # dtype, shape, size, list, slot), the last two being where its offset is to be noted.
    regions: dict[tuple[int, int], list[_Placed]] = {}
    starts: list[list[list[int]]] = []
    for _, tensors, layouts in items:
        if not layouts:
            (t,) = tensors
            noted = [[0]]
            entry = (t.name, t.dtype, t.shape, t.nbytes, noted[0], 0)
            regions.setdefault((-_WIDTH_OF[t.dtype], 0), []).append(entry)
        else:
            noted = [[0] * len(layout.entries) for layout in layouts]
            for t, layout, offsets in zip(tensors, layouts, noted, strict=True):
                module = t.name.removesuffix("weight")
                for slot, e in enumerate(layout.entries):
                    entry = (module + e.suffix, e.dtype, e.shape, e.size, offsets, slot)
                    regions.setdefault((-_WIDTH_OF[e.dtype], slot), []).append(entry)
        starts.append(noted)
    described, at = [], 0
    for _, region in sorted(regions.items()):
        for tensor, dtype, shape, size, offsets, slot in region:
            offsets[slot] = at
            described.append((tensor, dtype, shape, at, at + size))
            at += size
    header = build_header(described)
    base = len(header)
    shard = ShardPlan(name, names=[d[0] for d in described], header=header, size=base + at)
    for (_, tensors, layouts), noted in zip(items, starts, strict=True):
        if not layouts:
            shard.copies.append(Copy(tensors[0], base + noted[0][0]))
            continue
        members = [
            Member(t, layout, tuple([base + o for o in offsets]))
            for t, layout, offsets in zip(tensors, layouts, noted, strict=True)
        ]
        shard.steps.append(Step(scheme, tuple(members)))
    return shard


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
