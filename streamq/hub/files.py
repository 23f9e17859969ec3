"""Files on their way to the Hub: what they are known by, and how they are sent."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from streamq.errors import HubError, StreamqError

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

T = TypeVar("T")

#: Seconds without a byte, or until an answer, after which a connection counts as dead;
#: huggingface_hub sets no limit for uploads. Storage takes long to put large files together.
TIMEOUT = 120.0
#: Blocks that hf_xet sends at the same time, unless the environment says otherwise. It would go up
#: to 64 by itself, and each has up to 64 MB in memory.
XET_BLOCKS = "4"
#: Bytes that uploads of two files take, beside the rest (measured: 16 MB over LFS, and over Xet up
#: to 310 with two files of 336 MB and storage that takes 4 s for each block).
LFS_MEMORY, XET_MEMORY = 20 << 20, 400 << 20


class Sum(NamedTuple):
    """What a stored file is known by: ``sha256`` in hexadecimal, ``size`` in bytes."""

    sha256: str
    size: int


def uploaded(name: str, known: Sum) -> CommitOperationAdd:
    """What ``preupload_lfs_files`` leaves of a file, without the file."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    op = CommitOperationAdd(name, b"")
    op.upload_info = UploadInfo(size=known.size, sample=b"", sha256=bytes.fromhex(known.sha256))
    op._upload_mode, op._is_uploaded, op._should_ignore = "lfs", True, False
    return op


def refuse_ignored(ops: list[CommitOperationAdd], to: object) -> None:
    """Raise HubError for what huggingface_hub would leave out of a commit without a word.

    ``ops``: those that ``preupload_lfs_files`` has seen; ``to``: what people call the branch.
    """
    for op in ops:
        if op._should_ignore:
            raise HubError(
                f"{to}: its .gitignore leaves out {op.path_in_repo}; change it there, or choose "
                "another repository, and run again."
            )


def ids_of(path: Path) -> set[str]:
    """What the Hub may call a file: by git, the sha1 of "blob SIZE", a zero and the contents; by
    their sha256 where they are stored elsewhere.
    """
    found = hashlib.sha1(b"blob %d\0" % path.stat().st_size), hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            for of in found:
                of.update(piece)
    return {of.hexdigest() for of in found}


def upload_memory() -> int:
    """Bytes that uploads take, beside what a conversion does."""
    from importlib.util import find_spec

    from huggingface_hub import constants

    over_xet = not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None
    return XET_MEMORY if over_xet else LFS_MEMORY


def sending(call: Callable[[], T]) -> T:
    """The result of what sends files: with Xet where huggingface_hub has it, over LFS once that
    has failed. Connections get a limit, unless somebody has set one.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import HfHubHTTPError

    session = get_session()  # another one after some errors
    if session.timeout.read is None:
        session.timeout = TIMEOUT
    over_xet = not constants.HF_HUB_DISABLE_XET
    os.environ.setdefault("HF_XET_CLIENT_AC_MAX_UPLOAD_CONCURRENCY", XET_BLOCKS)
    try:
        return call()
    except Exception as e:
        if isinstance(e, RuntimeError) and isinstance(e.__cause__, Exception):
            raise e.__cause__ from None  # what went wrong with the bytes over LFS
        if isinstance(e, StreamqError | HfHubHTTPError.__bases__[0]) or not over_xet:
            raise
        constants.HF_HUB_DISABLE_XET = True  # a Hub, or a way there, without it
        return sending(call)
