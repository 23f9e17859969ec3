"""The header of an output shard."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

Column = np.ndarray[Any, Any]
Region = tuple[list[str], str, list[tuple[int, ...]], list[int], Column, Column]


def quoted(names: list[str]) -> list[str]:
    """The insides of JSON strings, by one look at all of them: names hardly ever need escapes."""
    quote: Callable[[str], str] = json.encoder.encode_basestring
    together = "".join(names)
    if len(quote(together)) == len(together) + 2:
        return names
    return [quote(name)[1:-1] for name in names]


def build_header(regions: Iterable[Region], metadata: Mapping[str, str] | None = None) -> bytes:
    """The length and JSON that open a file.

    Takes columns ``(names, dtype, shapes, kinds, starts, sizes)`` in the order of the data,
    which has no gaps; names ``quoted``, ``kinds`` numbers in ``shapes``, offsets counted from
    the first data byte. Padded with spaces to a multiple of 8, as the format's owner does, so
    that data starts aligned. ``format: pt`` because loaders refuse files without it, and
    ``metadata`` beside it. Columns are joined, as formatting each entry takes twice as long.
    """
    said = json.dumps({"format": "pt", **(metadata or {})}, separators=(",", ":"))
    parts = [f'{{"__metadata__":{said}']
    for names, dtype, shapes, kinds, starts, sizes in regions:
        middles = [
            f'":{{"dtype":"{dtype}","shape":[{",".join(map(str, shape))}],"data_offsets":['
            for shape in shapes
        ]
        edges = list(map(str, [*starts.tolist(), int(starts[-1] + sizes[-1])]))
        columns = [","] * (6 * len(names))
        columns[0::6] = [']},"'] * len(names)
        columns[1::6] = names
        columns[2::6] = map(middles.__getitem__, kinds)
        columns[3::6] = edges[:-1]
        columns[5::6] = edges[1:]
        columns[0] = ',"'
        parts += [*columns, "]}"]
    parts.append("}")
    text = "".join(parts).encode()
    padding = -len(text) % 8
    return b"".join(((len(text) + padding).to_bytes(8, "little"), text, b" " * padding))
