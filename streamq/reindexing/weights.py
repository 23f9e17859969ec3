"""Weights as rows: what some rows of a module are in each of its tensors.

A format tells, by the layout of a weight, what every so many rows become in each tensor and on
which axis. That is all there is to know for putting rows of several weights together, and
for taking rows out of one; an unquantized weight or a bias is the simplest such tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import numpy as np

from streamq.checkpoint import Checkpoint
from streamq.errors import PlanError
from streamq.formats import Entry
from streamq.stored import Found, Stored, bytes_of, stored_of
from streamq.tensors import DTYPES, TensorInfo

from .types import Out, Piece

#: The tensor of the shape of a weight before it was packed (compressed-tensors).
_SHAPE = "weight_shape"
_BIAS = "bias"


class Part(NamedTuple):
    """A tensor of a weight and how its rows lie in it."""

    tensor: TensorInfo
    entry: Entry


class Weight(NamedTuple):
    """The tensors of a module, by suffix; ``shape`` of the weight, ``stored`` if quantized."""

    module: str
    shape: tuple[int, ...]
    parts: dict[str, Part]
    stored: Stored | None


class Rows(NamedTuple):
    """``times`` blocks of ``rows`` rows of a weight, the first at ``first``, ``step`` apart."""

    weight: Weight
    first: int
    rows: int
    times: int = 1
    step: int = 0


class Made(NamedTuple):
    """The tensors of a new module, and what the format notes of its weight, if anything."""

    module: str
    outs: list[Out]
    note: str | None


def weight_of(
    source: Checkpoint, found: Found, module: str, tensors: dict[str, TensorInfo]
) -> Weight:
    """The weight of a module from all of its tensors by suffix.

    Raises PlanError for a tensor whose rows are not known.
    """
    stored, parts = None, {}
    if module in found.parts:
        stored = stored_of(source, found, module, found.parts[module])
        shape = stored.shape
        parts = {e.suffix: Part(stored.tensors[e.suffix], e) for e in stored.layout.entries}
    else:
        weight = tensors.get("weight")
        if weight is None or len(weight.shape) < 2 or 0 in weight.shape:
            t = next(iter(tensors.values()))
            raise PlanError(
                f"{module!r} has {t.name!r} and no weight of two dimensions to fuse or split."
            )
        shape = weight.shape
        if weight.nbytes % shape[0]:
            raise PlanError(f"a row of {weight.name!r} is not a whole number of bytes.")
        parts["weight"] = Part(weight, _plain("weight", weight.dtype, shape))
    for suffix, t in tensors.items():
        if suffix in parts:
            continue
        if suffix != _BIAS or t.shape != shape[:1]:
            raise PlanError(
                f"tensor {t.name!r} of shape {list(t.shape)} is no part of a weight of shape "
                f"{list(shape)} that streamq can fuse or split."
            )
        parts[_BIAS] = Part(t, _plain(_BIAS, t.dtype, t.shape))
    return Weight(module, shape, parts, stored)


def _plain(suffix: str, dtype: str, shape: tuple[int, ...]) -> Entry:
    """A row-major tensor, one row of it for each row of the weight."""
    size = prod(shape) * DTYPES[dtype].bits // 8
    return Entry(suffix, "codes", dtype, shape, size, 1, size // shape[0])


def make(source: Checkpoint, module: str, runs: list[Rows]) -> Made:
    """The tensors of a weight that is made of rows of others, in the order given.

    Raises PlanError where they differ in more than their rows, or where rows that share an
    entry of a tensor (a scale, a word) would be parted.
    """
    weights = list({r.weight.module: r.weight for r in runs}.values())
    head = weights[0]
    for other in weights[1:]:
        _refuse_unlike(head, other)
    shape = (sum(r.rows * r.times for r in runs), *head.shape[1:])
    entries = _entries(head.stored, module, shape) if head.stored else {}
    outs = []
    for suffix, part in head.parts.items():
        t = part.tensor
        name = module + t.name[len(head.module) :]
        place = (t.file, t.start)
        entry = entries.get(suffix) or _plain(suffix, t.dtype, (shape[0], *t.shape[1:]))
        if entry.rows:
            pieces = tuple(_pieces(runs, suffix, entry, module))
            outs.append(Out(name, entry.dtype, entry.shape, pieces, *place))
        elif suffix == _SHAPE:
            value = np.array(shape, DTYPES[entry.dtype].numpy).tobytes()
            outs.append(Out(name, entry.dtype, entry.shape, value, *place))
        else:
            _refuse_unequal(source, weights, suffix)
            piece = Piece(t.file, t.start, 0, t.nbytes)
            outs.append(Out(name, t.dtype, t.shape, (piece,), *place))
    s = head.stored
    return Made(module, outs, s.format.note(shape, s.scheme) if s else None)


def _entries(s: Stored, module: str, shape: tuple[int, ...]) -> dict[str, Entry]:
    """The tensors of a weight of another shape that is quantized as ``s``, by suffix."""
    try:
        tag = s.format.scale_tag(s.tensors, s.scheme)
        layout = s.format.as_found(s.format.layout_of(shape, tag, s.scheme), s.tensors)
        return {e.suffix: e for e in layout.entries}
    except PlanError as e:
        raise PlanError(f"{module!r} of shape {list(shape)}: {e}.") from None


def _refuse_unlike(a: Weight, b: Weight) -> None:
    """Raise PlanError where two weights cannot be one."""
    for suffix in [*a.parts, *b.parts]:
        for one, other in ((a, b), (b, a)):
            if suffix not in one.parts:
                raise PlanError(
                    f"{other.parts[suffix].tensor.name!r} has no counterpart in {one.module!r}: "
                    "weights that are fused have the same tensors."
                )
        s, t = a.parts[suffix].tensor, b.parts[suffix].tensor
        if s.dtype != t.dtype:
            raise PlanError(
                f"{s.name!r} is {s.dtype} and {t.name!r} is {t.dtype}: weights that are fused "
                "have one dtype."
            )
    if a.shape[1:] != b.shape[1:]:
        raise PlanError(
            f"the weight of {a.module!r} has shape {list(a.shape)} and that of {b.module!r} "
            f"{list(b.shape)}: weights that are fused have the same columns."
        )
    if a.stored and b.stored and a.stored.scheme != b.stored.scheme:
        raise PlanError(
            f"{a.module!r} is in {a.stored.scheme.name} and {b.module!r} in "
            f"{b.stored.scheme.name}, or their groups differ: weights that are fused share one "
            "scheme."
        )


def _refuse_unequal(source: Checkpoint, weights: list[Weight], suffix: str) -> None:
    """Raise PlanError where what a weight has once is not the same in all of them."""
    first, *others = (w.parts[suffix].tensor for w in weights)
    value = bytes_of(source, first, 0, first.nbytes) if others else b""
    for t in others:
        if t.shape != first.shape or bytes_of(source, t, 0, t.nbytes) != value:
            raise PlanError(
                f"{t.name!r} is not equal to {first.name!r}, and a fused weight has one of them; "
                "quantize the members with one, as streamq convert does."
            )


def _pieces(runs: list[Rows], suffix: str, to: Entry, module: str) -> Iterator[Piece]:
    """Where the rows of a tensor come from."""
    total, done = sum(r.rows * r.times for r in runs), 0
    for r in runs:
        t, e = r.weight.parts[suffix]
        last = r.first + (r.times - 1) * r.step + r.rows
        ends = done + r.rows * r.times == total
        starts, sizes = {r.first % e.rows, r.step % e.rows, done % to.rows}, set()
        # What ends a tensor may be less than a whole entry of it.
        if r.times > 1 or last < r.weight.shape[0]:
            starts.add(r.rows % e.rows)
            sizes.add(r.rows // e.rows * e.nbytes)
        else:
            sizes.add(e.stride - r.first // e.rows * e.nbytes)
        if r.times > 1 or not ends:
            starts.add(r.rows % to.rows)
            sizes.add(r.rows // to.rows * to.nbytes)
        else:
            sizes.add(to.stride - done // to.rows * to.nbytes)
        if starts != {0} or len(sizes) > 1 or e.lines != to.lines:
            raise PlanError(
                f"tensor {t.name!r} has one entry for every {e.rows} rows of {r.weight.module!r}, "
                f"which {module!r} would part: it takes {r.rows} rows from row {r.first} to its "
                f"own row {done}; leave them as they are."
            )
        (width,) = sizes
        start, at = t.start + r.first // e.rows * e.nbytes, done // to.rows * to.nbytes
        step = r.step // e.rows * e.nbytes
        if e.lines == 1:
            yield Piece(t.file, start, at, width, r.times, step, width)
        else:
            for i in range(r.times):
                first = start + i * step
                yield Piece(t.file, first, at + i * width, width, e.lines, e.stride, to.stride)
        done += r.rows * r.times
