"""``streamq.json``: what an output was made from and how, with a checksum of every file.

Its last line is the checksum of the text before it, so that it covers itself. It holds no times,
no names of machines and no paths: two runs write the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamq.errors import CheckpointError

from .checksums import BLOCK, blocks_of, crc32

RECORD = "streamq.json"
#: That of pyproject.toml; to ask the installed package for it takes 15 ms.
VERSION = "0.1.0"
_LAST = '  "crc32": "'


@dataclass(frozen=True, slots=True)
class FileSum:
    """A file: ``size`` in bytes, ``crc32`` of each block of it, sha256 of all if asked for."""

    size: int
    crc32: list[int]
    sha256: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The sums of the blocks are eight hexadecimal digits each, one behind the other."""
        found: dict[str, Any] = {
            "size": self.size, "crc32": "".join(f"{crc:08x}" for crc in self.crc32)
        }  # fmt: skip
        return found if self.sha256 is None else {**found, "sha256": self.sha256}


@dataclass(frozen=True, slots=True)
class Record:
    """``about``: what is said of the origin; ``files``: all of the output but this one."""

    about: dict[str, Any]
    files: dict[str, FileSum]


def record_text(about: Mapping[str, Any], files: Mapping[str, FileSum]) -> str:
    """The text of the file."""
    value = {
        **about,
        "checksum": {"algorithm": "crc32", "block": BLOCK},
        "files": {name: files[name].to_json() for name in sorted(files)},
    }
    text = json.dumps(value, indent=2, ensure_ascii=False).removesuffix("\n}") + ",\n"
    return f'{text}{_LAST}{crc32(text.encode()):08x}"\n}}\n'


def parse_record(raw: bytes) -> Record:
    """The inverse of ``record_text``. Raises CheckpointError for any other bytes."""
    body, found, last = raw.rpartition(_LAST.encode())
    if not found or last != b'%08x"\n}\n' % crc32(body):
        raise CheckpointError(f"{RECORD}: is not what was written; its own checksum differs.")
    try:
        value = json.loads(raw)
        del value["crc32"]
        checksum, files = value.pop("checksum"), value.pop("files")
        if checksum != {"algorithm": "crc32", "block": BLOCK}:
            raise CheckpointError(f"{RECORD}: has checksums of another kind: {checksum!r}.")
        return Record(value, {name: _file_sum(said) for name, said in files.items()})
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"{RECORD}: is not a record of streamq ({e!r}).") from None


def _file_sum(said: dict[str, Any]) -> FileSum:
    text, size = said["crc32"], said["size"]
    if len(text) != 8 * blocks_of(size):
        raise ValueError("the number of checksums does not fit the size")
    return FileSum(
        size, [int(text[i : i + 8], 16) for i in range(0, len(text), 8)], said.get("sha256")
    )
