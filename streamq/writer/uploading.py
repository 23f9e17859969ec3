"""An output on the Hub: each shard goes there when it is complete, and off the disk."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamq.errors import Stopped, WriteError
from streamq.hub import Branch, Sum
from streamq.pace import FREE, Pace
from streamq.tensors import size_text
from streamq.trust import RECORD, FileSum, record_text

from .destination import Destination, free_bytes
from .shard import TEMPORARY
from .uploader import UPLOADS, Uploader

#: Shards, as large as the largest, that may be on the disk: two going up, one being made.
SHARDS = UPLOADS + 1
CARD = "README.md"


class HubDestination(Destination):
    """A branch on the Hub; ``folder.partial`` has what is not there yet.

    ``is_stale``: of which files of the branch are not to stay. ``room``: bytes of shards that may
    be on the disk. ``message``: that of the commit. ``sha256``: whether streamq.json has them, too.
    """

    outlet: Uploader

    def __init__(
        self, branch: Branch, folder: Path, sync: bool, sha256: bool, room: int,
        is_stale: Callable[[str], bool], message: str, pace: Pace = FREE,
    ) -> None:  # fmt: skip
        super().__init__(folder, True, sync, True, pace)  # files are stored by their sha256
        self.branch = branch
        self.outlet = Uploader(room, self._upload)
        self._in_record = sha256
        self._is_stale, self._message = is_stale, message
        self._noting = threading.Lock()

    @property
    def name(self) -> str:
        """What people call it."""
        return str(self.branch)

    def begin(self, identity: Mapping[str, Any] | None = None, restart: bool = False) -> None:
        """Make the repository; what an earlier run has uploaded counts if the Hub still has it.

        It forgets what is not committed, some day.
        """
        super().begin(identity, restart)
        self.branch.make()
        state = self.state
        sums = {name: self._sum(name) for name in state.sent}
        there = self.branch.present(list(sums.values()))
        for name, known in sums.items():
            if known.sha256 not in there:
                state.lose(name)
            elif (self.output / name).exists():  # killed just before it was removed
                (self.output / name).unlink()
        for name in state.done.keys() - state.sent:
            self.outlet.put(name, state.done[name].sums.size)

    def finished(self, name: str, size: int, units: set[str]) -> set[str]:
        """See there; a file of which nothing counts takes no room on the disk either."""
        found = super().finished(name, size, units)
        if units and not found:
            (self.output / (name + TEMPORARY)).unlink(missing_ok=True)
        return found

    def _sum(self, name: str) -> Sum:
        sums = self.files[name] if name in self.files else self.state.done[name].sums
        assert sums.sha256 is not None
        return Sum(sums.sha256, sums.size)

    def _complete(self, name: str, found: FileSum, notes: list[Any]) -> None:
        super()._complete(name, found, notes)
        self.outlet.put(name, found.size)

    def _upload(self, name: str) -> None:
        """Store a complete file; on a thread of the uploader."""
        stop = self.outlet.stop
        if not self.branch.upload(self.output / name, name, self._sum(name), stop):
            return  # so small that it goes into the commit itself
        with self._noting:
            if stop.is_set():  # the journal is closed, or that of another process by now
                raise Stopped
            self.state.send(name)

    def copy_file(self, source: Path, name: str, keep: bool = False) -> None:
        """Copy a file of the source, but for its card: the output has one of its own."""
        if name == CARD:
            return
        super().copy_file(source, name, keep)

    def write_card(self, text: str) -> None:
        """Write the model card. It is not in streamq.json, as people go on with it."""
        self.write_text(CARD, [text])
        del self.files[CARD]

    def commit(self, about: Mapping[str, Any] | None = None) -> None:
        """One commit with everything, when all of it is there; then nothing stays here."""
        self.outlet.finish()
        sums = self.files
        if not self._in_record:
            sums = {name: replace(found, sha256=None) for name, found in sums.items()}
        if about is not None:
            self.write_text(RECORD, [record_text(about, sums)])
        self.sync.close()
        files = {
            str(path.relative_to(self.output)): path
            for path in sorted(self.output.rglob("*")) if path.is_file()
        }  # fmt: skip
        stored = {name: self._sum(name) for name in sorted(self.state.sent)}
        self.committed = self.branch.commit(files, stored, self._is_stale, self._message)
        shutil.rmtree(self.partial, ignore_errors=True)

    def close(self) -> None:
        """Stop uploading, and let go of the directory; what is in it stays."""
        with self._noting:
            self.outlet.close()
        super().close()


def check_branch(
    branch: Branch, folder: Path, names: Collection[str], is_stale: Callable[[str], bool],
    need: int, overwrite: bool,
) -> int:  # fmt: skip
    """Everything about a destination on the Hub that can be known before writing.

    ``need``: bytes on the disk of ``folder``; returns what is free there. Raises HubError, and
    WriteError.
    """
    free = free_bytes(folder)
    if free < need:
        raise WriteError(
            f"{folder}: needs {size_text(need)} for shards on their way to {branch}, the disk "
            f"has {size_text(free)} free; free some, or choose another --work-dir."
        )
    made = folder.with_name(folder.name + ".partial") / "output" / RECORD
    branch.check(names, is_stale, overwrite, made)
    return free
