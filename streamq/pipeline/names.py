"""What ``--device`` may say. Imports nothing heavy: the command line asks it first."""

from __future__ import annotations

import re

from streamq.errors import PlanError

#: Kinds of devices that are numbered.
NUMBERED = ("cuda", "npu")

_NUMBERED = re.compile(rf"({'|'.join(NUMBERED)})(?::(\d{{1,3}}))?")


def device_names(text: str) -> tuple[str, ...]:
    """The devices of ``cpu``, ``auto``, ``cuda``, ``npu`` or ``cuda:0,cuda:1``.

    ``cuda`` alone is the first GPU. Raises PlanError for anything else, and for devices that
    are named twice or are not of one kind.
    """
    parts = [part.strip() for part in text.lower().split(",")]
    if len(parts) == 1 and parts[0] in ("cpu", "auto"):
        return (parts[0],)
    found = [_NUMBERED.fullmatch(part) for part in parts]
    names = tuple(f"{m[1]}:{int(m[2] or 0)}" for m in found if m)
    if len(names) < len(parts):
        raise PlanError(
            f"{text!r} is not a device: cpu, auto, cuda, npu, or numbered ones such as "
            "cuda:0,cuda:1."
        )
    if len(set(names)) < len(names):
        raise PlanError(f"{text!r} names a device twice.")
    if len({m[1] for m in found if m}) > 1:
        raise PlanError(f"{text!r} names devices of two kinds; use those of one.")
    return names
