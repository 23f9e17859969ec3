"""What a compression is made of: options, where the bytes of a tensor are, tensors, shards."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NamedTuple

import numpy as np

from streamq.errors import PlanError
from streamq.nz.tables import Mode
from streamq.nz.tiles import HEIGHT, TILE, Tiling
from streamq.tensors import DTYPES

Array = np.ndarray[Any, Any]
Codec = Literal["zstd", "ascend"]
#: How a tensor is stored: as it is, as zstandard frames, or in a mode of the sparse codec.
Coding = Literal["raw", "zstd", "low", "high"]
#: Told of bytes done, and of the tensor that they belong to.
Progress = Callable[[int, str], None]

#: Fractals along k of a tile of the zstd codec, 64 KiB: each byte of an element is a frame of
#: its own, and bf16 is .690 of its size then, with tiles of 32 KiB .701, with 128 KiB .691.
ZSTD_TILE = 16
FLAT_TILE = 1 << 16
#: A row of tiles may have so many bytes; longer rows of a matrix are not cut into tiles.
MAX_ROW = 64 << 20


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asks for.

    ``dictionary``: of the sparse codec, see ``nz.encode``. ``disable``: patterns over names of
    layers that stay as they are. ``keep``: the fraction of each row that magnitude pruning
    keeps. ``tp``: tensor-parallel ranks that the weights are fused and cut for, None for none.
    Raises PlanError for what does not fit together.
    """

    codec: Codec = "zstd"
    dictionary: Literal["call", "tile"] = "call"
    disable: tuple[str, ...] = ()
    transpose: bool = False
    keep: float | None = None
    tp: int | None = None

    def __post_init__(self) -> None:
        if self.dictionary != "call" and self.codec != "ascend":
            raise PlanError("--dictionary is for --codec ascend; zstd has no dictionaries.")
        if self.tp is not None and self.tp < 1:
            raise PlanError(f"--tp is a number of ranks from 1 on, not {self.tp}.")


def sparsity(text: str) -> float:
    """The fraction to keep from ``magnitude:R``. Raises PlanError for anything else."""
    found = re.fullmatch(r"magnitude:(\d*\.?\d+)", text)
    keep = float(found[1]) if found else 0.0
    if not 0 < keep <= 1:
        raise PlanError(
            f"--sparsity {text}: it is magnitude:R, where R is the fraction of each row to keep, "
            "above 0 and up to 1."
        )
    return keep


class Run(NamedTuple):
    """Rows in a source file: ``rows`` of ``width`` bytes, at ``lead`` of rows ``step`` apart."""

    file: str
    start: int
    rows: int
    width: int
    step: int
    lead: int = 0


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor to be stored, as decompressing gives it back.

    ``runs``: its rows one after another; () stands for zeros. ``start``: where it begins in the
    decompressed file. ``why``: the reason if it is stored as it is. ``keep``: see Options.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    runs: tuple[Run, ...] = ()
    coding: Coding = "raw"
    transpose: bool = False
    keep: float | None = None
    why: str = ""

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return prod(self.shape) * DTYPES[self.dtype].bits // 8

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return DTYPES[self.dtype].itemsize

    @property
    def tiling(self) -> Tiling | None:
        """How the matrix is cut into tiles of NZ; None where the bytes are taken as they are."""
        if self.coding == "raw" or not is_tiled(self.dtype, self.shape, self.transpose):
            return None
        sparse = self.coding != "zstd"
        rows, cols = self.shape
        width = TILE if sparse else ZSTD_TILE
        return Tiling(rows, cols, self.itemsize, self.transpose, width, sparse)


def is_tiled(dtype: str, shape: tuple[int, ...], transpose: bool) -> bool:
    """Whether a tensor has FRACTAL_NZ and tiles that memory can hold."""
    if len(shape) != 2 or DTYPES[dtype].bits not in (8, 16, 32) or min(shape) < 16:
        return False
    along = shape[0] if transpose else shape[1]
    return HEIGHT * along * DTYPES[dtype].itemsize <= MAX_ROW


def mode_of(coding: Coding) -> Mode | None:
    """The mode of the sparse codec, None for other codings."""
    return coding if coding in ("low", "high") else None


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of the output. ``header``: of the file that decompressing it gives."""

    name: str
    header: bytes
    items: list[Item]
    metadata: dict[str, str]


@dataclass(slots=True)
class Plan:
    """A compression that can be carried out.

    ``index``: the name of the index, None without one. ``texts``: files that are written instead
    of those of the source; ``restore``: what they, and the index, were. ``kind``: what is
    compressed becomes this type, as Ascend calls it, or zstd.
    """

    options: Options
    shards: list[Shard]
    index: str | None
    texts: dict[str, str]
    restore: dict[str, str]
    others: list[str]
    other_bytes: int
    kind: str
    bytes_in: int
    warnings: list[str]
    notes: list[str]
