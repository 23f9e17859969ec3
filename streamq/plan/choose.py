"""Which tensors are quantized, in which groups, and why the others are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from streamq.checkpoint import Checkpoint
from streamq.errors import PlanError
from streamq.families import Family, collapse, is_expert_stack, matcher
from streamq.schemes import ALL, Scheme, block_text
from streamq.tensors import DTYPES, FLOATS, TensorInfo

from .types import Options


class Weight(NamedTuple):
    """A tensor that will be quantized, before it has a place."""

    source: TensorInfo
    module: str


def is_linear_like(t: TensorInfo) -> bool:
    """Whether loaders may make a Linear of it."""
    return len(t.shape) == 2 and t.name.endswith(".weight")


def choose(
    source: Checkpoint, options: Options, family: Family
) -> tuple[list[Weight], list[tuple[TensorInfo, str]]]:
    """Split into what is quantized and what is kept, with the reason."""
    scheme = options.scheme
    ignored, wanted = _either(options.ignore), _either(options.only)
    left_alone = family.left_alone(scheme)
    weights: list[Weight] = []
    kept: list[tuple[TensorInfo, str]] = []
    for t in source.tensors.values():
        module = t.name.removesuffix(".weight")
        if options.ignore and ignored(t.name, module):
            kept.append((t, "--ignore"))
        elif is_expert_stack(t.name, t.shape):
            raise PlanError(
                f"tensor {t.name!r} of shape {list(t.shape)} holds the experts of a layer in one, "
                f"which streamq cannot split yet; "
                f"leave it unquantized with --ignore '{collapse(module)}'."
            )
        elif not is_linear_like(t):
            kept.append((t, "not a 2-D weight"))
        elif why := left_alone(module):
            kept.append((t, why))
        elif options.only and not wanted(t.name, module):
            kept.append((t, "not in --only"))
        elif 0 in t.shape:
            kept.append((t, "empty"))
        elif t.dtype not in FLOATS:
            kept.append((t, _other_dtype(t)))
        else:
            _check_shape(t, scheme)
            weights.append(Weight(t, module))
    if not weights:
        reasons = ", ".join(f"{n} x {why}" for why, n in Counter(w for _, w in kept).most_common())
        raise PlanError(f"nothing to quantize: every tensor is left as it is ({reasons}).")
    return weights, kept


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


def group(
    weights: list[Weight], kept: list[tuple[TensorInfo, str]], family: Family
) -> list[list[Weight]]:
    """Fused groups, each in the order of its table row, in the order of the source."""
    groups: dict[tuple[str, str], list[Weight]] = {}
    rank = {}
    for w in weights:
        found = family.group_of(w.module)
        key = (found[0], found[1].members[0]) if found else (w.module, "")
        groups.setdefault(key, []).append(w)
        if found:
            rank[w.module] = found[1].members.index(w.module.rpartition(".")[2])
    for members in groups.values():
        if len(members) > 1:
            members.sort(key=lambda w: rank[w.module])
    for t, why in kept:
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
