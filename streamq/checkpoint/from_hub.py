"""Opening a repository of the Hub: its small files come here, of its shards the headers."""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from os import PathLike
from pathlib import Path, PurePosixPath

from streamq.errors import CheckpointError, HubError
from streamq.hub import HubPath, Repository, Stop, parse_hub
from streamq.tensors import size_text

from .header import Header, header_length, parse_header, read_header
from .local import (
    COMPRESSION,
    CONFIG,
    DESCRIPTION,
    INDEX_SUFFIX,
    WEIGHT_SUFFIXES,
    by_index,
    counted,
    finished,
    look_at,
    open_checkpoint,
    other_files,
    read_config,
    refuse_missing,
)  # fmt: skip
from .remote import CONNECTIONS, HubFiles
from .source import Checkpoint
from .spool import Spool, spool_folder

#: First bytes of a shard that are fetched for its header; more if it is longer.
FIRST = 1 << 14
#: Headers above this are read one at a time: 16 that are made for it would take 48 GB. Published
#: ones have some 500 KB.
LARGE = 8 << 20
_TURN = threading.Lock()
#: Most bytes of the files beside the weights, all together; the largest are left out beyond it.
#: Tokenizers have some 30 MB.
MAX_OTHERS = 1 << 30


def open_hub(
    src: str, use_index: bool, spool: int, spool_dir: str | PathLike[str] | None
) -> Checkpoint:
    """Open ``hf://org/repo[@revision][/sub/folder]``; see ``open_checkpoint``.

    The folder may be a single safetensors file. Where HF_HUB_OFFLINE is set, a download that is in
    the cache of the Hub is opened in its place.
    """
    from huggingface_hub import constants

    address = parse_hub(src)
    if constants.HF_HUB_OFFLINE:
        return open_checkpoint(_downloaded(address), use_index=use_index)
    only = None
    if address.folder.endswith(".safetensors"):
        path = PurePosixPath(address.folder)
        only, parent = path.name, str(path.parent)
        address = address._replace(folder="" if parent == "." else parent)
    repository = Repository(address)
    folder = spool_folder() if spool_dir is None else Path(spool_dir)
    kept = Spool(spool, folder)
    try:
        here = tempfile.TemporaryDirectory(prefix="streamq-", dir=folder)
    except OSError as e:
        kept.close()
        raise CheckpointError(
            f"{folder}: cannot be written: {e.strerror}; choose another --spool-dir."
        ) from e
    try:
        return _open(repository, only, use_index, kept, here)
    except BaseException:
        kept.close()
        here.cleanup()
        raise


def _open(
    repository: Repository, only: str | None, use_index: bool, spool: Spool,
    folder: tempfile.TemporaryDirectory[str],
) -> Checkpoint:  # fmt: skip
    root, place = Path(folder.name), str(repository.pinned)
    names = [n for n in repository.files if "/" not in n and n.endswith(".safetensors")]
    shards = sorted(names) if only is None else [only]
    oddities: list[str] = []
    pool, stop = ThreadPoolExecutor(CONNECTIONS, "open"), threading.Event()
    try:
        small = list(_small(repository, oddities))
        if only is not None:
            small = [name for name in small if name in (CONFIG, DESCRIPTION)]
        list(pool.map(lambda name: _download(repository, name, root, stop), small))
        if (root / COMPRESSION).is_file():
            raise CheckpointError(f"{place}: is compressed; download and decompress it first.")
        config = read_config(root)
        others, _ = other_files(root)
        index = None
        if only is None:
            shards, index = by_index(root, shards, use_index, oddities)
        if not shards:
            raise CheckpointError(f"{place}: no *.safetensors file here; check the folder.")
        refuse_missing(shards, names, place)
        cached = {name: path for name in shards if (path := repository.cached(name)) is not None}

        def header(name: str) -> tuple[str, Header]:
            return name, _header(repository, name, cached.get(name), stop)

        headers = counted(pool.map(header, shards), place)
    finally:
        stop.set()  # after an error or Ctrl-C nobody waits for the others, which may take minutes
        pool.shutdown(cancel_futures=True)
    oddities += look_at(headers)
    store = HubFiles(repository, headers, cached, spool, folder)
    try:
        return finished(Checkpoint(root, headers, config, others, oddities, store, place), index)
    except BaseException:
        store.close()
        raise


def _downloaded(address: HubPath) -> Path:
    """The directory of a revision that was downloaded with the tools of the Hub."""
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(address.repo, revision=address.revision, local_files_only=True)
    except Exception as e:
        raise HubError(
            f"{address}: HF_HUB_OFFLINE is set and the cache of the Hub does not have it; unset "
            f"it, or run `hf download {address.repo}` where there is a network."
        ) from e
    return Path(found, address.folder)


def _small(repository: Repository, oddities: list[str]) -> Iterator[str]:
    """The files that are not weights and not hidden, but for those that are too large."""
    sizes = {
        name: entry.size for name, entry in repository.files.items()
        if not name.endswith(tuple(s for s in WEIGHT_SUFFIXES if s != INDEX_SUFFIX))
        and not any(part.startswith(".") for part in name.split("/"))
    }  # fmt: skip
    total = 0
    for name, size in sorted(sizes.items(), key=lambda item: item[1]):
        total += size
        if total <= MAX_OTHERS:
            yield name
        else:
            oddities.append(f"{name}: {size_text(size)} that are not weights, not copied")


def _download(repository: Repository, name: str, root: Path, stop: Stop) -> None:
    """Bring a small file here, from the cache of the Hub if it is there."""
    target, cached = root / name, repository.cached(name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if cached is not None:
            target.write_bytes(cached.read_bytes())
            return
        with target.open("wb") as file:
            size = repository.files[name].size
            repository.read(name, 0, size, lambda at, piece: file.write(piece), stop)
    except OSError as e:
        raise CheckpointError(f"{target}: cannot be written: {e.strerror}.") from e


def _header(repository: Repository, name: str, cached: Path | None, stop: Stop) -> Header:
    """The header of a shard, as ``read_header`` checks it."""
    if cached is not None:
        found = read_header(str(cached), name)
        with cached.open("rb") as file:
            raw = file.read(repository.files[name].size - found.nbytes)
    else:
        size = repository.files[name].size
        raw = _bytes(repository, name, 0, min(size, FIRST), stop)
        length = header_length(raw[:8], name, size)
        with _TURN if length > LARGE else nullcontext():
            rest = _bytes(repository, name, len(raw), max(len(raw), 8 + length), stop)
            raw = (raw + rest)[: 8 + length]
            found = parse_header(raw[8:], name, size)
    found.sha256 = hashlib.sha256(raw).hexdigest()
    return found


def _bytes(repository: Repository, name: str, start: int, end: int, stop: Stop) -> bytes:
    found = bytearray()
    repository.read(name, start, end, lambda at, piece: found.extend(piece), stop)
    return bytes(found)
