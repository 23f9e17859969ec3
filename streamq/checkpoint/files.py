"""Files of a source that are not trusted: JSON of bounded size, links, files that change."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from streamq.errors import CheckpointError

#: Largest JSON file, in bytes, and how deep it may be nested. The largest index of a published
#: model has some 20 MB. The parser stops at a depth of about 1,000, and so does the writer, but
#: only when it comes to it.
MAX_JSON, MAX_DEPTH = 100_000_000, 64
#: Most lists and objects in JSON: three for each of 2,000,000 tensors, and some. A list takes 64
#: bytes in memory and two in a file; 100 MB of empty ones would take 5 GB.
MAX_LISTS = 8_000_000


class Stamp(NamedTuple):
    """What tells that a file is as it was. No inode: network file systems make them up."""

    size: int
    mtime_ns: int


def stamp_of(found: os.stat_result) -> Stamp:
    """The stamp of a file from its ``stat``."""
    return Stamp(found.st_size, found.st_mtime_ns)


def refuse_many(raw: bytes, name: str) -> None:
    """Raise CheckpointError for JSON with more lists and objects than any file needs."""
    if raw.count(b"[") + raw.count(b"{") > MAX_LISTS:
        raise CheckpointError(f"{name}: has more than {MAX_LISTS} lists and objects.")


def leads_out(root: Path, path: Path) -> bool:
    """Whether ``path`` is a link to somewhere outside of ``root``.

    The cache of the Hub links from ``snapshots/<revision>`` to ``blobs`` beside ``snapshots``:
    that is inside. Else a link in a download could put any file of this machine in the output.
    """
    if not path.is_symlink():
        return False
    base = Path(os.path.realpath(root))
    inside = [base, base.parents[1] / "blobs"] if base.parent.name == "snapshots" else [base]
    real = Path(os.path.realpath(path))
    return not any(real.is_relative_to(folder) for folder in inside)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError for anything else.

    That includes files over MAX_JSON or MAX_DEPTH, two equal keys in an object, of which the
    parser would drop one without a word, and text that cannot be written again.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_JSON + 1)
    except OSError as e:
        raise CheckpointError(f"{path.name}: cannot be read: {e.strerror}.") from e
    if len(raw) > MAX_JSON:
        raise CheckpointError(f"{path.name}: has more than {MAX_JSON} bytes; this is no such file.")
    refuse_many(raw, path.name)
    try:
        value = _parsed(raw)
        if not isinstance(value, dict):
            raise CheckpointError(f"{path.name}: must hold a JSON object.")
        strings = _strings_in(value, path.name)
        if b"\\" in raw or raw.count(b'"') != 2 * strings:
            json.loads(raw, object_pairs_hook=lambda pairs: _unique(pairs, path.name))
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path.name}: is not valid JSON ({e}).") from None
    return value


def _parsed(raw: bytes) -> Any:
    """What json makes of it, which also names the faults; msgspec takes a quarter of the time."""
    try:
        return msgspec.json.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return json.loads(raw)


def _strings_in(value: dict[str, Any], name: str) -> int:
    """How many keys and texts there are. Raises CheckpointError for what is nested too deep."""
    strings = 0
    level: list[dict[str, Any] | list[Any]] = [value]
    for _ in range(MAX_DEPTH):
        deeper: list[dict[str, Any] | list[Any]] = []
        for found in level:
            if isinstance(found, dict):
                strings += len(found)
            for item in found.values() if isinstance(found, dict) else found:
                if type(item) is str:
                    strings += 1
                elif isinstance(item, dict | list):
                    deeper.append(item)
        if not deeper:
            return strings
        level = deeper
    raise CheckpointError(f"{name}: is nested more than {MAX_DEPTH} deep.")


def _unique(pairs: list[tuple[str, Any]], name: str) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise CheckpointError(f"{name}: has the key {twice!r} twice in one object.")
    return made
