"""Memory and disk that conversions share which run at the same time."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from streamq.tensors import size_text
from streamq.writer import existing_parent, partial_bytes


class Space(NamedTuple):
    """Bytes that are written at a place; ``stays``: after the conversion, too."""

    place: str
    nbytes: int
    stays: bool


@dataclass(frozen=True, slots=True)
class Need:
    """What a conversion needs. ``memory``: the least for its buffers, in bytes."""

    memory: int
    disk: tuple[Space, ...]

    @property
    def written(self) -> int:
        """Bytes on all disks."""
        return sum(space.nbytes for space in self.disk)


class Budget:
    """Not for several threads at once.

    ``memory``: bytes of the buffers of all conversions. ``disk``: bytes that the outputs which
    are being written may take together; None for what the disks have free.
    """

    def __init__(self, memory: int, disk: int | None) -> None:
        self._memory, self._disk = memory, disk
        self._running: dict[int, tuple[Need, int]] = {}
        self._next = 0

    def take(self, need: Need, share: int) -> tuple[int, int] | None:
        """Let a conversion begin: a number to give it back by, and the memory it may use.

        ``share``: the memory it gets if there is as much. None while there is no room.
        """
        left = self._memory - sum(given for _, given in self._running.values())
        given = min(left, max(need.memory, share))
        if given < need.memory or self.lacks(need) is not None:
            return None
        self._next += 1
        self._running[self._next] = need, given
        return self._next, given

    def give_back(self, number: int) -> None:
        """A conversion has ended."""
        del self._running[number]

    def lacks(self, need: Need) -> str | None:
        """Why there is no room on the disks beside what is running; None where there is.

        What running conversions have written is taken already, what they have yet to write
        is not for others.
        """
        others = [n for n, _ in self._running.values()]
        if self._disk is not None:
            together = need.written + sum(n.written for n in others)
            if together > self._disk:
                return (
                    f"needs {size_text(need.written)} of disk, --max-disk is "
                    f"{size_text(self._disk)}."
                )
        disks: dict[int, list[Space]] = {}
        for space in chain(need.disk, *(n.disk for n in others)):
            disks.setdefault(existing_parent(Path(space.place)).stat().st_dev, []).append(space)
        for spaces in disks.values():
            first = Path(spaces[0].place)
            free = shutil.disk_usage(existing_parent(first)).free
            free += sum(partial_bytes(Path(space.place)) for space in spaces)
            if (total := sum(space.nbytes for space in spaces)) > free:
                beside = " together with what is running" if others else ""
                return (
                    f"{first}: needs {size_text(total)}{beside}, the disk has {size_text(free)} "
                    "free."
                )
        return None


def total_lack(needs: Sequence[Need]) -> str | None:
    """Why the disks do not hold all outputs; None where they do."""
    return Budget(0, None).lacks(Need(0, tuple(d for need in needs for d in need.disk if d.stays)))
