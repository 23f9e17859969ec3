"""Opening a checkpoint in a local directory: its shards, its index, its other files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from streamq.errors import CheckpointError
from streamq.hub import is_hub
from streamq.trust import RECORD

from .files import leads_out, read_json
from .header import Header, read_header
from .source import Checkpoint
from .spool import SPOOL

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
WEIGHT_SUFFIXES = (
    ".safetensors", INDEX_SUFFIX, ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".gguf",
    ".h5", ".msgpack", ".onnx", ".onnx_data", ".tflite", ".ot", ".npz",
)  # fmt: skip


def open_checkpoint(
    src: str | os.PathLike[str], *, use_index: bool = True, spool: int = SPOOL,
    spool_dir: str | os.PathLike[str] | None = None,
) -> Checkpoint:  # fmt: skip
    """Open a directory with an index, one with shards alone, a single file, or ``hf://org/repo``.

    Reads headers, index and config. Raises CheckpointError for whatever is wrong with them, and
    HubError where a repository cannot be read. Without ``use_index`` all shards count, whatever
    the index says. ``spool``: bytes on disk, in ``spool_dir``, for what of a repository is needed
    more than once.
    """
    if is_hub(src):
        from .from_hub import open_hub

        return open_hub(str(src), use_index, spool, spool_dir)
    path = Path(src)
    if is_compressed(path.parent if path.is_file() else path):
        raise CheckpointError(f"{path}: is compressed; `streamq decompress` it first.")
    if path.is_file():
        config = read_config(path.parent)
        others = [name for name in (CONFIG, DESCRIPTION) if (path.parent / name).is_file()]
        return _open(path.parent, [path.name], None, config, others, [])
    if not path.is_dir():
        raise CheckpointError(f"{src}: no such file or directory{_on_the_hub(str(src))}.")
    config = read_config(path)
    others, elsewhere = other_files(path)
    oddities = []
    if elsewhere:
        oddities.append(f"{', '.join(elsewhere)}: links out of the directory, not copied")
    shards = sorted(p.name for p in path.glob("*.safetensors"))
    shards, index = by_index(path, shards, use_index, oddities)
    if not shards:
        raise CheckpointError(f"{path}: no *.safetensors file here.")
    return _open(path, shards, index, config, others, oddities)


def _on_the_hub(src: str) -> str:
    """What to say to somebody who gave the name of a model, or the address of its page."""
    found = re.fullmatch(r"(?:https?://[\w.]+/)?([\w\-]+/[\w\-.]+)(?<!\.safetensors)", src)
    return f"; a repository on the Hub is hf://{found.group(1)}" if found else ""


def is_weights(name: str) -> bool:
    """Whether a file holds weights, or says where they are, by its name."""
    return name.endswith(WEIGHT_SUFFIXES)


def by_index(
    root: Path, shards: list[str], use_index: bool, oddities: list[str]
) -> tuple[list[str], dict[str, str] | None]:
    """The shards that count, and the file of each tensor where an index says so."""
    path = _find_index(root) if use_index else None
    if path is None:
        return shards, None
    index = _read_index(path)
    named = sorted(set(index.values()))
    unnamed = [s for s in shards if s not in set(named)]
    if unnamed:
        oddities.append(f"{', '.join(unnamed)}: not named by the index, left out")
    return named, index


def is_compressed(path: str | os.PathLike[str]) -> bool:
    """Whether ``streamq compress`` wrote this directory."""
    return (Path(path) / COMPRESSION).is_file()


def read_config(root: Path) -> dict[str, Any]:
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
    refuse_missing(shards, [name for name in shards if (root / name).is_file()], str(root))
    headers = counted(((name, read_header(str(root / name), name)) for name in shards), str(root))
    oddities += look_at(headers)
    return finished(Checkpoint(root, headers, config, others, oddities), index)


def refuse_missing(shards: list[str], there: Iterable[str], place: str) -> None:
    """Raise CheckpointError for shards that the index names and that are not there."""
    missing = sorted({*shards} - {*there})
    if missing:
        raise CheckpointError(
            f"{missing[0]}: named by the index but not in {place}; the download is incomplete."
        )


def counted(found: Iterable[tuple[str, Header]], place: str) -> dict[str, Header]:
    """Headers by file. Raises CheckpointError as soon as they have more tensors than any has."""
    headers: dict[str, Header] = {}
    count = 0
    for name, header in found:
        headers[name] = header
        count += len(header.tensors)
        if count > MAX_TENSORS:
            raise CheckpointError(f"{place}: more than {MAX_TENSORS} tensors, which none has.")
    return headers


def look_at(headers: dict[str, Header]) -> list[str]:
    """What is odd about headers. Raises CheckpointError for weights that are compressed."""
    packed = [name for name, header in headers.items() if COMPRESSED in header.metadata]
    if packed:
        raise CheckpointError(
            f"{packed[0]}: is compressed, and {COMPRESSION} is not beside it, which says how; "
            "`streamq decompress` needs both."
        )
    unmarked = [name for name, header in headers.items() if "format" not in header.metadata]
    if not unmarked:
        return []
    return [f"{', '.join(unmarked)}: no format in __metadata__, some loaders refuse it"]


def finished(checkpoint: Checkpoint, index: dict[str, str] | None) -> Checkpoint:
    """The checkpoint, if it is one. Raises CheckpointError where its index is wrong."""
    if index is not None:
        _compare_with_index(checkpoint, index)
    if not checkpoint.tensors:
        raise CheckpointError(f"{checkpoint.place}: the shards hold no tensor.")
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


def other_files(root: Path) -> tuple[list[str], list[str]]:
    """Files to copy: all but weights and hidden ones; and those that ``leads_out`` is true of."""
    found: list[str] = []
    elsewhere: list[str] = []
    for folder, names, files in os.walk(root):
        names[:] = sorted(n for n in names if not n.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if path == root / RECORD:  # of the source; the output has one of its own
                continue
            if not name.startswith(".") and not is_weights(name) and path.is_file():
                (elsewhere if leads_out(root, path) else found).append(str(path.relative_to(root)))
    return found, elsewhere
