"""Which tensors are quantized, which of them together, and why the others are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from streamq.checkpoint import Checkpoint
from streamq.errors import PlanError
from streamq.families import Family, collapse, is_expert_stack, matcher
from streamq.schemes import ALL, Scheme, block_text
from streamq.tensors import DTYPES, FLOATS, TensorInfo

from .types import Options


def is_linear_like(t: TensorInfo) -> bool:
    """Whether loaders may make a Linear of it."""
    return len(t.shape) == 2 and t.name.endswith(".weight")


def choose(
    source: Checkpoint, options: Options, family: Family
) -> tuple[list[TensorInfo], dict[str, str]]:
    """The tensors that are quantized; and by name, why which others are kept."""
    why_not = _rules(options, family)
    chosen: list[TensorInfo] = []
    kept: dict[str, str] = {}
    checked: set[tuple[int, ...]] = set()
    for name, t in source.tensors.items():
        if reason := why_not(t, name.removesuffix(".weight")):
            kept[name] = reason
            continue
        if t.shape not in checked:
            _check_shape(t, options.scheme)
            checked.add(t.shape)
        chosen.append(t)
    if not chosen:
        reasons = ", ".join(f"{n} x {why}" for why, n in Counter(kept.values()).most_common())
        raise PlanError(f"nothing to quantize: every tensor is left as it is ({reasons}).")
    return chosen, kept


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


def fuse(
    chosen: list[TensorInfo], kept: dict[str, str], source: Checkpoint, family: Family
) -> list[TensorInfo]:
    """For each chosen tensor the first one of its fused group, or itself.

    Raises PlanError for a group that is quantized in part, or in two dtypes.
    """
    firsts: dict[tuple[str, str], TensorInfo] = {}
    homes = []
    for t in chosen:
        found = family.group_of(t.name.removesuffix(".weight"))
        if found is None:
            homes.append(t)
            continue
        first = firsts.setdefault((found[0], found[1].members[0]), t)
        homes.append(first)
        if first.dtype != t.dtype:
            raise PlanError(
                f"{first.name!r} is {first.dtype} and {t.name!r} is {t.dtype}, but loaders fuse "
                f"them ({found[1].name}); ignore both, or give them one dtype."
            )
    for name, why in kept.items():
        found = family.group_of(name.removesuffix(".weight"))
        if found is None or not is_linear_like(source.tensors[name]):
            continue
        if partner := firsts.get((found[0], found[1].members[0])):
            raise PlanError(
                f"{partner.name!r} is quantized and {name!r} is not ({why}), but "
                f"loaders fuse them ({found[1].name}); quantize or ignore both."
            )
    return homes


def unused_patterns(source: Checkpoint, options: Options) -> list[str]:
    """Warnings for patterns that match nothing, which are mostly typing errors."""
    unused = []
    for option, patterns in (("--ignore", options.ignore), ("--only", options.only)):
        for pattern in patterns:
            test = _either((pattern,))
            if not any(test(name, name.removesuffix(".weight")) for name in source.tensors):
                unused.append(f"{option} {pattern!r} matches no tensor")
    return unused


def block_warnings(chosen: list[TensorInfo], homes: list[TensorInfo], scheme: Scheme) -> list[str]:
    """Loaders that fuse 128x128-block weights need whole blocks in all members but the last."""
    rows = scheme.block[0]
    if rows in (1, ALL):
        return []
    fused = {home.name for t, home in zip(chosen, homes, strict=True) if t is not home}
    ragged = [
        t for t, home in zip(chosen, homes, strict=True)
        if home.name in fused and t.shape[0] % rows
    ]  # fmt: skip
    if not ragged:
        return []
    return [
        f"{ragged[0].name!r} has {ragged[0].shape[0]} rows, not a multiple of "
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
