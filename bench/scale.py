"""What does not grow: ``python bench/scale.py``. Whole processes, peak memory by getrusage.

A plan for 1 TB, conversions of 1, 10 and 40 GB, one tensor of 8 GB in 256 MiB of buffers, one
worker against two. The large checkpoints are files with holes, so they read as zeros;
their outputs are really written, 12 GB at most.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from checkpoints import CHECKPOINTS
from run import STREAMQ, WORK, make, run, show, warm

ROUNDS = 3


def row(name: str, command: list[str], src: Path, rounds: int = 1) -> dict[str, Any]:
    """Medians of some runs of one command."""
    dst = WORK / "out"
    runs = []
    for _ in range(rounds):
        runs.append(run(command, src, dst, prime=False))
    seconds = statistics.median(r.seconds for r in runs)
    size = sum(p.stat().st_size for p in src.glob("*.safetensors"))
    return {
        "checkpoint": CHECKPOINTS[name][0],
        "GB": f"{size / 1e9:.1f}",
        "command": " ".join(command[1:]).replace("{src} {dst}", "").replace("{src}", ""),
        "seconds": f"{seconds:.2f}",
        "peak MB": f"{max(r.memory for r in runs):.0f}",
    }


def main() -> None:
    """All rows."""
    convert = [STREAMQ, "convert", "{src}", "{dst}", "--scheme", "nvfp4a16", "--quiet"]
    rows = []
    plan = [STREAMQ, "plan", "{src}", "--scheme", "nvfp4a16"]
    rows.append(row("T", plan, make("T"), ROUNDS))
    for name in ("S", "H10", "H40"):
        src = make(name)
        if name == "S":
            warm(src)
        rows.append(row(name, [*convert, "--no-sync"], src))
    rows.append(row("B", [*convert, "--no-sync", "--max-memory", "256MiB"], make("B")))
    src = make("M")
    warm(src)
    for workers in ("1", "2"):
        rows.append(row("M", [*convert, "--no-sync", "--workers", workers], src, ROUNDS))
    show(rows, "scale")


if __name__ == "__main__":
    main()
