"""Why a tensor is left as it is: options, the tables of families, what the source left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from streamq.errors import PlanError
from streamq.families import Family, matcher
from streamq.formats import Format, format_of
from streamq.tensors import FLOATS, TensorInfo, stack_of

from .experts import Stays, undeclared
from .quantized import refuse_unfit
from .types import Options
from .ways import Ways


def rules(options: Options, family: Family, named: bool) -> Callable[[TensorInfo], str | None]:
    """A function from a tensor to the reason why it is kept, or None.

    ``named``: the table of modules that are left alone does not count.
    """
    ignored, wanted = either(options.ignore), either(options.only)
    left_alone = None if named else family.left_alone(options.scheme)
    left_out = None if named or options.only else _left_out(family.config)
    unfit: dict[tuple[str, tuple[int, ...], Format | None], str | None] = {}
    fmt, ignore, only = options.format, bool(options.ignore), bool(options.only)

    def why_not(t: TensorInfo) -> str | None:  # 70,000 times: 1 µs is 0.07 s
        name, dtype, shape, _, _ = t
        if ignore and ignored(name):
            return "--ignore"
        if only and _is_named_stack(t, options) and wanted(name):
            return _unfit(t, options)
        module = name.removesuffix(".weight")
        if len(shape) != 2 or (len(module) == len(name) and not stack_of(name)):
            error = None if options.scheme.is_float else undeclared(t, family)
            why = left_alone(module) if error and left_alone else None
            if error and not why:
                raise error
            return why or "not a 2-D weight"
        if left_alone is not None and (why := left_alone(module)):
            return why
        if only and not wanted(name):
            return "not in --only"
        if fmt is not None and not fmt.takes(name, options.scheme):
            return "not an expert"
        if left_out is not None and not stack_of(name) and left_out(name):
            return "left out in the source; --only takes it"
        kind = dtype, shape, fmt and fmt.of_module(module)
        if kind not in unfit:
            unfit[kind] = _unfit(t, options)
        return unfit[kind]

    return why_not


def _left_out(config: dict[str, Any]) -> Callable[[str], bool] | None:
    """Whether a quantized source says of a tensor that it is not to be quantized."""
    fmt = format_of(config)
    if fmt.name == "plain":
        return None
    scheme_of, _ = fmt.rules(config)
    return lambda name: scheme_of(name.removesuffix(".weight")) is None


def stays_of(options: Options, family: Family, config: dict[str, Any]) -> Stays:
    """Why a stack of experts is not split: it is ignored, or all that is in it stays."""
    ignored = either(options.ignore)
    ways = Ways(options, family, config, rules)

    def stays(stack: TensorInfo, experts: list[TensorInfo]) -> str | None:
        if ignored(stack.name):
            return "--ignore"
        if options.scheme.is_float:
            return f"is {stack.dtype} already"
        if options.scheme.inverse:
            return "not a 2-D weight"
        reasons = [ways.of(t)[1] if options.recipe else ways.first.why_not(t) for t in experts]
        return reasons[0] if all(reasons) else None

    return stays


def _is_named_stack(t: TensorInfo, options: Options) -> bool:
    """Whether it has more than two dimensions, and is quantized if --only names it."""
    named = options.scheme.inverse and bool(options.only)
    return named and len(t.shape) > 2 and t.name.endswith(".weight")


def either(patterns: tuple[str, ...]) -> Callable[[str], bool]:
    """Whether a tensor or its module is named by one of the patterns."""
    test = matcher(patterns)
    return lambda tensor: test(tensor.removesuffix(".weight")) or test(tensor)


def _unfit(t: TensorInfo, options: Options) -> str | None:
    """Why a weight of this dtype and shape stays, or None. Raises PlanError if it cannot."""
    if 0 in t.shape:
        return "empty"
    if t.dtype not in FLOATS:
        return f"dtype {t.dtype}"
    refuse_unfit(t.name, t.shape, options)
    assert options.format is not None
    fmt = options.format.of_module(t.name.removesuffix(".weight"))
    try:
        fmt.layout_of(t.shape, t.dtype, options.scheme.folded(t.shape))
    except PlanError as e:
        raise PlanError(
            f"tensor {t.name!r} of shape {list(t.shape)}: {e}; "
            f"leave it with --ignore '{t.name.removesuffix('.weight')}'."
        ) from None
    return None
