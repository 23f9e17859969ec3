"""A batch as it goes and in the end; and what it would do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from streamq.tensors import size_text

from . import text


def outcome_line(said: dict[str, Any]) -> str:
    """A job that has come to its end, as ``Outcome.to_json`` has it."""
    if said["state"] != "done":
        why = f": {said['error']}" if said["error"] else ""
        return f"{said['dst']}: {_STATES[said['state']]}{why}"
    return f"{said['dst']}: done, " + ", ".join(filter(None, (
        size_text(said["bytes_out"]), _smaller(said) and f"{_smaller(said)} smaller",
        f"{said['seconds']:.1f} s" if "seconds" in said else "", _speed(said),
        said["tries"] > 1 and f"{said['tries']} tries",
    )))  # fmt: skip


def show_outcomes(found: Sequence[dict[str, Any]]) -> None:
    """What became of the jobs, as ``Outcome.to_json`` has them."""
    console = text.console()
    table = text.table("job", "scheme", "in", "out", "smaller", "time", "speed", "SQNR", "")
    for said in found:
        db = said.get("sqnr_db")
        seconds = said.get("seconds")
        table.add_row(
            said["dst"], said.get("scheme") or "", _size(said, "bytes_in"),
            _size(said, "bytes_out") if said["state"] in ("done", "kept") else "",
            _smaller(said) if said["state"] in ("done", "kept") else "",
            f"{seconds:.1f} s" if seconds is not None else "", _speed(said),
            f"{db:.2f} dB" if db is not None else "", _state(said),
        )  # fmt: skip
    console.print(table)


def show_plans(found: Sequence[dict[str, Any]]) -> None:
    """What jobs would do, as ``Planned.to_json`` has it with ``state``, or an ``error``."""
    console = text.console()
    table = text.table(
        "job", "scheme", "format", "count", "in", "out", "smaller", "disk", "download", ""
    )
    for said in found:
        table.add_row(
            said["dst"], said.get("scheme") or "", said.get("format") or "",
            str(said.get("quantized", "")), _size(said, "bytes_in"), _size(said, "bytes_out"),
            _smaller(said), _size(said, "disk_needed"),
            _size(said, "download") if said.get("download") else "", _state(said),
        )  # fmt: skip
    console.print(table)
    for said in found:
        for warning in said.get("warnings", ()):
            console.print(f"{said['dst']}: warning: {warning}", soft_wrap=True, markup=False)


_STATES = {
    "done": "done", "kept": "done before", "failed": "failed", "not started": "not started",
    "planned": "",
}  # fmt: skip


def _state(said: dict[str, Any]) -> Any:
    from rich.text import Text

    shown = _STATES[said["state"]]
    return Text(f"{shown}: {said['error']}" if said.get("error") else shown)


def _size(said: dict[str, Any], key: str) -> str:
    return size_text(said[key]) if key in said else ""


def _smaller(said: dict[str, Any]) -> str:
    if not said.get("bytes_out"):
        return ""
    return f"{said['bytes_in'] / said['bytes_out']:.2f}x"


def _speed(said: dict[str, Any]) -> str:
    """Bytes of the source a second; not of a conversion of which another run did a part."""
    if not said.get("seconds") or said.get("bytes_resumed"):
        return ""
    return f"{size_text(said['bytes_in'] / said['seconds'])}/s"
