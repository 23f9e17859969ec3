"""What verification finds."""

from __future__ import annotations

from dataclasses import dataclass, field

from streamq.quality import Quality

from .lint import Finding


@dataclass(slots=True)
class Report:
    """What was looked at and what failed; ``quality`` is empty without a source.

    ``files``: how many had the checksums of streamq.json, None without one. ``exact``: with a
    source, whether every byte was compared with what it converts to; ``inexact`` says why not.
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
    files: int | None = None
    exact: bool = False
    inexact: str | None = None
