"""What each job would do, before any byte is written; and which of them are done already."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamq.api import options
from streamq.checkpoint import Checkpoint, open_checkpoint
from streamq.checkpoint.spool import spool_folder
from streamq.converting import Settings, Upload, check_outputs
from streamq.converting.origin import origin_of
from streamq.converting.reads import traffic_of
from streamq.errors import CheckpointError, PlanError
from streamq.hub import Repository, is_hub, parse_hub
from streamq.planning import Plan, format_name, make_plan
from streamq.trust import RECORD, parse_record

from .budget import Space
from .jobs import Job
from .state import Known, State, asked_of, hash_of, record_of
from .work import output_of


@dataclass(frozen=True, slots=True)
class Planned:
    """A job that is to be done. Sizes in bytes.

    ``disk``: what the output needs there, or its way to the Hub, and what a source on the Hub does.
    ``memory``: the buffers of one thread, the least that the conversion works with, and ``held``,
    what it holds of a source on the Hub, of which it fetches ``download``. ``known``: what the
    state will say when it has begun.
    """

    job: Job
    scheme: str
    format: str
    bytes_in: int
    bytes_out: int
    disk: tuple[Space, ...]
    memory: int
    held: int
    download: int
    quantized: int
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    known: Known

    def to_json(self) -> dict[str, Any]:
        """What there is to say of the plan."""
        return {
            "dst": self.job.dst, "scheme": self.scheme, "format": self.format,
            "bytes_in": self.bytes_in, "bytes_out": self.bytes_out,
            "disk_needed": sum(space.nbytes for space in self.disk),
            "buffers": self.memory + self.held, "download": self.download,
            "quantized": self.quantized, "warnings": list(self.warnings), "notes": list(self.notes),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Kept:
    """A job that an earlier run has done; ``result``: what it said then."""

    job: Job
    result: Mapping[str, Any]


def look(jobs: Sequence[Job], state: State, settings: Settings) -> list[Planned | Kept | Exception]:
    """What is to be done of the jobs of one source; for each that, or why it cannot be done."""
    src = jobs[0].src
    if all(_is_done(job, state) for job in jobs) and not os.path.exists(src):
        return [_kept(job, state) for job in jobs]  # the source is gone, or on the Hub
    try:
        with open_checkpoint(src, spool=settings.spool, spool_dir=settings.spool_dir) as source:
            prints = source.fingerprint()
            return [_answer(job, source, prints, state, settings) for job in jobs]
    except Exception as e:
        return [e for _ in jobs]


def _answer(
    job: Job, source: Checkpoint, prints: dict[str, Any], state: State, settings: Settings
) -> Planned | Kept | Exception:
    try:
        return _look(job, source, prints, state, settings)
    except Exception as e:
        return e


def _look(
    job: Job, source: Checkpoint, prints: dict[str, Any], state: State, settings: Settings
) -> Planned | Kept:
    asked, known = asked_of(job), state.of(job)
    now = None if is_hub(job.src) else hash_of(prints)  # a branch may move on
    same = known if known and known.asked == asked and known.source == now else None
    if same and _is_done(job, state):
        return _kept(job, state)
    plan = make_plan(source, options(**job.how))
    if same and same.state == "begun" and _appeared(job, same, plan, prints, settings.upload):
        result = {"bytes_in": plan.bytes_in, "bytes_out": plan.bytes_out,
                  "scheme": plan.scheme_names, "format": format_name(plan)}  # fmt: skip
        record = None if is_hub(job.dst) else record_of(job, settings.upload)
        state.note(job, Known("done", asked, now, record, result))
        return _kept(job, state)
    if not is_hub(job.dst) and os.path.lexists(job.dst) and not settings.overwrite:
        raise PlanError(_in_the_way(job, known, asked, now))
    output = output_of(job.src, job.dst, job.how, plan, settings.upload)
    check_outputs([output], settings.overwrite)
    traffic = traffic_of([plan])
    held, download = (traffic.held, traffic.fetched) if traffic else (0, 0)
    disk = [Space(str(output.folder), output.disk_needed, not is_hub(job.dst))]
    if traffic:
        folder = settings.spool_dir or spool_folder()
        disk.append(Space(str(folder / "spool"), traffic.spooled, False))
    plan.workers_within(1, settings.max_memory, held)
    return Planned(
        job, plan.scheme_names, format_name(plan), plan.bytes_in, plan.bytes_out,
        tuple(disk), plan.slab_memory, held, download,
        sum(len(w.sources) for s in plan.shards for w in s.weights),
        tuple(plan.warnings), tuple(plan.notes),
        Known("begun", asked, now, record_of(job, settings.upload), {}),
    )  # fmt: skip


def _is_done(job: Job, state: State) -> bool:
    """Whether an earlier run did what is asked for now, and the output is as it left it."""
    known = state.of(job)
    if known is None or known.state != "done" or known.asked != asked_of(job):
        return False
    return is_hub(job.dst) or known.record == (record_of(job, Upload()) or "")


def _kept(job: Job, state: State) -> Kept:
    known = state.of(job)
    assert known is not None
    return Kept(job, known.result)


def _appeared(
    job: Job, known: Known, plan: Plan, prints: dict[str, Any], upload: Upload
) -> bool:  # fmt: skip
    """Whether the output came to be after the job had begun: only the note of it is missing."""
    if record_of(job, upload) in (None, known.record):
        return False
    if is_hub(job.dst):
        repository = Repository(parse_hub(job.dst)._replace(revision=upload.branch))
        raw = bytearray()
        size = repository.files[RECORD].size
        repository.read(RECORD, 0, size, lambda at, piece: raw.extend(piece))
    else:
        raw = bytearray((Path(job.dst) / RECORD).read_bytes())
    try:
        return hash_of(parse_record(bytes(raw)).about) == hash_of(origin_of(plan, prints))
    except CheckpointError:
        return False


def _in_the_way(job: Job, known: Known | None, asked: str, now: str | None) -> str:
    """Why something that is there already is not taken for the output."""
    if known is None:
        return (
            f"{job.dst}: is there, and no earlier run of this batch made it; --overwrite replaces "
            "it."
        )
    what = (
        "other options" if known.asked != asked
        else "another state of the source" if known.source != now
        else "another content"
    )  # fmt: skip
    return f"{job.dst}: is there, from {what}; --overwrite replaces it."
