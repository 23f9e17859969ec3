"""A batch: plan all of it, keep what is done, convert the rest."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from streamq.errors import PlanError, Stopped

from .budget import total_lack
from .jobs import Job
from .look import Kept, Planned, look
from .pool import Pool
from .state import State
from .types import How, Outcome, Task, Watch, pause_after
from .work import Engine, JobError, failure_of

#: Sources whose headers are read at once: that waits for disks and the Hub, and computes little.
LOOKING = 8


def plan_all(
    jobs: Sequence[Job], how: How, state: State, watch: Watch
) -> list[Planned | Kept | JobError]:
    """What is to be done of each job, in their order; sources that fail are tried again."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.src, []).append(job)
    stop = threading.Event()

    def of(group: list[Job]) -> list[Planned | Kept | JobError]:
        for tries in range(how.retries + 1):
            found = [failure_of(x) if isinstance(x, Exception) else x
                     for x in look(group, state, how.settings)]  # fmt: skip
            errors = [x for x in found if isinstance(x, JobError) and x.transient]
            if not errors or tries == how.retries:
                break
            seconds = pause_after(tries + 1)
            watch.says(group[0].src, f"{errors[0]} Again in {seconds:.0f} s.")
            if stop.wait(seconds):
                raise Stopped
        return found

    pool = ThreadPoolExecutor(LOOKING, "plan")
    try:
        found = [x for group in pool.map(of, groups.values()) for x in group]
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C does not wait for the Hub
    by_key = {job.key: x for job, x in zip(_flat(groups.values()), found, strict=True)}
    return [by_key[job.key] for job in jobs]


def run(jobs: Sequence[Job], how: How, engine: Engine, state: State, watch: Watch) -> list[Outcome]:
    """Do all jobs that are not done; what became of each, in their order.

    Raises PlanError where the disks do not hold all outputs, unless ``continue_on_error``, and
    WriteError where the state cannot be written.
    """
    ended: dict[str, Outcome] = {}

    def end(outcome: Outcome) -> None:
        ended[outcome.job.key] = outcome
        watch.ends(outcome)

    tasks: dict[str, list[Planned]] = {}
    failed = False
    for job, found in zip(jobs, plan_all(jobs, how, state, watch), strict=True):
        if isinstance(found, Kept):
            end(Outcome(job, "kept", dict(found.result)))
        elif isinstance(found, JobError):
            failed = True
            end(Outcome(job, "failed", {"scheme": job.label}, str(found)))
        else:
            tasks.setdefault(job.src, []).append(found)
    if failed and not how.continue_on_error:
        for p in _flat(tasks.values()):
            end(Outcome(p.job, "not started", p.to_json()))
    elif tasks:
        if not how.continue_on_error and (lack := lack_of(_flat(tasks.values()))):
            raise PlanError(lack)
        pool = Pool(how, engine, state, watch, end)
        pool.run([Task(planned) for planned in tasks.values()])
    return [ended[job.key] for job in jobs]


def lack_of(found: Iterable[object]) -> str | None:
    """Why the disks do not hold the outputs of all that is planned; None where they do."""
    needs = [Task([p]).need for p in found if isinstance(p, Planned)]
    lack = total_lack(needs)
    return f"all outputs together: {lack} --continue-on-error makes what fits." if lack else None


def _flat(lists: Iterable[Sequence[Any]]) -> list[Any]:
    return [x for xs in lists for x in xs]
