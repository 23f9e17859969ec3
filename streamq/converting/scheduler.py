"""Who does which job.

A worker stays with one output file as long as that has work, because two writers on one
inode wait for each other (5.9 against 10.3 GB/s).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable

from .jobs import CopyRun, Job
from .rooms import Rooms, Space


class Scheduler:
    """Hands out jobs; knows when a shard has none left.

    A job waits with the first shard that it writes to, until there is room for all that it
    writes to.
    """

    def __init__(self, jobs: Iterable[Job], count: int, rooms: Rooms | None = None) -> None:
        """``count``: shards of all outputs."""
        self._rooms = rooms or Rooms([Space(0, 0)] * count, [None])
        self._running = 0
        self._ready: list[deque[Job]] = [deque() for _ in range(count)]
        self._left = [0] * count
        self._homes: dict[int, int] = {}
        self._changed = threading.Condition()
        self._stopped = False
        self.add(jobs)

    def add(self, jobs: Iterable[Job]) -> None:
        """Take in jobs, before any is handed out."""
        for job in jobs:
            self._ready[job.shards[0]].append(job)
            self._count(job, 1)

    def _count(self, job: Job, by: int) -> None:
        for shard in set(job.shards):
            self._left[shard] += by

    def next(self, worker: int, copies_only: bool = False) -> Job | None:
        """The next job for a worker, waiting for one if need be; None at the end.

        With ``copies_only``, None as soon as no copy is left that there is room for.
        """
        with self._changed:
            while not self._stopped and any(self._left):
                home = self._homes.get(worker, -1)
                if home < 0 or not self._may(home, copies_only):
                    home = self._choose(worker, copies_only)
                if home >= 0:
                    self._homes[worker] = home
                    self._running += 1
                    return self._ready[home].popleft()
                if copies_only:
                    return None
                if not self._make_way():
                    self._changed.wait()
            return None

    def done(self, job: Job, released: list[Job]) -> list[int]:
        """Note that a job is done and what it released; returns the shards that are complete."""
        with self._changed:
            self._running -= 1
            for new in reversed(released):
                self._ready[new.shards[0]].appendleft(new)
                self._count(new, 1)
            self._count(job, -1)
            self._changed.notify_all()
            return [shard for shard in set(job.shards) if self._left[shard] == 0]

    def occupied(self, shard: int) -> None:
        """Note that a shard is on the disk from an earlier run."""
        with self._changed:
            self._rooms.take(shard)

    def freed(self, shard: int) -> None:
        """Note that a shard is gone from the disk."""
        with self._changed:
            self._rooms.leave(shard)
            self._changed.notify_all()

    def stop(self) -> None:
        """Let all workers come home."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _has(self, shard: int, copies_only: bool) -> bool:
        """Whether a shard has a job ready; its copies come first."""
        ready = self._ready[shard]
        return bool(ready) and not (copies_only and not isinstance(ready[0], CopyRun))

    def _may(self, shard: int, copies_only: bool) -> bool:
        """Whether a shard has a job ready and there is room for it, which it then has."""
        return self._has(shard, copies_only) and self._rooms.admit(self._ready[shard][0].shards)

    def _choose(self, worker: int, copies_only: bool) -> int:
        """A shard with work: the first that nobody is at, else the one with the most jobs."""
        taken = {home for w, home in self._homes.items() if w != worker}
        others = (i for i in range(len(self._ready)) if i not in taken)
        free = next((i for i in others if self._may(i, copies_only)), -1)
        if free >= 0:
            return free
        mine = [i for i in taken if self._may(i, copies_only)]
        return max(mine, key=lambda i: (len(self._ready[i]), -i), default=-1)

    def _make_way(self) -> bool:
        """Let the first job in where nothing else would ever make room for one.

        Outputs that share jobs may hold the room that each other waits for.
        """
        if self._running or self._rooms.leaving(self._left):
            return False
        first = next(ready[0] for ready in self._ready if ready)
        for shard in first.shards:
            self._rooms.take(shard)
        return True
