"""What a node does: open the source, make the same plan, write one shard of it."""

from __future__ import annotations

import shutil
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streamq.checkpoint import Checkpoint, open_checkpoint
from streamq.converting import Fresh, Settings, identity_of, shards_to
from streamq.errors import CheckpointError, StreamqError
from streamq.pace import Pace
from streamq.planning import Plan, make_plan, unspelled
from streamq.trust import FileSum, differences
from streamq.writer import ShardWriter, SyncPool


@dataclass(frozen=True, slots=True)
class Order:
    """What all tasks of a run are told.

    ``token``: tells the run from all others. ``source``: its address. ``identities``: of each
    output all that decides its bytes, options among it; ``folders``: where it is built;
    ``sha256``: whether that of its files is to be known.
    """

    token: str
    source: str
    identities: tuple[dict[str, Any], ...]
    folders: tuple[Path, ...]
    sha256: tuple[bool, ...]
    settings: Settings


@dataclass(frozen=True, slots=True)
class Made:
    """A shard that a task has written to ``path``; it is on disk.

    ``notes``: what was counted of its units. ``kernels``: whose they were. ``bytes_in``: bytes
    of the source that it was made from; ``received``: of these from the Hub.
    """

    path: Path
    sums: FileSum
    notes: list[dict[str, Any]]
    kernels: str
    bytes_in: int
    received: int


#: Source and plans of the run that this process worked for last; it serves many tasks of one.
_held: dict[str, tuple[Checkpoint, list[Plan]]] = {}


def refusal(order: Order) -> str | None:
    """Why tasks cannot run here, as a sentence."""
    try:
        _opened(order)
    except (StreamqError, OSError) as e:
        return str(e)
    return None


def make(order: Order, number: int, name: str, attempt: str) -> Made | StreamqError | OSError:
    """Write a shard of the output ``number`` in a folder that no other attempt has.

    Expected failures are returned: raised ones come back as exceptions of Ray's making.
    """
    folder = order.folders[number] / attempt
    try:
        source, plans = _opened(order)
    except (StreamqError, OSError) as e:
        return CheckpointError(f"node {socket.gethostname()}: {e}")
    try:
        how = replace(order.settings, sha256=order.sha256[number])
        return _make(source, plans[number], name, folder, how)
    except (StreamqError, OSError) as e:
        shutil.rmtree(folder, ignore_errors=True)
        return e


def _opened(order: Order) -> tuple[Checkpoint, list[Plan]]:
    """The source and the plans. Raises CheckpointError where they are not those of the order."""
    if order.token in _held:
        return _held[order.token]
    for source, _ in _held.values():
        source.close()
    _held.clear()
    s = order.settings
    # one that the command has made for itself is not on other nodes
    folder = s.spool_dir if s.spool_dir is not None and s.spool_dir.is_dir() else None
    source = open_checkpoint(order.source, spool=s.spool, spool_dir=folder)
    prints = source.fingerprint()
    plans = []
    for identity in order.identities:
        plans.append(make_plan(source, unspelled(identity["options"])))
        found = list(differences(identity, identity_of(plans[-1], prints)))
        if found:
            source.close()
            raise CheckpointError(
                f"{order.source}: is not what was planned for ({'; '.join(found[:3])}); all nodes "
                "must see one source."
            )
    _held[order.token] = source, plans
    return source, plans


def _make(source: Checkpoint, plan: Plan, name: str, folder: Path, settings: Settings) -> Made:
    shards = [shard for shard in plan.shards if shard.name == name]
    read: list[int] = []  # append is atomic
    before = source.received
    how = replace(settings, progress=lambda n, name: read.append(n))
    folder.mkdir()
    source.pace = Pace(settings.limit_rate)
    attempt = _Attempt(folder, settings.sha256, source.pace)
    try:
        _, kernels = shards_to(source, replace(plan, shards=shards), attempt, how)
        source.refuse_changed()
    finally:
        attempt.sync.close()
    assert attempt.sums is not None
    return Made(
        folder / name, attempt.sums, attempt.notes, kernels, sum(read), source.received - before
    )


class _Attempt(Fresh):
    """Where the one shard of an attempt goes: a folder of its own.

    It is flushed whatever was asked for: that a shard is done is noted elsewhere, and this
    node may be lost before its kernel has written it.
    """

    def __init__(self, folder: Path, sha256: bool, pace: Pace) -> None:
        self.sync = SyncPool(True)
        self.sums: FileSum | None = None
        self.notes: list[dict[str, Any]] = []
        self._folder = folder
        self._sha256 = sha256
        self._pace = pace

    def shard(self, name: str, header: bytes, size: int) -> ShardWriter:
        """The shard."""
        return ShardWriter(
            self._folder, name, header, size, self.sync, sha256=self._sha256, pace=self._pace
        )

    def close_shard(self, shard: ShardWriter) -> None:
        """From now on it is complete."""
        self.sums, self.notes = shard.close(), shard.notes
