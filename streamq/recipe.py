"""Recipes: which modules become what, as ordered rules in TOML or YAML. The first match counts."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streamq.errors import PlanError
from streamq.families import ExpertLayout, FusedGroup, matcher
from streamq.schemes import Scheme, has_groups, resolve
from streamq.tables import Table, read_table

#: Schemes of rules that leave modules as they are.
KEEP = ("keep", "ignore")
#: How experts may lie in one tensor: whether transposed, whether rows of gate and up take turns.
LAYOUTS = {
    "plain": (False, False), "transposed": (True, False), "interleaved": (False, True),
    "transposed-interleaved": (True, True),
}  # fmt: skip

Given = str | os.PathLike[str] | Mapping[str, Any]

#: Largest recipe, in bytes (one rule for each of 100,000 modules has 8 MB).
MAX_RECIPE = 32_000_000

_WILD = re.compile(r"[*?\[\]]")


@dataclass(frozen=True, slots=True)
class Rule:
    """``scheme``: None leaves the modules as they are."""

    number: int
    patterns: tuple[str, ...]
    scheme: Scheme | None

    @property
    def label(self) -> str:
        """The rule in messages: its number and its pattern."""
        more = f" and {len(self.patterns) - 1} more" if len(self.patterns) > 1 else ""
        return f"recipe rule {self.number} ({self.patterns[0]!r}{more})"

    def spells(self, module: str) -> bool:
        """Whether a pattern has every part of the name, with ``*`` in place of numbers only.

        That is what overrides the table of modules that are left alone: ``lm_head`` and
        ``model.layers.*.self_attn.kv_b_proj`` do, ``*.kv_b_proj`` and regexes do not.
        """
        parts = module.split(".")
        for pattern in self.patterns:
            asked = pattern.split(".")
            if len(asked) == len(parts) and all(
                a == p or (a == "*" and p.isdigit()) for a, p in zip(asked, parts, strict=True)
            ):
                return True
        return False

    def test(self) -> Callable[[str], bool]:
        """A function that says whether the rule names a module; exact names cost one look."""
        exact = {p for p in self.patterns if not p.startswith("re:") and not _WILD.search(p)}
        others = matcher(p for p in self.patterns if p not in exact)
        return lambda module: module in exact or others(module)


@dataclass(frozen=True, slots=True)
class Recipe:
    """``scheme``: of what no rule names; None leaves that as it is.

    ``format``: as ``--format`` spells it. ``groups``, ``experts``: rows before those of
    the tables of families. ``text``: the recipe as a file, where streamq made it.
    """

    rules: tuple[Rule, ...]
    scheme: Scheme | None = None
    format: str | None = None
    ignore: tuple[str, ...] = ()
    groups: tuple[FusedGroup, ...] = ()
    experts: tuple[ExpertLayout, ...] = ()
    text: str | None = None

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """The distinct schemes, the one for all the rest first."""
        asked = (self.scheme, *(rule.scheme for rule in self.rules))
        return tuple(dict.fromkeys(s for s in asked if s is not None))

    def rule_of(self) -> Callable[[str], Rule | None]:
        """A function from a module to the first rule that names it."""
        tests = [(rule.test(), rule) for rule in self.rules]
        return lambda module: next((rule for test, rule in tests if test(module)), None)

    def mapped(self, change: Callable[[Scheme], Scheme]) -> Recipe:
        """The recipe with its schemes changed, such as by ``Format.concrete``."""
        rules = tuple(replace(r, scheme=change(r.scheme)) if r.scheme else r for r in self.rules)
        return replace(self, rules=rules, scheme=change(self.scheme) if self.scheme else None)


#: The group size that a format has where none is named, None: that of the scheme.
GroupOf = Callable[[str | None], int | None]


def load(given: Given, scales: str = "absmax", group_of: GroupOf = lambda fmt: None) -> Recipe:
    """A recipe from a file (``.yaml`` and ``.yml`` are YAML, all else TOML) or from its contents.

    ``scales``: of rules that do not say theirs. ``group_of``: asked with the format that the
    recipe names. Raises PlanError with the rule and the key for
    what is not known or of the wrong type, and for a file that cannot be read.
    """
    if isinstance(given, Mapping):
        return _recipe(Table(given, "recipe"), scales, group_of)
    found = read_table(given, "recipe", MAX_RECIPE)
    return _recipe(Table(found, f"recipe {Path(given).name}"), scales, group_of)


def _recipe(table: Table, scales: str, group_of: GroupOf) -> Recipe:
    name, size = table.text("scheme"), table.number("group_size")
    own, fmt = table.text("scales", ("absmax", "search")), table.text("format")
    group, scheme = group_of(fmt), None
    if name is not None:
        scheme = _scheme(table, name, size, own or scales, group)
    elif size is not None or own is not None:
        key = "scales" if size is None else "group_size"
        raise PlanError(f"{table.where}: {key} needs a scheme beside it.")
    groups = []
    for t in table.tables("group"):
        row = FusedGroup(t.need("name", t.text("name")), t.need("members", t.names("members")))
        if len(set(row.members)) < 2 or any("." in m for m in row.members):
            raise PlanError(
                f"{t.where}: members must be two or more last parts of names, such as q_proj."
            )
        t.done("name", "members")
        groups.append(row)
    experts = []
    for t in table.tables("experts"):
        pattern = t.need("pattern", t.text("pattern"))
        layout = t.need("layout", t.text("layout", tuple(LAYOUTS)))
        _compiled(t, "pattern", (pattern,))
        experts.append(ExpertLayout(pattern, *LAYOUTS[layout], t.names("parts")))
        t.done("pattern", "layout", "parts")
    found = Recipe(
        tuple(_rule(i, t, scales, group) for i, t in enumerate(table.tables("rule"), 1)), scheme,
        fmt, _compiled(table, "ignore", table.names("ignore")), tuple(groups),
        tuple(experts),
    )  # fmt: skip
    table.done("scheme", "group_size", "scales", "format", "ignore", "rule", "group", "experts")
    return found


def _rule(number: int, t: Table, scales: str, group: int | None) -> Rule:
    patterns = _compiled(t, "pattern", t.need("pattern", t.names("pattern")))
    name, size = t.need("scheme", t.text("scheme")), t.number("group_size")
    own = t.text("scales", ("absmax", "search"))
    t.done("pattern", "scheme", "group_size", "scales")
    if name.lower() not in KEEP:
        return Rule(number, patterns, _scheme(t, name, size, own or scales, group))
    if size is not None or own is not None:
        key = "scales" if size is None else "group_size"
        raise PlanError(f"{t.where}: {key} does not apply to the scheme {name!r}.")
    return Rule(number, patterns, None)


def _compiled(t: Table, key: str, patterns: tuple[str, ...]) -> tuple[str, ...]:
    try:
        matcher(patterns)
    except PlanError as e:
        raise PlanError(f"{t.where}: {key}: {e}") from None
    return patterns


def _scheme(
    t: Table, name: str, group_size: int | None, scales: str, default: int | None
) -> Scheme:
    try:
        scheme = resolve(name)
        if scheme.is_float:
            raise PlanError(f"{name!r} is no quantization; 'keep' leaves modules as they are.")
        if group_size is not None and not has_groups(name):
            raise PlanError(f"group_size does not apply to {scheme.name}.")
        if group_size is None and has_groups(name):
            group_size = default
        return replace(resolve(name, group_size), scales=scales)  # type: ignore[arg-type]
    except PlanError as e:
        key = "group_size" if "group" in str(e) else "scheme"
        raise PlanError(f"{t.where}: {key}: {str(e).replace('--group-size', 'it')}") from None


def text_of(recipe: Recipe) -> str:
    """A recipe as TOML that ``streamq.recipe.load`` reads as the same."""
    lines = ["# Chosen by streamq for the least squared error of the weights."]
    if recipe.scheme is not None:
        lines += _scheme_lines(recipe.scheme)
    if recipe.format is not None:
        lines.append(f"format = {json.dumps(recipe.format)}")
    for rule in recipe.rules:
        lines += ["", "[[rule]]"]
        lines += _scheme_lines(rule.scheme) if rule.scheme else ['scheme = "keep"']
        lines += ["pattern = [", *(f"  {json.dumps(p)}," for p in rule.patterns), "]"]
    return "\n".join(lines) + "\n"


def _scheme_lines(scheme: Scheme) -> list[str]:
    lines = [f"scheme = {json.dumps(scheme.name.lower())}"]
    if has_groups(scheme.name):
        lines.append(f"group_size = {scheme.block[1]}")
    if scheme.scales != "absmax":
        lines.append(f'scales = "{scheme.scales}"')
    return lines
