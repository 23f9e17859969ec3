"""What becomes of weights that are quantized in the source."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from streamq.errors import PlanError
from streamq.formats import Format, Plain, default_format
from streamq.schemes import ALL, PLAIN, SCHEMES, FloatType, Scheme, block_text
from streamq.stored import Stored

from .types import Options, Target

_ELEMENT_OF: dict[str, FloatType] = {"BF16": "bf16", "F16": "f16", "F32": "f32"}
_TORCH_DTYPES: dict[str, FloatType] = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


_PLAIN_STACKS = Plain(transposed=True)


class AlreadyQuantized:
    """What becomes of weights that are quantized already."""

    def __init__(self, options: Options, config: dict[str, Any]) -> None:
        self._options = options
        text = config.get("text_config")
        dtypes = [place.get(key) for place in (config, text if isinstance(text, dict) else {})
                  for key in ("dtype", "torch_dtype")]  # fmt: skip
        dtype = next((d for d in dtypes if d), None)
        self._element = _TORCH_DTYPES.get(str(dtype), "bf16")
        self._kept: Counter[str] = Counter()
        self._brought_back = 0
        self._lost: Counter[str] = Counter()

    def __call__(self, s: Stored, reason: str | None) -> tuple[Target | None, Scheme | None]:
        """The target, None for a copy of its tensors, and the scheme it then has, if any."""
        target, scheme = self._decide(s, reason)
        if target is not None and s.format.lost:
            self._lost[s.format.lost] += 1
        return target, scheme

    def _decide(self, s: Stored, reason: str | None) -> tuple[Target | None, Scheme | None]:
        o = self._options
        assert o.format is not None
        if reason is None or (o.scheme.is_float and not asked(reason)):
            if o.scheme.is_float:
                fmt = _PLAIN_STACKS if s.format.stacks else o.format
                return Target(o.scheme, fmt, "values"), o.scheme
            if _holds(o.scheme, s.scheme):
                return self._repacked(s, o.format, o.scheme)
            if o.requantize:
                refuse_unfit(s.name, (s.layout.rows, s.layout.cols), o)
                scheme = self._resolved(o.scheme).folded(s.shape)
                return Target(scheme, o.format, "values", o.numerics), o.scheme
        elif o.scheme.is_float:
            raise PlanError(
                f"{s.name!r} is quantized and would stay so ({reason}), which the format "
                f"{o.format.name} cannot hold; choose another --format."
            )
        mixes = o.format.mixes and _can_hold(o.format, s.scheme)
        # What loaders expect unquantized, as the embedding that mlx-lm quantizes, is not kept.
        mixes = mixes and (reason is None or asked(reason))
        if o.format.name == s.format.name or mixes:
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
        scheme = scheme.folded(s.shape)
        if fmt.name == s.format.name and s.scheme == replace(scheme, scales=s.scheme.scales):
            return None, s.scheme
        if scheme.scale == "weight":
            element = _ELEMENT_OF.get(s.tensors[s.format.scale_suffix].dtype, "f32")
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
        notes += [f"{what} of {n} weights are dropped" for what, n in self._lost.items()]
        return notes


def _can_hold(fmt: Format, scheme: Scheme) -> bool:
    """Whether a format can hold the numbers of a scheme that a source has, to the bit."""
    preset = SCHEMES.get(scheme.name)
    if preset is None or scheme.name not in fmt.presets or scheme.inverse:
        return False
    if scheme.element == "int":
        preset = replace(preset, block=scheme.block)
        if 0 < scheme.block[1] < 8:  # order of activation: a scale for each column
            return False
    try:
        return fmt.concrete(scheme).numbers == scheme.numbers == preset.numbers
    except PlanError:  # not in those blocks
        return False


def asked(reason: str) -> bool:
    """Whether the user asked for a weight to stay as it is."""
    return reason in ("--ignore", "not in --only") or reason.endswith("recipe")


def _holds(target: Scheme, source: Scheme) -> bool:
    """Whether the codes of a source are codes of the target as they are.

    Symmetric integers are asymmetric ones with a zero point of 0, and powers of two are
    scales like others.
    """
    if source.power_of_two:
        source = replace(source, power_of_two=target.power_of_two)
    if source.element == "int" and source.symmetric and not source.narrow:
        source = replace(source, symmetric=target.symmetric)
    return source.numbers == target.numbers


def refuse_unfit(name: str, shape: tuple[int, ...], options: Options) -> None:
    """Raise PlanError for columns that the block of the scheme does not divide."""
    scheme, cols = options.scheme, shape[1]
    block = scheme.block[1]
    if scheme.block[0] == 1 and block != ALL and cols % block and not scheme.inverse:
        hint = " or use another --group-size" if scheme.element == "int" else ""
        raise PlanError(
            f"tensor {name!r} of shape {list(shape)} has {cols} columns, not a multiple "
            f"of the {block_text(scheme.block)} block of {scheme.name}; "
            f"leave it with --ignore '{name.removesuffix('.weight')}'{hint}."
        )
