"""Shards as tasks: handed out, taken in where they are made, done again where they are lost.

Ray does not retry them by itself, so that what a lost one has left can be removed.
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Collection
from itertools import repeat
from typing import TYPE_CHECKING, Any, NamedTuple

from streamq.converting import Settings, Tally, units_of
from streamq.errors import StreamqError
from streamq.planning import Plan, ShardPlan
from streamq.quality import Quality
from streamq.writer import Destination

from .node import Made, Order, make

if TYPE_CHECKING:
    from .ray import Ray

#: How often a shard is begun before it is given up: what it does may be what kills its worker.
TRIES = 4
#: Seconds without a finished task after which it is looked whether nodes are left.
PATIENCE = 30.0


class _Job(NamedTuple):
    """A shard to be made, of the output ``number``; ``tries`` that were lost before."""

    number: int
    shard: ShardPlan
    tries: int = 0

    @property
    def attempt(self) -> str:
        """The name of a folder that no other attempt of the run has."""
        return f"{self.number}-{self.shard.name}-{self.tries}"


class Tasks:
    """The shards of some plans that are left to do; see ``Started``."""

    def __init__(
        self, engine: Ray, order: Order, work: list[tuple[Plan, Destination]], settings: Settings
    ) -> None:
        self._engine, self._ray, self._order, self._settings = engine, engine.ray, order, settings
        self._targets = [target for _, target in work]
        self._tallies = [Tally(Quality(settings.details) if settings.stats else None) for _ in work]
        self._left: list[_Job] = []
        self._lost = 0
        self.unmeasured, self.received = False, 0
        for number, (plan, target) in enumerate(work):
            noted = units_of([plan]) if target.goes_on and settings.stats else repeat(set())
            for shard, units in zip(plan.shards, noted, strict=False):
                if not self._is_there(number, shard, target, len(units)):
                    self._left.append(_Job(number, shard))

    def _is_there(self, number: int, shard: ShardPlan, target: Destination, units: int) -> bool:
        """Take over a shard that is complete from an earlier run; a part of one is not used.

        ``units``: how many notes it has if an earlier run has measured.
        """
        tally = self._tallies[number]
        target.finished(shard.name, shard.size, set())
        if not target.is_complete(shard.name):
            return False
        notes = target.notes_of(shard.name)
        for note in notes:
            tally.take(note)
        if shard.weights and tally.quality is not None:
            self.unmeasured |= sum(map(tally.is_whole, notes)) < units
        return True

    @property
    def measured(self) -> list[tuple[Quality | None, int]]:
        """Of each plan what its weights lost, and the number of scales that were rounded."""
        return [(tally.quality, tally.rounded) for tally in self._tallies]

    def run(self) -> tuple[str, tuple[str, ...]]:
        """Have all of them done, the largest first; whose kernels ran, and a remark."""
        if not self._left:
            return "Ray", ()
        workers = self._order.settings.workers
        assert workers is not None
        ran: set[str] = set()
        kernels: set[str] = set()
        pending: dict[Any, _Job] = {}
        try:
            for folder in self._order.folders:
                folder.mkdir(parents=True)
            self._engine.refuse_unlike(self._order, workers)
            begin = self._beginner(workers)
            waiting = deque(sorted(self._left, key=lambda job: -job.shard.size))
            while waiting or pending:
                while waiting and self._has_room(waiting[0], pending.values()):
                    job = waiting.popleft()
                    pending[begin(job)] = job
                ready, _ = self._ray.wait(list(pending), timeout=PATIENCE)
                if not ready and not self._engine.nodes(workers):
                    self._say(f"no node with {workers} CPUs is left; waiting for one")
                for ref in ready:
                    job = pending.pop(ref)
                    if (result := self._result(ref, job)) is None:
                        waiting.appendleft(job._replace(tries=job.tries + 1))
                        continue
                    node, made = result
                    self._take(job, made)
                    ran.add(node)
                    kernels.add(made.kernels)
        finally:
            self._engine.give_up(pending)
            for target in self._targets:
                shutil.rmtree(target.attempts, ignore_errors=True)
        said = f"Ray: {len(self._left)} tasks on {len(ran)} nodes"
        if self._lost:
            said += f"; {self._lost} more were lost with their worker or node, and done again"
        return ", ".join(sorted(kernels)), (said,)

    def _has_room(self, job: _Job, pending: Collection[_Job]) -> bool:
        """Whether there is room where the output is built, now or when more of it has gone."""
        outlet = self._targets[job.number].outlet
        if outlet is None:
            return True
        made = sum(other.shard.size for other in pending if other.number == job.number)
        if made and made + job.shard.size > outlet.room:
            return False
        outlet.make_room(made + job.shard.size)
        return True

    def _beginner(self, workers: int) -> Callable[[_Job], Any]:
        """What begins a task and returns the reference to its result."""
        task = self._ray.remote(num_cpus=workers, max_retries=0)(_on_node)
        order = self._ray.put(self._order)
        return lambda job: task.remote(order, job.number, job.shard.name, job.attempt)

    def _result(self, ref: Any, job: _Job) -> tuple[str, Made] | None:
        """The node and what it made, None where it was lost. Raises what went wrong there."""
        errors = self._ray.exceptions
        try:
            node, made = self._ray.get(ref)
        except (
            errors.WorkerCrashedError, errors.NodeDiedError, errors.LocalRayletDiedError,
            errors.ObjectLostError, errors.OutOfMemoryError,
        ) as e:  # fmt: skip
            said = str(e).strip().partition("\n")[0].removesuffix(".")
            if job.tries + 1 == TRIES:
                raise StreamqError(
                    f"{job.shard.name}: was lost {TRIES} times with the worker or node that made "
                    f"it, the last time because of this: {said}."
                ) from None
            self._lost += 1
            self._say(f"{job.shard.name} was lost with its worker or node, and is done again")
            shutil.rmtree(self._order.folders[job.number] / job.attempt, ignore_errors=True)
            return None
        except errors.RayTaskError as e:
            raise e.cause from e
        except errors.RayError as e:
            raise StreamqError(f"{job.shard.name}: Ray failed: {e}") from None
        if isinstance(made, Exception):
            raise made
        return node, made

    def _take(self, job: _Job, made: Made) -> None:
        """A shard that is made gets its place."""
        shard = job.shard
        target = self._targets[job.number]
        target.accept(made.path, shard.name, shard.header, shard.size, made.sums, made.notes)
        self.received += made.received
        for note in made.notes:
            self._tallies[job.number].take(note)
        if self._settings.progress:
            self._settings.progress(made.bytes_in, shard.name)

    def _say(self, line: str) -> None:
        if self._settings.notify:
            self._settings.notify(line)


def _on_node(order: Order, number: int, name: str, attempt: str) -> tuple[str, Any]:
    import ray

    return ray.get_runtime_context().get_node_id(), make(order, number, name, attempt)
