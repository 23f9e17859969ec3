"""The formats."""

from __future__ import annotations

from typing import Any

from streamq.formats import FORMATS, default_format
from streamq.schemes import PLAIN, SCHEMES

from . import text


def formats_json() -> list[dict[str, Any]]:
    """The formats for programs."""
    return [{"name": f.name, "loaders": f.loaders, "schemes": list(f.presets)}
            for f in FORMATS.values()]  # fmt: skip


def show_formats() -> None:
    """The formats as a table; the first that holds a scheme is its default."""
    console = text.console()
    table = text.table("format", "for", "schemes")
    for f in FORMATS.values():
        table.add_row(f.name, f.loaders, ", ".join(f.presets))
    console.print(table)
    first, last = default_format(next(iter(SCHEMES.values()))), default_format(PLAIN["BF16"])
    console.print(f"Without --format: {first.name}; for {', '.join(PLAIN)} {last.name}.")
