"""So many conversions at once as are asked for, and as there is room for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

from streamq.converting import Settings, default_workers
from streamq.errors import Stopped, StreamqError
from streamq.hub import is_hub

from .budget import Budget
from .look import Planned
from .state import State, record_of
from .types import How, Outcome, Task, Watch, pause_after
from .work import Engine, JobError, Work, failure_of, settings_json


class Pool:
    """Threads, each with one conversion at a time."""

    def __init__(
        self, how: How, engine: Engine, state: State, watch: Watch,
        end: Callable[[Outcome], None],
    ) -> None:  # fmt: skip
        self._how, self._engine, self._state, self._watch = how, engine, state, watch
        self._end = end
        self._budget = Budget(how.settings.max_memory, how.max_disk)
        self._changed = threading.Condition()
        self._waiting: list[Task] = []
        self._running = 0
        self._stopped = False  # nobody waits for the results any more
        self._over = False  # nothing begins any more

    def run(self, tasks: Sequence[Task]) -> None:
        """Until all have ended; ends what runs if one of the threads, or the caller, cannot go on.

        A task that alone is too much for the budget goes in single jobs; one that cannot be
        carried out at all fails before any other begins.
        """
        memory = self._how.settings.max_memory
        for task in tasks:
            fits = task.need.memory <= memory and self._budget.lacks(task.need) is None
            self._waiting += [task] if fits else [Task([p]) for p in task.planned]
        for task in self._waiting[:]:
            if task in self._waiting and (why := self._budget.lacks(task.need)):
                self._waiting.remove(task)
                self._fail(task, JobError(why, False))
        with ThreadPoolExecutor(self._how.jobs) as pool:
            futures = [pool.submit(self._serve) for _ in range(self._how.jobs)]
            try:
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
            except BaseException:
                self._halt()
                raise

    def _halt(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._engine.stop()

    def _serve(self) -> None:
        """One thread: task after task."""
        while (taken := self._next()) is not None:
            task, number, memory, at_once = taken
            try:
                self._try(task, memory, at_once)
            finally:
                with self._changed:
                    self._budget.give_back(number)
                    self._running -= 1
                    self._changed.notify_all()

    def _next(self) -> tuple[Task, int, int, int] | None:
        """The first task that there is room for, its number and memory, among how many; or None.

        Waits while nothing can begin. Where nothing runs either there will be no room.
        """
        with self._changed:
            while not self._stopped and (self._waiting or self._running):
                now = time.monotonic()
                ready = [task for task in self._waiting if task.not_before <= now]
                at_once = min(self._how.jobs, len(self._waiting) + self._running)
                for task in ready:
                    share = self._how.settings.max_memory // at_once
                    if (taken := self._budget.take(task.need, share)) is not None:
                        self._waiting.remove(task)
                        self._running += 1
                        return task, *taken, at_once
                if ready and not self._running:
                    if why := self._budget.lacks(ready[0].need):
                        self._waiting.remove(ready[0])
                        self._fail(ready[0], JobError(why, False))
                    continue
                later = [task.not_before for task in self._waiting if task.not_before > now]
                self._changed.wait(min(later) - now if later else None)
        return None

    def _try(self, task: Task, memory: int, at_once: int) -> None:
        """Carry a task out once, and write down what became of it."""
        task.tries += 1
        for p in task.planned:
            self._state.note(p.job, p.known)
        settings = self._settings(task, memory, at_once)
        outputs = tuple((p.job.dst, p.job.how) for p in task.planned)
        self._watch.begins(task)
        try:
            made = self._engine.carry_out(
                Work(task.src, outputs, settings_json(settings), self._how.engine),
                lambda n, name: self._watch.advances(task, n, name),
                lambda line: self._watch.says(task.src, line),
            )
        except Stopped:
            return
        except Exception as e:
            self._failed(task, e if isinstance(e, JobError) else failure_of(e))
            return
        for p, result in zip(task.planned, made, strict=True):
            self._done(p, result, task.tries)

    def _settings(self, task: Task, memory: int, at_once: int) -> Settings:
        """Those of one try; what is this machine's is shared out."""
        s = self._how.settings
        s = replace(s, restart=s.restart and task.tries == 1)
        if self._how.engine != "local":
            return s
        twice = 2 if is_hub(task.src) else 1  # half of them wait for it
        threads = s.workers or twice * default_workers()
        share = max(1, threads // at_once)
        rate = s.limit_rate and max(1, s.limit_rate // at_once)
        return replace(
            s, workers=share, max_memory=memory, spool=s.spool // at_once, limit_rate=rate
        )

    def _done(self, p: Planned, result: dict[str, Any], tries: int) -> None:
        record = None if is_hub(p.job.dst) else record_of(p.job, self._how.settings.upload)
        known = replace(p.known, state="done", record=record, result=result)
        self._state.note(p.job, known)
        self._end(Outcome(p.job, "done", p.to_json() | result, None, tries))

    def _failed(self, task: Task, error: JobError) -> None:
        """Try again if that may help.

        Outputs get their names one after the other, so that some may be there.
        """
        there = [p for p in task.planned if self._is_there(p)]
        for p in there:
            self._done(p, {}, task.tries)
        task.planned = [p for p in task.planned if p not in there]
        if not task.planned:
            return
        task.error = error
        if not error.transient or task.tries > self._how.retries:
            self._fail(task, error)
            return
        seconds = pause_after(task.tries)
        self._watch.pauses(task, str(error), seconds)
        with self._changed:
            if self._stopped or self._over:
                self._fail(task, error)
                return
            task.not_before = time.monotonic() + seconds
            self._waiting.append(task)

    def _is_there(self, p: Planned) -> bool:
        """Whether an output appeared all the same."""
        try:
            return record_of(p.job, self._how.settings.upload) not in (None, p.known.record)
        except StreamqError:
            return False

    def _fail(self, task: Task, error: JobError) -> None:
        """A task has failed for good; without ``continue_on_error`` no other begins."""
        for p in task.planned:
            known = replace(p.known, state="failed", result={"error": str(error)})
            self._state.note(p.job, known)
            self._end(Outcome(p.job, "failed", p.to_json(), str(error), task.tries))
        with self._changed:
            if self._how.continue_on_error or self._over:
                return
            self._over = True
            left, self._waiting = self._waiting, []
            self._changed.notify_all()
        for other in left:
            if other.error is not None:
                self._fail(other, other.error)
                continue
            for p in other.planned:
                self._end(Outcome(p.job, "not started", p.to_json()))
