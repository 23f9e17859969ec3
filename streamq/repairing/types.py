"""What a repair is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isinf
from typing import Any, NamedTuple

from streamq.reindexing import Plan


class Shared(NamedTuple):
    """A fused group that gets one scale. ``old``: by module; ``kind``: the suffix of the scale.

    ``sqnr``: of the new values against the old ones, in dB; ``change``: the largest relative one.
    Both are None for scales of activations, which no weight is stored with.
    """

    kind: str
    old: dict[str, float]
    new: float
    sqnr: float | None = None
    change: float | None = None

    @property
    def text(self) -> str:
        """One line."""
        values = list(self.old.values())
        first = next(iter(self.old))
        said = f"{first!r} and {len(self.old) - 1} more: {self.kind} "
        said += f"{', '.join(f'{v:g}' for v in values)} -> {self.new:g}"
        if self.sqnr is None or self.change is None:
            return said
        if isinf(self.sqnr):
            return f"{said}, no value changes"
        return f"{said}, SQNR {self.sqnr:.1f} dB, values change by {self.change:.1%} at most"

    def as_json(self) -> dict[str, Any]:
        """For programs; ``sqnr`` is null where nothing changes."""
        exact = self.sqnr is None or isinf(self.sqnr)
        return {**self._asdict(), "sqnr": None if exact else self.sqnr}


@dataclass(frozen=True, slots=True)
class Repair:
    """A plan, what it ``repairs`` in sentences, and what it cannot (``left``)."""

    plan: Plan
    repairs: list[str]
    shared: list[Shared] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def needed(self) -> bool:
        """Whether there is anything to repair."""
        return bool(self.repairs or self.shared)
