"""Which tensors are quantized, in which groups, and why the others are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from streamq.checkpoint import Checkpoint
from streamq.errors import PlanError
from streamq.families import Family, FusedGroup, collapse, is_expert_stack, matcher
from streamq.schemes import ALL, Scheme, block_text
from streamq.tensors import DTYPES, FLOATS, TensorInfo

from .types import Options


class Weight(NamedTuple):
    """A tensor that will be quantized, before it has a place; ``position`` in the source."""

    source: TensorInfo
    module: str
    position: int


class Kept(NamedTuple):
    """A tensor that stays as it is, and why."""

    source: TensorInfo
    reason: str
    position: int


def is_linear_like(t: TensorInfo) -> bool:
    """Whether loaders may make a Linear of it."""
    return len(t.shape) == 2 and t.name.endswith(".weight")


def choose(source: Checkpoint, options: Options, family: Family) -> tuple[list[Weight], list[Kept]]:
    """Split into what is quantized and what is kept, with the reason."""
    why_not = _rules(options, family)
    weights: list[Weight] = []
    kept: list[Kept] = []
    checked: set[tuple[int, ...]] = set()
    for position, t in enumerate(source.tensors.values()):
        module = t.name.removesuffix(".weight")
        if reason := why_not(t, module):
            kept.append(Kept(t, reason, position))
            continue
        if t.shape not in checked:
            _check_shape(t, options.scheme)
            checked.add(t.shape)
        weights.append(Weight(t, module, position))
    if not weights:
        reasons = ", ".join(
            f"{n} x {why}" for why, n in Counter(k.reason for k in kept).most_common()
        )
        raise PlanError(f"nothing to quantize: every tensor is left as it is ({reasons}).")
    return weights, kept


def _rules(options: Options, family: Family) -> Callable[[TensorInfo, str], str | None]:
    """A function from a tensor and its module to the reason why it is kept, or None."""
    ignored, wanted = _either(options.ignore), _either(options.only)
    left_alone = family.left_alone(options.scheme)

    def why_not(t: TensorInfo, module: str) -> str | None:
        if options.ignore and ignored(t.name, module):
            return "--ignore"
        if is_expert_stack(t.name, t.shape):
            raise PlanError(
                f"tensor {t.name!r} of shape {list(t.shape)} holds the experts of a layer in one, "
                f"which streamq cannot split yet; "
                f"leave it unquantized with --ignore '{collapse(module)}'."
            )
        if not is_linear_like(t):
            return "not a 2-D weight"
        if why := left_alone(module):
            return why
        if options.only and not wanted(t.name, module):
            return "not in --only"
        if 0 in t.shape:
            return "empty"
        return None if t.dtype in FLOATS else _other_dtype(t)

    return why_not


def _either(patterns: tuple[str, ...]) -> Callable[[str, str], bool]:
    test = matcher(patterns)
    return lambda tensor, module: test(module) or test(tensor)


def _other_dtype(t: TensorInfo) -> str:
    if DTYPES[t.dtype].bits <= 8 and t.dtype != "BOOL":
        raise PlanError(
            f"tensor {t.name!r} is {t.dtype}, quantized already, though config.json names no "
            "quantization; convert the original checkpoint, or leave it with --ignore."
        )
    return f"dtype {t.dtype}"


def _check_shape(t: TensorInfo, scheme: Scheme) -> None:
    block = scheme.block[1]
    if scheme.block[0] == 1 and block != ALL and t.shape[1] % block:
        hint = " or use another --group-size" if scheme.element == "int" else ""
        raise PlanError(
            f"tensor {t.name!r} of shape {list(t.shape)} has {t.shape[1]} columns, not a multiple "
            f"of the {block_text(scheme.block)} block of {scheme.name}; "
            f"leave it with --ignore '{t.name.removesuffix('.weight')}'{hint}."
        )


def group(weights: list[Weight], kept: list[Kept], family: Family) -> list[list[Weight]]:
    """Fused groups, each in the order of its table row, in the order of the source."""
    groups: dict[tuple[str, str], list[Weight]] = {}
    fused: dict[tuple[str, str], FusedGroup] = {}
    for w in weights:
        found = family.group_of(w.module)
        if found is None:
            groups[w.module, ""] = [w]
            continue
        key = (found[0], found[1].members[0])
        if key in groups:
            groups[key].append(w)
            fused[key] = found[1]
        else:
            groups[key] = [w]
    for key, row in fused.items():
        groups[key].sort(key=lambda w: row.members.index(w.module.rpartition(".")[2]))
    for t, why, _ in kept:
        if not is_linear_like(t):
            continue
        found = family.group_of(t.name.removesuffix(".weight"))
        if found and (partners := groups.get((found[0], found[1].members[0]))):
            raise PlanError(
                f"{partners[0].source.name!r} is quantized and {t.name!r} is not ({why}), but "
                f"loaders fuse them ({found[1].name}); quantize or ignore both."
            )
    return list(groups.values())


def unused_patterns(source: Checkpoint, options: Options) -> list[str]:
    """Warnings for patterns that match nothing, which are mostly typing errors."""
    unused = []
    for option, patterns in (("--ignore", options.ignore), ("--only", options.only)):
        for pattern in patterns:
            test = _either((pattern,))
            if not any(test(name, name.removesuffix(".weight")) for name in source.tensors):
                unused.append(f"{option} {pattern!r} matches no tensor")
    return unused


def block_warnings(groups: list[list[Weight]], scheme: Scheme) -> list[str]:
    """Loaders that fuse 128x128-block weights need whole blocks in all members but the last."""
    rows = scheme.block[0]
    if rows in (1, ALL):
        return []
    ragged = [w for g in groups if len(g) > 1 for w in g if w.source.shape[0] % rows]
    if not ragged:
        return []
    return [
        f"{ragged[0].source.name!r} has {ragged[0].source.shape[0]} rows, not a multiple of "
        f"{rows}, in a fused group ({len(ragged)} such tensors): loaders that fuse it cannot join "
        "the scales"
    ]


def notes(family: Family, scheme: Scheme, input_scale: float) -> list[str]:
    """What a user should know about this model and scheme."""
    notes = []
    if not family.known:
        name = family.model_type or "(none in config.json)"
        notes.append(f"model_type {name}: not known here, the generic rules apply")
    if scheme.activation is not None and scheme.activation.local:
        notes.append(
            f"{scheme.name} writes the constant input_global_scale {input_scale:g}: activations "
            f"beyond +-{2688 / input_scale:g} saturate and small ones lose precision; "
            "NVFP4A16 leaves activations alone"
        )
    return notes
