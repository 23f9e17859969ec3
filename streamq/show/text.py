"""Tables, and numbers as people read them."""

from __future__ import annotations

import sys
from typing import Any

_NUMBERS = {
    "count", "in", "out", "size", "smaller", "time", "speed", "SQNR", "disk", "download",
}  # fmt: skip


def console() -> Any:
    """Tables are as wide as the terminal; in a file or a pipe nothing is folded."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def table(*columns: str) -> Any:
    """A table; columns of numbers go by their names."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        number = column in _NUMBERS
        made.add_column(column, justify="right" if number else "left", overflow="fold")
    return made


def files(n: int) -> str:
    """How many."""
    return f"{n} file" if n == 1 else f"{n} files"


def count(n: int) -> str:
    """A number of parameters as model names give it: 6.82M, 8.03B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return str(n)


def shape(sizes: tuple[int, ...]) -> str:
    """``2048 x 512``."""
    return " x ".join(map(str, sizes)) or "scalar"
