"""What the loaders of a checkpoint would make of it: one table of rules, one row each.

Each row names a loader with the version, or the commit, that it was read from, and says where.
"""

from __future__ import annotations

from typing import NamedTuple

from . import config, files, scales
from .facts import Facts, Fusion, Rule, Severity
from .files import MARKS
from .scales import GLOBAL, INPUT, unequal

__all__ = [
    "GLOBAL", "INPUT", "MARKS", "RULES", "Facts", "Finding", "Fusion", "Rule", "lint", "unequal",
]  # fmt: skip

RULES: tuple[Rule, ...] = (*scales.RULES, *config.RULES, *files.RULES)

#: As many names as a sentence has.
_SHOWN = 3


class Finding(NamedTuple):
    """What a loader does with some tensors; ``names`` are all that a rule found."""

    rule: str
    loader: str
    severity: Severity
    says: str
    names: list[str]

    @property
    def text(self) -> str:
        """One sentence."""
        shown = ", ".join(map(repr, self.names[:_SHOWN]))
        more = len(self.names) - _SHOWN
        return f"{self.loader} {self.says}: {shown}{f' and {more} more' if more > 0 else ''}"


def lint(facts: Facts) -> list[Finding]:
    """What every rule finds, errors first."""
    found = []
    for rule in RULES:
        concerns = not rule.formats or facts.format in rule.formats
        if concerns and (names := rule.find(facts)):
            found.append(Finding(rule.name, rule.loader, rule.severity, rule.says, names))
    return sorted(found, key=lambda f: f.severity)
