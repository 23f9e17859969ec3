"""Where the shards of a source are: what a Checkpoint asks of it, and files on this machine."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from streamq.errors import CheckpointError
from streamq.hub import Stop
from streamq.trust import fingerprint

from .files import Stamp, stamp_of

Array = np.ndarray[Any, Any]

#: Bytes of a shard: its name, the first, and the one behind the last.
Span = tuple[str, int, int]
#: Fills some of a buffer from an absolute offset; how many bytes, 0 at the end of the file.
Reader = Callable[[memoryview, int], int]
_NOTHING = nullcontext()


class Remote(NamedTuple):
    """What a plan knows of a source that is not on this machine.

    ``extents``: of each shard that is not here the first byte behind its header, and its size.
    ``slots``: blocks that the spool holds, in ``folder``.
    """

    extents: Mapping[str, tuple[int, int]]
    slots: int
    folder: Path


class Store(Protocol):
    """The shards of a source; used by several threads at once."""

    @property
    def remote(self) -> Remote | None:
        """None where all of it is on this machine."""

    @property
    def received(self) -> int:
        """Bytes that came over the network until now."""

    def size(self, file: str) -> int:
        """Bytes of a shard."""

    def pread(self, file: str, start: int, into: memoryview) -> None:
        """Fill ``into`` with the bytes at ``start`` of a shard."""

    def pread_lines(self, file: str, start: int, step: int, into: Array) -> None:
        """Fill the rows of ``into``, uint8 ``[lines, bytes]``, from ``start + i * step`` on."""

    def reader(self, file: str) -> Reader:
        """What reads a shard piece by piece."""

    def expect(self, work: Iterable[Iterable[Span]]) -> None:
        """Be told of what will be read, a job at a time, before any is."""

    def limit(self, slots: int) -> None:
        """Use no more blocks of the spool."""

    def reading(
        self, spans: Callable[[], Iterable[Span]], stop: Stop | None
    ) -> AbstractContextManager[None]:
        """In its context this thread reads ``spans``; they are here when it begins."""

    def fingerprint(self, root: Path, files: list[str], others: list[str]) -> dict[str, Any]:
        """What the source is told by; see ``trust.fingerprint``."""

    def refuse_changed(self) -> None:
        """Raise CheckpointError for a shard that is not the one whose header was read."""

    def close(self) -> None:
        """Let go of everything."""


class LocalFiles:
    """Shards that are files: ``paths`` by name, with their stamps when headers were read."""

    remote = None
    received = 0

    def __init__(self, paths: Mapping[str, Path], stamps: Mapping[str, Stamp | None]) -> None:
        self._paths = paths
        self._stamps = stamps
        self._fds: dict[str, int] = {}
        self._lock = threading.Lock()

    def size(self, file: str) -> int:
        """See ``Store``."""
        return self._paths[file].stat().st_size

    def fd(self, file: str) -> int:
        """A read-only descriptor of a shard, opened at first use and shared by threads."""
        fd = self._fds.get(file)
        if fd is None:
            with self._lock:
                fd = self._fds.get(file)
                if fd is None:
                    fd = os.open(self._paths[file], os.O_RDONLY | os.O_CLOEXEC)
                    self._fds[file] = fd
        return fd

    def pread(self, file: str, start: int, into: memoryview) -> None:
        """See ``Store``. Raises CheckpointError where the file ends early or cannot be read."""
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
        """See ``Store``. Raises CheckpointError as ``pread`` does."""
        from .lines import read_lines  # numba takes 0.2 s, and few checkpoints need this

        whole: int = read_lines(self.fd(file), start, step, into)
        for i in range(whole, len(into)):  # interrupted, or an error to tell of
            self.pread(file, start + i * step, into[i].data)

    def reader(self, file: str) -> Reader:
        """See ``Store``."""
        fd = self.fd(file)
        return lambda into, start: os.preadv(fd, [into], start)

    def expect(self, work: Iterable[Iterable[Span]]) -> None:
        """Nothing to do: the kernel reads ahead."""

    def limit(self, slots: int) -> None:
        """Nothing to do."""

    def reading(
        self, spans: Callable[[], Iterable[Span]], stop: Stop | None
    ) -> AbstractContextManager[None]:
        """Nothing to do."""
        return _NOTHING

    def fingerprint(self, root: Path, files: list[str], others: list[str]) -> dict[str, Any]:
        """See ``Store``."""
        return fingerprint(root, files, others)

    def refuse_changed(self) -> None:
        """See ``Store``."""
        for file, stamp in self._stamps.items():
            try:
                found = stamp_of(os.stat(self._paths[file]))
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
