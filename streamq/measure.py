"""What each candidate scheme loses in each unit of a checkpoint, from one pass over the weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from math import lcm, prod
from typing import NamedTuple

import numpy as np

from streamq.checkpoint import Checkpoint, Span
from streamq.formats import Layout
from streamq.kernels.reference import dequantize, outer_scale
from streamq.planning import Options, Plan, Weights, slab_rows
from streamq.schemes import BYTES, Scheme
from streamq.stored import Array, Stored, bytes_of, read_rows
from streamq.tensors import TensorInfo

#: Told of the bytes of the source that are done, and the name of a tensor.
Progress = Callable[[int, str], None]

#: Bytes of a group on the Hub that a worker holds, to look at twice and to fetch at once.
HELD = 64 << 20

#: Routed experts: the module that holds them, before the number of each.
EXPERTS = re.compile(r"^(.*\bexperts)\.\d+\.")


class Member(NamedTuple):
    """A weight: where it is, and its layout under each candidate, None where it would stay."""

    tensor: TensorInfo
    weights: Weights
    row: int
    layouts: list[Layout | None]

    @property
    def module(self) -> str:
        """Its module's name."""
        return self.tensor.name.removesuffix(".weight")


@dataclass(slots=True)
class Unit:
    """Weights that get one scheme. By candidate: ``sizes`` in bytes and squared ``errors``.

    ``groups``: the members that share a scale above the blocks. A candidate that would leave
    a member as it is has None for both.
    """

    name: str
    groups: dict[int, list[Member]] = field(default_factory=dict)
    sizes: list[int | None] = field(default_factory=list)
    errors: list[float | None] = field(default_factory=list)
    signal: float = 0.0

    @property
    def members(self) -> list[Member]:
        """All its weights."""
        return [m for group in self.groups.values() for m in group]

    @property
    def numel(self) -> int:
        """Weights in the sense of numbers."""
        return sum(m.tensor.numel for m in self.members)


def units_of(plans: Sequence[Plan]) -> list[Unit]:
    """What is allocated, from a plan for each candidate, in the order of the first plan."""
    layouts = [{t.name: layout for t, layout, _, _ in _weights(plan)} for plan in plans]
    units: dict[str, Unit] = {}
    homes: dict[int, str] = {}
    for t, _, w, row in _weights(plans[0]):
        step = int(w.steps[row])
        experts = EXPERTS.match(t.name)
        name = experts[1] if experts else homes.setdefault(step, t.name.removesuffix(".weight"))
        found = [of.get(t.name) for of in layouts]
        unit = units.setdefault(name, Unit(name))
        unit.groups.setdefault(step, []).append(Member(t, w, row, found))
    for unit in units.values():
        for by_candidate in zip(*(m.layouts for m in unit.members), strict=True):
            whole = [layout for layout in by_candidate if layout is not None]
            fits = len(whole) == len(by_candidate)
            unit.sizes.append(sum(layout.bytes_out for layout in whole) if fits else None)
    return list(units.values())


def _weights(plan: Plan) -> Iterator[tuple[TensorInfo, Layout, Weights, int]]:
    for shard in plan.shards:
        for w in shard.weights:
            for row, (t, layout) in enumerate(w.pairs()):
                yield t, layout, w, row


def measure(
    source: Checkpoint, units: list[Unit], candidates: Sequence[Scheme], options: Options,
    workers: int, progress: Progress | None = None,
) -> None:  # fmt: skip
    """Fill in the squared errors of all units, by candidate."""

    def one(unit: Unit) -> tuple[list[float], float]:
        sums, signal = [0.0] * len(candidates), 0.0
        for group in unit.groups.values():
            with source.reading(partial(_reads, group)):
                tops = [_amax(source, m) for m in group] if any(
                    s.needs_amax for s in candidates) else []  # fmt: skip
                for m in group:
                    found, squares = _errors(source, m, candidates, options, max(tops, default=0.0))
                    sums = [a + b for a, b in zip(sums, found, strict=True)]
                    signal += squares
                    if progress:
                        progress(m.tensor.nbytes, m.tensor.name)
        return sums, signal

    with ThreadPoolExecutor(workers) as pool:
        for unit, (sums, signal) in zip(units, pool.map(one, units), strict=True):
            unit.errors = [e if size is not None else None
                           for e, size in zip(sums, unit.sizes, strict=True)]  # fmt: skip
            unit.signal = signal


def _reads(group: list[Member]) -> list[Span]:
    """What a group reads, if it is little enough to be in memory while it is measured."""
    found: list[Span] = []
    for m in group:
        if m.weights.stored is not None:
            found += m.weights.stored[m.row].spans(0, m.tensor.shape[0])
        else:
            found.append((m.tensor.file, m.tensor.start, m.tensor.end))
    return found if sum(end - start for _, start, end in found) <= HELD else []


def _slabs(source: Checkpoint, m: Member) -> Iterator[Array]:
    """The weight's rows, whole blocks at a time, in its dtype; f32 for values of codes."""
    t, (rows, cols) = m.tensor, (m.tensor.shape[0], prod(m.tensor.shape[1:]))
    where = m.weights.stored[m.row] if m.weights.stored is not None else None
    dtype = m.weights.numpy
    step = lcm(where.row_step if where else 1, *(x.row_step for x in m.layouts if x is not None))
    height = slab_rows(step, cols * dtype.itemsize)
    for first in range(0, rows, height):
        count = min(height, rows - first)
        if isinstance(where, Stored):
            yield dequantize(read_rows(source, where, first, count), where.scheme)
        elif where is not None:
            yield where.read(source, first, count)
        else:
            width = cols * dtype.itemsize
            raw = bytes_of(source, t, first * width, count * width)
            yield np.frombuffer(raw, dtype).reshape(count, cols)


def _amax(source: Checkpoint, m: Member) -> float:
    from streamq.kernels import cpu

    return max((float(cpu.amax(x).max(initial=0)) for x in _slabs(source, m)), default=0.0)


def _errors(
    source: Checkpoint, m: Member, candidates: Sequence[Scheme], options: Options, top: float
) -> tuple[list[float], float]:
    """Sums of squared errors by candidate, and of the squares of the weight."""
    from streamq.kernels import cpu

    sums, signal = [0.0] * len(candidates), 0.0
    for x in _slabs(source, m):
        for i, scheme in enumerate(candidates):
            if m.layouts[i] is None:
                continue
            outer = None
            if scheme.needs_amax:
                amax = np.array([top], np.float32)
                outer = outer_scale(amax, scheme, x.dtype, options.numerics).repeat(len(x))
            q = cpu.quantize(x, scheme, numerics=options.numerics, outer=outer)
            found = cpu.energies(x, q, scheme, BYTES, outer).sum(axis=0)
            sums[i] += float(found[1])
        signal += float(np.square(x.astype(np.float32), dtype=np.float64).sum())
    return sums, signal
