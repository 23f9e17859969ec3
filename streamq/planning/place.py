"""Where every byte goes: shards, their order inside, their headers.

Inside a shard the tensors with the widest elements come first, so that each is aligned
to its element without gaps (the format allows none, and torch views need it); among
those of one width all codes, then all scales, each in the order of the steps. What a run
of neighbouring weights becomes is therefore one run of bytes per kind of output.

All in columns, numpy where they are numbers: 70,000 weights as objects that are sorted,
split and numbered took 0.3 s, as columns 0.1 s.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from streamq.checkpoint import MAX_HEADER
from streamq.errors import PlanError
from streamq.formats import Layout
from streamq.stored import SLAB as STORED_SLAB
from streamq.stored import Stored, Where
from streamq.tensors import DTYPES, TensorInfo
from streamq.writer import build_header, quoted

from .types import SLAB, STRIP, Array, Copy, Options, ShardPlan, Target, Weights, slab_rows

#: The number of a weight in its stack, in the middle of a name.
_ELEMENT = re.compile(r"\[#(\d+)\]")
#: A weight of a stack that has a suffix itself, which others take the place of.
_IN_STACK = re.compile(r"(?<=\.)weight(\[#\d+\])$")


class Rows(NamedTuple):
    """What goes to the output, in the order of the source.

    ``numbers``: of each tensor's target in ``targets``, -1 for what is copied. ``homes``: the
    position of the tensor whose shard it shares, and whose scale if the scheme has one
    above the blocks. ``stored``: what weights with a target are in a quantized source.
    """

    tensors: list[TensorInfo]
    numbers: list[int]
    homes: list[int]
    targets: list[Target]
    stored: Mapping[str, Where]


class _Table(NamedTuple):
    """The rows by home and then as in the source, as columns.

    ``group``: number in ``groups``, whose rows are laid out together: a target and the dtype
    of the weights, or a dtype alone for what is copied. ``kind``: number of the layout, -1 for
    what is copied. ``places``: file number, offset.
    """

    tensors: list[TensorInfo]
    homes: Array
    group: Array
    kind: Array
    places: Array
    groups: list[tuple[Target | None, str]]
    layouts: list[Layout]
    stacks: bool  # whether any is one weight of a stack

    def part(self, rows: Array | slice) -> _Table:
        """Some of the rows."""
        picked = np.arange(len(self.tensors))[rows].tolist()
        tensors = [self.tensors[i] for i in picked]
        columns = (self.homes[rows], self.group[rows], self.kind[rows], self.places[rows])
        return _Table(tensors, *columns, self.groups, self.layouts, self.stacks)


def place(rows: Rows, files: list[str], options: Options) -> list[ShardPlan]:
    """Assign tensors to shards, name the shards, compute offsets and headers."""
    table = _table(rows, files, options)
    parts = list(_split(table, options.shard_size))
    if len(parts) == 1:
        return [_lay_out("model.safetensors", parts[0], rows.stored)]
    return [
        _lay_out(f"model-{i:05d}-of-{len(parts):05d}.safetensors", part, rows.stored)
        for i, part in enumerate(parts, 1)
    ]


def _table(rows: Rows, files: list[str], options: Options) -> _Table:
    groups: dict[tuple[int, str], int] = {}
    kinds: dict[tuple[tuple[int, ...], str, int], int] = {}
    group, kind = [], []
    for (_, dtype, shape, _, _), number in zip(rows.tensors, rows.numbers, strict=True):
        group.append(groups.setdefault((number, dtype), len(groups)))
        kind.append(-1 if number < 0 else kinds.setdefault((shape, dtype, number), len(kinds)))
    layouts = []
    for shape, dtype, number in kinds:
        scheme, fmt, _, _ = rows.targets[number]
        layouts.append(fmt.layout_of(shape, dtype, scheme, options.input_scale))
    named = [(rows.targets[n] if n >= 0 else None, dtype) for n, dtype in groups]
    file_numbers = {file: i for i, file in enumerate(files)}
    places = np.array([[file_numbers[t.file] for t in rows.tensors],
                       [t.start for t in rows.tensors]]).T  # fmt: skip
    homes = np.array(rows.homes)
    columns = homes, np.array(group), np.array(kind), places
    stacks = "[#" in "\n".join([t.name for t in rows.tensors])
    table = _Table(rows.tensors, *columns, named, layouts, stacks)
    if stacks:
        return table.part(np.lexsort((_numbers(rows.tensors), homes)))
    return table.part(np.argsort(homes, kind="stable"))


def _numbers(tensors: list[TensorInfo]) -> Array:
    """The number of each weight in its stack: files may have ``experts.10`` before 2."""
    found = [_ELEMENT.search(t.name) if t.name.endswith("]") else None for t in tensors]
    return np.array([int(m[1]) if m else 0 for m in found])


def _split(table: _Table, shard_size: int | None) -> Iterator[_Table]:
    """A shard per file of the source that begins a group, or shards of ``shard_size`` bytes."""
    firsts = np.flatnonzero(np.diff(table.homes, prepend=-1))
    if shard_size is None:
        file = table.places[firsts, 0]
        cuts = firsts[np.flatnonzero(np.diff(file, prepend=-1))].tolist()
    else:
        out = [layout.bytes_out for layout in table.layouts]
        sizes = [t.nbytes if k < 0 else out[k]
                 for t, k in zip(table.tensors, table.kind.tolist(), strict=True)]  # fmt: skip
        cuts, filled = [], 0
        units = np.add.reduceat(np.array(sizes), firsts).tolist()
        for first, size in zip(firsts.tolist(), units, strict=True):
            if not cuts or filled + size > shard_size:
                cuts.append(first)
                filled = 0
            filled += size
    for begin, end in zip(cuts, [*cuts[1:], len(table.tensors)], strict=True):
        yield table.part(slice(begin, end))


class _Region(NamedTuple):
    """Output tensors of one kind, one behind the other; names as JSON spells them."""

    names: list[str]
    dtype: str
    shapes: list[tuple[int, ...]]  # of each layout
    kinds: list[int]  # of each tensor the number of its shape
    sizes: Array


def _lay_out(name: str, table: _Table, stored: Mapping[str, Where]) -> ShardPlan:
    """Offsets of one shard: first behind its first data byte, then behind its header."""
    parts: dict[int, _Table] = {}
    regions: dict[tuple[int, int], _Region] = {}
    for number in dict.fromkeys(table.group.tolist()):
        part = parts[number] = table.part(table.group == number)
        target, dtype = table.groups[number]
        if target is None:
            regions[number, -1] = _region_of_copies(dtype, part.tensors)
            continue
        for slot, region in enumerate(_regions(part)):
            regions[number, slot] = region
    order = sorted(regions, key=lambda key: (-DTYPES[regions[key].dtype].itemsize, key[1]))
    starts: dict[tuple[int, int], Array] = {}
    at = 0
    for key in order:
        sizes = regions[key].sizes
        starts[key] = at + np.cumsum(sizes) - sizes
        at += int(sizes.sum())
    shown = [(regions[key], starts[key]) for key in order]
    if table.stacks:
        shown = [_stacked(*region) for region in shown]
    columns = ((*region[:4], begins, region.sizes) for region, begins in shown)
    header = build_header(columns, _notes(table.groups, parts, stored))
    base = len(header)
    copies = [
        Copy(t, start)
        for number, part in parts.items() if table.groups[number][0] is None
        for t, start in zip(part.tensors, (base + starts[number, -1]).tolist(), strict=True)
    ]  # fmt: skip
    weights = [
        _weights(part, number, base, starts, stored)
        for number, part in parts.items() if table.groups[number][0] is not None
    ]  # fmt: skip
    names = [tensor for region, _ in shown for tensor in region.names]
    return ShardPlan(name, weights, copies, names, header, base + at)


def _notes(
    groups: list[tuple[Target | None, str]],
    parts: dict[int, _Table],
    stored: Mapping[str, Where],
) -> dict[str, str]:
    """What formats say in ``__metadata__`` of the weights of a shard."""
    copied = {s.codes.name: s for s in stored.values() if isinstance(s, Stored)}
    notes = {}
    for number, part in parts.items():
        target = groups[number][0]
        if target is None:
            kept = [copied[t.name] for t in part.tensors if t.name in copied]
            said = [(s.format, s.name, s.shape, s.scheme) for s in kept]
        elif target.format.note(part.tensors[0].shape, target.scheme) is None:
            continue  # nor of another
        else:
            said = [(target.format, t.name, t.shape, target.scheme) for t in part.tensors]
        for fmt, name, shape, scheme in said:
            if (note := fmt.note(shape, scheme)) is not None:
                notes[f"{fmt.name}:{name}"] = note
    return notes


def _weights(
    table: _Table, number: int, base: int, starts: dict[tuple[int, int], Array],
    stored: Mapping[str, Where],
) -> Weights:  # fmt: skip
    target, dtype = table.groups[number]
    assert target is not None
    used, kind = np.unique(table.kind, return_inverse=True)
    layouts = [table.layouts[k] for k in used.tolist()]
    columns = [base + starts[number, slot] for slot in range(len(layouts[0].entries))]
    return Weights(
        target, dtype, table.tensors, layouts, kind, table.homes, table.places,
        np.stack(columns, axis=1),
        None if target.origin == "floats" else [stored[t.name] for t in table.tensors],
    )  # fmt: skip


def _regions(weights: _Table) -> Iterator[_Region]:
    """One region per entry of the layouts, in the order of the entries."""
    names = [t.name.removesuffix("weight") for t in weights.tensors]
    if weights.stacks:
        names = [_IN_STACK.sub(r"\1", name) for name in names]
    modules = quoted(names)
    used, kind = np.unique(weights.kind, return_inverse=True)
    layouts = [weights.layouts[k] for k in used.tolist()]
    for slot, head in enumerate(layouts[0].entries):
        names = [module + head.suffix for module in modules]
        shapes = [layout.entries[slot].shape for layout in layouts]
        sizes = np.array([layout.sizes[slot] for layout in layouts])[kind]
        yield _Region(names, head.dtype, shapes, kind.tolist(), sizes)


def _stacked(region: _Region, starts: Array) -> tuple[_Region, Array]:
    """A region with the weights of each stack as the one tensor that a file has of them."""
    rows: dict[str, list[int]] = {}
    for i, name in enumerate(region.names):
        rows.setdefault(_ELEMENT.sub("", name), []).append(i)
    shapes = []
    for members in rows.values():
        shape = region.shapes[region.kinds[members[0]]]
        shapes.append((len(members), *shape) if "[#" in region.names[members[0]] else shape)
    firsts = [members[0] for members in rows.values()]
    sizes = np.array([region.sizes[members].sum() for members in rows.values()])
    kinds = list(range(len(shapes)))
    return _Region(list(rows), region.dtype, shapes, kinds, sizes), starts[firsts]


def _region_of_copies(dtype: str, tensors: list[TensorInfo]) -> _Region:
    shapes = list(dict.fromkeys(t.shape for t in tensors))
    numbers = {shape: i for i, shape in enumerate(shapes)}
    sizes = np.array([t.nbytes for t in tensors])
    names = quoted([t.name for t in tensors])
    return _Region(names, dtype, shapes, [numbers[t.shape] for t in tensors], sizes)


def slab_memory(shards: list[ShardPlan]) -> int:
    """Bytes of the buffers of one worker for its largest slab.

    As read, widened to f32, packed, its scales, the rows that kernels unpack, and what is
    gathered of transposed outputs.
    """
    most = 0
    for layout, dtype, stored in {
        (layout, w.dtype, w.stored is not None)
        for shard in shards for w in shard.weights for layout in w.layouts
    }:  # fmt: skip
        itemsize = DTYPES[dtype].itemsize
        slab = STORED_SLAB if stored else SLAB
        # Several small weights are a slab of up to SLAB bytes, whatever the height of one's own.
        height = slab_rows(layout.row_step, layout.cols * itemsize, slab)
        rows = max(height, -(-slab // (layout.cols * itemsize)))
        read = layout.cols * itemsize * rows
        widened = 4 * layout.cols * rows if dtype == "F16" or stored else 0
        packed = (layout.packing.row_bytes(layout.cols) + layout.cols * (not layout.flat)) * rows
        scales = 8 * rows * sum(e.per_row for e in layout.entries if e.role == "scale")
        strip = min(layout.gathered, STRIP)
        most = max(most, read + widened + packed + scales + 6 * layout.cols + strip)
    return most


def refuse_impossible(shards: list[ShardPlan]) -> None:
    """Raise PlanError for a header that is too long or a name that would be written twice."""
    for shard in shards:
        if len(shard.header) - 8 > MAX_HEADER:
            raise PlanError(
                f"the header of {shard.name} would have {len(shard.header) - 8} bytes, the format "
                f"allows {MAX_HEADER}; use a smaller --shard-size."
            )
    names = [name for shard in shards for name in shard.names]
    if len(set(names)) != len(names):
        name, _ = Counter(names).most_common(1)[0]
        raise PlanError(
            f"tensor {name!r} is in the source and would be written for a quantized weight too; "
            "the source is partly quantized, or leave the weight with --ignore."
        )
