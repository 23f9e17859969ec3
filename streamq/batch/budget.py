"""Memory and disk that conversions share which run at the same time."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from streamq.tensors import size_text
from streamq.writer import existing_parent, partial_bytes


@dataclass(frozen=True, slots=True)
class Need:
    """What a conversion needs, in bytes.

    ``memory``: the least for its buffers. ``disk``: places of outputs with what is written there.
    """

    memory: int
    disk: tuple[tuple[str, int], ...]

    @property
    def written(self) -> int:
        """Bytes of all destinations."""
        return sum(n for _, n in self.disk)


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
        disks: dict[int, tuple[Path, list[tuple[str, int]]]] = {}
        for n in (need, *others):
            for dst, size in n.disk:
                place = existing_parent(Path(dst))
                disks.setdefault(place.stat().st_dev, (place, []))[1].append((dst, size))
        for place, outputs in disks.values():  # those of others are within what is free
            free = shutil.disk_usage(place).free + sum(partial_bytes(Path(d)) for d, _ in outputs)
            if (total := sum(size for _, size in outputs)) > free:
                beside = " together with what is running" if others else ""
                return (
                    f"{outputs[0][0]}: needs {size_text(total)}{beside}, the disk has "
                    f"{size_text(free)} free."
                )
        return None


def total_lack(needs: Sequence[Need]) -> str | None:
    """Why the disks do not hold all outputs; None where they do."""
    every = Need(0, tuple(pair for need in needs for pair in need.disk))
    return Budget(0, None).lacks(every)
