"""What of an output is there already: the plan that it was begun with, and its journal."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamq.errors import WriteError
from streamq.trust import FileSum, Journal, Sums, differences, read_journal

from .disk import SyncPool, write_all
from .shard import TEMPORARY

PLAN, JOURNAL = "plan.json", "journal"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Done:
    """A complete file, and what was noted of its units."""

    sums: FileSum
    notes: list[Any]


class Partial:
    """The state of ``DST.partial``: ``plan.json``, the journal, and the output so far.

    ``goes_on``: an earlier run began the same output. ``done``: its complete files, by name;
    ``sent``: those of them that are elsewhere and need not be here.
    ``said``: why nothing of an earlier run is used, where that is so.
    """

    def __init__(self, partial: Path, output: Path, sync: SyncPool) -> None:
        self._partial, self._output, self._sync = partial, output, sync
        self.goes_on = False
        self.said: str | None = None
        self.done: dict[str, Done] = {}
        self.sent: set[str] = set()
        self.notes: dict[str, list[Any]] = {}
        self.journal: Journal | None = None
        self._groups: dict[str, list[dict[str, Any]]] = {}
        self._known: dict[str, Sums] = {}

    def begin(self, identity: Mapping[str, Any] | None) -> None:
        """Look at what is there. Raises WriteError where some of another conversion is done."""
        if identity is None or not self._output.is_dir():
            return
        try:
            plan = json.loads((self._partial / PLAN).read_bytes())
            before, synced, boot = plan["identity"], plan["sync"], plan["boot"]
        except (OSError, ValueError, KeyError, TypeError):
            return  # killed before it was begun
        records, good = read_journal(self._partial / JOURNAL)
        if not records:
            return  # nothing is lost
        if found := list(differences(before, json.loads(json.dumps(identity)))):
            more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
            raise WriteError(
                f"{self._partial}: holds an unfinished conversion that differs from this one "
                f"({'; '.join(found[:3])}{more}); go on with what it was begun with, or discard it "
                "with --restart."
            )
        if not synced and (boot is None or boot != _boot()):
            self.said = (
                f"{self._partial}: was written with --no-sync before this machine was started, so "
                "all of it is written again"
            )
            return
        for record in records:
            self._take(record)
        for name in self.done.keys() - self.sent:
            if not self._has(name, self.done[name].sums.size):
                del self.done[name]
        if self._sync.enabled and not synced:
            for path in [p for p in self._output.rglob("*") if p.is_file()] + [self._output]:
                self._sync.path(path)
        if synced != self._sync.enabled:
            self._write_plan(identity)
        self.journal = Journal(self._partial / JOURNAL, good)
        self.goes_on = True

    def _take(self, record: dict[str, Any]) -> None:
        """One record of the journal."""
        if "file" in record:
            sums = FileSum(record["size"], record["crc32"], record["sha256"])
            self.done[record["file"]] = Done(sums, record["notes"])
        elif "sent" in record:
            self.sent.add(record["sent"])
        elif "again" in record:
            self._drop(record["again"])
        else:
            self._groups.setdefault(record["shard"], []).append(record)

    def _drop(self, name: str) -> None:
        """Nothing of a file is there any more."""
        self.done.pop(name, None)
        self._groups.pop(name, None)
        self.sent.discard(name)

    def send(self, name: str) -> None:
        """Note that a complete file is elsewhere, and remove it here."""
        assert self.journal is not None
        self.journal.append({"sent": name}, self._sync.enabled)
        self.sent.add(name)
        (self._output / name).unlink()

    def lose(self, name: str) -> None:
        """Note that a file that was elsewhere is there no more."""
        assert self.journal is not None
        self.journal.append({"again": name}, self._sync.enabled)
        self._drop(name)

    def start(self, identity: Mapping[str, Any]) -> None:
        """Begin an output: nothing of an earlier one stays.

        The journal goes first and for good, as it speaks of files that others will replace.
        """
        if (self._partial / JOURNAL).exists():
            (self._partial / JOURNAL).unlink()
            self._sync.path(self._partial)
        for path in self._partial.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self._output.mkdir()
        self._write_plan(identity)
        self.journal = Journal(self._partial / JOURNAL)

    def _write_plan(self, identity: Mapping[str, Any]) -> None:
        value = {"identity": identity, "sync": self._sync.enabled, "boot": _boot()}
        path = self._partial / PLAN
        fd = os.open(f"{path}.tmp", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            write_all(fd, memoryview(json.dumps(value, indent=2).encode()), 0)
            self._sync.file(fd)
        finally:
            os.close(fd)
        os.rename(f"{path}.tmp", path)
        self._sync.path(self._partial)

    def finished(self, name: str, size: int, units: set[str]) -> set[str]:
        """Which of the units of a shard are there from an earlier run.

        Records that overlap count from the last one back: units may have been cut in another
        way meanwhile, and each byte is summed once.
        """
        if name in self.done:
            return units
        found: set[str] = set()
        if not self._has(name + TEMPORARY, size):
            if not self._has(name, size):
                return found
            # It got its name, but that was not noted any more.
            os.rename(self._output / name, self._output / (name + TEMPORARY))
        sums, notes = Sums(size), []
        for record in reversed(self._groups.get(name, [])):
            if units.issuperset(record["units"]) and found.isdisjoint(record["units"]):
                found.update(record["units"])
                sums.merge(Sums(size, map(tuple, record["crc32"]), record["bytes"]))
                notes += record["notes"]
        if found:
            self._known[name], self.notes[name] = sums, notes
        return found

    def known(self, name: str, size: int) -> Sums | None:
        """The sums of the units of a shard that ``finished`` has found.

        None where there is none: then the file is made anew, and the journal says so before.
        """
        if name in self._known:
            return self._known[name]
        if self.journal is not None and (name in self._groups or name in self.done):
            self.journal.append({"again": name}, self._sync.enabled)
        return None

    def bytes_of(self, name: str) -> int:
        """Bytes of a file that are there, as far as ``finished`` has found them."""
        if name in self.done:
            return self.done[name].sums.size
        return self._known[name].nbytes if name in self._known else 0

    def complete(self, name: str, sums: FileSum, notes: list[Any]) -> None:
        """Note that a file is complete and has its name on disk."""
        assert self.journal is not None
        self.journal.append(
            {"file": name, "size": sums.size, "crc32": sums.crc32, "sha256": sums.sha256,
             "notes": notes}
        )  # fmt: skip

    def close(self) -> None:
        """Close the journal."""
        if self.journal is not None:
            self.journal.close()

    def _has(self, name: str, size: int) -> bool:
        path = self._output / name
        return path.is_file() and path.stat().st_size == size


def _boot() -> str | None:
    """What tells this start of this machine from others; None where the system does not say."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return None
