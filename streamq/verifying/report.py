"""What verification finds."""

from __future__ import annotations

from dataclasses import dataclass, field

from streamq.quality import Quality

from .lint import Finding


@dataclass(slots=True)
class Report:
    """What was looked at and what failed; ``quality`` is empty without a source.

    ``findings``: what loaders would make of it; those that are errors are failures, too.
    ``warnings``: sentences, of the other findings and of tensor-parallel cuts.
    """

    scheme: str = ""
    tensors: int = 0
    quantized: int = 0
    failures: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    quality: Quality = field(default_factory=Quality)
