"""streamq_compression.json: what decompressing needs beside the streams, and the sum of everything.

The file ends with the CRC-32 of all of itself before that number, so that its own damage is
seen as well.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from streamq.checkpoint import COMPRESSION
from streamq.errors import CheckpointError

VERSION = 1
_TAIL = re.compile(rb'([0-9a-f]{8})"\n}\n')
_TAIL_BYTES = 12


@dataclass(slots=True)
class Sums:
    """A tensor: how it is stored, the CRC-32 of its bytes, and that of its stream with index.

    Of a transposed matrix the bytes are its strips of 128 columns, one behind the other.
    """

    coding: str
    crc32: int
    stored_crc32: int


@dataclass(slots=True)
class File:
    """A compressed file: the CRC-32 of its header, the original's size and header, the tensors."""

    header_crc32: int
    original_bytes: int
    original_header: str
    tensors: dict[str, Sums] = field(default_factory=dict)


@dataclass(slots=True)
class Manifest:
    """What was done, and to what.

    ``how``: codec, kind and options, for people and for decoding. ``shards``: by name.
    ``files``: the CRC-32 of all other files. ``restore``: by name the text of files that were
    not copied as they are, and are to come back; what is in neither was made anew.
    """

    how: dict[str, Any]
    shards: dict[str, File] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    restore: dict[str, str] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The contents of the file."""
        body = json.dumps({
            "version": VERSION, **self.how, "shards": {
                name: {
                    "header_crc32": file.header_crc32, "original_bytes": file.original_bytes,
                    "original_header": file.original_header,
                    "tensors": {t: [s.coding, s.crc32, s.stored_crc32]
                                for t, s in file.tensors.items()},
                } for name, file in self.shards.items()
            }, "files": self.files, "restore": self.restore, "made": self.made,
        }, indent=1, ensure_ascii=False)  # fmt: skip
        head = body.removesuffix("\n}") + ',\n "crc32": "'
        return f'{head}{zlib.crc32(head.encode()):08x}"\n}}\n'


def load(folder: Path) -> Manifest:
    """The manifest of a compressed directory. Raises CheckpointError for a damaged one."""
    try:
        raw = (folder / COMPRESSION).read_bytes()
    except OSError as e:
        raise CheckpointError(f"{COMPRESSION}: cannot be read: {e.strerror}.") from e
    tail = _TAIL.fullmatch(raw[-_TAIL_BYTES:])
    if tail is None or zlib.crc32(raw[:-_TAIL_BYTES]) != int(tail[1], 16):
        raise CheckpointError(f"{COMPRESSION}: it does not have its check sum; it is damaged.")
    try:
        return _parsed(json.loads(raw))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"{COMPRESSION}: is not what streamq writes ({e!r}).") from None


def _parsed(found: Mapping[str, Any]) -> Manifest:
    if found["version"] != VERSION:
        raise CheckpointError(
            f"{COMPRESSION}: version {found['version']} is not known here; use a newer streamq."
        )
    shards = {
        name: File(
            file["header_crc32"], file["original_bytes"], file["original_header"],
            {name: Sums(*sums) for name, sums in file["tensors"].items()},
        )
        for name, file in found["shards"].items()
    }  # fmt: skip
    for path in map(PurePath, (*shards, *found["files"], *found["restore"])):
        if path.is_absolute() or ".." in path.parts or "\0" in str(path):
            raise CheckpointError(f"{COMPRESSION}: {str(path)!r} leads out of the directory.")
    ours = ("version", "shards", "files", "restore", "made", "crc32")
    how = {key: value for key, value in found.items() if key not in ours}
    return Manifest(how, shards, found["files"], found["restore"], found["made"])
