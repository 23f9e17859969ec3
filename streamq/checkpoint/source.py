"""A checkpoint that is open: what its headers say, and the bytes of its shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from streamq.errors import CheckpointError
from streamq.hub import Stop
from streamq.pace import Pace
from streamq.tensors import TensorInfo

from .header import Header
from .store import Array, LocalFiles, Reader, Remote, Span, Store


class Checkpoint:
    """An opened source: headers only, no data.

    ``tensors``: by name, in file order; ``nbytes`` of all. ``files``: shard file names in order.
    ``metadata``: by file, what its header says beside tensors. ``config``: config.json, {}
    where there is none. ``others``: paths, relative to ``root``, of the files that are not
    weights. ``oddities``: sentences for people.
    """

    def __init__(
        self,
        root: Path,
        headers: dict[str, Header],
        config: dict[str, Any],
        others: list[str],
        oddities: list[str],
        store: Store | None = None,
        place: str | None = None,
    ) -> None:
        """``store``: where the shards are, if not in ``root``; ``place``: what people call it."""
        self.root = root
        self.place = str(root) if place is None else place
        self.files = list(headers)
        self.metadata = {file: header.metadata for file, header in headers.items()}
        self.config = config
        self.others = others
        self.oddities = oddities
        self._store: Store = store or LocalFiles(
            {file: root / file for file in headers},
            {file: header.stamp for file, header in headers.items()},
        )
        self.nbytes = sum(header.nbytes for header in headers.values())
        self.tensors: dict[str, TensorInfo] = {}
        for header in headers.values():
            known = len(self.tensors)
            self.tensors.update([(t.name, t) for t in header.tensors])
            if len(self.tensors) != known + len(header.tensors):
                self._refuse_doubles(headers)

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

    @property
    def pace(self) -> Pace:
        """How fast shards are read."""
        return self._store.pace

    @pace.setter
    def pace(self, pace: Pace) -> None:
        self._store.pace = pace

    @property
    def remote(self) -> Remote | None:
        """What a plan has to know of a source that is not on this machine; else None."""
        return self._store.remote

    @property
    def received(self) -> int:
        """Bytes that came over the network until now; 0 for a source on this machine."""
        return self._store.received

    @property
    def other_bytes(self) -> int:
        """Bytes of ``others`` together. Raises OSError."""
        return sum((self.root / name).stat().st_size for name in self.others)

    def size(self, file: str) -> int:
        """Bytes of a shard."""
        return self._store.size(file)

    def pread(self, file: str, start: int, into: memoryview) -> None:
        """Fill ``into`` with the bytes at ``start`` of a shard.

        Raises CheckpointError where the file ends early or cannot be read.
        """
        self._store.pread(file, start, into)

    def pread_lines(self, file: str, start: int, step: int, into: Array) -> None:
        """Fill the rows of ``into``, uint8 ``[lines, bytes]``, from ``start + i * step`` on.

        Raises CheckpointError as ``pread`` does.
        """
        self._store.pread_lines(file, start, step, into)

    def reader(self, file: str) -> Reader:
        """What reads a shard piece by piece, for copies."""
        return self._store.reader(file)

    def expect(self, work: Iterable[Iterable[Span]]) -> None:
        """Be told of what ``reading`` will be asked for, a job at a time, before any is."""
        self._store.expect(work)

    def limit_spool(self, slots: int) -> None:
        """Let the spool of a remote source hold no more blocks than this."""
        self._store.limit(slots)

    def reading(
        self, spans: Callable[[], Iterable[Span]], stop: Stop | None = None
    ) -> AbstractContextManager[None]:
        """In its context this thread reads ``spans``: those of a remote source are fetched first.

        Raises HubError, and Stopped when ``stop`` says so.
        """
        return self._store.reading(spans, stop)

    def fingerprint(self) -> dict[str, Any]:
        """What the source is told by; see ``trust.fingerprint``. Raises OSError."""
        return self._store.fingerprint(self.root, self.files, self.others)

    def refuse_changed(self) -> None:
        """Raise CheckpointError for a shard that is not the one whose header was read."""
        self._store.refuse_changed()

    def close(self) -> None:
        """Let go of all files."""
        self._store.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
