"""What a reindexing is made of: options, pieces of source tensors, tensors, shards."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from streamq.errors import PlanError
from streamq.families import BAD_REGEX
from streamq.tensors import DTYPES, TensorInfo
from streamq.views import View
from streamq.writer import quoted


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asks for. ``rename``: regexes over names of tensors and what they become.

    Raises PlanError for what does not fit together and for a regex that does not compile.
    """

    fuse: bool = False
    split: bool = False
    shard_size: int | None = None
    rename: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.fuse and self.split:
            raise PlanError("--fuse and --split undo each other; choose one of them.")
        for pattern, to in self.rename:
            try:
                re.compile(pattern).sub(to, "")  # looks at TO even where nothing matches
            except (*BAD_REGEX, IndexError) as e:
                raise PlanError(f"--rename {pattern}={to}: not a valid regex: {e}.") from None


class Piece(NamedTuple):
    """Bytes of a source tensor on their way into an output tensor.

    ``lines`` of ``width`` bytes, the first at ``start`` of ``file`` and each ``step`` bytes behind
    the one before; they land at ``at`` of the tensor, ``stride`` bytes apart.
    """

    file: str
    start: int
    at: int
    width: int
    lines: int = 1
    step: int = 0
    stride: int = 0


@dataclass(frozen=True, slots=True)
class Translated:
    """A tensor of bytes, each of which becomes the one at its place in ``table`` of 256."""

    table: bytes


class Out(NamedTuple):
    """An output tensor: pieces of the source, a few bytes that are known, a transposed view, or
    the tensor at ``start`` of ``file`` translated.

    ``file`` and ``start``: where it stands in the order of the source.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: tuple[Piece, ...] | bytes | View | Translated
    file: str
    start: int

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return prod(self.shape) * DTYPES[self.dtype].bits // 8

    @property
    def files(self) -> set[str]:
        """The source files that it is made from."""
        if isinstance(self.content, tuple) and not isinstance(self.content, View):
            return {piece.file for piece in self.content}
        return {self.file}


def whole(t: TensorInfo) -> Out:
    """A tensor as it is."""
    piece = Piece(t.file, t.start, 0, t.nbytes)
    return Out(t.name, t.dtype, t.shape, (piece,) if t.nbytes else b"", t.file, t.start)


class Copy(NamedTuple):
    """A run of bytes of a source file, and where it goes in the shard."""

    file: str
    start: int
    offset: int
    nbytes: int
    name: str


class Gather(NamedTuple):
    """A tensor, or part of one, whose lines are put together from narrow pieces.

    ``offset``: of the first of ``lines`` lines of ``width`` bytes, which lie one behind the other.
    """

    offset: int
    lines: int
    width: int
    pieces: tuple[Piece, ...]
    name: str


class Transpose(NamedTuple):
    """A matrix that is read column by column and written row by row."""

    offset: int
    view: View
    name: str


class Translate(NamedTuple):
    """A run of bytes of a source file that go through a table of 256."""

    offset: int
    file: str
    start: int
    nbytes: int
    table: bytes
    name: str


Task = Copy | Gather | Transpose | Translate


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file: ``names`` in the order of the data, ``values`` with their offsets."""

    name: str
    names: list[str]
    header: bytes
    size: int
    tasks: list[Task]
    values: list[tuple[int, bytes]]


@dataclass(slots=True)
class Plan:
    """A reindexing that can be carried out.

    ``files``: JSON files whose names of modules changed, by name; config.json where it is among
    them. ``groups``, ``apart``: fused groups, and those whose members lay in several shards.
    ``moved``: tensors with bytes from another shard of the source than the first of their group.
    ``origin``: the command and what decides its bytes, as JSON has it.
    ``made``: how many modules became what, ``{"qkv_proj": 32}``.
    """

    origin: dict[str, Any]
    shards: list[Shard]
    files: dict[str, dict[str, Any]]
    others: list[str]
    other_bytes: int
    input_files: int
    tensors_in: int
    bytes_in: int
    groups: int
    apart: int
    moved: int
    made: dict[str, int]
    renamed: int
    warnings: list[str]
    notes: list[str]

    @property
    def tensors_out(self) -> int:
        """Tensors of the output."""
        return sum(len(s.names) for s in self.shards)

    @property
    def bytes_out(self) -> int:
        """Size of all output shards."""
        return sum(s.size for s in self.shards)

    @property
    def disk_needed(self) -> int:
        """Bytes on disk: shards, and the other files with the index (a rounded-up guess)."""
        return self.bytes_out + self.other_bytes + 200 * self.tensors_out

    def index(self) -> Iterator[str]:
        """Text of ``model.safetensors.index.json``, in the order of the data, in pieces."""
        total = sum(s.size - len(s.header) for s in self.shards)
        yield f'{{\n  "metadata": {{\n    "total_size": {total}\n  }},\n  "weight_map": {{'
        comma = ""
        for s in self.shards:
            between = f'": "{s.name}",\n    "'
            yield f'{comma}\n    "{between.join(quoted(s.names))}": "{s.name}"'
            comma = ","
        yield "\n  }\n}\n"


@dataclass(frozen=True, slots=True)
class Summary:
    """What a reindexing did."""

    bytes_out: int
    seconds: float
    workers: int
