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
    tensors: list[TensorInfo], options: Options, family: Family
) -> tuple[list[int], dict[int, str]]:
    """Which of the tensors are quantized, and why the others are kept."""
    why_not = _rules(options, family)
    chosen: list[int] = []
    kept: dict[int, str] = {}
    for i, t in enumerate(tensors):
        if reason := why_not(t):
            kept[i] = reason
        else:
            chosen.append(i)
    if not chosen:
        reasons = ", ".join(f"{n} x {why}" for why, n in Counter(kept.values()).most_common())
        raise PlanError(f"nothing to quantize: every tensor is left as it is ({reasons}).")
    return chosen, kept


def _rules(options: Options, family: Family) -> Callable[[TensorInfo], str | None]:
    """A function from a tensor to the reason why it is kept, or None."""
    ignored, wanted = _either(options.ignore), _either(options.only)
    left_alone = family.left_alone(options.scheme)
    unfit: dict[tuple[str, tuple[int, ...]], str | None] = {}

    def why_not(t: TensorInfo) -> str | None:
        name, dtype, shape, _, _ = t
        if options.ignore and ignored(name):
            return "--ignore"
        if len(shape) != 2 or not name.endswith(".weight"):
            if is_expert_stack(name, shape):
                raise PlanError(
                    f"tensor {name!r} of shape {list(shape)} holds the experts of a layer in one, "
                    "which streamq cannot split yet; leave it unquantized with "
                    f"--ignore '{collapse(name.removesuffix('.weight'))}'."
                )
            return "not a 2-D weight"
        if why := left_alone(name.removesuffix(".weight")):
            return why
        if options.only and not wanted(name):
            return "not in --only"
        kind = dtype, shape
        if kind not in unfit:
            unfit[kind] = _unfit(t, options.scheme)
        return unfit[kind]

    return why_not


def _either(patterns: tuple[str, ...]) -> Callable[[str], bool]:
    """Whether a tensor or its module is named by one of the patterns."""
    test = matcher(patterns)
    return lambda tensor: test(tensor.removesuffix(".weight")) or test(tensor)


def _unfit(t: TensorInfo, scheme: Scheme) -> str | None:
    """Why a weight of this dtype and shape stays, or None. Raises PlanError if it cannot."""
    if 0 in t.shape:
        return "empty"
    if t.dtype not in FLOATS:
        if DTYPES[t.dtype].bits > 8 or t.dtype == "BOOL":
            return f"dtype {t.dtype}"
        raise PlanError(
            f"tensor {t.name!r} is {t.dtype}, quantized already, though config.json names no "
            "quantization; convert the original checkpoint, or leave it with --ignore."
        )
    block = scheme.block[1]
    if scheme.block[0] == 1 and block != ALL and t.shape[1] % block:
        hint = " or use another --group-size" if scheme.element == "int" else ""
        raise PlanError(
            f"tensor {t.name!r} of shape {list(t.shape)} has {t.shape[1]} columns, not a multiple "
            f"of the {block_text(scheme.block)} block of {scheme.name}; "
            f"leave it with --ignore '{t.name.removesuffix('.weight')}'{hint}."
        )
    return None


def fuse(
    tensors: list[TensorInfo], chosen: list[int], kept: dict[int, str], family: Family
) -> list[int]:
    """For each chosen tensor the first one of its fused group, or itself.

    Raises PlanError for a group that is quantized in part, or in two dtypes.
    """
    firsts: dict[tuple[str, str], int] = {}
    homes = []
    for i in chosen:
        t = tensors[i]
        found = family.group_of(t.name.removesuffix(".weight"))
        if found is None:
            homes.append(i)
            continue
        parent, row = found
        home = firsts.setdefault((parent, row.members[0]), i)
        homes.append(home)
        first = tensors[home]
        if first.dtype != t.dtype:
            raise PlanError(
                f"{first.name!r} is {first.dtype} and {t.name!r} is {t.dtype}, but loaders fuse "
                f"them ({row.name}); ignore both, or give them one dtype."
            )
    for i, why in kept.items():
        name = tensors[i].name
        found = family.group_of(name.removesuffix(".weight"))
        if found is None or not is_linear_like(tensors[i]):
            continue
        partner = firsts.get((found[0], found[1].members[0]))
        if partner is not None:
            raise PlanError(
                f"{tensors[partner].name!r} is quantized and {name!r} is not ({why}), but "
                f"loaders fuse them ({found[1].name}); quantize or ignore both."
            )
    return homes


def unused_patterns(source: Checkpoint, options: Options) -> list[str]:
    """Warnings for patterns that match nothing, which are mostly typing errors."""
    unused = []
    for option, patterns in (("--ignore", options.ignore), ("--only", options.only)):
        for pattern in patterns:
            test = _either((pattern,))
            if not any(map(test, source.tensors)):
                unused.append(f"{option} {pattern!r} matches no tensor")
    return unused


def block_warnings(
    tensors: list[TensorInfo], chosen: list[int], homes: list[int], scheme: Scheme
) -> list[str]:
    """Loaders that fuse 128x128-block weights need whole blocks in all members but the last."""
    rows = scheme.block[0]
    if rows in (1, ALL):
        return []
    fused = {home for home, n in Counter(homes).items() if n > 1}
    members = [tensors[i] for i, home in zip(chosen, homes, strict=True) if home in fused]
    ragged = [t for t in members if t.shape[0] % rows]
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
