"""Carry out plans: N workers, each with its own buffers; DST appears at the end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from streamq.checkpoint import SPOOL, Checkpoint
from streamq.hub import Committed
from streamq.pace import FREE, Pace
from streamq.planning import MAX_MEMORY, Plan
from streamq.quality import Quality
from streamq.writer import Destination, HubDestination, Upload, place_of

from .boxes import Tally
from .card import card_of, check_card
from .devices import Means
from .engine import Engine, Started
from .finish import finish
from .origin import identity_of, origin_of
from .places import Output, check_outputs, destination_of
from .reads import spool_beside, traffic_of
from .run import Fresh, Shards, Target, units_of
from .threads import Here, default_workers, folders_of, means_of, shards_to
from .worker import Progress

__all__ = [
    "Engine", "Fresh", "Means", "Output", "Progress", "Settings", "Shards", "Started", "Summary",
    "Tally", "Upload", "check_outputs", "convert", "convert_all", "default_workers", "identity_of",
    "means_of", "repeat", "shards_to", "traffic_of", "units_of",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Settings:
    """How plans are carried out; no byte of an output depends on it.

    ``workers``: threads (default: the processors). ``max_memory``: bytes of buffers of
    all workers. ``sync``: flush to disk before an output appears. ``overwrite``: replace
    what is there, once the new one is complete. ``stats``: measure what the weights lose,
    with ``details`` all that a report shows of it. ``progress``: see ``Progress``. ``notify``: told
    sentences for people. ``restart``: discard what an interrupted run left. ``sha256``: note
    that of every file as well. ``device``: "cpu", "auto", "cuda", "npu", or several
    as in "cuda:0,cuda:1". ``device_memory``: bytes of each of them. ``limit_rate``: bytes of
    shards a second that all threads together read and write. ``spool``: bytes on disk, in
    ``spool_dir``, of what a source on the Hub sent and is needed again. ``upload``: for outputs on
    the Hub.
    """

    workers: int | None = None
    max_memory: int = MAX_MEMORY
    sync: bool = True
    overwrite: bool = False
    stats: bool = False
    details: bool = False
    progress: Progress | None = None
    notify: Callable[[str], None] | None = None
    restart: bool = False
    sha256: bool = False
    device: str = "cpu"
    device_memory: int | None = None
    limit_rate: int | None = None
    spool: int = SPOOL
    spool_dir: Path | None = None
    upload: Upload = field(default_factory=Upload)


@dataclass(frozen=True, slots=True)
class Summary:
    """What a conversion did; ``rounded`` scales of the source were not exact in the output.

    ``backend``: whose kernels ran, and where. ``resumed``: bytes of the output that an earlier
    run had written. ``remarks``: sentences about devices. ``downloaded``: bytes that came from
    the Hub, for all outputs together; None for a source on this machine. ``committed``: where an
    output on the Hub is.
    """

    bytes_in: int
    bytes_out: int
    seconds: float
    workers: int
    backend: str
    quality: Quality | None
    rounded: int
    resumed: int = 0
    remarks: tuple[str, ...] = ()
    downloaded: int | None = None
    committed: Committed | None = None


def convert(
    source: Checkpoint,
    plan: Plan,
    dst: str | os.PathLike[str],
    settings: Settings = Settings(),
    engine: Engine | None = None,
) -> Summary:
    """Write the checkpoint that ``plan`` describes to ``dst``, a directory or ``hf://org/repo``."""
    outputs = [Output(plan, place_of(dst, settings.upload))]
    (summary,) = convert_all(source, outputs, settings, engine)
    return summary


def convert_all(
    source: Checkpoint,
    outputs: list[Output],
    settings: Settings = Settings(),
    engine: Engine | None = None,
) -> list[Summary]:
    """Carry out several plans for one source, which is read once.

    ``engine``: where the shards are made; None for this process. Goes on where an earlier run
    with the same plans was interrupted. Raises StreamqError; what is done then stays in
    ``dst.partial``, and notes on the exception say so.
    """
    began = time.perf_counter()
    engine = engine or Here()
    means = engine.means(outputs, settings)
    check_outputs(outputs, settings.overwrite)
    for output in outputs:
        check_card(source, output)
    s = settings
    source.pace = Pace(s.limit_rate)
    targets = [destination_of(o, s.overwrite, s.sync, s.sha256, source.pace) for o in outputs]
    pairs = list(zip(outputs, targets, strict=True))
    progress = s.progress or (lambda n, name: None)
    prints = source.fingerprint()
    try:
        for output, target in pairs:
            target.begin(identity_of(output.plan, prints), s.restart)
        if source.remote is not None:
            source.limit_spool(spool_beside([o.plan for o in outputs], folders_of(outputs)))
        work = [(o.plan, t) for o, t in pairs if not o.plan.verbatim]
        run = engine.start(source, work, means, s)
        resumed = [_resumed(source, o, t, s) for o, t in pairs]
        if run.unmeasured:
            _say(s, "an earlier run measured less; what it has done is not in the figures")
        backend, remarks = run.run()
        for output, target in pairs:
            finish(source, output.plan, target, progress)
        source.refuse_changed()
        losses = dict(zip((id(t) for _, t in work), run.measured, strict=True))
        for output, target in pairs:
            if isinstance(target, HubDestination):
                if count := target.outlet.left:
                    shards = "shard is on its" if count == 1 else "shards are on their"
                    _say(s, f"{target.name}: {count} converted {shards} way there")
                quality, _ = losses.get(id(target), (None, 0))
                # Figures of some of the weights are none of the model.
                target.write_card(card_of(source, output, None if run.unmeasured else quality))
            target.commit(origin_of(output.plan, prints))
    except BaseException as e:
        for target in targets:
            if target.begun and target.partial.exists():
                e.add_note(
                    f"{target.name} was not written; {target.partial} stays, the same command goes "
                    "on from there."
                )
        raise
    finally:
        source.pace = FREE
        for target in targets:
            target.close()
        if means.fleet:
            means.fleet.close()
    seconds = time.perf_counter() - began
    measured = iter(run.measured)
    summaries = []
    for (output, target), before in zip(pairs, resumed, strict=True):
        plan = output.plan
        ran, (quality, rounded) = (
            ("copied", (None, 0)) if plan.verbatim else (backend, next(measured))
        )
        summaries.append(
            Summary(
                plan.bytes_in,
                plan.bytes_out,
                seconds,
                means.workers,
                ran,
                quality,
                rounded,
                before,
                remarks,
                None if source.remote is None else source.received + run.received,
                target.committed,
            )
        )
    return summaries


def _resumed(source: Checkpoint, output: Output, target: Destination, settings: Settings) -> int:
    """Say how far an earlier run came; bytes of its shards that are there."""
    plan = output.plan
    names = source.files if plan.verbatim else [shard.name for shard in plan.shards]
    if said := target.how_far(names, plan.bytes_out):
        _say(settings, said)
    done = sum(map(target.bytes_of, names))
    if settings.progress and done:
        settings.progress(plan.bytes_in * done // plan.bytes_out, "")
    return done


def _say(settings: Settings, line: str) -> None:
    if settings.notify:
        settings.notify(line)


def repeat(source: Checkpoint, plan: Plan, target: Target, settings: Settings) -> Quality | None:
    """Give all that a conversion would write to ``target``; what the weights lost, if asked for."""
    run, _ = shards_to(source, plan, target, settings)
    finish(source, plan, target, settings.progress or (lambda n, name: None))
    return run.measured[0][0] if run.measured else None
