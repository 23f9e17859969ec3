"""What a source is told by: names, sizes, times and headers of its files; and what changed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

#: Bytes of the largest file that is not a shard and is read for its fingerprint.
SMALL = 1 << 20


def fingerprint(root: Path, shards: Iterable[str], others: Iterable[str]) -> dict[str, Any]:
    """Of each file its size in bytes and its time of change in ns.

    Of a shard the sha256 of its header as well, of another file that of all of it, if it is small.
    Raises OSError.
    """
    found: dict[str, Any] = {}
    for name in shards:
        fd = os.open(root / name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            length = int.from_bytes(os.pread(fd, 8, 0), "little")
            header = hashlib.sha256(os.pread(fd, 8 + length, 0)).hexdigest()
            found[name] = {**_state(os.fstat(fd)), "header_sha256": header}
        finally:
            os.close(fd)
    for name in others:
        found[name] = _state(os.stat(root / name))
        if found[name]["size"] <= SMALL:
            found[name]["sha256"] = hashlib.sha256((root / name).read_bytes()).hexdigest()
    return found


def _state(stat: os.stat_result) -> dict[str, Any]:
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def without_times(found: Mapping[str, Any]) -> dict[str, Any]:
    """A fingerprint that a copy of the source has as well."""
    return {
        name: {k: v for k, v in said.items() if k != "mtime_ns"} for name, said in found.items()
    }


def contents(found: Mapping[str, Any]) -> dict[str, Any]:
    """What a fingerprint says of the files alone, wherever they come from: without times, and
    without the repository and its commit, which stand under its address.
    """
    return {
        name: said for name, said in without_times(found).items() if not name.startswith("hf://")
    }


def differences(before: Any, now: Any, at: str = "") -> Iterator[str]:
    """Where two JSON values differ: ``scheme name: 'NVFP4' there, 'MXFP4' here``."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from differences(before.get(key), now.get(key), f"{at} {key}".lstrip())
    elif before != now:
        yield f"{at}: {_short(before)} there, {_short(now)} here"


def _short(value: Any) -> str:
    if value is None:
        return "none"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
