"""What becomes of each tensor: quantized, repacked, brought back to floats, or left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from streamq.checkpoint import CONFIG
from streamq.errors import PlanError
from streamq.families import Family
from streamq.formats import Format, Plain, quantization_of
from streamq.schemes import ALL, FLOAT_TAGS, PLAIN, Scheme
from streamq.stored import Stored, Where
from streamq.tensors import FLOATS, TensorInfo, stack_of
from streamq.views import View

from .kept import either, rules
from .quantized import asked
from .types import Options, Target
from .ways import Ways, rule_text


@dataclass(slots=True)
class Choice:
    """``numbers``: of each tensor's target in ``targets``, -1 for what is copied as it is.

    ``kept``: why, by position, for what is not quantized. ``modules``: those of each
    scheme of the output, for its config. ``dequantized``: modules that become floats.
    """

    numbers: list[int] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    kept: dict[int, str] = field(default_factory=dict)
    modules: dict[Scheme, list[str]] = field(default_factory=dict)
    dequantized: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    verbatim: bool = False


#: Of experts that are not quantized while others of their stack are.
_WEIGHT, _VECTOR = Plain(), Plain(suffix="")


def is_linear_like(t: TensorInfo) -> bool:
    """Whether loaders may make a Linear of it."""
    return len(t.shape) == 2 and t.name.endswith(".weight")


def choose(
    tensors: list[TensorInfo],
    stored: Mapping[str, Where],
    options: Options,
    family: Family,
    config: dict[str, Any],
    whole: Mapping[str, str],
) -> Choice:
    """Find the target of each tensor, or the reason why it is left as it is.

    ``whole``: why stacks of experts are not split, by name.
    Raises PlanError where nothing is left to do, or something cannot be done.
    """
    ways = Ways(options, family, config, rules)
    way = ways.first
    numbers: dict[Target, int] = {}
    choice = Choice()
    assert options.format is not None
    plain = options.scheme.is_float
    modules: dict[Scheme, list[str]] = {}
    # What the tensor before had: looking a scheme up costs more than all else here.
    last: tuple[Target, int] | None = None
    named: tuple[Scheme, list[str]] | None = None
    recipe, heads = options.recipe, options.format.heads
    for i, t in enumerate(tensors):
        if t.name in whole:
            reason: str | None = whole[t.name]
        elif recipe is None:
            reason = way.why_not(t)
        else:
            way, reason = ways.of(t)
        if heads and reason == "output head":
            reason = None
        target: Target | None = way.floats
        s = stored.get(t.name)
        if isinstance(s, Stored):
            target, scheme = way.decide(s, reason)
            if target is not None and not target.scheme.is_float:
                _refuse_stack(t.name, s.format, target.format)
            if scheme is None:
                choice.dequantized.append(s.module)
        elif plain and not stored and _is_cast(t, reason, options.scheme):
            scheme = None
        elif reason or plain:
            choice.kept[i] = reason or f"is {t.dtype} already"
            target = scheme = None
            if isinstance(s, View) and stack_of(t.name) is None:
                fmt = _WEIGHT if t.name.endswith(".weight") else _VECTOR
                target = Target(PLAIN[t.dtype], fmt, "views")
        else:
            scheme = way.options.scheme
            if s is not None:
                target = way.views
            elif len(t.shape) > 2:
                target = way.floats._replace(scheme=scheme.folded(t.shape))
        if scheme is not None:
            if scheme.stride != 1 or scheme.scales != "absmax":  # as a config names them
                scheme = replace(scheme, stride=1, scales="absmax")
            if named is None or named[0] is not scheme:
                named = scheme, modules.setdefault(scheme, [])
            named[1].append(t.name.removesuffix(".weight"))
        if target is not None:
            own = target.format.of_module(t.name.removesuffix(".weight"))
            target = target if own is target.format else target._replace(format=own)
        if target is not None and (last is None or last[0] is not target):
            last = target, numbers.setdefault(target, len(numbers))
        choice.numbers.append(-1 if target is None or last is None else last[1])
    choice.targets = list(numbers)
    choice.modules = modules if modules or not plain else {options.scheme: []}
    choice.notes = ways.notes()
    choice.verbatim = not numbers and (bool(stored) or (plain and not quantization_of(config)))
    _refuse_nothing(choice, options)
    return choice


def _is_cast(t: TensorInfo, reason: str | None, scheme: Scheme) -> bool:
    """Whether a float weight becomes one of another float dtype, unless asked to stay."""
    other = t.dtype in FLOATS and t.dtype != FLOAT_TAGS[scheme.element]
    return other and is_linear_like(t) and not asked(reason or "")


def _refuse_stack(name: str, held: Format, fmt: Format) -> None:
    stack = stack_of(name)
    if stack is not None and held.name != fmt.name:
        raise PlanError(
            f"{stack!r} holds quantized experts in one tensor, which the format {fmt.name} cannot "
            f"hold; convert to floats with -s bf16 first, or choose --format {held.name}."
        )


def _refuse_nothing(choice: Choice, options: Options) -> None:
    if not options.format or not choice.modules:
        reasons = ", ".join(f"{n} x {w}" for w, n in Counter(choice.kept.values()).most_common())
        raise PlanError(f"nothing to quantize: every tensor is left as it is ({reasons}).")
    wanted = options.recipe.schemes if options.recipe else (options.scheme,)
    if not {s.numbers for s in wanted} & {s.numbers for s in choice.modules}:
        have = ", ".join(sorted(scheme.name for scheme in choice.modules))
        raise PlanError(
            f"nothing to convert to {options.scheme.name}: the weights are quantized to {have} "
            "already; --requantize converts them from their rounded values, --only takes what "
            "the source left out."
        )
    if len(choice.modules) > 1 and not options.format.mixes:
        have = ", ".join(sorted(scheme.name for scheme in choice.modules))
        raise PlanError(
            f"the format {options.format.name} holds one scheme, and the output would have {have}; "
            "--requantize converts all, or choose compressed-tensors."
        )


def fuse(
    tensors: list[TensorInfo],
    stored: Mapping[str, Where],
    choice: Choice,
    family: Family,
    options: Options,
) -> dict[int, int]:
    """For each tensor with fused partners the first one of its group.

    Raises PlanError for a group that is quantized in part, or in two dtypes or schemes.
    """
    firsts: dict[tuple[str, str], int] = {}
    homes = {}
    scheme_of = {m: s for s, modules in choice.modules.items() if not s.is_float for m in modules}
    mixed = len(choice.modules) > 1
    for i, t in enumerate(tensors):
        if i in choice.kept:
            continue
        name = t.name
        if stack := stack_of(name):  # of one tensor, so they stay together
            homes[i] = firsts.setdefault((stack, ""), i)
            continue
        module = name.removesuffix(".weight")
        found = family.group_of(module)
        if found is None:
            continue
        parent, row = found
        home = homes[i] = firsts.setdefault((parent, row.members[0]), i)
        if home == i:
            continue
        first = tensors[home]
        if (first.name in stored) != (t.name in stored):
            names = (first.name, t.name) if first.name in stored else (t.name, first.name)
            raise PlanError(
                f"{names[0]!r} is quantized in the source and {names[1]!r} is not, but "
                f"loaders fuse them ({row.name}); bring all to floats with -s bf16 first."
            )
        if first.dtype != t.dtype:
            raise PlanError(
                f"{first.name!r} is {first.dtype} and {t.name!r} is {t.dtype}, but loaders fuse "
                f"them ({row.name}); ignore both, or give them one dtype."
            )
        other = first.name.removesuffix(".weight")
        if mixed and scheme_of.get(other) != scheme_of.get(module):
            a, b = ((s.name if (s := scheme_of.get(m)) else "unquantized") + rule_text(options, m)
                    for m in (other, module))  # fmt: skip
            raise PlanError(
                f"{first.name!r} would be {a} and {t.name!r} {b}, but loaders fuse them "
                f"({row.name}); give both one scheme."
            )
    for i, why in choice.kept.items():
        name = tensors[i].name
        found = family.group_of(name.removesuffix(".weight"))
        if found is None or not is_linear_like(tensors[i]):
            continue
        partner = firsts.get((found[0], found[1].members[0]))
        if partner is not None and tensors[partner].name.removesuffix(".weight") in scheme_of:
            said = rule_text(options, tensors[partner].name)
            raise PlanError(
                f"{tensors[partner].name!r} is quantized{said} and {name!r} is not ({why}), but "
                f"loaders fuse them ({found[1].name}); quantize or ignore both."
            )
    return homes


def unused_patterns(tensors: list[TensorInfo], options: Options) -> list[str]:
    """Warnings for patterns that match nothing, which are mostly typing errors."""
    unused = []
    for option, patterns in (("--ignore", options.ignore), ("--only", options.only)):
        for pattern in patterns:
            test = either((pattern,))
            if not any(test(t.name) for t in tensors):
                unused.append(f"{option} {pattern!r} matches no tensor")
    return unused


def block_warnings(tensors: list[TensorInfo], choice: Choice, homes: dict[int, int]) -> list[str]:
    """Loaders that fuse 128x128-block weights need whole blocks in all members but the last."""
    heights = [1 if t.scheme.inverse else t.scheme.block[0] for t in choice.targets]
    fused = {home for home, n in Counter(homes.values()).items() if n > 1}
    ragged = []
    for i, home in homes.items():
        rows = heights[choice.numbers[i]] if choice.numbers[i] >= 0 else 1
        if home in fused and rows not in (1, ALL) and tensors[i].shape[0] % rows:
            ragged.append((tensors[i], rows))
    if not ragged:
        return []
    t, rows = ragged[0]
    return [
        f"{t.name!r} has {t.shape[0]} rows, not a multiple of {rows}, in a fused group "
        f"({len(ragged)} such tensors): loaders that fuse it cannot join the scales"
    ]


def notes(family: Family, options: Options, choice: Choice) -> list[str]:
    """What a user should know about this model and scheme."""
    notes = []
    schemes = options.recipe.schemes if options.recipe else (options.scheme,)
    if not family.known:
        name = family.model_type or f"(none in {CONFIG})"
        notes.append(f"model_type {name}: not known here, the generic rules apply")
    made = {t.scheme.name for t in choice.targets if t.origin != "codes"}  # others keep theirs
    for scheme in schemes:
        if scheme.activation is not None and scheme.activation.local and scheme.name in made:
            notes.append(
                f"{scheme.name} writes the constant input_global_scale {options.input_scale:g}: "
                f"activations beyond +-{2688 / options.input_scale:g} saturate and small ones lose "
                "precision; NVFP4A16 leaves activations alone"
            )
    return notes
