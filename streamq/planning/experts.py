"""Experts that a source has in one tensor of three dimensions, as weights of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from streamq.checkpoint import Checkpoint
from streamq.errors import PlanError
from streamq.families import ExpertLayout, Family, collapse, expert_name, is_expert_stack
from streamq.formats import Format
from streamq.formats.mlx import Mlx
from streamq.recipe import LAYOUTS
from streamq.tensors import DTYPES, FLOATS, TensorInfo, element
from streamq.views import View

#: Why a stack stays in one piece, from it and the experts in it; None for one that is split.
Stays = Callable[[TensorInfo, list[TensorInfo]], str | None]


class Experts(NamedTuple):
    """What stacks of experts are split into.

    ``views``: by name, where elements of one expert do not lie in a row. ``rows``: by stack
    those that do, which are tensors like any other. ``whole``: why a stack stays as it is.
    """

    views: dict[str, View]
    rows: dict[str, list[TensorInfo]]
    whole: dict[str, str]


def experts_of(source: Checkpoint, family: Family, fmt: Format, stays: Stays) -> Experts:
    """The experts that the format wants, from the tensors that have those of a layer in one.

    gpt-oss keeps its ``[experts, in, out]`` together and transposes each; other formats get
    a weight ``[out, in]`` for each projection of each expert. Raises PlanError for a stack
    that does not lie as the table says, or that no loader reads when it is split.
    """
    experts = Experts({}, {}, {})
    split: dict[str, str] = {}
    for t in source.tensors.values():
        if len(t.shape) != 3 or t.dtype not in FLOATS or 0 in t.shape:
            continue
        layout = family.layout_of(t.name)
        if layout is None or (fmt.stacks and not layout.interleaved):
            continue
        pieces = transposed(t) if fmt.stacks else dict(_pieces(t, layout))
        if why := stays(t, _tensors(t, pieces)):
            experts.whole[t.name] = why
            continue
        layout.refuse_unproved(t.name, t.shape, family.config)
        if fmt.stacks:
            experts.views.update(pieces)
            continue
        split.setdefault(t.name.removesuffix(".weight").rpartition(".")[0], t.name)
        _refuse_unread(t, layout, fmt, family)
        bias = source.tensors.get(t.name.removesuffix(".weight") + "_bias")
        for stack, found in ((t, pieces), (bias, dict(_biases(bias, layout, t)) if bias else {})):
            if stack is None:
                continue
            if all(v.in_a_row for v in found.values()):
                experts.rows[stack.name] = _tensors(stack, found)
            else:
                experts.views.update(found)
    for name, why in experts.whole.items():
        beside = split.get(name.removesuffix(".weight").rpartition(".")[0])
        if beside is not None:
            raise PlanError(
                f"{name!r} would stay as it is ({why}) and {beside!r} not, but loaders take the "
                f"experts of a layer together; convert both, or leave both with {_ignore(name)}."
            )
    return experts


def _ignore(name: str) -> str:
    """The option that leaves the experts of such a layer as they are."""
    return f"--ignore '{collapse(name.removesuffix('.weight').rpartition('.')[0])}.*'"


def _tensors(t: TensorInfo, pieces: dict[str, View]) -> list[TensorInfo]:
    return [TensorInfo(name, t.dtype, v.shape, t.file, v.start) for name, v in pieces.items()]


def _refuse_unread(t: TensorInfo, layout: ExpertLayout, fmt: Format, family: Family) -> None:
    elsewhere = isinstance(fmt, Mlx) and not fmt.has_stacks(family.model_type)
    if layout.unread or elsewhere:
        why = layout.unread or f"stacks of {family.model_type} are not written for {fmt.name} yet"
        raise PlanError(
            f"tensor {t.name!r} holds the experts of a layer in one: {why}, or leave them with "
            f"{_ignore(t.name)}."
        )


def _pieces(t: TensorInfo, layout: ExpertLayout) -> Iterator[tuple[str, View]]:
    """A weight ``[out, in]`` for each projection of each expert, in the order of the file."""
    parts = layout.parts_of(t.name)
    count, first, second = t.shape
    out, cols = (second, first) if layout.transposed else (first, second)
    rows, itemsize = out // len(parts), DTYPES[t.dtype].itemsize
    # Elements from one row of an expert to the next, and from one column to the next.
    down, right = (1, out) if layout.transposed else (cols, 1)
    for e in range(count):
        for i, part in enumerate(parts):
            row = i if layout.interleaved else i * rows
            start = t.start + (e * out * cols + row * down) * itemsize
            step = down * len(parts) if layout.interleaved else down
            name = expert_name(t.name, e, part) + ".weight"
            yield name, View(t, start, rows, cols, step, right)


def _biases(bias: TensorInfo, layout: ExpertLayout, t: TensorInfo) -> Iterator[tuple[str, View]]:
    """A vector for each projection of each expert, from ``[experts, out]``."""
    parts = layout.parts_of(t.name)
    if len(bias.shape) != 2 or bias.shape[0] != t.shape[0] or bias.shape[1] % len(parts):
        raise PlanError(
            f"tensor {bias.name!r} of shape {list(bias.shape)} is no bias of the "
            f"{t.shape[0]} experts in {t.name!r}."
        )
    out = bias.shape[1]
    rows, itemsize = out // len(parts), DTYPES[bias.dtype].itemsize
    for e in range(t.shape[0]):
        for i, part in enumerate(parts):
            start = bias.start + (e * out + (i if layout.interleaved else i * rows)) * itemsize
            step = len(parts) if layout.interleaved else 1
            yield expert_name(t.name, e, part) + ".bias", View(bias, start, rows, 1, step, 0)


def undeclared(t: TensorInfo, family: Family) -> PlanError | None:
    """The error for what looks like a stack of experts and cannot be split."""
    if 0 in t.shape or not is_expert_stack(t.name, t.shape):
        return None
    ignore = f"leave it unquantized with {_ignore(t.name)}."
    if family.layout_of(t.name) is not None:
        if t.dtype in FLOATS:
            return None
        return PlanError(
            f"tensor {t.name!r} holds the experts of a layer in one and is {t.dtype}, which is "
            f"not quantized further; {ignore}"
        )
    pattern = collapse(t.name)
    return PlanError(
        f"tensor {t.name!r} of shape {list(t.shape)} holds the experts of a layer in one, and how "
        f"they lie is not known for the model_type {family.model_type!r}; declare it in a recipe, "
        f'[[experts]] with pattern = "{pattern}" and '
        f"layout = {' or '.join(map(repr, LAYOUTS))}, or {ignore}"
    )


def straight(t: TensorInfo) -> dict[str, View]:
    """A weight ``[out, in]`` for each expert of ``[experts, out, in]``."""
    count, rows, cols = t.shape
    size = rows * cols * DTYPES[t.dtype].itemsize
    return {
        element(t.name, i): View(t, t.start + i * size, rows, cols, cols, 1) for i in range(count)
    }


def transposed(t: TensorInfo) -> dict[str, View]:
    """A weight ``[out, in]`` for each expert of ``[experts, in, out]``."""
    count, cols, rows = t.shape
    size = rows * cols * DTYPES[t.dtype].itemsize
    return {
        element(t.name, i): View(t, t.start + i * size, rows, cols, 1, rows) for i in range(count)
    }
