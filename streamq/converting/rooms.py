"""Which shards may be on disk, where a destination keeps only some of its output there."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple


class Space(NamedTuple):
    """``size`` of a shard in bytes, and which destination it belongs to."""

    size: int
    owner: int


class Rooms:
    """Shards by number, and the bytes that each destination may have on disk; None: all of them.

    Used under the lock of its owner.
    """

    def __init__(self, spaces: Sequence[Space], limits: Sequence[int | None]) -> None:
        self._spaces, self._limits = spaces, limits
        self._used = [0] * len(limits)
        self._inside: set[int] = set()

    def __contains__(self, shard: int) -> bool:
        return shard in self._inside

    def admit(self, shards: Collection[int]) -> bool:
        """Let all of some shards in, or none; one that is alone is let in whatever its size."""
        new = [s for s in dict.fromkeys(shards) if not self._free(s)]
        wanted: dict[int, int] = {}
        for size, owner in map(self._spaces.__getitem__, new):
            wanted[owner] = wanted.get(owner, 0) + size
        for owner, size in wanted.items():
            limit = self._limits[owner]
            assert limit is not None, "shards without a limit are free"
            if self._used[owner] and self._used[owner] + size > limit:
                return False
        for shard in new:
            self.take(shard)
        return True

    def take(self, shard: int) -> None:
        """Count a shard as inside: it is there, or nothing goes on without it."""
        if not self._free(shard):
            self._inside.add(shard)
            self._used[self._spaces[shard].owner] += self._spaces[shard].size

    def leave(self, shard: int) -> None:
        """A shard is gone from the disk."""
        if shard in self._inside:
            self._inside.remove(shard)
            self._used[self._spaces[shard].owner] -= self._spaces[shard].size

    def leaving(self, left: Sequence[int]) -> bool:
        """Whether a shard inside has no job ``left``, so that it will leave by itself."""
        return any(left[shard] == 0 for shard in self._inside)

    def _free(self, shard: int) -> bool:
        """Whether a shard needs no room, or has it."""
        return shard in self._inside or self._limits[self._spaces[shard].owner] is None
