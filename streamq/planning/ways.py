"""What the options, or the rules of a recipe, want of each tensor."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from streamq.families import Family
from streamq.recipe import Rule
from streamq.schemes import Scheme
from streamq.tensors import TensorInfo, stack_of

from .quantized import AlreadyQuantized
from .types import Options, Target

#: Why modules are left that a rule says to leave, or that no rule names.
KEPT, NOT_NAMED = "rule {} of the recipe", "not in the recipe"

#: A function from a tensor to the reason why it is kept, or None.
WhyNot = Callable[[TensorInfo], str | None]
#: Makes one from options; whether the table of modules that are left alone counts.
Rules = Callable[[Options, Family, bool], WhyNot]


class Way(NamedTuple):
    """All that follows from one scheme."""

    options: Options
    why_not: WhyNot
    decide: AlreadyQuantized
    floats: Target
    views: Target


class Ways:
    """The way of each tensor: one without a recipe, else that of the first rule that names it."""

    def __init__(
        self, options: Options, family: Family, config: dict[str, Any], rules: Rules
    ) -> None:
        self._options, self._family, self._config, self._rules = options, family, config, rules
        self._made: dict[tuple[Scheme, bool], Way] = {}
        self.first = self._way(options.scheme, False)
        recipe = options.recipe
        self.recipe = recipe
        self._rule_of = recipe.rule_of() if recipe else lambda module: None

    def _way(self, scheme: Scheme, named: bool) -> Way:
        found = self._made.get((scheme, named))
        if found is None:
            o = replace(self._options, scheme=scheme)
            assert o.format is not None
            floats = Target(scheme, o.format, "floats", o.numerics)
            found = self._made[scheme, named] = Way(
                o, self._rules(o, self._family, named), AlreadyQuantized(o, self._config), floats,
                floats._replace(origin="views"),
            )  # fmt: skip
        return found

    def of(self, t: TensorInfo) -> tuple[Way, str | None]:
        """The way of a tensor under a recipe, and the reason why it is kept, or None."""
        assert self.recipe is not None
        module = module_of(t.name)
        rule = self._rule_of(module)
        if rule is None:
            if self.recipe.scheme is None:
                return self.first, self.first.why_not(t) or NOT_NAMED
            way = self._way(self.recipe.scheme, False)
        elif rule.scheme is None:
            return self.first, KEPT.format(rule.number)
        else:
            way = self._way(rule.scheme, rule.spells(module))
        return way, way.why_not(t)

    def notes(self) -> list[str]:
        """Sentences about weights that are quantized already."""
        return [note for way in self._made.values() for note in way.decide.notes()]


def module_of(name: str) -> str:
    """What rules name: a tensor without its ``.weight``, an expert as the tensor it lies in."""
    return (stack_of(name) or name).removesuffix(".weight")


def rule_text(options: Options, name: str) -> str:
    """Who decided about a tensor, for errors under a recipe; empty without one."""
    if options.recipe is None:
        return ""
    rule = options.recipe.rule_of()(module_of(name))
    return f" by {rule.label if rule else 'the scheme of all the rest'}"


def recipe_warnings(tensors: list[TensorInfo], kept: dict[int, str], options: Options) -> list[str]:
    """Rules that do nothing: what they match is nothing, taken by earlier rules, or left alone."""
    if options.recipe is None:
        return []
    rule_of = options.recipe.rule_of()
    names = list(dict.fromkeys(module_of(t.name) for t in tensors))
    first = {name: rule for name in names if (rule := rule_of(name)) is not None}
    taken = Counter(rule.number for rule in first.values())
    works: set[int] = set()
    reasons: dict[int, Counter[str]] = {}
    for i, t in enumerate(tensors):
        if (rule := first.get(module_of(t.name))) is None or rule.scheme is None:
            continue
        if i in kept:
            reasons.setdefault(rule.number, Counter())[kept[i]] += 1
        else:
            works.add(rule.number)
    warnings = []
    for rule in options.recipe.rules:
        if not taken[rule.number]:
            warnings.append(_idle(rule, names, first))
        elif rule.scheme is not None and rule.number not in works:
            why = ", ".join(f"{n} x {reason}" for reason, n in reasons[rule.number].most_common())
            warnings.append(
                f"{rule.label} gives {rule.scheme.name} to nothing but what stays as it is ({why})"
            )
    return warnings


def _idle(rule: Rule, names: Iterable[str], first: dict[str, Rule]) -> str:
    test = rule.test()
    matched = [name for name in names if test(name)]
    if not matched:
        return f"{rule.label} matches nothing"
    owner = first[matched[0]]
    return (
        f"{rule.label} is shadowed: all it matches ({len(matched)}, the first {matched[0]!r}) is "
        f"taken by earlier rules, such as {owner.label}"
    )


_EXPERT = re.compile(r"^(.*\.experts)\.\d+\.(.+)$")


def expert_warnings(modules: Mapping[Scheme, list[str]]) -> list[str]:
    """Routed experts in several schemes: vLLM refuses that in a layer, transformers in a model."""
    if len(modules) < 2:
        return []
    found: dict[str, dict[Scheme, str]] = {}
    for scheme, names in modules.items():
        for name in names:
            if expert := _EXPERT.match(name):
                found.setdefault(expert[1], {}).setdefault(scheme, name)
    split = {layer: kinds for layer, kinds in found.items() if len(kinds) > 1}
    if split:
        layer, kinds = next(iter(split.items()))
        said = " and ".join(
            f"{name.removeprefix(layer + '.')!r} {s.name}" for s, name in kinds.items()
        )
        return [
            f"{layer!r} has {said} ({len(split)} such layers): vLLM loads the experts of a layer "
            "in one scheme only"
        ]
    first: dict[Scheme, str] = {}
    for layer, kinds in found.items():
        first.setdefault(next(iter(kinds)), layer)
    if len(first) < 2:
        return []
    said = " and ".join(f"{layer!r} {s.name}" for s, layer in first.items())
    return [f"the experts of {said}: transformers takes one scheme for those of all layers"]
