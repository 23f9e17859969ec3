"""A checkpoint in a local directory: its shards, its index, its other files."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

from streamq.errors import CheckpointError
from streamq.pace import FREE
from streamq.tensors import TensorInfo
from streamq.trust import RECORD

from .files import leads_out, read_json, stamp_of
from .header import Header, read_header

Array = np.ndarray[Any, Any]

CONFIG = "config.json"
#: What Ascend's tools say of a quantization, in place of config.json.
DESCRIPTION = "quant_model_description.json"
#: Most tensors of a checkpoint; published ones have some 200,000.
MAX_TENSORS = 2_000_000
INDEX_SUFFIX = ".safetensors.index.json"
#: Beside weights that ``streamq compress`` wrote, which are no tensors of a model as they are.
COMPRESSION = "streamq_compression.json"
#: In ``__metadata__`` of each file of these, as that one may be lost.
COMPRESSED = "streamq_compression"
# Weights in other containers: converting the safetensors makes a copy of them stale.
_WEIGHT_SUFFIXES = (
    ".safetensors", INDEX_SUFFIX, ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".gguf",
    ".h5", ".msgpack", ".onnx", ".onnx_data", ".tflite", ".ot", ".npz",
)  # fmt: skip


class Checkpoint:
    """An opened source: headers only, no data.

    ``tensors``: by name, in file order; ``nbytes`` of all. ``files``: shard file names in order.
    ``metadata``: by file, what its header says beside tensors. ``config``: config.json, {}
    where there is none. ``others``: paths, relative to ``root``, of the files that are not
    weights. ``oddities``: sentences for people. ``pace``: how fast shards are read.
    """

    def __init__(
        self,
        root: Path,
        headers: dict[str, Header],
        config: dict[str, Any],
        others: list[str],
        oddities: list[str],
    ) -> None:
        self.root = root
        self.files = list(headers)
        self.metadata = {file: header.metadata for file, header in headers.items()}
        self.config = config
        self.others = others
        self.oddities = oddities
        self._stamps = {file: header.stamp for file, header in headers.items()}
        self.nbytes = sum(header.nbytes for header in headers.values())
        self.tensors: dict[str, TensorInfo] = {}
        for header in headers.values():
            known = len(self.tensors)
            self.tensors.update([(t.name, t) for t in header.tensors])
            if len(self.tensors) != known + len(header.tensors):
                self._refuse_doubles(headers)
        self.pace = FREE
        self._fds: dict[str, int] = {}
        self._lock = threading.Lock()

    def _refuse_doubles(self, headers: dict[str, Header]) -> None:
        homes: dict[str, str] = {}
        for header in headers.values():
            for t in header.tensors:
                file = homes.setdefault(t.name, t.file)
                if file != t.file:
                    raise CheckpointError(
                        f"tensor {t.name!r} is in {file} and in {t.file}; "
                        "a checkpoint holds each tensor once."
                    )

    def fd(self, file: str) -> int:
        """A read-only descriptor of a shard, opened at first use and shared by threads."""
        fd = self._fds.get(file)
        if fd is None:
            with self._lock:
                fd = self._fds.get(file)
                if fd is None:
                    fd = os.open(self.root / file, os.O_RDONLY | os.O_CLOEXEC)
                    self._fds[file] = fd
        return fd

    def pread(self, file: str, start: int, into: memoryview) -> None:
        """Fill ``into`` with the bytes at ``start`` of a shard.

        Raises CheckpointError where the file ends early or cannot be read.
        """
        self.pace.take(len(into))
        done = 0
        while done < len(into):
            try:
                n = os.preadv(self.fd(file), [into[done:]], start + done)
            except OSError as e:
                raise CheckpointError(f"{file}: cannot be read: {e.strerror}.") from e
            if n == 0:
                raise CheckpointError(
                    f"{file}: ends before byte {start + len(into)}; it changed while being read."
                )
            done += n

    def pread_lines(self, file: str, start: int, step: int, into: Array) -> None:
        """Fill the rows of ``into``, uint8 ``[lines, bytes]``, from ``start + i * step`` on.

        Raises CheckpointError as ``pread`` does.
        """
        from .lines import read_lines  # numba takes 0.2 s, and few checkpoints need this

        self.pace.take(into.nbytes)
        whole: int = read_lines(self.fd(file), start, step, into)
        for i in range(whole, len(into)):  # interrupted, or an error to tell of
            self.pread(file, start + i * step, into[i].data)

    def refuse_changed(self) -> None:
        """Raise CheckpointError for a shard that is not the one whose header was read."""
        for file, stamp in self._stamps.items():
            try:
                found = stamp_of(os.stat(self.root / file))
            except OSError as e:
                raise CheckpointError(f"{file}: cannot be read: {e.strerror}.") from e
            if stamp is not None and found != stamp:
                raise CheckpointError(
                    f"{file}: changed while it was read, so that old and new bytes may be mixed; "
                    "run again when nothing writes to it."
                )

    def close(self) -> None:
        """Close all descriptors."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(src: str | os.PathLike[str], *, use_index: bool = True) -> Checkpoint:
    """Open a directory with an index, one with shards alone, or a single file.

    Reads headers, index and config. Raises CheckpointError for whatever is wrong with them.
    Without ``use_index`` all shards of a directory count, whatever its index says.
    """
    path = Path(src)
    if is_compressed(path.parent if path.is_file() else path):
        raise CheckpointError(f"{path}: is compressed; `streamq decompress` it first.")
    if path.is_file():
        config = _config(path.parent)
        others = [name for name in (CONFIG, DESCRIPTION) if (path.parent / name).is_file()]
        return _open(path.parent, [path.name], None, config, others, [])
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or directory.")
    config = _config(path)
    others, elsewhere = _other_files(path)
    oddities = []
    if elsewhere:
        oddities.append(f"{', '.join(elsewhere)}: links out of the directory, not copied")
    shards = sorted(p.name for p in path.glob("*.safetensors"))
    index_path = _find_index(path) if use_index else None
    index = None
    if index_path is not None:
        index = _read_index(index_path)
        named = sorted(set(index.values()))
        unnamed = [s for s in shards if s not in set(named)]
        if unnamed:
            oddities.append(f"{', '.join(unnamed)}: not named by the index, left out")
        shards = named
    if not shards:
        raise CheckpointError(f"{path}: no *.safetensors file here.")
    return _open(path, shards, index, config, others, oddities)


def is_compressed(path: str | os.PathLike[str]) -> bool:
    """Whether ``streamq compress`` wrote this directory."""
    return (Path(path) / COMPRESSION).is_file()


def _config(root: Path) -> dict[str, Any]:
    """config.json, with Ascend's description where other quantizations are said.

    Older files of its have the type of the model in their name. Raises CheckpointError where
    config.json speaks of another quantization.
    """
    config = _read_own(root / CONFIG)
    usual = root / DESCRIPTION
    older = sorted(root.glob(f"{usual.stem}_*{usual.suffix}"))
    path = usual if usual.is_file() else older[0] if len(older) == 1 else None
    if path is None:
        return config
    said = config.get("quantization_config")
    method = said.get("quant_method") if isinstance(said, dict) else None
    if method not in (None, "ascend"):
        raise CheckpointError(
            f"{root}: {path.name} is there and {CONFIG} says that the quantization is {method!r}; "
            "remove what is not true of these weights."
        )
    description = {"quant_method": "ascend", "description": _read_own(path)}
    return {**config, "quantization_config": description}


def _open(
    root: Path,
    shards: list[str],
    index: dict[str, str] | None,
    config: dict[str, Any],
    others: list[str],
    oddities: list[str],
) -> Checkpoint:
    for name in shards:
        if not (root / name).is_file():
            raise CheckpointError(
                f"{name}: named by the index but not in {root}; the download is incomplete."
            )
    headers: dict[str, Header] = {}
    count = 0
    for name in shards:
        headers[name] = read_header(str(root / name), name)
        count += len(headers[name].tensors)
        if count > MAX_TENSORS:
            raise CheckpointError(f"{root}: more than {MAX_TENSORS} tensors, which none has.")
    packed = [name for name, header in headers.items() if COMPRESSED in header.metadata]
    if packed:
        raise CheckpointError(
            f"{packed[0]}: is compressed, and {COMPRESSION} is not beside it, which says how; "
            "`streamq decompress` needs both."
        )
    unmarked = [name for name, header in headers.items() if "format" not in header.metadata]
    if unmarked:
        oddities.append(f"{', '.join(unmarked)}: no format in __metadata__, some loaders refuse it")
    checkpoint = Checkpoint(root, headers, config, others, oddities)
    if index is not None:
        _compare_with_index(checkpoint, index)
    if not checkpoint.tensors:
        raise CheckpointError(f"{root}: the shards hold no tensor.")
    return checkpoint


def _compare_with_index(checkpoint: Checkpoint, index: dict[str, str]) -> None:
    files = [t.file for t in checkpoint.tensors.values()]
    if list(map(index.get, checkpoint.tensors)) == files and len(index) == len(files):
        return
    for name, file in index.items():
        t = checkpoint.tensors.get(name)
        if t is None or t.file != file:
            where = "no shard has it" if t is None else f"it is in {t.file}"
            raise CheckpointError(f"the index says that {file} holds tensor {name!r}, but {where}.")
    t = next(t for t in checkpoint.tensors.values() if t.name not in index)
    raise CheckpointError(f"{t.file} holds tensor {t.name!r}, which the index does not name.")


def _find_index(root: Path) -> Path | None:
    found = sorted(root.glob("*" + INDEX_SUFFIX))
    usual = root / ("model" + INDEX_SUFFIX)
    if len(found) > 1 and usual not in found:
        raise CheckpointError(
            f"{root}: several index files ({', '.join(p.name for p in found)}), none of them "
            f"{usual.name}; keep the one to convert."
        )
    return usual if usual in found else found[0] if found else None


def _read_index(path: Path) -> dict[str, str]:
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{path.name}: weight_map must map tensor names to files.")
    files = set(index.values()) if set(map(type, index.values())) == {str} else index.values()
    for file in files:
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            name = next(name for name in index if index[name] is file)
            raise CheckpointError(
                f"{path.name}: {name!r} is in {file!r}, not a *.safetensors file."
            )
        if os.path.basename(file) != file or not file.isprintable():
            raise CheckpointError(
                f"{path.name}: {file!r} leads out of the directory, or is no name of a file."
            )
    return index


def _read_own(path: Path) -> dict[str, Any]:
    """A JSON object of the checkpoint, {} where there is none."""
    if not path.is_file():
        return {}
    if leads_out(path.parent, path):
        raise CheckpointError(
            f"{path.name}: is a link to {os.path.realpath(path)}, out of {path.parent}; put a copy "
            "in its place."
        )
    return read_json(path)


def _other_files(root: Path) -> tuple[list[str], list[str]]:
    """Files to copy: all but weights and hidden ones; and those that ``leads_out`` is true of."""
    found: list[str] = []
    elsewhere: list[str] = []
    for folder, names, files in os.walk(root):
        names[:] = sorted(n for n in names if not n.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if path == root / RECORD:  # of the source; the output has one of its own
                continue
            if not name.startswith(".") and not name.endswith(_WEIGHT_SUFFIXES) and path.is_file():
                (elsewhere if leads_out(root, path) else found).append(str(path.relative_to(root)))
    return found, elsewhere
