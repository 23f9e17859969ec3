"""Experts that a source has one by one, in the stacks that mlx-lm reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from streamq.errors import PlanError
from streamq.families import Family
from streamq.formats import Format
from streamq.formats.mlx import Mlx
from streamq.stored import Stored, Where
from streamq.tensors import TensorInfo, element

from .choose import Choice


class Stacks(NamedTuple):
    """``tensors`` and ``weights``: with the names of weights of stacks. ``homes``: by position,
    of each weight of a stack the first one. ``modules``: the stack of each expert's module.
    """

    tensors: list[TensorInfo]
    weights: dict[str, Where]
    homes: dict[int, int]
    modules: dict[str, str]


def stacks_of(
    tensors: list[TensorInfo], weights: Mapping[str, Where], choice: Choice, family: Family,
    fmt: Format,
) -> Stacks:  # fmt: skip
    """Experts as weights of the stacks that the format has of them; others as they are.

    Raises PlanError for a stack that would be quantized in part, or has no expert of a number.
    """
    found: dict[str, dict[int, int]] = {}
    for i, t in enumerate(tensors if isinstance(fmt, Mlx) else ()):
        if (place := place_of(t.name, family, fmt)) and not _is_copied(t, weights, choice, i):
            found.setdefault(place[0], {})[place[1]] = i
    if not found:
        return Stacks(tensors, dict(weights), {}, {})
    made = Stacks(list(tensors), dict(weights), {}, {})
    for stack, members in found.items():
        _refuse_uneven(stack, members, tensors, choice)
        for number, i in members.items():
            name = element(stack, number)
            made.tensors[i] = tensors[i]._replace(name=name)
            made.homes[i] = members[0]
            module = tensors[i].name.removesuffix(".weight")
            made.modules[module] = stack.removesuffix(".weight")
            if (w := made.weights.pop(tensors[i].name, None)) is not None:
                made.weights[name] = w._replace(name=name) if isinstance(w, Stored) else w
    return made


def place_of(name: str, family: Family, fmt: Format) -> tuple[str, int] | None:
    """The stack that the format has a tensor in, and its number there, or None."""
    return fmt.place_of(name, family.model_type) if isinstance(fmt, Mlx) else None


def _is_copied(t: TensorInfo, weights: Mapping[str, Where], choice: Choice, i: int) -> bool:
    """Whether the tensors of a quantized weight stay as they are, names and all."""
    return choice.numbers[i] < 0 and t.name in weights


def _refuse_uneven(
    stack: str, members: dict[int, int], tensors: list[TensorInfo], choice: Choice
) -> None:
    missing = next((n for n in range(len(members)) if n not in members), None)
    if missing is not None:
        raise PlanError(
            f"{stack!r} would hold {len(members)} experts and none has the number {missing}; "
            "mlx-lm wants all experts of a layer, so convert the whole checkpoint."
        )
    first = members[0]
    for i in members.values():
        if choice.numbers[i] != choice.numbers[first]:
            a, b = ("quantized" if choice.numbers[n] >= 0 else f"left ({choice.kept.get(n)})"
                    for n in (first, i))  # fmt: skip
            said = f"{a} and {b}" if a != b else "of two schemes"
        elif (tensors[i].dtype, tensors[i].shape) != (tensors[first].dtype, tensors[first].shape):
            a, b = (f"{tensors[n].dtype} {list(tensors[n].shape)}" for n in (first, i))
            said = f"{a} and {b}"
        else:
            continue
        raise PlanError(
            f"{tensors[first].name!r} and {tensors[i].name!r} would be {said}, but mlx-lm has them "
            f"in one tensor, {stack!r}; give all experts of the stack one scheme."
        )
