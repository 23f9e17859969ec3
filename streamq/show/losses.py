"""What weights lost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from streamq.quality import Quality


def quality_lines(quality: Quality) -> Iterator[str]:
    """Weight SQNR: overall, by kind of module, of the tensors that lost most."""
    if not quality:
        return
    yield f"weight SQNR {quality.total:.2f} dB"
    for kind, (count, db) in quality.by_kind().items():
        yield f"  {db:6.2f} dB  {kind} x {count}"
    yield "lowest:"
    for name, db in quality.worst():
        yield f"  {db:6.2f} dB  {name}"


def quality_json(quality: Quality) -> dict[str, Any]:
    """The same for programs, and of every tensor; null is infinite, for JSON has no infinity."""

    def number(value: float) -> float | None:
        return value if abs(value) < float("inf") else None

    return {
        "sqnr_db": number(quality.total) if quality else None,
        "sqnr_db_by_kind": {kind: number(db) for kind, (_, db) in quality.by_kind().items()},
        "sqnr_db_by_tensor": {name: number(db) for name, db in quality.by_tensor().items()},
    }
