"""What verification finds."""

from __future__ import annotations

from dataclasses import dataclass, field

from streamq.quality import Quality


@dataclass(slots=True)
class Report:
    """What was looked at and what failed; ``quality`` is empty without a source."""

    scheme: str = ""
    tensors: int = 0
    quantized: int = 0
    failures: list[str] = field(default_factory=list)
    quality: Quality = field(default_factory=Quality)
