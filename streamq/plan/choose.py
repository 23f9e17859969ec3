"""What becomes of each tensor: quantized, repacked, brought back to floats, or left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from streamq.checkpoint import CONFIG
from streamq.errors import PlanError
from streamq.families import Family, collapse, is_expert_stack, matcher
from streamq.formats import Format, default_format
from streamq.schemes import ALL, PLAIN, FloatType, Scheme, block_text
from streamq.stored import Stored
from streamq.tensors import FLOATS, TensorInfo

from .types import Options, Target

_ELEMENT_OF: dict[str, FloatType] = {"BF16": "bf16", "F16": "f16", "F32": "f32"}
_TORCH_DTYPES: dict[str, FloatType] = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


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


def is_linear_like(t: TensorInfo) -> bool:
    """Whether loaders may make a Linear of it."""
    return len(t.shape) == 2 and t.name.endswith(".weight")


def choose(
    tensors: list[TensorInfo],
    stored: dict[str, Stored],
    options: Options,
    family: Family,
    config: dict[str, Any],
) -> Choice:
    """Find the target of each tensor, or the reason why it is left as it is.

    Raises PlanError where nothing is left to do, or something cannot be done.
    """
    why_not = _rules(options, family)
    decide = _Stored(options, config)
    numbers: dict[Target, int] = {}
    choice = Choice()
    assert options.format is not None
    plain = options.scheme.is_float
    floats = Target(options.scheme, options.format, "floats")
    modules: dict[Scheme, list[str]] = {}
    for i, t in enumerate(tensors):
        reason = why_not(t)
        target: Target | None = floats
        if s := stored.get(t.name):
            target, scheme = decide(s, reason)
            if scheme is None:
                choice.dequantized.append(s.module)
        elif reason or plain:
            choice.kept[i] = reason or f"is {t.dtype} already"
            target = scheme = None
        else:
            scheme = options.scheme
        if scheme is not None:
            modules.setdefault(scheme, []).append(t.name.removesuffix(".weight"))
        choice.numbers.append(-1 if target is None else numbers.setdefault(target, len(numbers)))
    choice.targets = list(numbers)
    choice.modules = modules if modules or not plain else {options.scheme: []}
    choice.notes = decide.notes()
    choice.verbatim = not numbers and (bool(stored) or plain)
    _refuse_nothing(choice, decide, options)
    return choice


def _refuse_nothing(choice: Choice, decide: _Stored, options: Options) -> None:
    if not options.format or not choice.modules:
        reasons = ", ".join(f"{n} x {w}" for w, n in Counter(choice.kept.values()).most_common())
        raise PlanError(f"nothing to quantize: every tensor is left as it is ({reasons}).")
    if options.scheme not in choice.modules and not any(
        scheme.numbers == options.scheme.numbers for scheme in choice.modules
    ):
        have = ", ".join(sorted(scheme.name for scheme in choice.modules))
        raise PlanError(
            f"nothing to convert to {options.scheme.name}: the weights are quantized to {have} "
            "already; --requantize converts them from their rounded values."
        )
    if len(choice.modules) > 1 and not options.format.mixes:
        have = ", ".join(sorted(scheme.name for scheme in choice.modules))
        raise PlanError(
            f"the format {options.format.name} holds one scheme, and the output would have {have}; "
            "--requantize converts all, or choose compressed-tensors."
        )


class _Stored:
    """What becomes of weights that are quantized already."""

    def __init__(self, options: Options, config: dict[str, Any]) -> None:
        self._options = options
        dtype = config.get("dtype") or config.get("torch_dtype")
        self._element = _TORCH_DTYPES.get(str(dtype), "bf16")
        self._kept: Counter[str] = Counter()
        self._brought_back = 0

    def __call__(self, s: Stored, reason: str | None) -> tuple[Target | None, Scheme | None]:
        """The target, None for a copy of its tensors, and the scheme it then has, if any."""
        o = self._options
        assert o.format is not None
        if reason is None or (o.scheme.is_float and reason not in ("--ignore", "not in --only")):
            if o.scheme.is_float:
                return Target(o.scheme, o.format, "values"), o.scheme
            if _holds(o.scheme, s.scheme):
                return self._repacked(s, o.format, o.scheme)
            if o.requantize:
                _refuse_unfit(s.name, (s.layout.rows, s.layout.cols), o)
                return Target(self._resolved(o.scheme), o.format, "values"), o.scheme
        elif o.scheme.is_float:
            raise PlanError(
                f"{s.name!r} is quantized and would stay so ({reason}), which the format "
                f"{o.format.name} cannot hold; choose another --format."
            )
        if o.format.name == s.format.name or (o.format.mixes and s.scheme.name in o.format.presets):
            self._kept[s.scheme.name] += 1
            scheme = s.scheme if o.format.name == s.format.name else o.format.concrete(s.scheme)
            return self._repacked(s, o.format, scheme)
        if reason is None:
            raise PlanError(
                f"{s.name!r} is quantized to {s.scheme.name}, which the format {o.format.name} "
                "cannot hold; --requantize converts it from its rounded values."
            )
        self._brought_back += 1
        plain = PLAIN[self._element.upper()]
        return Target(plain, default_format(plain), "values"), None

    def _repacked(self, s: Stored, fmt: Format, scheme: Scheme) -> tuple[Target | None, Scheme]:
        if fmt.name == s.format.name and s.scheme == replace(scheme, scales=s.scheme.scales):
            return None, s.scheme
        if scheme.scale == "weight":
            element = _ELEMENT_OF[s.tensors[s.format.scale_suffix].dtype]
            return Target(replace(scheme, scale=element), fmt, "codes"), scheme
        return Target(scheme, fmt, "codes"), scheme

    def _resolved(self, scheme: Scheme) -> Scheme:
        """Scales that follow the weight's dtype follow that of the model."""
        return replace(scheme, scale=self._element) if scheme.scale == "weight" else scheme

    def notes(self) -> list[str]:
        """Sentences for people."""
        notes = [f"{n} weights stay quantized to {name}" for name, n in self._kept.items()]
        if self._brought_back:
            notes.append(
                f"{self._brought_back} quantized weights become {self._element}: loaders expect "
                "them unquantized, and the format cannot hold their scheme"
            )
        return notes


def _holds(target: Scheme, source: Scheme) -> bool:
    """Whether the codes of a source are codes of the target as they are.

    Symmetric integers are asymmetric ones with a zero point of 0.
    """
    if source.element == "int" and source.symmetric and not source.narrow:
        source = replace(source, symmetric=target.symmetric)
    return source.numbers == target.numbers


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
            if is_expert_stack(name, shape) and not options.scheme.is_float:
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
            unfit[kind] = _unfit(t, options)
        return unfit[kind]

    return why_not


def _either(patterns: tuple[str, ...]) -> Callable[[str], bool]:
    """Whether a tensor or its module is named by one of the patterns."""
    test = matcher(patterns)
    return lambda tensor: test(tensor.removesuffix(".weight")) or test(tensor)


def _unfit(t: TensorInfo, options: Options) -> str | None:
    """Why a weight of this dtype and shape stays, or None. Raises PlanError if it cannot."""
    if 0 in t.shape:
        return "empty"
    if t.dtype not in FLOATS:
        return f"dtype {t.dtype}"
    _refuse_unfit(t.name, t.shape, options)
    assert options.format is not None
    try:
        options.format.layout(t.shape[0], t.shape[1], t.dtype, options.scheme)
    except PlanError as e:
        raise PlanError(
            f"tensor {t.name!r} of shape {list(t.shape)}: {e}; "
            f"leave it with --ignore '{t.name.removesuffix('.weight')}'."
        ) from None
    return None


def _refuse_unfit(name: str, shape: tuple[int, ...], options: Options) -> None:
    scheme, cols = options.scheme, shape[1]
    block = scheme.block[1]
    if scheme.block[0] == 1 and block != ALL and cols % block:
        hint = " or use another --group-size" if scheme.element == "int" else ""
        raise PlanError(
            f"tensor {name!r} of shape {list(shape)} has {cols} columns, not a multiple "
            f"of the {block_text(scheme.block)} block of {scheme.name}; "
            f"leave it with --ignore '{name.removesuffix('.weight')}'{hint}."
        )


def fuse(
    tensors: list[TensorInfo], stored: dict[str, Stored], choice: Choice, family: Family
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
        module = t.name.removesuffix(".weight")
        found = family.group_of(module)
        if found is None:
            continue
        parent, row = found
        home = homes[i] = firsts.setdefault((parent, row.members[0]), i)
        first = tensors[home]
        if (first.name in stored) != (t.name in stored):
            names = (first.name, t.name) if first.name in stored else (t.name, first.name)
            raise PlanError(
                f"{names[0]!r} is quantized in the source and {names[1]!r} is not, but "
                f"loaders fuse them ({row.name}); ignore both, or convert from the original."
            )
        if first.dtype != t.dtype:
            raise PlanError(
                f"{first.name!r} is {first.dtype} and {t.name!r} is {t.dtype}, but loaders fuse "
                f"them ({row.name}); ignore both, or give them one dtype."
            )
        other = first.name.removesuffix(".weight")
        if mixed and scheme_of.get(other) != scheme_of.get(module):
            a, b = (s.name if (s := scheme_of.get(m)) else "unquantized" for m in (other, module))
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
            raise PlanError(
                f"{tensors[partner].name!r} is quantized and {name!r} is not ({why}), but "
                f"loaders fuse them ({found[1].name}); quantize or ignore both."
            )
    return homes


def unused_patterns(tensors: list[TensorInfo], options: Options) -> list[str]:
    """Warnings for patterns that match nothing, which are mostly typing errors."""
    unused = []
    for option, patterns in (("--ignore", options.ignore), ("--only", options.only)):
        for pattern in patterns:
            test = _either((pattern,))
            if not any(test(t.name) for t in tensors):
                unused.append(f"{option} {pattern!r} matches no tensor")
    return unused


def block_warnings(tensors: list[TensorInfo], choice: Choice, homes: dict[int, int]) -> list[str]:
    """Loaders that fuse 128x128-block weights need whole blocks in all members but the last."""
    heights = [target.scheme.block[0] for target in choice.targets]
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


def notes(family: Family, options: Options) -> list[str]:
    """What a user should know about this model and scheme."""
    scheme, notes = options.scheme, []
    if not family.known:
        name = family.model_type or f"(none in {CONFIG})"
        notes.append(f"model_type {name}: not known here, the generic rules apply")
    if scheme.activation is not None and scheme.activation.local:
        notes.append(
            f"{scheme.name} writes the constant input_global_scale {options.input_scale:g}: "
            f"activations beyond +-{2688 / options.input_scale:g} saturate and small ones lose "
            "precision; NVFP4A16 leaves activations alone"
        )
    return notes
