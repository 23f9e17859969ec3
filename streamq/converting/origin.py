"""What decides the bytes of an output, and what is said of it in streamq.json."""

from __future__ import annotations

from typing import Any

from streamq.planning import Plan, spelled
from streamq.trust import VERSION, crc32, without_times


def identity_of(plan: Plan, source: dict[str, Any]) -> dict[str, Any]:
    """All that decides the bytes of an output; ``source`` is its ``fingerprint``."""
    return {
        "streamq": VERSION,
        "options": spelled(plan.options),
        "source": source,
        "headers": {shard.name: crc32(shard.header) for shard in plan.shards},
    }


def origin_of(plan: Plan, source: dict[str, Any]) -> dict[str, Any]:
    """What streamq.json says, beside checksums; equal for equal outputs."""
    return {
        "streamq": VERSION, "command": "convert", "options": spelled(plan.options),
        "source": without_times(source),
    }  # fmt: skip
