"""What verification finds."""

from __future__ import annotations

from dataclasses import dataclass, field

from streamq.quality import Quality


@dataclass(slots=True)
class Report:
    """What was looked at and what failed; ``quality`` is empty without a source.

    ``files``: how many had the checksums of streamq.json, None without one. ``exact``: with a
    source, whether every byte was compared with what it converts to; ``inexact`` says why not.
    """

    scheme: str = ""
    tensors: int = 0
    quantized: int = 0
    failures: list[str] = field(default_factory=list)
    quality: Quality = field(default_factory=Quality)
    files: int | None = None
    exact: bool = False
    inexact: str | None = None
