"""What jobs read of a source, for one that is not on this machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from streamq.checkpoint import BLOCK, Span, Traffic, forecast
from streamq.planning import Plan
from streamq.writer import free_bytes, same_disk

from .jobs import JOB, AmaxPart, CopyRun, Job, jobs_of
from .slabs import spans_of


def reads(job: Job) -> Iterator[Span]:
    """What a job reads."""
    if isinstance(job, CopyRun):
        yield job.file, job.start, job.start + job.nbytes
    elif isinstance(job, AmaxPart):
        yield from spans_of(job.rows)
    else:
        for share in job.shares:
            for rows in share.rows:
                yield from spans_of(rows)


def as_they_lie(jobs: Iterable[Job]) -> list[Job]:
    """Jobs in the order of the source, so that what several of them need is not kept for long."""
    return sorted(jobs, key=lambda job: min(reads(job)))


def with_released(jobs: Iterable[Job]) -> Iterator[Job]:
    """Jobs, and what they release behind the last one that does."""
    jobs = list(jobs)
    left = Counter(id(job.large) for job in jobs if isinstance(job, AmaxPart))
    for job in jobs:
        yield job
        if isinstance(job, AmaxPart):
            left[id(job.large)] -= 1
            if not left[id(job.large)]:
                yield from job.then


def traffic_of(plans: Sequence[Plan], folders: Sequence[tuple[Path, int]] = ()) -> Traffic | None:
    """What carrying out some plans for one source will download; None where it is here.

    ``folders``: where their outputs go, as ``spool_beside`` has them.
    """
    remote = plans[0].remote
    if remote is None:
        return None
    jobs = as_they_lie(jobs_of([plan.shards for plan in plans if not plan.verbatim]))
    slots = spool_beside(plans, folders)
    found = forecast(map(reads, with_released(jobs)), remote.extents, slots)
    if copies := sum(plan.verbatim for plan in plans):  # by themselves, after all else
        total = sum(size - first for first, size in remote.extents.values())
        found = found._replace(
            needed=total, fetched=found.fetched + copies * total, held=max(found.held, JOB)
        )
    return found


def spool_beside(plans: Sequence[Plan], folders: Sequence[tuple[Path, int]]) -> int:
    """Blocks that the spool of a remote source may hold where outputs are on the same disk.

    ``folders``: where they go, with the bytes that each of them takes there.
    """
    remote = plans[0].remote
    assert remote is not None
    place = remote.folder / "spool"
    near = [(folder, need) for folder, need in folders if same_disk(folder, place)]
    if not near:
        return remote.slots
    left = free_bytes(near[0][0]) - sum(need for _, need in near)
    return max(0, min(remote.slots, left // BLOCK))
