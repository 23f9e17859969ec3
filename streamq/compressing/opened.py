"""A compressed directory, opened: its manifest, and what its files hold."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from streamq.checkpoint import COMPRESSION, Checkpoint, is_compressed
from streamq.checkpoint.header import parse_header, read_header
from streamq.errors import CheckpointError
from streamq.nz.tiles import info_of
from streamq.tensors import TensorInfo

from .blocks import spans_of, units_of
from .crc import of_array, of_file
from .layout import beside
from .manifest import File, load
from .types import Array, Item, mode_of

_CODINGS = ("raw", "zstd", "low", "high")


class Opened:
    """A compressed directory. Raises CheckpointError where it has no manifest, or a damaged one.

    ``how``: codec and options. ``files``: the files with tensors, which are opened one by one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.root = Path(path)
        if not self.root.is_dir():
            raise CheckpointError(f"{self.root}: no such directory.")
        if not is_compressed(self.root):
            raise CheckpointError(
                f"{self.root}: has no {COMPRESSION}, so `streamq compress` did not write it."
            )
        self.manifest = load(self.root)
        self.how = self.manifest.how
        self.files = self.manifest.shards

    @property
    def bytes_in(self) -> int:
        """Bytes of the files that decompressing gives."""
        return sum(file.original_bytes for file in self.files.values())

    def damaged(self) -> list[str]:
        """The files that are not weights and do not have their check sum, each a sentence."""
        found = []
        for name, crc in self.manifest.files.items():
            try:
                if of_file(self.root / name) != crc:
                    found.append(f"{name}: does not have its check sum; it is damaged or edited")
            except CheckpointError as e:
                found.append(str(e).removesuffix("."))
        return found


class OpenFile:
    """A file of a compressed directory: ``items`` as they come back, ``header`` of the original.

    Raises CheckpointError where its header is not what was written.
    """

    def __init__(self, opened: Opened, name: str) -> None:
        file = opened.files[name]
        found = read_header(str(opened.root / name), name)
        self.name, self.file = name, file
        self._source = Checkpoint(opened.root, {name: found}, {}, [], [])
        try:
            begin = min((t.start for t in found.tensors), default=None)
            if begin is None:
                begin = (opened.root / name).stat().st_size
            if of_array(self.read(0, begin)) != file.header_crc32:
                raise CheckpointError(f"{name}: its header does not have its check sum.")
            self.header, self.items = _original(file, name, bool(opened.how.get("transpose")))
            self._refuse_others()
        except BaseException:
            self.close()
            raise

    def stored(self, item: Item) -> TensorInfo:
        """The tensor that holds an item, or its stream."""
        return self._source.tensors[item.name]

    def size(self, item: Item) -> int:
        """Bytes that an item has here, index and info included."""
        beside_it = beside(item) if mode_of(item.coding) else ()
        return sum(self._source.tensors[name].nbytes for name in (item.name, *beside_it))

    def read(self, start: int, stop: int) -> Array:
        """Bytes of the file, u8, read-only as the kernels are compiled for."""
        data = np.empty(stop - start, np.uint8)
        self._source.pread(self.name, start, data.data)
        data.flags.writeable = False
        return data

    def spans(self, item: Item) -> tuple[Array, bytes]:
        """Where the tiles of an item are in its stream, see ``spans_of``, and all that is beside.

        Raises CheckpointError on damage.
        """
        t = self.stored(item)
        if mode_of(item.coding):
            index, info = (self._source.tensors[name] for name in beside(item))
            raw = self.read(index.start, index.end).tobytes()
            said = self.read(info.start, info.end).tobytes()
            assert item.tiling is not None
            if said != info_of(item.tiling).tobytes():
                raise CheckpointError(f"{info.name!r} does not fit the shape of {item.name!r}")
            return spans_of(item, raw, t.nbytes), raw + said
        size = 8 * units_of(item)
        if t.nbytes < size:
            raise CheckpointError(f"{item.name!r} is shorter than its index")
        raw = self.read(t.end - size, t.end).tobytes()
        return spans_of(item, raw, t.nbytes - size), raw

    def close(self) -> None:
        """Close the descriptor."""
        self._source.close()

    def _refuse_others(self) -> None:
        """Raise CheckpointError for a file that does not hold what the manifest says."""
        wanted: dict[str, tuple[str, tuple[int, ...] | None]] = {}
        for item in self.items:
            if item.coding == "raw":
                wanted[item.name] = item.dtype, item.shape
            elif mode_of(item.coding):
                index, info = beside(item)
                wanted[item.name] = "I8", None
                wanted[index], wanted[info] = ("I8", (8 * units_of(item),)), ("I64", (5,))
            else:
                wanted[item.name] = "U8", None
        found = self._source.tensors
        if wanted.keys() != found.keys():
            odd = min(wanted.keys() ^ found.keys())
            raise CheckpointError(f"{self.name}: {odd!r} is not where {COMPRESSION} says.")
        for name, (dtype, shape) in wanted.items():
            t = found[name]
            if t.dtype != dtype or (shape is not None and t.shape != shape):
                raise CheckpointError(
                    f"{self.name}: {name!r} is {t.dtype} {list(t.shape)}, and {COMPRESSION} says "
                    "something else."
                )


def _original(file: File, name: str, transpose: bool) -> tuple[bytes, list[Item]]:
    """The header of the original, and its tensors in the order of their data."""
    raw = file.original_header.encode()
    tensors = parse_header(raw, f"the original header of {name}", file.original_bytes).tensors
    items = []
    for t in tensors:
        sums = file.tensors.get(t.name)
        if sums is None or sums.coding not in _CODINGS:
            raise CheckpointError(f"{COMPRESSION}: does not say how {t.name!r} is stored.")
        turned = transpose and sums.coding != "raw" and len(t.shape) == 2
        item = Item(t.name, t.dtype, t.shape, t.start, (), sums.coding, turned)  # type: ignore[arg-type]
        if mode_of(item.coding) and item.tiling is None:
            raise CheckpointError(f"{COMPRESSION}: {t.name!r} has no tiles of NZ.")
        items.append(item)
    return len(raw).to_bytes(8, "little") + raw, items
